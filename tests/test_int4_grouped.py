"""The packed linear with groups against plain PyTorch: in the interpreter without a GPU, compiled with one."""

import pytest
import torch
from lit_actreg_kernels import grid, int4_grouped, int4_linear, reference
from lit_actreg_kernels.int4_tile import Tile
from test_int4_linear import DEVICE, problem

TILES = {
    "prefill": Tile(64, 32, 64, num_warps=4, num_stages=2),
    "small steps": Tile(16, 32, 32, num_warps=2, num_stages=2),
    "split": Tile(16, 32, 64, num_warps=2, num_stages=2, split_k=2),
    "chosen": None,
}
# K, columns of padding, groups of a token and of the weights. Half a row holds whole groups: 128, 64, 16, 10, 48, 256.
CASES = [
    (256, 0, 1, 2),
    (320, 64, 1, 5),
    (80, 48, 1, 5),
    (40, 0, 1, 4),
    (144, 48, 1, 3),
    (512, 0, 1, 2),
    (256, 0, 4, 1),
    (320, 64, 5, 1),
    (144, 48, 3, 1),
    (512, 0, 2, 1),
    (256, 0, 4, 2),
    (256, 0, 2, 4),
    (144, 48, 3, 3),
]


def grouped_problem(m, n, k, padding, act_groups, weight_groups, per_token=False, act_bits=4):
    """Random codes with groups, and y in float64; on a token's groups codes are less their zero point."""
    tensors, weight_codes = problem(m, n, k, weight_groups, per_token, padding)
    codes = tensors.pop("x")
    scale, zero_point = tensors.pop("act_scale").view(-1, 1), tensors.pop("act_zero_point").view(-1, 1)
    tensors |= {"codes": codes, "act_scale": scale, "offset": zero_point}
    if act_groups > 1:
        limit = 2**act_bits - 1
        tensors["codes"] = codes = torch.randint(-limit, limit + 1, (m, k), dtype=torch.int8)
        tensors["act_scale"] = scale = torch.rand(m, act_groups) + 0.1
        tensors["offset"], zero_point = None, torch.zeros(m, 1)
    x_hat = (codes - zero_point).double().unflatten(1, (scale.shape[1], -1)) * scale[..., None]
    w_hat = weight_codes.double().unflatten(1, (weight_groups, -1)) * tensors["weight_scale"][..., None]
    return tensors, x_hat.flatten(1) @ w_hat.flatten(1).T + tensors["bias"] + tensors["residual"]


def run(tensors, tile=None):
    """y float32 [M, N]; memory that the kernel does not write is NaN."""
    y = torch.full(tensors["residual"].shape, torch.nan, device=DEVICE)
    on_device = {name: None if value is None else value.to(DEVICE) for name, value in tensors.items()}
    int4_grouped.int4_grouped_linear(**on_device, y=y, tile=tile)
    return y.cpu()


def as_float8(tensors):
    """The same problem with codes in float8 and Σ x̂ of every token, which that product takes."""
    codes, scale = tensors["codes"], tensors["act_scale"]
    sums = (codes.unflatten(1, (scale.shape[1], -1)).sum(-1) * scale).sum(-1)
    return tensors | {"codes": codes.to(torch.float8_e4m3fn), "offset": sums}


def assert_close(y, answer):
    """One float32 addition a group, in another order of roundings."""
    rtol = 32 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(y.double(), answer, rtol=rtol, atol=rtol * answer.abs().max())


@pytest.mark.parametrize("tile", list(TILES))
@pytest.mark.parametrize(("k", "padding", "act_groups", "weight_groups"), CASES)
@pytest.mark.parametrize(("m", "per_token"), [(1, False), (3, True), (70, True)])
def test_groups(k, padding, act_groups, weight_groups, m, per_token, tile):
    tensors, answer = grouped_problem(m, 33, k, padding, act_groups, weight_groups, per_token)
    assert_close(run(tensors, TILES[tile]), answer)
    zero_point = tensors.pop("offset")
    rest = (zero_point, *(tensors[name] for name in ("weight_scale", "weight_sums", "bias", "residual")))
    plain = reference.int4_linear(tensors["codes"], tensors["packed"], tensors["act_scale"], *rest, torch.float32)
    assert_close(plain, answer)


@pytest.mark.skipif(
    DEVICE == "cuda" and torch.cuda.get_device_capability() != (9, 0), reason="float8 products are for sm_90"
)
@pytest.mark.parametrize("tile", list(TILES))
@pytest.mark.parametrize(("k", "padding", "act_groups"), [case[:3] for case in CASES if case[2] > 1 and case[3] == 1])
def test_float8_product(k, padding, act_groups, tile):
    tensors, answer = grouped_problem(70, 33, k, padding, act_groups, 1)
    # |Σ a (w + 8)| is some 8 |Σ a| larger than |Σ a w|, and taken off again: so much more is rounded.
    y = run(as_float8(tensors), TILES[tile]).double()
    tolerance = 32 * torch.finfo(torch.float32).eps * (answer.abs().max() + 8 * 15 * k * tensors["weight_scale"].max())
    assert ((y - answer).abs() <= tolerance).all()


def plain_epilogue(tensors):
    """Scales of one and nothing added: the float output is the integer sum."""
    ones = {name: torch.ones_like(tensors[name]) for name in ("act_scale", "weight_scale")}
    offset = None if tensors["offset"] is None else torch.zeros_like(tensors["offset"])
    return tensors | ones | {"offset": offset, "bias": None, "residual": torch.zeros_like(tensors["residual"])}


@pytest.mark.parametrize("tile", ["prefill", "split"])
@pytest.mark.parametrize("extreme", [False, True])
@pytest.mark.parametrize(("act_groups", "weight_groups"), [(4, 1), (1, 4), (4, 2), (2, 1)])
def test_integer_sums_are_equal(act_groups, weight_groups, extreme, tile):
    tensors, _ = grouped_problem(70, 33, 256, 0, act_groups, weight_groups)
    if extreme:
        largest = 15 if act_groups > 1 else 7
        tensors["codes"][:35], tensors["codes"][35:] = largest, -largest - (act_groups == 1)
        columns = torch.cat([torch.full((17, 256), 7), torch.full((16, 256), -8)]).to(torch.int8)
        tensors |= {"packed": grid.pack_int4(columns), "weight_sums": reference.weight_sums(columns, weight_groups)}
    tensors = plain_epilogue(tensors)
    weight_codes = grid.unpack_int4(tensors["packed"], 256)
    exact = tensors["codes"].long() @ weight_codes.long().T
    assert torch.equal(run(tensors, TILES[tile]).long(), exact)
    if act_groups > 1 and weight_groups == 1 and (DEVICE == "cpu" or torch.cuda.get_device_capability() == (9, 0)):
        assert torch.equal(run(as_float8(tensors), TILES[tile]).long(), exact)


def test_repeated_runs_are_equal():
    tensors, _ = grouped_problem(16, 64, 512, 0, 8, 1)
    first = run(tensors, TILES["split"])
    assert all(torch.equal(first, run(tensors, TILES["split"])) for _ in range(3))


@pytest.mark.parametrize("m", [1, 5, 70])
@pytest.mark.parametrize(("act_groups", "weight_groups"), [(4, 1), (4, 2), (2, 4)])
def test_from_float(m, act_groups, weight_groups):
    tensors, _ = grouped_problem(m, 33, 256, 0, act_groups, weight_groups)
    layer = [tensors[name] for name in ("packed", "weight_scale", "bias", "residual")]
    x = torch.randn(m, 256) * 2 + 1
    on_device = [x.to(DEVICE), act_groups, 4, *(tensor.to(DEVICE) for tensor in layer)]
    expected = reference.token_grouped_int4_linear(x, act_groups, 4, *layer)
    y = int4_grouped.token_grouped_int4_linear(*on_device).cpu()
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5 * expected.abs().max())


def test_weights_with_groups_come_by_the_linear():
    tensors, answer = grouped_problem(3, 33, 256, 0, 1, 4)
    tensors |= {"x": tensors.pop("codes"), "act_zero_point": tensors.pop("offset")}
    on_device = {name: value.to(DEVICE) for name, value in tensors.items()}
    assert_close(int4_linear.int4_linear(**on_device, out_dtype=torch.float32).cpu(), answer)


@pytest.mark.parametrize(
    ("m", "n", "groups", "group_size", "block_k", "split_k"),
    [
        (1024, 4096, 64, 64, 64, 1),
        (1024, 4096, 64, 48, 64, 1),
        (1024, 4096, 32, 96, 32, 1),
        (1024, 4096, 4, 1024, 64, 1),
        (16, 4096, 64, 64, 64, 4),
        (64, 8192, 128, 64, 64, 2),
        (16, 1024, 16, 64, 64, 2),
    ],
)
def test_choice_of_a_tile(m, n, groups, group_size, block_k, split_k):
    tile = int4_grouped.choose_grouped_tile(m, n, groups, group_size)
    assert (tile.block_k, tile.split_k) == (block_k, split_k)
    assert tile.num_stages * block_k * (tile.block_n + 2 * tile.block_m) <= 99 << 10  # the smallest GPUs' memory
