"""Kernels that start early touch nothing before their wait: read off the PTX everywhere, and run where it counts."""

import json
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from lit_actreg_kernels import dependent_launch, grid, ops, reference
from lit_actreg_kernels.int4_linear import int4_linear

on_hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
needs_hopper = pytest.mark.skipif(not on_hopper, reason="needs a GPU of compute capability 9.0")

COMPILE = """
import json, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from lit_actreg_kernels.act_quant import _per_token_kernel, _static_kernel
from lit_actreg_kernels.gelu_quant import _activation_kernel
from lit_actreg_kernels.norm_quant import _norm_kernel
types = {"x_ptr": "*bf16", "q_ptr": "*i8", "num": "i32", "K": "i32", "H": "i32", "eps": "fp32"}
grid = dict(Q_MIN=-8, Q_MAX=7, DEPENDENT=True)
found = []
for kernel, constants in (
    (_static_kernel, dict(BLOCK=1024)),
    (_per_token_kernel, dict(BLOCK_K=2048, ONE_BLOCK=True)),
    (_norm_kernel, dict(RMS=False, HAS_BIAS=True, BLOCK_K=2048)),
    (_activation_kernel, dict(GATED=True, BLOCK=1024)),
):
    constants |= grid
    signature = {n: "constexpr" if n in constants else types.get(n, "*fp32") for n in kernel.arg_names}
    source = ASTSource(kernel, signature, constants)
    found.append(triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"launch_pdl": True}).asm["ptx"])
print(json.dumps(found))
"""


def test_quantizers_read_and_write_nothing_before_they_wait(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    kernels = json.loads(result.stdout)
    assert len(kernels) == 4
    for ptx in kernels:
        before, _, after = ptx.partition("griddepcontrol.wait")
        assert "griddepcontrol.launch_dependents" in before
        assert "ld.global" not in before
        assert "st.global" not in before
        assert "ld.global" in after
        assert "st.global" in after


def test_launch_options_are_for_few_tokens_on_one_kind_of_gpu(monkeypatch):
    monkeypatch.setattr(dependent_launch, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    dependent_launch.has_dependent_launch.cache_clear()
    options = dependent_launch.launch_options
    assert options(torch.device("cuda"), 64) == {"DEPENDENT": True, "launch_pdl": True}
    assert options(torch.device("cuda"), 65) == {"DEPENDENT": False}
    assert options(torch.device("cpu"), 1) == {"DEPENDENT": False}
    dependent_launch.has_dependent_launch.cache_clear()


def replay_as_one_after_another(run: Callable[[Callable[[], None]], torch.Tensor]) -> torch.Tensor:
    """The result of ``run``, which calls what it is given between its kernels: a wait, then, in a graph, nothing."""
    expected = run(torch.cuda.synchronize)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run(lambda: None)
    for _ in range(20):
        found.zero_()
        graph.replay()
        assert torch.equal(found, expected)
    return expected


@needs_hopper
@pytest.mark.parametrize("num_tokens", [5, 16, 40])
@pytest.mark.parametrize("kind", ["static", "per token", "norm", "gelu"])
def test_a_chain_is_a_chain(kind, num_tokens):
    """A hundred times quantizer and product, replayed as a graph with nothing between: as one after the other.

    Buffers are used again and again, and K is split. Behind norms every product also adds the one before.
    """
    width, torch_device = 4096, torch.device("cuda")
    codes = torch.randint(-7, 8, (width, width), dtype=torch.int8)  # of mean 0: a mean would grow sixfold a layer
    packed, sums = grid.pack_int4(codes).to(torch_device), reference.weight_sums(codes, 1).to(torch_device)
    scale = torch.full((width, 1), 0.35 / width**0.5, device=torch_device)
    static = torch.tensor([0.25], device=torch_device), torch.tensor([0.5], device=torch_device)
    weight, bias = torch.ones(width, device=torch_device), torch.zeros(width, device=torch_device)
    start = torch.randn(num_tokens, width, device=torch_device)

    def layer(x):
        act_grid = static
        if kind == "static":
            q = ops.quantize_activation(x, *static, 4)
        elif kind == "per token":
            q, *act_grid = ops.quantize_activation_per_token(x, 4)
        elif kind == "norm":
            q = ops.norm_quantize(x, weight, bias, 1e-5, False, *static, 4)
        else:
            q = ops.gelu_quantize(x, *static, 4)
        residual = x if kind == "norm" else None
        return int4_linear(q, packed, *act_grid, scale, sums, None, residual, torch.float32)

    def run(after_each):
        x = start.clone()
        for _ in range(100):
            x = layer(x)
            after_each()
        return x

    assert replay_as_one_after_another(run).std() > 0.05


@needs_hopper
def test_one_long_token_waits_for_its_own_grid():
    """Longer than the kernel of one token takes; tokens of many sizes, so that another's grid would show."""
    num_columns, num_outputs, torch_device = 40960, 64, torch.device("cuda")
    codes = torch.randint(-8, 8, (num_outputs, num_columns), dtype=torch.int8)
    packed, sums = grid.pack_int4(codes).to(torch_device), reference.weight_sums(codes, 1).to(torch_device)
    scale = torch.rand(num_outputs, 1, device=torch_device)
    tokens = torch.randn(50, 1, num_columns, device=torch_device) * torch.logspace(-3, 3, 50)[:, None, None].cuda()

    def run(after_each):
        found = []
        for token in tokens:
            quantized = ops.quantize_activation_per_token(token, 4)
            after_each()
            found.append(int4_linear(quantized[0], packed, *quantized[1:], scale, sums, None, None, torch.float32))
        return torch.cat(found)

    replay_as_one_after_another(run)
