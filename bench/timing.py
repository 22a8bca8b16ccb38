"""How everything is timed: warm, contenders taking turns, medians of rounds; and what the machine can do at best.

A round of a contender is as many calls as fill a millisecond. Rounds take turns, there and back, so that a machine that
slows down slows all contenders alike, and a ratio is the median of the ratios within a round. On CUDA, times are those
of events around the calls, on the stream that they run on.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROUND_SECONDS = 1e-3  # shorter, and the clock and threads that wake up would be seen
WARM_SECONDS = 0.05
Clock = Callable[[Callable[[], Any], int], float]


@dataclass(frozen=True)
class Contender:
    """Something that is timed.

    Attributes:
        context: entered around calls, outside of what is timed.
        setup_seconds: what it took before the first call, where that is worth a column.
        memory: peak memory of a call in bytes, where it must be measured beforehand.
    """

    name: str
    run: Callable[[], Any]
    context: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    setup_seconds: float | None = None
    memory: int | None = None


@dataclass(frozen=True)
class Samples:
    """Seconds a call, one figure a round, each the mean of `calls` calls.

    >>> Samples([1.0, 2.0, 3.0, 4.0], calls=1).median
    2.5
    """

    seconds: list[float]
    calls: int

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def iqr(self) -> float:
        """Between the quartiles; 0 for a single round."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return high - low

    @property
    def spread(self) -> float:
        """IQR over median."""
        return self.iqr / self.median


def ratio(slow: Samples, fast: Samples) -> float:
    """How many times faster: the median of the ratios within a round, which slow drifts of the machine cancel in.

    >>> ratio(Samples([2.0, 4.0, 9.0], 1), Samples([1.0, 2.0, 3.0], 1))
    2.0
    """
    return statistics.median(s / f for s, f in zip(slow.seconds, fast.seconds, strict=True))


def host_clock(run: Callable[[], Any], calls: int) -> float:
    """Seconds a call, by the host's clock."""
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls


def cuda_clock(run: Callable[[], Any], calls: int) -> float:
    """Seconds a call, between two events on the current stream."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / calls


def clock_for(device: torch.device) -> Clock:
    return cuda_clock if device.type == "cuda" else host_clock


def plan(seconds: dict[str, float], budget: float, fewest: int, most: int = 101) -> tuple[dict[str, int], int]:
    """Calls a round for each contender, from the seconds of one call, and how many rounds of all fit the budget.

    >>> plan({"slow": 0.02, "fast": 0.0004}, budget=1.0, fewest=5)
    ({'slow': 1, 'fast': 3}, 47)
    """
    calls = {name: max(1, math.ceil(ROUND_SECONDS / max(s, 1e-9))) for name, s in seconds.items()}
    turn = sum(calls[name] * s for name, s in seconds.items())
    return calls, min(max(int(budget / turn), fewest), most)


def warm(contender: Contender, clock: Clock) -> float:
    """Call it until caches, allocators and threads are warm; returns the seconds of the fastest call."""
    with contender.context():
        start, best = time.perf_counter(), clock(contender.run, 1)
        for _ in range(100):
            if time.perf_counter() - start > WARM_SECONDS:
                break
            best = min(best, clock(contender.run, 1))
    return best


def measure(
    contenders: Sequence[Contender],
    budget: float,
    fewest: int = 5,
    clock: Clock = host_clock,
    tick: Callable[[], None] = lambda: None,
) -> dict[str, Samples]:
    """Time contenders against each other.

    Args:
        contenders: who takes part.
        budget: seconds for all rounds of all of them; at least `fewest` rounds are run however long they take.
        clock: `clock(run, calls)` returns the seconds a call.
        tick: called after every round.
    """
    calls, rounds = plan({c.name: warm(c, clock) for c in contenders}, budget, fewest)
    seconds: dict[str, list[float]] = {c.name: [] for c in contenders}
    for i in range(rounds):
        for contender in contenders[:: -1 if i % 2 else 1]:
            with contender.context():
                if calls[contender.name] > 1:
                    contender.run()  # the caches were the other's
                seconds[contender.name].append(clock(contender.run, calls[contender.name]))
        tick()
    return {name: Samples(values, calls[name]) for name, values in seconds.items()}


def capture(name: str, run: Callable[[], Any], context: Callable[[], contextlib.AbstractContextManager]) -> Contender:
    """A contender that replays `run` as a CUDA graph; its inputs are those tensors that `run` reads, where they lie."""
    with context():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # lazy initialisation and autotuning must not be captured
                run()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = run()
        memory = torch.cuda.max_memory_allocated() - before

    def replay():
        graph.replay()
        return outputs  # they live in the graph's own memory, as long as something holds them

    return Contender(name, replay, context, memory=memory)


# ---------------------------------------------------------------------------------------------------------------------
# Memory.

MEMORY_MEANS = {
    "cpu": "growth of the process's resident memory at the worst moment of one call, after free memory was given back",
    "cuda": "bytes that torch's allocator handed out at the worst moment of one call, beyond those held before it",
}


def peak_memory(contender: Contender, device: torch.device) -> int | None:
    """Bytes that one call needs beyond what is held before it: see `MEMORY_MEANS`. None where it cannot be told.

    On the CPU this is Linux's own high-water mark, so it has everything: tensors, graphs, and buffers of C++ and BLAS
    but those that they keep between calls.
    """
    if contender.memory is not None:
        return contender.memory
    with contender.context():
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            contender.run()
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated() - before
        try:
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark falls to what is resident now
            before = _status("VmRSS")
            contender.run()
            return max(_status("VmHWM") - before, 0)
        except (OSError, AttributeError):
            return None


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")


# ---------------------------------------------------------------------------------------------------------------------
# What the machine can do at best.


@dataclass(frozen=True)
class Peaks:
    """The best rates seen: FLOP/s of a matrix product and by whom, and bytes/s read and written by a copy."""

    flops: float
    flops_by: str
    bytes: float

    def of(self, unit: str) -> float | None:
        """The peak of a unit of work per second; None where there is none."""
        return {"FLOP": self.flops, "B": self.bytes}.get(unit)


def peaks(device: torch.device, dtype: torch.dtype = torch.float32, seconds: float = 0.5) -> Peaks:
    """Measure them, for about `seconds` each: the best of every product there is, and a copy far beyond the caches."""
    clock, rates = clock_for(device), {}
    for size in (512, 1024) if device.type == "cpu" else (2048, 8192):  # smaller ones do not fill a GPU
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        for name, run in _products(a, b).items():
            flops = 2 * size**3 / _fastest(run, clock, seconds / 4)
            rates[name] = max(rates.get(name, 0.0), flops)
    best = max(rates, key=rates.get)
    source = torch.ones((1 << 30 if device.type == "cuda" else 1 << 28) // 4, device=device)
    target = torch.empty_like(source)
    moved = 2 * source.numel() * 4
    return Peaks(rates[best], best, moved / _fastest(lambda: target.copy_(source), clock, seconds))


def _products(a: torch.Tensor, b: torch.Tensor) -> dict[str, Callable[[], Any]]:
    out = torch.empty_like(a)
    products = {"torch.mm": lambda: torch.mm(a, b, out=out)}
    if a.device.type == "cpu":
        from phyxdream.ops import backend, rssm_cpu

        if torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
            products["oneDNN"] = lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
        if backend.extension is not None and a.dtype == torch.float32:
            products["phyxdream"] = lambda: rssm_cpu.product(a, b, out)
    return products


def _fastest(run: Callable[[], Any], clock: Clock, seconds: float) -> float:
    run()
    start, best = time.perf_counter(), clock(run, 1)
    while time.perf_counter() - start < seconds:
        best = min(best, clock(run, 1))
    return best


# ---------------------------------------------------------------------------------------------------------------------
# Whether the machine was quiet.


@dataclass(frozen=True)
class Load:
    """Shares of all cores' time, 0 to 1: what other processes used, and what the hypervisor kept (virtual machines)."""

    others: float
    stolen: float


class LoadMeter:
    """What else ran on this machine since this was made. Linux only: elsewhere `read` returns None."""

    def __init__(self):
        self.start = self._now()

    def read(self) -> Load | None:
        if self.start is None:
            return None
        total, busy, stolen, own = (now - then for now, then in zip(self._now(), self.start, strict=True))
        if total <= 0:  # no tick has passed
            return Load(0.0, 0.0)
        return Load(max(busy - own, 0.0) / total, stolen / total)

    @staticmethod
    def _now() -> tuple[float, float, float, float] | None:
        """Seconds over all cores: all, busy, stolen; and this process's own."""
        try:
            ticks = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        except (OSError, ValueError):
            return None
        user, nice, system, idle, iowait, irq, softirq, steal = (t / os.sysconf("SC_CLK_TCK") for t in ticks)
        busy = user + nice + system + irq + softirq
        own = os.times()
        own_seconds = own.user + own.system + own.children_user + own.children_system
        return busy + idle + iowait + steal, busy, steal, own_seconds
