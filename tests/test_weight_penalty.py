"""The penalty on weights is its formula in value and gradient, reaches the weights through a fit, acts by config."""

import shlex

import pytest
import torch
from lightning.pytorch import Callback
from small_fit import Losses, datamodule, lit_module, trainer, write_corpus
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_actreg.callbacks.weight_penalty import PENALTIES, WeightPenalty
from lit_actreg.cli import main
from lit_actreg.config import SITES, QuantConfig

pytestmark = pytest.mark.usefixtures("one_thread")
PLAIN = QuantConfig(activations="none")
KINDS = ("kurtosis", "linf")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("weight_penalty") / "corpus")


def by_hand(kind: str, weight: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Value and gradient in float64, the gradient by its own formula."""
    w = weight.detach().double()
    if kind == "linf":
        largest = w.abs().max(dim=1, keepdim=True).values
        return largest.mean().item(), (w.abs() == largest) * w.sign() / len(w)
    d = w - w.mean()
    m2, m3, m4 = (d**2).mean(), (d**3).mean(), (d**4).mean()
    return (m4 / m2**2).item(), 4 / (w.numel() * m2**2) * (d**3 - m3 - m4 / m2 * d)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_value_and_gradient_are_the_formulas(kind, dtype):
    generator = torch.Generator().manual_seed(1)
    # heavy-tailed, lopsided, as small as weights are
    weight = (0.02 * torch.randn(33, 45, generator=generator, dtype=torch.float64).exp() - 0.01).to(dtype)
    value, gradient = by_hand(kind, weight)
    found = PENALTIES[kind](weight.requires_grad_())
    found.backward()
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # sums of 1485 numbers in float32; a gradient is handed back in the weight's dtype: half a last bit of it
    assert found.item() == pytest.approx(value, rel=1e-12 if dtype == torch.float64 else 1e-5)
    rtol = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 2**-8}[dtype]
    torch.testing.assert_close(weight.grad.double(), gradient, rtol=rtol, atol=rtol * gradient.abs().max().item())


def test_it_is_off_by_default():
    def terms(**options):
        return WeightPenalty(**options).loss_terms(lit_module())

    assert terms() == terms(weight=1.0, sites=[]) == {}
    assert terms(weight=1.0)["weight_penalty"].sites == SITES
    term = terms(weight=8.0, sites=["qkv", "mlp_in"], warmup_steps=2)["weight_penalty"]
    assert [term.coefficient(step) for step in range(4)] == [1.0, 2.0, 2.0, 2.0]  # of 2 blocks × 2 sites
    with pytest.raises(ValueError, match=r"weight_penalty\.weight -1\.0 is negative"):
        WeightPenalty(-1.0)


class FirstStep(Callback):
    """Weights and gradients just before the first optimizer step."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == 0:
            named = [(name, p) for name, p in pl_module.model.named_parameters() if p.grad is not None]
            self.weights = {name: p.detach().clone() for name, p in named}
            self.gradients = {name: p.grad.clone() for name, p in named}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_loss_log_and_gradients_get_lambda_times_the_mean(corpus, kind, accumulate):
    sites, found = ("qkv", "mlp_proj"), []
    for weight in (0.0, 0.5):
        first, losses = FirstStep(), Losses()
        options = {"kind": kind, "sites": list(sites), "warmup_steps": 2}
        callbacks = [WeightPenalty(weight, **options), losses, first]
        engine = trainer(callbacks, steps=1, accumulate_grad_batches=accumulate)
        engine.fit(lit_module(PLAIN), datamodule=datamodule(corpus, batch_size=8 // accumulate))
        found.append((first, losses.values, engine.logger))
    (without, plain_losses, plain_log), (first, losses, log) = found
    expected = {
        f"blocks.{layer}.{site}.weight": by_hand(kind, first.weights[f"blocks.{layer}.{site}.weight"])
        for layer in range(2)
        for site in sites
    }
    penalty = 0.25 * sum(value for value, _ in expected.values()) / 4
    assert [a - b for a, b in zip(losses, plain_losses, strict=True)] == pytest.approx([penalty] * accumulate, rel=1e-3)
    assert log.of("weight_penalty/penalty")[0] == pytest.approx(penalty, rel=1e-5)
    for site in sites:
        mean = sum(expected[f"blocks.{layer}.{site}.weight"][0] for layer in range(2)) / 2
        assert log.of(f"weight_penalty/{site}")[0] == pytest.approx(mean, rel=1e-5)
    assert not log.of("weight_penalty/mlp_in")
    assert not plain_log.of("weight_penalty/penalty")
    for name, gradient in first.gradients.items():
        added = 0.25 / 4 * expected[name][1] if name in expected else torch.zeros(())
        # both are float32: as good as the last bits of the larger one
        torch.testing.assert_close(gradient, without.gradients[name] + added.float(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_it_lowers_what_it_penalizes_by_config(corpus, kind, tmp_path):
    (tmp_path / "fit.yaml").write_text(
        f"""
        model: {{shape: {{num_layers: 2, width: 32, num_heads: 2}}}}
        optim: {{lr: 2e-3, warmup_steps: 3}}
        kurtosis: {{weight: 0}}
        weight_penalty: {{kind: {kind}}}
        outliers: {{every_n_steps: 0}}
        data: {{source: {corpus}, cache_dir: {corpus.parent}/cache, vocab_size: 300, context: 16, batch_size: 8,
                valid_share: 0.1, num_workers: 0}}
        trainer: {{accelerator: cpu, devices: 1, max_steps: 20, log_every_n_steps: 1, limit_val_batches: 1,
                   enable_progress_bar: false, enable_model_summary: false,
                   logger: {{class_path: TensorBoardLogger, init_args: {{save_dir: {tmp_path}, name: fit}}}}}}
        """
    )
    curves = []
    for version, weight in {"without": 1e-9, "penalized": 10}.items():
        options = f"--weight_penalty.weight={weight} --trainer.logger.init_args.version={version}"
        main(shlex.split(f"fit --config={tmp_path}/fit.yaml {options}"))
        events = EventAccumulator(str(tmp_path / "fit" / version), {"scalars": 0}).Reload()
        sites = [[event.value for event in events.Scalars(f"weight_penalty/{site}")] for site in SITES]
        curves.append([sum(values) for values in zip(*sites, strict=True)])
    without, penalized = curves
    assert len(penalized) == 20
    assert penalized[0] == pytest.approx(without[0], rel=1e-6)
    assert penalized[-1] < 0.8 * penalized[0]
    assert penalized[-1] < 0.8 * without[-1]


def test_a_resumed_fit_goes_on_as_if_it_had_not_stopped(corpus, tmp_path):
    def fit(steps, resume_from=None):
        losses = Losses()
        engine = trainer([WeightPenalty(1.0, warmup_steps=10), losses], steps)
        engine.fit(lit_module(PLAIN), datamodule=datamodule(corpus), ckpt_path=resume_from)
        return engine, losses.values

    whole, whole_losses = fit(6)
    fit(3)[0].save_checkpoint(tmp_path / "x.ckpt")
    resumed, losses = fit(6, tmp_path / "x.ckpt")
    assert losses == whole_losses[3:]
    penalties = {step: value for step, value in whole.logger.of("weight_penalty/penalty").items() if step >= 3}
    assert resumed.logger.of("weight_penalty/penalty") == penalties
