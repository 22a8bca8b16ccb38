"""The observe scan of an RSSM: T steps of cell, posterior and sample, with resets inside.

    h_t, z_t = is_first_t ? initial : h_{t-1}, z_{t-1}        a_t = is_first_t ? 0 : action_t
    h_t = cell(h_{t-1}, z_{t-1}, a_t)                         statistics_t = posterior(h_t, embed_t)
    z_t ~ q(statistics_t), drawn by the given noise

The equations of the cells are in phyxdream/ops/rssm_cells.py. C++ in csrc/rssm_scan.cpp, called by
phyxdream/ops/rssm_observe_cpu.py; Triton in kernels/rssm_scan.py, called by phyxdream/ops/rssm_observe_triton.py.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from phyxdream.ops import rssm_cells, rssm_cpu, rssm_observe_cpu, rssm_observe_triton, rssm_triton
from phyxdream.ops.backend import Backend, Op
from phyxdream.ops.rssm_cells import CELLS, CellWeights, Options, PosteriorWeights, Sizes
from phyxdream.ops.rssm_contract import (
    alike,
    cell_name,
    check_act,
    check_cell,
    check_flag,
    check_numbers,
    check_shape,
    check_tensors,
    check_weights,
    in_float32,
    named_weights,
    per_class,
)


def rssm_observe(
    embed: Tensor,
    action: Tensor,
    is_first: Tensor,
    deter: Tensor,
    stoch: Tensor,
    noise: Tensor,
    cell: CellWeights,
    posterior: PosteriorWeights,
    *,
    initial_deter: Tensor | None = None,
    initial_stoch: Tensor | None = None,
    act: str | None = None,
    unimix: float = 0.01,
    min_std: float = 0.1,
    rms_eps: float = 1e-4,
    layer_eps: float = 1e-3,
    gumbel: bool = False,
) -> tuple[Tensor, ...]:
    """Posterior states of a sequence, differentiable once in every tensor but `is_first` and `noise`.

    Latents are categorical where `stoch` is (B, S, C) and Gaussian where it is (B, S). Categorical samples are
    one-hot with the straight-through gradient of p = (1 - unimix) softmax(logits) + unimix / C; Gaussian ones are
    mean + std · noise with std = softplus(raw) + min_std.

    Args:
        embed: (T, B, E) float32, float64, bfloat16 or float16, any strides. All tensors share its dtype.
        action: (T, B, A); `action[t]` led to observation t.
        is_first: (T, B) bool; where true, the state and the action are reset before the step.
        deter: (B, D) state before the first step.
        stoch: (B, S, C) or (B, S).
        noise: for categorical latents uniform in [0, 1), (T, B, S, C), whose classes race for the smallest
            −log(noise) / p, or (T, B, S), which picks the class where the cumulative probabilities pass it; for
            Gaussian ones (T, B, S) standard normal. float32 also goes with half precision.
        cell: `GRUWeights`, `LayerNormGRUWeights` or `BlockGRUWeights`; which one says which cell it is.
        posterior: `PosteriorWeights`.
        initial_deter: (D,) where a reset leads; None is zeros.
        initial_stoch: (S, C) or (S,) alike.
        act: activation of all layers, `silu`, `elu`, `relu`, `gelu` or `tanh`; None is the cell's own: `elu` for a
            GRU, else `silu`.
        unimix: share in [0, 1) of the uniform distribution in categorical latents.
        min_std: what is added to the standard deviation of Gaussian latents.
        rms_eps, layer_eps: added to the mean square or variance by the two kinds of norm.
        gumbel: whether categorical samples have the gradient of the Gumbel-softmax at temperature 1 in place of that of
            p (Jang et al. 2017); the samples are the same.

    Returns:
        deter (T, B, D), stoch (T, B, S, C) and logits (T, B, S, C) before unimix; or deter, stoch (T, B, S), mean and
        std (T, B, S).

    Half precision is computed in float32, state included, and rounded once; but Triton's products have half-precision
    factors. Inside autocast, all tensors become float32, and on CUDA of the region's dtype.

    Raises:
        TypeError: an argument is of another type, or the dtypes differ.
        ValueError: a shape does not fit, the devices differ, a tensor is empty, or an option is out of range.

    Source: Hafner et al., "Learning Latent Dynamics for Planning from Pixels", 2019 (`GRUWeights`, Gaussian);
    "Mastering Atari with Discrete World Models", 2021 (`LayerNormGRUWeights`, straight-through); danijar/dreamerv3,
    rssm.py (`BlockGRUWeights`, unimix).

    >>> from phyxdream.ops import GRUWeights, PosteriorWeights
    >>> T, B, E, A, D, S, C, U = 5, 2, 3, 1, 4, 2, 3, 6
    >>> cell = GRUWeights(torch.randn(U, S * C), torch.randn(U, A), torch.zeros(U), None, None,
    ...                   torch.randn(3 * D, U), torch.randn(3 * D, D), torch.zeros(3 * D), torch.zeros(3 * D))
    >>> posterior = PosteriorWeights(torch.randn(U, D + E), torch.zeros(U), None, None,
    ...                              torch.randn(S * C, U), torch.zeros(S * C))
    >>> deter, stoch, logits = rssm_observe(
    ...     torch.randn(T, B, E), torch.randn(T, B, A), torch.zeros(T, B, dtype=torch.bool), torch.zeros(B, D),
    ...     torch.zeros(B, S, C), torch.rand(T, B, S, C), cell, posterior)
    >>> deter.shape, stoch.shape, stoch.sum(-1).unique()
    (torch.Size([5, 2, 4]), torch.Size([5, 2, 2, 3]), tensor([1.]))
    """
    args = _prepare(
        embed, action, is_first, deter, stoch, noise, cell, posterior, initial_deter=initial_deter,
        initial_stoch=initial_stoch, act=act, unimix=unimix, min_std=min_std, rms_eps=rms_eps, layer_eps=layer_eps,
        gumbel=gumbel,
    )  # fmt: skip
    deter, stoch, statistics = _op(*args)[:3]
    if stoch.dim() == 4:
        return deter, stoch, statistics.unflatten(-1, stoch.shape[2:])
    mean, raw = statistics.chunk(2, -1)
    return deter, stoch, mean, rssm_cells.deviation(raw, min_std)


# Arguments of the schema: eight tensors, then the weights of cell and posterior in the order of their fields, padded
# with None to as many as the largest cell has, then the name of the cell, the options, and whether a backward may
# follow, which needs the tape.
_TENSORS = ("embed", "action", "is_first", "deter", "stoch", "noise", "initial_deter", "initial_stoch")
_WEIGHTS = max(len(cell._fields) for cell in CELLS.values()) + len(PosteriorWeights._fields)
_INPUTS = ", ".join(
    [f"Tensor {name}" for name in _TENSORS]
    + [f"Tensor? w{i}" for i in range(_WEIGHTS)]
    + ["str cell", "str act", "float unimix", "float min_std", "float rms_eps", "float layer_eps"]
    + ["bool gumbel", "bool cumulative", "bool keep_tape"]
)
# Beside the results, what the backward needs: the tape (floats, laid out by whoever wrote it) and the sampled classes.
_SCHEMA = f"({_INPUTS}) -> (Tensor deter_out, Tensor stoch_out, Tensor statistics, Tensor tape, Tensor index)"
_BACKWARD_SCHEMA = (
    "(Tensor? grad_deter, Tensor? grad_stoch, Tensor? grad_statistics, bool[] wanted, Tensor deter_out, "
    f"Tensor stoch_out, Tensor statistics, Tensor tape, Tensor index, {_INPUTS}) -> Tensor[]"
)
_RESULTS, _OUTPUTS = 3, 5
_DIFFERENTIABLE = [i for i in range(len(_TENSORS) + _WEIGHTS) if i not in (2, 5)]


def _prepare(
    embed, action, is_first, deter, stoch, noise, cell, posterior, *, initial_deter=None, initial_stoch=None, act=None,
    unimix=0.01, min_std=0.1, rms_eps=1e-4, layer_eps=1e-3, gumbel=False,
) -> tuple:  # fmt: skip
    """The checked arguments of the schema."""
    tensors = dict(embed=embed, action=action, is_first=is_first, deter=deter, stoch=stoch, noise=noise)
    check_tensors(tensors)
    name = cell_name(cell)
    if not isinstance(posterior, PosteriorWeights):
        raise TypeError(f"posterior: expected PosteriorWeights, got {type(posterior).__name__}")
    if noise.dim() not in (3, 4):
        raise ValueError(f"noise: expected shape (T, B, S, C) or (T, B, S), got {tuple(noise.shape)}")
    noise, cumulative = per_class(noise, stoch)
    tensors["noise"] = noise
    T, B, *latent = noise.shape
    if embed.dim() != 3 or embed.shape[:2] != (T, B):
        raise ValueError(f"embed: expected shape ({T}, {B}, E), got {tuple(embed.shape)}")
    if action.dim() != 3 or deter.dim() != 2:
        raise ValueError(
            f"action, deter: expected shapes ({T}, {B}, A) and ({B}, D), "
            f"got {tuple(action.shape)} and {tuple(deter.shape)}"
        )
    E, A, D = embed.shape[2], action.shape[2], deter.shape[1]
    if initial_deter is None:
        initial_deter = deter.new_zeros(D)
    if initial_stoch is None:
        initial_stoch = stoch.new_zeros(latent)
    expected = dict(
        action=(T, B, A), is_first=(T, B), deter=(B, D), stoch=(B, *latent), initial_deter=(D,),
        initial_stoch=tuple(latent),
    )  # fmt: skip
    tensors |= dict(initial_deter=initial_deter, initial_stoch=initial_stoch)
    for key, shape in expected.items():
        check_shape(key, tensors[key], shape)
    if 0 in (T, B, E, A, D, *latent):
        sizes = dict(T=T, B=B, E=E, A=A, D=D, latent=tuple(latent))
        raise ValueError(f"embed, action, deter, noise: expected no empty axis, got {sizes}")
    if is_first.dtype is not torch.bool:
        raise TypeError(f"is_first: expected torch.bool, got {is_first.dtype}")
    sizes = Sizes(E, A, D, math.prod(latent))
    check_cell(cell, sizes)
    statistics = sizes.Z if len(latent) == 2 else 2 * sizes.Z
    check_weights("posterior", posterior, posterior.shapes(sizes, statistics))
    flat = alike({**tensors, **named_weights("cell", cell), **named_weights("posterior", posterior)}, half=True)
    flat += [None] * (len(_TENSORS) + _WEIGHTS - len(flat))
    act = rssm_cells.DEFAULT_ACT[name] if act is None else act
    check_act("act", act)
    numbers = dict(unimix=unimix, min_std=min_std, rms_eps=rms_eps, layer_eps=layer_eps)
    check_numbers(numbers)
    check_flag("gumbel", gumbel)
    if gumbel and cumulative:
        raise ValueError(f"noise: gumbel needs it for every class, {tuple(noise.shape)}, got {tuple(noise.shape[:3])}")
    keep_tape = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in flat)
    return *flat, name, act, *map(float, numbers.values()), gumbel, cumulative, keep_tape


def split_weights(args) -> tuple[CellWeights, PosteriorWeights, Options]:
    """What follows the eight tensors of the schema, as it was given to `rssm_observe`."""
    *weights, name, act, unimix, min_std, rms_eps, layer_eps, gumbel, cumulative, _ = args
    return *_by_name(weights, name), Options(act, unimix, min_std, rms_eps, layer_eps, gumbel, cumulative)


def _by_name(weights, name):
    """What is given of each weight, under its name."""
    kind = CELLS[name]
    cell = kind(*weights[: len(kind._fields)])
    return cell, PosteriorWeights(*weights[len(cell) : len(cell) + len(PosteriorWeights._fields)])


def _reference(*args):
    return in_float32(_scan, args)


def _scan(embed, action, is_first, deter, stoch, noise, initial_deter, initial_stoch, *rest):
    cell, posterior, options = split_weights(rest)
    T, latent = noise.shape[0], noise.shape[2:]
    D, categorical = deter.shape[1], len(latent) == 2
    race = rssm_cells.latent_noise(noise, categorical, options)
    first = is_first.unsqueeze(-1)  # (T, B, 1)
    stoch, initial_stoch = stoch.flatten(1), initial_stoch.flatten()
    # Hoisted out of the loop: the action's layer, and the embedding's half of the posterior's first layer.
    actions = rssm_cells.embed_action(cell, rssm_cells.clipped(cell, torch.where(first, 0.0, action)), options)
    from_deter, from_embed = posterior.in_weight.split([D, embed.shape[2]], 1)
    embeds = F.linear(embed, from_embed, posterior.in_bias)
    steps = []
    for t in range(T):
        deter = torch.where(first[t], initial_deter, deter)
        stoch = torch.where(first[t], initial_stoch, stoch)
        deter = rssm_cells.step(cell, deter, stoch, actions[t], options)
        hidden = F.linear(deter, from_deter) + embeds[t]
        hidden = rssm_cells.norm_act(hidden, posterior.in_gain, posterior.in_shift, options)
        statistics = F.linear(hidden, posterior.out_weight, posterior.out_bias)
        if categorical:
            p = rssm_cells.class_probabilities(statistics.unflatten(-1, latent), options.unimix)
            stoch = rssm_cells.draw_latent(p, race[t], options).flatten(1)
        else:
            mean, raw = statistics.chunk(2, -1)
            stoch = mean + rssm_cells.deviation(raw, options.min_std) * race[t]
        steps.append((deter, stoch.unflatten(-1, latent), statistics))
    return tuple(torch.stack(x) for x in zip(*steps, strict=True))


def _fake(*args):
    embed, _, _, deter, _, noise, *_ = args
    cell, posterior, _ = split_weights(args[len(_TENSORS) :])
    T, B, *latent = noise.shape
    statistics = posterior.out_weight.shape[0]
    size, keep_tape = 0, args[-1]
    if keep_tape and embed.is_cuda:
        size = _model(*args).tape_size
    elif keep_tape:
        size = rssm_observe_cpu.tape_size(cell, posterior, T, B, deter.shape[1], latent)
    return (
        embed.new_empty(T, B, deter.shape[1]),
        embed.new_empty(T, B, *latent),
        embed.new_empty(T, B, statistics),
        embed.new_empty(size, dtype=torch.float32),
        embed.new_empty((T, B, latent[0]) if len(latent) == 2 else 0, dtype=torch.int32),
    )


def _fake_backward(*args):
    wanted, deter_out, inputs = args[_RESULTS], args[_RESULTS + 1], args[_RESULTS + 1 + _OUTPUTS :]
    return [
        deter_out.new_empty(inputs[i].shape if wants else 0) for i, wants in zip(_DIFFERENTIABLE, wanted, strict=True)
    ]


def _save(ctx, inputs, output):
    count = len(_TENSORS) + _WEIGHTS
    ctx.set_materialize_grads(False)  # the tape has none, and a loss may leave out a result
    ctx.mark_non_differentiable(*output[_RESULTS:])
    ctx.present = [x is not None for x in inputs[:count]]
    ctx.rest = inputs[count:]
    ctx.save_for_backward(*output, *(x for x in inputs[:count] if x is not None))


def _backward(ctx, *grads):
    outputs, tensors = ctx.saved_tensors[:_OUTPUTS], iter(ctx.saved_tensors[_OUTPUTS:])
    inputs = [next(tensors) if present else None for present in ctx.present]
    wanted = [ctx.needs_input_grad[i] for i in _DIFFERENTIABLE]
    found = ctx.run_backward(*grads[:_RESULTS], wanted, *outputs, *inputs, *ctx.rest)
    results: list[Tensor | None] = [None] * (len(inputs) + len(ctx.rest))
    for i, wants, grad in zip(_DIFFERENTIABLE, wanted, found, strict=True):
        if wants:
            results[i] = grad
    return tuple(results)


def _cpu_forward(*args):
    return rssm_observe_cpu.forward(_fake(*args), args[: len(_TENSORS)], *split_weights(args[len(_TENSORS) :]))


def _backward_of(implementation, *args):
    grads, wanted = args[:_RESULTS], args[_RESULTS]
    outputs, inputs = args[_RESULTS + 1 : _RESULTS + 1 + _OUTPUTS], args[_RESULTS + 1 + _OUTPUTS :]
    weights = inputs[len(_TENSORS) :]
    count = len(_DIFFERENTIABLE) - _WEIGHTS  # of the tensors before the weights
    wanted_by_name = wanted[:count], *_by_name(wanted[count:], weights[_WEIGHTS])
    found = implementation.backward(grads, outputs, inputs[: len(_TENSORS)], *split_weights(weights), *wanted_by_name)
    flat = [x for grads in found for x in grads]
    flat += [None] * (len(_DIFFERENTIABLE) - len(flat))
    empty = outputs[0].new_empty(0)
    return [grad if wants else empty for grad, wants in zip(flat, wanted, strict=True)]


_cpu_backward, _triton_backward = (partial(_backward_of, x) for x in (rssm_observe_cpu, rssm_observe_triton))


def _cpu_refuse(*args):
    return rssm_cpu.refuse(args[0], args[len(_TENSORS) + _WEIGHTS + 1])


def _cpu_slower(*args):
    return rssm_cpu.slower(*args[0].shape[:2], args[len(_TENSORS) : len(_TENSORS) + _WEIGHTS])


def _cpu_plan(*args):
    cell, posterior, _ = split_weights(args[len(_TENSORS) :])
    return rssm_observe_cpu.plan(cell, posterior, args[0].shape[1])


def _triton_forward(*args):
    return rssm_observe_triton.forward(args[: len(_TENSORS)], *split_weights(args[len(_TENSORS) :]), taped=args[-1])


def _triton_refuse(*args):
    return rssm_triton.refuse(args[0], args[5], args[len(_TENSORS) + _WEIGHTS + 1])


def _triton_plan(*args):
    return rssm_triton.plan(_model(*args), args[0])


def _model(embed, action, is_first, deter, stoch, noise, initial_deter, initial_stoch, *rest):
    return rssm_observe_triton.model_of(noise, deter.shape[1], *split_weights(rest), taped=rest[-1])


_op = Op(
    "rssm_observe",
    prepare=_prepare,
    reference=_reference,
    schema=_SCHEMA,
    backward_schema=_BACKWARD_SCHEMA,
    fake=_fake,
    backward_fake=_fake_backward,
    save=_save,
    backward=_backward,
    backends=(
        Backend("cpu", _cpu_forward, _cpu_backward, _cpu_refuse, _cpu_plan, _cpu_slower),
        Backend("triton", _triton_forward, _triton_backward, _triton_refuse, _triton_plan),
    ),
)
