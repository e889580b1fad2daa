"""The fake-quantizer's gradients: against the table of its docstring, finite differences, and itself compiled."""

import pytest
import torch
from lit_actreg_kernels.grid import code_range, dequantize, grid_from_clips, quantize

from lit_actreg.quant.fake_quant import fake_quantize, fake_quantize_per_token

CLIPS = (-1.7, 2.3)


def inputs(dtype=torch.float64, num=4096):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num, dtype=torch.float64, generator=generator).mul(1.5).to(dtype)
    g = torch.randn(num, dtype=torch.float64, generator=generator).to(dtype)
    clip_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    low, high = (torch.tensor([c], dtype=clip_dtype, requires_grad=True) for c in CLIPS)
    return x.requires_grad_(), low, high, g


def gradients_by_the_table(x, low, high, g, bits, integer, outside):
    """The three rows of the docstring, literally: u in the dtype of the clips (it decides ties), sums in float64."""
    q_min, q_max = code_range(bits)
    x, low, high, g = x.detach().to(low.dtype), low.detach(), high.detach(), g.double()
    scale, zero_point = grid_from_clips(low, high, bits, integer)
    u = (x / scale + zero_point).double()
    above, below = x >= (q_max - zero_point) * scale, x <= (q_min - zero_point) * scale
    between = ~(above | below)
    delta = (u - u.round()) / (q_max - q_min)
    dx = g if outside == "passed" else g * between
    d_high = (g * above).sum() - (delta * g * between).sum()
    d_low = (g * below).sum() + (delta * g * between).sum()
    return dx, d_low.reshape(1), d_high.reshape(1)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("integer", [True, False])
@pytest.mark.parametrize("outside", ["masked", "passed"])
# The clip gradients are sums of 4096 terms; in 16-bit types each term carries the input's own rounding of g.
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-5), (torch.float16, 1e-5)],
)
def test_gradients_are_those_of_the_table(bits, integer, outside, dtype, tolerance):
    x, low, high, g = inputs(dtype)
    fake_quantize(x, low, high, bits, integer, outside).backward(g)
    dx, d_low, d_high = gradients_by_the_table(x, low, high, g, bits, integer, outside)
    torch.testing.assert_close(x.grad.double(), dx, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(low.grad.double(), d_low, rtol=tolerance, atol=tolerance * len(x))
    torch.testing.assert_close(high.grad.double(), d_high, rtol=tolerance, atol=tolerance * len(x))
    assert low.grad.dtype == high.grad.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("bits", [4, 8])
def test_clip_gradients_are_finite_differences_of_the_surrogate(bits):
    """With rounding frozen (its offset r − u held), x̂ is smooth in the clips: x̂ = clip(x) + s·(r − u)."""
    x, low, high, g = inputs()
    fake_quantize(x, low, high, bits, integer_zero_point=False).backward(g)
    q_min, q_max = code_range(bits)
    scale, zero_point = grid_from_clips(low.detach(), high.detach(), bits, False)
    u = (x.detach() / scale + zero_point).clamp(q_min, q_max)
    frozen = u.round() - u

    def surrogate(low_value: float, high_value: float) -> float:
        s = (high_value - low_value) / (q_max - q_min)
        return ((x.detach().clamp(low_value, high_value) + s * frozen) * g).sum().item()

    h = 1e-6
    by_low = (surrogate(CLIPS[0] + h, CLIPS[1]) - surrogate(CLIPS[0] - h, CLIPS[1])) / (2 * h)
    by_high = (surrogate(CLIPS[0], CLIPS[1] + h) - surrogate(CLIPS[0], CLIPS[1] - h)) / (2 * h)
    assert low.grad.item() == pytest.approx(by_low, abs=1e-5)
    assert high.grad.item() == pytest.approx(by_high, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("integer", [True, False])
def test_compiled_gradients_equal_eager_ones(dtype, integer):
    """The trap that made QAT look unstable: compiled, a float32 input lost all its gradients (pytorch#180642)."""

    def chain(x, low, high, weight, g):
        normed = torch.nn.functional.layer_norm(x, x.shape[-1:], weight)
        return (fake_quantize(normed.to(dtype), low, high, 4, integer).float() * g).sum()

    grads = []
    for function in (chain, torch.compile(chain, fullgraph=True)):
        x, low, high, g = inputs(torch.float32)
        weight = torch.ones(64, requires_grad=True)
        function(x.view(64, 64), low, high, weight, g.view(64, 64)).backward()
        grads.append([x.grad, low.grad, high.grad, weight.grad])
    # The two differ in the last bit before the grid (compiled, nothing is rounded to bfloat16 on the way), so a value
    # on a rounding boundary may take the other code: about 1 in 100 does in bfloat16, which moves its δ by 1/15, some
    # 5-10 % of a clip's gradient. What the trap does is 100 %.
    tolerance = {torch.float32: 1e-3, torch.bfloat16: 0.2}[dtype]
    for name, eager, compiled in zip(("x", "low", "high", "weight"), *grads, strict=True):
        assert eager.norm() > 0, name
        assert (eager - compiled).norm() <= tolerance * eager.norm(), name


@pytest.mark.parametrize("integer", [True, False])
def test_forward_is_the_grid_to_the_bit(integer):
    x, low, high, _ = inputs(torch.float32)
    scale, zero_point = grid_from_clips(low.detach(), high.detach(), 4, integer)
    expected = dequantize(quantize(x.detach(), scale, zero_point, 4), scale, zero_point)
    assert torch.equal(fake_quantize(x, low, high, 4, integer), expected)
    assert expected.unique().numel() == 16
    if integer:
        assert fake_quantize(torch.zeros(1), low, high).item() == 0.0


def test_clamp_only_does_not_round():
    x, low, high, g = inputs(torch.float32)
    y = fake_quantize(x, low, high, 4, integer_zero_point=False, rounds=False)
    torch.testing.assert_close(y, x.clamp(*CLIPS))
    y.backward(g)
    assert high.grad.item() == pytest.approx(g[x >= CLIPS[1]].sum().item(), rel=1e-5)


def test_per_token_grid_covers_each_token_and_passes_the_gradient():
    x, *_ = inputs(torch.float32)
    y = fake_quantize_per_token(x.view(32, 128))
    step = (x.view(32, 128).amax(-1).clamp(min=0) - x.view(32, 128).amin(-1).clamp(max=0)) / 15
    # Half a step, plus what rounding the zero point may cut off at one end.
    assert ((y - x.view(32, 128)).abs().amax(-1) <= step * 1.0001).all()
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def test_groups_of_a_token_have_a_grid_each():
    x, *_ = inputs(torch.float32)
    x = x.detach().view(32, 128)
    x[:, 5] *= 100  # an outlier channel costs its own group only
    y = fake_quantize_per_token(x, group_size=32)
    assert torch.equal(y, torch.cat([fake_quantize_per_token(part) for part in x.split(32, dim=1)], dim=1))
    assert (y - x)[:, 32:].abs().max() < 0.1 * (fake_quantize_per_token(x) - x)[:, 32:].abs().max()
    with pytest.raises(ValueError, match="group_size 48 does not divide the 128 input columns"):
        fake_quantize_per_token(x, group_size=48)
