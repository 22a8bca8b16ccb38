"""What surrounds the Triton kernels of `slot_attention`: its weights (slot_attention_weights.py), and their gradients,
which are products of rows, one a slot and iteration, that the kernels wrote."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from phyxdream.ops import backend
from phyxdream.ops.contract import HALF
from phyxdream.ops.slot_attention_weights import composed, taken_apart

# What the registers of one program hold.
_MOST_SLOTS = 16
_MOST_FEATURES, _MOST_HALF_FEATURES = 64, 128


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


def _floats(w):
    return type(w)(*(None if x is None else x.float() for x in w))


def _weights(kernels, made, w, dtype):
    matrices = dict(query=made.query, input_gates=made.input_gates)
    matrices |= dict(hidden_gates=w.hidden_gates, mlp_in=w.mlp_in, mlp_out=w.mlp_out)
    vectors = dict(offset=made.offset, input_bias=made.input_bias)
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
        weights = _weights(kernels, composed(_floats(w), linear), w, inputs.dtype)
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
    p, floats = plan(inputs, slots), _floats(w)
    made = composed(floats, linear)
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
    kernels.backward(p, _weights(kernels, made, w, inputs.dtype), sizes, parts, g, taped)
    found = _of_matrices(g, parts.slots.view(rows, D), parts.pooled.view(rows, I), D)
    found |= dict(zip(("slots_gain", "slots_shift", "mlp_gain", "mlp_shift"), g.affine.sum(0), strict=True))
    of_composed = (found[name].float() for name in ("query", "offset", "input_gates", "input_bias"))
    found |= taken_apart(*of_composed, floats, made, linear)
    empty = like(0)  # of what was not given
    return [g.tokens, g.given, *(empty if x is None else found[name].to(x.dtype) for name, x in w._asdict().items())]


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
