"""The Trainer with our subcommands: the signatures of ``quantize`` and ``table`` *are* their command lines."""

import os
from collections.abc import Iterable
from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import Tensor

from lit_actreg.artifact import is_artifact
from lit_actreg.checkpoint import is_sharded, load_lightning_checkpoint
from lit_actreg.compressed_tensors import WeightFormat
from lit_actreg.contracts import Quantizer
from lit_actreg.data.datamodule import TextDataModule
from lit_actreg.data.tokenizer import load_tokenizer
from lit_actreg.module import LitLanguageModel
from lit_actreg.quant.clips import ClipMethod
from lit_actreg.quantize import quantize_model
from lit_actreg.table import fill_table, plain, refuse, write_table


def another_process_does_it() -> bool:
    """Whether torchrun or SLURM has started this command on several ranks and this is not the first; it says so."""
    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID", "0")
    if rank != "0":
        print(f"rank {rank} of the launcher has nothing to do: rank 0 does it all")
    return rank != "0"


class ActRegTrainer(Trainer):
    """Lightning's Trainer, which also quantizes and compares."""

    def quantize(
        self,
        model: LightningModule,
        datamodule: LightningDataModule,
        output: Path,
        quantizer: Quantizer,
        ckpt_path: Path | None = None,
        calibration_tokens: int = 131072,
        seed: int = 0,
        format: WeightFormat = "auto",
        round_zero_point: bool = False,
        calibrate: ClipMethod | None = None,
        overwrite: bool = False,
        dry_run: bool = False,
    ) -> None:
        """Quantizes the weights of a trained model into a Hugging Face checkpoint.

        Args:
            model: The trained model.
            datamodule: Source of the calibration text.
            output: Folder of the quantized checkpoint.
            quantizer: What turns weights into codes: GPTQ, RTN, or a plugin's.
            ckpt_path: The .ckpt file of a fit, or an unquantized Hugging Face folder.
            calibration_tokens: Tokens of the training text that calibration sees.
            seed: Seed of their choice.
            format: Storage of the weights; "auto" packs where stock readers can load it; "gptq_v2" is an export of
                the weights alone for GPTQModel and the like, with 16-bit activations.
            round_zero_point: Move zero points of a model trained with real ones to the nearest integers.
            calibrate: Set static clips from the calibration text by this method, for a model that was not trained with
                clips; null keeps the activations that model.quant says.
            overwrite: Replace a quantized checkpoint that is already in the output folder.
            dry_run: Print layers, groups, kernels, memory and expected time, refuse what cannot work, write nothing.
        """
        assert isinstance(model, LitLanguageModel)
        if another_process_does_it():
            return
        if model.init_from is not None and is_artifact(model.init_from):
            raise ValueError(f"{model.init_from} is quantized already: name the .ckpt file that it was made from")
        from_huggingface = model.init_from is not None and model.init_from.is_dir() and not is_sharded(model.init_from)
        if from_huggingface and model.quant.clipped_sites and calibrate is None:
            raise ValueError(
                f'{model.init_from} has no learned clips for activations "{model.quant.activations}": set calibrate '
                '"mse", or --model.quant.activations token'
            )
        model.configure_model()
        if ckpt_path is not None:
            model.load_state_dict(load_lightning_checkpoint(Path(ckpt_path))["state_dict"])
        assert isinstance(datamodule, TextDataModule)
        batches: Iterable[Tensor] = ()
        tokenizer = datamodule.given_tokenizer
        if tokenizer is not None:
            load_tokenizer(tokenizer, model.vocab_size)  # a bad one is noticed now, not when all is done
        if quantizer.needs_hessian or calibrate is not None:  # nothing else has a use for text
            if from_huggingface and tokenizer is None:
                raise ValueError(f"{model.init_from} has no tokenizer.json: name its tokenizer with --data.tokenizer")
            if calibration_tokens < 1:
                raise ValueError(f"calibration_tokens {calibration_tokens} is too small: use 1 or more")
            datamodule.prepare_data()
            datamodule.setup("quantize")
            batches = datamodule.calibration_batches(calibration_tokens, seed)
            tokenizer = datamodule.tokenizer_path
        with torch.no_grad():
            quantize_model(
                model.model,
                quantizer,
                batches,
                Path(output),
                tokenizer,
                device=self.strategy.root_device,
                overwrite=overwrite,
                dry_run=dry_run,
                format=format,
                round_zero_point=round_zero_point,
                calibrate=calibrate,
            )

    def table(
        self,
        model: LightningModule,
        datamodule: LightningDataModule,
        checkpoints: dict[str, Path],
        quantizers: list[Quantizer],
        output: Path = Path("runs/table"),
        calibration_tokens: int = 131072,
    ) -> None:
        """Prints perplexities of checkpoints by weight bits, quantizer and activations (the paper's Table 1).

        Args:
            model: Not used: every checkpoint brings its own.
            datamodule: The text: training split for calibration, validation split for perplexity.
            checkpoints: .ckpt files, or unquantized Hugging Face folders, by the name of their row.
            quantizers: What turns weights into codes; one pair of columns each.
            output: Folder of the artifacts, of table.csv and table.png; what it already holds is not computed again.
            calibration_tokens: Tokens of the training text that calibration sees.
        """
        if another_process_does_it():
            return
        assert isinstance(datamodule, TextDataModule)
        plugin = self.precision_plugin
        if type(plugin).__module__.startswith("lightning.") and plugin.precision != "32-true":
            raise ValueError(
                f"trainer.precision {plugin.precision}: a table is computed in float32; leave it out, or give "
                "trainer.plugins W4A4Precision, whose dtype is that of the integer models"
            )
        paths = {str(name): Path(path) for name, path in checkpoints.items()}
        refuse(paths, quantizers, calibration_tokens, datamodule.cache_dir)  # what it would after packing
        datamodule.prepare_data()
        datamodule.setup("table")
        results = fill_table(
            paths,
            quantizers,
            datamodule,
            output,
            calibration_tokens,
            self.strategy.root_device,
            self.precision_plugin.convert_module,
            plain(self.precision_plugin),
            self.limit_val_batches,
        )
        print(write_table(results, output))
        whole = isinstance(self.limit_val_batches, float) and self.limit_val_batches == 1.0
        text = "the same text" if whole else "all validation text"
        print(f"unigram perplexity of {text}: {datamodule.unigram_perplexity():.1f}")
        print(f"artifacts, table.csv and table.png: {output}")
