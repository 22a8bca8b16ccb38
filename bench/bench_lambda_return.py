"""lambda_return of imagination (15 steps), of a replayed batch (64 steps of 16), and far beyond the caches.

1x1 is what a call costs that has nothing to do. Bytes count tensors: three in and one out; the backward reads
the gradient, returns, values and discounts, and writes three.
"""

from __future__ import annotations

import functools

import torch

from phyxdream import ops
from phyxdream.bench.suite import Call, Case, Suite, Work

SHAPES = ((1, 1), (64, 16), (15, 1024), (64, 8192))
MOVED = {"forward": 4, "forward+backward": 4 + 7}


def build(shape: tuple[int, int], direction: str, device: torch.device) -> Call:
    torch.manual_seed(0)
    tensors = [torch.rand(shape, device=device, requires_grad=direction != "forward") for _ in range(3)]
    work = Work(MOVED[direction] * tensors[0].nbytes, "B")
    return Call(ops.lambda_return, tuple(tensors), leaves=tensors, work=work)


SUITE = Suite(
    "lambda_return",
    "λ-returns, (steps, sequences)",
    tuple(
        Case("lambda_return", "x".join(map(str, shape)), direction, functools.partial(build, shape, direction),
             "×".join(map(str, shape)), headline=shape in ((64, 16), (15, 1024)))
        for shape in SHAPES
        for direction in MOVED
        # The backward of the reference is quadratic in T (each step's gradient fills a whole tensor).
        if (shape, direction) != ((64, 8192), "forward+backward")
    ),
)  # fmt: skip
