"""The Gluon kernel of few tokens, held to what :mod:`hopper_checks` says; chains of it: test_dependent_launch.py."""

import pytest
import torch
from hopper_checks import check_compiles, check_epilogue, check_integers, needs_hopper
from lit_actreg_kernels.int4_linear import Tile

SHAPES = [(2, 8, 16), (3, 33, 272), (16, 520, 1040), (13, 4100, 4096), (16, 8200, 528)]
TILES = [Tile(16, 64, 256, 4, 4, split_k=n, hopper=True) for n in (1, 3)] + [
    Tile(32, 64, 256, 4, 3, hopper=True),
    Tile(64, 64, 128, 4, 8, hopper=True),
    Tile(64, 64, 128, 4, 4, split_k=2, hopper=True),
]


@pytest.mark.parametrize(
    ("tile", "split_k", "counts"),
    [((64, 64, 128, 4, 8), 2, [8, 8]), ((32, 64, 256, 4, 3), 1, [16, 3]), ((16, 64, 256, 4, 4), 2, [16, 4])],
)
def test_compiles_without_waits_or_spills(tmp_path, tile, split_k, counts):
    """A loop over steps of 2 nibbles, 4 or 8 times 32 columns; all buffers' weights are asked for before the wait."""
    check_compiles(tmp_path, "int4_hopper_decode", tile, f"SPLIT_K={split_k}", counts)


@needs_hopper
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("shape", [*SHAPES, (None, 700, 8192)])  # None: as many tokens as the tile has
def test_integer_accumulators_are_equal(tile, shape):
    m, n, k = shape
    check_integers(tile, m or tile.block_m, n, k)


@needs_hopper
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("per_token", [False, True])
def test_epilogue(tile, dtype, per_token):
    check_epilogue(tile, tile.block_m - 3, dtype, per_token)
