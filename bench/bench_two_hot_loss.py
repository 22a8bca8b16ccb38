"""two_hot_loss and two_hot_mean on CPU, C++ against the reference (log_softmax or softmax, then gathers or sums).

    pytest bench/bench_two_hot_loss.py --benchmark-only -s

255 bins as in DreamerV3; rows are those of a replayed batch, 16 sequences of 64 steps, and of imagination from it, 15
steps from each. All of torch's threads. GB/s counts what must move at least: the logits forward, and the logits and
their gradient backward.
"""

import statistics

import pytest
import torch

from phyxdream import ops
from phyxdream.nn import symexp_bins

ROWS, BINS = (1024, 15360), 255
MOVED = {"forward": 1, "forward+backward": 1 + 2}
OPS = ("two_hot_loss", "two_hot_mean")
medians = {}


def work(op, direction, rows):
    torch.manual_seed(0)
    logits = torch.randn(rows, BINS, requires_grad=direction != "forward")
    inputs = (torch.randn(rows), symexp_bins(BINS))[OPS.index(op) :]
    grad = torch.randn(rows)
    function = getattr(ops, op)
    if direction == "forward":
        return lambda: function(logits, *inputs)
    return lambda: torch.autograd.grad(function(logits, *inputs), logits, grad)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("direction", MOVED)
@pytest.mark.parametrize("op", OPS)
def test_two_hot(benchmark, op, direction, rows, backend):
    benchmark.group = f"{op} {direction} ({rows}, {BINS})"
    with ops.use_backend(backend):
        benchmark.pedantic(work(op, direction, rows), rounds=50 if rows <= 1024 else 15,
                           iterations=10 if rows <= 1024 else 1, warmup_rounds=4)  # fmt: skip
    medians[op, direction, rows, backend] = statistics.median(benchmark.stats.stats.data)


def test_report(benchmark):
    benchmark.pedantic(lambda: None)  # so that --benchmark-only keeps it
    print()
    for op in OPS:
        for direction, tensors in MOVED.items():
            for rows in ROWS:
                reference, fast = (medians[op, direction, rows, name] for name in ("reference", "cpu"))
                rate = tensors * 4 * rows * BINS / fast / 1e9
                print(
                    f"{op} {direction:16} ({rows:5}, {BINS}) reference {reference * 1e6:8.1f} µs, "
                    f"cpu {fast * 1e6:7.1f} µs: {reference / fast:5.1f}x, {rate:5.1f} GB/s"
                )
