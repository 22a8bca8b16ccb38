"""One posterior step of the RSSM, as acting takes it, for 1, 8 or 16 environments, and one prior step; no gradient.

FLOP as in bench_rssm_observe.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from phyxdream.bench.rssm_sizes import ACTION, SIZES, Size, multiplications
from phyxdream.bench.suite import Call, Case, Suite, Work

ENVS = (1, 8, 16)
STATES = 16


def posterior(size: Size, B: int, device: torch.device) -> Call:
    model = size.model(device)
    inputs = (torch.randn(1, B, size.options["embed_size"], device=device), torch.randn(1, B, ACTION, device=device))
    is_first = torch.zeros(1, B, dtype=torch.bool, device=device)
    state, noise = model.initial(B).detach(), model.draw_noise(1, B)

    def step(*inputs):
        post = model.filter(*inputs, state, noise)
        return post.deter, post.stoch

    return Call(step, (*inputs, is_first), work=Work(2 * B * multiplications(model), "FLOP"))


def prior(size: Size, device: torch.device) -> Call:
    model = size.model(device)
    action = torch.randn(1, STATES, ACTION, device=device)
    state, noise = model.initial(STATES).detach(), model.draw_noise(1, STATES)

    def step(action):
        state_after = model.imagine(action, state, noise)
        return state_after.deter, state_after.stoch

    return Call(step, (action,), work=Work(2 * STATES * multiplications(model, "posterior"), "FLOP"))


def _case(op: str, size: Size, build: Callable, headline: bool) -> Case:
    return Case(op, size.name, "no-grad", build, size.label, automatic=True, default=size.name != "tiny",
                headline=headline and size.name in ("512", "12m"))  # fmt: skip


SUITE = Suite(
    "step",
    "one posterior step of the RSSM, as acting takes it, and one prior step",
    tuple(
        case
        for size in SIZES
        if size.name != "512-embed-4096"
        for case in (
            *(
                _case(f"step of {B} env{'s' * (B > 1)}", size, functools.partial(posterior, size, B), B != 8)
                for B in ENVS
            ),
            _case(f"prior step of {STATES}", size, functools.partial(prior, size), False),
        )
    ),
)
