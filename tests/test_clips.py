"""Clips are where the method says, whatever the number of inputs; a known lower bound is kept."""

import pytest
import torch

from lit_actreg.quant import clips
from lit_actreg.quant.clips import MAX_SAMPLES, initial_clips

METHODS = ("constant", "minmax", "quantile", "mse")


def inputs(num_tokens: int = 50, num_channels: int = 40) -> torch.Tensor:
    return torch.randn(num_tokens, num_channels, generator=torch.Generator().manual_seed(0)) + 0.3


def test_constant_and_extremes():
    x = inputs()
    assert initial_clips(x, "constant", constant=2.5) == (-2.5, 2.5)
    assert initial_clips(x, "minmax") == (min(x.flatten().tolist()), max(x.flatten().tolist()))


@pytest.mark.parametrize("tail", [0.0, 1e-3, 0.01, 0.25])
def test_quantiles_leave_their_share_outside_on_either_side(tail):
    x = inputs()
    low, high = initial_clips(x, "quantile", tail=tail)
    num = int(tail * x.numel())
    assert (x < low).sum() == (x > high).sum() == num
    assert low in x
    assert high in x


def squared_error(x: torch.Tensor, low: float, high: float, bits: int, integer: bool) -> float:
    """Of the grid that spans the clips, in float64 by the paper's unsigned codes."""
    top = 2**bits - 1
    low, high = (min(low, 0.0), max(high, 0.0)) if integer else (low, high)
    scale = (high - low) / top
    zero = -low / scale
    zero = round(zero) if integer else zero
    codes = (x.double() / scale + zero).round().clamp(0, top)
    return ((codes - zero) * scale - x).square().mean().item()


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("integer", [True, False])
@pytest.mark.parametrize("bound", [None, -0.17])
def test_least_squared_error_of_forty_ranges(bits, integer, bound):
    x = inputs() if bound is None else torch.nn.functional.gelu(inputs())
    x[3, 5] = 30.0  # so that the best range is not the whole
    low, high = (clip.item() for clip in initial_clips(x, "mse", bits, integer, bound))
    least, smallest, largest = float("inf"), x.min().item(), x.max().item()
    for i in range(40):
        share = 0.05 + 0.95 * i / 39
        lowest = smallest * share if bound is None else bound
        least = min(least, squared_error(x, lowest, largest * share, bits, integer))
    # not the same argmin: neighbours may be as good to float32
    assert squared_error(x, low, high, bits, integer) == pytest.approx(least, rel=1e-4)
    assert bits == 8 or high < 0.9 * largest


@pytest.mark.parametrize("method", METHODS)
def test_a_known_lower_bound_is_kept(method):
    low, high = initial_clips(inputs(), method, lower_bound=-0.17)
    assert low.item() == pytest.approx(-0.17)
    assert low.shape == high.shape == (1,)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("method", METHODS)
def test_clips_are_float32_and_ordered(method, dtype):
    low, high = initial_clips(inputs().to(dtype), method)
    assert low.dtype == high.dtype == torch.float32
    assert low < 0 < high


@pytest.mark.parametrize("num_channels", [64, 48, 33])
def test_every_channel_is_looked_at_in_large_inputs(num_channels):
    num_tokens = 8 * MAX_SAMPLES // num_channels
    for channel in range(num_channels):
        x = torch.zeros(num_tokens, num_channels)
        x[:, channel] = 1.0
        assert initial_clips(x, "minmax")[1].item() == 1.0, channel


def test_no_more_values_are_looked_at_than_said(monkeypatch):
    monkeypatch.setattr(clips, "MAX_SAMPLES", 10)
    x = torch.arange(19.0).where(torch.arange(19) % 2 == 0, 100.0)
    assert initial_clips(x, "minmax")[1] == 18
    assert initial_clips(x[:10], "minmax")[1] == 100
