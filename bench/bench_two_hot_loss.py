"""two_hot_loss and two_hot_mean (the reference: log_softmax or softmax, then gathers or sums) of 255 bins.

Rows are those of a replayed batch, 16 sequences of 64 steps, and of imagination from it, 15 steps from each. Bytes
count what must move at least: the logits forward, and the logits and their gradient backward.
"""

from __future__ import annotations

import functools

import torch

from phyxdream import ops
from phyxdream.bench.suite import Call, Case, Suite, Work
from phyxdream.nn import symexp_bins

SIZES = {"tiny": (4, 255), "1024x255": (1024, 255), "15360x255": (15360, 255)}
MOVED = {"forward": 1, "forward+backward": 1 + 2}
OPS = ("two_hot_loss", "two_hot_mean")


def build(op: str, shape: tuple[int, int], direction: str, device: torch.device) -> Call:
    torch.manual_seed(0)
    rows, bins = shape
    logits = torch.randn(rows, bins, device=device, requires_grad=direction != "forward")
    inputs = (torch.randn(rows, device=device), symexp_bins(bins).to(device))[OPS.index(op) :]
    work = Work(MOVED[direction] * logits.nbytes, "B")
    return Call(getattr(ops, op), (logits, *inputs), leaves=(logits,), work=work)


SUITE = Suite(
    "two_hot",
    "loss and mean of two-hot heads, 255 bins",
    tuple(
        Case(op, size, direction, functools.partial(build, op, shape, direction), "×".join(map(str, shape)),
             default=size != "tiny", headline=size == "15360x255" and (op, direction) != (OPS[0], "forward"))
        for size, shape in SIZES.items()
        for op in OPS
        for direction in MOVED
    ),
)  # fmt: skip
