"""Slot attention: K slots compete for N input tokens, for several iterations in one op.

    x = LN(inputs)   k = W_k x   v = W_v x   (+ b_k, b_v, where there are any)    once
    A = softmax over slots of k·(W_q LN(s)) / √Q                                 (B, N, K), every iteration
    updates = Σ_n w v,  w = (A + eps) / Σ_n (A + eps)
    s = GRUCell(updates, s)   s = s + W_2 relu(W_1 LN(s) + b_1) + b_2

C++ in csrc/slot_attention.cpp, Triton in kernels/slot_attention.py, called by slot_attention_cpu.py and
slot_attention_triton.py beside this file.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from phyxdream.ops import slot_attention_cpu, slot_attention_triton
from phyxdream.ops.backend import Backend, Op
from phyxdream.ops.contract import FLOATING, HALF


class SlotAttentionWeights(NamedTuple):
    """The weights of one module: tokens have size I, slots D, queries, keys and values Q, the MLP's layer H."""

    inputs_gain: Tensor  # (I,)
    inputs_shift: Tensor  # (I,)
    to_k: Tensor  # (Q, I)
    to_v: Tensor  # (Q, I)
    slots_gain: Tensor  # (D,)
    slots_shift: Tensor  # (D,)
    to_q: Tensor  # (Q, D)
    input_gates: Tensor  # (3D, Q), gates in the order of `torch.nn.GRUCell`
    hidden_gates: Tensor  # (3D, D)
    input_bias: Tensor  # (3D,)
    hidden_bias: Tensor  # (3D,)
    mlp_gain: Tensor  # (D,)
    mlp_shift: Tensor  # (D,)
    mlp_in: Tensor  # (H, D)
    mlp_in_bias: Tensor  # (H,)
    mlp_out: Tensor  # (D, H)
    mlp_out_bias: Tensor  # (D,)
    to_k_bias: Tensor | None = None  # (Q,); one of queries would add the same to all slots, and the softmax sees none
    to_v_bias: Tensor | None = None  # (Q,)

    def shapes(self, I: int, D: int) -> dict[str, tuple[int, ...]]:
        Q, H = (x.shape[0] if x.dim() else 0 for x in (self.to_k, self.mlp_in))
        return dict(
            inputs_gain=(I,), inputs_shift=(I,), to_k=(Q, I), to_v=(Q, I),
            slots_gain=(D,), slots_shift=(D,), to_q=(Q, D),
            input_gates=(3 * D, Q), hidden_gates=(3 * D, D), input_bias=(3 * D,), hidden_bias=(3 * D,),
            mlp_gain=(D,), mlp_shift=(D,), mlp_in=(H, D), mlp_in_bias=(H,), mlp_out=(D, H), mlp_out_bias=(D,),
            to_k_bias=(Q,), to_v_bias=(Q,),
        )  # fmt: skip


class Options(NamedTuple):
    """What stands beside the tensors in the schema."""

    iterations: int
    eps: float
    layer_eps: float
    implicit: bool
    return_attention: bool


def slot_attention(
    inputs: Tensor,
    slots: Tensor,
    weights: SlotAttentionWeights,
    *,
    iterations: int = 3,
    eps: float = 1e-8,
    layer_eps: float = 1e-5,
    slot_mask: Tensor | None = None,
    implicit: bool = False,
    return_attention: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Slots after all iterations, and the attention of the last; differentiable once in every floating-point tensor.

    Attention is never stored unless it is asked for: the backward computes it again.

    Args:
        inputs: (B, N, I) float32 or float64, any strides; not normalised, not projected.
        slots: (B, K, D) where the iterations start.
        weights: `SlotAttentionWeights`.
        iterations: how many, at least 1.
        eps: added to the attention before it is divided by its sum over the inputs.
        layer_eps: added to the variance by the three layer norms.
        slot_mask: (B, K) bool, true where there is a slot; None is everywhere. The others get no attention and stay
            as they came.
        implicit: differentiate the last iteration alone, at the slots that the others led to without gradient
            (first-order implicit differentiation of the fixed point). The given slots then have no gradient.
        return_attention: whether to return the attention; without it, nothing of size N·K is written.

    Returns:
        slots (B, K, D); attention (B, K, N), which sums to 1 over the present slots (before eps and the division by
        its sum over the inputs), or None.

    Raises:
        TypeError: an argument is of another type, or the dtypes differ (inside autocast, all become float32).
        ValueError: a shape does not fit, the devices differ, a tensor is empty, or an option is out of range.

    Source: Locatello et al., "Object-Centric Learning with Slot Attention", 2020, algorithm 1, and their code; Chang,
    Griffiths, Levine, "Object Representations as Fixed Points", 2022 (`implicit`).

    >>> from phyxdream.ops import SlotAttentionWeights
    >>> I, D, Q, H = 6, 4, 4, 8
    >>> weights = SlotAttentionWeights(
    ...     torch.ones(I), torch.zeros(I), torch.randn(Q, I), torch.randn(Q, I),
    ...     torch.ones(D), torch.zeros(D), torch.randn(Q, D),
    ...     torch.randn(3 * D, Q), torch.randn(3 * D, D), torch.zeros(3 * D), torch.zeros(3 * D),
    ...     torch.ones(D), torch.zeros(D), torch.randn(H, D), torch.zeros(H), torch.randn(D, H), torch.zeros(D))
    >>> slots, attention = slot_attention(torch.randn(2, 10, I), torch.randn(2, 3, D), weights)
    >>> slots.shape, attention.shape
    (torch.Size([2, 3, 4]), torch.Size([2, 3, 10]))
    >>> torch.allclose(attention.sum(1), torch.ones(2, 10))
    True
    """
    args = _prepare(
        inputs, slots, weights, iterations=iterations, eps=eps, layer_eps=layer_eps, slot_mask=slot_mask,
        implicit=implicit, return_attention=return_attention,
    )  # fmt: skip
    slots, attention = _op(*args)[:2]
    return slots, attention if return_attention else None


_WEIGHTS = len(SlotAttentionWeights._fields)
_INPUTS = ", ".join(
    ["Tensor inputs", "Tensor slots", "Tensor? slot_mask"]
    + [f"Tensor{'?' * (name in SlotAttentionWeights._field_defaults)} {name}" for name in SlotAttentionWeights._fields]
    + ["int iterations", "float eps", "float layer_eps", "bool implicit", "bool return_attention"]
)
# Beside the results, what the backward needs (floats, laid out by whoever wrote them).
_SCHEMA = f"({_INPUTS}) -> (Tensor slots_out, Tensor attention, Tensor tape)"
_BACKWARD_SCHEMA = f"(Tensor? grad_slots, Tensor? grad_attention, Tensor tape, {_INPUTS}) -> Tensor[]"


def _prepare(
    inputs, slots, weights, *, iterations=3, eps=1e-8, layer_eps=1e-5, slot_mask=None, implicit=False,
    return_attention=True,
) -> tuple:  # fmt: skip
    """The checked arguments of the schema."""
    for name, x in (("inputs", inputs), ("slots", slots)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if not isinstance(weights, SlotAttentionWeights):
        raise TypeError(f"weights: expected SlotAttentionWeights, got {type(weights).__name__}")
    if inputs.dim() != 3:
        raise ValueError(f"inputs: expected shape (B, N, I), got {tuple(inputs.shape)}")
    B, _, I = inputs.shape
    if slots.dim() != 3 or slots.shape[0] != B:
        raise ValueError(f"slots: expected shape ({B}, K, D), got {tuple(slots.shape)}")
    if 0 in inputs.shape or 0 in slots.shape:
        shapes = f"{tuple(inputs.shape)} and {tuple(slots.shape)}"
        raise ValueError(f"inputs, slots: expected no empty axis, got shapes {shapes}")
    given = {name: x for name, x in weights._asdict().items() if x is not None or name not in weights._field_defaults}
    for name, x in given.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"weights.{name}: expected a tensor, got {type(x).__name__}")
    shapes = weights.shapes(I, slots.shape[2])
    for name, x in given.items():
        if x.shape != shapes[name] or not x.numel():
            expected = f"{shapes[name]}, not empty" if 0 in shapes[name] else str(shapes[name])
            raise ValueError(f"weights.{name}: expected shape {expected}, got {tuple(x.shape)}")
    if slot_mask is not None:
        if not isinstance(slot_mask, Tensor) or slot_mask.dtype is not torch.bool:
            got = slot_mask.dtype if isinstance(slot_mask, Tensor) else type(slot_mask).__name__
            raise TypeError(f"slot_mask: expected a tensor of torch.bool, got {got}")
        if slot_mask.shape != slots.shape[:2]:
            raise ValueError(f"slot_mask: expected shape {tuple(slots.shape[:2])}, got {tuple(slot_mask.shape)}")
        if slot_mask.device != inputs.device:
            raise ValueError(f"slot_mask: expected the device of inputs, {inputs.device}, got {slot_mask.device}")
    inputs, slots, *flat = _alike(inputs, slots, weights)
    if not isinstance(iterations, int) or isinstance(iterations, bool):
        raise TypeError(f"iterations: expected an integer, got {type(iterations).__name__}")
    if iterations < 1:
        raise ValueError(f"iterations: expected at least 1, got {iterations}")
    for name, number in (("eps", eps), ("layer_eps", layer_eps)):
        if not isinstance(number, (float, int)):
            raise TypeError(f"{name}: expected a number, got {type(number).__name__}")
        if not 0 <= number < math.inf:
            raise ValueError(f"{name}: expected a finite number that is not negative, got {number}")
    return (
        inputs, slots, slot_mask, *flat, iterations, float(eps), float(layer_eps), bool(implicit),
        bool(return_attention),
    )  # fmt: skip


def _alike(inputs, slots, weights):
    """The floating-point tensors, which share dtype and device."""
    names = ("inputs", "slots", *(f"weights.{name}" for name in weights._fields))
    flat = (inputs, slots, *weights)
    mixed = []
    for name, x in zip(names, flat, strict=True):
        if x is None:
            continue
        if x.dtype not in FLOATING:
            raise TypeError(f"{name}: expected a floating-point tensor, got {x.dtype}")
        if x.dtype is not inputs.dtype:
            mixed.append(f"{name} {x.dtype}")
        if not (x.is_cpu and inputs.is_cpu) and x.device != inputs.device:
            raise ValueError(f"{name}: expected the device of inputs, {inputs.device}, got {x.device}")
    if (mixed or inputs.dtype in HALF) and torch.is_autocast_enabled(inputs.device.type):
        return [None if x is None else x.float() for x in flat]
    if mixed:
        raise TypeError(f"expected all tensors in the dtype of inputs, {inputs.dtype}, got {', '.join(mixed)}")
    return list(flat)


def split(args) -> tuple[Tensor, Tensor, Tensor | None, SlotAttentionWeights, Options]:
    """The arguments of the schema."""
    inputs, slots, slot_mask, *rest = args
    return inputs, slots, slot_mask, SlotAttentionWeights(*rest[:_WEIGHTS]), Options(*rest[_WEIGHTS:])


def _reference(*args):
    inputs, slots, slot_mask, w, options = split(args)
    dtype = inputs.dtype
    if dtype in HALF:
        w = SlotAttentionWeights(*(None if x is None else x.float() for x in w))
        inputs, slots = inputs.float(), slots.float()
    x = F.layer_norm(inputs, w.inputs_gain.shape, w.inputs_gain, w.inputs_shift, options.layer_eps)
    k, v = F.linear(x, w.to_k, w.to_k_bias), F.linear(x, w.to_v, w.to_v_bias)  # (B, N, Q)
    for i in range(options.iterations):
        differentiated = not options.implicit or i == options.iterations - 1
        with torch.set_grad_enabled(torch.is_grad_enabled() and differentiated):
            slots, attention = _iterate(k, v, slots.detach() if options.implicit else slots, slot_mask, w, options)
    return slots.to(dtype), attention.transpose(1, 2).to(dtype)


def _iterate(k, v, slots, slot_mask, w, options):
    """The next slots (B, K, D), and the attention (B, N, K) that led there."""
    q = F.linear(F.layer_norm(slots, w.slots_gain.shape, w.slots_gain, w.slots_shift, options.layer_eps), w.to_q)
    logits = torch.bmm(k, q.transpose(1, 2) * k.shape[2] ** -0.5)
    if slot_mask is not None:
        present = slot_mask.unsqueeze(1)  # (B, 1, K)
        # Not -inf, of which a row without any slot would make NaN.
        attention = logits.masked_fill(~present, torch.finfo(logits.dtype).min).softmax(-1)
        attention = torch.where(present, attention, 0.0)
    else:
        attention = logits.softmax(-1)
    share = attention + options.eps
    total = share.sum(1, keepdim=True)
    if slot_mask is not None:
        total = torch.where(present, total, 1.0)  # without eps it is 0 where there is no slot
    share = share / total
    updates = torch.bmm(share.transpose(1, 2), v)  # (B, K, Q)
    gates = w.input_gates, w.hidden_gates, w.input_bias, w.hidden_bias
    new = torch.gru_cell(updates.flatten(0, 1), slots.flatten(0, 1), *gates).view_as(slots)
    hidden = F.layer_norm(new, w.mlp_gain.shape, w.mlp_gain, w.mlp_shift, options.layer_eps)
    hidden = F.linear(hidden, w.mlp_in, w.mlp_in_bias).relu()
    new = new + F.linear(hidden, w.mlp_out, w.mlp_out_bias)
    return (new if slot_mask is None else torch.where(slot_mask.unsqueeze(2), new, slots)), attention


def _fake(*args):
    inputs, slots, _, w, options = split(args)
    if inputs.is_cuda:
        return _empty(inputs, slots, options, slot_attention_triton.tape_size(inputs, slots, options))
    return _empty(inputs, slots, options, slot_attention_cpu.tape_size(inputs, slots, w, options))


def _empty(inputs, slots, options, tape_size):
    (B, N, _), K = inputs.shape, slots.shape[1]
    return (
        slots.new_empty(slots.shape),
        slots.new_empty((B, K, N) if options.return_attention else 0),
        slots.new_empty(tape_size, dtype=torch.float32),
    )


def _fake_backward(grad_slots, grad_attention, tape, *args):
    inputs, slots, _, w, _ = split(args)
    return [inputs.new_empty(0 if x is None else x.shape) for x in (inputs, slots, *w)]


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])
    ctx.numbers = inputs[3 + _WEIGHTS :]
    ctx.present = [x is not None for x in inputs[: 3 + _WEIGHTS]]
    if not Options(*ctx.numbers).return_attention:
        ctx.mark_non_differentiable(output[1], output[2])
    ctx.save_for_backward(output[2], *(x for x in inputs[: 3 + _WEIGHTS] if x is not None))


def _backward(ctx, grad_slots, grad_attention, grad_tape):
    tape, *rest = ctx.saved_tensors
    held = iter(rest)
    inputs = [next(held) if present else None for present in ctx.present]
    found = ctx.run_backward(grad_slots, grad_attention, tape, *inputs, *ctx.numbers)
    implicit = Options(*ctx.numbers).implicit
    weights = [grad if present else None for grad, present in zip(found[2:], ctx.present[3:], strict=True)]
    return found[0], None if implicit else found[1], None, *weights, *[None] * len(ctx.numbers)


def _cpu_forward(*args):
    outputs = _fake(*args)
    slot_attention_cpu.forward(outputs, *split(args))
    return outputs


def _triton_forward(*args):
    inputs, slots, _, _, options = split(args)
    outputs = _empty(inputs, slots, options, slot_attention_triton.tape_size(inputs, slots, options))
    slot_attention_triton.forward(outputs, *split(args))
    return outputs


def _triton_backward(grad_slots, grad_attention, tape, *args):
    return slot_attention_triton.backward((grad_slots, grad_attention), tape, *split(args))


def _cpu_backward(grad_slots, grad_attention, tape, *args):
    return slot_attention_cpu.backward((grad_slots, grad_attention), tape, *split(args))


_op = Op(
    "slot_attention",
    prepare=_prepare,
    reference=_reference,
    schema=_SCHEMA,
    backward_schema=_BACKWARD_SCHEMA,
    fake=_fake,
    backward_fake=_fake_backward,
    save=_save,
    backward=_backward,
    backends=(
        Backend(
            "cpu",
            _cpu_forward,
            _cpu_backward,
            lambda *args: slot_attention_cpu.refuse(args[0]),
            lambda *args: slot_attention_cpu.plan(args[0], args[1]),
        ),
        Backend(
            "triton",
            _triton_forward,
            _triton_backward,
            lambda *args: slot_attention_triton.refuse(args[0], args[1]),
            lambda *args: str(slot_attention_triton.plan(args[0], args[1])),
        ),
    ),
)
