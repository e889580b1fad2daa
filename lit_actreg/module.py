"""The LightningModule: what a step computes, what is logged, which parameters the optimizer treats how.

    loss = cross-entropy + Σ over loss terms of coefficient(step) · Σ over blocks and sites of statistic

When a fit starts, the Trainer's callbacks are asked for their loss terms (:class:`lit_actreg.contracts.Regularizer`),
and the blocks are told which statistics to return. A block is compiled when it first runs, so only once unless the
module has been validated before, or is fitted again with other terms.
"""

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lit_actreg_kernels.linear_cross_entropy import linear_cross_entropy
from torch import Tensor, nn
from torchmetrics import MeanMetric

from lit_actreg.artifact import is_artifact, read_artifact
from lit_actreg.checkpoint import TOKENIZER_KEY, is_sharded, load_lightning_checkpoint
from lit_actreg.config import ModelConfig, OptimConfig, QuantConfig, as_plain
from lit_actreg.contracts import LossTerm, Regularizer
from lit_actreg.data.packed import IGNORE
from lit_actreg.data.resume import ResumableLoader
from lit_actreg.generate import generate
from lit_actreg.huggingface import load_huggingface
from lit_actreg.model import Decoder, linear_dtype
from lit_actreg.parallel import checkpoint_blocks, compile_blocks, mean_over_ranks, shard, whole


def next_token_loss(head: nn.Linear, hidden_BTD: Tensor, targets_BT: Tensor) -> Tensor:
    """Cross-entropy in nats, mean over the targets that are not padding: scalar, float32 (float64 stays).

    On a GPU by one operator for head and loss, if the head is a linear that nobody hooks; the formula stands below it.
    """
    hooked = head._forward_hooks or head._forward_pre_hooks
    plain = type(head) is nn.Linear and head.bias is None and not hooked
    if plain and hidden_BTD.is_cuda and hidden_BTD.dtype != torch.float64:
        hidden_TD = hidden_BTD.to(linear_dtype(hidden_BTD)).flatten(0, 1)
        return linear_cross_entropy(hidden_TD, head.weight, targets_BT.flatten(), IGNORE)
    logits = head(hidden_BTD)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits.flatten(0, 1), targets_BT.flatten(), ignore_index=IGNORE)


class LitLanguageModel(LightningModule):
    """A decoder with its training and evaluation steps; batches are int64 [B, T + 1], −100 where padded.

    Args:
        shape: Shape of the decoder.
        quant: How linear inputs are quantized; null means the defaults in a fit, and as the checkpoint was trained
            everywhere else. Learned clips need the callback ClipSchedule.
        optim: Optimizer and learning-rate schedule.
        vocab_size: Rows of the embedding; the command line sets it from the data.
        init_from: Checkpoint whose weights and shape are used instead of new ones: a .ckpt of a fit (clips included),
            an unquantized Hugging Face checkpoint of GPT-NeoX or Llama, or (not in a fit) what `quantize` wrote.
        activation_checkpointing: Recompute every block in the backward pass: less memory, up to a third more time.
        compile: Compile every block (and the final norm and the loss) with torch.compile.
        bfloat16_stream: Keep the residual stream and its gradient in bfloat16 instead of float32, for a fit at
            bf16-mixed: fewer bytes a step, less memory.
        new_tokens: Tokens that `predict` generates after each prompt. Text longer than the shape's context goes on from
            its last half to whole context.
        temperature: Sampling temperature of `predict`; 0 takes the likeliest token.
    """

    model: Decoder

    def __init__(
        self,
        shape: ModelConfig,
        quant: QuantConfig | None = None,
        optim: OptimConfig | None = None,
        vocab_size: int = 4096,
        init_from: Path | None = None,
        activation_checkpointing: bool = False,
        compile: bool = False,
        bfloat16_stream: bool = False,
        new_tokens: int = 64,
        temperature: float = 0.8,
    ) -> None:
        super().__init__()
        if new_tokens < 1:
            raise ValueError(f"model.new_tokens {new_tokens}: use 1 or more")
        if not temperature >= 0:
            raise ValueError(f"model.temperature {temperature}: use 0 (the likeliest token) or more")
        # Plain values, or the checkpoint would not load with weights_only. A resumed fit sets its own shape.
        shape = ModelConfig(**shape) if isinstance(shape, dict) else shape
        quant = QuantConfig(**quant) if isinstance(quant, dict) else quant or QuantConfig()
        self.save_hyperparameters(
            {"shape": as_plain(shape), "quant": as_plain(quant), "vocab_size": vocab_size}, logger=False
        )
        self.shape, self.quant, self.optim, self.vocab_size = shape, quant, optim or OptimConfig(), vocab_size
        self.init_from, self.compile_model = None if init_from is None else Path(init_from), compile
        self.activation_checkpointing, self.bfloat16_stream = activation_checkpointing, bfloat16_stream
        self.new_tokens, self.temperature = new_tokens, temperature
        self.loss_terms: dict[str, LossTerm] = {}
        self._losses_to_log: list[Tensor] = []
        self.clips_are_scheduled = False
        self.val_loss, self.test_loss = MeanMetric(), MeanMetric()
        self.cross_entropy = next_token_loss

    def check(self, trainer: Any) -> None:
        """Raises ValueError where the Trainer's options and this module's make no fit."""
        if self.bfloat16_stream and trainer.precision != "bf16-mixed":
            precision = trainer.precision
            raise ValueError(
                f"model.bfloat16_stream does nothing at trainer.precision {precision}: set that to bf16-mixed"
            )
        if trainer.accumulate_grad_batches < 1:
            raise ValueError(f"trainer.accumulate_grad_batches {trainer.accumulate_grad_batches}: use 1 or more")
        if (trainer.gradient_clip_val or 0) < 0:
            raise ValueError(f"trainer.gradient_clip_val {trainer.gradient_clip_val}: use 0 (no clipping) or more")
        if trainer.gradient_clip_algorithm not in (None, "norm"):
            raise ValueError(f"trainer.gradient_clip_algorithm {trainer.gradient_clip_algorithm.value}: use norm")
        if trainer.log_every_n_steps < 1:
            raise ValueError(f"trainer.log_every_n_steps {trainer.log_every_n_steps}: use 1 or more")
        if self.init_from and is_artifact(self.init_from):
            raise ValueError(f"{self.init_from} is quantized: a fit starts from the checkpoint that it was made from")
        if not self.optim.decay_steps and trainer.max_steps <= 0:
            raise ValueError("the cosine schedule has no end: set trainer.max_steps or optim.decay_steps")

    def setup(self, stage: str) -> None:
        if stage == "fit":
            self.check(self.trainer)

    def configure_model(self) -> None:
        """Builds the decoder once, new or from a folder; then :mod:`lit_actreg.parallel`."""
        if hasattr(self, "model"):
            return
        if self.init_from and is_artifact(self.init_from):
            with torch.device("cpu"):  # the strategy may have set another; it moves the finished model itself
                self.model = read_artifact(self.init_from)
        else:
            self.model = Decoder(self.shape, self.quant, self.vocab_size)
            if self.init_from and (self.init_from.is_file() or is_sharded(self.init_from)):
                self.load_state_dict(load_lightning_checkpoint(self.init_from)["state_dict"])
            elif self.init_from:
                *_, state = load_huggingface(self.init_from)
                missing = self.model.load_state_dict(state, strict=False).missing_keys
                assert all("input_quantizer" in name for name in missing), missing
        self.model.bfloat16_stream = self.bfloat16_stream
        if self.activation_checkpointing:
            checkpoint_blocks(self.model)
        if self.compile_model:
            compile_blocks(self.model)
            self.cross_entropy = torch.compile(next_token_loss)
        if self.device_mesh is not None:
            shard(self.model, self.device_mesh)

    def on_fit_start(self) -> None:
        """Collects the loss terms of this fit; those of an earlier one are gone."""
        self.loss_terms = {}
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            terms = callback.loss_terms(self) if isinstance(callback, Regularizer) else {}
            if twice := terms.keys() & self.loss_terms.keys():
                raise ValueError(f"two callbacks have loss terms of one name, {sorted(twice)}: leave one of them out")
            self.loss_terms |= terms
        self.model.set_loss_terms(tuple(self.loss_terms.values()))
        if self.quant.clipped_sites and not self.clips_are_scheduled:
            rank_zero_warn("clips stay where they are: the callback ClipSchedule calibrates them and lets them learn")
        self.clips_are_scheduled = False  # as far as the next fit knows

    # Steps

    @property
    def logs_now(self) -> bool:
        """Whether loggers take what this optimizer step logs: a call of ``log`` costs the host up to a millisecond."""
        return (self.global_step + 1) % self.trainer.log_every_n_steps == 0  # type: ignore[attr-defined]

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        # What loggers are told is the step. Lightning guesses it after a restart, wrongly at a pass's first window.
        self.trainer.fit_loop.epoch_loop._batches_that_stepped = self.global_step

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        hidden, statistics = self.model(batch[:, :-1])
        if statistics.dim() != 2:
            raise ValueError(f"a loss term's statistic is a scalar, not of shape {tuple(statistics.shape[2:])}")
        cross_entropy = self.cross_entropy(self.model.head, hidden, batch[:, 1:])
        loss, column = cross_entropy, 0
        for name, term in self.loss_terms.items():
            values = statistics[:, column : (column := column + len(term.sites))]  # [blocks, sites]
            penalty = term.coefficient(self.global_step) * values.sum()
            loss = loss + penalty
            if self.logs_now:
                self.log(f"{name}/penalty", penalty.detach())
                for site, value in zip(term.sites, values.detach().mean(0), strict=True):
                    self.log(f"{name}/{site}", value)
        if self.logs_now:
            self._losses_to_log.append(cross_entropy.detach())
        return loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Logs, of a step that loggers take, the loss, the mean over its batches and over ranks.

        As a tensor of the host: of what the progress bar shows Lightning reads the last value again after every batch,
        and would wait for the device in each. Who monitors ``train/loss`` finds it from the first such step on.
        """
        super().optimizer_step(*args, **kwargs)
        if self._losses_to_log:
            loss = mean_over_ranks(torch.stack(self._losses_to_log).mean())
            self.log("train/loss", loss.cpu(), prog_bar=True)
            self._losses_to_log = []

    def _evaluate(self, batch: Tensor, metric: MeanMetric) -> None:
        targets = batch[:, 1:]
        num_targets = (targets != IGNORE).sum()
        hidden, _ = self.model(batch[:, :-1].clamp(min=0))  # also of padding alone: sharded ranks run together
        if num_targets:
            metric.update(self.cross_entropy(self.model.head, hidden, targets), num_targets)

    def on_validation_epoch_start(self) -> None:
        self._begin(self.val_loss)

    def on_test_epoch_start(self) -> None:
        self._begin(self.test_loss)

    def _begin(self, metric: MeanMetric) -> None:
        """Sums in float32 at least: at bf16-true and 16-true Lightning casts a module's metrics, and sums stall.

        Reset here, not when an epoch ends: what inference mode makes, as `validate` runs in it, `fit` could not add to.
        """
        metric.reset()
        metric.set_dtype(torch.float64 if self.dtype == torch.float64 else torch.float32)

    def _log_perplexity(self, metric: MeanMetric, stage: str) -> None:
        loss = metric.compute()  # over all ranks: so sync_dist changes nothing, but Lightning warns without it
        self.log(f"{stage}/loss", loss, prog_bar=True, sync_dist=True)
        self.log(f"{stage}/perplexity", loss.exp(), prog_bar=True, sync_dist=True)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self._evaluate(batch, self.val_loss)

    def on_validation_epoch_end(self) -> None:
        self._log_perplexity(self.val_loss, "val")

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self._evaluate(batch, self.test_loss)

    def on_test_epoch_end(self) -> None:
        self._log_perplexity(self.test_loss, "test")

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Continues prompts [B, T] by ``new_tokens`` tokens (:mod:`lit_actreg.generate`).

        Returns [B, T + new_tokens], and prints them if the DataModule can decode.
        """
        batch = generate(self.model, batch, self.new_tokens, self.temperature)
        decode = getattr(getattr(self.trainer, "datamodule", None), "decode", None)
        if decode is not None:
            for row in batch:
                print(decode(row))
        return batch

    def on_predict_batch_end(self, *_: Any) -> None:
        if self.trainer.received_sigterm:  # which Lightning's other loops ask
            raise SIGTERMException

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The tokenizer travels with the weights: token ids mean nothing without it."""
        tokenizer = getattr(getattr(self.trainer, "datamodule", None), "tokenizer_path", None)
        if tokenizer is not None:  # else the user's own data, and own affair
            checkpoint[TOKENIZER_KEY] = tokenizer.read_text()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """A resumed fit goes on with the model that it began with, or is refused."""

        def described(shape: ModelConfig, quant: QuantConfig, vocab_size: int) -> dict[str, Any]:
            derived = {"mlp_width": shape.hidden_width, "num_kv_heads": shape.kv_heads, "vocab_size": vocab_size}
            return as_plain(shape) | as_plain(quant) | derived

        if self._trainer is None or self._trainer.state.fn != TrainerFn.FITTING:
            return
        saved = checkpoint["hyper_parameters"]
        before = described(ModelConfig(**saved["shape"]), QuantConfig(**saved["quant"]), saved["vocab_size"])
        now = described(self.shape, self.quant, self.vocab_size)
        changed = [f"{name} {before[name]} → {now[name]}" for name in now if before[name] != now[name]]
        if changed:
            raise ValueError(f"the fit to resume has another model: {', '.join(changed)}: resume with what it had")

    # Optimization

    def on_train_start(self) -> None:
        """What ``optim`` says now holds, also where an optimizer came with a checkpoint and its own rates."""
        self._losses_to_log = []
        if isinstance(self.trainer.train_dataloader, ResumableLoader) and self.trainer.datamodule is None:  # type: ignore[attr-defined]
            raise ValueError(
                "a loader of the DataModule came without it: all ranks and passes would see one order; call fit(model, "
                "datamodule=data)"
            )
        optimizer, scheduler = self.optimizers(use_pl_optimizer=False), self.lr_schedulers()
        assert isinstance(optimizer, torch.optim.Optimizer)
        assert isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR)
        for group, given in zip(optimizer.param_groups, self._optimizer().param_groups, strict=True):
            group |= {key: given[key] for key in ("weight_decay", "betas", "eps")}
            if group["name"] != "clips":  # their rate and momentum are the clip schedule's
                group["initial_lr"] = given["lr"]
                group["lr"] = given["lr"] * self.lr_factor(scheduler.last_epoch)
        scheduler.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]

    def configure_optimizers(self) -> Any:
        optimizer = self._optimizer()
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self.lr_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _optimizer(self) -> torch.optim.Optimizer:
        """AdamW with three groups: matrices (decayed), norms and biases, and clips (the clip schedule's)."""
        o = self.optim
        trained = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        clips = [p for name, p in trained if "input_quantizer" in name]
        others = [p for name, p in trained if "input_quantizer" not in name]
        groups = [
            {"name": "matrices", "params": [p for p in others if p.ndim > 1], "weight_decay": o.weight_decay},
            {"name": "vectors", "params": [p for p in others if p.ndim <= 1], "weight_decay": 0.0},
        ]
        if clips:
            groups.append({"name": "clips", "params": clips, "weight_decay": 0.0, "lr": 0.0, "betas": (0.0, o.beta2)})
        return torch.optim.AdamW(
            groups, lr=o.lr, betas=(o.beta1, o.beta2), eps=o.eps, fused=all(p.is_cuda for _, p in trained)
        )

    def lr_factor(self, step: int) -> float:
        """Learning rate at an optimizer step over its peak: linear warm-up, then a cosine down to min_lr_ratio."""
        o = self.optim
        end = o.decay_steps or self.trainer.max_steps
        if step < o.warmup_steps:
            return (step + 1) / o.warmup_steps
        progress = min(1.0, (step - o.warmup_steps) / max(1, end - o.warmup_steps))
        return o.min_lr_ratio + (1 - o.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clips the norm over all weights. The clip values' own gradients, sums over whole batches, stay out.

        Lightning's own method refuses a fused optimizer with bf16-mixed (lightning#21435), and with 16-mixed Lightning
        leaves the division by GradScaler's factor to a fused optimizer, which comes after the clipping.
        """
        if gradient_clip_val:
            if getattr(optimizer, "_step_supports_amp_scaling", False):  # it is fused
                scaler = getattr(self.trainer.precision_plugin, "scaler", None)
                if scaler is not None:
                    scaler.unscale_(optimizer)
            weights = [p for group in optimizer.param_groups if group["name"] != "clips" for p in group["params"]]
            norm = torch.nn.utils.clip_grad_norm_(weights, gradient_clip_val)
            if self.logs_now:
                self.log("train/gradient_norm", whole(norm))
