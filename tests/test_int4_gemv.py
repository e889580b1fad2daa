"""The product of one token against plain PyTorch: in the interpreter without a GPU, compiled with one."""

import json
import os
import subprocess
import sys

import pytest
import torch
from lit_actreg_kernels import dependent_launch, grid, int4_gemv, int4_linear, reference
from lit_actreg_kernels.int4_gemv import GemvTile

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TILES = [GemvTile(8, 4), GemvTile(4, 8)]

COMPILE = """
import json, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from lit_actreg_kernels.int4_gemv import _gemv_kernel

def ptx(**constants):
    constants |= dict(HAS_BIAS=False, HAS_RESIDUAL=True, QUANTIZE=True, Q_MIN=-8, Q_MAX=7, ASM=True, BLOCK_W=512)
    constants |= dict.fromkeys(("NORM", "RMS", "HAS_NORM_BIAS", "ACTIVATION", "GATED"), False)
    constants |= dict(OUT_MIN=-8, OUT_MAX=7, norm_weight_ptr=None, norm_bias_ptr=None, out_scale_ptr=None)
    constants |= dict(out_zero_point_ptr=None, bias_ptr=None)
    types = dict(x_ptr="*bf16", packed_ptr="*i32", y_ptr="*bf16", weight_sums_ptr="*i32", residual_ptr="*bf16")
    types |= dict.fromkeys("NKW", "i32")
    names = _gemv_kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "*fp32") for name in names}
    divisible = [i for i, name in enumerate(names) if name not in constants]
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(_gemv_kernel, signature, values, {(i,): [["tt.divisibility", 16]] for i in divisible})
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8}).asm["ptx"]

print(json.dumps([ptx(BLOCK_N=16, DEPENDENT=dependent) for dependent in (False, True)]))
"""


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fills every torch.empty with NaN or the largest integer: what a kernel fails to write is seen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def problem(n, k, padding):
    """Weight codes and what the linear takes besides x; rows padded to the 16 bytes the kernel asks for, and more."""
    weight_codes = torch.randint(-8, 8, (n, k), dtype=torch.int8)
    padded = torch.nn.functional.pad(weight_codes, (0, -k % 32 + padding))
    weight = (torch.rand(n, 1) + 0.1, reference.weight_sums(weight_codes, 1))
    return weight_codes, (grid.pack_int4(padded), torch.tensor([0.3]), torch.tensor([-2.0]), *weight)


def run(x, layer, bias, residual, out_dtype, tile, act_bits=4):
    arguments = [None if tensor is None else tensor.to(DEVICE) for tensor in (x, *layer, bias, residual)]
    return int4_linear.int4_linear(*arguments, out_dtype, act_bits=act_bits, tile=tile).cpu()


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (33, 77), (65, 256), (31, 130), (100, 510)])
@pytest.mark.parametrize("padding", [0, 32, 128])
def test_integer_accumulators_are_equal(tile, n, k, padding):
    weight_codes, (packed, *_, sums) = problem(n, k, padding)
    codes = torch.randint(-128, 128, (1, k), dtype=torch.int8)
    unit = (packed, torch.ones(1), torch.zeros(1), torch.ones(n, 1), sums)
    acc = run(codes, unit, None, None, torch.float32, tile)
    assert torch.equal(acc.long(), codes.long() @ weight_codes.long().T)


@pytest.mark.parametrize("tile", TILES)
def test_extreme_codes_do_not_overflow(tile):
    k = 8192  # 16 · 8 · 128 · 8192 needs 28 bits
    packed = grid.pack_int4(torch.full((3, k), -8, dtype=torch.int8))
    layer = (packed, torch.ones(1), torch.zeros(1), torch.ones(3, 1), torch.zeros(3, 1, dtype=torch.int32))
    codes = torch.full((1, k), -128, dtype=torch.int8)
    assert (run(codes, layer, None, None, torch.float32, tile) == 1024 * k).all()


@pytest.mark.parametrize("act_bits", [4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile", TILES)
def test_quantizing_inside_changes_nothing(tile, dtype, act_bits):
    _, layer = problem(40, 300, 0)
    x = (torch.randn(1, 300) * 2).to(dtype)
    # Ties between two codes too: odd multiples of half a step.
    x[0, :16] = ((torch.arange(16) - 8 + 0.5) * 0.3).to(dtype)
    codes = reference.quantize_activation(x, layer[1], layer[2], act_bits)
    inside = run(x, layer, None, None, torch.float32, tile, act_bits)
    assert torch.equal(inside, run(codes, layer, None, None, torch.float32, tile))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("extras", [False, True])
def test_epilogue(dtype, extras):
    weight_codes, layer = problem(70, 150, 0)
    layer = (layer[0], layer[1], layer[2] + 0.25, *layer[3:])  # a real zero point
    bias, residual = (torch.randn(70), torch.randn(1, 70).to(dtype)) if extras else (None, None)
    codes = torch.randint(-8, 8, (1, 150), dtype=torch.int8)
    expected = reference.int4_linear(codes, *layer, bias, residual, torch.float32)
    # At most 4 float32 roundings, each half a unit of the terms' magnitude; then one to the output's dtype.
    products = (codes.double() @ weight_codes.double().T).abs() + (layer[2] * layer[4].flatten()).abs()
    terms = products * (layer[1] * layer[3].flatten()) + (bias.abs() + residual.abs().double() if extras else 0)
    tolerance = 4 * 2**-24 * terms + (0 if dtype == torch.float32 else torch.finfo(dtype).eps * expected.abs())
    y = run(codes, layer, bias, residual, dtype, None)
    assert y.dtype == dtype
    assert ((y.double() - expected).abs() <= tolerance).all()


def test_repeated_runs_are_equal():
    _, layer = problem(64, 512, 0)
    x = torch.randn(1, 512)
    first = run(x, layer, None, None, torch.float32, TILES[0])
    assert all(torch.equal(first, run(x, layer, None, None, torch.float32, TILES[0])) for _ in range(3))


def test_serves_one_token_in_aligned_rows():
    packed = torch.zeros(4, 64, dtype=torch.uint8)
    assert int4_gemv.serves(1, packed, 1)
    assert not int4_gemv.serves(2, packed, 1)
    assert not int4_gemv.serves(1, packed, 2)
    assert not int4_gemv.serves(1, torch.zeros(4, 40, dtype=torch.uint8), 1)
    assert not int4_gemv.serves(1, torch.zeros(1, 4 * int4_gemv.MAX_WORDS + 16, dtype=torch.uint8), 1)


@pytest.mark.parametrize("num_bytes", [16, 512, 2048, 4096, 5504, 16384])
@pytest.mark.parametrize(("quantizes", "step"), [(False, 8192), (True, 32768)])
def test_a_program_has_its_share_of_weights(num_bytes, quantizes, step):
    tile = int4_gemv.choose_gemv_tile(torch.empty(3, num_bytes, dtype=torch.uint8), quantizes)
    assert tile.block_n in (1, 16) or step // 2 < tile.block_n * num_bytes <= step
    assert not tile.dependent


def test_dependent_launch_is_for_small_weights_on_one_kind_of_gpu(monkeypatch):
    monkeypatch.setattr(dependent_launch, "INTERPRETED", False)
    device = torch.device("cuda")
    for capability in [(8, 0), (9, 0), (10, 0)]:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        dependent_launch.has_dependent_launch.cache_clear()
        on_hopper = capability == (9, 0)
        found = [int4_gemv.launches_dependent(device, n * k // 2) for n, k in ((4096, 4096), (11008, 4096))]
        assert found == [on_hopper, False]
    dependent_launch.has_dependent_launch.cache_clear()
    assert not int4_gemv.launches_dependent(torch.device("cpu"), 0)


def test_weights_are_on_their_way_before_the_token_is_quantized(tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    for found, border in zip(json.loads(result.stdout), ("div.rn.f32", "griddepcontrol.wait"), strict=True):
        assert "mma" not in found
        loads, _, rest = found.partition(border)
        assert loads.count("ld.global.v4.b32") == 8  # 16 rows of 2 KiB, 16 bytes a thread of 256
        assert "ld.global.v4" not in rest
        assert "dp4a" in rest
