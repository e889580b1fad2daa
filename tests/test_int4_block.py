"""The fused block against the same linears in the plain one, on the reference and in Triton."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from lit_actreg_kernels import ops, reference
from lit_actreg_kernels.module import Int4Linear
from lit_actreg_plugins.int4_block import Int4Block
from lit_actreg_plugins.rtn import RTN
from lit_actreg_plugins.w4a4_precision import W4A4Precision
from quantizer_checks import DEVICE
from small_models import small_decoder, text_ids

from lit_actreg.artifact import read_artifact
from lit_actreg.config import SITES, QuantConfig
from lit_actreg.generate import generate
from lit_actreg.model import Block
from lit_actreg.parallel import compile_blocks
from lit_actreg.quant.quantized_linear import QuantizedLinear
from lit_actreg.quantize import quantize_model

pytestmark = pytest.mark.usefixtures("one_thread")
MODELS = {
    "neox": ("neox", QuantConfig()),
    "llama": ("llama", QuantConfig()),
    "llama, token groups": ("llama", QuantConfig(per_token_sites=["mlp_proj"], token_group_size=9)),
}


@pytest.fixture(scope="module", params=MODELS)
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("fused") / "artifact"
    style, quant = MODELS[request.param]
    quantize_model(small_decoder(style, quant, tie=False), RTN(group_size=9), [], path)
    return path


def served(folder, dtype="float32"):
    model = W4A4Precision(dtype).convert_module(read_artifact(folder))
    assert [type(block) for block in model.blocks] == [Int4Block] * 2
    return model


def unfused(folder, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Int4Block, "serves", staticmethod(lambda block: False))
        model = W4A4Precision().convert_module(read_artifact(folder))
    assert [type(block) for block in model.blocks] == [Block] * 2
    assert all(isinstance(getattr(block, site), Int4Linear) for block in model.blocks for site in SITES)
    return model


def logits_and_codes(model, ids, monkeypatch):
    """Logits [B, T, V], and the input codes of every linear in the order of their calls."""
    codes = []

    def recording(x, *rest, original=reference.int4_linear):
        codes.append(x)
        return original(x, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(reference, "int4_linear", recording)
        logits = model.logits(model(ids)[0])
    return logits, codes


def assert_one_perplexity(found, expected, ids):
    """To four digits, but for tokens that a code has parted which a last bit moved: attention hands it on to others."""
    parted = ((found - expected).abs().amax(-1) > 1e-4 * expected.abs().max())[:, :-1].flatten()
    assert parted.float().mean() <= 0.05
    targets = ids[:, 1:].flatten()[~parted]
    losses = [F.cross_entropy(logits[:, :-1].flatten(0, 1)[~parted].double(), targets) for logits in (found, expected)]
    assert losses[0].exp().item() == pytest.approx(losses[1].exp().item(), rel=5e-5)


def test_codes_and_perplexity_are_those_of_the_unfused_block(folder, monkeypatch):
    ids = text_ids(32)
    found, codes = logits_and_codes(served(folder), ids, monkeypatch)
    expected, unfused_codes = logits_and_codes(unfused(folder, monkeypatch), ids, monkeypatch)
    assert len(codes) == len(unfused_codes) == 8
    differing = sum(int((a != b).sum()) for a, b in zip(codes, unfused_codes, strict=True))
    # A last bit of a norm or an activation may move a value over the edge between two codes: one in 100,000.
    assert differing <= 1e-5 * sum(a.numel() for a in codes)
    assert_one_perplexity(found, expected, ids)
    assert all(a.unique().numel() > 4 for a in codes)


def test_perplexity_is_the_fake_quantized_models(folder):
    ids = text_ids(32)
    model = read_artifact(folder)
    assert isinstance(model.blocks[0].qkv, QuantizedLinear)
    found = served(folder)
    assert_one_perplexity(found.logits(found(ids)[0]), model.logits(model(ids)[0]), ids)


def test_triton_gives_the_references_logits(folder, monkeypatch):
    """In the interpreter without a GPU, compiled with one."""
    model, ids = served(folder), text_ids(2, 5)
    expected, decoded = model.logits(model(ids)[0]), generate(model, ids, 3)
    if not torch.cuda.is_available():
        monkeypatch.setattr(
            ops, "_implementation", lambda x, name: importlib.import_module(f"lit_actreg_kernels.{name}")
        )
    model, ids = model.to(DEVICE), ids.to(DEVICE)
    found = model.logits(model(ids)[0]).cpu()
    # The same integers; epilogues and norms differ in last bits, and a code that flips moves all of its token's logits.
    close = ((found - expected).abs() < 1e-4 * expected.abs().max()).all(-1)
    assert close.float().mean() >= 0.9
    assert torch.equal(generate(model, ids, 3).cpu(), decoded)


def test_bfloat16_goes_through(folder):
    model, ids = served(folder, "bfloat16"), text_ids(2)
    found, expected = model.logits(model(ids)[0]), read_artifact(folder)
    expected = expected.logits(expected(ids)[0])
    assert found.dtype == torch.bfloat16
    # Values are rounded to 8 bits between kernels, so a share of the codes is another: correlated, not equal.
    assert torch.corrcoef(torch.stack([found.float().flatten(), expected.flatten()]))[0, 1] > 0.95


def test_it_compiles_whole_and_takes_over_what_was_to_be_compiled(folder):
    torch._dynamo.reset()  # one process compiles all folders' blocks, more variants than its limit
    model = read_artifact(folder)
    compile_blocks(model)
    W4A4Precision().convert_module(model)
    assert all(block._compiled_call_impl is not None for block in model.blocks)
    plain = served(folder)
    assert all(block._compiled_call_impl is None for block in plain.blocks)
    ids = text_ids(2, 7)
    expected = plain.logits(plain(ids)[0])
    for block in plain.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(plain.logits(plain(ids)[0]), expected)
    assert torch.equal(generate(plain, ids, 4), generate(served(folder), ids, 4))


def test_parameters_keep_their_names(folder, monkeypatch):
    assert served(folder).state_dict().keys() == unfused(folder, monkeypatch).state_dict().keys()


@pytest.mark.parametrize(
    "quant",
    [QuantConfig(activations="token"), QuantConfig(sites=["qkv", "mlp_in"]), QuantConfig(activations="none")],
    ids=["per token", "two sites", "weights only"],
)
@pytest.mark.filterwarnings("ignore:.*WEIGHTS ONLY")
def test_other_blocks_stay(quant, tmp_path):
    quantize_model(small_decoder("neox", quant), RTN(), [], tmp_path / "out")
    model = W4A4Precision().convert_module(read_artifact(tmp_path / "out"))
    assert [type(block) for block in model.blocks] == [Block] * 2


def test_a_block_that_returns_statistics_stays(folder, monkeypatch):
    block = unfused(folder, monkeypatch).blocks[0]
    assert Int4Block.serves(block)
    block.loss_terms = (object(),)
    assert not Int4Block.serves(block)
