"""The module: optimizer groups, schedule, clipping, perplexity, generation, what a checkpoint of it holds."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision
from small_fit import CONTEXT, VOCAB_SIZE, datamodule, lit_module, trainer, write_corpus
from torch.utils.data import DataLoader

from lit_actreg.callbacks.clip_schedule import ClipSchedule
from lit_actreg.config import QuantConfig
from lit_actreg.generate import window_start

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("module") / "corpus")


def configured(**options):
    module = lit_module(**options)
    trainer([], steps=20).strategy.connect(module)
    module.configure_model()
    return module


@pytest.mark.parametrize("style", ["neox", "llama"])
@pytest.mark.parametrize("activations", ["static", "none"])
def test_every_trained_parameter_is_in_its_group_once(style, activations):
    module = configured(style=style, quant=QuantConfig(activations=activations))
    names = {id(p): name for name, p in module.model.named_parameters()}
    groups = {g["name"]: g for g in module.configure_optimizers()["optimizer"].param_groups}
    found = {name: {names[id(p)] for p in group["params"]} for name, group in groups.items()}
    trained = {name for name, p in module.model.named_parameters() if p.requires_grad}
    assert set.union(*found.values()) == trained
    assert sum(len(group["params"]) for group in groups.values()) == len(trained)
    assert found["matrices"] == {n for n in trained if n.endswith("weight") and "norm" not in n}
    assert found.get("clips", set()) == {n for n in trained if n.endswith(("quantizer.low", "quantizer.high"))}
    assert ("clips" in groups) == (activations == "static")
    decay = {name: group["weight_decay"] for name, group in groups.items()}
    assert decay == {"matrices": 0.1, "vectors": 0.0} | ({"clips": 0.0} if "clips" in groups else {})
    assert groups["matrices"]["betas"] == (0.9, 0.95)


def test_learning_rate_warms_up_and_falls_as_a_cosine():
    module = lit_module()  # 3 steps of warm-up, end at 20, a tenth left
    factors = [module.lr_factor(step) for step in (0, 1, 2, 3, 20, 1000)]
    assert factors == pytest.approx([1 / 3, 2 / 3, 1.0, 1.0, 0.1, 0.1])
    module.optim.warmup_steps = 0
    assert module.lr_factor(10) == pytest.approx(0.55)  # half way
    module.optim.decay_steps = None
    with pytest.raises(ValueError, match=r"set trainer\.max_steps or optim\.decay_steps"):
        module.check(trainer([], steps=-1, max_epochs=1))


def test_gradients_are_clipped_by_the_norm_of_the_weights_alone(monkeypatch):
    module = configured()
    logged = {}
    monkeypatch.setattr(module, "log", lambda name, value: logged.update({name: value.item()}))
    monkeypatch.setattr(type(module), "logs_now", True)
    optimizer = module.configure_optimizers()["optimizer"]
    for p in module.model.parameters():
        p.grad = torch.ones_like(p)
    clips = optimizer.param_groups[-1]["params"]
    num_weights = sum(p.numel() for g in optimizer.param_groups[:-1] for p in g["params"])
    module.configure_gradient_clipping(optimizer, None)
    assert module.model.embedding.weight.grad[0, 0] == 1.0
    module.configure_gradient_clipping(optimizer, 2.0)
    assert logged["train/gradient_norm"] == pytest.approx(math.sqrt(num_weights), rel=1e-5)
    assert module.model.embedding.weight.grad[0, 0].item() == pytest.approx(2 / math.sqrt(num_weights), rel=1e-4)
    assert all(clip.grad.item() == 1.0 for clip in clips)


@pytest.mark.parametrize("fused", [False, True])
def test_clipped_gradients_are_not_scaled_in_float16(corpus, monkeypatch, fused):
    """With a fused optimizer too, as on a GPU, which divides by GradScaler's factor only in its step."""
    adamw = torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda groups, **options: adamw(groups, **options | {"fused": fused}))
    norms = []
    for plugins in ([], [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))]):
        engine = trainer([], steps=3, plugins=plugins)
        engine.fit(lit_module(), datamodule=datamodule(corpus))
        norms.append(list(engine.logger.of("train/gradient_norm").values()))
    assert norms[1] == pytest.approx(norms[0], rel=0.1)


def test_perplexity_does_not_depend_on_the_batch_size(corpus):
    """28 blocks in batches of 3, 5 and 16: the last ones have rows of padding."""
    module, seen = configured(), {}
    for batch_size in (1, 3, 5, 16):
        data = datamodule(corpus, batch_size=batch_size)
        engine = trainer([], limit_val_batches=1000, limit_test_batches=1000)
        seen[batch_size] = engine.validate(module, datamodule=data, verbose=False)[0]["val/perplexity"]
        num_blocks = len(data.blocks["valid"])
        blocks = data.blocks["valid"].__getitems__(list(range(num_blocks)))
        (test,) = engine.test(module, datamodule=data, verbose=False)
        assert test["test/perplexity"] != seen[batch_size]
    assert num_blocks == 28
    with torch.no_grad():
        logits = module.model.logits(module.model(blocks[:, :-1])[0])
    expected = F.cross_entropy(logits.flatten(0, 1).double(), blocks[:, 1:].flatten()).exp().item()
    assert list(seen.values()) == pytest.approx([expected] * 4, rel=1e-5)


def test_a_module_that_was_validated_can_be_fitted(corpus):
    """`validate` runs in inference mode, `fit` validates without."""
    module, data = lit_module(), datamodule(corpus)
    for _ in range(2):
        trainer([], limit_val_batches=1).validate(module, datamodule=data, verbose=False)
        trainer([], steps=1, limit_val_batches=1).fit(module, datamodule=data)


def test_a_loader_without_its_datamodule_is_refused(corpus):
    data = datamodule(corpus)
    data.prepare_data()
    data.setup("fit")
    with pytest.raises(ValueError, match="call fit"):
        trainer([], steps=1).fit(lit_module(), data.train_dataloader())


@pytest.mark.parametrize("num_prompt", [1, CONTEXT - 2, CONTEXT + 5])
def test_predict_continues_with_the_likeliest_tokens(corpus, num_prompt, capsys):
    data = datamodule(corpus)
    data.prepare_data()
    module = configured(quant=QuantConfig(activations="none"))
    module.new_tokens, module.temperature = 4, 0.0
    engine = trainer([], limit_val_batches=1)
    engine.validate(module, datamodule=data, verbose=False)  # attaches both
    prompt = torch.arange(num_prompt).remainder(VOCAB_SIZE).unsqueeze(0)
    found = module.predict_step(prompt, 0)
    assert found.shape == (1, num_prompt + 4)
    assert torch.equal(found[:, :num_prompt], prompt)
    for i in range(num_prompt, num_prompt + 4):
        context = found[:, window_start(i, CONTEXT) : i]
        with torch.no_grad():
            assert found[0, i] == module.model.logits(module.model(context)[0])[0, -1].argmax()
    assert capsys.readouterr().out == data.decode(found[0]) + "\n"


@pytest.mark.parametrize("option", [{"new_tokens": -1}, {"temperature": -0.5}])
def test_what_cannot_be_generated_is_refused(option):
    with pytest.raises(ValueError, match=r"new_tokens .*: use 1 or more|temperature .*: use 0"):
        lit_module(**option)


def test_a_window_of_no_batches_is_refused(corpus):
    with pytest.raises(ValueError, match=r"trainer\.accumulate_grad_batches 0: use 1 or more"):
        trainer([], accumulate_grad_batches=0).fit(lit_module(), datamodule=datamodule(corpus))


def test_a_checkpoint_is_of_plain_types_and_brings_its_tokenizer(corpus, tmp_path):
    data, module = datamodule(corpus), lit_module()
    engine = trainer([], steps=1)
    engine.fit(module, datamodule=data)
    engine.save_checkpoint(tmp_path / "x.ckpt")
    checkpoint = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert checkpoint["tokenizer_json"] == data.tokenizer_path.read_text()
    assert set(checkpoint["hyper_parameters"]) == {"shape", "quant", "vocab_size"}
    read = type(module).load_from_checkpoint(tmp_path / "x.ckpt", weights_only=True)
    assert (read.shape, read.quant, read.vocab_size) == (module.shape, module.quant, module.vocab_size)
    other = QuantConfig(activations="none")
    assert type(module).load_from_checkpoint(tmp_path / "x.ckpt", strict=False, quant=other).quant == other
    started = configured(init_from=str(tmp_path / "x.ckpt"))
    for name, p in module.model.named_parameters():
        assert torch.equal(read.model.get_parameter(name), p)
        assert torch.equal(started.model.get_parameter(name), p)


def test_any_batches_of_tokens_will_do(corpus, tmp_path):
    """A DataLoader of one's own has no tokenizer to go into the checkpoint, and nothing to decode a text with."""
    module, batches = lit_module(), DataLoader(torch.arange(CONTEXT + 1).repeat(2, 1), batch_size=2)
    engine = trainer([ClipSchedule()], steps=1)
    engine.fit(module, batches)
    engine.save_checkpoint(tmp_path / "x.ckpt")
    assert "tokenizer_json" not in torch.load(tmp_path / "x.ckpt", weights_only=True)
    module.new_tokens = 3
    assert trainer([]).predict(module, batches)[0].shape == (2, CONTEXT + 4)


def test_clips_without_a_schedule_are_warned_about(corpus):
    with pytest.warns(UserWarning, match="clips stay where they are: the callback ClipSchedule"):
        trainer([], steps=1).fit(lit_module(), datamodule=datamodule(corpus))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="clips stay")
        scheduled = lit_module()
        trainer([ClipSchedule()], steps=1).fit(scheduled, datamodule=datamodule(corpus))
        trainer([], steps=1).fit(lit_module(QuantConfig(activations="none")), datamodule=datamodule(corpus))
    with pytest.warns(UserWarning, match="clips stay"):
        trainer([], steps=1).fit(scheduled, datamodule=datamodule(corpus))


def test_a_bfloat16_stream_needs_autocast(corpus):
    data, module = datamodule(corpus), lit_module(bfloat16_stream=True)
    with pytest.raises(ValueError, match=r"does nothing at trainer\.precision 32-true: set that to bf16-mixed"):
        trainer([], steps=1).fit(module, datamodule=data)
    engine, dtypes = trainer([], steps=1, precision="bf16-mixed"), []
    module.configure_model()
    module.model.blocks[1].register_forward_hook(lambda block, args, output: dtypes.append(output[0].dtype))
    engine.fit(module, datamodule=data)
    assert set(dtypes) == {torch.bfloat16}
    assert math.isfinite(engine.logger.of("train/loss")[0])


@pytest.mark.parametrize(("precision", "dtype"), [("bf16-true", torch.float32), ("64-true", torch.float64)])
def test_perplexity_is_summed_up_in_float32_or_wider(corpus, precision, dtype):
    """Lightning casts a module's metrics with its weights, and a sum of tokens in bfloat16 stalls at 256 batches."""

    class Look(Callback):
        def on_validation_batch_end(self, trainer, module, *_):
            assert module.val_loss.weight.dtype == dtype
            assert module.val_loss.mean_value.dtype == dtype

    module = lit_module()
    trainer([Look()], limit_val_batches=3, precision=precision).validate(
        module, datamodule=datamodule(corpus), verbose=False
    )
    assert next(module.parameters()).dtype != torch.float32


def test_a_resumed_fit_has_the_optimizer_that_is_asked_for_now(corpus, tmp_path):
    """And with the same options the state that was saved, to the bit (tests/test_preemption.py)."""
    first = trainer([], steps=3)
    first.fit(lit_module(lr=1e-2), datamodule=datamodule(corpus))
    first.save_checkpoint(tmp_path / "x.ckpt")
    module, lrs = lit_module(lr=1e-3), []
    module.optim.weight_decay = 0.7

    class Look(Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            lrs.append({group["name"]: group["lr"] for group in optimizer.param_groups})

    resumed = trainer([Look()], steps=6)
    resumed.fit(module, datamodule=datamodule(corpus), ckpt_path=tmp_path / "x.ckpt")
    assert [lr["matrices"] for lr in lrs] == [1e-3 * module.lr_factor(step) for step in (3, 4, 5)]
    assert [lr["clips"] for lr in lrs] == [0.0] * 3
    assert [group["weight_decay"] for group in resumed.optimizers[0].param_groups] == [0.7, 0.0, 0.0]


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda module: setattr(module.shape, "rope_theta", 500.0), r"rope_theta 10000\.0 → 500\.0"),
        (lambda module: setattr(module.quant, "activation_bits", 8), "activation_bits 4 → 8"),
        (lambda module: setattr(module, "vocab_size", 77), f"vocab_size {VOCAB_SIZE} → 77"),
    ],
)
def test_a_fit_is_not_resumed_with_another_model(corpus, tmp_path, change, line):
    first = trainer([], steps=1)
    first.fit(lit_module(), datamodule=datamodule(corpus))
    first.save_checkpoint(tmp_path / "x.ckpt")
    same, other = lit_module(), lit_module()
    same.shape.mlp_width = same.shape.hidden_width  # what null stands for
    trainer([], steps=2).fit(same, datamodule=datamodule(corpus), ckpt_path=tmp_path / "x.ckpt")
    change(other)
    with pytest.raises(ValueError, match=f"the fit to resume has another model: {line}: resume with what it had"):
        trainer([], steps=2).fit(other, datamodule=datamodule(corpus), ckpt_path=tmp_path / "x.ckpt")
