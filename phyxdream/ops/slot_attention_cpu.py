"""What surrounds the C++ of `slot_attention`: its weights (slot_attention_weights.py) and its memory.

csrc/slot_attention.cpp takes a stretch of the batch through all iterations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from phyxdream.ops import backend
from phyxdream.ops.rssm_cpu import product
from phyxdream.ops.slot_attention_weights import composed, taken_apart

_LANES = 16  # tokens, or slots, that C++ treats as one
_STRETCH = 1 << 19  # numbers of the inputs that are in memory a second time
_ROWS = 1 << 9  # slots whose factors of weights' gradients are written before they are multiplied


def refuse(inputs: Tensor) -> str:
    """Why C++ cannot take a call; an empty string if it can."""
    return backend.refuse_cpu(inputs, (torch.float32,))


def plan(inputs: Tensor, slots: Tensor) -> str:
    """What a call would run, in a few words."""
    threads, stretch = _threads(inputs, slots), _stretch(inputs, slots)
    return (
        f"C++, {threads} thread{'s' * (threads > 1)} sharing tokens and slots of "
        f"{min(stretch, inputs.shape[0])} elements at a time"
    )


def _threads(inputs, slots):
    """Below some microseconds an iteration, threads cost more than they bring."""
    work = inputs.numel() + slots.numel() * 16
    return torch.get_num_threads() if work >= 1 << 15 else 1


def _stretch(inputs, slots):
    """How many elements of the batch C++ takes at once: their normalised tokens stay in a shared cache."""
    K = slots.shape[1]
    return max(1, min(_STRETCH // inputs[0].numel(), _ROWS // K))


def _features(inputs, slots, w):
    """Of a slot and an iteration, what the forward keeps; the order is that of `Tape` in C++."""
    I, D = inputs.shape[2], slots.shape[2]
    return 5 * D + 2 * I + w.mlp_in.shape[0] + 6


def _padded_rows(elements, slots, options):
    """Rows of all iterations with a gradient, in whole groups of lanes."""
    groups = (elements * slots.shape[1] + _LANES - 1) // _LANES
    return (1 if options.implicit else options.iterations) * groups * _LANES


def tape_size(inputs: Tensor, slots: Tensor, w, options) -> int:
    """Floats that the forward keeps for the backward."""
    B, stretch = inputs.shape[0], _stretch(inputs, slots)
    rows = B // stretch * _padded_rows(stretch, slots, options) + _padded_rows(B % stretch, slots, options)
    return rows * _features(inputs, slots, w)


def forward(outputs: tuple[Tensor, ...], inputs: Tensor, slots: Tensor, slot_mask: Tensor | None, w, options) -> None:
    """Fills the three outputs of the schema."""
    slots_out, attention, tape = outputs
    w = _contiguous(w)
    common = _common(inputs, slots, w, composed(w, product), options)
    for part, tape_part in _stretches(inputs, slots, w, options):
        _call(
            "slot_attention_forward",
            common
            | _of_stretch(inputs[part], slots[part], None if slot_mask is None else slot_mask[part], tape[tape_part])
            | {
                "slots_out": slots_out[part],
                "attention": attention[part] if options.return_attention else None,
            },
        )


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
    grad_slots, grad_attention = grads
    grad_slots = torch.zeros_like(slots) if grad_slots is None else grad_slots
    grad_inputs = inputs.new_empty(inputs.shape)
    grad_given = slots.new_empty(slots.shape)
    w = _contiguous(w)
    made, D = composed(w, product), slots.shape[2]
    common = _common(inputs, slots, w, made, options)
    found = {name: x.new_zeros(x.shape) for name, x in common.items() if isinstance(x, Tensor)}
    common |= {f"grad_{name}": x for name, x in found.items()}
    # Where their gradients are multiplied by it, gates lie as candidate, reset, update.
    common["input_gates"] = made.input_gates.roll(D, 0)
    for part, tape_part in _stretches(inputs, slots, w, options):
        _call(
            "slot_attention_backward",
            common
            | _of_stretch(inputs[part], slots[part], None if slot_mask is None else slot_mask[part], tape[tape_part])
            | {
                "grad_slots": grad_slots[part],
                "grad_attention": None if grad_attention is None else grad_attention[part],
                "grad_given": grad_given[part],
                "grad_inputs": grad_inputs[part],
            },
        )
    of_composed = (found[name] for name in ("query", "offset", "input_gates", "input_bias"))
    found |= taken_apart(*of_composed, w, made, product)
    empty = inputs.new_empty(0)  # of what was not given
    return [grad_inputs, grad_given, *(found.get(name, empty) for name in w._fields)]


def _contiguous(w):
    return type(w)(*(None if x is None else x.contiguous() for x in w))


def _stretches(inputs, slots, w, options):
    """What C++ takes at once, of the batch and of the tape."""
    stretch, at = _stretch(inputs, slots), 0
    for first in range(0, inputs.shape[0], stretch):
        part = slice(first, first + stretch)
        size = _padded_rows(slots[part].shape[0], slots, options) * _features(inputs, slots, w)
        yield part, slice(at, at + size)
        at += size


def _common(inputs, slots, w, made, options):
    """What both directions are told of all elements."""
    named = w._asdict()
    for name in ("inputs_gain", "inputs_shift", "to_k", "to_v", "to_q"):
        del named[name]
    named |= {name: getattr(made, name) for name in ("query", "offset", "input_gates", "input_bias")}
    return {
        **named,
        "N": inputs.shape[1],
        "K": slots.shape[1],
        "I": inputs.shape[2],
        "D": slots.shape[2],
        "H": w.mlp_in.shape[0],
        "iterations": options.iterations,
        "taped": 1 if options.implicit else options.iterations,
        "eps": options.eps,
        "layer_eps": options.layer_eps,
        "threads": _threads(inputs, slots),
    }


def _of_stretch(inputs, slots, slot_mask, tape):
    inputs = inputs if inputs.stride(2) == 1 else inputs.contiguous()
    return {
        "B": inputs.shape[0],
        "inputs": inputs,
        "inputs_element": inputs.stride(0),
        "inputs_token": inputs.stride(1),
        "slots": slots,
        "slot_mask": slot_mask,
        "tape": tape,
    }


def _call(function, arguments):
    # The contiguous copies live as long as this frame.
    held = {k: x.contiguous() if isinstance(x, Tensor) and k != "inputs" else x for k, x in arguments.items()}
    getattr(backend.extension, function)({k: x.data_ptr() if isinstance(x, Tensor) else x for k, x in held.items()})
