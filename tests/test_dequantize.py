"""Operands in 16 bits against the grids' definition, and the linears that use them for many tokens."""

import pytest
import torch
from fake_quant_checks import as_stored
from lit_actreg_kernels import act_quant, dequantize, grid, int4_grouped, int4_linear, reference
from lit_actreg_kernels.module import Int4Linear
from test_int4_grouped import DEVICE, grouped_problem

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


@pytest.mark.parametrize(("per_token", "zero_point"), [(False, None), (True, None), (False, 3.37), (False, -90.0)])
@pytest.mark.parametrize("k", [78, 4160])
def test_activation(k, per_token, zero_point):
    tensors, _ = grouped_problem(5, 33, k, 0, 1, 2, per_token)
    codes, scale = tensors["codes"], tensors["act_scale"]
    if zero_point is None:
        zero_point = tensors["act_zero_point"]
    else:  # a real one, and one of 8 bits
        codes, zero_point = torch.randint(-128, 128, (5, k), dtype=torch.int8), torch.tensor([zero_point])
    x_hat = dequantize.activation(*(t.to(DEVICE) for t in (codes, scale, zero_point)), torch.bfloat16)
    expected = grid.dequantize(codes, scale, zero_point)
    assert torch.equal(x_hat.cpu().double(), as_stored(expected.double(), torch.bfloat16))


@pytest.fixture
def few_are_many(monkeypatch):
    monkeypatch.setattr(dequantize, "MANY_TOKENS", 70)  # the interpreter is slow


@pytest.mark.parametrize("added", [("bias", "residual"), ("residual",), ("bias",), ()])
@pytest.mark.parametrize(("k", "padding", "weight_groups"), [(256, 0, 1), (256, 0, 2), (256, 0, 8), (32, 64, 1)])
def test_groups_of_a_token(few_are_many, k, padding, weight_groups, added):
    tensors, _ = grouped_problem(70, 33, k, padding, 4, weight_groups)
    layer = {name: tensors[name].to(DEVICE) for name in ("packed", "weight_scale")}
    layer |= {name: tensors[name].bfloat16().to(DEVICE) if name in added else None for name in ("bias", "residual")}
    x = (torch.randn(70, k) * 2 + 1).bfloat16().to(DEVICE)
    with torch.autocast(DEVICE, torch.float16):  # changes nothing
        y = int4_grouped.token_grouped_int4_linear(x, 4, 4, *layer.values())
    x_hat = act_quant.fake_quantize_groups(x.unflatten(1, (4, -1)), 4).flatten(1)
    w_hat, terms = dequantized(tensors, torch.bfloat16).to(DEVICE), [layer[name] for name in added]
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, torch.addmm(sum(terms), x_hat, w_hat.T) if terms else x_hat @ w_hat.T)
    # Against the integers: both operands rounded by half a unit of bfloat16 (the interpreter: a whole one), then what
    # is added, and the result.
    wide = [None if t is None else t.cpu() if name == "packed" else t.cpu().float() for name, t in layer.items()]
    exact = reference.token_grouped_int4_linear(x.cpu().float(), 4, 4, *wide)
    eps = torch.finfo(torch.bfloat16).eps
    bound = (1 if DEVICE == "cuda" else 2) * 1.1 * eps * (x_hat.cpu().float().abs() @ w_hat.cpu().float().abs().T)
    bound += eps * (exact.abs() + sum(t.cpu().float().abs() for t in terms) + 1)
    assert ((y.cpu().float() - exact).abs() <= bound).all()


@pytest.mark.parametrize("per_token", [False, True])
def test_groups_of_the_weights(few_are_many, per_token):
    tensors, _ = grouped_problem(70, 33, 256, 0, 1, 4, per_token)
    on_device = {name: value.to(DEVICE) for name, value in tensors.items()} | {"bias": None, "residual": None}
    x_hat = grid.dequantize(*(on_device[name] for name in ("codes", "act_scale", "act_zero_point"))).to(torch.float16)
    y = int4_linear.int4_linear(on_device.pop("codes"), **on_device, out_dtype=torch.float16)
    assert torch.equal(y, x_hat @ dequantized(tensors, torch.float16).to(DEVICE).T)


@pytest.mark.gpu
def test_a_layer_with_groups_of_many_tokens(few_are_many):
    tensors, _ = grouped_problem(70, 33, 256, 0, 1, 4)
    codes = grid.unpack_int4(tensors["packed"], 256)
    static = {"act_scale": tensors["act_scale"], "act_zero_point": tensors["act_zero_point"]}
    x = torch.randn(2, 35, 256, dtype=torch.bfloat16, device=DEVICE)
    for given in (static, {"act_groups": 4}):
        layer = Int4Linear(codes, tensors["weight_scale"], tensors["bias"], **given).to(DEVICE)
        y, wide = layer(x), layer(x.float())  # float32 keeps the integers
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.float(), wide, rtol=0.02, atol=0.02 * float(wide.std()))


def test_only_many_tokens_small_groups_and_16_bits():
    many, most = dequantize.MANY_TOKENS, dequantize.MOST_COLUMNS
    assert dequantize.serves(many, most, torch.bfloat16)
    assert not dequantize.serves(many, most, torch.float32)
    assert not dequantize.serves(many - 1, most, torch.bfloat16)
    assert not dequantize.serves(many, most + 1, torch.bfloat16)
