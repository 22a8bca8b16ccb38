"""What surrounds the Triton kernels of `rssm_observe`: resets, and the embedding's layer of all steps at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from phyxdream.ops import backend, rssm_cells, rssm_triton
from phyxdream.ops.rssm_cells import CellWeights, HeadWeights, LayerWeights, Options, PosteriorWeights
from phyxdream.ops.rssm_triton import Model


def model_of(
    noise: Tensor, D: int, cell: CellWeights, posterior: PosteriorWeights, options: Options, taped: bool
) -> Model:
    return rssm_triton.model_of(noise, D, cell, _head(posterior), options, taped=taped)


def _head(posterior):
    return HeadWeights((LayerWeights(*posterior[:4]),), *posterior[4:])


def _weights(model, cell, posterior):
    return rssm_triton.weights_of(model, cell, _head(posterior)) | {"head_bias": None}  # it came in with the embedding


def _scaled_action(cell, action, is_first):
    """The action as its layer reads it, (T·B, A), and its derivative by the one that was given."""
    scale = (~is_first).unsqueeze(-1).to(action.dtype)
    action = torch.where(is_first.unsqueeze(-1), 0.0, action)
    if isinstance(cell, rssm_cells.BlockGRUWeights):
        scale = scale / action.abs().clamp(min=1)
        action = action * scale
    return action.flatten(0, 1), scale


def _source(is_first, initial, given, results):
    """What each step started from, (T·B, size): where a reset leads, or what the step before left."""
    before = torch.cat([given.unsqueeze(0), results[:-1]]).flatten(2)  # (T, B, size)
    return torch.where(is_first.unsqueeze(-1), initial.flatten(), before).flatten(0, 1)


def forward(
    tensors: tuple[Tensor, ...], cell: CellWeights, posterior: PosteriorWeights, options: Options, taped: bool
) -> tuple[Tensor, ...]:
    """The five outputs of the schema from its eight tensors; the tape is empty where no backward may follow."""
    embed, action, is_first, deter, stoch, noise, initial_deter, initial_stoch = tensors
    T, B, *latent = noise.shape
    D, categorical = deter.shape[1], len(latent) == 2
    model = model_of(noise, D, cell, posterior, options, taped)
    kernels = backend.triton_kernels("rssm_scan")
    with torch.autocast(embed.device.type, enabled=False):
        scaled, _ = _scaled_action(cell, action, is_first)
        stoch_first = torch.where(is_first[0, :, None], initial_stoch.flatten(), stoch.flatten(1))
        stoch_start = initial_stoch.flatten()
        if categorical:  # what z brings to its layer, where it is not one of our own one-hots
            stoch_first, stoch_start = F.linear(stoch_first, cell.in_stoch), F.linear(stoch_start, cell.in_stoch)
        previous = embed.new_empty(2, B, D, dtype=torch.float32)
        previous[0] = torch.where(is_first[0, :, None], initial_deter, deter)
        outputs = (
            embed.new_empty(T, B, D),
            embed.new_empty(T, B, *latent),
            embed.new_empty(T, B, posterior.out_weight.shape[0]),
            embed.new_empty(model.tape_size if taped else 0, dtype=torch.float32),
            embed.new_empty((T, B, latent[0]) if categorical else 0, dtype=torch.int32),
        )
        memory = kernels.Memory(
            rssm_triton.from_action(model, cell, scaled, embed.dtype),
            None,
            F.linear(embed.flatten(0, 1), posterior.in_weight[:, D:], posterior.in_bias),
            is_first.contiguous().view(torch.uint8),
            rssm_triton.kernel_noise(model, noise),
            initial_deter.contiguous(),
            initial_stoch.contiguous(),
            stoch_first.float(),  # of Gaussian latents, a copy that the steps overwrite
            stoch_start.contiguous(),
            previous,
            None,
            *outputs,
        )
        if not taped:
            memory = memory._replace(tape=embed.new_empty(model.tape_size, dtype=torch.float32))
        prior = rssm_triton.kernel_head(_head(posterior))
        kernels.run(model, _weights(model, cell, posterior), prior, None, memory)
    return outputs


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
    where none is wanted. `wanted...` have True or False in place of the tensors."""
    with torch.autocast(tensors[0].device.type, enabled=False):
        return _backward(grads, outputs, tensors, cell, posterior, options, wanted, wanted_cell, wanted_posterior)


def _backward(grads, outputs, tensors, cell, posterior, options, wanted, wanted_cell, wanted_posterior):
    embed, action, is_first, deter, stoch, noise, initial_deter, initial_stoch = tensors
    deter_out, stoch_out, statistics, tape, _ = outputs
    T, B = noise.shape[:2]
    D, dtype, head = deter.shape[1], embed.dtype, _head(posterior)
    model = model_of(noise, D, cell, posterior, options, taped=True)
    weights = _weights(model, cell, posterior)
    before = _source(is_first, initial_deter, deter, deter_out)
    memory = rssm_triton.gradients_of(
        model,
        (*grads, None),
        tape,
        is_first=is_first.contiguous().view(torch.uint8),
        noise=rssm_triton.backward_noise(model, noise),
        before=before,
        given=statistics.contiguous(),
        initial=tape.new_zeros(B, D),
    )
    backend.triton_kernels("rssm_scan").run(model, weights, rssm_triton.kernel_head(head), None, memory)

    scaled, scale = _scaled_action(cell, action, is_first)
    stoch_before = lambda: _source(is_first, initial_stoch, stoch, stoch_out)  # noqa: E731
    back = rssm_triton.Backward(model, cell, weights, memory, before, stoch_before, scaled)
    cell_grads = back.of_cell({name for name, wants in wanted_cell._asdict().items() if wants})
    inputs = (lambda: deter_out.flatten(0, 1), lambda: embed.flatten(0, 1))
    found = back.of_head(model.prior, head, _head(wanted_posterior), memory.statistics_rows, *inputs)

    # Where z came from: the step before, a reset, or, at the first step, the caller.
    by_step, first = back.stoch_grad.view(T, B, model.U), is_first.unsqueeze(-1)

    def through_in_stoch(grad, like):
        return (grad.to(dtype) @ cell.in_stoch).view(like.shape)

    makers = (
        lambda: (back.left["head"].grad.to(dtype) @ posterior.in_weight[:, D:]).view(embed.shape),
        lambda: (back.action_grad.to(dtype) @ cell.in_action).view(action.shape) * scale,
        lambda: memory.carry.to(dtype),
        lambda: through_in_stoch(torch.where(first[0], 0.0, by_step[0]), stoch),
        lambda: memory.initial.sum(0).to(dtype),
        lambda: through_in_stoch(torch.where(first, by_step, 0.0).sum((0, 1)), initial_stoch),
    )
    of_inputs = tuple(make() if wants else None for make, wants in zip(makers, wanted, strict=True))
    return of_inputs, cell_grads, PosteriorWeights(*found.layers[0], *found[1:])
