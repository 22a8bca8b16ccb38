"""rssm_observe, the posterior scan: 16 sequences of 64 steps.

FLOP counts the matrix products that remain when one-hot z picks rows: one per weight forward, and two more, the
gradients of its two factors, backward. The reference does more than is counted. What is missing from 100 % of the peak
is weights streamed from beyond the nearest cache, norms, gates and samples, laying out weights for each call, and the
rows written for the gradients of the weights.
"""

from __future__ import annotations

import functools

import torch

from phyxdream.bench.rssm_sizes import ACTION, SIZES, Size, multiplications
from phyxdream.bench.suite import Call, Case, Suite, Work

PRODUCTS = {"forward": 1, "forward+backward": 3}


def build(size: Size, direction: str, device: torch.device) -> Call:
    model, (T, B) = size.model(device), (size.T, size.B)
    embed = torch.randn(T, B, size.options["embed_size"], device=device, requires_grad=True)
    is_first = torch.zeros(T, B, dtype=torch.bool, device=device)
    is_first[0] = True

    def observe(*inputs):
        post = model.filter(*inputs)
        return (post.deter, post.stoch) + ((post.logits,) if model.classes else (post.mean, post.std))

    return Call(
        observe,
        (embed, torch.randn(T, B, ACTION, device=device), is_first, None, model.draw_noise(T, B)),
        leaves=(embed, *model.parameters()),
        work=Work(2 * PRODUCTS[direction] * T * B * multiplications(model), "FLOP"),
    )


SUITE = Suite(
    "observe",
    "the posterior scan of the RSSM, 16 sequences of 64 steps",
    tuple(
        Case("rssm_observe", size.name, direction, functools.partial(build, size, direction), size.label,
             default=size.name != "tiny", headline=direction == "forward+backward")
        for size in SIZES
        for direction in PRODUCTS
    ),
)  # fmt: skip
