"""What surrounds the Triton kernels of `rssm_observe`: the parts that do not recur, as large matrix products.

kernels/rssm_observe.py walks the steps. Before it, the layers of embedding and action are one product each; after it,
so is the gradient of every weight, of rows (T·B) that it wrote. Norms and activations of these rows are done again
here, all steps at once.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from phyxdream.ops import backend, rssm_cells
from phyxdream.ops.contract import HALF
from phyxdream.ops.rssm_cells import (
    CELLS,
    BlockGRUWeights,
    CellWeights,
    Options,
    PosteriorWeights,
)

_ACTS = ("silu", "elu", "relu")
_MOST_CLASSES = 256  # those of a variable must fit into the registers of one program


@dataclass(frozen=True)
class Model:
    """The sizes of a call, and where a row (tape_row) of its tape (T·B rows) has the values of each layer.

    `layers` maps a layer to (start, size) in the order of the step; behind its values, a norm has mean and 1/σ. `gates`
    is where those of a cell without a norm of its gates start: four of D for `gru`, three for `block_gru`. A is 0 where
    all actions are embedded beforehand. Without a tape (`taped`), B rows hold what one step needs.
    """

    cell: str
    T: int
    B: int
    E: int
    D: int
    U: int
    V: int
    stoch: int
    classes: int
    blocks: int
    options: Options
    layers: dict[str, tuple[int, int]]
    gates: int
    tape_row: int
    A: int = 0
    taped: bool = True

    def act(self, layer: str) -> str:
        """Its activation."""
        return self.options.act


def model_of(
    cell: CellWeights, posterior: PosteriorWeights, options: Options, T: int, B: int, E: int, D: int, latent: list[int]
) -> Model:
    name = next(name for name, kind in CELLS.items() if isinstance(cell, kind))
    block = isinstance(cell, BlockGRUWeights)
    U, V = (cell.in_deter if block else cell.in_stoch).shape[0], posterior.in_weight.shape[0]
    sizes = {"stoch": (U, cell.in_stoch_gain if block else cell.in_gain)}
    if block:
        sizes |= {"deter": (U, cell.in_deter_gain), "mix": (D, cell.mix_gain)}
    elif name == "layernorm_gru":
        sizes["gates"] = 3 * D, cell.gates_gain
    sizes["head"] = V, posterior.in_gain
    layers, row = {}, 0
    for layer, (size, gain) in sizes.items():
        layers[layer] = row, size
        row += size + (0 if gain is None else 2)
    kept = {"gru": 4, "layernorm_gru": 0, "block_gru": 3}[name] * D
    blocks, classes = cell.mix_deter.shape[0] if block else 1, latent[1] if len(latent) == 2 else 0
    return Model(name, T, B, E, D, U, V, latent[0], classes, blocks, options, layers, row, row + kept)


def refuse(embed: Tensor, noise: Tensor, act: str) -> str:
    """Why Triton cannot take a call; an empty string if it can."""
    if act not in _ACTS:
        return f"it knows the activations {', '.join(_ACTS)}, not {act}"
    if noise.dim() == 4 and noise.shape[3] > _MOST_CLASSES:
        return f"it takes at most {_MOST_CLASSES} classes; noise is {tuple(noise.shape)}"
    return backend.refuse_triton(embed, (torch.float32, *HALF))


def plan(embed: Tensor, model: Model) -> str:
    """What a call would launch, in a few words."""
    kernels = backend.triton_kernels("rssm_observe")
    return str(kernels.plan(model, embed.dtype in HALF, kernels.processors(embed.device)))


def cell_weights(model: Model, cell: CellWeights) -> dict[str, Tensor | None]:
    """By the names of the kernels' `Weights` and, with the part, `Layers`."""
    names = ("in_stoch", "in_action", "in_deter", "mix_deter", "mix_inputs", "gates", "gates_bias", "hidden_gates")
    names += ("hidden_bias",)
    named = {name: getattr(cell, name, None) for name in names}
    if model.cell == "gru":
        named |= {"gates": cell.input_gates, "gates_bias": cell.input_bias}
    if model.classes:
        named["in_stoch"] = cell.in_stoch.t()
    sources = {"stoch": "in_stoch" if model.cell == "block_gru" else "in", "deter": "in_deter", "action": "in_action"}
    for layer, part in itertools.product(model.layers, ("bias", "gain", "shift")):
        named[f"{layer}_{part}"] = getattr(cell, f"{sources.get(layer, layer)}_{part}", None)
    return named


def _weights(model, cell, posterior):
    named = cell_weights(model, cell)
    # These came in with the action or the embedding.
    named |= dict.fromkeys(("in_action", "head_bias", "mix_bias"))
    if model.cell != "block_gru":
        named["stoch_bias"] = None
    named |= {"head_gain": posterior.in_gain, "head_shift": posterior.in_shift, "head": posterior.in_weight}
    named |= {"out": posterior.out_weight, "out_bias": posterior.out_bias}
    return {name: None if x is None else x.contiguous() for name, x in named.items()}


def _scaled_action(model, action, is_first):
    """The action as its layer reads it, (T·B, A), and its derivative by the one that was given."""
    scale = (~is_first).unsqueeze(-1).to(action.dtype)
    action = torch.where(is_first.unsqueeze(-1), 0.0, action)
    if model.cell == "block_gru":
        scale = scale / action.abs().clamp(min=1)
        action = action * scale
    return action.flatten(0, 1), scale


def _source(is_first, initial, given, results):
    """What each step started from, (T·B, size): where a reset leads, or what the step before left."""
    before = torch.cat([given.unsqueeze(0), results[:-1]]).flatten(2)  # (T, B, size)
    return torch.where(is_first.unsqueeze(-1), initial.flatten(), before).flatten(0, 1)


def _action_layer(cell, rows, options):
    """block_gru: the layer of the action: u = n·gain + shift, n, and 1/σ."""
    values = F.linear(rows, cell.in_action, cell.in_action_bias).float()
    if cell.in_action_gain is None:
        return values, values, None
    if cell.in_action_shift is not None:
        values = values - values.mean(1, keepdim=True)
    eps = options.rms_eps if cell.in_action_shift is None else options.layer_eps
    inverse = (values.square().mean(1, keepdim=True) + eps).rsqrt()
    n = values * inverse
    return _affine(n, cell.in_action_gain, cell.in_action_shift), n, inverse


def _affine(n, gain, shift):
    u = n if gain is None else n * gain
    return u if shift is None else u + shift


def forward(
    tensors: tuple[Tensor, ...], cell: CellWeights, posterior: PosteriorWeights, options: Options
) -> tuple[Tensor, ...]:
    """The five outputs of the schema from its eight tensors."""
    embed, action, is_first, deter, stoch, noise, initial_deter, initial_stoch = tensors
    T, B, *latent = noise.shape
    D, categorical = deter.shape[1], len(latent) == 2
    model = model_of(cell, posterior, options, T, B, embed.shape[2], D, latent)
    kernels = backend.triton_kernels("rssm_phases")
    with torch.autocast(embed.device.type, enabled=False):
        embeds = F.linear(embed.flatten(0, 1), posterior.in_weight[:, D:], posterior.in_bias)
        from_action, _ = _scaled_action(model, action, is_first)
        if model.cell == "block_gru":
            u, _, _ = _action_layer(cell, from_action, options)
            active = rssm_cells.ACTIVATIONS[options.act](u).to(embed.dtype)
            from_action = F.linear(active, cell.mix_inputs[:, 2 * model.U :], cell.mix_bias)
        else:
            from_action = F.linear(from_action, cell.in_action, cell.in_bias)
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
            embed.new_empty(T * B * model.tape_row, dtype=torch.float32),
            embed.new_empty((T, B, latent[0]) if categorical else 0, dtype=torch.int32),
        )
        memory = kernels.Memory(
            from_action,
            None,
            embeds,
            is_first.contiguous().view(torch.uint8),
            (rssm_cells.arrival_times(noise.float()) if categorical else noise).contiguous(),
            initial_deter.contiguous(),
            initial_stoch.contiguous(),
            stoch_first.float(),  # of Gaussian latents, a copy that the steps overwrite
            stoch_start.contiguous(),
            previous,
            None,
            *outputs,
        )
        backend.triton_kernels("rssm_observe").run(model, _weights(model, cell, posterior), memory)
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
) -> tuple[tuple[Tensor, ...], CellWeights, PosteriorWeights]:
    """Gradients of (embed, action, deter, stoch, initial_deter, initial_stoch), of the cell and of the posterior.

    In the last two, None stands where there was no weight. All are computed, whichever are wanted.
    """
    with torch.autocast(tensors[0].device.type, enabled=False):
        return _backward(grads, outputs, tensors, cell, posterior, options)


def _backward(grads, outputs, tensors, cell, posterior, options):
    embed, action, is_first, deter, stoch, noise, initial_deter, initial_stoch = tensors
    deter_out, stoch_out, statistics, tape, _ = outputs
    T, B, *latent = noise.shape
    D, rows, dtype = deter.shape[1], T * B, embed.dtype
    model = model_of(cell, posterior, options, T, B, embed.shape[2], D, latent)
    U, block, gru = model.U, model.cell == "block_gru", model.cell == "gru"
    weights = _weights(model, cell, posterior)
    before = _source(is_first, initial_deter, deter, deter_out)
    memory = backend.triton_kernels("rssm_phases").Gradients(
        *(None if x is None else x.contiguous() for x in grads),
        is_first.contiguous().view(torch.uint8),
        None if model.classes else noise.contiguous(),
        before,
        statistics.contiguous(),
        tape,
        None,
        tape.new_empty(rows, statistics.shape[2]),
        tape.new_empty(rows, model.V),
        tape.new_empty(rows, (4 if gru else 3) * D),
        tape.new_empty(rows, D) if block else None,
        tape.new_empty(rows, 2 * U if block else U),
        tape.new_zeros(B, D),
        tape.new_zeros(B, D),
    )
    backend.triton_kernels("rssm_observe").run(model, weights, memory)

    tape, found = tape.view(rows, model.tape_row), {}

    def leave(name, grad):
        """Gradients (rows, size) before the gain of a norm as they leave it, and the layer's activated values."""
        start, size = model.layers[name]
        values, gain, shift = tape[:, start : start + size], weights[f"{name}_gain"], weights[f"{name}_shift"]
        n, inverse = values, None
        if gain is not None:
            mean, inverse = tape[:, start + size : start + size + 2].split(1, 1)
            n = (values - mean) * inverse
        grad, found[f"{name}_gain"], found[f"{name}_shift"] = _norm_backward(grad, n, inverse, gain, shift)
        u = _affine(n, gain, shift)
        return grad.to(dtype), rssm_cells.ACTIVATIONS[options.act](u).to(dtype)

    # Posterior.
    statistics_grad = memory.statistics_rows.to(dtype)
    head_grad, head_out = leave("head", memory.head_rows)
    posterior_grads = PosteriorWeights(
        in_weight=torch.cat([head_grad.t() @ deter_out.flatten(0, 1), head_grad.t() @ embed.flatten(0, 1)], 1),
        in_bias=_bias(posterior.in_bias, head_grad),
        in_gain=found.pop("head_gain"),
        in_shift=found.pop("head_shift"),
        out_weight=statistics_grad.t() @ head_out,
        out_bias=memory.statistics_rows.sum(0),
    )
    grad_embed = (head_grad @ posterior.in_weight[:, D:]).view(embed.shape)

    # Where z came from: the step before, a reset, or, at the first step, the caller.
    stoch_grad, stoch_active = leave("stoch", memory.in_rows[:, :U])
    found["in_stoch"] = stoch_grad.t() @ _source(is_first, initial_stoch, stoch, stoch_out)
    by_step, first = stoch_grad.view(T, B, U), is_first.unsqueeze(-1)
    reset = torch.where(first, by_step, 0.0).sum((0, 1))
    grad_initial_stoch = (reset @ cell.in_stoch).view(initial_stoch.shape)
    grad_stoch = (torch.where(first[0], 0.0, by_step[0]) @ cell.in_stoch).view(stoch.shape)

    # The cell.
    scaled, scale = _scaled_action(model, action, is_first)
    if block:
        deter_grad, deter_active = leave("deter", memory.in_rows[:, U:])
        mix_grad, mix_active = leave("mix", memory.mix_rows)
        u, n, inverse = _action_layer(cell, scaled, options)
        action_active = rssm_cells.ACTIVATIONS[options.act](u).to(dtype)
        action_grad = (mix_grad @ cell.mix_inputs[:, 2 * U :]).float() * _slope(options.act, u)
        action_grad, *affine = _norm_backward(action_grad, n, inverse, cell.in_action_gain, cell.in_action_shift)
        action_grad = action_grad.to(dtype)
        found |= {f"in_stoch_{part}": found.pop(f"stoch_{part}") for part in ("gain", "shift")}
        found |= {f"in_deter_{part}": found.pop(f"deter_{part}") for part in ("gain", "shift")}
        found |= {"in_action_gain": affine[0], "in_action_shift": affine[1]}
        biased = dict(in_deter=deter_grad, in_stoch=stoch_grad, in_action=action_grad, mix=mix_grad)
        for name, grad in biased.items():
            found[f"{name}_bias"] = _bias(getattr(cell, f"{name}_bias"), grad)
        found["in_deter"] = deter_grad.t() @ before
        found["mix_deter"] = _block_product(before, mix_grad, model.blocks)
        found["mix_inputs"] = mix_grad.t() @ torch.cat([deter_active, stoch_active, action_active], 1)
        found["gates"] = _block_product(mix_active, memory.gate_rows.to(dtype), model.blocks)
        found["gates_bias"] = memory.gate_rows.sum(0)
    else:
        action_grad = stoch_grad
        found |= {f"in_{part}": found.pop(f"stoch_{part}") for part in ("gain", "shift")}
        found["in_bias"] = _bias(cell.in_bias, stoch_grad)
        if gru:
            reset_update, new, hidden_new = memory.gate_rows.split([2 * D, D, D], 1)
            for name, last, source in (("input", new, stoch_active), ("hidden", hidden_new, before)):
                grad = torch.cat([reset_update, last], 1)
                found |= {f"{name}_gates": grad.to(dtype).t() @ source, f"{name}_bias": grad.sum(0)}
        else:
            gate_grad, _ = leave("gates", memory.gate_rows)
            found["gates"] = torch.cat([gate_grad.t() @ stoch_active, gate_grad.t() @ before], 1)
    found["in_action"] = action_grad.t() @ scaled
    grad_action = (action_grad @ cell.in_action).view(action.shape) * scale
    cell_grads = [_as(x, found.get(name)) for name, x in cell._asdict().items()]
    posterior_grads = [_as(x, grad) for x, grad in zip(posterior, posterior_grads, strict=True)]
    inputs = (grad_embed, grad_action, memory.carry.to(dtype), grad_stoch, memory.initial.sum(0).to(dtype))
    return (*inputs, grad_initial_stoch), type(cell)(*cell_grads), PosteriorWeights(*posterior_grads)


def _norm_backward(grad, n, inverse, gain, shift):
    """Gradients of what entered a norm, of its gain and of its shift."""
    if gain is None:
        return grad, None, None
    d = grad * gain
    mean = 0.0 if shift is None else d.mean(1, keepdim=True)
    entered = inverse * (d - mean - n * (d * n).mean(1, keepdim=True))
    return entered, (grad * n).sum(0), None if shift is None else grad.sum(0)


def _slope(act, u):
    if act == "silu":
        s = torch.sigmoid(u)
        return s * (1 + u * (1 - s))
    return torch.where(u > 0, 1.0, u.exp() if act == "elu" else 0.0)


def _bias(bias, grad):
    return None if bias is None else grad.float().sum(0)


def _block_product(x, grad, blocks):
    """The gradient (G, I, O) of a block-diagonal map of x (N, G·I) with gradient (N, G·O) of its result."""
    return torch.bmm(x.unflatten(1, (blocks, -1)).permute(1, 2, 0), grad.unflatten(1, (blocks, -1)).transpose(0, 1))


def _as(x, grad):
    return None if x is None or grad is None else grad.to(x.dtype)
