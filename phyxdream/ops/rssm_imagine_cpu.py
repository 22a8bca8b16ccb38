"""What surrounds the C++ of `rssm_imagine` and `rssm_imagine_policy`: gradients of the weights that want one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from phyxdream.ops import rssm_cells, rssm_cpu
from phyxdream.ops.rssm_cells import POLICIES, BlockGRUWeights, CellWeights, HeadWeights, Options
from phyxdream.ops.rssm_cpu import product


class PolicyOptions(NamedTuple):
    """The numbers and names beside the weights of a policy."""

    dist: str
    act: str
    unimix: float
    min_std: float
    max_std: float
    detach_feature: bool
    clip_action: bool

    def taken(self, action: Tensor) -> Tensor:
        """What the cell reads of an action."""
        return rssm_cells.clip_action(action) if self.clip_action else action


def tape_size(
    cell: CellWeights,
    prior: HeadWeights,
    policy: HeadWeights | None,
    options: PolicyOptions | None,
    H: int,
    B: int,
    A: int,
    D: int,
    latent: Sequence[int],
) -> int:
    """Floats that the forward keeps for the backward."""
    rows = rssm_cpu.cell_rows(cell, D) + (math.prod(latent) if len(latent) == 2 else 0)
    for head in (prior, policy):
        if head is not None:
            rows += sum(rssm_cpu.layer_rows(layer.weight.shape[0], layer.gain) for layer in head.layers)
    if policy is not None:
        rows += A if options.dist == "categorical" else 2 * A
    return rssm_cpu.tape_size(H, B, rows)


def forward(
    outputs: tuple[Tensor, ...],
    tensors: tuple[Tensor, ...],
    cell: CellWeights,
    prior: HeadWeights,
    policy: HeadWeights | None,
    options: Options,
    policy_options: PolicyOptions | None,
) -> tuple[Tensor, ...]:
    """Fills the six outputs of the schema from its four tensors."""
    action, deter, stoch, noise = tensors
    B, D, categorical = deter.shape[0], deter.shape[1], noise.dim() == 4
    arguments = _common(outputs, tensors, cell, prior, policy, options, policy_options)
    stoch = stoch.reshape(B, -1)
    if policy is None:
        arguments["action"] = rssm_cells.clipped(cell, action)
    else:
        arguments["action_noise"] = action
        # What z brings to its layers at the first step, where it may be anything.
        arguments["policy_stoch_first"] = product(stoch, policy.layers[0].weight[:, D:]) if categorical else None
    arguments["noise"] = rssm_cpu.kernel_noise(noise, options)
    arguments["stoch_first"] = product(stoch, cell.in_stoch) if categorical else stoch
    rssm_cpu.call("rssm_scan_forward", arguments)
    return outputs


def _common(outputs, tensors, cell, prior, policy, options, policy_options):
    """What both directions are told."""
    action, deter, _, noise = tensors
    deter_out, stoch_out, statistics, action_out, tape, index = outputs
    flat = [*cell, *(x for head in (prior, policy) if head is not None for x in (*sum(head.layers, ()), *head[1:]))]
    threads = rssm_cpu.threads(noise.shape[1], flat)
    described = rssm_cpu.describe("state", prior)
    arguments = {
        **rssm_cpu.arguments(cell, described, options, threads, noise.shape, deter, action.shape[2]),
        # Of a group's lanes beyond the last sequence.
        "initial_deter": deter.new_zeros(deter.shape[1]),
        "initial_stoch": deter.new_zeros(math.prod(noise.shape[2:])),
        "deter_out": deter_out,
        "stoch_out": stoch_out,
        "statistics_out": statistics,
        "tape": tape if tape.numel() else None,
        "tape_size": tape.numel(),
        "index": index if noise.dim() == 4 else None,
    }
    if policy is not None:
        arguments |= {
            **rssm_cpu.describe("policy", policy),
            "action": action_out,
            "dist": POLICIES.index(policy_options.dist),
            "policy_act": rssm_cpu.ACTS[policy_options.act],
            "policy_unimix": policy_options.unimix,
            "policy_min_std": policy_options.min_std,
            "policy_max_std": policy_options.max_std,
            "detach_feature": policy_options.detach_feature,
            "clip_action": policy_options.clip_action,
        }
    return arguments


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
    action, deter, stoch, noise = tensors
    deter_out, stoch_out, _, action_out, _, index = outputs
    H, B, *latent = noise.shape
    D, rows, categorical = deter.shape[1], H * B, len(latent) == 2
    wanted_cell, wanted_prior, wanted_policy = wanted_weights
    cell_wants = {name for name, wants in wanted_cell._asdict().items() if wants}
    cell_back = rssm_cpu.CellBackward(cell, cell_wants, wanted[0] or wanted[2], deter_out)
    prior_back = rssm_cpu.HeadBackward("state", prior, wanted_prior, False, deter_out)
    arguments = {
        **_common(outputs, tensors, cell, prior, policy, options, policy_options),
        **cell_back.arguments(),
        **prior_back.arguments(),
        "noise": None if categorical and not options.gumbel else noise,
        "grad_deter": grads[0],
        "grad_stoch": grads[1],
        "grad_statistics": grads[2],
        "grad_action": grads[3],
        "grad_deter_first": (grad_deter := deter.new_empty(B, D)),
        "grad_initial_deter": None,
    }
    if policy is None:
        arguments["action"] = None
    else:
        policy_back = rssm_cpu.HeadBackward("policy", policy, wanted_policy, wanted[2], deter_out)
        arguments |= {
            **policy_back.arguments(),
            "action_noise": None if policy_options.dist == "categorical" else action,
            "policy_stoch_first": None,
        }
    rssm_cpu.call("rssm_scan_backward", arguments)

    start = stoch.reshape(B, -1)

    def deter_product(grad):
        """The gradient (U, D) of a weight that read h before the step, from rows (H·B, U)."""
        found = product(grad[:B].t(), deter.t())
        return product(grad[B:].t(), deter_out[:-1].reshape(rows - B, D).t(), out=found, add=True)

    def stoch_product(grad):
        """The gradient (U, Z) of a weight that read z, from rows (H·B, U)."""
        if not categorical:
            return product(grad.t(), torch.cat([start, stoch_out[:-1].reshape(rows - B, start.shape[1])]).t())
        found = rssm_cpu.one_hot_product(grad[B:], index[:-1].flatten(0, 1), latent[1])
        return product(grad[:B].t(), start.t(), out=found, add=True)

    taken = rssm_cells.clipped(cell, action) if policy is None else policy_options.taken(action_out)
    cell_grads = {}
    if cell_wants:
        before = rssm_cpu.states_before(deter, deter_out)
        cell_grads = cell_back.gradients(before, taken.reshape(rows, -1))
    if "in_stoch" in cell_wants:
        cell_grads["in_stoch"] = stoch_product(cell_back.stoch_grad)
    heads = [prior_back.gradients(lambda grad: product(grad.t(), deter_out.reshape(rows, D).t()))]
    if policy is not None:
        heads.append(policy_back.gradients(lambda grad: torch.cat([deter_product(grad), stoch_product(grad)], 1)))
    grad_action = grad_stoch = None
    if wanted[0]:
        grad_action = product(cell_back.action_grad, cell.in_action.t()).view(action.shape)
        if isinstance(cell, BlockGRUWeights):
            grad_action /= action.abs().clamp_(min=1)
    if wanted[2]:
        grad_stoch = product(cell_back.stoch_grad[:B], cell.in_stoch.t())
        if policy is not None and not policy_options.detach_feature:
            product(policy_back.grads[0][:B], policy.layers[0].weight[:, D:].t(), out=grad_stoch, add=True)
        grad_stoch = grad_stoch.view(stoch.shape)
    flat = [grad_action, grad_deter if wanted[1] else None, grad_stoch, None]
    flat += [cell_grads.get(name) for name in cell._fields]
    return flat + [x for head in heads for x in (*sum(head.layers, ()), *head[1:])]
