"""Watches outlier channels form, or not form, on a fixed set of validation tokens.

A channel of a linear's input is an *outlier channel* if its mean |x| exceeds 6 × the mean |x| of that input
(arXiv 2404.03605). At every snapshot, for each block and site, TensorBoard gets as ``outliers_<site>/<what>_<layer>``:

    share, largest_ratio    outlier channels; the largest channel's mean |x| over the layer's
    shift                   the largest channel's |mean x| over its mean |x|: 1 where its values lie on one side of
                            zero (a shifted channel), 0 where they scatter around it (a scaled one)
    kurtosis                per-token kurtosis of the input
    saturation, snr_db      share of values outside the clips; signal-to-noise of the grid, in decibels
    weight_kurtosis, row_max, column_max, error_4bit, error_3bit
                            the weight: what QAT alone makes worse ("migration"); magnitudes are the largest row's and
                            column's norm over the mean one's; errors are round-to-nearest's

and ``outliers/snapshot_seconds``, what that took; now and then also three pictures
(:mod:`lit_actreg.callbacks.pictures`) and a histogram of channel ratios.

The pass is eager and recompiles nothing. It also runs once at the start of ``validate``, on any checkpoint and at its
step, and so at the end of a fit, whatever its last step.
"""

import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn

from lit_actreg.callbacks.pictures import channel_map, outlier_shares, value_histogram
from lit_actreg.config import Site
from lit_actreg.data.datamodule import TextDataModule
from lit_actreg.module import LitLanguageModel
from lit_actreg.quant.linear import InputQuantizer, QuantLinear
from lit_actreg.quant.observe import observe_inputs
from lit_actreg.quant.statistics import (
    OUTLIER_RATIO,
    channel_means,
    kurtosis,
    outlier_ratios,
    rounding_error,
    signal_to_noise,
    token_kurtosis,
)


def input_statistics(x: Tensor, linear: nn.Module, mean_abs: Tensor, mean: Tensor) -> dict[str, Tensor]:
    """The numbers of one linear's input x [B, T, K] with these channel means [K], as 0-dimensional tensors."""
    ratios, largest = outlier_ratios(mean_abs), mean_abs.argmax()
    found = {"share": (ratios > OUTLIER_RATIO).float().mean(), "largest_ratio": ratios.max()}
    found["shift"] = mean[largest].abs() / mean_abs[largest].clamp(min=1e-12)
    found["kurtosis"] = token_kurtosis(x)
    quantizer = getattr(linear, "input_quantizer", None)
    if isinstance(quantizer, InputQuantizer) and quantizer.has_clips:
        found["saturation"] = ((x < quantizer.low) | (x > quantizer.high)).float().mean()
    if isinstance(quantizer, InputQuantizer) and quantizer.mode not in ("none", "clamp"):
        found["snr_db"] = signal_to_noise(x, quantizer(x))
    return found


def weight_statistics(weight: Tensor) -> dict[str, Tensor]:
    """The numbers of one weight [N, K], as 0-dimensional tensors."""
    weight = weight.detach().float()
    rows, columns = weight.norm(dim=1), weight.norm(dim=0)
    return {
        "weight_kurtosis": kurtosis(weight),
        "row_max": rows.max() / rows.mean(),
        "column_max": columns.max() / columns.mean(),
        "error_4bit": rounding_error(weight, 4),
        "error_3bit": rounding_error(weight, 3),
    }


class OutlierMonitor(Callback):
    """Logs statistics of outlier channels and clips on a fixed set of validation tokens.

    Args:
        every_n_steps: Optimizer steps between snapshots; 0 switches the monitor off.
        num_tokens: Validation tokens of a snapshot.
        pictures_every: Snapshots between pictures; 0 draws none.
        layer: Block of the channel map and of the value histogram.
        site: Linear input of the channel map and of the value histogram.
    """

    def __init__(
        self,
        every_n_steps: int = 100,
        num_tokens: int = 16384,
        pictures_every: int = 5,
        layer: int = 0,
        site: Site = "mlp_in",
    ) -> None:
        self.every_n_steps, self.num_tokens, self.pictures_every = every_n_steps, num_tokens, pictures_every
        self.layer, self.site = layer, site
        if every_n_steps < 0:
            raise ValueError(f"outliers.every_n_steps {every_n_steps} is negative: use 0 (none) or more")
        if num_tokens < 1:
            raise ValueError(f"outliers.num_tokens {num_tokens} is too small: use 1 or more")
        self.steps: list[int] = []
        self.shares: list[list[list[float]]] = []  # snapshot × block × site
        self.channels: list[list[float]] = []  # snapshot × channel of the chosen layer
        self._last_step, self._loaded_step = -1, 0

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "shares": self.shares, "channels": self.channels}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.steps, self.shares, self.channels = state_dict["steps"], state_dict["shares"], state_dict["channels"]
        self._last_step = self.steps[-1] if self.steps else -1

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._loaded_step = checkpoint["global_step"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        assert isinstance(pl_module, LitLanguageModel)
        last = pl_module.shape.num_layers - 1
        if self.every_n_steps and not 0 <= self.layer <= last:
            raise ValueError(f"outliers.layer {self.layer} is no block of the model: choose 0 to {last}")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step == 0:
            self._snapshot_if_due(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._snapshot_if_due(trainer, pl_module)

    def _snapshot_if_due(self, trainer: Trainer, module: LightningModule) -> None:
        step = trainer.global_step
        if self.every_n_steps and step % self.every_n_steps == 0 and step != self._last_step:
            self.snapshot(trainer, module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        just_seen = 0 < trainer.global_step == self._last_step  # by the fit that this validation closes
        if trainer.state.fn == "validate" and self.every_n_steps and not just_seen:
            self.snapshot(trainer, pl_module)

    def snapshot(self, trainer: Trainer, module: LightningModule) -> None:
        """One pass over the tokens; logs numbers, and pictures when they are due."""
        if trainer.logger is None:
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(module, LitLanguageModel)
        assert isinstance(data, TextDataModule)
        validates = trainer.state.fn == "validate"
        step, started = trainer.global_step or (self._loaded_step if validates else 0), time.perf_counter()
        self._last_step = step
        blocks = data.blocks["valid"]
        num_rows = max(1, min(len(blocks), self.num_tokens // (blocks[0].shape[-1] - 1)))
        ids = blocks.__getitems__(list(range(num_rows)))[:, :-1].to(module.device)
        found: dict[str, Tensor] = {}
        shares: dict[tuple[int, str], Tensor] = {}
        chosen: dict[str, Tensor] = {}

        def observer(layer: int, site: Site, linear: nn.Module, x: Tensor) -> None:
            x = x.float()
            mean_abs, mean = channel_means(x)
            numbers = input_statistics(x, linear, mean_abs, mean)
            if isinstance(linear, QuantLinear):
                numbers |= weight_statistics(linear.weight)
            shares[layer, site] = numbers["share"]
            found.update({f"outliers_{site}/{what}_{layer:02d}": value for what, value in numbers.items()})
            if (layer, site) == (self.layer, self.site):
                chosen.update(mean_abs=mean_abs, mean=mean, values=x[..., mean_abs.argmax()].flatten())

        with trainer.precision_plugin.forward_context():
            observe_inputs(module.model, ids, observer)
        values = torch.stack([value.float() for value in found.values()]).tolist()  # the one wait for the device
        numbers = dict(zip(found, values, strict=True)) | {"outliers/snapshot_seconds": time.perf_counter() - started}
        if not trainer.is_global_zero:
            return
        trainer.logger.log_metrics(numbers, step)
        if self.steps[-1:] == [step]:  # a validation sees again what its fit has seen
            for kept in (self.steps, self.channels, self.shares):
                kept.pop()
        self.steps.append(step)
        self.channels.append(chosen["mean_abs"].tolist())
        by_pair = {pair: float(share) for pair, share in shares.items()}
        sites = list(dict.fromkeys(site for _, site in by_pair))
        layers = sorted({layer for layer, _ in by_pair})
        self.shares.append([[by_pair[layer, site] for site in sites] for layer in layers])
        due = self.pictures_every and (validates or (len(self.steps) - 1) % self.pictures_every == 0)
        if due and isinstance(trainer.logger, TensorBoardLogger):
            writer = trainer.logger.experiment
            where = f"{self.site}, block {self.layer}"
            writer.add_figure("outliers/channels over steps", channel_map(self.steps, self.channels, where), step)
            writer.add_figure("outliers/share by layer", outlier_shares(self.steps, self.shares, sites), step)
            histogram = value_histogram(chosen["values"].cpu(), float(chosen["mean_abs"].mean()), where)
            writer.add_figure("outliers/largest channel", histogram, step)
            writer.add_histogram("outliers/channel ratios", outlier_ratios(chosen["mean_abs"]), step)
            writer.add_histogram("outliers/channel means", chosen["mean"], step)
