"""The packed linear against plain PyTorch: in the interpreter without a GPU, compiled with one."""

from dataclasses import replace

import pytest
import torch
from lit_actreg_kernels import grid, int4_linear, reference
from lit_actreg_kernels.int4_linear import Tile

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PREFILL = Tile(64, 64, 32, num_warps=4, num_stages=2)
DECODE = Tile(16, 32, 32, num_warps=2, num_stages=2)
SPLIT = replace(DECODE, split_k=3)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fills every torch.empty with NaN or the largest integer: what a kernel fails to write is seen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def problem(m, n, k, groups=1, per_token=False, padding=0, act_bits=4):
    """Random codes, their grids and the reference's answer for them; weights padded by so many zero columns."""
    q_min, q_max = grid.code_range(act_bits)
    weight_codes = torch.randint(-8, 8, (n, k), dtype=torch.int8)
    rows = m if per_token else 1
    scale, zero_point = torch.rand(rows) + 0.1, torch.randint(-8, 8, (rows,)).float()
    tensors = {
        "x": torch.randint(q_min, q_max + 1, (m, k), dtype=torch.int8),
        "packed": grid.pack_int4(torch.nn.functional.pad(weight_codes, (0, padding))),
        "act_scale": scale[:, None] if per_token else scale,
        "act_zero_point": zero_point[:, None] if per_token else zero_point,
        "weight_scale": torch.rand(n, groups) + 0.1,
        "weight_sums": reference.weight_sums(weight_codes, groups),
        "bias": torch.randn(n),
        "residual": torch.randn(m, n),
    }
    return tensors, weight_codes


def run(tensors, out_dtype, tile=None, act_bits=4):
    on_device = {name: None if value is None else value.to(DEVICE) for name, value in tensors.items()}
    return int4_linear.int4_linear(**on_device, out_dtype=out_dtype, act_bits=act_bits, tile=tile).cpu()


def expected(tensors, out_dtype):
    tensors = dict(tensors)
    return reference.int4_linear(tensors.pop("x"), **tensors, out_dtype=out_dtype)


def with_plain_epilogue(tensors):
    """The same product with scales of one and nothing added: the float output is the integer accumulator."""
    ones = {"act_scale": torch.ones(1), "act_zero_point": torch.zeros(1), "bias": None, "residual": None}
    return tensors | ones | {"weight_scale": torch.ones_like(tensors["weight_scale"])}


@pytest.mark.parametrize("tile", [PREFILL, DECODE, SPLIT], ids=["prefill", "decode", "split"])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (5, 33, 77), (70, 65, 256), (17, 31, 130), (3, 100, 510)])
def test_integer_accumulators_are_equal(tile, m, n, k):
    tensors, weight_codes = problem(m, n, k)
    acc = run(with_plain_epilogue(tensors), torch.float32, tile)
    assert torch.equal(acc.long(), tensors["x"].long() @ weight_codes.long().T)


@pytest.mark.parametrize("tile", [PREFILL, DECODE, SPLIT], ids=["prefill", "decode", "split"])
def test_extreme_codes_do_not_overflow(tile):
    k = 8192  # 16 · 8 · 128 · 8192 needs 28 bits; the interpreter would take minutes at the limit of 131,071
    tensors, _ = problem(2, 3, k)
    tensors["x"] = torch.full((2, k), -128, dtype=torch.int8)
    tensors["packed"] = grid.pack_int4(torch.full((3, k), -8, dtype=torch.int8))
    acc = run(with_plain_epilogue(tensors), torch.float32, replace(tile, block_k=1024, block_m=16, block_n=16), 8)
    assert (acc == 1024 * k).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("tile", [PREFILL, SPLIT], ids=["prefill", "split"])
def test_epilogue(dtype, per_token, tile):
    tensors, weight_codes = problem(19, 70, 150, per_token=per_token)
    tensors["act_zero_point"] += 0.25  # a real zero point
    # All of the epilogue is float32, where the order of roundings may differ (a GPU fuses multiply and add): at most 4
    # of them, each half a unit of the terms' magnitude, which cancellation leaves in a smaller sum. Then one rounding
    # to the output's dtype.
    wide = expected(tensors, torch.float32)
    products = (tensors["x"].double() @ weight_codes.double().T).abs()
    products += (tensors["act_zero_point"] * tensors["weight_sums"].flatten()).abs()
    terms = products * (tensors["act_scale"] * tensors["weight_scale"].flatten())
    terms += tensors["bias"].abs() + tensors["residual"].abs()
    tolerance = 4 * 2**-24 * terms
    if dtype != torch.float32:
        tolerance += torch.finfo(dtype).eps * wide.abs()
    assert ((run(tensors, dtype, tile).double() - wide).abs() <= tolerance).all()


@pytest.mark.parametrize("padding", [0, 1, 50, 128])
def test_padded_weights_ignore_what_lies_beyond_k(padding):
    tensors, weight_codes = problem(5, 20, 78, padding=padding)
    acc = run(with_plain_epilogue(tensors), torch.float32, DECODE)
    assert torch.equal(acc.long(), tensors["x"].long() @ weight_codes.long().T)


@pytest.mark.parametrize(("m", "n", "k"), [(1, 48, 256), (16, 20, 128), (33, 70, 256), (64, 64, 64), (130, 140, 256)])
def test_chosen_tiles(m, n, k):
    tensors, _ = problem(m, n, k)
    rtol = 32 * torch.finfo(torch.float32).eps
    answer = expected(tensors, torch.float32)
    torch.testing.assert_close(run(tensors, torch.float32), answer, rtol=rtol, atol=rtol * answer.abs().max())


def test_repeated_runs_are_equal():
    tensors, _ = problem(16, 64, 512)
    first = run(tensors, torch.float32, SPLIT)
    assert all(torch.equal(first, run(tensors, torch.float32, SPLIT)) for _ in range(3))


def test_no_tokens():
    tensors, _ = problem(0, 8, 16)
    assert run(tensors, torch.bfloat16).shape == (0, 8)


SQUARE = Tile(128, 128, 64, 4, 4, hopper=True)
MIDDLE = Tile(128, 128, 64, 4, 4)
SMALL = Tile(64, 64, 128, 4, 4)


@pytest.mark.parametrize(
    ("m", "n", "p", "hopper", "tile"),
    [
        (8192, 8192, 4096, True, SQUARE),
        (16384, 8192, 1024, True, SQUARE),
        (8192, 8192, 4096, False, MIDDLE),
        (257, 4096, 2048, True, SQUARE),  # 96 tiles
        (256, 4096, 2048, True, replace(SMALL, hopper=True)),  # 64 of them
        (256, 4096, 2048, False, SMALL),
        (100, 33, 16, False, SMALL),
        (64, 8192, 4096, True, Tile(64, 64, 128, 4, 6, hopper=True)),
        (64, 4096, 2048, True, Tile(64, 64, 128, 4, 6, split_k=2, hopper=True)),
        (64, 11008, 2048, True, Tile(64, 64, 128, 4, 4, hopper=True)),
        (32, 11008, 2048, True, Tile(32, 64, 256, 4, 3, hopper=True)),
        (32, 8192, 4096, True, Tile(32, 64, 256, 4, 4, hopper=True)),
        (16, 11008, 2048, True, Tile(16, 64, 256, 4, 4, hopper=True)),
        (16, 8192, 4096, True, Tile(16, 64, 256, 4, 6, hopper=True)),
        (16, 6080, 4096, True, Tile(16, 64, 256, 4, 4, split_k=2, hopper=True)),  # 95 tiles
        (2, 1024, 4096, True, Tile(16, 64, 256, 4, 4, split_k=4, hopper=True)),
        (64, 8192, 4096, False, Tile(64, 64, 128, 4, 4, split_k=2)),
        (64, 4096, 2048, False, Tile(64, 64, 128, 4, 4, split_k=2)),
        (64, 11008, 2048, False, Tile(64, 64, 128, 4, 4)),
        (32, 1024, 4096, False, Tile(32, 64, 128, 4, 4, split_k=4)),
        (16, 4096, 2048, False, Tile(16, 32, 256, 2, 4)),
        (16, 11008, 2048, False, Tile(16, 32, 256, 2, 4)),
        (2, 1024, 4096, False, Tile(16, 32, 256, 2, 4, split_k=2)),
    ],
)
def test_choice_by_regime(m, n, p, hopper, tile):
    assert int4_linear.choose_tile(m, n, p, hopper) == tile


def test_tiles_without_hopper_fit_small_gpus():
    for m in (2, 16, 17, 32, 33, 64, 65, 1000, 10000):
        for n in (1, 1000, 10000):
            tile = int4_linear.choose_tile(m, n, 4096, hopper=False)
            step = tile.block_k * (tile.block_n + 2 * tile.block_m)  # weights, and codes of both halves
            assert step * tile.num_stages <= 99 << 10


def test_hopper_is_for_one_kind_of_gpu(monkeypatch):
    monkeypatch.setattr(int4_linear, "INTERPRETED", False)
    int4_linear.hopper_kernel.cache_clear()
    assert int4_linear.hopper_kernel(torch.device("cpu")) is None
    for capability in [(8, 0), (8, 9), (10, 0)]:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        int4_linear.hopper_kernel.cache_clear()
        assert int4_linear.hopper_kernel(torch.device("cuda")) is None
    int4_linear.hopper_kernel.cache_clear()


def test_hopper_tile_is_refused_where_it_cannot_run():
    tensors, _ = problem(70, 33, 78)
    with pytest.raises(ValueError, match="sm_90"):
        run(tensors, torch.float32, SQUARE)


def test_split_keeps_every_part_worth_its_while():
    assert int4_linear.split_for(128, 4096, num_programs=64) == 1
    assert int4_linear.split_for(16, 4096, num_programs=64) == 4
    assert int4_linear.split_for(16, 2048, num_programs=64) == 2
    assert int4_linear.split_for(1, 64, num_programs=64) == 1
