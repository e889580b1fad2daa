"""What both Gluon kernels are held to: compiled for sm_90 everywhere, their answers checked where there is such a GPU.

Gluon has no interpreter, so without a GPU the test is that the compiler keeps the pipeline: ptxas says (C75..) when it
has to wait after every `wgmma`, and spilled registers would show as local memory.
"""

import json
import os
import subprocess
import sys

import pytest
import torch
from lit_actreg_kernels import grid, int4_linear, reference

on_hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
needs_hopper = pytest.mark.skipif(not on_hopper, reason="needs a GPU of compute capability 9.0")

COMPILE = """
import subprocess, tempfile, triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.experimental.gluon._runtime import GluonASTSource
from lit_actreg_kernels.{module} import _kernel, operand_layout
block_m, block_n, block_k, num_warps, num_stages = {tile}
layout = operand_layout(block_k)
constants = dict(PER_TOKEN={per_token}, HAS_BIAS=True, HAS_RESIDUAL={residual}, {more})
constants |= dict(STAGES=num_stages, num_warps=num_warps)
codes, packed = f"i8[{{block_m}}, {{block_k}}]", f"u8[{{block_n}}, {{block_k}}]"
types = dict(codes_desc=f"tensordesc<{{codes}},{{layout!r}}>", packed_desc=f"tensordesc<{{packed}},{{layout!r}}>")
types |= dict.fromkeys(["y_ptr", "residual_ptr"], "*{dtype}") | dict.fromkeys("MNP", "i32")
types |= dict.fromkeys(["weight_sums_ptr", "partial_ptr", "ticket_ptr"], "*i32")
signature = {{n: "constexpr" if n in constants else types.get(n, "*fp32") for n in _kernel.arg_names}}
source = GluonASTSource(_kernel, signature, constants, {{}})
compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={{"num_warps": num_warps}})
ptx = compiled.asm["ptx"]
ptxas = get_ptxas(90).path
with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
    file.write(ptx)
    file.flush()
    subprocess.run([ptxas, "-arch=sm_90a", "-v", file.name, "-o", "/dev/null"], check=True)
before, wait, _ = ptx.partition("griddepcontrol.wait")
print([ptx.count("wgmma.mma_async"), before.count("cp.async.bulk") if wait else 0, compiled.metadata.shared])
"""


def check_compiles(cache, module, tile, more, counts, residual=False, dtype="bf16", per_token=False, programs=1):
    """Neither waits nor spills, and so many programs fit into a multiprocessor's shared memory.

    ``counts``: of `wgmma`, and of what is asked for before `griddepcontrol.wait`.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache)}
    code = COMPILE.format(module=module, tile=tile, more=more, residual=residual, dtype=dtype, per_token=per_token)
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    *found, shared = json.loads(result.stdout.splitlines()[-1])
    assert found == counts
    assert programs * (shared + 1024) <= 228 << 10  # 1 KB of each is the system's
    assert "C75" not in result.stderr
    assert "0 bytes spill stores, 0 bytes spill loads" in result.stderr


def problem(m, n, k):
    weight_codes = torch.randint(-8, 8, (n, k), dtype=torch.int8)
    codes = torch.randint(-8, 8, (m, k), dtype=torch.int8)
    packed = grid.pack_int4(torch.nn.functional.pad(weight_codes, (0, -k % 32)))
    return codes, packed, reference.weight_sums(weight_codes, 1), weight_codes


def check_integers(tile, m, n, k):
    codes, packed, sums, weight_codes = problem(m, n, k)
    unit = torch.ones(1), torch.zeros(1), torch.ones(n, 1), sums
    arguments = [tensor.cuda() for tensor in (codes, packed, *unit)]
    runs = [int4_linear.int4_linear(*arguments, None, None, torch.float32, tile=tile).cpu() for _ in range(5)]
    expected = (codes.double() @ weight_codes.double().T).float()
    assert all(torch.equal(run, expected) for run in runs)


def check_epilogue(tile, m, dtype, per_token):
    n, k = 260, 512
    codes, packed, sums, _ = problem(m, n, k)
    shape = (m, 1) if per_token else (1,)
    act_scale, zero_point = torch.rand(shape) + 0.1, torch.randint(-8, 8, shape) + 0.25
    epilogue = (act_scale, zero_point, torch.rand(n, 1) + 0.1, sums, torch.randn(n), torch.randn(m, n))
    expected = reference.int4_linear(codes, packed, *epilogue, torch.float32)
    arguments = [tensor.cuda() for tensor in (codes, packed, *epilogue)]
    y = int4_linear.int4_linear(*arguments, dtype, tile=tile).cpu()
    # Float32 roundings in another order on terms of up to the largest output's size, then one rounding to dtype.
    eps32, eps = 32 * torch.finfo(torch.float32).eps, torch.finfo(dtype).eps
    torch.testing.assert_close(y.float(), expected, rtol=max(eps, eps32), atol=eps32 * expected.abs().max().item())
