"""One token's attention to the cache: the kernel against the reference, and the reference against whole attention."""

import pytest
import torch
from lit_actreg_kernels import decode_attention, ops, reference
from lit_actreg_kernels.int4_tile import INTERPRETED, tickets_of
from quantizer_checks import DTYPES, on_device, static_grid
from torch.nn import functional
from triton.runtime import interpreter

SHAPES = [(4, 4, 16, 64), (6, 2, 10, 70), (2, 1, 24, 200)]  # H, G, E, C; the last two with padding and groups


def angles(length, width):
    frequencies = 10000 ** -(torch.arange(0, width, 2) / width)
    angle = torch.outer(torch.arange(length), frequencies).repeat(1, 2)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def sample(heads, groups, width, length, dtype, num_batch=2):
    """qkv of one token, and caches whose entries are all large: one that should be hidden would show."""
    torch.manual_seed(0)
    qkv = torch.randn(num_batch, (heads + 2 * groups) * width).to(dtype)
    return qkv, *(torch.randn(2, num_batch, groups, length, width) * 3).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "splits"), list(zip(SHAPES, (1, 2, 4), strict=True)))
def test_kernel_is_the_reference(dtype, shape, splits, monkeypatch):
    monkeypatch.setattr(decode_attention, "splits_for", lambda *_: splits)
    heads, groups, width, length = shape
    cos, sin = angles(length, width)
    for position in (0, length // 3, length - 1):
        qkv, keys, values = sample(heads, groups, width, length, dtype)
        inputs = (qkv, cos[position], sin[position], keys, values, torch.tensor([position]))
        kept = on_device(*inputs)
        found = decode_attention.decode_attention(*kept)
        expected = reference.decode_attention(*inputs)
        # Sums of at most 200 float32 terms, then one rounding to dtype: the reference rounds its weights too.
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(found.cpu(), expected, rtol=2 * eps + 1e-5, atol=8 * eps + 1e-5)
        assert torch.equal(kept[4].cpu(), values)
        torch.testing.assert_close(kept[3].cpu(), keys, rtol=eps, atol=1e-6)  # a rotation of two products


def test_programs_may_end_in_any_order(monkeypatch):
    """The last of a head joins its parts, and leaves its ticket as it was; a GPU has an order of its own."""
    monkeypatch.setattr(decode_attention, "splits_for", lambda *_: 4)
    heads, groups, width, length = 6, 2, 10, 200
    order = torch.randperm(2 * heads * 4, generator=torch.Generator().manual_seed(0)).tolist()
    if INTERPRETED:
        builder, in_order = interpreter.interpreter_builder, interpreter.interpreter_builder.set_grid_idx

        def shuffled(x, y, z):
            in_order(*divmod(order[4 * x + y], 4), z)

        monkeypatch.setattr(builder, "set_grid_idx", shuffled)
    cos, sin = angles(length, width)
    inputs = (*sample(heads, groups, width, length, torch.float32), torch.tensor([190]))
    inputs = (inputs[0], cos[190], sin[190], *inputs[1:])
    kept = on_device(*inputs)
    found = decode_attention.decode_attention(*kept)
    torch.testing.assert_close(found.cpu(), reference.decode_attention(*inputs), rtol=1e-5, atol=1e-5)
    assert not tickets_of(kept[0].device).any()


@pytest.mark.parametrize("splits", [1, 2])
def test_codes_are_those_of_the_output(splits, monkeypatch):
    monkeypatch.setattr(decode_attention, "splits_for", lambda *_: splits)
    qkv, keys, values = sample(6, 2, 10, 70, torch.bfloat16)
    cos, sin = angles(70, 10)
    inputs, grid = on_device(qkv, cos[40], sin[40], keys, values, torch.tensor([40])), static_grid(0.3, -1.4)
    y = decode_attention.decode_attention(*inputs)
    codes = decode_attention.decode_attention(*inputs, *on_device(*grid), 4)
    assert torch.equal(codes.cpu(), reference.quantize_activation(y.cpu(), *grid, 4))


def test_hidden_entries_are_not_read():
    qkv, keys, values = sample(4, 4, 16, 64, torch.float32)
    keys[:, :, 6:], values[:, :, 6:] = torch.nan, torch.nan
    cos, sin = angles(64, 16)
    found = decode_attention.decode_attention(*on_device(qkv, cos[5], sin[5], keys, values, torch.tensor([5])))
    assert found.isfinite().all()


@pytest.mark.parametrize("shape", SHAPES)
def test_reference_is_the_last_row_of_causal_attention(shape):
    heads, groups, width, length = shape
    tokens = torch.randn(2, length, heads + 2 * groups, width, dtype=torch.float64)
    cos, sin = angles(length, width)
    q, k, v = tokens.transpose(1, 2).split([heads, groups, groups], dim=1)
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    whole = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    keys, values = torch.zeros(k.shape).double(), torch.zeros(v.shape).double()
    for position in range(length):
        qkv = tokens[:, position].flatten(1)
        y = ops.decode_attention(qkv, cos[position], sin[position], keys, values, torch.tensor([position]))
        torch.testing.assert_close(y, whole[:, :, position].flatten(1), rtol=1e-12, atol=1e-12)


def test_splits_fill_the_gpu_and_no_program_has_little_to_do():
    lengths = (1, 127, 128, 383, 1024, 100000)
    assert [decode_attention.splits_for(16, length) for length in lengths] == [1, 1, 2, 4, 16, 16]
    assert [decode_attention.splits_for(rows, 4096) for rows in (32, 128, 1024)] == [16, 4, 1]


def test_opcheck():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    qkv, keys, values = (t.to(device) for t in sample(4, 2, 16, 64, torch.float32))
    inputs = (qkv, *(t[5].to(device) for t in angles(64, 16)), keys, values, torch.tensor([5], device=device))
    utilities = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(ops.decode_attention, inputs, test_utils=utilities)


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (0, torch.zeros(2, 100), "these keys take"),
        (0, torch.zeros(3, 128), "these keys take"),
        (1, torch.zeros(64, 16), "16 elements each"),
        (2, torch.zeros(16).double(), "keep the angles float32|cos is"),
        (3, torch.zeros(2, 2, 64, 8), "both"),
        (5, torch.tensor([5], dtype=torch.int32), r"int64 \[1\]"),
    ],
)
def test_refuses(index, value, message):
    qkv, keys, values = sample(4, 2, 16, 64, torch.float32)
    inputs = [qkv, *(t[5] for t in angles(64, 16)), keys, values, torch.tensor([5])]
    inputs[index] = value
    with pytest.raises(ValueError, match=message):
        ops.decode_attention(*inputs)
