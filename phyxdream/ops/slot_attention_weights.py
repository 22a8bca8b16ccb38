"""What the fast implementations of `slot_attention` make of its weights, and how gradients come back.

What is linear between two steps of theirs is one matrix. With h the normalised inputs, without gain and shift, y the
normalised slots, and m the mean of h by attention:

    k·q / √Q = h·u + c,   u = U y,   c = o·y            W_k, b_k, W_q, and gain and shift of the inputs
    W_i updates + b_i = G m + bias                       W_i of the GRU, W_v, b_v, gain and shift
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

Product = Callable[[Tensor, Tensor], Tensor]  # a (M, K), b (N, K) to a bᵀ


class Composed(NamedTuple):
    """In the dtype of the weights; the first four are what the implementations are given."""

    query: Tensor  # U (I, D)
    offset: Tensor  # o (D,)
    input_gates: Tensor  # G (3D, I)
    input_bias: Tensor  # (3D,)
    queries: Tensor  # U without the gain
    values: Tensor  # W_v with the gain, (Q, I)
    value_shift: Tensor  # W_v of the shift, and its bias, (Q,)


def composed(w: Any, product: Product) -> Composed:
    """From `SlotAttentionWeights`."""
    gain, shift = w.inputs_gain, w.inputs_shift
    queries = product(w.to_k.t(), w.to_q.t()) * w.to_k.shape[0] ** -0.5
    values, value_shift = w.to_v * gain, (w.to_v * shift).sum(1)
    offset = (queries * shift.unsqueeze(1)).sum(0)
    if w.to_k_bias is not None:
        offset = offset + (w.to_q * w.to_k_bias.unsqueeze(1)).sum(0) * w.to_k.shape[0] ** -0.5
    if w.to_v_bias is not None:
        value_shift = value_shift + w.to_v_bias
    return Composed(
        queries * gain.unsqueeze(1),
        offset,
        product(w.input_gates, values.t()),
        (w.input_gates * value_shift).sum(1) + w.input_bias,
        queries,
        values,
        value_shift,
    )


def taken_apart(
    query: Tensor, offset: Tensor, gates: Tensor, bias: Tensor, w: Any, made: Composed, product: Product
) -> dict[str, Tensor]:
    """Gradients of the weights, from those of the first four that were made of them."""
    gain, shift, scale = w.inputs_gain, w.inputs_shift, w.to_k.shape[0] ** -0.5
    queries = query * gain.unsqueeze(1) + torch.outer(shift, offset)
    values, value_shift = product(w.input_gates.t(), gates.t()), (w.input_gates * bias.unsqueeze(1)).sum(0)
    to_q = product(w.to_k, queries.t()) * scale
    biases = {}
    if w.to_k_bias is not None:
        to_q = to_q + torch.outer(w.to_k_bias, offset) * scale
        biases["to_k_bias"] = (w.to_q * offset).sum(1) * scale
    if w.to_v_bias is not None:
        biases["to_v_bias"] = value_shift
    return dict(
        inputs_gain=(query * made.queries).sum(1) + (values * w.to_v).sum(0),
        inputs_shift=(made.queries * offset).sum(1) + (w.to_v * value_shift.unsqueeze(1)).sum(0),
        to_k=product(w.to_q, queries) * scale,
        to_q=to_q,
        to_v=values * gain + torch.outer(value_shift, shift),
        input_gates=product(gates, made.values) + torch.outer(bias, made.value_shift),
        input_bias=bias,
        **biases,
    )
