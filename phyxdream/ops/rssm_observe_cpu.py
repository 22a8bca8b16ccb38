"""What surrounds the C++ of `rssm_observe`: the parts that do not recur, as large matrix products, and its memory.

csrc/rssm_observe.cpp walks the steps. Before it, the embedding's layer of all steps is one product; after it, the
gradient of every weight is one product of rows (T·B) that it wrote.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from phyxdream.ops import backend, rssm_cells
from phyxdream.ops.rssm_cells import (
    BlockGRUWeights,
    CellWeights,
    GRUWeights,
    LayerNormGRUWeights,
    Options,
    PosteriorWeights,
)

_LANES = 16  # sequences that C++ treats as one
_CELLS = {GRUWeights: 0, LayerNormGRUWeights: 1, BlockGRUWeights: 2}
_ACTS = {"silu": 1, "elu": 2, "relu": 3}


def refuse(embed: Tensor, act: str) -> str:
    """Why C++ cannot take a call; an empty string if it can."""
    if act not in _ACTS:
        return f"it knows the activations {', '.join(_ACTS)}, not {act}"
    return backend.refuse_cpu(embed, (torch.float32,))


def plan(cell: CellWeights, posterior: PosteriorWeights, B: int) -> str:
    """What a call would run, in a few words."""
    threads, groups = _threads(cell, posterior, B), math.ceil(B / _LANES)
    return (
        f"C++, {threads} thread{'s' * (threads > 1)} sharing the features of a step, "
        f"{groups} group{'s' * (groups > 1)} of {_LANES} sequences side by side"
    )


def slower(T: int) -> str:
    """Why the reference is faster, for a few steps."""
    return "laying out the weights takes as long as some steps, and there are fewer than 4" if T < 4 else ""


def _threads(cell, posterior, B):
    """Below some microseconds a step, threads cost more than they bring."""
    weights = sum(x.numel() for x in (*cell, *posterior) if x is not None)
    return torch.get_num_threads() if weights * math.ceil(B / _LANES) >= 1 << 17 else 1


def tape_size(cell: CellWeights, posterior: PosteriorWeights, T: int, B: int, D: int, latent: list[int]) -> int:
    """Floats that the forward keeps for the backward; the order is that of `set_up` in C++."""

    def layer(size, gain):
        return size + (gain is not None)

    V = posterior.in_weight.shape[0]
    if isinstance(cell, BlockGRUWeights):
        U = cell.in_deter.shape[0]
        rows = layer(U, cell.in_deter_gain) + layer(U, cell.in_stoch_gain) + layer(U, cell.in_action_gain)
        rows += layer(D, cell.mix_gain) + 3 * D
    else:
        rows = layer(cell.in_stoch.shape[0], cell.in_gain)
        rows += 4 * D if isinstance(cell, GRUWeights) else layer(3 * D, cell.gates_gain)
    rows += layer(V, posterior.in_gain) + (math.prod(latent) if len(latent) == 2 else 0)
    return T * math.ceil(B / _LANES) * _LANES * rows


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
    weights = _weights(cell, posterior)
    embeds = product(embed.reshape(T * B, -1), posterior.in_weight[:, D:], bias=posterior.in_bias)
    first_stoch = torch.where(is_first[0, :, None], initial_stoch.reshape(-1), stoch.reshape(B, -1))
    start = initial_stoch.reshape(-1)
    if len(latent) == 2:  # what z brings to its layer, where it is not one of our own one-hots
        first_stoch, start = product(first_stoch, cell.in_stoch), product(start.unsqueeze(0), cell.in_stoch)
    arguments = {
        **_common(outputs, tensors, cell, posterior, options, weights),
        "embeds": embeds,
        "action": _scaled_action(cell, action, is_first)[0],
        "noise": rssm_cells.arrival_times(noise) if len(latent) == 2 else noise,
        "stoch_first": first_stoch,
        "stoch_start": start,
        "initial_stoch": initial_stoch,
        "out_bias": posterior.out_bias,
    }
    _call("rssm_observe_forward", arguments)
    return outputs


def _scaled_action(cell, action, is_first):
    """The action as its layer reads it, (T, B, A), and its derivative by the one that was given."""
    scale = (~is_first).to(action.dtype).unsqueeze(-1)
    action = torch.where(is_first.unsqueeze(-1), 0.0, action)
    if isinstance(cell, BlockGRUWeights):
        scale = scale / action.abs().clamp_(min=1)
        action = action * scale
    return action, scale


def product(a: Tensor, b: Tensor, out: Tensor | None = None, bias: Tensor | None = None, add: bool = False) -> Tensor:
    """a (M, K) times b (N, K)ᵀ, plus bias (N,), or added to `out`. Not torch's own product: autocast would make it half
    precision, and MKL stays with AVX2 on AMD's processors."""
    if out is None:
        out = a.new_empty(a.shape[0], b.shape[0])
    bias = None if bias is None else bias.contiguous()
    backend.extension.matmul(
        (a.data_ptr(), a.shape[0], *a.stride()),
        (b.data_ptr(), b.shape[0], *b.stride()),
        a.shape[1],
        (out.data_ptr(), out.stride(0)),
        0 if bias is None else bias.data_ptr(),
        add,
        torch.get_num_threads(),
    )
    return out


def _weights(cell, posterior):
    """By the names that C++ knows them by."""
    named = cell._asdict()
    if isinstance(cell, GRUWeights):
        named["gates"] = named.pop("input_gates")
    return {
        **{name: None if x is None else x.contiguous() for name, x in named.items()},
        "out": posterior.out_weight.contiguous(),
        "posterior_gain": posterior.in_gain,
        "posterior_shift": posterior.in_shift,
        "posterior_bias": None,  # part of the embedding's layer
    }


def _common(outputs, tensors, cell, posterior, options, weights):
    """What both directions are told."""
    _, action, is_first, deter, _, noise, initial_deter, _ = tensors
    T, B, *latent = noise.shape
    categorical = len(latent) == 2
    in_weight = posterior.in_weight if posterior.in_weight.stride(1) == 1 else posterior.in_weight.contiguous()
    first_layer = cell.in_deter if isinstance(cell, BlockGRUWeights) else cell.in_stoch
    deter_out, stoch_out, statistics, tape, index = outputs
    return {
        "gates_bias": None,
        **weights,
        "cell": _CELLS[type(cell)],
        "T": T,
        "B": B,
        "A": action.shape[2],
        "D": deter.shape[1],
        "Z": math.prod(latent),
        "C": latent[1] if categorical else 0,
        "U": first_layer.shape[0],
        "V": in_weight.shape[0],
        "G": cell.mix_deter.shape[0] if isinstance(cell, BlockGRUWeights) else 1,
        "statistics": statistics.shape[-1],
        "threads": _threads(cell, posterior, B),
        "act": _ACTS[options.act],
        "unimix": options.unimix,
        "min_std": options.min_std,
        "rms_eps": options.rms_eps,
        "layer_eps": options.layer_eps,
        "posterior": in_weight,
        "posterior_row": in_weight.stride(0),
        "is_first": is_first,
        "deter": deter,
        "initial_deter": initial_deter,
        "deter_out": deter_out,
        "stoch_out": stoch_out,
        "statistics_out": statistics,
        "tape": tape,
        "tape_size": tape.numel(),
        "index": index if categorical else None,
    }


def _call(function, arguments):
    # The contiguous copies live as long as this frame.
    held = {k: x.contiguous() if isinstance(x, Tensor) and k != "posterior" else x for k, x in arguments.items()}
    getattr(backend.extension, function)({k: x.data_ptr() if isinstance(x, Tensor) else x for k, x in held.items()})


def backward(
    grads: tuple[Tensor | None, ...],
    outputs: tuple[Tensor, ...],
    tensors: tuple[Tensor, ...],
    cell: CellWeights,
    posterior: PosteriorWeights,
    options: Options,
) -> tuple[tuple[Tensor, ...], CellWeights, PosteriorWeights]:
    """Gradients of (embed, action, deter, stoch, initial_deter, initial_stoch), of the cell and of the posterior.

    In the last two, None stands where there was no weight.
    """
    embed, action, is_first, deter, stoch, noise, initial_deter, initial_stoch = tensors
    deter_out, stoch_out, statistics, _, _ = outputs
    T, B, *latent = noise.shape
    D, rows = deter.shape[1], T * B
    block, gru = isinstance(cell, BlockGRUWeights), isinstance(cell, GRUWeights)
    U = (cell.in_deter if block else cell.in_stoch).shape[0]
    V, width = posterior.in_weight.shape[0], U * (3 if block else 1)
    new = embed.new_empty
    weights = _weights(cell, posterior)
    inputs = ("in_deter", "in_stoch", "in_action") if block else ("in",)
    # Rows that C++ writes: what entered and left the layers, from which the gradients of weights are products.
    in_grad, in_out = new(rows, width), new(rows, width)
    posterior_grad, posterior_out = new(rows, V), new(rows, V)
    gate_grad, statistics_grad = new(rows, 3 * D), new(rows, statistics.shape[-1])
    hidden_gate_grad = new(rows, 3 * D) if gru else None
    mix_grad, mix_out = (new(rows, D), new(rows, D)) if block else (None, None)
    grad_deter, grad_initial_deter = new(B, D), new(D)
    categorical = len(latent) == 2
    stoch_weight_t = embed.new_zeros(cell.in_stoch.shape[1], U) if categorical else None
    affine = {
        f"grad_{name}": torch.empty_like(x, memory_format=torch.contiguous_format)
        for name, x in weights.items()
        if x is not None and name.endswith(("_gain", "_shift"))
    }
    arguments = {
        **_common(outputs, tensors, cell, posterior, options, weights),
        **{
            f"grad_{name}_{part}": None for name in (*inputs, "mix", "gates", "posterior") for part in ("gain", "shift")
        },
        **affine,
        "noise": None if categorical else noise,
        "grad_deter": grads[0],
        "grad_stoch": grads[1],
        "grad_statistics": grads[2],
        **{f"{name}_grad_rows": in_grad for name in inputs},
        **{f"{name}_out_rows": in_out for name in inputs},
        "mix_grad_rows": mix_grad,
        "mix_out_rows": mix_out,
        "gates_grad_rows": gate_grad,
        "gates_out_rows": None,
        "posterior_grad_rows": posterior_grad,
        "posterior_out_rows": posterior_out,
        "gate_rows": gate_grad,
        "hidden_gate_rows": hidden_gate_grad,
        "statistics_rows": statistics_grad,
        "grad_deter_first": grad_deter,
        "grad_initial_deter": grad_initial_deter,
        "grad_stoch_weight": stoch_weight_t,
    }
    _call("rssm_observe_backward", arguments)

    first = is_first.unsqueeze(-1)
    before = torch.cat([deter.unsqueeze(0), deter_out[:-1]])
    before = torch.where(first, initial_deter, before).reshape(rows, D)
    scaled, scale = _scaled_action(cell, action, is_first)

    # Posterior.
    grad_embed = product(posterior_grad, posterior.in_weight[:, D:].t()).view(embed.shape)
    grad_in = new(posterior.in_weight.shape)
    product(posterior_grad.t(), deter_out.reshape(rows, D).t(), out=grad_in[:, :D])
    product(posterior_grad.t(), embed.reshape(rows, -1).t(), out=grad_in[:, D:])
    posterior_grads = PosteriorWeights(
        in_weight=grad_in,
        in_bias=_bias(posterior.in_bias, posterior_grad),
        in_gain=affine.get("grad_posterior_gain"),
        in_shift=affine.get("grad_posterior_shift"),
        out_weight=product(statistics_grad.t(), posterior_out.t()),
        out_bias=statistics_grad.sum(0),
    )

    # Where z came from: the step before, a reset, or, at the first step, the caller.
    stoch_grad = in_grad[:, U : 2 * U] if block else in_grad
    by_step = stoch_grad.view(T, B, U) if not block else stoch_grad.unflatten(0, (T, B))
    start = initial_stoch.reshape(-1)
    reset = torch.where(first, by_step, 0.0).sum((0, 1)).unsqueeze(0)
    grad_initial_stoch = product(reset, cell.in_stoch.t()).view(initial_stoch.shape)
    kept = torch.where(first[0], 0.0, by_step[0])
    grad_stoch = product(kept, cell.in_stoch.t()).view(stoch.shape)
    if categorical:
        given = torch.cat([torch.where(first[0], 0.0, stoch.reshape(B, -1)), start.unsqueeze(0)])
        grad_in_stoch = stoch_weight_t.t().contiguous()
        product(torch.cat([kept, reset]).t(), given.t(), out=grad_in_stoch, add=True)
    else:
        source = torch.cat([stoch.unsqueeze(0), stoch_out[:-1]])
        source = torch.where(first, start, source).reshape(rows, -1)
        grad_in_stoch = product(stoch_grad.t(), source.t())

    # The cell.
    action_grad = in_grad[:, 2 * U :] if block else in_grad
    grad_action = product(action_grad, cell.in_action.t()).view(action.shape) * scale
    found = {name.removeprefix("grad_"): x for name, x in affine.items() if not name.startswith("grad_posterior")}
    found["in_stoch"] = grad_in_stoch
    found["in_action"] = product(action_grad.t(), scaled.reshape(rows, -1).t())
    if block:
        size = D // cell.mix_deter.shape[0]
        found["in_deter"] = product(in_grad[:, :U].t(), before.t())
        for name, grad in (("in_deter", in_grad[:, :U]), ("in_stoch", stoch_grad), ("in_action", action_grad)):
            found[f"{name}_bias"] = _bias(getattr(cell, f"{name}_bias"), grad)
        found["mix_deter"] = _block_product(before, mix_grad, size, size)
        found["mix_inputs"] = product(mix_grad.t(), in_out.t())
        found["mix_bias"] = _bias(cell.mix_bias, mix_grad)
        found["gates"] = _block_product(mix_out, gate_grad, size, 3 * size)
        found["gates_bias"] = gate_grad.sum(0)
    else:
        found["in_bias"] = _bias(cell.in_bias, in_grad)
        if gru:
            found["input_gates"] = product(gate_grad.t(), in_out.t())
            found["hidden_gates"] = product(hidden_gate_grad.t(), before.t())
            found["input_bias"], found["hidden_bias"] = gate_grad.sum(0), hidden_gate_grad.sum(0)
        else:
            found["gates"] = new(cell.gates.shape)
            product(gate_grad.t(), in_out.t(), out=found["gates"][:, :U])
            product(gate_grad.t(), before.t(), out=found["gates"][:, U:])
    cell_grads = type(cell)(**{name: found.get(name) for name in cell._fields})
    inputs_grads = (grad_embed, grad_action, grad_deter, grad_stoch, grad_initial_deter, grad_initial_stoch)
    return inputs_grads, cell_grads, posterior_grads


def _bias(bias, grad):
    return None if bias is None else grad.sum(0)


def _block_product(x, grad, inputs, outputs):
    """The gradient (G, I, O) of a block-diagonal map of x (N, G·I) with gradient (N, G·O) of its result."""
    blocks = x.shape[1] // inputs
    result = x.new_empty(blocks, inputs, outputs)
    for rows, of, out in zip(x.split(inputs, 1), grad.split(outputs, 1), result, strict=True):
        product(rows.t(), of.t(), out=out)
    return result
