"""Norm, linear and non-linearity in one operator against plain PyTorch: in the interpreter without a GPU."""

import pytest
import torch
from lit_actreg_kernels import gelu_quant, grid, int4_gemv, int4_linear, norm_int4_linear, norm_quant, ops, reference
from lit_actreg_kernels.int4_gemv import GemvTile
from lit_actreg_kernels.module import Int4Linear
from quantizer_checks import DEVICE, DTYPES, static_grid
from torch import nn


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fills every torch.empty with NaN or the largest integer: what a kernel fails to write is seen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def arguments(num_tokens, num_outputs, num_columns, rms, activation, dtype):
    torch.manual_seed(0)
    x = (torch.randn(num_tokens, num_columns) * 2 + 1).to(dtype)
    norm = (torch.rand(num_columns) + 0.5).to(dtype), None if rms else torch.randn(num_columns).to(dtype) / 4
    codes = torch.randint(-8, 8, (num_outputs, num_columns), dtype=torch.int8)
    packed = grid.pack_int4(nn.functional.pad(codes, (0, -num_columns % 128)))
    weight = torch.rand(num_outputs, 1) / 20 + 0.01, reference.weight_sums(codes, 1), torch.randn(num_outputs)
    into = (activation, *(static_grid(0.21, -5.0) if activation else (None, None)), 4)
    return (x, *norm, 1e-5, rms, packed, *static_grid(0.3, -1.25), 4, *weight, *into)


def on_device(values):
    return [value.to(DEVICE) if isinstance(value, torch.Tensor) else value for value in values]


def separately(x, norm_weight, norm_bias, eps, rms, packed, scale, zero_point, bits, *rest):
    """The same by the kernels of norm, linear and activation, which have tests of their own."""
    *weight, activation, out_scale, out_zero_point, out_bits = rest
    codes = norm_quant.norm_quantize(x, norm_weight, norm_bias, eps, rms, scale, zero_point, bits)
    y = int4_linear.int4_linear(codes, packed, scale, zero_point, *weight, None, x.dtype)
    if not activation:
        return y
    quantize = {"gelu": gelu_quant.gelu_quantize, "swiglu": gelu_quant.swiglu_quantize}[activation]
    return quantize(y, out_scale, out_zero_point, out_bits)


@pytest.mark.parametrize("shape", [(1, 40, 300), (1, 66, 128), (3, 40, 128)])
@pytest.mark.parametrize("rms", [True, False])
@pytest.mark.parametrize("activation", ["", "gelu", "swiglu"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_kernel_is_the_separate_ones(shape, rms, activation, dtype):
    inputs = on_device(arguments(*shape, rms, activation, dtype))
    found, expected = norm_int4_linear.norm_int4_linear(*inputs), separately(*inputs)
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert expected.unique().numel() > 4
    # A last bit of the norm may move one of the token's codes to its neighbour, and with it all outputs a little.
    assert torch.corrcoef(torch.stack([found.flatten(), expected.flatten()]).double())[0, 1] > 0.999
    if activation:
        assert (found != expected).float().mean() <= 0.05


@pytest.mark.parametrize("activation", ["", "gelu", "swiglu"])
@pytest.mark.parametrize("block_n", [1, 2, 16])
def test_tiles_agree(activation, block_n, monkeypatch):
    inputs = on_device(arguments(1, 66, 300, False, activation, torch.bfloat16))
    expected = norm_int4_linear.norm_int4_linear(*inputs)
    monkeypatch.setattr(int4_gemv, "choose_gemv_tile", lambda *_: GemvTile(block_n, 4))
    assert torch.equal(norm_int4_linear.norm_int4_linear(*inputs), expected)


@pytest.mark.parametrize("activation", ["", "gelu", "swiglu"])
def test_opcheck(activation):
    utilities = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    inputs = arguments(2, 40, 64, False, activation, torch.float32)
    torch.library.opcheck(ops.norm_int4_linear, on_device(inputs), test_utils=utilities)


def test_module_is_its_parts():
    codes = torch.randint(-8, 8, (16, 40), dtype=torch.int8)
    layer = Int4Linear(codes, torch.rand(16, 1) / 20, None, *static_grid(0.3, 1.0)).to(DEVICE)
    into = Int4Linear(codes[:, :16], torch.rand(16, 1), None, *static_grid(0.1, -6.0)).to(DEVICE)
    norm, x = nn.LayerNorm(40).to(DEVICE), torch.randn(2, 3, 40, device=DEVICE)
    with torch.no_grad():
        grids = [[value.to(DEVICE) for value in static_grid(*grid)] for grid in ((0.3, 1.0), (0.1, -6.0))]
        quantized = ops.norm_quantize(x, norm.weight, norm.bias, norm.eps, False, *grids[0], 4)
        y = layer.forward_codes(quantized, x.dtype)
        assert torch.equal(layer.forward_norm(x, norm), y)
        assert torch.equal(layer.forward_norm(x, norm, "gelu", into), ops.gelu_quantize(y, *grids[1], 4))


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (12, "relu", "choose"),
        (13, None, "out_scale"),
        (1, torch.ones(3), "columns"),
        (0, torch.ones(2, 200), "columns"),
    ],
)
def test_refuses(index, value, message):
    inputs = list(arguments(2, 40, 64, False, "gelu", torch.float32))
    inputs[index] = value
    with pytest.raises(ValueError, match=message):
        ops.norm_int4_linear(*inputs)
