"""What surrounds the C++ of `rssm_observe`: the embedding's layer of all steps before, gradients of weights after."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from phyxdream.ops import rssm_cells, rssm_cpu
from phyxdream.ops.rssm_cells import (
    BlockGRUWeights,
    CellWeights,
    HeadWeights,
    LayerWeights,
    Options,
    PosteriorWeights,
)
from phyxdream.ops.rssm_cpu import product


def plan(cell: CellWeights, posterior: PosteriorWeights, B: int) -> str:
    """What a call would run, in a few words."""
    return rssm_cpu.plan(B, rssm_cpu.threads(B, (*cell, *posterior)))


def tape_size(cell: CellWeights, posterior: PosteriorWeights, T: int, B: int, D: int, latent: list[int]) -> int:
    """Floats that the forward keeps for the backward."""
    softmax = math.prod(latent) if len(latent) == 2 else 0
    head = rssm_cpu.layer_rows(posterior.in_weight.shape[0], posterior.in_gain)
    return rssm_cpu.tape_size(T, B, rssm_cpu.cell_rows(cell, D) + head + softmax)


def _head(posterior):
    """As a head whose first layer starts from what the embedding brings, bias and all."""
    layer = LayerWeights(posterior.in_weight, None, posterior.in_gain, posterior.in_shift)
    return HeadWeights((layer,), posterior.out_weight, posterior.out_bias)


def forward(
    outputs: tuple[Tensor, ...],
    tensors: tuple[Tensor, ...],
    cell: CellWeights,
    posterior: PosteriorWeights,
    options: Options,
) -> tuple[Tensor, ...]:
    """Fills the five outputs of the schema from its eight tensors."""
    embed, action, is_first, deter, stoch, noise, _, initial_stoch = tensors
    T, B, *latent = noise.shape
    D = deter.shape[1]
    embeds = product(embed.reshape(T * B, -1), posterior.in_weight[:, D:], bias=posterior.in_bias)
    first_stoch = torch.where(is_first[0, :, None], initial_stoch.reshape(-1), stoch.reshape(B, -1))
    start = initial_stoch.reshape(-1)
    if len(latent) == 2:  # what z brings to its layer, where it is not one of our own one-hots
        first_stoch = product(first_stoch, cell.in_stoch)
        start = product(start.unsqueeze(0), cell.in_stoch) if T > 1 else None
    arguments = {
        **_common(outputs, tensors, cell, posterior, options),
        "state_first_rows": embeds,
        "action": rssm_cells.clipped(cell, _reset(action, is_first)),
        "noise": rssm_cpu.kernel_noise(noise, options),
        "stoch_first": first_stoch,
        "stoch_start": start,
        "initial_stoch": initial_stoch,
    }
    rssm_cpu.call("rssm_scan_forward", arguments)
    return outputs


def _reset(action, is_first):
    return torch.where(is_first.unsqueeze(-1), 0.0, action)


def _common(outputs, tensors, cell, posterior, options):
    """What both directions are told."""
    _, action, is_first, deter, _, noise, initial_deter, _ = tensors
    deter_out, stoch_out, statistics, tape, index = outputs
    threads = rssm_cpu.threads(noise.shape[1], (*cell, *posterior))
    state = rssm_cpu.describe("state", _head(posterior))
    return {
        **rssm_cpu.arguments(cell, state, options, threads, noise.shape, deter, action.shape[2]),
        "is_first": is_first,
        "initial_deter": initial_deter,
        "deter_out": deter_out,
        "stoch_out": stoch_out,
        "statistics_out": statistics,
        "tape": tape if tape.numel() else None,
        "tape_size": tape.numel(),
        "index": index if noise.dim() == 4 else None,
    }


def backward(
    grads: tuple[Tensor | None, ...],
    outputs: tuple[Tensor, ...],
    tensors: tuple[Tensor, ...],
    cell: CellWeights,
    posterior: PosteriorWeights,
    options: Options,
    wanted: Sequence[bool],
    wanted_cell: CellWeights,
    wanted_posterior: PosteriorWeights,
) -> tuple[tuple[Tensor | None, ...], CellWeights, PosteriorWeights]:
    """Gradients of (embed, action, deter, stoch, initial_deter, initial_stoch), of the cell and of the posterior; None
    where none is wanted. The last three arguments have True or False in place of the tensors."""
    embed, action, is_first, deter, stoch, noise, initial_deter, initial_stoch = tensors
    deter_out, stoch_out, _, _, index = outputs
    T, B, *latent = noise.shape
    D, rows, categorical = deter.shape[1], T * B, len(latent) == 2
    wants_embed, wants_action, _, wants_stoch, wants_initial_deter, wants_initial_stoch = wanted
    cell_wants = {name for name, wants in wanted_cell._asdict().items() if wants}
    inputs = wants_action or wants_stoch or wants_initial_stoch
    cell_back = rssm_cpu.CellBackward(cell, cell_wants, inputs, deter_out)
    wanted_head = HeadWeights((LayerWeights(*wanted_posterior[:4]),), *wanted_posterior[4:])
    head_back = rssm_cpu.HeadBackward("state", _head(posterior), wanted_head, wants_embed, deter_out)
    grad_deter, grad_initial_deter = deter.new_empty(B, D), deter.new_empty(D) if wants_initial_deter else None
    arguments = {
        **_common(outputs, tensors, cell, posterior, options),
        **cell_back.arguments(),
        **head_back.arguments(),
        "action": None,
        "noise": None if categorical and not options.gumbel else noise,
        "grad_deter": grads[0],
        "grad_stoch": grads[1],
        "grad_statistics": grads[2],
        "grad_action": None,
        "grad_deter_first": grad_deter,
        "grad_initial_deter": grad_initial_deter,
    }
    rssm_cpu.call("rssm_scan_backward", arguments)

    grad_embed = None
    if wants_embed:
        grad_embed = product(head_back.grads[0], posterior.in_weight[:, D:].t()).view(embed.shape)
    deters, embeds = deter_out.reshape(rows, D), embed.reshape(rows, -1)
    found = head_back.gradients(lambda grad: rssm_cpu.products(grad, deters, embeds))
    posterior_grads = PosteriorWeights(*found.layers[0], *found[1:])

    first = is_first.unsqueeze(-1)
    action = _reset(action, is_first)
    cell_grads = {}
    if cell_wants:
        before = rssm_cpu.states_before(deter, deter_out, is_first, initial_deter)
        cell_grads = cell_back.gradients(before, rssm_cells.clipped(cell, action).reshape(rows, -1))

    # Where z came from: the step before, a reset, or, at the first step, the caller.
    grad_stoch = grad_initial_stoch = None
    if wants_stoch or wants_initial_stoch or "in_stoch" in cell_wants:
        stoch_grad, start = cell_back.stoch_grad, initial_stoch.reshape(-1)
        reset = stoch_grad[is_first.flatten()].sum(0, keepdim=True)
        kept = torch.where(first[0], 0.0, stoch_grad[:B])
    if wants_initial_stoch:
        grad_initial_stoch = product(reset, cell.in_stoch.t()).view(initial_stoch.shape)
    if wants_stoch:
        grad_stoch = product(kept, cell.in_stoch.t()).view(stoch.shape)
    if "in_stoch" in cell_wants and categorical:
        given = torch.cat([torch.where(first[0], 0.0, stoch.reshape(B, -1)), start.unsqueeze(0)])
        left_out = is_first[1:].flatten()
        by_class = rssm_cpu.one_hot_product(stoch_grad[B:], index[:-1].flatten(0, 1), latent[1], left_out)
        cell_grads["in_stoch"] = product(torch.cat([kept, reset]).t(), given.t(), out=by_class, add=True)
    elif "in_stoch" in cell_wants:
        source = torch.cat([stoch.unsqueeze(0), stoch_out[:-1]])
        source = torch.where(first, start, source).reshape(rows, -1)
        cell_grads["in_stoch"] = product(stoch_grad.t(), source.t())

    grad_action = None
    if wants_action:
        grad_action = _reset(product(cell_back.action_grad, cell.in_action.t()).view(action.shape), is_first)
        if isinstance(cell, BlockGRUWeights):
            grad_action /= action.abs().clamp_(min=1)
    input_grads = (grad_embed, grad_action, grad_deter, grad_stoch, grad_initial_deter, grad_initial_stoch)
    return input_grads, type(cell)(*(cell_grads.get(name) for name in cell._fields)), posterior_grads
