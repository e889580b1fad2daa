"""GPTQ's loop in Triton against plain PyTorch: in the interpreter without a GPU, compiled with one."""

import pytest
import torch
from lit_actreg_kernels import gptq_columns, ops, reference
from lit_actreg_plugins.gptq import GPTQ
from quantizer_checks import DEVICE, on_device, upward

from lit_actreg.quant.weight_grid import dequantize_weight, relative_layer_error, weight_grid


def problem(num_columns, num_rows, num_groups, symmetric):
    """A block as GPTQ meets it: part of a larger factor, and columns whose groups are in disorder."""
    generator = torch.Generator().manual_seed(num_columns)
    size = num_columns + 5
    inputs = torch.randn(500, size, generator=generator) @ torch.randn(size, size, generator=generator)
    hessian = (inputs.T @ inputs / 500).double()
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True).float()
    weight = torch.randn(num_columns, num_rows, generator=generator)
    scale, zero_point = weight_grid(weight.T.unflatten(1, (num_groups, -1)), 4, symmetric, "minmax")
    group = torch.randint(num_groups, (num_columns,), generator=generator)
    scale = 1.01 * scale  # a symmetric min-max grid has its lowest weight on the edge between two codes
    return weight, factor[2 : 2 + num_columns, 2 : 2 + num_columns].contiguous(), scale, zero_point, group, 4


@pytest.mark.parametrize(("num_columns", "num_rows", "num_groups"), [(128, 24, 1), (60, 13, 3), (7, 1, 7), (1, 9, 1)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_equals_the_reference(num_columns, num_rows, num_groups, symmetric):
    w, factor, *rest, bits = problem(num_columns, num_rows, num_groups, symmetric)
    expected_codes, expected_errors = reference.gptq_columns(w, factor, *rest, bits)
    codes, errors = gptq_columns.gptq_columns(*on_device(w, factor, *rest), bits)
    # One rounding instead of two moves a weight by 2⁻²⁴ of itself; only one on an edge between codes can notice.
    same_N = (codes.cpu() == expected_codes).all(0)
    assert same_N.float().mean() > 0.9
    atol = 1e-4 * float(expected_errors.abs().max())
    torch.testing.assert_close(errors.cpu()[:, same_N], expected_errors[:, same_N], rtol=1e-4, atol=atol)


def test_what_the_operator_refuses():
    w, factor, *rest = (
        value.to(DEVICE) if isinstance(value, torch.Tensor) else value for value in problem(8, 4, 1, True)
    )
    with pytest.raises(ValueError, match=r"factor has shape \[7, 7\]: w has 8 rows"):
        ops.gptq_columns(w, factor[1:, 1:], *rest)
    with pytest.raises(ValueError, match="a block of 257 columns: 1 to 256 are taken"):
        ops.gptq_columns(w[:1].expand(257, 4), factor, *rest)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("group_size", "ordered", "symmetric"),
    # grids chosen on the way, of columns already moved, cannot be kept off the edge that `upward` speaks of
    [(None, True, True), (None, False, True), (64, True, True), (64, False, False)],
)
def test_gptq_on_a_gpu_is_gptq_on_a_cpu(group_size, ordered, symmetric):
    """Last bits differ (a GPU's division by a number is a product): another code here and there, no other error."""
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(2000, 320, generator=generator) @ torch.randn(320, 320, generator=generator).triu()
    hessian, weight = inputs.T @ inputs / 2000, upward(torch.randn(72, 320, generator=generator), 64)
    quantizer = GPTQ(group_size=group_size, activation_order=ordered, symmetric=symmetric)
    expected, found = quantizer.quantize_weight(weight, hessian), quantizer.quantize_weight(*on_device(weight, hessian))
    assert (found.codes.cpu() != expected.codes).float().mean() < 0.005
    dequantized = [dequantize_weight(r.codes, r.scale, r.zero_point).cpu() for r in (expected, found)]
    errors = [relative_layer_error(weight, w_hat, hessian) for w_hat in dequantized]
    assert errors[1] == pytest.approx(errors[0], rel=1e-3)
