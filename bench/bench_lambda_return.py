"""λ-return on CPU, C++ against the reference: `pytest bench/bench_lambda_return.py --benchmark-only -s`.

The last lines give, per size, the ratio in this run and what a fast call cannot go below: its overhead (what a (1, 1)
call costs) plus moving its tensors (at the rate of one core adding two arrays of that size).
"""

import statistics

import numpy as np
import pytest
import torch

from phyxdream import ops

# The backward of the reference is quadratic in T (each step's gradient fills a whole tensor): the widest is left out.
SIZES = {"forward": [(15, 1024), (64, 16), (64, 8192)], "forward+backward": [(15, 1024), (64, 16)]}
# float32 tensors moved: three in and one out; the backward reads the gradient, returns, values and discounts, writes 3
MOVED = {"forward": 4, "forward+backward": 4 + 7}
medians = {}


def median(benchmark, function):
    # Ten calls a round: what a call costs in a loop, with caches and worker threads warm.
    benchmark.pedantic(function, rounds=100, iterations=10, warmup_rounds=3)
    return statistics.median(benchmark.stats.stats.data) * 1e6


def inputs(shape, requires_grad):
    torch.manual_seed(0)
    return [torch.rand(shape, requires_grad=requires_grad) for _ in range(3)]


def work(direction, shape, backend):
    tensors = inputs(shape, direction != "forward")
    grad = torch.rand(shape)

    def forward():
        return ops.lambda_return(*tensors)

    def forward_backward():
        return torch.autograd.grad(ops.lambda_return(*tensors), tensors, grad)

    return forward if direction == "forward" else forward_backward


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize(
    ("direction", "shape"),
    [(direction, shape) for direction in SIZES for shape in [(1, 1), *SIZES[direction]]],
    ids=str,
)
def test_lambda_return(benchmark, direction, shape, backend):
    benchmark.group = f"lambda_return {direction} {shape}"
    with ops.use_backend(backend):
        medians[direction, shape, backend] = median(benchmark, work(direction, shape, backend))


@pytest.mark.parametrize("shape", SIZES["forward"], ids=str)
def test_memory(benchmark, shape):
    benchmark.group = f"memory {shape}"
    a, b, out = (np.ones(shape, np.float32) for _ in range(3))
    medians["memory", shape] = median(benchmark, lambda: np.add(a, b, out=out)) / 3  # a tensor


def test_report(benchmark):
    benchmark.pedantic(lambda: None)  # so that --benchmark-only keeps it
    print()
    for direction, tensors in MOVED.items():
        overhead = medians[direction, (1, 1), "cpu"]
        for shape in SIZES[direction]:
            reference, fast = (medians[direction, shape, name] for name in ("reference", "cpu"))
            memory = tensors * medians["memory", shape]
            print(
                f"lambda_return {direction:16} {shape!s:10} reference {reference:8.1f} µs, cpu {fast:7.1f} µs: "
                f"{reference / fast:5.1f}x; call overhead {overhead:.1f} µs, memory {memory:.1f} µs"
            )
