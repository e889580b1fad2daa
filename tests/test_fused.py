"""The decoder on the fused operators (forced on, on a CPU) is the decoder: gradients, autocast, observers."""

import pytest
import torch
from small_models import text_ids
from test_parity import TERMS, decoder, gradients, reference_gradients

from lit_actreg.config import SITES, QuantConfig
from lit_actreg.parallel import checkpoint_blocks, compile_blocks
from lit_actreg.quant.calibration import input_hessians
from lit_actreg.quant.fused import fuses
from lit_actreg.quant.observe import observe_inputs

pytestmark = pytest.mark.usefixtures("one_thread")


def fused_decoder(style: str):
    model = decoder(style)
    model.set_fused(True)
    return model


@pytest.mark.parametrize(
    ("style", "engine"),
    [
        *((style, engine) for style in ("neox", "llama") for engine in ("eager", "checkpointed", "compiled")),
        pytest.param("neox", "checkpointed and compiled", marks=pytest.mark.slow),  # compiling takes 25 s
    ],
)
@pytest.mark.parametrize("case", ["all", "mlp_in", "qkv", "seen"])
def test_gradients_are_the_formulas(style, engine, case):
    """In float64; with one site quantized, a fused norm also meets a plain one.

    GELU's operator sums the bias's gradient of the linear before, unless a term sees that one's output, too.
    """
    if case != "all" and engine != "eager":
        pytest.skip("one graph is as good as another")
    quant = QuantConfig(sites=[case]) if case in SITES else QuantConfig()
    kurtosis, _, weights = TERMS
    terms = TERMS if case == "seen" else (kurtosis, weights)
    batch, plain, model = text_ids(4, 17), decoder(style), fused_decoder(style)
    plain.set_activations(quant)
    model.set_activations(quant)
    expected = reference_gradients(plain, batch, terms)
    if "checkpointed" in engine:
        checkpoint_blocks(model)
    if "compiled" in engine:
        compile_blocks(model)
    found = gradients(model, (batch,), terms)
    deferred = case == "all" and style == "neox"
    assert [block.bias_for_gelu(torch.zeros(1)) is not None for block in model.blocks] == [deferred] * 2
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        if gradient is None:  # a clip of a site that is not quantized
            assert found[name] is None, name
        else:
            torch.testing.assert_close(found[name], gradient, rtol=1e-10, atol=1e-12, msg=lambda text, n=name: n + text)


@pytest.mark.parametrize("group_size", [None, 8])
def test_tokens_grids_behind_swiglu_are_fused_too(group_size):
    quant = QuantConfig(per_token_sites=["mlp_proj"], token_group_size=group_size)
    batch, plain, model = text_ids(4, 17), decoder("llama"), fused_decoder("llama")
    plain.set_activations(quant)
    model.set_activations(quant)
    assert fuses(model.blocks[0].mlp_proj, torch.zeros(1), "token")
    assert not fuses(plain.blocks[0].mlp_proj, torch.zeros(1), "token")
    expected, found = reference_gradients(plain, batch), gradients(model, (batch,))
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-10, atol=1e-12, msg=lambda text, n=name: n + text)


@pytest.mark.parametrize("style", ["neox", "llama"])
@pytest.mark.parametrize("bfloat16", [False, True])
def test_under_autocast_values_are_rounded_where_the_plain_path_rounds_them(style, bfloat16):
    """Same dtypes at every point, so hidden states differ by rare codes at an edge: less than bfloat16 itself.

    Not so behind SwiGLU, hence without a grid there: run eagerly, the plain path rounds silu(gate) too; compiled and
    fused, the product alone.
    """
    hidden, streams = [], []
    for fused in (False, True):
        model = decoder(style).float()
        model.set_activations(QuantConfig(sites=["qkv", "attn_proj", "mlp_in"]))
        model.bfloat16_stream = bfloat16
        model.set_fused(fused)
        for block in model.blocks:
            block.register_forward_hook(lambda block, args, output: streams.extend([args[0].dtype, output[0].dtype]))
        with torch.autocast("cpu", torch.bfloat16):
            hidden.append(model(text_ids(4, 17))[0])
    assert set(streams) == {torch.bfloat16 if bfloat16 else torch.float32}
    assert hidden[0].dtype == hidden[1].dtype == torch.bfloat16
    difference = hidden[0].float() - hidden[1].float()
    assert difference.norm() <= torch.finfo(torch.bfloat16).eps * hidden[0].float().norm()


@pytest.mark.parametrize("engine", ["eager", pytest.param("compiled", marks=pytest.mark.slow)])
@pytest.mark.parametrize("fused", [False, True])
def test_a_bfloat16_stream_trains_as_the_float32_one_but_for_rounding(engine, fused):
    """Kurtosis and the residual's gradient included; grids of 8 bits at most amplify a last bit.

    The embedding and two additions a block each round values and gradients to 8 bits: 2 %, 4 % with the grids. A
    gradient that got lost is tens of per cent.
    """
    found = []
    for bfloat16 in (False, True):
        model = fused_decoder("neox").float() if fused else decoder("neox").float()
        model.set_activations(QuantConfig(activation_bits=8) if fused else QuantConfig(activations="none"))
        model.bfloat16_stream = bfloat16
        if engine == "compiled":
            compile_blocks(model)
        with torch.autocast("cpu", torch.bfloat16):
            found.append(gradients(model, (text_ids(4, 17),)))
    names = [name for name, gradient in found[0].items() if gradient is not None and "quantizer" not in name]
    before, after = (torch.cat([f[name].flatten() for name in names]) for f in found)
    assert all(found[1][name].dtype == torch.float32 for name in names)
    assert 0 < (before - after).norm() <= 0.1 * before.norm()


def test_without_autocast_the_stream_has_the_weights_type():
    model = decoder("neox").float()
    expected = model(text_ids(2, 16))[0]
    model.bfloat16_stream = True
    assert torch.equal(model(text_ids(2, 16))[0], expected)


def test_observers_see_raw_inputs():
    """Monitor and calibration hook linears and quantizers: they must see what the plain path shows them."""
    seen: dict[bool, list[torch.Tensor]] = {False: [], True: []}
    hessians = []
    for fused in (False, True):
        model = decoder("neox").float()
        model.set_fused(fused)
        observe_inputs(model, text_ids(2, 16), lambda layer, site, linear, x, f=fused: seen[f].append(x))
        x = model.embedding(text_ids(2, 16)).detach()
        hessians.append(input_hessians(model.blocks[0], "block", [x], torch.device("cpu")))
    assert len(seen[True]) == 8
    assert all(torch.equal(a, b) for a, b in zip(seen[False], seen[True], strict=True))
    assert all(torch.equal(hessians[0][site], hessians[1][site]) for site in hessians[0])


@pytest.mark.slow  # compiling takes 40 s
def test_a_compiled_block_is_observed_and_stays_compiled():
    model = fused_decoder("neox").float()
    compile_blocks(model)
    ids, seen = text_ids(2, 16), []
    first = model(ids)[0]
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    observe_inputs(model, ids, lambda layer, site, linear, x: seen.append(x))
    assert len(seen) == 8
    assert torch.equal(model(ids)[0], first)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled
