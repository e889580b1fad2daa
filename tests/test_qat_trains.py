"""It must train: with the shipped recipe a 4-bit-activation model keeps up with its 16-bit twin; naively it does not.

Three seeds of a 2 × 64 decoder on State of the Union addresses, 307,200 tokens each; a seed sets the weights and the
order of the data, the same for its three fits. Compared is the held-out loss in nats. docs/qat-stability.md tells why
the naive recipe fails: with clips of ±4 the attention projection's small inputs are rounded to zero.
"""

import pytest
from lightning.pytorch import seed_everything
from small_fit import trainer

from lit_actreg.callbacks.clip_schedule import ClipSchedule
from lit_actreg.callbacks.kurtosis import KurtosisRegularization
from lit_actreg.config import ModelConfig, OptimConfig, QuantConfig
from lit_actreg.data import TextDataModule
from lit_actreg.module import LitLanguageModel

pytestmark = pytest.mark.usefixtures("one_thread")
SEEDS = (1, 2, 3)
STEPS, LR, CONTEXT, VOCAB_SIZE = 300, 4e-3, 32, 512
SHAPE = ModelConfig(num_layers=2, width=64, num_heads=2, context=CONTEXT)
RECIPES = {
    # ±4 at every site (after GELU −0.17 … 4, its c⁻ fixed), moved by the learning rate of the weights
    "naive": lambda: [ClipSchedule(lr=LR, unit="absolute", calibrate_steps=[])],
    "shipped": lambda: [ClipSchedule(), KurtosisRegularization()],
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("qat") / "cache"


def held_out_loss(cache, seed: int, recipe: str | None) -> float:
    """Of one fit; no recipe trains the 16-bit twin."""
    seed_everything(seed, verbose=False)
    data = TextDataModule(
        max_documents=80,
        valid_share=0.05,
        vocab_size=VOCAB_SIZE,
        context=CONTEXT,
        batch_size=32,
        num_workers=0,
        seed=seed,
        cache_dir=str(cache),
    )
    quant = QuantConfig() if recipe else QuantConfig(activations="none")
    module = LitLanguageModel(SHAPE, quant, OptimConfig(lr=LR, warmup_steps=20), VOCAB_SIZE)
    options = {"log_every_n_steps": 50, "logger": False}
    trainer(RECIPES[recipe]() if recipe else [], STEPS, **options).fit(module, datamodule=data)
    (result,) = trainer([], limit_val_batches=1000, **options).validate(module, datamodule=data, verbose=False)
    return result["val/loss"]


@pytest.fixture(scope="module", params=SEEDS)
def seed_and_twin(request, cache) -> tuple[int, float]:
    return request.param, held_out_loss(cache, request.param, None)


def test_the_shipped_recipe_keeps_up_with_16_bits(cache, seed_and_twin):
    seed, twin = seed_and_twin
    gap = held_out_loss(cache, seed, "shipped") - twin
    print(f"seed {seed}: 16-bit {twin:.4f}, shipped {gap:+.4f}")
    assert gap <= 0.03


def test_the_naive_recipe_falls_behind(cache, seed_and_twin):
    seed, twin = seed_and_twin
    gap = held_out_loss(cache, seed, "naive") - twin
    print(f"seed {seed}: 16-bit {twin:.4f}, naive {gap:+.4f}")
    assert gap >= 0.1
