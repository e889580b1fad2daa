"""What the tests of the fused training kernels share: inputs, the formula in float64 autograd, how close is close, and
how many programs of a backward pass run at once.

The truth is :func:`formula` in float64: the grid of ``kernels/grid.py`` and a straight-through estimator whose clip
gradients autograd finds, independent of the operators' written-out backward.

Without a GPU the kernels run in Triton's interpreter, which truncates to bfloat16 instead of rounding: one unit in the
last place, ``eps``, where half of one is right. Outputs start as NaN (:func:`poison`), so what a kernel forgets shows.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from lit_actreg_kernels.grid import code_range, grid_from_clips
from quantizer_checks import DEVICE
from torch import Tensor

GRIDS = [(4, True, True), (4, False, True), (3, True, False), (8, False, False)]  # bits, integer zero point, masked
CLIPS = (-1.7, 2.2)  # no value of few bits is half way between two codes


def formula(x: Tensor, low: Tensor, high: Tensor, bits: int, integer: bool, masked: bool) -> Tensor:
    """x̂ whose gradient autograd derives: the clipped value plus a step times the frozen rounding residual."""
    q_min, q_max = code_range(bits)
    with torch.no_grad():
        scale, zero_point = grid_from_clips(low, high, bits, integer)
        u = (x / scale + zero_point).clamp(q_min, q_max)
        residual = u.round() - u
    low_end = (q_min - zero_point) * scale + low - low.detach()
    high_end = (q_max - zero_point) * scale + high - high.detach()
    clipped = torch.where(x >= high_end, high_end, torch.where(x <= low_end, low_end, x))
    if not masked:
        outside = (x >= high_end) | (x <= low_end)
        clipped = clipped + torch.where(outside, x - x.detach(), 0.0)
    step = scale + (high - high.detach() - low + low.detach()) / (q_max - q_min)
    return clipped + step * residual


def clips(dtype: torch.dtype = torch.float32, device: str = DEVICE) -> tuple[Tensor, Tensor]:
    low, high = (torch.tensor([c], dtype=dtype, device=device) for c in CLIPS)
    return low, high


def doubled(*tensors: Tensor | None) -> list[Tensor | None]:
    """The same values as float64 leaves on the CPU."""
    return [None if t is None else t.detach().cpu().double().requires_grad_() for t in tensors]


def assert_near(found: Tensor, expected: Tensor, dtype: torch.dtype, roundings: float = 8) -> None:
    """Relative to the whole tensor's norm, within some float32 roundings and one rounding to ``dtype``.

    A norm, because single elements next to a rounding edge may take the other code, which is no error.
    """
    tolerance = roundings * torch.finfo(torch.float32).eps + torch.finfo(dtype).eps
    difference = (found.detach().cpu().double() - expected.double()).norm()
    assert difference <= tolerance * expected.double().norm(), (difference / expected.norm(), tolerance)


def assert_sum_near(found: Tensor, expected: Tensor, terms: Tensor, dtype: torch.dtype, bits: int) -> None:
    """A sum of ``terms``, each with a rounding of float32 and of the values' dtype.

    One term in a grid of 8 bits may take the other code, where float32 has 2^-17 of a step left: δ turns its sign.
    """
    tolerance = (8 * torch.finfo(torch.float32).eps + torch.finfo(dtype).eps) * terms.double().norm() * 4
    flip = terms.double().abs().max() / 255 if bits == 8 else 0.0
    assert (found.cpu().double() - expected).abs().max() <= tolerance + flip, (found, expected, tolerance)


def as_stored(x: Tensor, dtype: torch.dtype) -> Tensor:
    """float64 x rounded to ``dtype`` as the kernels do it here; its gradient passes unchanged."""
    stored = x.detach().to(dtype)
    if dtype == torch.bfloat16 and DEVICE == "cpu":
        stored = (x.detach().float().view(torch.int32) & -65536).view(torch.float32)
    return x + (stored.double() - x.detach())


def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on torch.empty_like and Tensor.new_empty give NaN, or of integers a number that is none of ours."""

    def fill(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def filled(*args: Any, **kwargs: Any) -> Tensor:
            found = function(*args, **kwargs)
            return found.fill_(float("nan") if found.is_floating_point() else 77)

        return filled

    monkeypatch.setattr(torch, "empty_like", fill(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", fill(torch.Tensor.new_empty))


def few_programs(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> None:
    """From here on a backward pass of the module has three programs or one a tile of a row: each walks over several."""
    monkeypatch.setattr(module, "programs_for", lambda *_: 3)


COMPILE = """
import importlib, json, subprocess, sys, tempfile, triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
module, types, variants, num_warps = json.loads(sys.argv[1])
kernel = importlib.import_module(f"lit_actreg_kernels.{module}")._backward_kernel
for variant in variants:
    constants = {n: getattr(tl, value) if isinstance(value, str) else value for n, value in variant.items()}
    signature = {n: "constexpr" if n in constants else types.get(n, "*fp32") for n in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names) if n not in constants}
    source = ASTSource(kernel, signature, constants, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps})
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(compiled.asm["ptx"])
        file.flush()
        command = [get_ptxas(90).path, "-arch=sm_90a", "-v", file.name, "-o", "/dev/null"]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    print(said.partition("Used ")[2].partition(" registers")[0], compiled.metadata.shared)
"""


def resources(module: str, types: dict, variants: list[dict], num_warps: int, cache: Path) -> list[tuple[int, int]]:
    """Registers a thread and bytes of shared memory a program of a module's ``_backward_kernel`` on sm_90.

    Args:
        types: Triton's of the arguments that are no float32 pointers.
        variants: Values of the constants; dtypes by name.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE, json.dumps([module, types, variants, num_warps])]
    environment |= {"TRITON_CACHE_DIR": str(cache)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    numbers = [int(word) for word in result.stdout.split()]
    assert len(numbers) == 2 * len(variants)
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def programs_at_once(*arguments: Any) -> list[int]:
    """For how many programs a multiprocessor of sm_90 has registers, 65,536; the arguments of :func:`resources`.

    One more than run at once is a second wave, and up to twice the time.
    """
    num_warps = arguments[3]  # a thread has a multiple of 8 registers
    return [65536 // (32 * num_warps * (-(-num // 8) * 8)) for num, _ in resources(*arguments)]
