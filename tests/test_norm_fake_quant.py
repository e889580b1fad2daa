"""The fused residual addition, norm and fake quantizer, against float64 autograd of the three after each other."""

import pytest
import torch
from fake_quant_checks import (
    GRIDS,
    as_stored,
    assert_near,
    assert_sum_near,
    clips,
    doubled,
    few_programs,
    formula,
    poison,
    programs_at_once,
    resources,
)
from lit_actreg_kernels import norm_fake_quant, training_reference
from lit_actreg_kernels.training_ops import NOWHERE
from quantizer_checks import DEVICE, on_device
from torch.nn import functional

from lit_actreg.quant.statistics import token_kurtosis

EPS = 1e-5
LOOKS = (1, 2, 1e-12)  # first, step, ε: tokens 1 and 3 of 5
D_KAPPA = 30.0
# stream, what is added to it, the norm's own output, x̂
TYPES = [
    (torch.float32, torch.bfloat16, torch.float32, torch.bfloat16),  # bfloat16 autocast
    (torch.bfloat16, torch.bfloat16, torch.float32, torch.bfloat16),  # with the stream in bfloat16, too
    (torch.float32, torch.float16, torch.float32, torch.float16),
    (torch.float32, torch.float32, torch.float32, torch.float32),
    (torch.float16, torch.float16, torch.float16, torch.float16),
    (torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.bfloat16),
]


@pytest.mark.parametrize(("x_dtype", "y_dtype", "value_dtype", "out_dtype"), TYPES)
@pytest.mark.parametrize(("bits", "integer", "masked"), GRIDS)
@pytest.mark.parametrize(("rms", "has_bias"), [(False, True), (False, False), (True, False)])
@pytest.mark.parametrize("looks", [NOWHERE, LOOKS])
def test_values_and_gradients(
    monkeypatch, x_dtype, y_dtype, value_dtype, out_dtype, bits, integer, masked, rms, has_bias, looks
):
    torch.manual_seed(0)
    columns = 131
    x = (torch.randn(3, 5, columns) * 2 + 0.5).to(x_dtype)
    y = torch.randn(x.shape).to(y_dtype)
    weight, bias = torch.rand(columns) + 0.5, torch.randn(columns) if has_bias else None
    g, d_new = torch.randn(x.shape).to(out_dtype), torch.randn(x.shape).to(x_dtype)

    leaves = doubled(x, y, weight, bias, *clips())
    wide_x, wide_y, wide_weight, wide_bias, low, high = leaves
    new = as_stored(wide_x + wide_y, x_dtype)
    if rms:
        value = functional.rms_norm(new, (columns,), wide_weight, EPS)
    else:
        value = functional.layer_norm(new, (columns,), wide_weight, wide_bias, EPS)
    expected = formula(as_stored(value, value_dtype), low, high, bits, integer, masked)
    loss = (expected * g.double()).sum() + (new * d_new.double()).sum()
    first, step, _ = looks
    kappa = token_kurtosis(wide_y[:, first::step]) if step else torch.zeros(())
    (loss + D_KAPPA * kappa).backward()

    poison(monkeypatch)
    few_programs(monkeypatch, norm_fake_quant)
    x, y, weight, bias, g, d_new = on_device(x, y, weight, bias, g, d_new)
    found_new, x_hat, statistics, found_kappa, *kept = norm_fake_quant.add_norm_fake_quantize(
        x, y, weight, bias, *clips(), EPS, rms, bits, integer, value_dtype, out_dtype, *looks
    )
    grid, d_kappa = (rms, bits, integer, masked), torch.tensor(D_KAPPA, device=DEVICE)
    dx, dy, parameters, sums = norm_fake_quant.add_norm_fake_quantize_backward(
        g,
        d_new,
        found_new,
        y_dtype,
        statistics,
        weight,
        bias,
        *clips(),
        *grid,
        value_dtype,
        *kept,
        d_kappa,
        first,
        step,
    )
    assert (found_new.dtype, x_hat.dtype, dx.dtype, dy.dtype) == (x_dtype, out_dtype, x_dtype, y_dtype)
    if step:
        torch.testing.assert_close(found_kappa.sum().cpu().double(), kappa.detach(), rtol=1e-5, atol=1e-6)
    elif y_dtype == x_dtype:
        assert not dy.numel()
        dy = dx
    assert_near(found_new, new.detach(), x_dtype)
    # The order of a row's sum is not PyTorch's: a value stored in few bits may be one unit off, and then its code one.
    loose = value_dtype if value_dtype != torch.float32 else out_dtype
    assert_near(x_hat, expected.detach(), loose)
    assert_near(dx, wide_x.grad, x_dtype, roundings=16)
    assert_near(dy, wide_y.grad, y_dtype, roundings=16)
    assert_near(parameters[0].sum(0), wide_weight.grad, value_dtype, roundings=16)
    if bias is not None:
        assert_near(parameters[1].sum(0), wide_bias.grad, value_dtype, roundings=16)
    for found, clip in zip(sums.sum(1), (low, high), strict=True):
        assert_sum_near(found, clip.grad, g.cpu(), value_dtype, bits)


@pytest.mark.parametrize("columns", [1, 3, 8, 9])
def test_rows_of_few_columns(columns):
    torch.manual_seed(0)
    x, y, g, d_new = torch.randn(4, 3, 5, columns)
    weight, bias, d_kappa = torch.rand(columns) + 0.5, torch.randn(columns), torch.tensor(D_KAPPA)

    def both_ways(module, *tensors):
        x, y, g, d_new, weight, bias, d_kappa, *ends = tensors
        grid, dtype = (False, 4, True), torch.float32
        norm = (weight, bias, *ends)
        new, x_hat, statistics, _, *kept = module.add_norm_fake_quantize(x, y, *norm, EPS, *grid, dtype, dtype, *LOOKS)
        rest = (*norm, *grid, True, dtype, *kept, d_kappa, *LOOKS[:2])
        dx, dy, *sums = module.add_norm_fake_quantize_backward(g, d_new, new, dtype, statistics, *rest)
        return x_hat, dx, dy, *(s.sum(1) for s in sums)

    tensors = (x, y, g, d_new, weight, bias, d_kappa)
    expected = both_ways(training_reference, *tensors, *clips(device="cpu"))
    found = both_ways(norm_fake_quant, *on_device(*tensors), *clips())
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(b.cpu(), a, rtol=1e-4, atol=1e-4)


def backward_of(num_rows: int, num_columns: int) -> list[tuple[torch.Tensor, ...]]:
    """The backward pass of random rows, with kurtosis, twice: dx, dy and the programs' shares of the sums."""
    x, y, g, d_new = torch.randn(4, num_rows, num_columns, device=DEVICE)
    weight = torch.ones(num_columns, device=DEVICE)
    new, _, statistics, _, *kept = norm_fake_quant.add_norm_fake_quantize(
        x, y, weight, None, *clips(), EPS, False, 4, True, torch.float32, torch.float32, *LOOKS
    )
    looks = (*kept, torch.ones((), device=DEVICE), *LOOKS[:2])
    rest = (torch.float32, statistics, weight, None, *clips(), False, 4, True, True, torch.float32, *looks)
    return [norm_fake_quant.add_norm_fake_quantize_backward(g, d_new, new, *rest) for _ in range(2)]


def test_sums_do_not_depend_on_the_run():
    first, second = backward_of(50, 96)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(("num_columns", "programs"), [(64, 12), (4096, 8), (16384, 4)])
def test_shares_are_of_no_more_programs_than_fit_a_multiprocessor(monkeypatch, num_columns, programs):
    """It has room for 64 warps; every program more is a share of dw and db more, 2 K numbers."""
    monkeypatch.setattr(norm_fake_quant, "programs_for", lambda _, per_processor: per_processor)
    *_, parameters, _ = backward_of(8, num_columns)[0]
    assert parameters.shape == (2, programs, num_columns)


GRID = {"Q_MIN": -8, "Q_MAX": 7, "INTEGER": True, "MASKED": True, "VALUE_DTYPE": "float32", "DY": True}


def types_of(stream: str) -> dict[str, str]:
    narrow, wide = ["g_ptr", "rows_ptr", "dy_ptr"], ["new_ptr", "d_new_ptr", "dx_ptr"]
    types = dict.fromkeys(narrow, "*bf16") | dict.fromkeys(wide, stream)
    return types | dict.fromkeys(["num_rows", "num_looked_at", "K", "T"], "i32")


def test_registers_leave_room_for_programs_of_the_backward_pass(tmp_path):
    """At once, of rows of 1,024. With clips' sums for every element a bfloat16 stream has room for four."""
    module = norm_fake_quant
    grid = GRID | {"BLOCK_K": 1024, "STAGES": 3}
    looks = [{"FIRST": step // 2, "STEP": step} for step in (0, 4)]
    variants = [grid | look | {"RMS": rms, "HAS_BIAS": not rms} for look in looks for rms in (False, True)]
    for stream, wanted in (("*fp32", 4), ("*bf16", 5)):
        found = programs_at_once("norm_fake_quant", types_of(stream), variants, module._num_warps(1024), tmp_path)
        assert min(found) >= wanted, (stream, found)


@pytest.mark.parametrize("block", [2048, 4096, 8192, 16384])
def test_shared_memory_of_every_gpu_suffices_for_long_rows(tmp_path, block):
    """LayerNorm with kurtosis, which needs most; the smallest a GPU of sm_80 or later has is 99 KiB."""
    for stream, row_bytes in (("*fp32", 12), ("*bf16", 8)):
        variant = GRID | {"BLOCK_K": block, "STAGES": norm_fake_quant._num_stages(row_bytes * block)}
        variant |= {"RMS": False, "HAS_BIAS": True, "FIRST": 2, "STEP": 4}
        num_warps = norm_fake_quant._num_warps(block)
        ((_, shared),) = resources("norm_fake_quant", types_of(stream), [variant], num_warps, tmp_path)
        assert shared <= 101376, (stream, shared)
