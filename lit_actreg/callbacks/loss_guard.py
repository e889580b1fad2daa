"""Stops a fit at, or passes over, an optimizer step whose loss is not a number or leaps.

Judged is the loss of one optimizer step: the mean over its accumulated batches and over ranks, penalties included.

    nan      the loss, or the norm of the gradients, is not finite
    spike    loss > m + k · s

m and s² are running mean and variance of the losses that were not bad, exponentially weighted over about ``window``
steps; nothing is a spike before so many have been seen, nor during the fall at the start, when m lags above the loss.

**What a skipped step leaves.** Weights, clips, both of AdamW's moments and its step count stay as they are, to the
bit: no decay either, which a step with zero gradients would still make. The step counts all the same: schedules, data
and ``global_step`` go on, and a resumed fit, which reads m, s and the rest from its checkpoint, skips the same ones.

**What it costs.** The verdict is formed where the loss is. A fused optimizer (on a GPU) takes it as ``found_inf``, the
door through which fp16's GradScaler has its kernels leave everything untouched: host and device do not wait for each
other. The host reads verdicts once every ``trainer.log_every_n_steps`` steps and before a checkpoint is written, in
one transfer; so the line comes up to so many steps late. With "stop" all steps after the bad one are left out too
until the host has seen it, so that the fit ends with the weights before it. On a CPU the host knows at once. The
device's share is one reduction of a number over ranks, and the norm of the gradients once more (a read of them all).

With fp16-mixed GradScaler skips what overflows, as a matter of course: gradients are not judged here, and spikes
cannot be.
"""

from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.optim import Optimizer

from lit_actreg.callbacks.checkpoint import run_folder
from lit_actreg.checkpoint import last_checkpoint
from lit_actreg.data.resume import num_trained_batches
from lit_actreg.data.sampler import TrainSampler
from lit_actreg.parallel import mean_over_ranks, whole

Action = Literal["stop", "skip", "ignore"]
FINE, NAN, SPIKE = 0, 1, 2


class LossGuard(Callback):
    """Watches the loss of every optimizer step.

    Args:
        nan: What to do where loss or gradients are not finite: "stop" ends the fit with the weights before the step,
            "skip" leaves the step out, "ignore" does nothing.
        spike: The same for a loss that leaps.
        spike_std: Standard deviations above the running mean that make a spike (k).
        window: Steps that running mean and variance look back on, about.
        max_skipped: Steps skipped one after the other at which the fit stops.
    """

    def __init__(
        self,
        nan: Action = "stop",
        spike: Action = "ignore",
        spike_std: float = 6.0,
        window: int = 100,
        max_skipped: int = 10,
    ) -> None:
        for name, value in {"spike_std": spike_std, "window": window, "max_skipped": max_skipped}.items():
            if value <= 0:
                raise ValueError(f"guard.{name} {value} is too small: use a positive number")
        self.actions = {NAN: nan, SPIKE: spike}
        self.spike_std, self.window, self.max_skipped = spike_std, window, max_skipped
        self.num_skipped = 0
        self._state = torch.zeros(5)  # mean, variance, number of losses, bad ones in a row, 1 from a "stop" on
        self._losses: list[Tensor] = []  # of the batches of the window at hand
        self._unread: list[tuple[int, int, int, Tensor]] = []  # step, first batch, number of batches, verdict

    @property
    def active(self) -> bool:
        return set(self.actions.values()) != {"ignore"}

    def state_dict(self) -> dict[str, Any]:
        return {"running": self._state.tolist(), "num_skipped": self.num_skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._state, self.num_skipped = torch.tensor(state_dict["running"]), state_dict["num_skipped"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._losses, self._unread = [], []
        self._state = self._state.to(pl_module.device)
        if self._scaler(trainer) and self.actions[SPIKE] != "ignore":
            raise ValueError(
                'guard.spike needs unscaled gradients: set it to "ignore", or trainer.precision to bf16-mixed'
            )

    @staticmethod
    def host_knows(loss: Tensor) -> bool:
        """Whether the host may look at a number without waiting for a device."""
        return loss.is_cpu

    @staticmethod
    def _scaler(trainer: Trainer) -> Any:
        return getattr(trainer.precision_plugin, "scaler", None)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if self.active:
            self._losses.append(loss.detach().float())  # already divided by the number of accumulated batches

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Judges the step, and has the optimizer leave it out if it is bad."""
        if not self.active:
            return
        # Lightning divides by the whole window's length also where the last one of a pass over the data is shorter
        mean = torch.stack(self._losses).sum() * (trainer.accumulate_grad_batches / len(self._losses))
        loss = mean_over_ranks(mean)
        first = num_trained_batches(trainer) - len(self._losses) + 1
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        gradients = [p.grad for p in parameters if p.grad is not None]
        scaled = self._scaler(trainer) is not None
        norm = loss.new_ones(()) if scaled else whole(torch.nn.utils.get_total_norm(gradients))
        left_out, verdict = self.judge(loss, norm)
        self._unread.append((trainer.global_step, first, len(self._losses), verdict))
        self._losses = []
        if self.host_knows(loss):
            self.read(trainer)
        if scaled:
            return  # not a number in the loss is so in the gradients, which GradScaler leaves out
        if all(group.get("fused") for group in optimizer.param_groups):
            optimizer.found_inf = left_out  # type: ignore[attr-defined]
        elif left_out:
            for p in parameters:
                p.grad = None  # AdamW passes over a parameter without a gradient, decay and moments included

    def judge(self, loss: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
        """Whether the step is left out (0. or 1.), and (kind, loss, limit, bad ones in a row), all on the device."""
        mean, variance, count, in_a_row, stopped = self._state.unbind()
        limit = mean + self.spike_std * variance.sqrt()
        finite = loss.isfinite() & norm.isfinite()
        spike = finite & (count >= self.window) & (loss > limit)
        kind = torch.where(finite, torch.where(spike, float(SPIKE), float(FINE)), float(NAN))
        stop, skip = (torch.zeros_like(finite), torch.zeros_like(finite))
        for bad, action in self.actions.items():
            stop = stop | (kind == bad) if action == "stop" else stop
            skip = skip | (kind == bad) if action == "skip" else skip
        stopped = torch.maximum(stopped, stop.float())
        left_out = torch.maximum(stopped, skip.float())
        in_a_row = (in_a_row + 1) * left_out
        share = 1 / (count + 1).clamp(max=self.window)
        distance = torch.where(finite, loss - mean, 0.0)
        updated = torch.stack([mean + share * distance, (1 - share) * (variance + share * distance**2), count + 1])
        keep = torch.where(finite & (left_out == 0), updated, self._state[:3])
        self._state = torch.cat([keep, torch.stack([in_a_row, stopped])])
        return left_out, torch.stack([kind, loss, limit, in_a_row])

    def read(self, trainer: Trainer) -> None:
        """Brings the verdicts to the host, says which steps were skipped, and stops if it is time to."""
        unread, self._unread = self._unread, []
        verdicts = torch.stack([verdict for *_, verdict in unread]).tolist() if unread else []
        for (step, first, count, _), (kind, loss, limit, in_a_row) in zip(unread, verdicts, strict=True):
            action = self.actions.get(int(kind), "ignore")
            if action == "ignore":
                continue
            what = "or its gradient is not finite" if kind == NAN else f"is above {limit:.4f}, a spike"
            where = f"in batches {first}-{first + count - 1}, {sequences(trainer, first, count)}"
            line = f"step {step}: loss {loss:.4f} {what}, {where}"
            if action == "stop":
                option = "--guard.nan skip" if kind == NAN else "--guard.spike skip"
                newest = last_checkpoint([run_folder(trainer) / "checkpoints"])
                again = f"resume from {newest}" if newest else "there is no checkpoint yet: begin again"
                raise ValueError(f"{line}: stopped; {again} with {option}, or a lower optim.lr")
            if in_a_row >= self.max_skipped:
                raise ValueError(f"{line}: stopped after {self.max_skipped} skipped in a row (guard.max_skipped)")
            self.num_skipped += 1
            rank_zero_info(f"{line}: skipped")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if len(self._unread) >= trainer.log_every_n_steps:  # type: ignore[attr-defined]
            self.read(trainer)
        if self.active and trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            pl_module.log("train/skipped_steps", torch.tensor(float(self.num_skipped)))

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """No checkpoint is written of a fit that is about to stop."""
        self.read(trainer)
        if self.state_key in checkpoint.get("callbacks", {}):  # Lightning asked for the state before this
            checkpoint["callbacks"][self.state_key] = self.state_dict()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.read(trainer)


def sequences(trainer: Trainer, first: int, count: int) -> str:
    """The training sequences of batches ``first`` and on, over all ranks: their indices among the packed blocks."""
    loader: Any = trainer.train_dataloader
    sampler = getattr(loader, "sampler", None)
    if isinstance(sampler, TrainSampler):
        ids = [i for k in range(first, first + count) for i in sampler.global_batch(k)]
        return f"sequences {' '.join(map(str, ids))}"
    size = getattr(loader, "batch_size", None) or 1
    return f"sequences {first * size}-{(first + count) * size - 1} of each rank's stream"
