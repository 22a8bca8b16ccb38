"""rms_norm_silu: the `cpu` backend beside the reference (torch's rms_norm, then silu), one thread and all of them.

    python bench/bench_rms_norm_silu.py [--rounds 15] [--device cuda]

Sizes are those of DreamerV3 on 64×64 pictures, 16 sequences of 64 steps: pictures as (pixels, channels), then dense
layers, then one step of the RSSM. Rounds of both are interleaved; figures are medians. GB/s counts what must move at
least: x and y forward, and x, grad_y and grad_x backward.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from phyxdream import ops

PICTURES = [(1024 * 32 * 32, 32), (1024 * 16 * 16, 64), (1024 * 8 * 8, 128), (1024 * 4 * 4, 256)]
DENSE = [(16384, 512), (1024, 512), (16, 512)]


def seconds(tasks: dict[str, Callable[[], object]], rounds: int, device: str) -> dict[str, float]:
    """Median seconds per call; a round repeats a call until it lasts some 20 ms."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    calls, figures = {}, {name: [] for name in tasks}
    for name, task in tasks.items():
        task()
        wait()
        begin = time.perf_counter()
        task()
        wait()
        calls[name] = max(1, round(0.02 / (time.perf_counter() - begin)))
    for _ in range(rounds):
        for name, task in tasks.items():
            begin = time.perf_counter()
            for _ in range(calls[name]):
                task()
            wait()
            figures[name].append((time.perf_counter() - begin) / calls[name])
    return {name: statistics.median(values) for name, values in figures.items()}


def bench(rows: int, size: int, rounds: int, device: str, backend: str) -> str:
    x = torch.randn(rows, size, device=device)
    weight = torch.rand(size, device=device).add_(0.5).requires_grad_()
    grad = torch.randn_like(x)
    leaf = x.clone().requires_grad_()

    def forward(name: str) -> Callable[[], object]:
        def run() -> torch.Tensor:
            with ops.use_backend(name), torch.no_grad():
                return ops.rms_norm_silu(x, weight)

        return run

    def both(name: str) -> Callable[[], object]:
        def run() -> tuple[torch.Tensor, ...]:
            with ops.use_backend(name):
                return torch.autograd.grad(ops.rms_norm_silu(leaf, weight), (leaf, weight), grad)

        return run

    line = f"{f'({rows}, {size})':>16}"
    for kind, passes in ((forward, 2), (both, 5)):
        median = seconds({name: kind(name) for name in ("reference", backend)}, rounds, device)
        slow, fast = median["reference"], median[backend]
        line += f"{slow * 1e6:>12,.0f}{fast * 1e6:>12,.1f}{slow / fast:>8.1f}x{passes * x.nbytes / fast / 1e9:>8.1f}"
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args()
    backend = "triton" if args.device == "cuda" else "cpu"
    for threads in sorted({1, torch.get_num_threads()}) if args.device == "cpu" else [torch.get_num_threads()]:
        torch.set_num_threads(threads)
        print(f"\n{args.device}, {threads} threads{'forward':>29}{'forward and backward':>40}")
        print(f"{'':16}" + f"{'reference µs':>12}{backend + ' µs':>12}{'ratio':>9}{'GB/s':>8}" * 2)
        for rows, size in PICTURES + DENSE:
            print(bench(rows, size, args.rounds, args.device, backend), flush=True)


if __name__ == "__main__":
    main()
