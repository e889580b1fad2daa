"""Checks candidates, compiles them on all cores, and times them fairly: what the kernel benchmarks stand on.

Every candidate is captured in a CUDA graph of one call for each of several copies of weights and inputs, together
larger than the 50 MB of L2, so that weights come from memory as they do in a model. Graphs are replayed in turn, round
by round, so that clocks and heat are shared; a figure is the median over rounds of a replay's time per call, the spread
is from the 10th to the 90th percentile, and a speed-up is a ratio of medians of one run.

Ceilings measured in the same run turn bytes and operations into a floor: device-to-device copies (bytes read and
written), and large matrix products. A kernel that does nothing shows what one launch inside a graph costs.
"""

import multiprocessing
import os
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.errors import TritonError


@dataclass
class Candidate:
    """A way to compute a row: what to call, and the output to expect (None: a baseline in other arithmetic)."""

    name: str
    call: Callable[[Any], Tensor]
    expect: Callable[[Any], Tensor] | None = None


@dataclass
class Timing:
    name: str
    median: float  # µs a call
    low: float  # 10th and 90th percentile
    high: float


class CheckFailed(Exception):
    """A candidate's output is not the reference's."""


def check(candidate: Candidate, problem: Any) -> None:
    """Raises unless the candidate's output is the reference's, within one rounding to its dtype (integers: equal)."""
    if candidate.expect is None:
        return
    output, expected = candidate.call(problem), candidate.expect(problem)
    if output.dtype == torch.int32:
        passed = torch.equal(output, expected)
    else:
        # One unit in the last place of the dtype; sums that cancel are measured against the typical size of an output.
        eps = torch.finfo(output.dtype).eps
        bound = eps * (expected.float().abs() + 1e-3 * expected.float().std())
        passed = bool(((output.float() - expected.float()).abs() <= bound).all())
    if not passed:
        worst = (output.double() - expected.double()).abs().max().item()
        raise CheckFailed(f"{candidate.name} differs from the reference by up to {worst:.4g} at {tuple(output.shape)}")


def usable(candidate: Candidate, problem: Any) -> Candidate | None:
    """The candidate; None, with a note, where its tile does not fit the GPU or its check fails."""
    try:
        check(candidate, problem)
    except (CheckFailed, TritonError, RuntimeError) as error:  # a compiler pass that fails is a RuntimeError
        print(f"skipped {candidate.name}: {str(error)[-200:]}")
        return None
    return candidate


def capture(candidate: Candidate, problems: Sequence[Any]) -> torch.cuda.CUDAGraph:
    for problem in problems[:2]:
        candidate.call(problem)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for problem in problems:
            candidate.call(problem)
    return graph


def measure(candidates: Sequence[Candidate], problems: Sequence[Any], rounds: int) -> list[Timing]:
    """Median and spread of every candidate, replayed in turn."""
    graphs = [capture(candidate, problems) for candidate in candidates]
    events = [[(torch.cuda.Event(True), torch.cuda.Event(True)) for _ in range(rounds)] for _ in graphs]
    for graph in graphs:
        graph.replay()
    for turn in range(rounds):
        for graph, pairs in zip(graphs, events, strict=True):
            pairs[turn][0].record()
            graph.replay()
            pairs[turn][1].record()
    torch.cuda.synchronize()
    timings = []
    for candidate, pairs in zip(candidates, events, strict=True):
        times = sorted(1000 * start.elapsed_time(end) / len(problems) for start, end in pairs)
        low, high = times[len(times) // 10], times[-1 - len(times) // 10]
        timings.append(Timing(candidate.name, statistics.median(times), low, high))
    return timings


def has_gpu() -> bool:
    """Asked in another process, because one that has touched CUDA cannot fork workers that use it."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool:
        return pool.submit(torch.cuda.is_available).result()


def compile_in_parallel(work: Callable[[Any], None], items: Sequence[Any]) -> None:
    """Fills Triton's cache on disk: ``work`` calls what an item names, in forked processes. Before any use of CUDA."""
    processes = max(1, min(16, (os.cpu_count() or 1) - 1, len(items)))
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("fork")) as pool:
        try:
            for item, error in zip(items, pool.map(_Quiet(work), items, chunksize=1), strict=True):
                if error:
                    print(f"not compiled ahead: {item}: {error}")
        except BrokenProcessPool as error:
            print(f"compiling in this process what is missing: {error}")


@dataclass
class _Quiet:
    """Calls ``work``; an error is returned as text. A candidate that fails is reported when its turn comes."""

    work: Callable[[Any], None]

    def __call__(self, item: Any) -> str | None:
        try:
            self.work(item)
            torch.cuda.synchronize()
        except Exception as error:
            return f"{type(error).__name__} {str(error)[-150:]}"
        return None


@triton.jit
def _nothing_kernel(x_ptr):
    pass


@dataclass
class Ceilings:
    """What this GPU gave in this run."""

    copy: float  # bytes a µs, read and written
    int8: float  # integer operations a µs, from the fastest product of 8192³ that was timed
    launch: float  # µs a kernel of 132 empty programs in a CUDA graph

    def floor(self, num_bytes: float, operations: float) -> float:
        """µs below which nothing can go on this GPU; the launch comes on top."""
        return max(num_bytes / self.copy, operations / self.int8)


def measure_ceilings(int8_product_8192: Callable[[], Tensor]) -> Ceilings:
    source, target = (torch.empty(1 << 30, dtype=torch.uint8, device="cuda") for _ in range(2))
    source.random_()

    def nothing(problem: None) -> Tensor:
        for _ in range(20):
            _nothing_kernel[(132,)](source)
        return source

    candidates = [
        Candidate("copy", lambda _: target.copy_(source)),
        Candidate("int8", lambda _: int8_product_8192()),
        Candidate("launch", nothing),
    ]
    copy, int8, launch = (timing.median for timing in measure(candidates, [None], rounds=10))
    return Ceilings(2 * (1 << 30) / copy, 2 * 8192**3 / int8, launch / 20)
