"""What surrounds the C++ of the scans `rssm_observe` and `rssm_imagine`: memory, and what does not recur.

csrc/rssm_scan.cpp walks the steps. Before it, what does not depend on the state is one product for all steps; after it,
the gradient of every weight is one product of rows (T·B) that it wrote. What touches all rows is ours, not torch's: for
milliseconds after its own work, a thread of OpenMP spins on a core that the next product could use.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from phyxdream.ops import backend
from phyxdream.ops.rssm_cells import (
    BlockGRUWeights,
    CellWeights,
    GRUWeights,
    HeadWeights,
    LayerNormGRUWeights,
    LayerWeights,
    Options,
)
from phyxdream.ops.rssm_gradients import CellGradients

LANES = 16  # sequences that C++ treats as one group
_UNIT = 4  # groups of a block, where threads take blocks of their own
_MANY_STEPS, _MANY_WEIGHTS = 4, 1 << 20
_CELLS = {GRUWeights: 0, LayerNormGRUWeights: 1, BlockGRUWeights: 2}
ACTS = {"silu": 1, "elu": 2, "relu": 3}


def refuse(x: Tensor, *acts: str) -> str:
    """Why C++ cannot take a call; an empty string if it can."""
    for act in acts:
        if act not in ACTS:
            return f"it knows the activations {', '.join(ACTS)}, not {act}"
    return backend.refuse_cpu(x, (torch.float32,))


def slower(T: int, B: int, weights: Iterable[Tensor | None]) -> str:
    """Why the reference is faster, for few steps of few sequences."""
    fewest = 2 if _size(weights) >= _MANY_WEIGHTS else 4
    if T < _MANY_STEPS and fewest > B:
        return f"with fewer than {_MANY_STEPS} steps of fewer than {fewest} sequences, most lanes of a group are empty"
    return ""


def threads(B: int, weights: Iterable[Tensor | None]) -> int:
    """Below some microseconds a step, threads cost more than they bring."""
    return torch.get_num_threads() if _size(weights) * math.ceil(B / LANES) >= 1 << 17 else 1


def _size(weights):
    return sum(x.numel() for x in weights if x is not None)


def block(B: int, threads: int) -> int:
    """Groups of sequences that are walked together: all, or few, if that leaves some for every thread."""
    groups = math.ceil(B / LANES)
    return _UNIT if groups > _UNIT and groups >= _UNIT * threads else groups


def plan(B: int, threads: int) -> str:
    """What a call would run, in a few words."""
    groups = math.ceil(B / LANES)
    how = "sharing the features of a step" if block(B, threads) == groups else "each with sequences of its own"
    return (
        f"C++, {threads} thread{'s' * (threads > 1)} {how}, "
        f"{groups} group{'s' * (groups > 1)} of {LANES} sequences side by side"
    )


def layer_rows(size: int, gain: Tensor | None) -> int:
    """Rows of the tape that one layer takes in a step."""
    return size + (gain is not None)


def cell_rows(cell: CellWeights, D: int) -> int:
    """Rows of the tape that a cell takes in a step; the order is that of `set_up` in C++."""
    if isinstance(cell, BlockGRUWeights):
        U = width(cell)
        parts = layer_rows(U, cell.in_deter_gain) + layer_rows(U, cell.in_stoch_gain)
        return parts + layer_rows(U, cell.in_action_gain) + layer_rows(D, cell.mix_gain) + 3 * D
    gates = 4 * D if isinstance(cell, GRUWeights) else layer_rows(3 * D, cell.gates_gain)
    return layer_rows(width(cell), cell.in_gain) + gates


def tape_size(T: int, B: int, rows: int) -> int:
    return T * math.ceil(B / LANES) * LANES * rows


def width(cell: CellWeights) -> int:
    """U of the layers that the inputs enter."""
    return (cell.in_deter if isinstance(cell, BlockGRUWeights) else cell.in_stoch).shape[0]


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


def one_hot_product(grad: Tensor, index: Tensor, classes: int, left_out: Tensor | None = None) -> Tensor:
    """gradᵀ z: the gradient (U, S·C) of a weight that read the one-hot z of `index` (N, S), from rows (N, U).

    Rows where `left_out` (N,) is true had another z.
    """
    result = grad.new_empty(grad.shape[1], index.shape[1] * classes)
    left_out = None if left_out is None else left_out.contiguous()
    backend.extension.one_hot_product(
        result.data_ptr(),
        (grad.data_ptr(), *grad.shape, grad.stride(0)),
        index.data_ptr(),
        index.shape[1],
        classes,
        0 if left_out is None else left_out.data_ptr(),
        torch.get_num_threads(),
    )
    return result


def summed(grad: Tensor) -> Tensor:
    """The sum (N,) of rows (T·B, N)."""
    result = grad.new_empty(grad.shape[1])
    view = (grad.data_ptr(), *grad.shape, grad.stride(0))
    backend.extension.sum_rows(result.data_ptr(), view, torch.get_num_threads())
    return result


def states_before(
    deter: Tensor, deter_out: Tensor, is_first: Tensor | None = None, initial_deter: Tensor | None = None
) -> Tensor:
    """Rows (T·B, D) of what every step started from: `initial_deter` where `is_first`, else the state before."""
    T, B, D = deter_out.shape
    result = deter_out.new_empty(T * B, D)
    held = [None if x is None else x.contiguous() for x in (deter, deter_out, is_first, initial_deter)]
    addresses = [0 if x is None else x.data_ptr() for x in held]
    backend.extension.states_before(result.data_ptr(), *addresses, T, B, D, torch.get_num_threads())
    return result


def arguments(
    cell: CellWeights,
    state: dict,
    options: Options,
    threads: int,
    shape: Sequence[int],
    deter: Tensor,
    action_size: int,
) -> dict:
    """What C++ is told about weights and sizes in both directions; `shape` is that of the noise, `state` describes the
    prior or posterior (see `describe`)."""
    T, B, *latent = shape
    named = cell._asdict()
    if isinstance(cell, GRUWeights):
        named["gates"] = named.pop("input_gates")
    return {
        "gates_bias": None,
        "input_bias": None,
        "hidden_bias": None,
        **named,
        **state,
        "cell": _CELLS[type(cell)],
        "T": T,
        "B": B,
        "A": action_size,
        "D": deter.shape[1],
        "Z": math.prod(latent),
        "C": latent[1] if len(latent) == 2 else 0,
        "U": width(cell),
        "G": cell.mix_deter.shape[0] if isinstance(cell, BlockGRUWeights) else 1,
        "threads": threads,
        "block": block(B, threads),
        "act": ACTS[options.act],
        "unimix": options.unimix,
        "min_std": options.min_std,
        "rms_eps": options.rms_eps,
        "layer_eps": options.layer_eps,
        "gumbel": int(options.gumbel),
        "cumulative": int(options.cumulative),
        "deter": deter,
        # What only some scans have.
        "is_first": None,
        "stoch_start": None,
        "initial_stoch": None,
        "state_first_rows": None,
        "dist": 0,
        "action_noise": None,
        "policy_layers": 0,
        "policy_unimix": 0.0,
        "policy_min_std": 0.0,
        "policy_max_std": 0.0,
    }


def describe(name: str, head: HeadWeights) -> dict:
    """The arguments that describe layers and what they end in; `name` is `state` or `policy`."""
    result = {f"{name}_layers": len(head.layers), f"{name}_out": head.out_weight, f"{name}_out_bias": head.out_bias}
    for i, layer in enumerate(head.layers):
        weight = layer.weight if layer.weight.stride(1) == 1 else layer.weight.contiguous()
        result[f"{name}{i}"], result[f"{name}{i}_row"] = weight, weight.stride(0)
        result[f"{name}{i}_size"] = weight.shape[0]
        result |= {f"{name}{i}_{part}": getattr(layer, part) for part in ("bias", "gain", "shift")}
    return result


def kernel_noise(noise: Tensor, options: Options) -> Tensor:
    """As C++ takes it: where all classes have the same, one number a variable."""
    return noise[..., 0] if options.cumulative else noise


def call(function: str, arguments: dict) -> None:
    held = []  # contiguous copies, which live as long as this frame
    given = {}
    for name, x in arguments.items():
        if isinstance(x, Tensor):
            if not x.is_contiguous() and f"{name}_row" not in arguments:
                held.append(x := x.contiguous())
            x = x.data_ptr()
        given[name] = x
    getattr(backend.extension, function)(given)


def products(grad: Tensor, *inputs: Tensor) -> Tensor:
    """The gradient (N, sum of sizes) of a map of rows (T·B, size) side by side; `grad` (T·B, N) is of its result."""
    result = grad.new_empty(grad.shape[1], sum(x.shape[1] for x in inputs))
    for x, out in zip(inputs, result.split([x.shape[1] for x in inputs], 1), strict=True):
        product(grad.t(), x.t(), out=out)
    return result


def block_product(x: Tensor, grad: Tensor, blocks: int) -> Tensor:
    """The gradient (G, I, O) of a block-diagonal map of x (N, G·I) with gradient (N, G·O) of its result."""
    inputs, outputs = x.shape[1] // blocks, grad.shape[1] // blocks
    result = x.new_empty(blocks, inputs, outputs)
    for rows, of, out in zip(x.split(inputs, 1), grad.split(outputs, 1), result, strict=True):
        product(rows.t(), of.t(), out=out)
    return result


class CellBackward(CellGradients):
    """Rows (T·B) that the backward of a cell writes, and the gradients of its weights from them.

    Args:
        cell: its weights.
        wanted: names of those that want a gradient.
        inputs: whether the gradients of the layers that the inputs enter are wanted for other reasons.
        like: a tensor (T, B, D).
    """

    product, block_product, summed = staticmethod(products), staticmethod(block_product), staticmethod(summed)

    def __init__(self, cell: CellWeights, wanted: set[str], inputs: bool, like: Tensor):
        T, B, D = like.shape
        self.cell, self.wanted = cell, {name for name in wanted if getattr(cell, name) is not None}
        self.block, self.gru = isinstance(cell, BlockGRUWeights), isinstance(cell, GRUWeights)
        self.U = width(cell)
        total = self.U * (3 if self.block else 1)

        def rows(size, *names):
            return like.new_empty(T * B, size) if self.wanted.intersection(names) else None

        outer = [name for name in cell._fields if name.startswith("in_")]
        self.in_grad = like.new_empty(T * B, total) if inputs else rows(total, *outer)
        self.in_out = rows(total, "mix_inputs", "input_gates", *(() if self.block else ("gates",)))
        self.gate_grad = rows(3 * D, "gates", "gates_bias", "input_gates", "input_bias")
        self.hidden_gate_grad = rows(3 * D, "hidden_gates", "hidden_bias") if self.gru else None
        self.mix_grad = rows(D, "mix_deter", "mix_inputs", "mix_bias") if self.block else None
        self.mix_out = rows(D, "gates") if self.block else None
        self.affine = affine({name: getattr(cell, name) for name in self.wanted})

    def arguments(self) -> dict:
        """What C++ is told in the backward."""
        parts = ("in_deter", "in_stoch", "in_action") if self.block else ("in",)
        names = (*parts, "mix", "gates")
        return {
            **{f"grad_{x}_{part}": self.affine.get(f"{x}_{part}") for x in names for part in ("gain", "shift")},
            **{f"{name}_grad_rows": self.in_grad for name in parts},
            **{f"{name}_out_rows": self.in_out for name in parts},
            "mix_grad_rows": self.mix_grad,
            "mix_out_rows": self.mix_out,
            "gates_grad_rows": self.gate_grad,
            "gates_out_rows": None,
            "gate_rows": self.gate_grad,
            "hidden_gate_rows": self.hidden_gate_grad,
        }

    @property
    def deter_grad(self) -> Tensor:
        return self.in_grad[:, : self.U]

    @property
    def stoch_grad(self) -> Tensor:
        return self.in_grad[:, self.U : 2 * self.U] if self.block else self.in_grad

    @property
    def action_grad(self) -> Tensor:
        return self.in_grad[:, 2 * self.U :] if self.block else self.in_grad

    def gradients(self, before: Tensor, action: Tensor) -> dict[str, Tensor]:
        """Of all wanted weights but `in_stoch`; the arguments are those of `makers`."""
        makers = self.makers(before, action)
        return {**self.affine, **{name: make() for name, make in makers.items() if name in self.wanted}}


class HeadBackward:
    """Rows (T·B) that the backward of a head writes, and the gradients of its weights from them.

    Args:
        name: `state` or `policy`.
        head: its weights.
        wanted: True or False in place of each of them.
        inputs: whether the gradient of the first layer is wanted for other reasons.
        like: a tensor (T, B, D).
    """

    def __init__(self, name: str, head: HeadWeights, wanted: HeadWeights, inputs: bool, like: Tensor):
        def rows(size, needed):
            return like.new_empty(math.prod(like.shape[:2]), size) if needed else None

        self.name, self.wanted = name, wanted
        into = [layer.weight for layer in wanted.layers[1:]] + [wanted.out_weight]
        self.grads, self.outs, self.affine = [], [], []
        for i, (layer, wants) in enumerate(zip(head.layers, wanted.layers, strict=True)):
            size = layer.weight.shape[0]
            self.grads.append(rows(size, wants.weight or wants.bias or (inputs and i == 0)))
            self.outs.append(rows(size, into[i]))
            self.affine.append(
                affine({part: getattr(layer, part) for part in ("gain", "shift") if getattr(wants, part)})
            )
        self.statistics = rows(head.out_weight.shape[0], wanted.out_weight or wanted.out_bias)

    def arguments(self) -> dict:
        """What C++ is told in the backward."""
        result = {f"{self.name}_rows": self.statistics}
        for i, (grad, out, sums) in enumerate(zip(self.grads, self.outs, self.affine, strict=True)):
            layer = f"{self.name}{i}"
            result |= {f"{layer}_grad_rows": grad, f"{layer}_out_rows": out}
            result |= {f"grad_{layer}_{part}": sums.get(part) for part in ("gain", "shift")}
        return result

    def gradients(self, first: Callable[[Tensor], Tensor]) -> HeadWeights:
        """Of the wanted weights, None for the others; `first` makes that of the first layer's from the rows of its
        gradient."""
        layers = []
        for i, (wants, grad) in enumerate(zip(self.wanted.layers, self.grads, strict=True)):
            weight = None
            if wants.weight:
                weight = first(grad) if i == 0 else product(grad.t(), self.outs[i - 1].t())
            sums = self.affine[i]
            bias = summed(grad) if wants.bias else None
            layers.append(LayerWeights(weight, bias, sums.get("gain"), sums.get("shift")))
        return HeadWeights(
            tuple(layers),
            product(self.statistics.t(), self.outs[-1].t()) if self.wanted.out_weight else None,
            summed(self.statistics) if self.wanted.out_bias else None,
        )


def affine(weights: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """Room for the gradients of gains and shifts among these; a norm's two are summed together."""
    found = {name: x for name, x in weights.items() if x is not None and name.endswith(("gain", "shift"))}
    return {name: torch.empty_like(x, memory_format=torch.contiguous_format) for name, x in found.items()}
