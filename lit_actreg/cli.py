"""The command line: where parts meet. `lit-actreg fit | validate | test | predict | quantize | table`.

LightningCLI turns the signatures and docstrings of the module, the DataModule, the Trainer and the callbacks
into options. Plugins are found by entry point (group ``lit_actreg.plugins``) and imported before parsing, so that
their classes can be named: ``--quantizer GPTQ``. A user's mistake ends with one line and exit status 2;
LIT_ACTREG_TRACEBACK=1 shows where it was noticed.
"""

import math
import os
import re
import signal
import sys
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, Namespace
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, TQDMProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from tqdm import tqdm

from lit_actreg.artifact import is_artifact
from lit_actreg.callbacks.checkpoint import ResumeCheckpoint, leaves_files, run_folder, take_run_folder
from lit_actreg.callbacks.clip_schedule import ClipSchedule
from lit_actreg.callbacks.kurtosis import KurtosisRegularization
from lit_actreg.callbacks.loss_guard import LossGuard
from lit_actreg.callbacks.outlier_monitor import OutlierMonitor
from lit_actreg.callbacks.throughput import Throughput
from lit_actreg.callbacks.weight_penalty import WeightPenalty
from lit_actreg.checkpoint import is_sharded, last_checkpoint, read_checkpoint_info, whole_or_before
from lit_actreg.config import OptimConfig, QuantConfig, as_plain
from lit_actreg.contracts import ENTRY_POINT_GROUP, Quantizer
from lit_actreg.data.datamodule import TextDataModule
from lit_actreg.data.tokenizer import gives_other_ids
from lit_actreg.module import LitLanguageModel
from lit_actreg.trainer import ActRegTrainer

# What a user's input raises; anything else is our mistake and keeps its traceback
MISTAKES = (
    ArgumentError,
    MisconfigurationException,
    ValueError,
    OSError,
)


class SaveFitConfig(SaveConfigCallback):
    """Keeps the configuration beside a fit's logs; other subcommands write only what they were asked for."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            super().setup(trainer, pl_module, stage)


class ActRegCLI(LightningCLI):
    """LightningCLI with our links, callbacks and subcommands."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's subcommands and ours."""
        return LightningCLI.subcommands() | {
            "quantize": {"model", "datamodule"},
            "table": {"model", "datamodule"},
        }

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Parsers raise what jsonargparse would print below two pages of usage; :func:`main` says it in one line."""
        return super().init_parser(exit_on_error=False, **kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_class_arguments(OptimConfig, "optim")
        parser.link_arguments("optim", "model.optim")
        parser.link_arguments("data.vocab_size", "model.vocab_size")
        parser.link_arguments("data.context", "model.shape.context")
        parser.add_lightning_class_args(KurtosisRegularization, "kurtosis")
        parser.add_lightning_class_args(WeightPenalty, "weight_penalty")
        parser.add_lightning_class_args(ClipSchedule, "clips")
        parser.add_lightning_class_args(OutlierMonitor, "outliers")
        parser.add_lightning_class_args(LossGuard, "guard")
        parser.add_lightning_class_args(Throughput, "throughput")
        parser.add_lightning_class_args(ResumeCheckpoint, "checkpoint")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """A fit's progress bar is drawn as often as its numbers change."""
        given = self.config_init[self.subcommand].trainer if self.subcommand == "fit" else {}
        callbacks = given.get("callbacks") or []
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        hidden = given.get("enable_progress_bar") is False or given.get("barebones")
        if self.subcommand == "fit" and not hidden and not any(isinstance(c, ProgressBar) for c in callbacks):
            batches = (given.get("log_every_n_steps") or 50) * (given.get("accumulate_grad_batches") or 1)
            kwargs["callbacks"] = [*callbacks, TQDMProgressBar(batches)]
        return super().instantiate_trainer(**kwargs)

    def before_fit(self) -> None:
        """Refuses what the Trainer would after hours of packing, finds `--ckpt_path last`, and takes the fit's folder.

        "last" is the newest whole checkpoint of the run: of this version, else of any.
        """
        self.model.check(self.trainer)
        options, logger = self.config_init["fit"], self.trainer.logger
        next_version = logger and getattr(logger, "_version", "") is None and isinstance(logger.version, int)
        if options.get("ckpt_path") == "best":
            raise ValueError('ckpt_path "best": a fit keeps its newest checkpoints, so name one, or "last"')
        if options.get("ckpt_path") == "last" and not Path("last").exists():
            folder = run_folder(self.trainer)
            alone = logger is None or (folder / "checkpoints").is_dir()
            versions = [folder] if alone else sorted(folder.parent.glob("*"))
            found = last_checkpoint([version / "checkpoints" for version in versions])
            options["ckpt_path"] = str(found) if found else None
            rank_zero_info(f"--ckpt_path last is {found}" if found else f"{folder} has no checkpoint yet: a new fit")
        path, strategy = options.get("ckpt_path"), self.trainer.strategy
        clips_from = options.clips.from_checkpoint
        if clips_from and not path and not Path(clips_from).exists():
            raise ValueError(f"clips.from_checkpoint {clips_from} does not exist: name a .ckpt of a fit")
        if isinstance(strategy, ModelParallelStrategy):
            sizes, num_ranks = (strategy._data_parallel_size, strategy._tensor_parallel_size), self.trainer.world_size
            if "auto" not in sizes and math.prod(sizes) != num_ranks:
                raise ValueError(
                    f"trainer.strategy has data_parallel_size × tensor_parallel_size {sizes[0]} × {sizes[1]}, which is "
                    f"not trainer.devices × num_nodes, {num_ranks}: make them equal"
                )
        elif path and is_sharded(Path(path)):
            raise ValueError(f"{path} is in shards: resume it with trainer.strategy ModelParallelStrategy")
        if leaves_files(self.trainer):
            assert isinstance(self.datamodule, TextDataModule)
            _ = self.datamodule.sources, self.datamodule.valid_source  # a mistake is found before a folder is made
            take_run_folder(self.trainer, bool(next_version), resumes=bool(path))

    def before_predict(self) -> None:
        assert isinstance(self.datamodule, TextDataModule)
        self.datamodule.check_prompts()

    def after_fit(self) -> None:
        """The last word of a fit is the perplexity of its last weights, wherever the validation interval fell."""
        self.trainer.validate(self.model, datamodule=self.datamodule)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self._arguments = args
        super().parse_arguments(parser, args)

    def _overridden(self, quant: QuantConfig) -> dict[str, Any]:
        """A checkpoint's quantization, with the fields of model.quant that the user has named in the place of its own.

        Parsed again with the checkpoint's as the default: the first time, what was not named came from QuantConfig's.
        """
        subcommand = self.config["subcommand"]
        if self.config[subcommand].model.quant is None:
            return as_plain(quant)
        self._subcommand_parsers[subcommand].set_defaults({"model.quant": as_plain(quant)})
        return dict(self.parser.parse_args(self._arguments)[subcommand].model.quant)

    def _parse_ckpt_path(self) -> None:
        """A checkpoint fixes shape, vocabulary and tokenizer; its quantization holds but for what the user names.

        LightningCLI would let all of the checkpoint's hyper-parameters override the user's, silently
        (lightning#21116).
        """
        subcommand = self.config.get("subcommand")
        if subcommand is None:
            return
        options = self.config[subcommand]
        several, path, begun_from = options.get("checkpoints"), options.get("ckpt_path"), options.model.init_from
        if subcommand == "fit":
            # "last" is no path: before_fit finds the file
            if path and (Path(path).exists() or Path(path).suffix == ".ckpt"):
                path = options.ckpt_path = str(whole_or_before(Path(path)))
                folder = read_checkpoint_info(Path(path), Path(options.data.cache_dir)).folder
                if folder is not None and not is_sharded(folder):
                    raise ValueError(
                        f"{path} has no optimizer state to resume from: name a .ckpt file of a fit, or start from its "
                        "weights with model.init_from"
                    )
            path = begun_from  # which describes the model of a fit, resumed or not; else the configuration does
            if path is None:
                return
            if not Path(path).exists():
                raise ValueError(f"model.init_from {path} does not exist: name a checkpoint, also to resume the fit")
        elif path and begun_from:
            raise ValueError(f"--ckpt_path {path} and --model.init_from {begun_from} are two models: leave one out")
        path = path or begun_from or next(iter((several or {}).values()), None)
        if path is None:
            option = "checkpoints" if subcommand == "table" else "ckpt_path"
            raise ValueError(f"{subcommand} needs a trained model: name one with --{option}")
        info = read_checkpoint_info(Path(path), Path(options.data.cache_dir))
        if is_artifact(Path(path)) and (subcommand == "fit" or self.config[subcommand].model.quant is not None):
            what = "a fit starts from others" if subcommand == "fit" else "its activations are part of it"
            raise ValueError(f"{path} is quantized, {what}: name the checkpoint that it was made from")
        if several and self.config[subcommand].model.quant is not None:
            raise ValueError("every checkpoint of a table brings its own quantization: leave model.quant out")
        if subcommand in ("validate", "test", "table") and options.data.context > info.shape.context:
            known = f"the {info.shape.context} tokens that {path} was trained on"
            rank_zero_warn(f"data.context {options.data.context} is more than {known}")
        reads_text = subcommand != "quantize"  # which says itself where its method does
        if reads_text and info.tokenizer is None and options.data.tokenizer is None:
            raise ValueError(f"{path} has no tokenizer.json: name its tokenizer with --data.tokenizer")
        given = options.data.tokenizer and Path(options.data.tokenizer).expanduser()
        if given and info.tokenizer and gives_other_ids(given, info.tokenizer):
            what = f"data.tokenizer {given} gives other ids than that of {path}"
            if subcommand != "fit":
                raise ValueError(f"{what}: leave it out")
            rank_zero_warn(f"{what}, whose embeddings are of other tokens then")
        if subcommand == "fit":
            info.shape.context = max(info.shape.context, options.data.context)
        options.model.shape = Namespace(as_plain(info.shape))
        options.model.vocab_size = options.data.vocab_size = info.vocab_size
        options.data.tokenizer = options.data.tokenizer or (info.tokenizer and str(info.tokenizer))
        if subcommand != "fit" and info.quant is not None and not several:
            options.model.quant = self._overridden(info.quant)
        elif options.model.quant is None and info.quant is not None:
            options.model.quant = Namespace(as_plain(info.quant))
        elif options.model.quant is None and subcommand != "fit":  # a model without clips: none are made up for it
            activations = "token" if subcommand == "quantize" else "none"
            options.model.quant = Namespace(as_plain(QuantConfig(activations=activations)))  # type: ignore[arg-type]
            if subcommand != "table":
                rank_zero_info(f'{path} has no clips: --model.quant.activations is "{activations}"')
        if subcommand != "fit" and not several and not options.get("calibrate"):
            wanted, learned = QuantConfig(**options.model.quant), info.quant or QuantConfig(activations="none")
            unlearned = sorted(set(wanted.clipped_sites) - set(learned.clipped_sites))
            if unlearned and not (info.quant is None and subcommand == "quantize"):  # which says what to do about it
                have = f"with clips at {learned.clipped_sites}" if learned.clipped_sites else "without clips"
                mend = 'model.quant.activations "token", or quantize with calibrate'
                raise ValueError(f"{path} has no clips at {unlearned}, it was trained {have}: use {mend}")
        if info.folder is not None and not several and subcommand != "fit":
            options.model.init_from, options.ckpt_path = path, None
        rank_zero_info(f"Shape, vocabulary and tokenizer come from {path}")


def import_plugins() -> None:
    """Imports what other packages (and lit_actreg_plugins) have registered, so that options can name it."""
    for entry_point in entry_points(group=ENTRY_POINT_GROUP):
        try:
            entry_point.load()
        except Exception as error:
            package = entry_point.dist.name if entry_point.dist else "?"
            what = f"plugin {entry_point.name} = {entry_point.value} of the package {package} cannot be imported"
            raise ValueError(f"{what} ({type(error).__name__}: {error}): mend or uninstall it") from error


def one_line(message: str) -> str:
    """An error's message as one line, without jsonargparse's account of the other types that did not fit either.

    Of a data worker's, which comes with a traceback, its own message. Python's types and objects in words.
    """
    if found := re.match(r"Caught (\w+) in DataLoader worker", message):
        message = message.rpartition(f"\n{found[1]}: ")[2]
    noise = ("Does not validate against", "Subtypes:", "Errors:", "Expected a <class 'NoneType'>", "Given value")
    lines = [line.strip().removeprefix("- ") for line in message.splitlines()]
    said = " ".join(line for line in lines if line and not line.startswith(noise))
    said = re.sub(r"<[\w.]*\.(\w+) object at 0x\w+>", r"\1", said)
    said = said.replace("Expected a <class 'list'>", "expected a list, '[…, …]'")
    said = said.replace("Expected a <class 'dict'>", "expected names and values, '{name: …}'")
    if said.startswith('Parser key "quantizer": Expected a dot import path'):
        said += f" (or one of {', '.join(sorted(kind.__name__ for kind in Quantizer.__subclasses__()))})"
    return said


def main(args: list[str] | None = None) -> None:
    """Runs the command line; a user's mistake is one line on stderr and exit status 2."""
    try:
        import_plugins()
        ActRegCLI(
            LitLanguageModel,
            TextDataModule,
            trainer_class=ActRegTrainer,
            save_config_callback=SaveFitConfig,
            seed_everything_default=1,
            auto_configure_optimizers=False,
            save_config_kwargs={"overwrite": True},
            parser_kwargs={"prog": "lit-actreg", "version": version("lit-actreg")},
            args=args,
        )
    except (KeyboardInterrupt, SystemExit) as error:
        if isinstance(error, SIGTERMException):  # Lightning would exit with 0
            raise SystemExit(128 + signal.SIGTERM) from None
        if isinstance(error, KeyboardInterrupt) or isinstance(error.__context__, KeyboardInterrupt):
            print("lit-actreg: interrupted", file=sys.stderr)
            raise SystemExit(128 + signal.SIGINT) from None
        raise
    except MISTAKES as error:
        if os.environ.get("LIT_ACTREG_TRACEBACK"):
            raise
        for bar in list(tqdm._instances):  # the line would stand behind an open one
            bar.close()
        print(f"lit-actreg: {one_line(str(error))}", file=sys.stderr)
        raise SystemExit(2) from None
