"""One posterior step of the RSSM, as acting takes it: 1 or 16 environments, no gradient.

FLOP as in bench_rssm_observe.py.
"""

from __future__ import annotations

import functools

import torch

from phyxdream.bench.rssm_sizes import ACTION, SIZES, Size, multiplications
from phyxdream.bench.suite import Call, Case, Suite, Work

ENVS = (1, 16)


def build(size: Size, B: int, device: torch.device) -> Call:
    model = size.model(device)
    inputs = (torch.randn(1, B, size.options["embed_size"], device=device), torch.randn(1, B, ACTION, device=device))
    is_first = torch.zeros(1, B, dtype=torch.bool, device=device)
    state, noise = model.initial(B).detach(), model.draw_noise(1, B)

    def step(*inputs):
        post = model.filter(*inputs, state, noise)
        return post.deter, post.stoch

    return Call(step, (*inputs, is_first), work=Work(2 * B * multiplications(model), "FLOP"))


SUITE = Suite(
    "step",
    "one posterior step of the RSSM, as acting takes it",
    tuple(
        Case(f"step of {B} env{'s' * (B > 1)}", size.name, "no-grad", functools.partial(build, size, B), size.label,
             automatic=True, default=size.name != "tiny", headline=size.name in ("512", "12m"))
        for size in SIZES
        for B in ENVS
        if size.name != "512-embed-4096"
    ),
)  # fmt: skip
