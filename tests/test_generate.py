"""Generation: the cache gives the logits of the whole forward pass, and the window moves as documented."""

import pytest
import torch
from lit_actreg_plugins.rtn import RTN
from lit_actreg_plugins.w4a4_precision import W4A4Precision
from small_models import VOCAB_SIZE, small_decoder, text_ids
from torch.nn import Module

from lit_actreg import generate as generation
from lit_actreg.artifact import read_artifact
from lit_actreg.config import QuantConfig
from lit_actreg.contracts import LossTerm
from lit_actreg.generate import Continuation, generate, sample, window_start
from lit_actreg.model import Block, LayerCache, rotary_angles
from lit_actreg.parallel import compile_blocks
from lit_actreg.quant.statistics import token_kurtosis
from lit_actreg.quantize import quantize_model

pytestmark = pytest.mark.usefixtures("one_thread")
NONE, STATIC = QuantConfig(activations="none"), QuantConfig()
STYLES = ["neox", "llama"]  # "llama": two query heads a key/value head


def next_token_logits(model, ids):
    """As `predict` computed them before there was a cache: the whole context for every token."""
    return model.logits(model(ids)[0])[:, -1]


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("quant", [NONE, STATIC], ids=["float", "fake-quantized"])
@pytest.mark.parametrize("first", [1, 7])
def test_cached_steps_give_the_logits_of_the_whole_pass(style, quant, first):
    model, ids = small_decoder(style, quant).double(), text_ids(3, 40)
    expected = model.logits(model(ids)[0])
    c, length = model.config, 50  # longer than the text: the entries behind it must not be seen
    cos, sin = rotary_angles(length, c.head_width, c.rope_theta, ids.device)
    shape = (3, c.kv_heads, length, c.head_width)
    memory = [(torch.zeros(shape).double(), torch.zeros(shape).double()) for _ in model.blocks]
    found = []
    for start, end in [(0, first), *((t, t + 1) for t in range(first, 40))]:
        positions = torch.arange(start, end)
        caches = [LayerCache(*layer, positions[:1]) for layer in memory]
        found.append(model.logits(model(ids[:, start:end], (cos[positions], sin[positions]), caches)[0]))
    torch.testing.assert_close(torch.cat(found, 1), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("quant", [NONE, STATIC], ids=["float", "fake-quantized"])
def test_greedy_tokens_are_those_of_reading_everything_again(style, quant):
    # Untied: a random tied head finds every token likeliest after itself.
    model, ids = small_decoder(style, quant, tie=False).double(), text_ids(3, 20)
    found = generate(model, ids, 44)
    for _ in range(44):
        ids = torch.cat([ids, next_token_logits(model, ids).argmax(-1, keepdim=True)], 1)
    assert torch.equal(found, ids)
    assert found[:, 20:].unique().numel() > 5  # not one token over and over


def test_integer_kernels_generate_what_they_would_reading_everything_again(tmp_path):
    quantize_model(small_decoder("llama", tie=False), RTN(), [], tmp_path / "out")
    model = W4A4Precision().convert_module(read_artifact(tmp_path / "out"))
    ids = text_ids(2, 20)
    found = generate(model, ids, 20)
    for _ in range(20):
        ids = torch.cat([ids, next_token_logits(model, ids).argmax(-1, keepdim=True)], 1)
    assert torch.equal(found, ids)


@pytest.mark.parametrize("context", [1, 2, 7, 8])
def test_the_window_holds_more_than_half_a_context_and_moves_in_halves(context):
    starts = [window_start(n, context) for n in range(1, 50)]
    assert starts[:context] == [0] * context
    assert all(context - context // 2 < n - s <= context or s == 0 for n, s in enumerate(starts, 1) if context > 1)
    assert all(s % max(1, context // 2) == 0 for s in starts)
    assert starts == sorted(starts)


@pytest.mark.parametrize("num_prompt", [1, 7, 8, 9, 21])
def test_past_the_context_tokens_are_predicted_from_the_window(num_prompt):
    model, ids = small_decoder("neox", NONE, tie=False).double(), text_ids(2, num_prompt)
    model.config.context = 8
    found = generate(model, ids, 20)
    for n in range(num_prompt, num_prompt + 20):
        window = found[:, window_start(n, 8) : n]
        assert torch.equal(found[:, n], next_token_logits(model, window).argmax(-1))
    assert torch.equal(generate(model, generate(model, ids, 9), 11), found)


def test_samples_follow_the_tempered_distribution():
    torch.manual_seed(0)
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    for temperature in (0.5, 2.0):
        counts = torch.bincount(sample(logits.expand(20000, 4), temperature), minlength=4) / 20000
        # four standard deviations of a share: 4 · √(p (1 − p) / 20,000) ≤ 0.015
        torch.testing.assert_close(counts, (logits / temperature).softmax(-1), rtol=0, atol=0.015)
    assert sample(logits[None], 0.0).item() == 2


def test_sampling_is_repeated_by_a_seed():
    model, ids = small_decoder("neox", NONE), text_ids(2, 5)
    torch.manual_seed(3)
    first = generate(model, ids, 30, temperature=1.0)
    assert not torch.equal(generate(model, ids, 30, temperature=1.0), first)
    torch.manual_seed(3)
    assert torch.equal(generate(model, ids, 30, temperature=1.0), first)
    assert first.max() < VOCAB_SIZE


def test_a_compiled_model_that_was_trained_generates_from_prompts_of_any_length(monkeypatch):
    """Blocks share what is compiled; Dynamo gives up where a function takes more than eight forms."""
    monkeypatch.setattr(Block, "compile", lambda block, **options: Module.compile(block, backend="eager", **options))
    torch._dynamo.reset()
    model = small_decoder("neox").requires_grad_()
    compile_blocks(model)
    with torch.no_grad():
        model(text_ids(2, 16))
    model.set_loss_terms((LossTerm(token_kurtosis, every_nth_token=4),))
    model(text_ids(2, 16))[0].sum().backward()
    with torch.no_grad():
        model(text_ids(2, 16))
        model(text_ids(1, 16))
    for length in (5, 9, 3):
        assert generate(model, text_ids(1, length), 4).shape == (1, length + 4)


def test_the_cache_is_as_long_as_what_is_read():
    continuation = Continuation(small_decoder("llama", NONE), text_ids(2, 5), 4)
    assert [keys.shape for keys in continuation.keys] == [(2, 3, 8, 6)] * 2
    assert torch.equal(continuation.position, torch.tensor([5]))


def test_the_cache_has_autocasts_dtype():
    model, ids = small_decoder("neox", NONE), text_ids(1, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert Continuation(model, ids, 4).values[0].dtype == torch.bfloat16
        assert generate(model, ids, 4).shape == (1, 9)


@pytest.mark.parametrize(
    ("prompt", "temperature", "message"), [(0, 0.0, "a prompt is empty"), (3, -1.0, "temperature -1.0 is negative")]
)
def test_refuses(prompt, temperature, message):
    with pytest.raises(ValueError, match=message):
        generate(small_decoder("neox", NONE), text_ids(1, prompt), 2, temperature)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_captured_step_gives_the_eager_tokens(temperature, monkeypatch):
    """Also the random ones: a captured step advances the generator as an eager one does."""
    model, ids = small_decoder("llama", NONE).cuda(), text_ids(2, 5).cuda()
    captures = []
    monkeypatch.setattr(generation, "captured", lambda step, old=generation.captured: captures.append(1) or old(step))
    torch.manual_seed(3)
    expected = generate(model, ids, 30, temperature, cuda_graph=False)
    torch.manual_seed(3)
    assert torch.equal(generate(model, ids, 30, temperature), expected)
    assert captures == [1]
