"""balanced_kl on CPU, C++ against the reference, with all of torch's threads.

    pytest bench/bench_balanced_kl.py --benchmark-only -s

Sizes (T·B, S, C) are those of 16 sequences of 64 steps with 32 latent variables: DreamerV2 (32 classes), DreamerV3 with
12 million parameters (16), and Gaussian states (no classes). GB/s counts what must move at least: the inputs forward,
and the inputs and their gradients backward.
"""

import statistics

import pytest
import torch

from phyxdream import ops

SIZES = [(1024, 32, 32), (1024, 32, 16), (1024, 32)]
MOVED = {"forward": 1, "forward+backward": 1 + 2}
medians = {}


def work(direction, shape):
    torch.manual_seed(0)
    inputs = [torch.randn(shape) for _ in range(2 if len(shape) == 3 else 4)]
    if len(shape) == 2:
        inputs[1], inputs[3] = inputs[1].exp(), inputs[3].exp()
    op = ops.balanced_kl if len(shape) == 3 else ops.balanced_kl_gaussian
    if direction == "forward":
        return lambda: op(*inputs)
    for x in inputs:
        x.requires_grad_()
    grads = torch.full(shape[:1], 0.5), torch.full(shape[:1], 0.1)
    return lambda: torch.autograd.grad(op(*inputs), inputs, grads)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("shape", SIZES, ids=str)
@pytest.mark.parametrize("direction", MOVED)
def test_balanced_kl(benchmark, direction, shape, backend):
    benchmark.group = f"balanced_kl {direction} {shape}"
    with ops.use_backend(backend):
        benchmark.pedantic(work(direction, shape), rounds=40, iterations=2, warmup_rounds=4)
    medians[direction, shape, backend] = statistics.median(benchmark.stats.stats.data)


def test_report(benchmark):
    benchmark.pedantic(lambda: None)  # so that --benchmark-only keeps it
    print()
    for direction, times in MOVED.items():
        for shape in SIZES:
            reference, fast = (medians[direction, shape, name] for name in ("reference", "cpu"))
            inputs = 2 if len(shape) == 3 else 4
            rate = times * inputs * 4 * torch.Size(shape).numel() / fast / 1e9
            print(
                f"balanced_kl {direction:16} {shape!s:14} reference {reference * 1e6:8.1f} µs, "
                f"cpu {fast * 1e6:7.1f} µs: {reference / fast:5.1f}x, {rate:5.1f} GB/s"
            )
