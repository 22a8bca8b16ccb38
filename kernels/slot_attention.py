"""Slot attention for CUDA devices, forward and backward (contract and reference: phyxdream/ops/slot_attention.py).

As in csrc/slot_attention.cpp, keys and values are never made: with h the normalised inputs, without gain and shift, all
that lies between h and the softmax, and between the sums of h and the gates of the GRU, is one matrix each:

    logits = h·u + c,   u = U y,   c = o·y,   y = LN(s)         U (I, D), o (D,): W_q, W_k, gain and shift of the inputs
    m = Σ w h / Σ w,    w = A + eps,   input gates = G m + bias    G (3D, I): W of the gates, W_v and the gain
    dA = h·e - m·e      dl = A ⊙ (dA - Σ_k A dA)      dh += Σ_k dl u + w e      du = Σ_n dl h      dc = Σ_n dl

where e is the gradient of m, divided by Σ w. Two phases take turns: one walks the tokens of an element of the batch and
sums up over them, the other takes tiles of slots through GRU and MLP to their next queries. Attention is never stored;
backward, it is computed again, and so are gates and MLP. The last pass of the backward does all iterations of a tile of
tokens at once, so that the gradient of the inputs is summed in registers and written once.

Every phase is a launch, in which several programs may share the tokens of an element. Only forward in half precision,
where none do, a program takes its element through all iterations in one launch. Sums are float32; factors of products
have the dtype of the inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from phyxdream.kernels.rssm_phases import opaque

ALL, ROWS, TOKENS, LEAVE = (tl.constexpr(i) for i in range(4))  # phases


class Weights(NamedTuple):
    """Contiguous, in the dtype of the inputs where they are matrices, else float32."""

    query: Any  # U (I, D)
    offset: Any  # o (D,)
    input_gates: Any  # G (3D, I)
    input_bias: Any
    hidden_gates: Any
    hidden_bias: Any
    slots_gain: Any
    slots_shift: Any
    mlp_gain: Any
    mlp_shift: Any
    mlp_in: Any
    mlp_in_bias: Any
    mlp_out: Any
    mlp_out_bias: Any


class Sizes(NamedTuple):
    """Of the model, and of the tiles; those of slots and features are powers of two."""

    K: tl.constexpr
    I: tl.constexpr
    D: tl.constexpr
    H: tl.constexpr
    eps: tl.constexpr
    layer_eps: tl.constexpr
    precision: tl.constexpr  # of products
    SLOTS: tl.constexpr
    INPUTS: tl.constexpr
    FEATURES: tl.constexpr
    TILE: tl.constexpr  # tokens
    ROWS: tl.constexpr  # slots
    STEP: tl.constexpr  # features of a product at a time


class Tape(NamedTuple):
    """What the forward keeps of every differentiated iteration: rows (iterations·B·K, size), float32."""

    slots: Any  # before it
    query: Any  # u
    pooled: Any  # m
    offset: Any  # c, (iterations·B·K,)
    total: Any  # Σ w


class Memory(NamedTuple):
    """What the forward reads and writes beside weights and tape."""

    inputs: Any  # (B, N, I)
    slots: Any
    mask: Any  # (B, K) uint8, or None
    slots_out: Any
    attention: Any  # (B, K, N), or None
    sums: Any  # (B, splits, K, I): Σ w h
    totals: Any  # (B, splits, K): Σ w


class Gradients(NamedTuple):
    """What the backward reads and writes beside weights and tape. Rows are those of the tape; what is not said to be
    float32 has the dtype of the inputs."""

    inputs: Any
    mask: Any
    slots_out: Any  # gradients of the results, or None
    attention: Any
    given: Any  # written: of slots and inputs
    tokens: Any
    carry: Any  # (B·K, D) float32
    sums: Any  # as in the forward: du and dc
    totals: Any
    pooled: Any  # e, float32
    dot: Any  # m·e, float32
    query: Any  # written, as all that follow, for the gradients of weights: du
    offset: Any  # dc, float32
    normed: Any  # y
    gates: Any  # (·, 4D): candidate, reset, update, and candidate as hidden_gates knows it
    mlp_normed: Any
    hidden: Any
    from_hidden: Any
    out: Any
    affine: Any  # (programs, 4, D) float32: gain and shift of slots and MLP


@triton.jit
def _lane(SIZE: tl.constexpr):
    """0, 1, … of which compilers only know that they lie side by side: else they move addresses out of loops, into
    registers."""
    return opaque(0) * 64 + tl.arange(0, SIZE)


@triton.jit
def _load(pointer, row, width, column, inside):
    at = row.to(tl.int64)[:, None] * width + column[None, :]
    return tl.load(pointer + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store(pointer, row, width, column, inside, value):
    at = row.to(tl.int64)[:, None] * width + column[None, :]
    tl.store(pointer + at, value.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def _vector(pointer, column, size):
    return tl.load(pointer + column, mask=column < size, other=0.0).to(tl.float32)


@triton.jit
def _normalised(x, size: tl.constexpr, inside, eps):
    """(x - mean) / σ and 1/σ of each row; without any variance, 0 instead of infinity."""
    centred = tl.where(inside, x - (tl.sum(x, 1) / size)[:, None], 0.0)
    variance = tl.sum(centred * centred, 1) / size + eps
    inverse = tl.where(variance > 0, 1 / tl.sqrt(variance), 0.0)
    return centred * inverse[:, None], inverse


@triton.jit
def _normalised_backward(grad, n, inverse, size: tl.constexpr):
    mean, along = tl.sum(grad, 1) / size, tl.sum(grad * n, 1) / size
    return inverse[:, None] * (grad - mean[:, None] - n * along[:, None])


# ---------------------------------------------------------------------------------------------------------------------
# Tokens.


@triton.jit
def _tokens(s, inputs, b, first, N):
    """h of a tile (TILE, INPUTS), 1/σ, which tokens there are, and where they lie."""
    n = first + tl.arange(0, s.TILE)
    column = tl.arange(0, s.INPUTS)
    inside = (n < N)[:, None] & (column < s.I)[None, :]
    row = tl.cast(b, tl.int64) * N + n
    h, inverse = _normalised(_load(inputs, row, s.I, column, inside), s.I, inside, s.layer_eps)
    return h, inverse, n < N, row


@triton.jit
def _slots(s, mask, b):
    """The rows of an element's slots, which of them there are, and which are present."""
    k = _lane(s.SLOTS)
    row, exists = b * s.K + k, k < s.K
    present = exists
    if mask is not None:
        present = tl.load(mask + row, mask=exists, other=0) != 0
    return row, exists, present


@triton.jit
def _attention(s, h, query, offset, present):
    """(TILE, SLOTS); where no slot is present, 0."""
    logits = tl.dot(h, tl.trans(query), input_precision=s.precision) + offset[None, :]
    logits = tl.where(present[None, :], logits, float("-inf"))
    peak = tl.max(logits, 1)
    e = tl.exp(logits - tl.where(peak == float("-inf"), 0.0, peak)[:, None])
    total = tl.sum(e, 1)
    return e / tl.where(total > 0, total, 1.0)[:, None]


@triton.jit
def _attention_at(s, row, exists, first, N):
    """Where the attention of these slots to a tile lies, which is slot by slot."""
    n = first + tl.arange(0, s.TILE)
    return row.to(tl.int64)[None, :] * N + n[:, None], (n < N)[:, None] & exists[None, :]


@triton.jit
def _store_sums(s, sums, totals, program, sum, total):
    k = _lane(s.SLOTS)
    column = _lane(s.INPUTS)
    row = program * s.K + k
    _store(sums, row, s.I, column, (k < s.K)[:, None] & (column < s.I)[None, :], sum)
    tl.store(totals + row, total, mask=k < s.K)


@triton.jit
def forward_tokens(s, tape, m, b, start, end, N, kept, last, program):
    """Σ w h and Σ w over tokens [start, end) of an element; with `last`, also the attention."""
    b = opaque(b)
    row, exists, present = _slots(s, m.mask, b)
    column = _lane(s.INPUTS)
    inside = exists[:, None] & (column < s.I)[None, :]
    query = _load(tape.query, kept + row, s.I, column, inside).to(m.inputs.dtype.element_ty)
    offset = tl.load(tape.offset + kept + row, mask=exists, other=0.0)
    sum = tl.zeros((s.SLOTS, s.INPUTS), tl.float32)
    total = tl.zeros((s.SLOTS,), tl.float32)
    for first in range(start, end, s.TILE):
        h, _, real, _ = _tokens(s, m.inputs, b, first, N)
        h = h.to(query.dtype)
        a = _attention(s, h, query, offset, present)
        if m.attention is not None:
            at, both = _attention_at(s, row, exists & last, first, N)
            tl.store(m.attention + at, a.to(m.attention.dtype.element_ty), mask=both)
        w = tl.where(real[:, None], a + s.eps, 0.0)
        total += tl.sum(w, 0)
        sum = tl.dot(tl.trans(w.to(h.dtype)), h, sum, input_precision=s.precision)
    _store_sums(s, m.sums, m.totals, program, sum, total)


@triton.jit
def _asked(s, tape, g, kept, row, exists):
    """Of an iteration: u, c, e and m·e."""
    column = _lane(s.INPUTS)
    inside = exists[:, None] & (column < s.I)[None, :]
    query = _load(tape.query, kept + row, s.I, column, inside).to(g.inputs.dtype.element_ty)
    offset = tl.load(tape.offset + kept + row, mask=exists, other=0.0)
    pooled = _load(g.pooled, kept + row, s.I, column, inside).to(query.dtype)
    dot = tl.load(g.dot + kept + row, mask=exists, other=0.0)
    return query, offset, pooled, dot


@triton.jit
def _slopes(s, g, h, first, N, row, exists, present, real, last, query, offset, pooled, dot):
    """A and dl, both (TILE, SLOTS); dl is 0 where there is no token."""
    a = _attention(s, h, query, offset, present)
    da = tl.dot(h, tl.trans(pooled), input_precision=s.precision) - dot[None, :]
    if g.attention is not None:
        at, both = _attention_at(s, row, exists & last, first, N)
        da += tl.load(g.attention + at, mask=both, other=0.0).to(tl.float32)
    return a, tl.where(real[:, None], a * (da - tl.sum(a * da, 1)[:, None]), 0.0)


@triton.jit
def backward_tokens(s, tape, g, b, start, end, N, kept, last, program):
    """du and dc of an iteration over tokens [start, end)."""
    b = opaque(b)
    row, exists, present = _slots(s, g.mask, b)
    query, offset, pooled, dot = _asked(s, tape, g, kept, row, exists)
    sum = tl.zeros((s.SLOTS, s.INPUTS), tl.float32)
    total = tl.zeros((s.SLOTS,), tl.float32)
    for first in range(start, end, s.TILE):
        h, _, real, _ = _tokens(s, g.inputs, b, first, N)
        h = h.to(query.dtype)
        _, dl = _slopes(s, g, h, first, N, row, exists, present, real, last, query, offset, pooled, dot)
        total += tl.sum(dl, 0)
        sum = tl.dot(tl.trans(dl.to(h.dtype)), h, sum, input_precision=s.precision)
    _store_sums(s, g.sums, g.totals, program, sum, total)


@triton.jit
def leave_tokens(s, tape, g, b, start, end, N, R, taped, program):
    """The same for the first iteration, and the gradient of the inputs, which is that of all iterations."""
    b = opaque(b)
    row, exists, present = _slots(s, g.mask, b)
    column = _lane(s.INPUTS)
    sum = tl.zeros((s.SLOTS, s.INPUTS), tl.float32)
    total = tl.zeros((s.SLOTS,), tl.float32)
    for first in tl.range(start, end, s.TILE, num_stages=1):
        h, inverse, real, at = _tokens(s, g.inputs, b, first, N)
        factor = h.to(g.inputs.dtype.element_ty)
        dh = tl.zeros((s.TILE, s.INPUTS), tl.float32)
        for t in tl.range(0, taped, num_stages=1):
            query, offset, pooled, dot = _asked(s, tape, g, t * R, row, exists)
            a, dl = _slopes(
                s, g, factor, first, N, row, exists, present, real, t == taped - 1, query, offset, pooled, dot
            )
            dh = tl.dot(dl.to(query.dtype), query, dh, input_precision=s.precision)
            dh = tl.dot((a + s.eps).to(query.dtype), pooled, dh, input_precision=s.precision)
            if t == 0:
                total += tl.sum(dl, 0)
                sum = tl.dot(tl.trans(dl.to(query.dtype)), factor, sum, input_precision=s.precision)
        inside = real[:, None] & (column < s.I)[None, :]
        _store(g.tokens, at, s.I, column, inside, _normalised_backward(dh, h, inverse, s.I))
    _store_sums(s, g.sums, g.totals, program, sum, total)


# ---------------------------------------------------------------------------------------------------------------------
# Slots. Rows are those of (B·K), and with `kept` those of the tape.


@triton.jit
def _collect(s, sums, totals, row, exists, splits):
    """What the programs that share an element's tokens have summed up: (ROWS, INPUTS) and (ROWS,)."""
    column = _lane(s.INPUTS)
    inside = exists[:, None] & (column < s.I)[None, :]
    sum = tl.zeros((s.ROWS, s.INPUTS), tl.float32)
    total = tl.zeros((s.ROWS,), tl.float32)
    for i in range(splits):
        at = (row // s.K * splits + i) * s.K + row % s.K
        sum += _load(sums, at, s.I, column, inside)
        total += tl.load(totals + at, mask=exists, other=0.0)
    return sum, total


@triton.jit
def _weight(weight, k, inside_k, k_stride, column, inside, column_stride):
    at = weight + k[:, None] * k_stride + column[None, :] * column_stride
    return tl.load(at, mask=inside_k[:, None] & inside[None, :], other=0.0)


@triton.jit
def _product(acc, s, x, row, width, exists, size: tl.constexpr, weight, k_stride, column, inside, column_stride):
    """acc (ROWS, columns) + x weight, of x as it lies in memory."""
    first_k = _lane(s.STEP)
    for first in range(0, opaque(size), s.STEP):
        k = first + first_k
        value = _load(x, row, width, k, exists[:, None] & (k < size)[None, :])
        tile = _weight(weight, k, k < size, k_stride, column, inside, column_stride)
        acc = tl.dot(value.to(tile.dtype), tile, acc, input_precision=s.precision)
    return acc


@triton.jit
def _times(acc, s, x, weight, k, inside_k, k_stride, column, inside, column_stride):
    """The same of x (ROWS, k) as it is here."""
    tile = _weight(weight, k, inside_k, k_stride, column, inside, column_stride)
    return tl.dot(x.to(tile.dtype), tile, acc, input_precision=s.precision)


@triton.jit
def _of_pooled(acc, w, s, tape, kept, exists, column, i: tl.constexpr):
    """What the pooled inputs add to gate i of the three."""
    weight = w.input_gates + i * s.D * s.I
    acc = _product(acc, s, tape.pooled, kept, s.I, exists, s.I, weight, 1, column, column < s.D, s.I)
    return acc + _vector(w.input_bias + i * s.D, column, s.D)[None, :]


@triton.jit
def _of_slots(acc, w, s, tape, kept, exists, column, i: tl.constexpr):
    weight = w.hidden_gates + i * s.D * s.D
    acc = _product(acc, s, tape.slots, kept, s.D, exists, s.D, weight, 1, column, column < s.D, s.D)
    return acc + _vector(w.hidden_bias + i * s.D, column, s.D)[None, :]


@triton.jit
def _cell(w, s, tape, kept, exists, column):
    """The GRU from the slots and the pooled inputs of the tape: before, reset, update, candidate, hidden candidate."""
    before = _load(tape.slots, kept, s.D, column, exists[:, None] & (column < s.D)[None, :])
    zero = tl.zeros((s.ROWS, s.FEATURES), tl.float32)
    reset = _of_pooled(zero, w, s, tape, kept, exists, column, 0)
    reset = tl.sigmoid(_of_slots(reset, w, s, tape, kept, exists, column, 0))
    update = _of_pooled(zero, w, s, tape, kept, exists, column, 1)
    update = tl.sigmoid(_of_slots(update, w, s, tape, kept, exists, column, 1))
    hidden = _of_slots(zero, w, s, tape, kept, exists, column, 2)
    candidate = 2 * tl.sigmoid(2 * _of_pooled(reset * hidden, w, s, tape, kept, exists, column, 2)) - 1
    return before, reset, update, candidate, hidden


@triton.jit
def _hidden_layer(w, s, normed, h, column):
    """Features h of the MLP's layer."""
    acc = tl.zeros((s.ROWS, s.STEP), tl.float32)
    acc = _times(acc, s, normed, w.mlp_in, column, column < s.D, 1, h, h < s.H, s.D)
    return tl.maximum(acc + _vector(w.mlp_in_bias, h, s.H)[None, :], 0.0)


@triton.jit
def _present(mask, row, exists):
    if mask is not None:
        exists = exists & (tl.load(mask + row, mask=exists, other=0) != 0)
    return exists


@triton.jit
def forward_rows(w, s, tape, m, first, end, R, iteration, iterations, taped, splits):
    """Slots [first, end) at the border before `iteration`: the end of the one before it, then queries of this one."""
    row = opaque(first) + tl.arange(0, s.ROWS)
    exists = row < end
    column = _lane(s.FEATURES)
    both = exists[:, None] & (column < s.D)[None, :]
    slots = tl.zeros((s.ROWS, s.FEATURES), tl.float32)
    skipped = iterations - taped
    if iteration == 0:
        slots += _load(m.slots, row, s.D, column, both)
    else:
        kept = tl.cast(tl.maximum(iteration - 1 - skipped, 0), tl.int64) * R + row
        present = _present(m.mask, row, exists)
        sum, total = _collect(s, m.sums, m.totals, row, exists, splits)
        total = tl.where(present, total, 1.0)  # without eps it is 0 where there is no slot
        tl.store(tape.total + kept, total, mask=exists)
        inputs = _lane(s.INPUTS)
        _store(tape.pooled, kept, s.I, inputs, exists[:, None] & (inputs < s.I)[None, :], sum / total[:, None])
        tl.debug_barrier()
        before, _, update, candidate, _ = _cell(w, s, tape, kept, exists, column)
        after = candidate + update * (before - candidate)
        n, _ = _normalised(after, s.D, both, s.layer_eps)
        normed = n * _vector(w.mlp_gain, column, s.D)[None, :] + _vector(w.mlp_shift, column, s.D)[None, :]
        after += _vector(w.mlp_out_bias, column, s.D)[None, :]
        step = _lane(s.STEP)
        for at in range(0, opaque(s.H), s.STEP):
            h = at + step
            hidden = _hidden_layer(w, s, normed, h, column)
            after = _times(after, s, hidden, w.mlp_out, h, h < s.H, 1, column, column < s.D, s.H)
        slots += tl.where(present[:, None], after, before)
        tl.debug_barrier()  # the slots before may be where those of now are kept
    if iteration == iterations:
        _store(m.slots_out, row, s.D, column, both, slots)
    else:
        kept = tl.cast(tl.maximum(iteration - skipped, 0), tl.int64) * R + row
        _store(tape.slots, kept, s.D, column, both, slots)
        n, _ = _normalised(slots, s.D, both, s.layer_eps)
        normed = n * _vector(w.slots_gain, column, s.D)[None, :] + _vector(w.slots_shift, column, s.D)[None, :]
        tl.store(tape.offset + kept, tl.sum(normed * _vector(w.offset, column, s.D)[None, :], 1), mask=exists)
        step = _lane(s.STEP)
        for at in range(0, opaque(s.I), s.STEP):
            i = at + step
            query = tl.zeros((s.ROWS, s.STEP), tl.float32)
            query = _times(query, s, normed, w.query, column, column < s.D, 1, i, i < s.I, s.D)
            _store(tape.query, kept, s.I, i, exists[:, None] & (i < s.I)[None, :], query)


@triton.jit
def _add_affine(s, affine, program, i: tl.constexpr, column, n, grad):
    """To the sums of a program: of a gain, and of the shift behind it."""
    at = affine + (program * 4 + i) * s.D + column
    inside = column < s.D
    tl.store(at, tl.load(at, mask=inside, other=0.0) + tl.sum(grad * n, 0), mask=inside)
    tl.store(at + s.D, tl.load(at + s.D, mask=inside, other=0.0) + tl.sum(grad, 0), mask=inside)


@triton.jit
def _query_back(w, s, tape, g, row, kept, exists, column, splits, program):
    """From u and c to the slots that asked: adds to the carry."""
    both = exists[:, None] & (column < s.D)[None, :]
    sum, total = _collect(s, g.sums, g.totals, row, exists, splits)
    inputs = _lane(s.INPUTS)
    _store(g.query, kept, s.I, inputs, exists[:, None] & (inputs < s.I)[None, :], sum)
    tl.store(g.offset + kept, total, mask=exists)
    n, inverse = _normalised(_load(tape.slots, kept, s.D, column, both), s.D, both, s.layer_eps)
    gain = _vector(w.slots_gain, column, s.D)[None, :]
    _store(g.normed, kept, s.D, column, both, n * gain + _vector(w.slots_shift, column, s.D)[None, :])
    tl.debug_barrier()
    d = total[:, None] * _vector(w.offset, column, s.D)[None, :]
    d = _product(d, s, g.query, kept, s.I, exists, s.I, w.query, s.D, column, column < s.D, 1)
    _add_affine(s, g.affine, program, 0, column, n, d)
    return _load(g.carry, row, s.D, column, both) + _normalised_backward(d * gain, n, inverse, s.D)


@triton.jit
def _update_back(w, s, tape, g, carry, row, kept, exists, column, program):
    """Through MLP and GRU: to the slots before, which is the new carry, and to the pooled inputs."""
    both = exists[:, None] & (column < s.D)[None, :]
    present = _present(g.mask, row, exists)[:, None]
    out = tl.where(present, carry, 0.0)
    passing = tl.where(present, 0.0, carry)  # absent slots came as they are
    before, reset, update, candidate, hidden_candidate = _cell(w, s, tape, kept, exists, column)
    after = candidate + update * (before - candidate)
    n, inverse = _normalised(after, s.D, both, s.layer_eps)
    gain = _vector(w.mlp_gain, column, s.D)[None, :]
    normed = n * gain + _vector(w.mlp_shift, column, s.D)[None, :]
    _store(g.out, kept, s.D, column, both, out)
    _store(g.mlp_normed, kept, s.D, column, both, normed)
    d = tl.zeros((s.ROWS, s.FEATURES), tl.float32)
    step = _lane(s.STEP)
    for at in range(0, opaque(s.H), s.STEP):
        h = at + step
        both_h = exists[:, None] & (h < s.H)[None, :]
        hidden = _hidden_layer(w, s, normed, h, column)
        from_hidden = tl.zeros((s.ROWS, s.STEP), tl.float32)
        from_hidden = _times(from_hidden, s, out, w.mlp_out, column, column < s.D, s.H, h, h < s.H, 1)
        from_hidden = tl.where(hidden > 0, from_hidden, 0.0)
        _store(g.hidden, kept, s.H, h, both_h, hidden)
        _store(g.from_hidden, kept, s.H, h, both_h, from_hidden)
        d = _times(d, s, from_hidden, w.mlp_in, h, h < s.H, s.D, column, column < s.D, 1)
    _add_affine(s, g.affine, program, 2, column, n, d)
    d = out + _normalised_backward(d * gain, n, inverse, s.D)
    inner = d * (1 - update) * (1 - candidate * candidate)
    _store(g.gates, kept, 4 * s.D, column, both, inner)
    _store(g.gates, kept, 4 * s.D, column + s.D, both, inner * hidden_candidate * reset * (1 - reset))
    _store(g.gates, kept, 4 * s.D, column + 2 * s.D, both, d * (before - candidate) * update * (1 - update))
    _store(g.gates, kept, 4 * s.D, column + 3 * s.D, both, inner * reset)
    tl.debug_barrier()
    width: tl.constexpr = 4 * s.D
    carry = passing + d * update
    carry = _product(
        carry, s, g.gates + s.D, kept, width, exists, 3 * s.D, w.hidden_gates, s.D, column, column < s.D, 1
    )
    _store(g.carry, row, s.D, column, both, carry)
    share = 1 / tl.load(tape.total + kept, mask=exists, other=1.0)
    dot = tl.zeros((s.ROWS,), tl.float32)
    step = _lane(s.STEP)
    for at in range(0, opaque(s.I), s.STEP):
        i = at + step
        both_i = exists[:, None] & (i < s.I)[None, :]
        e = tl.zeros((s.ROWS, s.STEP), tl.float32)
        e = _product(e, s, g.gates, kept, width, exists, s.D, w.input_gates + 2 * s.D * s.I, s.I, i, i < s.I, 1)
        e = _product(e, s, g.gates + s.D, kept, width, exists, 2 * s.D, w.input_gates, s.I, i, i < s.I, 1)
        e *= share[:, None]
        dot += tl.sum(e * _load(tape.pooled, kept, s.I, i, both_i), 1)
        _store(g.pooled, kept, s.I, i, both_i, e)
    tl.store(g.dot + kept, dot, mask=exists)


@triton.jit
def backward_rows(w, s, tape, g, first, end, R, t, taped, splits, program):
    """The border after differentiated iteration t - 1: from the queries of iteration t to what the pass over the tokens
    of the one before needs. `taped` is the end, where the results are, 0 the start."""
    row = opaque(first) + tl.arange(0, s.ROWS)
    exists = row < end
    column = _lane(s.FEATURES)
    both = exists[:, None] & (column < s.D)[None, :]
    kept = tl.cast(t, tl.int64) * R + row
    carry = tl.zeros((s.ROWS, s.FEATURES), tl.float32)
    if t < taped:
        carry += _query_back(w, s, tape, g, row, kept, exists, column, splits, program)
    elif g.slots_out is not None:
        carry += _load(g.slots_out, row, s.D, column, both)
    if t == 0:
        _store(g.given, row, s.D, column, both, carry)
    else:
        _update_back(w, s, tape, g, carry, row, kept - R, exists, column, program)


# ---------------------------------------------------------------------------------------------------------------------
# Launches.


@triton.jit
def _share(s, part, splits, N):
    """Of the tokens of an element, in whole tiles."""
    each = tl.cdiv(tl.cdiv(N, splits), s.TILE) * s.TILE
    return part * each, tl.minimum(part * each + each, N)


@triton.jit(do_not_specialize=["N", "R", "iterations", "taped", "splits", "iteration"])
def forward_kernel(w, s, tape, m, N, R, iterations, taped, splits, iteration, PHASE: tl.constexpr):
    p = tl.program_id(0)
    if PHASE == ALL:
        for i in tl.range(0, iterations + 1, num_stages=1):
            forward_rows(w, s, tape, m, p * s.K, p * s.K + s.K, R, i, iterations, taped, 1)
            tl.debug_barrier()
            if i < iterations:
                kept = tl.cast(tl.maximum(i - iterations + taped, 0), tl.int64) * R
                forward_tokens(s, tape, m, p, 0, N, N, kept, i == iterations - 1, p)
                tl.debug_barrier()
    elif PHASE == ROWS:
        forward_rows(w, s, tape, m, p * s.ROWS, R, R, iteration, iterations, taped, splits)
    else:
        part = tl.program_id(1)
        start, end = _share(s, part, splits, N)
        kept = tl.cast(tl.maximum(iteration - iterations + taped, 0), tl.int64) * R
        forward_tokens(s, tape, m, p, start, end, N, kept, iteration == iterations - 1, p * splits + part)


@triton.jit(do_not_specialize=["N", "R", "taped", "splits", "t"])
def backward_kernel(w, s, tape, g, N, R, taped, splits, t, PHASE: tl.constexpr):
    p, part = tl.program_id(0), tl.program_id(1)
    if PHASE == ROWS:
        backward_rows(w, s, tape, g, p * s.ROWS, R, R, t, taped, splits, p)
    else:
        start, end = _share(s, part, splits, N)
        if PHASE == TOKENS:
            kept = tl.cast(t, tl.int64) * R
            backward_tokens(s, tape, g, p, start, end, N, kept, t == taped - 1, p * splits + part)
        else:
            leave_tokens(s, tape, g, p, start, end, N, tl.cast(R, tl.int64), taped, p * splits + part)


FEWEST_TOKENS = 1024  # of a program, where an element is split: below, launches cost more than they bring


@dataclass(frozen=True)
class Plan:
    """What is launched: `splits` programs for the tokens of each of `elements` elements, and others for `rows` slots
    each, in turns. Where it is `fused`, the forward is one launch of a program for each element."""

    elements: int
    splits: int
    fused: bool
    slots: int
    inputs: int
    features: int
    tile: int
    backward_tile: int
    rows: int
    step: int
    warps: int
    backward_warps: int

    def row_programs(self, R: int) -> int:
        """Programs of a phase of R slots."""
        return triton.cdiv(R, self.rows)

    def options(self, warps: int) -> dict[str, int]:
        """Of a launch. Left to itself, the assembler spills a few words for the sake of more programs at once."""
        return dict(num_warps=warps, num_stages=2, maxnreg=255)

    def __str__(self) -> str:
        programs = f"{self.splits} program{'s' * (self.splits > 1)} for the tokens of each of {self.elements} elements"
        launches = "one launch forward" if self.fused else "two launches an iteration"
        return f"Triton, {programs}, {self.tile} at a time, {launches}"


def plan(B: int, N: int, K: int, I: int, D: int, half: bool, processors: int) -> Plan:
    """For inputs (B, N, I) and slots (B, K, D), where `processors` programs run at once."""
    slots, inputs, features = (max(16, triton.next_power_of_2(size)) for size in (K, I, D))
    most = max(inputs, features)
    splits = max(1, min(processors // B, N // FEWEST_TOKENS))
    tile = min(64, max(16, (4096 if half else 2048) // most))
    return Plan(
        elements=B,
        splits=splits,
        fused=splits == 1 and half,  # in float32, all iterations at once need more registers than there are
        slots=slots,
        inputs=inputs,
        features=features,
        tile=tile,
        backward_tile=max(16, tile // 2),
        rows=16,
        step=32 if half else 16,
        warps=4 if most <= 64 else 8,
        backward_warps=4 if half and most <= 64 else 8,
    )


def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def sizes_of(plan: Plan, K: int, I: int, D: int, H: int, eps: float, layer_eps: float, backward: bool) -> Sizes:
    # Three products in TF32 have the precision of float32, and leave the factors to the tensor cores.
    given = (K, I, D, H, eps, layer_eps, "tf32x3")
    tile = plan.backward_tile if backward else plan.tile
    return Sizes(*map(tl.constexpr, (*given, plan.slots, plan.inputs, plan.features, tile, plan.rows, plan.step)))


def forward(p: Plan, w: Weights, s: Sizes, tape: Tape, m: Memory, iterations: int, taped: int) -> None:
    """All iterations; fills tape and `m`."""
    B, N, _ = m.inputs.shape
    R = B * s.K.value
    with torch.cuda.device_of(m.inputs):
        if p.fused:
            s = s._replace(ROWS=s.SLOTS)  # those of an element
            forward_kernel[(B,)](w, s, tape, m, N, R, iterations, taped, 1, 0, PHASE=ALL.value, **p.options(p.warps))
            return
        for i in range(iterations + 1):
            given = (w, s, tape, m, N, R, iterations, taped, p.splits, i)
            forward_kernel[(p.row_programs(R),)](*given, PHASE=ROWS.value, **p.options(p.warps))
            if i < iterations:
                forward_kernel[(B, p.splits)](*given, PHASE=TOKENS.value, **p.options(p.warps))


def backward(p: Plan, w: Weights, s: Sizes, tape: Tape, g: Gradients, taped: int) -> None:
    """All differentiated iterations; fills `g`."""
    B, N, _ = g.inputs.shape
    R = B * s.K.value
    with torch.cuda.device_of(g.inputs):
        for t in reversed(range(taped + 1)):
            given = (w, s, tape, g, N, R, taped, p.splits)
            backward_kernel[(p.row_programs(R),)](*given, t, PHASE=ROWS.value, **p.options(p.backward_warps))
            if t > 0:
                phase = TOKENS if t > 1 else LEAVE
                backward_kernel[(B, p.splits)](*given, t - 1, PHASE=phase.value, **p.options(p.backward_warps))
