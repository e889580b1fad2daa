"""The packed linear with groups against plain PyTorch: in the interpreter without a GPU, compiled with one."""

import os
import subprocess
import sys

import pytest
import torch
from lit_actreg_kernels import grid, int4_grouped, int4_linear, reference
from lit_actreg_kernels.int4_tile import Tile
from test_int4_linear import DEVICE, problem

TILES = {
    "prefill": Tile(64, 32, 64, num_warps=4, num_stages=2),
    "split": Tile(16, 32, 32, num_warps=2, num_stages=2, split_k=3),
    "chosen": None,
}
# K, columns of padding, groups of a token and of the weights. Half a row holds whole groups: 128, 64, 16, 10, 48, 256;
# or all of them.
CASES = [
    (256, 0, 1, 2),
    (32, 64, 1, 2),
    (32, 64, 2, 1),
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
    tensors |= {"codes": codes, "act_scale": scale, "act_zero_point": zero_point}
    if act_groups > 1:
        limit = 2**act_bits - 1
        tensors["codes"] = codes = torch.randint(-limit, limit + 1, (m, k), dtype=torch.int8)
        tensors["act_scale"] = scale = torch.rand(m, act_groups) + 0.1
        tensors["act_zero_point"], zero_point = None, torch.zeros(m, 1)
    x_hat = (codes - zero_point).double().unflatten(1, (scale.shape[1], -1)) * scale[..., None]
    w_hat = weight_codes.double().unflatten(1, (weight_groups, -1)) * tensors["weight_scale"][..., None]
    return tensors, x_hat.flatten(1) @ w_hat.flatten(1).T + tensors["bias"] + tensors["residual"]


def run(tensors, tile=None):
    """y float32 [M, N]; memory that the kernel does not write is NaN."""
    y = torch.full(tensors["residual"].shape, torch.nan, device=DEVICE)
    on_device = {name: None if value is None else value.to(DEVICE) for name, value in tensors.items()}
    int4_grouped.int4_grouped_linear(**on_device, y=y, tile=tile)
    return y.cpu()


def assert_close(y, answer):
    """One float32 addition a group, in another order of roundings."""
    rtol = 32 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(y.double(), answer, rtol=rtol, atol=rtol * answer.abs().max())


@pytest.mark.parametrize("tile", list(TILES))
@pytest.mark.parametrize(("k", "padding", "act_groups", "weight_groups"), CASES)
@pytest.mark.parametrize(("m", "per_token"), [(3, False), (70, True)])
def test_groups(k, padding, act_groups, weight_groups, m, per_token, tile):
    tensors, answer = grouped_problem(m, 33, k, padding, act_groups, weight_groups, per_token)
    assert_close(run(tensors, TILES[tile]), answer)
    rest = (tensors["act_zero_point"], *(tensors[name] for name in ("weight_scale", "weight_sums", "bias", "residual")))
    plain = reference.int4_linear(tensors["codes"], tensors["packed"], tensors["act_scale"], *rest, torch.float32)
    assert_close(plain, answer)


def plain_epilogue(tensors):
    """Scales of one and nothing added: the float output is the integer sum."""
    ones = {name: torch.ones_like(tensors[name]) for name in ("act_scale", "weight_scale")}
    zero_point = tensors["act_zero_point"]
    zero_point = None if zero_point is None else torch.zeros_like(zero_point)
    nothing = {"bias": None, "residual": torch.zeros_like(tensors["residual"])}
    return tensors | ones | {"act_zero_point": zero_point} | nothing


def large_and_odd(tensors, weight_groups):
    """Sums over 64 columns that need all 14 bits: a from 13 to 15, of one sign a token, and w from 5 to 7."""
    (m, k), n = tensors["codes"].shape, tensors["packed"].shape[0]
    codes = torch.randint(13, 16, (m, k)) * torch.tensor([1, -1]).repeat(m)[:m, None]
    weight_codes = torch.randint(5, 8, (n, k), dtype=torch.int8)
    sums = reference.weight_sums(weight_codes, weight_groups)
    return tensors | {"codes": codes.to(torch.int8), "packed": grid.pack_int4(weight_codes), "weight_sums": sums}


@pytest.mark.parametrize("tile", ["prefill", "split"])
@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize(("act_groups", "weight_groups"), [(4, 1), (1, 4), (4, 2), (2, 1)])
def test_integer_sums_are_equal(act_groups, weight_groups, large, tile):
    tensors, _ = grouped_problem(70, 33, 256, 0, act_groups, weight_groups)
    tensors = plain_epilogue(large_and_odd(tensors, weight_groups) if large else tensors)
    exact = tensors["codes"].long() @ grid.unpack_int4(tensors["packed"], 256).long().T
    assert torch.equal(run(tensors, TILES[tile]).long(), exact)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tokens(dtype):
    tensors, _ = grouped_problem(1, 33, 256, 0, 4, 1)
    layer = [tensors[name].to(DEVICE) for name in ("packed", "weight_scale", "bias")]
    x = torch.empty(0, 256, dtype=dtype, device=DEVICE)
    assert int4_grouped.token_grouped_int4_linear(x, 4, 4, *layer, None).shape == (0, 33)


def test_weights_with_groups_come_by_the_linear():
    tensors, answer = grouped_problem(3, 33, 256, 0, 1, 4)
    tensors |= {"x": tensors.pop("codes")}
    on_device = {name: value.to(DEVICE) for name, value in tensors.items()}
    assert_close(int4_linear.int4_linear(**on_device, out_dtype=torch.float32).cpu(), answer)


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from lit_actreg_kernels.int4_grouped import choose_grouped_tile, grouped_kernel
tile = choose_grouped_tile(4096, 4096, 64, 64)
constants = dict(GROUP=64, ACT_GROUP=64, WEIGHT_GROUP=0, PER_TOKEN=True, HAS_BIAS=False, HAS_RESIDUAL=False)
constants |= dict(EVEN_K=True, SPLIT_K=1, ASM=True, GROUP_M=8, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n)
constants |= dict(BLOCK_K=tile.block_k) | dict.fromkeys(["act_zero_point_ptr", "weight_sums_ptr", "bias_ptr"])
constants |= dict.fromkeys(["residual_ptr", "partial_ptr", "ticket_ptr"])
names = grouped_kernel.arg_names
types = dict.fromkeys("MNKP", "i32") | dict(codes_ptr="*i8", packed_ptr="*u8", y_ptr="*bf16")
signature = {name: "constexpr" if name in constants else types.get(name, "*fp32") for name in names}
aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name not in constants}
source = ASTSource(grouped_kernel, signature, {(names.index(n),): v for n, v in constants.items()}, aligned)
options = dict(num_warps=tile.num_warps, num_stages=tile.num_stages)
ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
waits, conversions = ptx.count("cp.async.wait_group"), ptx.count("cvt.rn.f32.s32")
print("wgmma", ptx.count("wgmma.mma_async"), "ahead", waits > 1, "cvt", conversions)
"""


def test_compiles_for_sm_90_with_loads_ahead(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    # Two nibbles, 64 outputs and 32 columns a wgmma; an int32 is made a float twice for each of a thread's 64 outputs.
    assert result.stdout.splitlines() == ["wgmma 8 ahead True cvt 128"]


@pytest.mark.parametrize(
    ("m", "n", "groups", "group_size", "block_k", "split_k"),
    [
        (1024, 4096, 64, 64, 64, 1),
        (1024, 4096, 64, 48, 64, 1),
        (1024, 4096, 32, 96, 32, 1),
        (1024, 4096, 4, 1024, 64, 1),
        (16, 4096, 64, 64, 64, 4),
        (64, 8192, 128, 64, 64, 2),
        (16, 1024, 16, 64, 64, 1),
    ],
)
def test_choice_of_a_tile(m, n, groups, group_size, block_k, split_k):
    tile = int4_grouped.choose_grouped_tile(m, n, groups, group_size)
    assert (tile.block_k, tile.split_k) == (block_k, split_k)
    assert tile.num_stages * block_k * (tile.block_n + 2 * tile.block_m) <= 99 << 10  # the smallest GPUs' memory
