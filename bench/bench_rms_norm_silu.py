"""rms_norm_silu (the reference: torch's rms_norm, then silu).

Sizes are those of DreamerV3 on 64×64 pictures, 16 sequences of 64 steps: pictures as (pixels, channels), then dense
layers, then one step of the RSSM. Bytes count what must move at least: x and y forward, and x, grad_y and grad_x
backward.
"""

from __future__ import annotations

import functools

import torch

from phyxdream import ops
from phyxdream.bench.suite import Call, Case, Suite, Work

SHAPES = ((16, 512), (1024, 512), (16384, 512), (1024 * 4 * 4, 256), (1024 * 16 * 16, 64), (1024 * 32 * 32, 32))
MOVED = {"forward": 2, "forward+backward": 2 + 3}
HEADLINE = ((16, 512), (16384, 512), (1024 * 32 * 32, 32))


def build(shape: tuple[int, int], direction: str, device: torch.device) -> Call:
    torch.manual_seed(0)
    x = torch.randn(shape, device=device, requires_grad=direction != "forward")
    weight = torch.randn(shape[-1], device=device, requires_grad=direction != "forward")
    work = Work(MOVED[direction] * x.nbytes, "B")
    return Call(ops.rms_norm_silu, (x, weight), leaves=(x, weight), work=work)


SUITE = Suite(
    "rms_norm_silu",
    "RMS norm and SiLU in one pass, (rows, features)",
    tuple(
        Case("rms_norm_silu", "x".join(map(str, shape)), direction, functools.partial(build, shape, direction),
             "×".join(map(str, shape)), headline=direction == "forward+backward" and shape in HEADLINE)
        for shape in SHAPES
        for direction in MOVED
    ),
)  # fmt: skip
