"""What surrounds the Triton kernels of the scans `rssm_observe` and `rssm_imagine`: memory, and what does not recur.

kernels/rssm_scan.py walks the steps. Before it, what does not depend on the state is one product for all steps; after
it, so is the gradient of every weight, of rows (T·B) that it wrote. Norms and activations of these rows are done again
here, all steps at once.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from phyxdream.ops import backend, rssm_cells
from phyxdream.ops.contract import HALF
from phyxdream.ops.rssm_cells import CELLS, BlockGRUWeights, CellWeights, HeadWeights, LayerWeights, Options
from phyxdream.ops.rssm_gradients import CellGradients
from phyxdream.ops.rssm_imagine_cpu import PolicyOptions

_ACTS = ("silu", "elu", "relu")
_MOST_CLASSES = 256  # those of a variable must fit into the registers of one program


@dataclass(frozen=True)
class Model:
    """The sizes of a call, and where a row (tape_row) of its tape (T·B rows) has the values of each layer.

    `layers` maps a layer to (start, size); behind its values, a norm has mean and 1/σ. `prior` and `policy` name those
    of a head; the last one of the prior, or of the posterior in its place, is `head`. `gates` is where those of a cell
    without a norm of its gates start: four of D for `gru`, three for `block_gru`. A is 0 where all actions are embedded
    beforehand. Without a tape (`taped`), B rows hold what one step needs.
    """

    cell: str
    T: int
    B: int
    E: int
    A: int
    D: int
    U: int
    stoch: int
    classes: int
    blocks: int
    options: Options
    policy_options: PolicyOptions | None
    layers: dict[str, tuple[int, int]]
    prior: tuple[str, ...]
    policy: tuple[str, ...]
    gates: int
    tape_row: int
    taped: bool

    def act(self, layer: str) -> str:
        """Its activation."""
        return self.policy_options.act if layer in self.policy else self.options.act

    @property
    def in_row(self) -> int:
        """Of the gradients of the layers that the inputs enter."""
        return self.U * (2 + (self.A > 0) if self.cell == "block_gru" else 1)

    @property
    def tape_size(self) -> int:
        return self.tape_row * self.B * (self.T if self.taped else 1)


def model_of(
    noise: Tensor,
    D: int,
    cell: CellWeights,
    prior: HeadWeights,
    options: Options,
    policy: HeadWeights | None = None,
    policy_options: PolicyOptions | None = None,
    taped: bool = True,
) -> Model:
    """Of a call with that noise; `prior` may be a posterior, whose first layer then also reads the embedding."""
    T, B, *latent = noise.shape
    name = next(name for name, kind in CELLS.items() if isinstance(cell, kind))
    block = isinstance(cell, BlockGRUWeights)
    U = (cell.in_deter if block else cell.in_stoch).shape[0]
    sizes = {"stoch": (U, cell.in_stoch_gain if block else cell.in_gain)}
    if block:
        sizes |= {"deter": (U, cell.in_deter_gain), "mix": (D, cell.mix_gain)}
        if policy is not None:
            sizes["action"] = U, cell.in_action_gain
    elif name == "layernorm_gru":
        sizes["gates"] = 3 * D, cell.gates_gain
    heads = [named_layers("prior", prior), named_layers("policy", policy)]
    sizes |= {layer: (x.weight.shape[0], x.gain) for head in heads for layer, x in head.items()}
    layers, row = {}, 0
    for layer, (size, gain) in sizes.items():
        layers[layer] = row, size
        row += size + (0 if gain is None else 2)
    kept = {"gru": 4, "layernorm_gru": 0, "block_gru": 3}[name] * D
    return Model(
        name,
        T,
        B,
        E=prior.layers[0].weight.shape[1] - D,
        A=0 if policy is None else cell.in_action.shape[1],
        D=D,
        U=U,
        stoch=latent[0],
        classes=latent[1] if len(latent) == 2 else 0,
        blocks=cell.mix_deter.shape[0] if block else 1,
        options=options,
        policy_options=policy_options,
        layers=layers,
        prior=tuple(heads[0]),
        policy=tuple(heads[1]),
        gates=row,
        tape_row=row + (kept if taped else 0),
        taped=taped,
    )


def named_layers(owner: str, head: HeadWeights | None) -> dict[str, LayerWeights]:
    """Of a `prior` (or posterior) or `policy`, by their names in `Model.layers`."""
    layers = head.layers if head else ()
    last = len(layers) - 1 if owner == "prior" else None
    return {"head" if i == last else f"{owner}{i}": layer for i, layer in enumerate(layers)}


def refuse(x: Tensor, noise: Tensor, *acts: str) -> str:
    """Why Triton cannot take a call; an empty string if it can."""
    for act in acts:
        if act not in _ACTS:
            return f"it knows the activations {', '.join(_ACTS)}, not {act}"
    if noise.dim() == 4 and noise.shape[3] > _MOST_CLASSES:
        return f"it takes at most {_MOST_CLASSES} classes; noise is {tuple(noise.shape)}"
    return backend.refuse_triton(x, (torch.float32, *HALF))


def plan(model: Model, x: Tensor) -> str:
    """What a call would launch, in a few words."""
    kernels = backend.triton_kernels("rssm_scan")
    return str(kernels.plan(model, x.dtype in HALF, kernels.processors(x.device)))


def weights_of(
    model: Model, cell: CellWeights, prior: HeadWeights, policy: HeadWeights | None = None
) -> dict[str, Tensor | None]:
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
    if policy is None:  # these came in with the action
        named |= dict.fromkeys(("in_action", "mix_bias" if model.cell == "block_gru" else "stoch_bias"))
    for owner, head in (("prior", prior), ("policy", policy)):
        for layer, x in named_layers(owner, head).items():
            named |= {f"{layer}_{part}": getattr(x, part) for part in ("bias", "gain", "shift")}
    named |= {"out": prior.out_weight, "out_bias": prior.out_bias}
    return {name: None if x is None else x.contiguous() for name, x in named.items()}


def kernel_head(head: HeadWeights, **policy: Any) -> Any:
    """As the kernels take it, but for its layers."""
    matrices = tuple(layer.weight.contiguous() for layer in head.layers)
    if policy:
        policy |= {"out": head.out_weight.contiguous(), "out_bias": head.out_bias.contiguous()}
    return backend.triton_kernels("rssm_scan").Head(layers=(), weights=matrices, **policy)


def from_action(model: Model, cell: CellWeights, action: Tensor, dtype: torch.dtype) -> Tensor:
    """What actions (T·B, A), as their layer reads them, bring to the layer that they enter beforehand."""
    if model.cell != "block_gru":
        return F.linear(action, cell.in_action, cell.in_bias)
    u, _, _ = _action_layer(cell, action, model.options)
    active = rssm_cells.ACTIVATIONS[model.options.act](u).to(dtype)
    return F.linear(active, cell.mix_inputs[:, 2 * model.U :], cell.mix_bias)


def kernel_noise(model: Model, noise: Tensor) -> Tensor:
    """As the kernels take it: arrival times of categorical latents, one number a variable, or standard normal."""
    if model.options.cumulative:
        return noise[..., 0].float().contiguous()
    return (rssm_cells.arrival_times(noise.float()) if model.classes else noise).contiguous()


def backward_noise(model: Model, noise: Tensor) -> Tensor | None:
    """Likewise for the backward, which asks for it unless the gradient is that of p."""
    return None if model.classes and not model.options.gumbel else kernel_noise(model, noise)


def gradients_of(model: Model, grads: tuple[Tensor | None, ...], tape: Tensor, **given: Any) -> Any:
    """The kernels' `Gradients` with room for what they write: of `grads` of deter, stoch, statistics and action."""
    rows, D, cell = model.T * model.B, model.D, model.cell
    statistics = model.stoch * (model.classes or 2)
    actions = model.A * (1 if model.policy and model.policy_options.dist == "categorical" else 2)

    def empty(size):
        return tape.new_empty(rows, size)

    return backend.triton_kernels("rssm_phases").Gradients(
        *(None if x is None else x.contiguous() for x in grads),
        tape=tape,
        sums=None,
        statistics_rows=empty(statistics),
        prior_rows=tuple(empty(model.layers[name][1]) for name in model.prior),
        gate_rows=empty((4 if cell == "gru" else 3) * D),
        mix_rows=empty(D) if cell == "block_gru" else None,
        in_rows=empty(model.in_row),
        action_rows=empty(actions) if model.policy else None,
        policy_rows=tuple(empty(model.layers[name][1]) for name in model.policy),
        carry=tape.new_zeros(model.B, D),
        **given,
    )


class _Left:
    """A layer after the scan, with gradients (T·B, size) that left its linear map before the norm's gain."""

    def __init__(self, rows, n, inverse, gain, shift, act, dtype):
        self.rows, self.n, self.inverse, self.affine, self.act, self.dtype = rows, n, inverse, (gain, shift), act, dtype

    @cached_property
    def grad(self) -> Tensor:
        """Of what entered the norm."""
        gain, shift = self.affine
        if gain is None:
            return self.rows
        d = self.rows * gain
        mean = 0.0 if shift is None else d.mean(1, keepdim=True)
        return self.inverse * (d - mean - self.n * (d * self.n).mean(1, keepdim=True))

    @cached_property
    def out(self) -> Tensor:
        """What the activation gave, in the dtype of the weights."""
        return rssm_cells.ACTIVATIONS[self.act](_affine(self.n, *self.affine)).to(self.dtype)

    @property
    def gain(self) -> Tensor:
        return (self.rows * self.n).sum(0)

    @property
    def shift(self) -> Tensor:
        return self.rows.sum(0)


def product(grad: Tensor, *sources: Tensor) -> Tensor:
    return torch.cat([grad.to(x.dtype).t() @ x for x in sources], 1)


def block_product(source: Tensor, grad: Tensor, blocks: int) -> Tensor:
    by_block = grad.to(source.dtype).unflatten(1, (blocks, -1)).transpose(0, 1)  # (G, T·B, O)
    return torch.bmm(source.unflatten(1, (blocks, -1)).permute(1, 2, 0), by_block)


def summed(grad: Tensor) -> Tensor:
    return grad.sum(0)


class Backward(CellGradients):
    """Gradients of the weights, and what those of the inputs are made of, from what the kernels wrote.

    Args:
        model: of the call.
        cell: its weights.
        weights: as the kernels had them.
        memory: the kernels' `Gradients`, filled.
        before: (T·B, D): h that each step started from.
        stoch_before: makes z that each step started from, (T·B, Z).
        action: (T·B, A), as its layer read it.
    """

    product, block_product, summed = staticmethod(product), staticmethod(block_product), staticmethod(summed)

    def __init__(
        self,
        model: Model,
        cell: CellWeights,
        weights: dict[str, Tensor | None],
        memory: Any,
        before: Tensor,
        stoch_before: Callable[[], Tensor],
        action: Tensor,
    ):
        self.model, self.cell, self.before, self.action = model, cell, before, action
        self._stoch_before = stoch_before
        tape, U, rows = memory.tape.view(-1, model.tape_row), model.U, {"stoch": memory.in_rows[:, : model.U]}
        self.gate_rows = memory.gate_rows
        if model.cell == "block_gru":
            rows |= {"deter": memory.in_rows[:, U : 2 * U], "mix": memory.mix_rows}
            if model.A:
                rows["action"] = memory.in_rows[:, 2 * U :]
        elif model.cell == "layernorm_gru":
            rows["gates"] = memory.gate_rows
        rows |= zip((*model.prior, *model.policy), (*memory.prior_rows, *memory.policy_rows), strict=True)
        self.left = {}
        for name, grads in rows.items():
            start, size = model.layers[name]
            gain, shift = weights[f"{name}_gain"], weights[f"{name}_shift"]
            n, inverse = tape[:, start : start + size], None
            if gain is not None:
                mean, inverse = tape[:, start + size : start + size + 2].split(1, 1)
                n = (n - mean) * inverse
            self.left[name] = _Left(grads, n, inverse, gain, shift, model.act(name), before.dtype)

    @cached_property
    def stoch_before(self) -> Tensor:
        return self._stoch_before()

    @cached_property
    def action_layer(self) -> _Left:
        """That the action enters."""
        if self.model.cell != "block_gru":
            return self.left["stoch"]
        if self.model.A:
            return self.left["action"]
        cell, act, dtype = self.cell, self.model.options.act, self.before.dtype
        u, n, inverse = _action_layer(cell, self.action, self.model.options)
        rows = (self.mix_grad.to(dtype) @ cell.mix_inputs[:, 2 * self.model.U :]).float() * _slope(act, u)
        return _Left(rows, n, inverse, cell.in_action_gain, cell.in_action_shift, act, dtype)

    @property
    def deter_grad(self) -> Tensor:
        return self.left["deter"].grad

    @property
    def stoch_grad(self) -> Tensor:
        return self.left["stoch"].grad

    @property
    def action_grad(self) -> Tensor:
        return self.action_layer.grad

    @property
    def in_out(self) -> Tensor:
        if self.model.cell != "block_gru":
            return self.left["stoch"].out
        return torch.cat([self.left["deter"].out, self.left["stoch"].out, self.action_layer.out], 1)

    @property
    def mix_grad(self) -> Tensor:
        return self.left["mix"].grad

    @property
    def mix_out(self) -> Tensor:
        return self.left["mix"].out

    @property
    def gate_grad(self) -> Tensor:
        return self.left["gates"].grad if "gates" in self.left else self.gate_rows[:, : 3 * self.model.D]

    @property
    def hidden_gate_grad(self) -> Tensor:
        D = self.model.D
        return torch.cat([self.gate_rows[:, : 2 * D], self.gate_rows[:, 3 * D :]], 1)

    def of_cell(self, wanted: set[str]) -> CellWeights:
        """Those that are wanted; None stands for the others, and where there was no weight."""
        makers = {"in_stoch": lambda: product(self.stoch_grad, self.stoch_before)}
        makers |= self.makers(self.before, self.action)
        if self.model.cell == "block_gru":
            normed = {"in_deter": "deter", "in_stoch": "stoch", "mix": "mix"}
        else:
            normed = {"in": "stoch", "gates": "gates"}
        layers = {name: lambda layer=layer: self.left[layer] for name, layer in normed.items()}
        layers["in_action"] = lambda: self.action_layer
        for (name, layer), part in itertools.product(layers.items(), ("gain", "shift")):
            makers[f"{name}_{part}"] = lambda layer=layer, part=part: getattr(layer(), part)
        found = {}
        for name, x in self.cell._asdict().items():
            found[name] = makers[name]().to(x.dtype) if x is not None and name in wanted else None
        return type(self.cell)(**found)

    def of_head(
        self,
        names: tuple[str, ...],
        head: HeadWeights,
        wanted: HeadWeights,
        rows: Tensor,
        *inputs: Callable[[], Tensor],
    ) -> HeadWeights:
        """Likewise of a head whose layers have these names; `wanted` has True or False in place of its weights, `rows`
        are of its result (T·B, size), `inputs` make what its first layer reads, side by side."""
        lefts, layers = [self.left[name] for name in names], []
        for i, (left, layer, wants) in enumerate(zip(lefts, head.layers, wanted.layers, strict=True)):
            makers = (
                lambda i=i, left=left: product(left.grad, *(x() for x in inputs) if i == 0 else [lefts[i - 1].out]),
                lambda left=left: summed(left.grad),
                lambda left=left: left.gain,
                lambda left=left: left.shift,
            )
            layers.append(LayerWeights(*map(_made, makers, layer, wants)))
        out = _made(lambda: product(rows, lefts[-1].out), head.out_weight, wanted.out_weight)
        return HeadWeights(tuple(layers), out, _made(lambda: summed(rows), head.out_bias, wanted.out_bias))


def _made(maker, weight, wanted):
    return maker().to(weight.dtype) if wanted else None


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


def _slope(act, u):
    if act == "silu":
        s = torch.sigmoid(u)
        return s * (1 + u * (1 - s))
    return torch.where(u > 0, 1.0, u.exp() if act == "elu" else 0.0)
