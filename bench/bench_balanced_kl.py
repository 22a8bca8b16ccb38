"""balanced_kl and balanced_kl_gaussian of 16 sequences of 64 steps.

Bytes count what must move at least: the inputs forward, and the inputs and their gradients backward.
"""

from __future__ import annotations

import functools

import torch

from phyxdream import ops
from phyxdream.bench.suite import Call, Case, Suite, Work

SHAPES = {
    "tiny": (8, 4, 4),
    "v1": (1024, 30),
    "12m": (1024, 32, 16),
    "512": (1024, 32, 32),
}
MOVED = {"forward": 1, "forward+backward": 1 + 2}


def build(shape: tuple[int, ...], direction: str, device: torch.device) -> Call:
    torch.manual_seed(0)
    categorical = len(shape) == 3
    inputs = [torch.randn(shape, device=device) for _ in range(2 if categorical else 4)]
    if not categorical:
        inputs[1], inputs[3] = inputs[1].exp(), inputs[3].exp()  # deviations
    for x in inputs:
        x.requires_grad_(direction != "forward")
    return Call(
        ops.balanced_kl if categorical else ops.balanced_kl_gaussian,
        tuple(inputs),
        leaves=inputs,
        work=Work(MOVED[direction] * len(inputs) * inputs[0].nbytes, "B"),
    )


SUITE = Suite(
    "kl",
    "balanced KL of posterior and prior, 16 sequences of 64 steps",
    tuple(
        Case("balanced_kl" if len(shape) == 3 else "balanced_kl_gaussian", size, direction,
             functools.partial(build, shape, direction), "×".join(map(str, shape)), default=size != "tiny",
             headline=direction != "forward" and size != "tiny")
        for size, shape in SHAPES.items()
        for direction in MOVED
    ),
)  # fmt: skip
