"""What surrounds the Triton kernels of `slot_attention`: weights made one, and the gradients of each.

What is linear between two steps of kernels/slot_attention.py is one matrix, made here in float32, and its gradient is
taken apart here. Gradients of weights are products of rows, one a slot and iteration, that the kernels wrote.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from phyxdream.ops import backend
from phyxdream.ops.contract import HALF

# What the registers of one program hold.
_MOST_SLOTS = 16
_MOST_FEATURES, _MOST_HALF_FEATURES = 64, 128


class Composed(NamedTuple):
    """The matrices and vectors of the kernels that stand for several weights, in float32."""

    queries: Tensor  # (I, D): W_kᵀ W_q / √Q
    query: Tensor  # the same with the inputs' gain
    offset: Tensor  # (D,): what their shift adds to the logits
    values: Tensor  # (Q, I): W_v with the gain
    value_shift: Tensor  # (Q,): W_v of the shift
    input_gates: Tensor  # (3D, I)
    input_bias: Tensor  # (3D,)


def refuse(inputs: Tensor, slots: Tensor) -> str:
    """Why Triton cannot take a call; an empty string if it can."""
    if slots.shape[1] > _MOST_SLOTS:
        return f"it takes at most {_MOST_SLOTS} slots; slots is {tuple(slots.shape)}"
    most = _MOST_HALF_FEATURES if inputs.dtype in HALF else _MOST_FEATURES
    for name, x in (("inputs", inputs), ("slots", slots)):
        if x.shape[2] > most:
            return f"it takes at most {most} features in {inputs.dtype}; {name} is {tuple(x.shape)}"
    return backend.refuse_triton(inputs, (torch.float32, *HALF))


def plan(inputs: Tensor, slots: Tensor):
    """What a call would launch; its string says it in a few words."""
    kernels = backend.triton_kernels("slot_attention")
    sizes = *inputs.shape[:2], slots.shape[1], inputs.shape[2], slots.shape[2]
    return kernels.plan(*sizes, inputs.dtype in HALF, kernels.processors(inputs.device))


def tape_size(inputs: Tensor, slots: Tensor, options) -> int:
    """Floats that the forward keeps for the backward."""
    return _taped(options) * slots.shape[0] * slots.shape[1] * (slots.shape[2] + 2 * inputs.shape[2] + 2)


def _taped(options):
    return 1 if options.implicit else options.iterations


def _tape(kernels, tape, inputs, slots, options):
    rows, D, I = _taped(options) * slots.shape[0] * slots.shape[1], slots.shape[2], inputs.shape[2]
    return kernels.Tape(*tape.split([rows * D, rows * I, rows * I, rows, rows]))


def _composed(w):
    w = type(w)(*(x.float() for x in w))
    gain, shift = w.inputs_gain, w.inputs_shift
    queries = w.to_k.t() @ w.to_q * w.to_k.shape[0] ** -0.5
    values, value_shift = w.to_v * gain, w.to_v @ shift
    return Composed(
        queries,
        gain.unsqueeze(1) * queries,
        queries.t() @ shift,
        values,
        value_shift,
        w.input_gates @ values,
        w.input_gates @ value_shift + w.input_bias,
    )


def _weights(kernels, composed, w, dtype):
    matrices = dict(query=composed.query, input_gates=composed.input_gates)
    matrices |= dict(hidden_gates=w.hidden_gates, mlp_in=w.mlp_in, mlp_out=w.mlp_out)
    vectors = dict(offset=composed.offset, input_bias=composed.input_bias)
    names = [name for name in kernels.Weights._fields if name not in matrices | vectors]
    vectors |= {name: getattr(w, name) for name in names}
    given = {name: x.to(dtype).contiguous() for name, x in matrices.items()}
    return kernels.Weights(**given, **{name: x.float().contiguous() for name, x in vectors.items()})


def _byte_mask(slot_mask):
    return None if slot_mask is None else slot_mask.contiguous().view(torch.uint8)


def forward(outputs: tuple[Tensor, ...], inputs: Tensor, slots: Tensor, slot_mask: Tensor | None, w, options) -> None:
    """Fills the three outputs of the schema."""
    slots_out, attention, tape = outputs
    kernels = backend.triton_kernels("slot_attention")
    p = plan(inputs, slots)
    (B, K, D), I = slots.shape, inputs.shape[2]
    with torch.autocast(inputs.device.type, enabled=False):
        weights = _weights(kernels, _composed(w), w, inputs.dtype)
    memory = kernels.Memory(
        inputs.contiguous(),
        slots.contiguous(),
        _byte_mask(slot_mask),
        slots_out,
        attention if options.return_attention else None,
        tape.new_empty(B, p.splits, K, I),
        tape.new_empty(B, p.splits, K),
    )
    sizes = kernels.sizes_of(p, K, I, D, w.mlp_in.shape[0], options.eps, options.layer_eps, backward=False)
    parts = _tape(kernels, tape, inputs, slots, options)
    kernels.forward(p, weights, sizes, parts, memory, options.iterations, _taped(options))


def backward(
    grads: tuple[Tensor | None, Tensor | None],
    tape: Tensor,
    inputs: Tensor,
    slots: Tensor,
    slot_mask: Tensor | None,
    w,
    options,
) -> list[Tensor]:
    """Gradients of the inputs, of the slots and of the weights."""
    with torch.autocast(inputs.device.type, enabled=False):
        return _backward(grads, tape, inputs, slots, slot_mask, w, options)


def _backward(grads, tape, inputs, slots, slot_mask, w, options):
    kernels = backend.triton_kernels("slot_attention")
    p, composed = plan(inputs, slots), _composed(w)
    (B, K, D), I, H, taped = slots.shape, inputs.shape[2], w.mlp_in.shape[0], _taped(options)
    parts, rows = _tape(kernels, tape, inputs, slots, options), taped * B * K
    like = inputs.new_empty
    g = kernels.Gradients(
        inputs.contiguous(),
        _byte_mask(slot_mask),
        *(None if x is None else x.contiguous() for x in grads),
        given=like(slots.shape),
        tokens=like(inputs.shape),
        carry=tape.new_empty(B * K, D),
        sums=tape.new_empty(B, p.splits, K, I),
        totals=tape.new_empty(B, p.splits, K),
        pooled=tape.new_empty(rows, I),
        dot=tape.new_empty(rows),
        query=like(rows, I),
        offset=tape.new_empty(rows),
        normed=like(rows, D),
        gates=like(rows, 4 * D),
        mlp_normed=like(rows, D),
        hidden=like(rows, H),
        from_hidden=like(rows, H),
        out=like(rows, D),
        affine=tape.new_zeros(p.row_programs(B * K), 4, D),
    )
    sizes = kernels.sizes_of(p, K, I, D, H, options.eps, options.layer_eps, backward=True)
    kernels.backward(p, _weights(kernels, composed, w, inputs.dtype), sizes, parts, g, taped)
    found = _of_matrices(g, parts.slots.view(rows, D), parts.pooled.view(rows, I), D)
    found |= dict(zip(("slots_gain", "slots_shift", "mlp_gain", "mlp_shift"), g.affine.sum(0), strict=True))
    found |= _taken_apart(found, composed, w)
    return [g.tokens, g.given, *(found[name].to(x.dtype) for name, x in w._asdict().items())]


def _of_matrices(g, slots, pooled, D):
    """Gradients of the kernels' matrices and biases. Gates lie as candidate, reset, update, hidden candidate."""
    dtype = g.gates.dtype
    gates = torch.cat([g.gates[:, D : 3 * D], g.gates[:, :D]], 1)
    hidden_gates = g.gates[:, D:]
    return dict(
        query=g.query.t() @ g.normed,
        offset=g.offset @ g.normed.float(),
        input_gates=gates.t() @ pooled.to(dtype),
        input_bias=_column_sums(gates),
        hidden_gates=hidden_gates.t() @ slots.to(dtype),
        hidden_bias=_column_sums(hidden_gates),
        mlp_in=g.from_hidden.t() @ g.mlp_normed,
        mlp_in_bias=_column_sums(g.from_hidden),
        mlp_out=g.out.t() @ g.hidden,
        mlp_out_bias=_column_sums(g.out),
    )


def _column_sums(rows):
    return rows.sum(0, dtype=torch.float32)


def _taken_apart(found, composed, w):
    """Gradients of the weights that `Composed` stands for."""
    w = type(w)(*(x.float() for x in w))
    gain, shift, scale = w.inputs_gain, w.inputs_shift, w.to_k.shape[0] ** -0.5
    query, offset, gates, bias = (found[name].float() for name in ("query", "offset", "input_gates", "input_bias"))
    queries = gain.unsqueeze(1) * query + torch.outer(shift, offset)
    values, value_shift = w.input_gates.t() @ gates, w.input_gates.t() @ bias
    return dict(
        inputs_gain=(query * composed.queries).sum(1) + (values * w.to_v).sum(0),
        inputs_shift=composed.queries @ offset + w.to_v.t() @ value_shift,
        to_k=w.to_q @ queries.t() * scale,
        to_q=w.to_k @ queries * scale,
        to_v=values * gain + torch.outer(value_shift, shift),
        input_gates=gates @ composed.values.t() + torch.outer(bias, composed.value_shift),
    )
