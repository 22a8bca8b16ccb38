"""slot_attention on CPU, forward and backward, C++ against the reference, with all of torch's threads.

    pytest bench/bench_slot_attention.py --benchmark-only -s

D = 64, three iterations, hidden 128, attention not asked for. GFLOP/s counts what C++ multiplies: of every token and
slot two products of length D per iteration forward and five backward, and of every slot the matrices of GRU, MLP and
queries (three products: forward, and the gradients of both factors). Memory is what a forward and backward adds to the
process at its peak, beside inputs, weights and their gradients: each measured in a process of its own.
"""

import statistics
import subprocess
import sys

import pytest
import torch

from phyxdream import nn, ops

SIZES = {
    "B=32, N=4096, K=7: a video's frames at 64×64": (32, 4096, 7),
    "B=64, N=1024, K=7: pictures at 32×32": (64, 1024, 7),
    "B=1024, N=64, K=7: T·B of a world model": (1024, 64, 7),
}
D, HIDDEN, ITERATIONS = 64, 128, 3
medians = {}


def work(direction, size):
    B, N, K = SIZES[size]
    torch.manual_seed(0)
    model = nn.SlotAttention(K, D, D, HIDDEN, ITERATIONS)
    inputs, slots = torch.randn(B, N, D, requires_grad=True), torch.randn(B, K, D)
    grad = torch.randn(B, K, D)
    if direction == "forward":
        return torch.no_grad()(lambda: model(inputs, slots, return_attention=False))

    def forward_backward():
        model.zero_grad()
        inputs.grad = None
        model(inputs, slots, return_attention=False)[0].backward(grad)

    return forward_backward


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
def test_slot_attention(benchmark, direction, size, backend):
    benchmark.group = f"slot_attention {direction} {size}"
    with ops.use_backend(backend):
        rounds = 15 if backend == "cpu" else 7
        benchmark.pedantic(work(direction, size), rounds=rounds, iterations=1, warmup_rounds=2)
    medians[direction, size, backend] = statistics.median(benchmark.stats.stats.data)


def flops(direction, size):
    B, N, K = SIZES[size]
    token, slot = (2, 1) if direction == "forward" else (7, 3)
    matrices = D * D + D * D + 2 * 3 * D * D + 2 * D * HIDDEN
    return 2 * ITERATIONS * B * K * (token * N * D + slot * matrices)


def added_memory(size, backend):
    """Bytes at the peak of a forward and backward, beyond what inputs, weights and their gradients take."""
    script = f"""
import resource, sys
sys.path.insert(0, {str(__file__.rpartition("/")[0])!r})
import torch
from bench_slot_attention import SIZES, ops, work
step = work("forward+backward", {size!r})
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
held = [torch.zeros_like(torch.empty(SIZES[{size!r}][0], SIZES[{size!r}][1], {D})).add_(1)]  # as large as the gradient
before = peak()
held.clear()
with ops.use_backend({backend!r}):
    step()
print(peak() - before)
"""
    return 1024 * int(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout)


def test_report(benchmark):
    benchmark.pedantic(lambda: None)  # so that --benchmark-only keeps it
    print()
    for direction in ("forward", "forward+backward"):
        for size in SIZES:
            reference, fast = (medians[direction, size, name] for name in ("reference", "cpu"))
            print(
                f"slot_attention {direction:16} {size:45} "
                f"reference {reference * 1e3:6.1f} ms, cpu {fast * 1e3:5.1f} ms: "
                f"{reference / fast:4.1f}x, {flops(direction, size) / fast / 1e9:4.0f} GFLOP/s"
            )
    for size in SIZES:
        reference, fast = (added_memory(size, name) for name in ("reference", "cpu"))
        print(
            f"slot_attention memory           {size:45} "
            f"reference {reference / 2**20:6.0f} MB, cpu {fast / 2**20:5.0f} MB: "
            f"{fast / reference:.0%}"
        )
