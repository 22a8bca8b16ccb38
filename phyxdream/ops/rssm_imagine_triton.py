"""What surrounds the Triton kernels of `rssm_imagine` and `rssm_imagine_policy`: how a call becomes their arguments.

They have no backward: a call that wants gradients is the reference's.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from phyxdream.ops import backend, rssm_cells, rssm_observe_triton
from phyxdream.ops.contract import HALF
from phyxdream.ops.rssm_cells import CellWeights, HeadWeights, Options, PosteriorWeights
from phyxdream.ops.rssm_imagine_cpu import PolicyOptions
from phyxdream.ops.rssm_observe_triton import Model

_MOST_ACTIONS = 256  # all of them must fit into the registers of one program


@dataclass(frozen=True)
class Imagined(Model):
    """`layers` also has those of prior and policy, by owner and number; the prior's last one is `head`."""

    policy: PolicyOptions | None = None

    def act(self, layer: str) -> str:
        return self.policy.act if layer.startswith("policy") else self.options.act


def model_of(
    tensors: tuple[Tensor, ...],
    cell: CellWeights,
    prior: HeadWeights,
    policy: HeadWeights | None,
    options: Options,
    policy_options: PolicyOptions | None,
) -> Imagined:
    action, deter, _, noise = tensors
    H, B, *latent = noise.shape
    block = isinstance(cell, rssm_cells.BlockGRUWeights)
    last = PosteriorWeights(*prior.layers[-1], prior.out_weight, prior.out_bias)
    found = rssm_observe_triton.model_of(cell, last, options, H, B, 0, deter.shape[1], latent)
    layers, row = dict(found.layers), found.gates
    added = {"action": (found.U, cell.in_action_gain)} if block else {}
    for owner, heads in (("prior", prior.layers[:-1]), ("policy", policy.layers if policy else ())):
        added |= {f"{owner}{i}": (layer.weight.shape[0], layer.gain) for i, layer in enumerate(heads)}
    for name, (size, gain) in added.items():
        layers[name] = row, size
        row += size + (0 if gain is None else 2)
    given = {field.name: getattr(found, field.name) for field in fields(found)}
    changed = dict(layers=layers, tape_row=row, A=action.shape[2], taped=False)
    return Imagined(**given | changed, policy=policy_options)


def refuse(action: Tensor, noise: Tensor, acts: list[str], policy: PolicyOptions | None, keep_tape: bool) -> str:
    """Why Triton cannot take a call; an empty string if it can."""
    if keep_tape:
        return "it has no backward"
    if policy is not None and action.shape[2] > _MOST_ACTIONS:
        return f"it takes at most {_MOST_ACTIONS} actions; action_noise is {tuple(action.shape)}"
    return next(filter(None, (rssm_observe_triton.refuse(action, noise, act) for act in acts)), "")


def plan(action: Tensor, model: Imagined) -> str:
    """What a call would launch, in a few words."""
    kernels = backend.triton_kernels("rssm_imagine")
    return str(kernels.plan(model, action.dtype in HALF, kernels.processors(action.device)))


def forward(
    outputs: tuple[Tensor, ...],
    tensors: tuple[Tensor, ...],
    cell: CellWeights,
    prior: HeadWeights,
    policy: HeadWeights | None,
    options: Options,
    policy_options: PolicyOptions | None,
) -> tuple[Tensor, ...]:
    """Fills the outputs of the schema, but the tape, from its four tensors."""
    with torch.autocast(tensors[0].device.type, enabled=False):
        _forward(outputs, tensors, cell, prior, policy, options, policy_options)
    return outputs


def _forward(outputs, tensors, cell, prior, policy, options, policy_options):
    action, deter, stoch, noise = tensors
    deter_out, stoch_out, statistics, action_out, _, index = outputs
    model = model_of(tensors, cell, prior, policy, options, policy_options)
    kernels = backend.triton_kernels("rssm_imagine")
    B, D, categorical = model.B, model.D, model.classes > 0
    stoch = stoch.flatten(1)
    weights: dict[str, Any] = rssm_observe_triton.cell_weights(model, cell)
    for owner, head in (("prior", prior), ("policy", policy)):
        for i, layer in enumerate(head.layers if head else ()):
            name = "head" if head is prior and i == len(head.layers) - 1 else f"{owner}{i}"
            weights |= {f"{name}_{part}": getattr(layer, part) for part in ("bias", "gain", "shift")}
    weights |= {"head": None, "out": prior.out_weight, "out_bias": prior.out_bias}
    weights = {name: None if x is None else x.contiguous() for name, x in weights.items()}
    clips, acting = model.cell == "block_gru", None
    if policy is None:  # `taken` are the actions as their layer reads them
        taken = rssm_cells.clipped(cell, action).contiguous()
    else:
        taken = torch.empty_like(action_out) if clips else action_out
        one_hot = policy_options.dist == "categorical"
        first = policy.layers[0].weight
        acting = _head(
            kernels, policy,
            stoch=first[:, D:].t().contiguous() if categorical else None,
            stoch_first=F.linear(stoch, first[:, D:]).float() if categorical else None,
            noise=(rssm_cells.arrival_times(action.float()) if one_hot else action).contiguous(),
            action=action_out,
            **kernels.policy_constants(policy_options, model.A),
        )  # fmt: skip
    previous = deter.new_empty(2, B, D, dtype=torch.float32)
    previous[0] = deter
    stoch_first = F.linear(stoch, cell.in_stoch) if categorical else stoch
    memory = kernels.Memory(
        from_action=None,
        action=taken,
        embeds=None,
        is_first=None,
        noise=(rssm_cells.arrival_times(noise.float()) if categorical else noise).contiguous(),
        initial_deter=None,
        initial_stoch=None,
        stoch_first=stoch_first.to(torch.float32, copy=True),  # of Gaussian latents, the steps overwrite it
        stoch_start=None,
        previous=previous,
        sums=None,
        deter=deter_out,
        stoch=stoch_out,
        statistics=statistics,
        tape=deter.new_empty(B * model.tape_row, dtype=torch.float32),
        index=index,
    )
    kernels.run(model, weights, _head(kernels, prior), acting, memory)


def _head(kernels, head, **policy):
    matrices = tuple(layer.weight.contiguous() for layer in head.layers)
    if policy:
        policy |= {"out": head.out_weight.contiguous(), "out_bias": head.out_bias.contiguous()}
    return kernels.Head(layers=(), weights=matrices, **policy)
