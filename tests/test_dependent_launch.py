"""Kernels that start before their input is there touch no memory before they wait: seen in their PTX for sm_90.

Dependent launch itself needs such a GPU, where every test of these kernels runs with it.
"""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from lit_actreg_kernels import dependent_launch

COMPILE = """
import json
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from lit_actreg_kernels import act_quant, gelu_quant, int4_gemv, int4_linear, norm_quant

def compile(kernel, types, constants):
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "*fp32") for name in names}
    divisible = [i for i, name in enumerate(names) if signature[name][0] == "*" or name in "NKPW"]
    attributes = {(i,): [["tt.divisibility", 16]] for i in divisible if names[i] not in constants}
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, values, attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"launch_pdl": True}).asm["ptx"]

q = dict(Q_MIN=-8, Q_MAX=7, PDL=True)
no = dict(HAS_BIAS=False, HAS_RESIDUAL=False)
codes = dict(x_ptr="*i8", codes_ptr="*i8", packed_ptr="*u8", y_ptr="*bf16", weight_sums_ptr="*i32")
sizes = dict.fromkeys("MNKPWGH", "i32") | {"num": "i32", "eps": "fp32"}
float_in = dict(x_ptr="*bf16", q_ptr="*i8")
block = dict(BLOCK_M=16, BLOCK_N=32, BLOCK_K=128, ASM=True, PDL=True, PER_TOKEN=False)
kernels = {
    "static": (act_quant._static_kernel, float_in, dict(q, BLOCK=2048)),
    "per_token": (act_quant._per_token_kernel, float_in, dict(q, BLOCK_K=4096, ONE_BLOCK=True)),
    "norm": (norm_quant._norm_kernel, float_in, dict(q, RMS=True, HAS_BIAS=False, BLOCK_K=4096)),
    "gelu": (gelu_quant._activation_kernel, float_in, dict(q, GATED=False, BLOCK=1024)),
    "gemv": (
        int4_gemv._gemv_kernel, codes | {"x_ptr": "*bf16", "packed_ptr": "*i32"},
        dict(q, **no, QUANTIZE=True, ASM=True, BLOCK_N=8, BLOCK_W=512, STAGES=3, SECTORS=64),
    ),
    "linear": (
        int4_linear._linear_kernel, codes, dict(block, **no, EVEN_K=True, SPLIT_K=1, SECTORS=64, GROUP_M=8)
    ),
    "reduce": (
        int4_linear._reduce_kernel, dict(partial_ptr="*i32", y_ptr="*bf16", weight_sums_ptr="*i32"),
        dict(no, PER_TOKEN=False, SPLIT_K=2, PDL=True, BLOCK_N=128),
    ),
    "grouped": (int4_linear._grouped_kernel, codes, dict(block, **no, GROUP=128, ALIGNED=True)),
}
print(json.dumps({name: compile(kernel, sizes | types, values) for name, (kernel, types, values) in kernels.items()}))
"""
KERNELS = ["static", "per_token", "norm", "gelu", "gemv", "linear", "reduce", "grouped"]


@pytest.fixture(scope="module")
def ptx(tmp_path_factory):
    """The kernels' PTX; from another process, because here they may be interpreted."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    result = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout)


@pytest.mark.parametrize("name", KERNELS)
def test_nothing_is_read_or_written_before_the_wait(name, ptx):
    before, wait, after = ptx[name].partition("griddepcontrol.wait")
    assert wait
    assert "griddepcontrol.launch_dependents" in before
    assert not re.search(r"ld\.global|st\.global|cp\.async|atom\.|red\.", before)
    assert re.search(r"ld\.global|cp\.async", after)
    assert ("prefetch.global.L2" in before) == (name in ("gemv", "linear"))
    if name == "gemv":  # words of 16 bytes a thread, and no tensor core
        assert re.search(r"cp\.async\.cg\.shared\.global .*0x10", after)
        assert "dp4a" in after
        assert "mma" not in after


def test_off_without_such_a_gpu(monkeypatch):
    supports = dependent_launch.supports_dependent_launch
    supports.cache_clear()
    assert not supports(torch.device("cpu"))
    monkeypatch.setattr(dependent_launch, "INTERPRETED", False)
    for capability, switch, expected in [((8, 0), "1", False), ((9, 0), "1", True), ((9, 0), "0", False)]:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        monkeypatch.setenv("LIT_ACTREG_PDL", switch)
        supports.cache_clear()
        assert supports(torch.device("cuda")) == expected
    supports.cache_clear()
