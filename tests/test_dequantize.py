"""Operands in 16 bits against the grids' definition, and the linears that use them for many tokens."""

import pytest
import torch
from fake_quant_checks import as_stored
from lit_actreg_kernels import act_quant, dequantize, grid, int4_grouped, int4_linear, reference
from test_int4_grouped import DEVICE, grouped_problem
from torch.nn import functional

# K, columns of padding, groups of the weights; P of the last is no multiple of anything
CASES = [(256, 0, 4), (80, 48, 5), (40, 0, 1), (144, 48, 3), (4160, 0, 65), (78, 2, 2)]


def dequantized(tensors, dtype):
    """ŵ [N, K] in PyTorch, rounded as the kernels do it here."""
    scale = tensors["weight_scale"]
    codes = grid.unpack_int4(tensors["packed"], tensors["codes"].shape[1])
    w_hat = (codes.unflatten(1, (scale.shape[1], -1)) * scale[..., None]).flatten(1)
    return as_stored(w_hat.double(), dtype).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("k", "padding", "groups"), CASES)
def test_weight(k, padding, groups, dtype):
    tensors, _ = grouped_problem(3, 33, k, padding, 1, groups)
    w_hat = dequantize.weight(tensors["packed"].to(DEVICE), tensors["weight_scale"].to(DEVICE), k, dtype)
    assert torch.equal(w_hat.cpu(), dequantized(tensors, dtype))


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("k", [78, 4160])
def test_activation(k, per_token):
    tensors, _ = grouped_problem(5, 33, k, 0, 1, 2, per_token)
    codes, scale, zero_point = (tensors[name] for name in ("codes", "act_scale", "act_zero_point"))
    x_hat = dequantize.activation(*(t.to(DEVICE) for t in (codes, scale, zero_point)), torch.bfloat16)
    expected = grid.dequantize(codes, scale, zero_point)
    assert torch.equal(x_hat.cpu().double(), as_stored(expected.double(), torch.bfloat16))


@pytest.fixture
def few_are_many(monkeypatch):
    monkeypatch.setattr(dequantize, "MANY_TOKENS", 70)  # the interpreter is slow


@pytest.mark.parametrize("weight_groups", [1, 2])
def test_groups_of_a_token(few_are_many, weight_groups):
    tensors, _ = grouped_problem(70, 33, 256, 0, 4, weight_groups)
    layer = {name: tensors[name].to(DEVICE) for name in ("packed", "weight_scale", "bias", "residual")}
    x = (torch.randn(70, 256) * 2 + 1).bfloat16().to(DEVICE)
    y = int4_grouped.token_grouped_int4_linear(x, 4, 4, *layer.values())
    x_hat = act_quant.fake_quantize_groups(x.unflatten(1, (4, -1)), 4).flatten(1)
    w_hat, bias = dequantized(tensors, torch.bfloat16).to(DEVICE), layer["bias"].bfloat16()
    expected = (functional.linear(x_hat, w_hat, bias) + layer["residual"]).bfloat16()
    assert torch.equal(y, expected)
    # Against the integers: both operands rounded by half a unit of bfloat16 (the interpreter: a whole one), then twice
    # the result.
    exact = reference.token_grouped_int4_linear(x.cpu().float(), 4, 4, *(t.cpu() for t in layer.values()))
    eps = torch.finfo(torch.bfloat16).eps
    bound = (
        (1 if DEVICE == "cuda" else 2)
        * 1.1
        * eps
        * (x_hat.cpu().float().abs() @ w_hat.cpu().float().abs().T + 2 * exact.abs() + 1)
    )
    assert ((y.cpu().float() - exact).abs() <= bound).all()


@pytest.mark.parametrize("per_token", [False, True])
def test_groups_of_the_weights(few_are_many, per_token):
    tensors, _ = grouped_problem(70, 33, 256, 0, 1, 4, per_token)
    on_device = {name: value.to(DEVICE) for name, value in tensors.items()} | {"bias": None, "residual": None}
    codes, scale, zero_point = (on_device[name] for name in ("codes", "act_scale", "act_zero_point"))
    x_hat = grid.dequantize(codes, scale, zero_point).to(torch.float16)
    expected = functional.linear(x_hat, dequantized(tensors, torch.float16).to(DEVICE))
    y = int4_linear.int4_linear(x=on_device.pop("codes"), **on_device, out_dtype=torch.float16)
    assert torch.equal(y, expected)


def test_float32_and_few_tokens_keep_the_integers():
    assert dequantize.serves(dequantize.MANY_TOKENS, torch.bfloat16)
    assert not dequantize.serves(dequantize.MANY_TOKENS, torch.float32)
    assert not dequantize.serves(dequantize.MANY_TOKENS - 1, torch.bfloat16)
