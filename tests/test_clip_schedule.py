"""Clips start where calibration puts them and move as the schedule says, by the global step, resumed or not."""

import functools
import warnings
from dataclasses import replace

import pytest
import torch
from lightning.pytorch import Callback
from small_fit import Losses, datamodule, lit_module, parameters, trainer, write_corpus

from lit_actreg.callbacks.clip_schedule import ClipSchedule
from lit_actreg.config import SITES, QuantConfig

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("clips") / "corpus")


class Recorder(Callback):
    """What every batch was trained with, and the clips after it. It comes after the schedule and so sees its work."""

    def __init__(self) -> None:
        self.bits: dict[int, float] = {}
        self.start: dict[int, dict[str, torch.Tensor]] = {}
        self.end: dict[int, dict[str, torch.Tensor]] = {}
        self.groups: dict[int, dict] = {}

    @staticmethod
    def clips(module):
        return {name: p for name, p in parameters(module).items() if "input_quantizer" in name}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        (bits,) = {q.bits if q.enabled else 16 for block in pl_module.model.blocks for q in quantizers(block)}
        self.bits[trainer.global_step] = bits
        self.start[trainer.global_step] = self.clips(pl_module)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.groups[trainer.global_step] = {k: v for k, v in optimizer.param_groups[-1].items() if k != "params"}

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.end[trainer.global_step - 1] = self.clips(pl_module)


def quantizers(block):
    return [getattr(block, site).input_quantizer for site in SITES]


def run(corpus, schedule, steps=6, resume_from=None, quant=None, **options):
    recorder, losses = Recorder(), Losses()
    engine = trainer([schedule, recorder, losses], steps, **options)
    module = lit_module(quant)
    engine.fit(module, datamodule=datamodule(corpus), ckpt_path=resume_from)
    recorder.losses, recorder.trainer, recorder.module = losses.values, engine, module
    return recorder


def factor(step):
    """Of lit_module: 3 steps of warm-up, then a cosine to a tenth at step 20."""
    progress = torch.tensor((step - 3) / 17 * torch.pi, dtype=torch.float64)
    return (step + 1) / 3 if step < 3 else 0.1 + 0.9 * 0.5 * (1 + progress.cos().item())


def test_bits_by_step():
    schedule = ClipSchedule(bits={2: 8, 0: 16, 4: 4})
    assert [schedule.bits_at(step, 4) for step in range(6)] == [16, 16, 8, 8, 4, 4]
    assert ClipSchedule(bits={3: 8}).bits_at(2, 5) == ClipSchedule().bits_at(100, 5) == 5
    with pytest.raises(ValueError, match=r"clips\.bits \[1, 9\] are out of range"):
        ClipSchedule(bits={0: 16, 1: 1, 2: 9, 3: 4})


def test_a_delayed_start_narrows_and_leaves_the_clips_until_then(corpus):
    found = run(corpus, ClipSchedule(bits={0: 16, 2: 8, 4: 4}, calibrate_steps=[]))
    assert found.bits == {0: 16, 1: 16, 2: 8, 3: 8, 4: 4, 5: 4}
    assert found.trainer.logger.of("clips/bits") == {1: 16, 2: 8, 3: 8, 4: 4, 5: 4, 6: 4}  # by steps made
    for name, start in found.start[0].items():
        assert torch.equal(found.end[1][name], start), name
    assert any(not torch.equal(found.end[2][name], start) for name, start in found.start[2].items())
    plain = run(corpus, ClipSchedule(), quant=QuantConfig(activations="none"))
    assert found.losses[:2] == plain.losses[:2]
    assert found.losses[2] != plain.losses[2]


def test_sites_without_clips_start_and_narrow_with_the_others(corpus):
    """The recorder wants one number of bits in all sites."""
    quant = QuantConfig(per_token_sites=["mlp_proj"], token_group_size=16)
    found = run(corpus, ClipSchedule(bits={0: 16, 2: 8, 4: 4}, calibrate_steps=[]), quant=quant)
    assert found.bits == {0: 16, 1: 16, 2: 8, 3: 8, 4: 4, 5: 4}
    plain = run(corpus, ClipSchedule(), quant=QuantConfig(activations="none"))
    assert found.losses[:2] == plain.losses[:2]
    assert found.losses[2] != plain.losses[2]


@pytest.mark.parametrize("unit", ["absolute", "relative"])
def test_the_first_step_of_a_clip_is_its_learning_rate(corpus, unit):
    """Adam's first step is lr · sign(g); relative, times half the interval. After it the second moment scales it."""
    found = run(corpus, ClipSchedule(0.03, unit, momentum=0.25, calibrate_steps=[0]), steps=5)
    assert {step: group["lr"] for step, group in found.groups.items()} == pytest.approx(
        {step: 0.03 * factor(step) for step in range(5)}
    )
    assert all(group["betas"] == (0.25, 0.95) and group["weight_decay"] == 0 for group in found.groups.values())
    moved = 0
    for name, high in found.start[0].items():
        if name.endswith("high"):
            low = found.start[0][name.replace("high", "low")]
            unit_size = (high - low).item() / 2 if unit == "relative" else 1.0
            step = (found.end[0][name] - high).abs().item()
            # g ≫ ε except where no gradient arrives; float32 of a clip near 3
            assert step == pytest.approx(0.01 * unit_size, rel=2e-3) or step < 1e-3 * unit_size, name
            moved += step > 0
    assert moved >= 6
    bounded = [name for name in found.start[0] if "mlp_proj" in name and name.endswith("low")]
    assert all(found.end[4][name].item() == pytest.approx(-0.17) for name in bounded)


def test_frozen_clips_stay_and_weights_go_on(corpus):
    found = run(corpus, ClipSchedule(0.03, freeze_step=3, calibrate_steps=[0, 4]))
    assert all(any(not torch.equal(found.end[s][n], c) for n, c in found.start[s].items()) for s in (0, 1, 2))
    assert all(torch.equal(found.end[s][n], c) for s in (3, 4, 5) for n, c in found.start[s].items())
    assert len(set(found.losses)) == 6


@pytest.mark.parametrize("method", ["minmax", "constant"])
def test_calibration_puts_the_clips_where_the_method_says_at_its_steps_only(corpus, method):
    seen: dict[str, torch.Tensor] = {}

    class Inputs(Callback):
        """The inputs of the batch that calibration is to see, before it does."""

        def note(self, name, module, args):
            seen[name] = args[0].detach()

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 2:
                hooks = []
                for name, m in pl_module.model.named_modules():
                    if name.endswith("input_quantizer"):
                        note = functools.partial(self.note, name)
                        hooks.append(m.register_forward_pre_hook(note))
                with torch.no_grad():
                    pl_module.model(batch[:, :-1])
                for hook in hooks:
                    hook.remove()

    schedule, recorder = ClipSchedule(0.0, calibrate_steps=[2], method=method, constant=3.0), Recorder()
    trainer([Inputs(), schedule, recorder], steps=4).fit(lit_module(), datamodule=datamodule(corpus))
    assert len(seen) == 8
    for name, x in seen.items():
        lowest = -0.17 if "mlp_proj" in name else x.min().item() if method == "minmax" else -3.0
        highest = x.max().item() if method == "minmax" else 3.0
        assert recorder.start[2][f"{name}.low"].item() == pytest.approx(lowest, rel=1e-6)
        assert recorder.start[2][f"{name}.high"].item() == pytest.approx(highest, rel=1e-6)
        for step in (0, 1):
            assert recorder.end[step][f"{name}.high"].item() == 4.0
        assert torch.equal(recorder.end[3][f"{name}.high"], recorder.start[2][f"{name}.high"])


def test_every_clip_is_logged(corpus):
    found = run(corpus, ClipSchedule(0.03), steps=2)
    for layer in (0, 1):
        for site in SITES:
            for end in ("low", "high"):
                logged = found.trainer.logger.of(f"clips_{end}_{site}/{layer:02d}")
                expected = found.end[1][f"blocks.{layer}.{site}.input_quantizer.{end}"].item()
                assert logged[2] == pytest.approx(expected)  # after two steps


@pytest.mark.parametrize("stop", [2, 3, 4])
def test_a_resumed_fit_has_the_schedule_of_an_uninterrupted_one(corpus, tmp_path, stop):
    def schedule():
        return ClipSchedule(0.03, momentum=0.5, freeze_step=5, bits={0: 16, 2: 8, 4: 4}, calibrate_steps=[0, 3])

    whole = run(corpus, schedule())
    run(corpus, schedule(), steps=stop).trainer.save_checkpoint(tmp_path / "x.ckpt")
    rest = run(corpus, schedule(), resume_from=tmp_path / "x.ckpt")
    assert rest.losses == whole.losses[stop:]
    assert rest.bits == {step: bits for step, bits in whole.bits.items() if step >= stop}
    assert rest.groups == {step: group for step, group in whole.groups.items() if step >= stop}
    for step in range(stop, 6):
        assert all(torch.equal(clip, whole.end[step][name]) for name, clip in rest.end[step].items())


def test_a_fit_resumed_inside_an_accumulation_window_does_not_calibrate_twice(corpus, tmp_path):
    """The window starts again, but the second time its inputs would come through clips already calibrated."""

    class StopInside(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            if trainer.global_step == 2 and trainer.fit_loop.epoch_loop.batch_progress.current.processed == 5:
                trainer.save_checkpoint(tmp_path / "x.ckpt")

    def fit(resume_from=None):
        recorder = Recorder()
        engine = trainer(
            [ClipSchedule(0.03, calibrate_steps=[0, 2]), recorder, StopInside()], accumulate_grad_batches=2
        )
        engine.fit(lit_module(), datamodule=datamodule(corpus, batch_size=4), ckpt_path=resume_from)
        return recorder

    whole = fit()
    rest = fit(tmp_path / "x.ckpt")
    assert list(rest.groups) == [2, 3, 4, 5]
    assert all(torch.equal(clip, whole.end[5][name]) for name, clip in rest.end[5].items())


def test_clamping_with_the_clips_of_another_fit(corpus, tmp_path):
    """The paper's comparison: fixed clips from a QAT model, nothing rounded."""
    qat = run(corpus, ClipSchedule(0.05), steps=3)
    qat.trainer.save_checkpoint(tmp_path / "qat.ckpt")
    clamped = ClipSchedule(lr=0.0, from_checkpoint=tmp_path / "qat.ckpt")
    found = run(corpus, clamped, quant=QuantConfig(activations="clamp"))
    for name, clip in qat.end[2].items():
        assert torch.equal(found.start[0][name], clip), name
        assert torch.equal(found.end[5][name], clip), name


def test_clamping_leaves_sites_alone_that_had_no_clips(corpus, tmp_path):
    quant = QuantConfig(per_token_sites=["mlp_proj"])
    qat = run(corpus, ClipSchedule(0.03), steps=3, quant=quant)
    qat.trainer.save_checkpoint(tmp_path / "qat.ckpt")
    schedule = ClipSchedule(lr=0.0, from_checkpoint=tmp_path / "qat.ckpt")
    found = run(corpus, schedule, steps=1, quant=replace(quant, activations="clamp"))
    clamped = {name: clip for name, clip in qat.end[2].items() if "mlp_proj" not in name}
    assert all(torch.equal(found.start[0][name], clip) for name, clip in clamped.items())
    assert {q.site: q.mode for q in quantizers(found.module.model.blocks[0])} == {
        "qkv": "clamp", "attn_proj": "clamp", "mlp_in": "clamp", "mlp_proj": "none"
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"has no clips at \['mlp_proj'\]"):
        run(corpus, ClipSchedule(lr=0.0, from_checkpoint=tmp_path / "qat.ckpt"), 1, quant=QuantConfig("clamp"))


def test_clips_of_a_fit_that_has_none_are_refused(corpus, tmp_path):
    plain = run(corpus, ClipSchedule(), steps=1, quant=QuantConfig(activations="none"))
    plain.trainer.save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.raises(
        ValueError, match=r"clips\.from_checkpoint .* has no clips at \['attn_proj', 'mlp_in', 'mlp_proj', 'qkv'\]"
    ):
        run(corpus, ClipSchedule(from_checkpoint=tmp_path / "plain.ckpt"), steps=1)
    partly = run(corpus, ClipSchedule(), steps=1, quant=QuantConfig(sites=["qkv", "mlp_in"]))
    partly.trainer.save_checkpoint(tmp_path / "partly.ckpt")
    with pytest.raises(ValueError, match=r"has no clips at \['attn_proj', 'mlp_proj'\]"):
        run(corpus, ClipSchedule(from_checkpoint=tmp_path / "partly.ckpt"), steps=1)
    engine = trainer([ClipSchedule(from_checkpoint=tmp_path / "partly.ckpt")], 1)
    with pytest.raises(ValueError, match="is of another shape"):
        engine.fit(lit_module(QuantConfig(sites=["qkv"]), style="llama"), datamodule=datamodule(corpus))


def test_a_schedule_that_ends_at_other_bits_is_said(corpus):
    with pytest.warns(UserWarning, match=r"clips\.bits are 16 at the last step, 1; .*activation_bits, 4"):
        run(corpus, ClipSchedule(bits={0: 16, 5: 4}), steps=2)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="clips.bits")
        run(corpus, ClipSchedule(bits={0: 16, 1: 4}), steps=2)
