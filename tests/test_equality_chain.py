"""The heart of the project: one grid from training to stock transformers.

For the same layer and input, in both block styles, per-tensor and per-token grids, groups, 3 and 4 bits, tied and not:

    fake-quantized layer = QuantizedLinear = transformers + compressed-tensors     outputs equal bit by bit (float32)
    their input codes and weight codes = the reference's = Triton's                equal
    integer accumulators: int64 arithmetic = the reference = Triton                equal
    integer layer (Int4Linear) against the float one                               within the bound of a float32 sum

transformers runs in a process of its own that imports nothing of ours.
"""

import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from lit_actreg_kernels import act_quant, grid, int4_grouped, int4_linear, reference
from lit_actreg_kernels.module import Int4Linear
from lit_actreg_plugins.gptq import GPTQ
from lit_actreg_plugins.rtn import RTN
from lit_actreg_plugins.w4a4_precision import int4_linear as to_int4
from safetensors.torch import load_file, save_file
from small_models import small_decoder, text_ids

from lit_actreg.artifact import read_artifact
from lit_actreg.config import SITES, QuantConfig
from lit_actreg.huggingface import BLOCK_PREFIX, LINEARS, split_rows
from lit_actreg.quantize import quantize_model

CASES = {
    "neox_static_packed": ("neox", QuantConfig(), GPTQ(), True),
    "neox_token_w3": ("neox", QuantConfig(activations="token"), RTN(3), False),
    "neox_real_zero_point": ("neox", QuantConfig(zero_point="real"), RTN(4, group_size=9), True),
    "llama_static_groups": ("llama", QuantConfig(), GPTQ(group_size=9), True),
    "llama_static_asymmetric": ("llama", QuantConfig(activation_bits=8), RTN(4, symmetric=False), False),
    "llama_some_sites_token": ("llama", QuantConfig(activations="token", sites=["qkv", "mlp_in"]), RTN(8), True),
    "llama_token_groups": (
        "llama",
        QuantConfig(per_token_sites=["attn_proj", "mlp_proj"], token_group_size=9),
        GPTQ(),
        True,
    ),
    "llama_nested_groups": ("llama", QuantConfig("token", token_group_size=9), RTN(4, 3), True),
    "llama_weights_only": ("llama", QuantConfig(activations="none"), RTN(4), True),
}
IDS = text_ids(16)


def linears(model):
    """Every quantized linear with its place: (block, site, layer)."""
    return [(i, site, block.get_submodule(site)) for i, block in enumerate(model.blocks) for site in SITES]


def their_names(model, index, site):
    """Their names of one of our linears, in the order of their rows in it."""
    style = model.config.style
    return {f"{BLOCK_PREFIX[style]}.{index}.{leaf}": leaf for leaf in LINEARS[style][site]}


def layer_input(linear, index, site):
    generator = torch.Generator().manual_seed(10 * index + SITES.index(site))
    return 1.5 * torch.randn(3, 17, linear.in_features, generator=generator)  # some lie outside the clips


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    """All artifacts, and what a process with transformers alone makes of them."""
    pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors")
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("chain")
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train([str(Path(__file__).parents[1] / "LICENSE")], vocab_size=300, special_tokens=["<|endoftext|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, (style, quant, quantizer, tie) in CASES.items():
        model = small_decoder(style, quant, tie)
        said = "WEIGHTS ONLY" if quant.activations == "none" else "zero points were rounded"
        warns = quant.activations == "none" or quant.zero_point == "real"
        with pytest.warns(UserWarning, match=said) if warns else nullcontext():
            quantize_model(
                model, quantizer, IDS.split(4), folder / name, folder / "tokenizer.json", round_zero_point=True
            )
        ours, request = read_artifact(folder / name), {"ids": IDS}
        for index, site, linear in linears(ours):
            for theirs in their_names(ours, index, site):
                request[theirs] = layer_input(linear, index, site)
        save_file(request, folder / f"{name}.in.safetensors")
    script = Path(__file__).with_name("stock_reader.py")
    command = [sys.executable, str(script), str(folder), *(str(folder / name) for name in CASES)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("name", CASES)
def test_transformers_equals_our_layers_to_the_bit(name, artifacts):
    model, theirs = read_artifact(artifacts / name), load_file(artifacts / f"{name}.out.safetensors")
    for index, site, linear in linears(model):
        ours = linear(layer_input(linear, index, site))
        outputs = split_rows(model.config, site, ours.movedim(-1, 0))
        weights = split_rows(model.config, site, linear.dequantized_weight())
        for full, leaf in their_names(model, index, site).items():
            assert torch.equal(theirs[f"{full}.w"], weights[leaf]), full
            assert torch.equal(theirs[f"{full}.y"].movedim(-1, 0), outputs[leaf]), full


@pytest.mark.parametrize("name", CASES)
def test_transformers_gives_our_codes_and_perplexity_over_a_text(name, artifacts):
    model, theirs = read_artifact(artifacts / name), load_file(artifacts / f"{name}.out.safetensors")
    codes = {}
    for index, site, linear in linears(model):
        if linear.activations != "none":

            def keep(module, args, key=(index, site)):
                codes[key] = module.quantize_input(args[0])[0]

            linear.register_forward_pre_hook(keep)
    logits = model.logits(model(IDS)[0])
    perplexity = F.cross_entropy(logits[:, :-1].flatten(0, 1).double(), IDS[:, 1:].flatten()).exp()
    assert perplexity.item() == pytest.approx(theirs["perplexity"].item(), rel=5e-5)
    # Norms and attention sum in another order there; one unit in the last place can flip a code.
    differing, total = 0, 0
    for (index, site), ours in codes.items():
        for full in their_names(model, index, site):
            differing += int((theirs[f"{full}.codes"] != ours).sum())
            total += ours.numel()
    assert differing <= 1e-5 * total
    assert total > 10**5 or not codes


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case[1].activations != "none"])
def test_training_layer_equals_the_artifacts_to_the_bit(name, artifacts):
    style, quant, _, tie = CASES[name]
    integer = replace(quant, zero_point="integer")
    trained, model = small_decoder(style, integer, tie), read_artifact(artifacts / name)
    for index, site, linear in linears(model):
        layer = trained.blocks[index].get_submodule(site)
        layer.weight.data = linear.dequantized_weight()
        x = layer_input(linear, index, site)
        assert torch.equal(layer(x), linear(x))
        x_hat = layer.input_quantizer(x)
        if linear.activations != "none":
            assert torch.equal(x_hat, linear.fake_quantize_input(x))


def served_by_kernels():
    return [
        name
        for name, (_, quant, quantizer, _) in CASES.items()
        if quant.activations != "none" and quantizer.symmetric and quantizer.bits <= 4
    ]


def run_triton(layer: Int4Linear, codes, scale, zero_point, weight_scale):
    return int4_linear.int4_linear(
        codes, layer.packed, scale, zero_point, weight_scale, layer.weight_sums, None, None, torch.float32
    )


@pytest.mark.parametrize("name", served_by_kernels())
def test_kernels_give_the_same_codes_and_accumulators(name, artifacts):
    model = read_artifact(artifacts / name)
    for index, site, linear in linears(model)[:4]:
        x = layer_input(linear, index, site).flatten(0, 1)
        codes, scale, zero_point = linear.quantize_input(x)
        if linear.activations == "token":
            groups = x.unflatten(-1, (linear.activation_groups, -1))
            for module in (reference, act_quant):
                if linear.activation_groups > 1:
                    centered, found = module.quantize_groups(groups, linear.activation_bits)
                    assert torch.equal(centered, codes.view_as(groups) - zero_point[..., None])
                    assert torch.equal(found, scale)
                    continue
                found = module.quantize_activation_per_token(x, linear.activation_bits)
                assert all(torch.equal(a, b) for a, b in zip(found, (codes, scale, zero_point.float()), strict=True))
        else:
            for module in (reference, act_quant):
                found = module.quantize_activation(x, scale, zero_point.float(), linear.activation_bits)
                assert torch.equal(found, codes)
        layer = to_int4(linear)
        assert torch.equal(grid.unpack_int4(layer.packed, linear.in_features), linear.codes)
        exact = codes.long() @ linear.codes.long().T
        assert torch.equal(reference.integer_matmul(codes, linear.codes).long(), exact)
        # Unit scales and no zero point leave the bare sum of the groups' integers, exact in float32 below 2^24.
        ones = torch.ones_like(layer.weight_scale)
        if linear.activation_groups > 1:
            y = torch.empty(len(codes), layer.out_features)
            rest = (None, ones, None, None, None, y)
            int4_grouped.int4_grouped_linear(codes, layer.packed, torch.ones_like(scale), *rest)
        else:
            y = run_triton(layer, codes, torch.ones(1), torch.zeros(1), ones)
        assert torch.equal(y.long(), exact)


@pytest.mark.parametrize("name", served_by_kernels())
def test_integer_layer_is_within_the_rounding_of_a_float32_sum(name, artifacts):
    """|fl(Σ x̂ ŵ) − Σ x̂ ŵ| ≤ γ Σ |x̂ ŵ| with γ = K·u, u = 2⁻²⁴ (Higham, Accuracy and Stability, section 3.1).

    x̂ and ŵ are themselves rounded products (one u each), the integer layer's epilogue rounds about four times, and
    sums over G groups; the two differ by no more than (K + G + 8)·u Σ |x̂ ŵ| + 2u |b|. Its epilogue forms
    acc − z Σw from exact integers, so no cancellation enters.
    """
    model = read_artifact(artifacts / name)
    for index, site, linear in linears(model):
        x = layer_input(linear, index, site)
        x_hat = linear.fake_quantize_input(x).double()
        terms = x_hat.abs() @ linear.dequantized_weight().double().abs().T
        bias = 0.0 if linear.bias is None else linear.bias.double().abs()
        bound = 2.0**-24 * ((linear.in_features + linear.weight_scale.shape[1] + 8) * terms + 2 * (terms + bias))
        assert ((to_int4(linear)(x).double() - linear(x).double()).abs() <= bound).all()


def test_real_zero_points_run_on_the_integer_path_too():
    """No format holds a fractional zero point, but codes are equal and the kernels' epilogue takes it."""
    quant = QuantConfig(zero_point="real")
    for style in ("neox", "llama"):
        layer = small_decoder(style, quant).blocks[0].mlp_in
        weight = RTN().quantize_weight(layer.weight.data, None)
        layer.weight.data = grid.dequantize(weight.codes, weight.scale, 0.0)
        clips = layer.input_quantizer
        scale, zero_point = grid.grid_from_clips(clips.low.data, clips.high.data, 4, integer_zero_point=False)
        assert zero_point.item() != round(zero_point.item())
        x = 1.5 * torch.randn(40, layer.in_features, generator=torch.Generator().manual_seed(0))
        codes = grid.quantize(x, scale, zero_point, 4)
        assert torch.equal(clips(x), grid.dequantize(codes, scale, zero_point))
        for module in (reference, act_quant):
            assert torch.equal(module.quantize_activation(x, scale, zero_point, 4), codes)
        integer = Int4Linear(weight.codes, weight.scale, layer.bias, scale, zero_point)
        torch.testing.assert_close(integer(x), layer(x), rtol=0, atol=2e-5)  # 36 terms below 3, 40 u each
