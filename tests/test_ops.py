"""The operators and the module: operator checks, compile, agreement with fake quantization, errors."""

import pytest
import torch
from lit_actreg_kernels import grid, ops, reference
from lit_actreg_kernels.module import Int4Linear
from torch.nn import functional

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GRID = (torch.tensor([0.25], device=DEVICE), torch.tensor([-1.0], device=DEVICE))


def linear_arguments(m=4, n=6, k=32, groups=1):
    codes = torch.randint(-8, 8, (n, k), dtype=torch.int8, device=DEVICE)
    weight_scale = torch.rand(n, groups, device=DEVICE) + 0.1
    x = torch.randn(m, k, device=DEVICE)
    return x, grid.pack_int4(codes), weight_scale, reference.weight_sums(codes, groups), torch.randn(n, device=DEVICE)


def samples():
    x, packed, weight_scale, weight_sums, bias = linear_arguments()
    codes = reference.quantize_activation(x, *GRID, 4)
    weight = torch.ones(32, device=DEVICE)
    return {
        "quantize_activation": (x, *GRID, 4),
        "quantize_activation_per_token": (x, 4),
        "norm_quantize": (x, weight, None, 1e-5, True, *GRID, 4),
        "gelu_quantize": (x, *GRID, 4),
        "swiglu_quantize": (x, *GRID, 4),
        "int4_linear": (codes, packed, *GRID, weight_scale, weight_sums, bias, None, torch.bfloat16),
        "token_grouped_int4_linear": (x, 4, 4, packed, weight_scale, bias, None),
        "quantized_int4_linear": (x, packed, *GRID, 4, weight_scale, weight_sums, None, None),
    }


@pytest.mark.parametrize("name", list(samples()))
def test_opcheck(name):
    # No autograd registration: the operators serve inference.
    utilities = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(getattr(ops, name), samples()[name], test_utils=utilities)


def fake_quantized(x, codes, weight_scale, scale, zero_point, act_bits):
    """What a fake-quantized model computes in float64, where the grouping of roundings does not matter."""
    x_hat = grid.dequantize(grid.quantize(x, scale, zero_point, act_bits), scale, zero_point).double()
    weight = codes.double() * weight_scale.double().repeat_interleave(codes.shape[1] // weight_scale.shape[1], 1)
    return x_hat @ weight.T


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("act_bits", [4, 8])
def test_module_agrees_with_fake_quantization(groups, static, dtype, act_bits):
    codes = torch.randint(-8, 8, (24, 72), dtype=torch.int8, device=DEVICE)
    weight_scale = torch.rand(24, groups, device=DEVICE) / 50
    bias = torch.randn(24, device=DEVICE)
    scale, zero_point = (torch.tensor([0.3], device=DEVICE), torch.tensor([1.4], device=DEVICE))
    layer = Int4Linear(codes, weight_scale, bias, *((scale, zero_point) if static else ()), act_bits=act_bits)
    x = torch.randn(2, 5, 72, device=DEVICE).to(dtype)
    residual = torch.randn(2, 5, 24, device=DEVICE).to(dtype)
    if not static:
        _, scale, zero_point = reference.quantize_activation_per_token(x.cpu(), act_bits)
        scale, zero_point = scale.to(DEVICE), zero_point.to(DEVICE)
    expected = fake_quantized(x, codes, weight_scale, scale, zero_point, act_bits) + bias + residual
    y = layer(x, residual)
    assert y.dtype == dtype
    # float32 arithmetic of about ten roundings on terms up to about 100, then one rounding to dtype.
    rtol = torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), expected, rtol=rtol, atol=1e-4)


@pytest.mark.parametrize(("act_groups", "weight_groups"), [(3, 1), (6, 3), (3, 6), (9, 9)])
@pytest.mark.parametrize("tokens", [1, 5])
def test_module_with_groups_of_a_token(act_groups, weight_groups, tokens):
    codes = torch.randint(-8, 8, (24, 72), dtype=torch.int8, device=DEVICE)
    weight_scale = torch.rand(24, weight_groups, device=DEVICE) / 50
    layer = Int4Linear(codes, weight_scale, act_groups=act_groups)
    x = torch.randn(tokens, 72, device=DEVICE)
    groups = x.unflatten(1, (act_groups, -1))
    x_hat = grid.dequantize(grid.quantize(groups, *(g := grid.grid_per_token(groups, 4)), 4), *g).flatten(1)
    w_hat = codes.double().unflatten(1, (weight_groups, -1)) * weight_scale[..., None]
    torch.testing.assert_close(layer(x).double(), x_hat.double() @ w_hat.flatten(1).T, rtol=1e-5, atol=1e-5)


def test_module_compiles_whole_and_keeps_its_buffers():
    codes = torch.randint(-8, 8, (16, 40), dtype=torch.int8)
    layer = Int4Linear(codes, torch.rand(16, 1), None, torch.tensor([0.3]), torch.tensor([1.0])).to(DEVICE)
    layer = layer.to(torch.bfloat16)
    assert layer.weight_scale.dtype == torch.float32
    x = torch.randn(3, 40, device=DEVICE)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))


def test_module_round_trips_its_state():
    codes = torch.randint(-8, 8, (16, 40), dtype=torch.int8)
    first = Int4Linear(codes, torch.rand(16, 1), torch.randn(16))
    second = Int4Linear(torch.zeros_like(codes), torch.ones(16, 1), torch.zeros(16))
    second.load_state_dict(first.state_dict())
    x = torch.randn(2, 40)
    assert torch.equal(first(x), second(x))


def test_codes_from_a_fused_norm_give_the_same_output():
    codes = torch.randint(-8, 8, (16, 40), dtype=torch.int8, device=DEVICE)
    layer = Int4Linear(codes, torch.rand(16, 1, device=DEVICE), None, *GRID)
    x, weight = torch.randn(3, 40, device=DEVICE), torch.ones(40, device=DEVICE)
    fused = ops.norm_quantize(x, weight, None, 1e-5, True, *GRID, 4)
    plain = functional.rms_norm(x, (40,), weight, 1e-5)
    assert torch.equal(fused, ops.quantize_activation(plain, *GRID, 4))
    assert torch.equal(layer.forward_codes(fused, torch.float32), layer(plain))


def test_large_sums_are_exact_in_the_reference():
    k = 20000  # beyond what float32 holds: 1024 · k > 2^24
    codes, weight = torch.full((1, k), 127, dtype=torch.int8), torch.full((1, k), 7, dtype=torch.int8)
    codes[0, 0] = 126
    assert reference.integer_matmul(codes, weight).item() == 127 * 7 * k - 7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codes": torch.zeros(4, 4)}, "pass int8"),
        ({"weight_bits": 8}, "weight bits 8"),
        ({"weight_bits": 3}, "leave the range -4..3"),
        ({"act_bits": 9}, "activation bits 9"),
        ({"act_scale": torch.ones(1)}, "pass both or neither"),
        ({"weight_scale": torch.ones(4)}, r"pass \[4, G\]"),
        ({"weight_scale": torch.ones(4, 3)}, "divisible by 3 groups"),
        ({"act_groups": 3}, "must divide K"),
        ({"act_groups": 0}, "must divide K"),
        ({"act_groups": 2, "act_bits": 8}, "up to 7 bits"),
        ({"act_groups": 2, "act_scale": torch.ones(1), "act_zero_point": torch.ones(1)}, "their grids be dynamic"),
    ],
)
def test_module_refuses(change, message):
    good = {"codes": torch.full((4, 8), 7, dtype=torch.int8), "weight_scale": torch.ones(4, 1)}
    with pytest.raises(ValueError, match=message):
        Int4Linear(**(good | change))


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (0, torch.zeros(4, 32, device=DEVICE), "quantize the activations"),
        (0, torch.zeros(4, 70, dtype=torch.int8, device=DEVICE), "70 input columns"),
        (1, torch.zeros(6, 16, dtype=torch.int8, device=DEVICE), "packed is torch.int8"),
        (2, torch.ones(2, device=DEVICE), "act_scale has shape"),
        (4, torch.ones(6, 2, device=DEVICE), "must be"),
        (6, torch.ones(5, device=DEVICE), "bias must have shape"),
        (7, torch.ones(6, 4, device=DEVICE), "residual must have"),
        (8, torch.float64, "out_dtype"),
        (4, torch.ones(6, 5, device=DEVICE), "5 groups of weights"),
        (4, torch.ones(6, 1, device=DEVICE).expand(6, 2), "contiguous"),
    ],
)
def test_int4_linear_refuses(index, value, message):
    arguments = list(samples()["int4_linear"])
    arguments[index] = value
    with pytest.raises(ValueError, match=message):
        ops.int4_linear(*arguments)


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (0, torch.zeros(4, 32, dtype=torch.int8, device=DEVICE), "cast it"),
        (1, 1, "one group"),
        (1, 5, "5 of activations"),
        (2, 8, "choose 2 to 7"),
        (3, torch.zeros(6, 18, dtype=torch.uint8, device=DEVICE), "pad the weights"),
        (4, torch.ones(6, 3, device=DEVICE), "3 groups of weights"),
    ],
)
def test_token_grouped_int4_linear_refuses(index, value, message):
    arguments = list(samples()["token_grouped_int4_linear"])
    arguments[index] = value
    with pytest.raises(ValueError, match=message):
        ops.token_grouped_int4_linear(*arguments)


def test_quantizers_refuse():
    with pytest.raises(ValueError, match="cast it to float32"):
        ops.quantize_activation(torch.zeros(3, dtype=torch.float64, device=DEVICE), *GRID, 4)
    with pytest.raises(ValueError, match="a static grid has one"):
        ops.quantize_activation(torch.zeros(3, device=DEVICE), torch.ones(3, device=DEVICE), GRID[1], 4)
    with pytest.raises(ValueError, match="an even number"):
        ops.swiglu_quantize(torch.zeros(2, 3, device=DEVICE), *GRID, 4)


def test_old_gpu_runs_the_reference_and_says_so_once(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    ops.has_triton_kernels.cache_clear()
    assert not ops.has_triton_kernels(0)
    assert not ops.has_triton_kernels(0)
    ops.has_triton_kernels.cache_clear()
    assert len(caplog.records) == 1
