"""rssm_imagine, the prior scan: 1024 sequences of 15 steps, under given actions and under an actor of three layers.

`rssm_imagine_policy` without gradient is what behaviour learning by REINFORCE does; with it, the backward goes through
model and samples to the actor's weights and the start, the model frozen. FLOP counts the matrix products that remain
when one-hot z picks rows: of the model's weights one forward and one back, of the actor's one more.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.nn import functional as F

from phyxdream import nn, ops
from phyxdream.bench.rssm_sizes import ACTION, SIZES, Size
from phyxdream.bench.suite import Call, Case, Suite, Work
from phyxdream.nn.layers import head_weights

H, B, LAYERS = 15, 1024, 3
ACTORS: dict[str, dict[str, Any]] = {
    "tiny": dict(units=16, dist="categorical"),
    "v1": dict(units=400, dist="tanh_normal", act="elu", norm="none"),
    "200": dict(units=400, dist="categorical"),
    "512": dict(units=512, dist="categorical"),
    "12m": dict(units=256, dist="bounded_normal"),
    "50m": dict(units=512, dist="bounded_normal"),
}


def build(op: str, size: Size, direction: str, device: torch.device) -> Call:
    steps, batch = (3, 8) if size.name == "tiny" else (H, B)
    model = size.model(device).requires_grad_(False)
    actor = nn.Actor(model.feature_size, ACTION, layers=LAYERS, **ACTORS[size.name]).to(device)
    deter = torch.randn(batch, model.deter_size, device=device).tanh()
    stoch = torch.randn(batch, model.stoch_size, device=device)
    if model.classes:
        classes = torch.randint(model.classes, (batch, model.stoch_size), device=device)
        stoch = F.one_hot(classes, model.classes).float()
    noise = model.draw_noise(steps, batch)
    work = Work(2 * steps * batch * _multiplications(op, direction, model, actor), "FLOP")
    if op == "rssm_imagine":
        start, action = nn.State(deter, stoch), torch.randn(steps, batch, ACTION, device=device)

        def imagine(action, start, noise):
            state = model.imagine(action, start, noise)
            return state.deter, state.stoch

        return Call(imagine, (action, start, noise), work=work)
    deter.requires_grad_()
    stoch.requires_grad_()
    weights = model.cell.weights(), head_weights(*model.prior), head_weights(actor.mlp, actor.out)
    options = dict(dist=actor.dist, **model.cell.options.keywords, policy_act=actor.act)
    return Call(
        functools.partial(ops.rssm_imagine_policy, **options),
        (actor.draw_noise(steps, batch), deter, stoch, noise, *weights),
        leaves=(deter, stoch, *actor.parameters()),
        work=work,
    )


def _multiplications(op: str, direction: str, model: nn.RSSM, actor: nn.Actor) -> int:
    """Per step and sequence, in products with a matrix."""
    left_out = ("posterior", *(("cell.in_stoch.",) if model.classes else ()))
    weights = sum(p.numel() for name, p in model.named_parameters() if p.dim() > 1 and not name.startswith(left_out))
    policy = sum(p.numel() for p in actor.parameters() if p.dim() > 1)
    if model.classes:
        policy -= actor.mlp[0][0].out_features * model.stoch_size * model.classes
    if op == "rssm_imagine":
        return weights
    return weights + policy if direction == "no-grad" else 2 * weights + 3 * policy


SUITE = Suite(
    "imagine",
    "the prior scan of the RSSM, 1024 sequences of 15 steps, under an actor or given actions",
    tuple(
        Case(op, size.name, direction, functools.partial(build, op, size, direction),
             f"{size.label.split(', embed')[0]}, actor {ACTORS[size.name]['units']}" if op.endswith("policy")
             else size.label.split(", embed")[0],
             default=size.name not in ("tiny", "50m"), headline=op.endswith("policy") and size.name in ("512", "12m"))
        for size in SIZES
        if size.name in ACTORS
        for op, direction in (("rssm_imagine_policy", "no-grad"), ("rssm_imagine_policy", "forward+backward"),
                              ("rssm_imagine", "no-grad"))
    ),
)  # fmt: skip
