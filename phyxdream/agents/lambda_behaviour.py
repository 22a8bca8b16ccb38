"""Behaviour learned in imagination as DreamerV1 and V2 do it: λ-targets of states, gradients through the dynamics or
REINFORCE, a critic of unit variance.

Their convention, unlike V3's: the reward of a state is that which came with it, and its value includes that reward.

    target_t = r_t + d_t ((1 − λ) v_{t+1} + λ target_{t+1}),  target_H = v_H      d_t = γ · P(the episode goes on at t)
    weight_t = Π_{s<t} d_s

Source: Hafner et al. 2020, eq. 4-8; Hafner et al. 2021, eq. 4-6; danijar/dreamer and dreamerv2.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from phyxdream import ops


@contextmanager
def frozen(*modules: nn.Module) -> Iterator[None]:
    """Inside, the weights of `modules` are constants: gradients flow through them, none to them."""
    weights = [p for module in modules for p in module.parameters() if p.requires_grad]
    for p in weights:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in weights:
            p.requires_grad_(True)


def lambda_targets(reward: Tensor, value: Tensor, discount: Tensor, td_lambda: float) -> Tensor:
    """λ-targets (H, N) of the first H of H + 1 states; reward, value and discount (H+1, N) are those of the states."""
    return ops.lambda_return(reward[:-1], value[1:], discount[:-1], td_lambda)


def state_weights(discount: Tensor) -> Tensor:
    """How likely the episode still runs at each state, times γ each step: (H+1, N), without gradient."""
    return torch.cumprod(torch.cat([torch.ones_like(discount[:1]), discount[:-1]]), 0).detach()
