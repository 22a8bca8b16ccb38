"""slot_attention: three iterations, without the attention among the results.

FLOP counts what remains when queries are asked of the inputs themselves, and gates of the GRU read what is pooled of
them: for every token, slot and iteration two products of length D forward (logits and sums) and five more backward
(logits again, the slopes, two ways into the token and one into the query); and for every slot and iteration the
matrices of queries, GRU and MLP, with two more of each for the gradients of its two factors. The reference, which makes
keys and values of all tokens, does more.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from phyxdream import nn, ops
from phyxdream.bench.suite import Call, Case, Suite, Work

HIDDEN, ITERATIONS = 128, 3
PRODUCTS = {"forward": (2, 1), "forward+backward": (7, 3)}  # of a token and slot, and of a slot with a matrix


class Size(NamedTuple):
    """Batch, tokens, their size, which is that of slots too, and slots."""

    B: int
    N: int
    D: int
    K: int


SIZES = {
    "tiny": Size(2, 16, 8, 3),
    "1024x64x64x7": Size(1024, 64, 64, 7),  # what a world model replays: T·B frames of 8×8 features
    "64x1024x64x7": Size(64, 1024, 64, 7),
    "32x4096x64x7": Size(32, 4096, 64, 7),
}


def build(size: Size, direction: str, device: torch.device) -> Call:
    torch.manual_seed(0)
    B, N, D, K = size
    model = nn.SlotAttention(K, D, D, HIDDEN, ITERATIONS).to(device)
    inputs = torch.randn(B, N, D, device=device, requires_grad=True)
    slots = torch.randn(B, K, D, device=device, requires_grad=True)

    def attend(inputs, slots):
        return ops.slot_attention(inputs, slots, model.weights, iterations=ITERATIONS, return_attention=False)[0]

    of_token, of_slot = PRODUCTS[direction]
    matrices = D * D + 2 * 3 * D * D + 2 * D * HIDDEN
    return Call(
        attend,
        (inputs, slots),
        leaves=(inputs, slots, *(x for x in model.weights if x is not None)),
        work=Work(2 * ITERATIONS * B * K * (of_token * N * D + of_slot * matrices), "FLOP"),
    )


SUITE = Suite(
    "slot_attention",
    "B elements of N tokens of size D, K slots, three iterations",
    tuple(
        Case("slot_attention", size, direction, functools.partial(build, shape, direction), "×".join(map(str, shape)),
             default=size != "tiny", headline=direction == "forward+backward" and size != "tiny")
        for size, shape in SIZES.items()
        for direction in PRODUCTS
    ),
)  # fmt: skip
