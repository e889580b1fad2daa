"""The Gluon kernel of many tokens, held to what :mod:`hopper_checks` says."""

import pytest
import torch
from hopper_checks import check_compiles, check_epilogue, check_integers, needs_hopper, problem
from lit_actreg_kernels import int4_hopper, int4_linear
from lit_actreg_kernels.int4_linear import Tile

# The last one has more tiles than programs.
SHAPES = [(1, 8, 16), (70, 33, 272), (300, 520, 1040), (257, 1000, 4096), (2600, 2100, 528)]
TILES = [
    Tile(128, 128, 64, 4, 4, hopper=True),
    Tile(64, 64, 128, 4, 4, hopper=True),
    Tile(128, 256, 64, 8, 4, hopper=True),
]


@pytest.mark.parametrize(
    ("residual", "dtype", "per_token"),
    [(False, "bf16", False), (True, "bf16", False), (True, "fp32", False), (False, "fp32", True)],
)
# 8 steps of 2 nibbles, 2 row tiles a warp group and 2 times 32 columns; or 1 row tile and 4 times 32 columns
@pytest.mark.parametrize("tile", [(128, 128, 64, 4, 4), (64, 64, 128, 4, 4)])
def test_compiles_without_waits_or_spills(tile, residual, dtype, per_token, tmp_path):
    check_compiles(tmp_path, "int4_hopper", tile, "GROUP_M=8", [64, 0], residual, dtype, per_token, programs=2)


@needs_hopper
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_integer_accumulators_are_equal(tile, m, n, k):
    check_integers(tile, m, n, k)


@needs_hopper
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("per_token", [False, True])
def test_epilogue(tile, dtype, per_token):
    check_epilogue(tile, 150, dtype, per_token)


def test_serves_rows_that_tma_can_read():
    codes, packed = torch.zeros(70, 64, dtype=torch.int8), torch.zeros(8, 32, dtype=torch.uint8)
    assert int4_hopper.serves(codes, packed)
    assert not int4_hopper.serves(codes[:, :40].contiguous(), packed)
    assert not int4_hopper.serves(codes, packed[:, :24].contiguous())
    assert not int4_hopper.serves(
        codes.flatten()[1:1025].view(16, 64), packed
    )  # an address that is not a multiple of 16
    assert not int4_hopper.serves(codes.float(), packed)


@needs_hopper
@pytest.mark.parametrize("k", [512, 520, 1032])
def test_what_it_does_not_serve_is_computed_by_other_tiles(k):
    m, n = 1100, 2100
    codes, packed, sums, weight_codes = problem(m, n, k)
    arguments = [tensor.cuda() for tensor in (codes, packed, torch.ones(1), torch.zeros(1), torch.ones(n, 1), sums)]
    y = int4_linear.int4_linear(*arguments, None, None, torch.float32).cpu()
    assert torch.equal(y, (codes.double() @ weight_codes.double().T).float())
