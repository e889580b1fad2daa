"""Plain PyTorch ground truth of the fused training operators, gradients written out, in any precision.

The operators run it on a CPU, and in float64. A fit there takes them for kurtosis and rotary positions only, formulas
for the rest (``InputQuantizer.fuses``).

The functions mirror those of :mod:`.fake_quant`, :mod:`.gelu_fake_quant`, :mod:`.swiglu`, :mod:`.norm_fake_quant`,
:mod:`.rotary`, :mod:`.kurtosis` and :mod:`.cross_entropy`, where the formulas stand; here the partial sums have one
program. Arithmetic is float32, or float64 for float64 inputs.
"""

import math

import torch
from lit_actreg_kernels import grid
from lit_actreg_kernels.reference import turn
from torch import Tensor
from torch.nn import functional


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def fake_quantize(x: Tensor, low: Tensor, high: Tensor, bits: int, integer_zero_point: bool) -> Tensor:
    """x̂ of x [...], in its dtype."""
    scale, zero_point = grid.grid_from_clips(_wide(low), _wide(high), bits, integer_zero_point)
    q_min, q_max = grid.code_range(bits)
    codes = (_wide(x) / scale + zero_point).round().clamp(q_min, q_max)
    return ((codes - zero_point) * scale).to(x.dtype)


def _straight_through(
    x: Tensor, g: Tensor, low: Tensor, high: Tensor, bits: int, integer_zero_point: bool, masked: bool
) -> tuple[Tensor, Tensor]:
    """dx of wide x and g, and the sums of dc⁻ and dc⁺ [2, 1]."""
    scale, zero_point = grid.grid_from_clips(_wide(low), _wide(high), bits, integer_zero_point)
    q_min, q_max = grid.code_range(bits)
    u = x / scale + zero_point
    above, below = x >= (q_max - zero_point) * scale, x <= (q_min - zero_point) * scale
    outside = above | below
    rounded = torch.where(outside, 0.0, (u - u.round()) / (q_max - q_min)) * g
    d_low = torch.where(below, g, 0.0) + rounded
    d_high = torch.where(above, g, 0.0) - rounded
    return torch.where(outside, 0.0, g) if masked else g, torch.stack([d_low.sum(), d_high.sum()])[:, None]


def fake_quantize_backward(
    g: Tensor, x: Tensor, low: Tensor, high: Tensor, bits: int, integer_zero_point: bool, masked: bool
) -> tuple[Tensor, Tensor]:
    """dx in the dtype of x; dc⁻, dc⁺ [2, 1]."""
    dx, clips = _straight_through(_wide(x), _wide(g), low, high, bits, integer_zero_point, masked)
    return dx.to(x.dtype, copy=True), clips  # a copy: an operator must not return its argument


def _activation(h: Tensor, gated: bool) -> Tensor:
    if not gated:
        return functional.gelu(h)
    gate, up = h.chunk(2, dim=-1)
    return functional.silu(gate) * up


def activation_fake_quantize(
    h: Tensor,
    low: Tensor,
    high: Tensor,
    gated: bool,
    bits: int,
    integer_zero_point: bool,
    first: int,
    step: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """x̂ [..., H] of GELU(h), h [..., H], or of SwiGLU, h = [gate, up] [..., 2H]; κ̄ and its terms, of h."""
    x_hat = fake_quantize(_activation(_wide(h), gated).to(h.dtype), low, high, bits, integer_zero_point)
    return x_hat, *token_kurtosis(h, first, step, eps)


def activation_fake_quantize_backward(
    g: Tensor,
    h: Tensor,
    low: Tensor,
    high: Tensor,
    gated: bool,
    bits: int,
    integer_zero_point: bool,
    masked: bool,
    terms: Tensor,
    d_kappa: Tensor,
    first: int,
    step: int,
    has_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dh in the dtype of h; dc⁻, dc⁺ [2, 1]; if ``has_bias``, its gradient [1, H], else [0, H]."""
    wide = _wide(h)
    y = _wide(_activation(wide, gated).to(h.dtype))
    dy, clips = _straight_through(y, _wide(g), low, high, bits, integer_zero_point, masked)
    if gated:
        return swiglu_backward(dy, h, terms, d_kappa, first, step), clips, dy.new_empty((0, dy.shape[-1]))
    cumulative = 0.5 * (1 + torch.erf(wide / math.sqrt(2)))
    dh = dy * (cumulative + wide * torch.exp(-0.5 * wide * wide) / math.sqrt(2 * math.pi))
    if step:
        add_kurtosis_gradient(dh, h, terms, d_kappa, first, step)
    rows = dh.reshape(-1, dh.shape[-1])
    return dh.to(h.dtype), clips, rows.sum(0, keepdim=True) if has_bias else rows[:0].clone()


def swiglu_fake_quantize_per_token(
    h: Tensor, bits: int, num_groups: int, first: int, step: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """x̂ [..., H] of h [..., 2H], in its dtype; κ̄ and its terms, of h."""
    y = _wide(_activation(_wide(h), True).to(h.dtype)).unflatten(-1, (num_groups, -1))
    scale, zero_point = grid.grid_per_token(y, bits)
    q_min, q_max = grid.code_range(bits)
    codes = (y / scale + zero_point).round().clamp(q_min, q_max)
    return ((codes - zero_point) * scale).flatten(-2).to(h.dtype), *token_kurtosis(h, first, step, eps)


def swiglu_backward(g: Tensor, h: Tensor, terms: Tensor, d_kappa: Tensor, first: int, step: int) -> Tensor:
    """dh [..., 2H], in the dtype of h, of g [..., H]."""
    gate, up = _wide(h).chunk(2, dim=-1)
    sigmoid = gate.sigmoid()
    d_up = _wide(g) * gate * sigmoid
    d_gate = _wide(g) * up * sigmoid * (1 + gate * (1 - sigmoid))
    dh = torch.cat([d_gate, d_up], dim=-1)
    if step:
        add_kurtosis_gradient(dh, h, terms, d_kappa, first, step)
    return dh.to(h.dtype)


def add_norm_fake_quantize(
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    low: Tensor,
    high: Tensor,
    eps: float,
    rms: bool,
    bits: int,
    integer_zero_point: bool,
    value_dtype: torch.dtype,
    out_dtype: torch.dtype,
    first: int,
    step: int,
    kurtosis_eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x′ = x + y, x̂ of its norm in ``out_dtype``, and μ, 1/σ of the rows [2, M].

    And of y κ̄ and its terms, and the rows looked at [R, K].
    """
    new = (_wide(x) + _wide(y)).to(x.dtype)
    wide = _wide(new)
    mean = torch.zeros_like(wide[..., 0]) if rms else wide.mean(-1)
    factor = ((wide - mean[..., None]).square().mean(-1) + eps).rsqrt()
    value = (wide - mean[..., None]) * factor[..., None] * _wide(weight)
    value = (value if bias is None else value + _wide(bias)).to(value_dtype)
    x_hat = fake_quantize(value, low, high, bits, integer_zero_point).to(out_dtype)
    statistics = torch.stack([mean.flatten(), factor.flatten()])
    return new, x_hat, statistics, *token_kurtosis(y, first, step, kurtosis_eps), _looked_at(y, first, step).clone()


def add_norm_fake_quantize_backward(
    g: Tensor,
    d_new: Tensor,
    new: Tensor,
    y_dtype: torch.dtype,
    statistics: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    low: Tensor,
    high: Tensor,
    rms: bool,
    bits: int,
    integer_zero_point: bool,
    masked: bool,
    value_dtype: torch.dtype,
    terms: Tensor,
    rows: Tensor,
    d_kappa: Tensor,
    first: int,
    step: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx in the dtype of x′, dy in that of y, empty where it would equal dx; dw and db [2, 1, K]; dc⁻, dc⁺ [2, 1]."""
    mean, factor = statistics.view(2, *new.shape[:-1], 1)
    normed = (_wide(new) - mean) * factor
    value = normed * _wide(weight)
    value = _wide((value if bias is None else value + _wide(bias)).to(value_dtype))
    dv, clips = _straight_through(value, _wide(g), low, high, bits, integer_zero_point, masked)
    parameters = torch.stack([(dv * normed).flatten(0, -2).sum(0), dv.flatten(0, -2).sum(0)])[:, None]
    weighted = dv * _wide(weight)
    dx = weighted - normed * (weighted * normed).mean(-1, keepdim=True)
    if not rms:
        dx = dx - weighted.mean(-1, keepdim=True)
    dx = dx * factor + _wide(d_new)
    dy = dx.new_empty(0, dtype=y_dtype)
    if step or y_dtype != new.dtype:
        dy = dx.clone()
        if step:
            looked_at = dy[..., first::step, :]
            looked_at += _row_gradients(rows, terms, d_kappa).view(looked_at.shape)
    return dx.to(new.dtype), dy.to(y_dtype), parameters, clips


def rotate(
    qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int, num_groups: int, first: int, step: int, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q [..., T, H, E] and k [..., T, G, E], in the dtype of qkv; κ̄ and its terms, of qkv."""
    q, k, _ = qkv.unflatten(-1, (-1, cos.shape[-1])).split([num_heads, num_groups, num_groups], dim=-2)
    cos, sin = cos[:, None], sin[:, None]
    turned = turn(q, cos, sin).to(qkv.dtype), turn(k, cos, sin).to(qkv.dtype)
    return *turned, *token_kurtosis(qkv, first, step, eps)


def rotate_backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    terms: Tensor,
    d_kappa: Tensor,
    first: int,
    step: int,
) -> Tensor:
    """The gradient of qkv, in its dtype."""
    cos, sin = cos[:, None], sin[:, None]
    d_qkv = torch.cat([turn(dq, cos, -sin), turn(dk, cos, -sin), _wide(dv)], dim=-2).flatten(-2)
    if step:
        add_kurtosis_gradient(d_qkv, qkv, terms, d_kappa, first, step)
    return d_qkv.to(qkv.dtype)


def _looked_at(y: Tensor, first: int, step: int) -> Tensor:
    """The rows [R, N] of y [..., T, N] that are looked at; none with step 0."""
    return y[..., first::step, :].flatten(0, -2) if step else y.new_empty((0, y.shape[-1]))


def token_kurtosis(y: Tensor, first: int, step: int, eps: float) -> tuple[Tensor, Tensor]:
    """Shares [R] of κ̄ of the tokens looked at, and their gradients' terms [R, 4]."""
    rows = _wide(_looked_at(y, first, step))
    mean = rows.mean(-1, keepdim=True)
    c = rows - mean
    squares = c * c
    v, m3, m4 = (power.mean(-1, keepdim=True) for power in (squares, squares * c, squares * squares))
    d = v * v + eps
    return (m4 / d).flatten() / rows.shape[0], torch.cat([mean, 4 / (rows.shape[-1] * d), m3, m4 * v / d], dim=-1)


def _row_gradients(rows: Tensor, terms: Tensor, d_kappa: Tensor) -> Tensor:
    """dκ̄ · ∂κ̄/∂y of the rows looked at [R, N]."""
    mean, factor, m3, linear = terms.split(1, dim=-1)
    c = _wide(rows) - mean
    return d_kappa / rows.shape[0] * factor * (c * c * c - m3 - linear * c)


def add_kurtosis_gradient(g: Tensor, y: Tensor, terms: Tensor, d_kappa: Tensor, first: int, step: int) -> None:
    """Adds dκ̄ · ∂κ̄/∂y to g [..., T, N], in place; d_kappa one value."""
    looked_at = g[..., first::step, :]
    looked_at += _row_gradients(_looked_at(y, first, step), terms, d_kappa).view(looked_at.shape).to(g.dtype)


def cross_entropy(logits: Tensor, targets: Tensor, ignored: int, gradient: bool) -> Tensor:
    """Every row's loss [R]; and if ``gradient``, that loss's gradient in the place of the logits [R, V]."""
    counts = targets != ignored
    index = targets.where(counts, 0)[:, None]
    logarithms = _wide(logits).log_softmax(-1)
    losses = torch.where(counts, -logarithms.gather(1, index)[:, 0], 0.0)
    if gradient:
        softmax = logarithms.exp_()
        softmax.scatter_add_(1, index, -torch.ones_like(softmax[:, :1]))
        logits.copy_(softmax.mul_(counts[:, None]))
    return losses
