"""Plain PyTorch ground truth of every kernel: what the Triton code is tested against, and what runs without a GPU.

With activation codes a (grid s_x, z_x) and weight codes w (symmetric, scale s_w), a linear layer is

    y_mn = Σ_k (a_mk − z_x) s_x · w_nk s_w  + b_n  =  s_x · s_w · (Σ_k a_mk w_nk − z_x · Σ_k w_nk) + b_n

so the only product over K is one of integers, and the zero point costs one multiplication by a sum of the weight's row
that is computed once, at pack time (Jacob et al., arXiv 1712.05877, eq. 7). With groups of columns that share a scale,
of a row of weights or of a token, the bracket is formed per group and scaled inside the sum over groups. Codes on a
token's groups are *centered*: they come less their zero point (a − z fits int8 up to 7 bits), and there is none to
correct for.

Shapes: codes int8 [M, K]; weight codes int8 [N, K]; weight scale float32 and weight sums int32 [N, G], K divisible by
G; activation scale and zero point float32 [1] (static) or [M, 1] (per token); scale [M, H] and no zero point by groups
of a token (of G and H one divides the other); bias [N]; residual [M, N].

Exactness: |a| ≤ 128 and |w| ≤ 8 bound every partial sum by 1024 K, so a float32 product is exact up to K = 16,384 and a
float64 one always. The epilogue is float32: with 4-bit activations |acc| and |z · sum| stay below 2^24 for K < 131,072,
so both are exact for an integer zero point; a fractional ("real") one rounds once.
"""

import torch
from lit_actreg_kernels import grid
from torch import Tensor
from torch.nn import functional


def quantize_activation(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Codes int8 of x [..., K] on a static grid, scale and zero point [1]."""
    return grid.quantize(x, scale, zero_point, bits)


def quantize_activation_per_token(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes int8 of x [..., K], and each token's own scale and zero point, float32 [..., 1]."""
    scale, zero_point = grid.grid_per_token(x.float(), bits)
    return grid.quantize(x, scale, zero_point, bits), scale, zero_point


def quantize_groups(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes int8 less their zero point [M, G, C] of x, each group on its own grid; its scale [M, G]."""
    codes, scale, zero_point = quantize_activation_per_token(x, bits)
    return (codes - zero_point).to(torch.int8), scale.squeeze(-1)


def norm_quantize(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, rms: bool, scale: Tensor, zero_point: Tensor, bits: int
) -> Tensor:
    """Codes of LayerNorm(x) or RMSNorm(x): statistics in float32, the result rounded to x's dtype as if unfused.

    x [..., K], weight and bias [K].
    """
    wide, shape = x.float(), (x.shape[-1],)
    if rms:
        y = functional.rms_norm(wide, shape, weight.float(), eps)
    else:
        y = functional.layer_norm(wide, shape, weight.float(), None if bias is None else bias.float(), eps)
    return grid.quantize(y.to(x.dtype), scale, zero_point, bits)


def gelu_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Codes of GELU(x) (the exact one, with erf), x [..., H]; the activation is rounded to x's dtype first."""
    return grid.quantize(functional.gelu(x.float()).to(x.dtype), scale, zero_point, bits)


def swiglu_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Codes of silu(gate) · up for x = [gate, up] [..., 2H] → [..., H]; the product is rounded to x's dtype first."""
    gate, up = x.float().chunk(2, dim=-1)
    return grid.quantize((functional.silu(gate) * up).to(x.dtype), scale, zero_point, bits)


def integer_matmul(codes: Tensor, weight_codes: Tensor) -> Tensor:
    """Σ_k a_mk w_nk, exact: int8 [M, K] × int8 [N, K] (4-bit range) → int32 [M, N]."""
    exact = torch.float32 if codes.shape[-1] <= 16384 else torch.float64  # see the module's note on exactness
    return (codes.to(exact) @ weight_codes.to(exact).T).to(torch.int32)


def weight_sums(weight_codes: Tensor, num_groups: int) -> Tensor:
    """Σ_k w_nk within each group of columns: int8 [N, K] → int32 [N, G]."""
    return weight_codes.unflatten(-1, (num_groups, -1)).sum(-1, dtype=torch.int32)


def int4_linear(
    codes: Tensor,
    packed: Tensor,
    act_scale: Tensor,
    act_zero_point: Tensor | None,
    weight_scale: Tensor,
    weight_sums: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """The linear layer of the module's formula: codes int8 [M, K], packed uint8 [N, P] (P ≥ K / 2) → [M, N]."""
    num_columns, num_groups = codes.shape[-1], max(act_scale.shape[-1], weight_scale.shape[-1])
    per_act_scale, per_weight_scale = (num_groups // scale.shape[-1] for scale in (act_scale, weight_scale))
    weight_codes = grid.unpack_int4(packed, num_columns)
    y = torch.zeros(codes.shape[0], packed.shape[0], device=codes.device)
    group_size = num_columns // num_groups
    for g in range(num_groups):
        columns = slice(g * group_size, (g + 1) * group_size)
        part = integer_matmul(codes[:, columns], weight_codes[:, columns]).float()
        if act_zero_point is not None and weight_sums is not None:
            part -= act_zero_point * weight_sums[:, g // per_weight_scale]
        y += act_scale[..., g // per_act_scale, None] * (weight_scale[:, g // per_weight_scale] * part)
    if bias is not None:
        y = y + bias.float()
    if residual is not None:
        y = y + residual.float()
    return y.to(out_dtype)


def token_grouped_int4_linear(
    x: Tensor,
    act_groups: int,
    act_bits: int,
    packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    """The linear of x [M, K] with a min-max grid for every one of ``act_groups`` groups of each token's columns."""
    codes, scale = quantize_groups(x.unflatten(1, (act_groups, -1)), act_bits)
    return int4_linear(codes.flatten(1), packed, scale, None, weight_scale, None, bias, residual, x.dtype)


def norm_int4_linear(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    eps: float,
    rms: bool,
    packed: Tensor,
    act_scale: Tensor,
    act_zero_point: Tensor,
    act_bits: int,
    weight_scale: Tensor,
    weight_sums: Tensor,
    bias: Tensor | None,
    activation: str,
    out_scale: Tensor | None,
    out_zero_point: Tensor | None,
    out_bits: int,
) -> Tensor:
    """The linear of norm(x) [M, K] in x's dtype; with an activation "gelu" or "swiglu" the codes of that, int8."""
    codes = norm_quantize(x, norm_weight, norm_bias, eps, rms, act_scale, act_zero_point, act_bits)
    y = int4_linear(codes, packed, act_scale, act_zero_point, weight_scale, weight_sums, bias, None, x.dtype)
    if not activation:
        return y
    assert out_scale is not None
    assert out_zero_point is not None
    return (swiglu_quantize if activation == "swiglu" else gelu_quantize)(y, out_scale, out_zero_point, out_bits)


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Heads x [..., E] at their rotary positions; cos and sin [..., E], halves repeated, broadcast."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-b, a], dim=-1) * sin


def decode_attention(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    bits: int = 0,
) -> Tensor:
    """Attention of one token a sequence to a cache that it first enters, at ``position`` (int64 [1]).

    qkv [B, (H + 2G) · E]; cos and sin of the position, [E], halves repeated; keys (rotated) and values [B, G, C, E].
    Returns [B, H · E]; where a static grid is given, its codes.
    """
    num_batch, num_groups, length, width = keys.shape
    heads = qkv.view(num_batch, -1, 1, width)  # [B, H + 2G, T = 1, E]
    num_heads = heads.shape[1] - 2 * num_groups

    q, k, v = heads.split([num_heads, num_groups, num_groups], dim=1)
    keys.index_copy_(2, position, turn(k, cos, sin).to(keys.dtype))
    values.index_copy_(2, position, v.to(values.dtype))
    visible = torch.arange(length, device=qkv.device) <= position[:, None]
    grouped = num_heads != num_groups
    y = functional.scaled_dot_product_attention(
        turn(q, cos, sin).to(keys.dtype), keys, values, attn_mask=visible, enable_gqa=grouped
    )
    y = y.to(qkv.dtype).reshape(num_batch, num_heads * width)
    if scale is None:
        return y
    assert zero_point is not None
    return quantize_activation(y, scale, zero_point, bits)


def gptq_columns(
    w: Tensor, factor: Tensor, scale: Tensor, zero_point: Tensor, group: Tensor, bits: int
) -> tuple[Tensor, Tensor]:
    """GPTQ's loop over C columns of a weight: codes int8 [C, N], and the errors e [C, N] for later columns to make up.

        q_i = round to the grid of w_i        e_i = (w_i − ŵ_i) / U_ii        w_j ← w_j − e_i · U_ij   for all j > i

    w [C, N] is transposed, a column of the weight a row; factor U [C, C] upper triangular; the grid of column i is
    column ``group[i]`` (int64 [C]) of scale and zero point [N, G]. All are of one dtype.
    """
    w = w.clone()
    codes, errors = torch.empty_like(w, dtype=torch.int8), torch.empty_like(w)
    for i, g in enumerate(group.tolist()):
        s, z = scale[:, g], zero_point[:, g]
        codes[i] = grid.quantize(w[i], s, z, bits)
        errors[i] = (w[i] - grid.dequantize(codes[i], s, z)) / factor[i, i]
        # a product with one inner element: addr_ is as quick on one thread, and slow where several must wait
        w[i + 1 :].addmm_(factor[i, i + 1 :, None], errors[i : i + 1], alpha=-1)
    return codes, errors
