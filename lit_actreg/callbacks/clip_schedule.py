"""How the clips c⁻, c⁺ of the input quantizers start and move over a fit.

- *Calibration*: at given steps every clip is set from the inputs of the batch at hand (:mod:`lit_actreg.quant.clips`).
  The first steps change activations faster than any learning rate follows.
- *Learning*: then by gradient, with Adam's step but without momentum or decay. With the "relative" unit a step moves
  a clip by lr times half its interval; an absolute one that suits ±2.5 behind a norm is a tenth of the attention
  projection's ±0.3 in a dozen steps. The rate follows the weights' schedule, and stops at ``freeze_step``.
- *Bits*: by step, 16 meaning not yet quantized; {0: 16, 200: 8, 400: 4} starts late and narrows.

Everything is a function of the global step, so it is right at once after a resume.
"""

from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lit_actreg.checkpoint import load_lightning_checkpoint
from lit_actreg.config import SITES, QuantConfig, as_plain
from lit_actreg.module import LitLanguageModel
from lit_actreg.parallel import local, mean_over_ranks
from lit_actreg.quant.clips import ClipMethod, initial_clips
from lit_actreg.quant.linear import InputQuantizer, QuantLinear
from lit_actreg.quant.observe import observe_inputs


class ClipSchedule(Callback):
    """Calibrates and learns the clips of the input quantizers.

    Args:
        lr: Peak learning rate of the clips; 0 leaves them where calibration put them.
        unit: "relative": lr is a share of half the clip interval; "absolute": of 1.
        momentum: Adam's β₁ for the clips.
        freeze_step: Optimizer step from which the clips stay fixed (but for a calibration at step 0); null means never.
        bits: Bits of the grid from given optimizer steps on, 16 for none; null means quant.activation_bits throughout.
        calibrate_steps: Optimizer steps at which the clips are set from the batch.
        method: How they are set: "mse", "minmax", "quantile" or "constant".
        constant: Clips ±constant of the method "constant".
        tail: Share of values below c⁻ and above c⁺ of the method "quantile".
        from_checkpoint: .ckpt of another fit of the same shape, whose clips these start from; no calibration by default
            then. With lr 0 and quant.activations "clamp": the paper's activation clamping.
    """

    def __init__(
        self,
        lr: float = 1e-3,
        unit: Literal["relative", "absolute"] = "relative",
        momentum: float = 0.0,
        freeze_step: int | None = None,
        bits: dict[int, int] | None = None,
        calibrate_steps: list[int] | None = None,
        method: ClipMethod = "mse",
        constant: float = 4.0,
        tail: float = 1e-3,
        from_checkpoint: Path | None = None,
    ) -> None:
        wrong = [b for b in (bits or {}).values() if b != 16 and not 2 <= b <= 8]
        if wrong:
            raise ValueError(f"clips.bits {wrong} are out of range: choose 2 to 8, or 16 for no quantization")
        self.lr, self.unit, self.momentum, self.freeze_step, self.bits = lr, unit, momentum, freeze_step, bits
        by_default = () if from_checkpoint else range(0, 101, 10)
        self.calibrate_steps = set(by_default if calibrate_steps is None else calibrate_steps)
        self.from_checkpoint = from_checkpoint
        self.method, self.constant, self.tail = method, constant, tail
        if lr < 0:
            raise ValueError(f"clips.lr {lr} is negative: use 0 (clips stay where calibration put them) or more")
        for name, step in [("freeze_step", freeze_step or 0), *(("calibrate_steps", s) for s in calibrate_steps or [])]:
            if step < 0:
                raise ValueError(f"clips.{name} {step} is negative: use 0 or more")
        if not 0 <= momentum < 1:
            raise ValueError(f"clips.momentum {momentum} is out of range: choose 0 to below 1")
        if constant <= 0:
            raise ValueError(f"clips.constant {constant} leaves no range between the clips: use more than 0")
        if not 0 <= tail < 0.5:
            raise ValueError(f"clips.tail {tail} is out of range: choose a share of values from 0 to below 0.5")
        self._before_step: tuple[list[Tensor], Tensor] | None = None  # the clips, and their values before the step
        self._calibrated_step = -1
        self._bits: int | None = None  # what the quantizers were last told

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        assert isinstance(pl_module, LitLanguageModel)
        if stage == "fit":
            pl_module.clips_are_scheduled, self._calibrated_step = True, -1

    def state_dict(self) -> dict[str, Any]:
        return {"calibrated_step": self._calibrated_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """A fit stopped inside an accumulation window has calibrated for it; the clips are in the checkpoint."""
        self._calibrated_step = state_dict["calibrated_step"]

    def _quantizers(self, module: LitLanguageModel) -> list[tuple[str, InputQuantizer]]:
        named = []
        for layer, block in enumerate(module.model.blocks):
            for site in SITES:
                linear = getattr(block, site)
                if isinstance(linear, QuantLinear) and linear.input_quantizer.has_clips:
                    named.append((f"{site}/{layer:02d}", linear.input_quantizer))
        return named

    def bits_at(self, step: int, default: int) -> int:
        """Bits of the grid at an optimizer step."""
        started = {first: bits for first, bits in (self.bits or {}).items() if int(first) <= step}
        return started[max(started)] if started else default

    def lr_at(self, step: int, module: LitLanguageModel) -> float:
        """Learning rate of the clips at an optimizer step, in this schedule's unit."""
        frozen = self.freeze_step is not None and step >= self.freeze_step
        return 0.0 if frozen else self.lr * module.lr_factor(step)

    @torch.no_grad()
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, LitLanguageModel)
        self._bits = None
        wanted, end = pl_module.quant.activation_bits, trainer.max_steps
        if end > 0 and (last := self.bits_at(end - 1, wanted)) != wanted:
            rank_zero_warn(
                f"clips.bits are {last} at the last step, {end - 1}; models are validated and quantized with "
                f"model.quant.activation_bits, {wanted}"
            )
        if self.from_checkpoint is None or trainer.global_step > 0:
            return
        checkpoint, path = load_lightning_checkpoint(self.from_checkpoint), self.from_checkpoint
        saved = checkpoint["hyper_parameters"]
        clipped = QuantConfig(**saved["quant"]).clipped_sites
        if missing := set(pl_module.quant.clipped_sites) - set(clipped):
            raise ValueError(f"clips.from_checkpoint {path} has no clips at {sorted(missing)}: name a fit that has")
        if saved["shape"] != as_plain(pl_module.shape):
            raise ValueError(f"clips.from_checkpoint {path} is of another shape: name a fit of this one")
        for name, parameter in pl_module.named_parameters():
            if "input_quantizer" in name and any(f".{site}." in name for site in clipped):
                parameter.fill_(checkpoint["state_dict"][name].item())  # with a number: the clip may be sharded

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Tensor, batch_idx: int) -> None:
        assert isinstance(pl_module, LitLanguageModel)
        step = trainer.global_step
        bits = self.bits_at(step, pl_module.quant.activation_bits)
        if bits != self._bits:
            self._bits = bits
            for quantizer in pl_module.modules():
                if isinstance(quantizer, InputQuantizer):  # also those without clips
                    quantizer.enabled = bits != 16
                    quantizer.bits = bits if bits != 16 else quantizer.bits
        frozen = self.freeze_step is not None and step >= max(1, self.freeze_step)  # they start somewhere
        if step in self.calibrate_steps and step != self._calibrated_step and not frozen:
            self.calibrate(trainer, pl_module, batch[:, :-1])
            self._calibrated_step = step

    @torch.no_grad()
    def calibrate(self, trainer: Trainer, module: LitLanguageModel, ids: Tensor) -> None:
        """Sets every clip from the inputs that ids [B, T] give its site; the mean over ranks."""
        found: list[tuple[InputQuantizer, Tensor]] = []

        def observer(layer: int, site: str, linear: torch.nn.Module, x: Tensor) -> None:
            quantizer = linear.input_quantizer
            assert isinstance(quantizer, InputQuantizer)
            if quantizer.has_clips:
                clips = initial_clips(
                    x,
                    self.method,
                    quantizer.bits,
                    quantizer.integer_zero_point,
                    quantizer.lower_bound,
                    self.constant,
                    self.tail,
                )
                found.append((quantizer, torch.cat(clips)))

        with trainer.precision_plugin.forward_context():
            observe_inputs(module.model, ids, observer)
        if found:
            values = mean_over_ranks(torch.stack([clips for _, clips in found]))
            for (quantizer, _), (low, high) in zip(found, values.tolist(), strict=True):
                quantizer.low.fill_(low)  # with a number: the clip may be sharded
                quantizer.high.fill_(high)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        assert isinstance(pl_module, LitLanguageModel)
        for group in optimizer.param_groups:
            if group["name"] == "clips":
                group["lr"] = self.lr_at(trainer.global_step, pl_module)
                group["betas"] = (self.momentum, group["betas"][1])
                clips = self._clips(pl_module)
                self._before_step = (clips, torch.cat(clips))

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        assert isinstance(pl_module, LitLanguageModel)
        if self._before_step is None:  # no optimizer step, or no clips
            return
        if self.unit == "relative":
            self._scale_step(*self._before_step)
        self._before_step = None
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self._log(trainer, pl_module)

    def _log(self, trainer: Trainer, module: LitLanguageModel) -> None:
        """Clips, bits and learning rate to the logger, with one wait for the device."""
        if not trainer.is_global_zero:  # who has all clips, also of sharded weights: FSDP2 gives one element to rank 0
            return
        sites, step = [site for site, _ in self._quantizers(module)], trainer.global_step
        names = [f"clips_{end}_{site}" for end in ("low", "high") for site in sites]
        numbers = dict(zip(names, torch.cat(self._clips(module)).tolist(), strict=True))
        numbers["clips/bits"] = float(self.bits_at(step, module.quant.activation_bits))
        numbers["clips/lr"] = self.lr_at(step, module)
        for logger in trainer.loggers:
            logger.log_metrics(numbers, step)

    def _clips(self, module: LitLanguageModel) -> list[Tensor]:
        """Every c⁻, then every c⁺: [1] each. Of sharded ones what this rank holds; a pair lies on the same rank."""
        quantizers = [quantizer for _, quantizer in self._quantizers(module)]
        return [local(clip.detach()) for clip in (*(q.low for q in quantizers), *(q.high for q in quantizers))]

    @staticmethod
    def _scale_step(clips: list[Tensor], before: Tensor) -> None:
        """Turns the step just made, in absolute units, into one in units of half the clip interval.

        In few launches whatever the number of clips: this runs at every step.
        """
        low, high = before.chunk(2)
        scaled = before + ((high - low) / 2).repeat(2) * (torch.cat(clips) - before)
        torch._foreach_copy_(clips, scaled.split([clip.numel() for clip in clips]))
