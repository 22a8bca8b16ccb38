"""What surrounds the Triton kernels of `rssm_imagine` and `rssm_imagine_policy`: how a call becomes their arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from phyxdream.ops import backend, rssm_cells, rssm_triton
from phyxdream.ops.rssm_cells import CellWeights, HeadWeights, Options
from phyxdream.ops.rssm_imagine_cpu import PolicyOptions
from phyxdream.ops.rssm_triton import Model

_MOST_ACTIONS = 256  # all of them must fit into the registers of one program


def model_of(
    tensors: tuple[Tensor, ...],
    cell: CellWeights,
    prior: HeadWeights,
    policy: HeadWeights | None,
    options: Options,
    policy_options: PolicyOptions | None,
    taped: bool,
) -> Model:
    _, deter, _, noise = tensors
    return rssm_triton.model_of(noise, deter.shape[1], cell, prior, options, policy, policy_options, taped)


def refuse(tensors: tuple[Tensor, ...], options: Options, policy_options: PolicyOptions | None) -> str:
    """Why Triton cannot take a call; an empty string if it can."""
    action, deter, _, noise = tensors
    if policy_options is None:
        return rssm_triton.refuse(deter, noise, options.act)
    if action.shape[2] > _MOST_ACTIONS:
        return f"it takes at most {_MOST_ACTIONS} actions; action_noise is {tuple(action.shape)}"
    return rssm_triton.refuse(deter, noise, options.act, policy_options.act)


def forward(
    outputs: tuple[Tensor, ...],
    tensors: tuple[Tensor, ...],
    cell: CellWeights,
    prior: HeadWeights,
    policy: HeadWeights | None,
    options: Options,
    policy_options: PolicyOptions | None,
    taped: bool,
) -> tuple[Tensor, ...]:
    """Fills the outputs of the schema, the tape if there is one, from its four tensors."""
    with torch.autocast(tensors[0].device.type, enabled=False):
        _forward(outputs, tensors, cell, prior, policy, options, policy_options, taped)
    return outputs


def _forward(outputs, tensors, cell, prior, policy, options, policy_options, taped):
    action, deter, stoch, noise = tensors
    deter_out, stoch_out, statistics, action_out, tape, index = outputs
    model = model_of(tensors, cell, prior, policy, options, policy_options, taped)
    kernels = backend.triton_kernels("rssm_scan")
    B, D, categorical = model.B, model.D, model.classes > 0
    stoch = stoch.flatten(1)
    from_action = taken = acting = None
    if policy is None:
        rows = rssm_cells.clipped(cell, action).flatten(0, 1)
        from_action = rssm_triton.from_action(model, cell, rows, deter.dtype)
    else:
        # The actions as their layer reads them.
        taken = torch.empty_like(action_out) if policy_options.clip_action else action_out
        first = F.linear(stoch, policy.layers[0].weight[:, D:]).float() if categorical else None
        acting = _acting(model, policy, action, action_out, first)
    previous = deter.new_empty(2, B, D, dtype=torch.float32)
    previous[0] = deter
    stoch_first = F.linear(stoch, cell.in_stoch) if categorical else stoch
    memory = kernels.Memory(
        from_action=from_action,
        action=taken,
        embeds=None,
        is_first=None,
        noise=rssm_triton.kernel_noise(model, noise),
        initial_deter=None,
        initial_stoch=None,
        stoch_first=stoch_first.to(torch.float32, copy=True),  # of Gaussian latents, the steps overwrite it
        stoch_start=None,
        previous=previous,
        sums=None,
        deter=deter_out,
        stoch=stoch_out,
        statistics=statistics,
        tape=tape if taped else deter.new_empty(model.tape_size, dtype=torch.float32),
        index=index,
    )
    weights = rssm_triton.weights_of(model, cell, prior, policy)
    kernels.run(model, weights, rssm_triton.kernel_head(prior), acting, memory)


def _acting(model: Model, policy: HeadWeights, noise: Tensor, action: Tensor, stoch_first: Tensor | None) -> Any:
    """The policy as the kernels take it."""
    first, options = policy.layers[0].weight, model.policy_options
    return rssm_triton.kernel_head(
        policy,
        stoch=first[:, model.D :].t().contiguous() if model.classes else None,
        stoch_first=stoch_first,
        noise=(rssm_cells.arrival_times(noise.float()) if options.dist == "categorical" else noise).contiguous(),
        action=action,
        **backend.triton_kernels("rssm_scan").policy_constants(options, model.A),
    )


def backward(
    grads: tuple[Tensor | None, ...],
    outputs: tuple[Tensor, ...],
    tensors: tuple[Tensor, ...],
    cell: CellWeights,
    prior: HeadWeights,
    policy: HeadWeights | None,
    options: Options,
    policy_options: PolicyOptions | None,
    wanted: Sequence[bool],
    wanted_weights: tuple[CellWeights, HeadWeights, HeadWeights | None],
) -> list[Tensor | None]:
    """Gradients of (action, deter, stoch, noise) and of the weights of cell, prior and policy; None where none is
    wanted. `wanted` and `wanted_weights` have True or False in place of the tensors."""
    with torch.autocast(tensors[0].device.type, enabled=False):
        return _backward(grads, outputs, tensors, cell, prior, policy, options, policy_options, wanted, wanted_weights)


def _backward(grads, outputs, tensors, cell, prior, policy, options, policy_options, wanted, wanted_weights):
    action, deter, stoch, noise = tensors
    deter_out, stoch_out, statistics, action_out, tape, _ = outputs
    model = model_of(tensors, cell, prior, policy, options, policy_options, taped=True)
    B, D, dtype = model.B, model.D, deter.dtype
    weights = rssm_triton.weights_of(model, cell, prior, policy)
    before = torch.cat([deter.unsqueeze(0), deter_out[:-1]]).flatten(0, 1)
    memory = rssm_triton.gradients_of(
        model,
        grads,
        tape,
        is_first=None,
        noise=rssm_triton.backward_noise(model, noise),
        before=before,
        given=statistics,
        initial=None,
    )
    acting = None if policy is None else _acting(model, policy, action, action_out, None)
    backend.triton_kernels("rssm_scan").run(model, weights, rssm_triton.kernel_head(prior), acting, memory)

    wanted_cell, wanted_prior, wanted_policy = wanted_weights
    taken = rssm_cells.clipped(cell, action) if policy is None else policy_options.taken(action_out)
    stoch_before = lambda: torch.cat([stoch.unsqueeze(0), stoch_out[:-1]]).flatten(0, 1).flatten(1)  # noqa: E731
    back = rssm_triton.Backward(model, cell, weights, memory, before, stoch_before, taken.flatten(0, 1))
    cell_grads = back.of_cell({name for name, wants in wanted_cell._asdict().items() if wants})
    heads = [back.of_head(model.prior, prior, wanted_prior, memory.statistics_rows, lambda: deter_out.flatten(0, 1))]
    if policy is not None:
        inputs = (lambda: before, lambda: back.stoch_before)
        heads.append(back.of_head(model.policy, policy, wanted_policy, memory.action_rows, *inputs))

    grad_action = grad_deter = grad_stoch = None
    if wanted[0]:
        grad_action = (back.action_grad.to(dtype) @ cell.in_action).view(action.shape)
        if model.cell == "block_gru":
            grad_action = grad_action / action.abs().clamp(min=1)
    if wanted[1]:
        grad_deter = memory.carry.to(dtype)
    if wanted[2]:
        grad_stoch = back.stoch_grad[:B].to(dtype) @ cell.in_stoch
    acted_on = policy is not None and not policy_options.detach_feature
    if acted_on and (wanted[1] or wanted[2]):  # it acted on the state before the first step
        acted = back.left["policy0"].grad[:B].to(dtype) @ policy.layers[0].weight
        of_deter, of_stoch = acted.split([D, stoch[0].numel()], 1)
        grad_deter = None if grad_deter is None else grad_deter + of_deter
        grad_stoch = None if grad_stoch is None else grad_stoch + of_stoch
    grad_stoch = None if grad_stoch is None else grad_stoch.view(stoch.shape)
    flat = [grad_action, grad_deter, grad_stoch, None, *cell_grads]
    return flat + [x for head in heads for x in (*sum(head.layers, ()), *head[1:])]
