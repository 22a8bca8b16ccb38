"""rms_norm_silu on CPU, C++ against the reference (torch's rms_norm, then silu), with all of torch's threads.

    pytest bench/bench_rms_norm_silu.py --benchmark-only -s

Sizes are those of DreamerV3 on 64×64 pictures, 16 sequences of 64 steps: pictures as (pixels, channels), then dense
layers, then one step of the RSSM. GB/s counts what must move at least: x and y forward, and x, grad_y and grad_x
backward.
"""

import statistics

import pytest
import torch

from phyxdream import ops

SIZES = [(1024 * 32 * 32, 32), (1024 * 16 * 16, 64), (1024 * 4 * 4, 256), (16384, 512), (1024, 512), (16, 512)]
MOVED = {"forward": 2, "forward+backward": 2 + 3}
medians = {}


def work(direction, shape):
    torch.manual_seed(0)
    x = torch.randn(shape, requires_grad=direction != "forward")
    weight = torch.randn(shape[-1], requires_grad=direction != "forward")
    grad = torch.randn(shape)
    if direction == "forward":
        return lambda: ops.rms_norm_silu(x, weight)
    return lambda: torch.autograd.grad(ops.rms_norm_silu(x, weight), (x, weight), grad)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("shape", SIZES, ids=str)
@pytest.mark.parametrize("direction", MOVED)
def test_rms_norm_silu(benchmark, direction, shape, backend):
    benchmark.group = f"rms_norm_silu {direction} {shape}"
    small = shape[0] <= 1024
    with ops.use_backend(backend):
        benchmark.pedantic(work(direction, shape), rounds=50 if small else 7, iterations=10 if small else 1,
                           warmup_rounds=4)  # fmt: skip
    medians[direction, shape, backend] = statistics.median(benchmark.stats.stats.data)


def test_report(benchmark):
    benchmark.pedantic(lambda: None)  # so that --benchmark-only keeps it
    print()
    for direction, tensors in MOVED.items():
        for shape in SIZES:
            reference, fast = (medians[direction, shape, name] for name in ("reference", "cpu"))
            rate = tensors * 4 * shape[0] * shape[1] / fast / 1e9
            print(
                f"rms_norm_silu {direction:16} {shape!s:14} reference {reference * 1e6:10.1f} µs, "
                f"cpu {fast * 1e6:9.1f} µs: {reference / fast:5.1f}x, {rate:5.1f} GB/s"
            )
