"""The phases of an RSSM step for CUDA devices, forward and backward (the formulas: csrc/rssm_forward.cpp).

A phase is what programs may do side by side, a tile of sequences times a tile of features at a time; between phases
they meet. What a phase needs of a whole vector (its mean, say) is summed per tile by the phase before. Unlike in C++, a
layer has no phase for its norm: whoever reads its values takes them from the tape and normalises and activates them on
the way into the product, which costs less than a meeting. Backward likewise.

Values between phases lie in global memory, and so in the L2 cache: those of a layer on the tape, gradients in the rows
that the products after the scan read. Everything is float32 but the factors of products, which have the dtype of the
weights; products sum in float32.

The number of a sequence times a size stays below 2^31; with the step it may not, so rows are 64-bit.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

GRU, LAYER_NORM_GRU, BLOCK_GRU = (tl.constexpr(i) for i in range(3))
SILU, ELU, RELU, IDENTITY = (tl.constexpr(i) for i in range(4))
ALL = tl.constexpr(-1)  # instead of the number of one phase
CATEGORICAL, BOUNDED_NORMAL, TANH_NORMAL = (tl.constexpr(i) for i in range(3))
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


class Layer(NamedTuple):
    """A linear map's values, and the norm and activation that follow. Without a gain there is no norm; without a shift
    it is an RMS norm."""

    bias: Any
    gain: Any
    shift: Any
    size: tl.constexpr
    blocks: tl.constexpr  # no tile lies across two
    eps: tl.constexpr
    act: tl.constexpr
    tape: tl.constexpr  # where its values start in a row of the tape; behind them, of a norm, mean and 1/σ
    sums: tl.constexpr  # where its tiles start in `Memory.sums`; of each tile two rows


class Weights(NamedTuple):
    """Contiguous, as in phyxdream/ops/rssm_cells.py; None where the cell has no such weight."""

    in_stoch: Any  # of categorical latents transposed, (Z, U)
    in_action: Any  # of actions that come in with the steps
    in_deter: Any
    mix_deter: Any
    mix_inputs: Any
    gates: Any
    gates_bias: Any
    hidden_gates: Any
    hidden_bias: Any
    out: Any  # of the prior or posterior
    out_bias: Any


class Layers(NamedTuple):
    stoch: Layer  # of z (and, but in block_gru, of the action)
    deter: Layer | None  # of h, block_gru
    action: Layer | None  # block_gru, of actions that come in with the steps
    mix: Layer | None  # block_gru
    gates: Layer | None  # layernorm_gru
    head: Layer  # the prior's or posterior's last


class Head(NamedTuple):
    """A prior (or posterior) or policy: its layers and their weights; what follows `weights` only a policy has."""

    layers: Any
    weights: Any  # of the prior's first, D columns of a row of `Sizes.head_row`
    stoch: Any = None  # of the first layer, for categorical z: transposed, (S·C, size)
    stoch_first: Any = None  # what z brings at step 0
    out: Any = None
    out_bias: Any = None
    noise: Any = None
    action: Any = None  # written by the forward; where the cell reads it as it is, `Memory.action`
    dist: Any = None
    unimix: Any = None
    min_std: Any = None
    max_std: Any = None
    detach: Any = None  # whether it reads the state as a constant
    clip: Any = None  # whether the cell reads a / max(1, |a|)
    LANES: Any = None  # the power of two from A


class Sizes(NamedTuple):
    """Of the model, and of the tiles. `classes` is 0 for Gaussian latents."""

    cell: tl.constexpr
    A: tl.constexpr  # of actions that come in with the steps, or 0
    D: tl.constexpr
    U: tl.constexpr
    stoch: tl.constexpr
    classes: tl.constexpr
    blocks: tl.constexpr
    head_row: tl.constexpr
    in_row: tl.constexpr  # of `Gradients.in_rows`
    tape: tl.constexpr  # floats a step and sequence
    taped: tl.constexpr  # whether the tape has all steps, or only what one step hands from phase to phase
    gates: tl.constexpr  # where the gates start, if they have no layer
    unimix: tl.constexpr
    min_std: tl.constexpr
    cumulative: tl.constexpr  # whether the noise has one number a variable
    precision: tl.constexpr  # of products
    ROWS: tl.constexpr  # sequences of a tile
    COLUMNS: tl.constexpr  # features of a tile
    DEPTH: tl.constexpr  # of one step of a product
    CLASSES: tl.constexpr  # the power of two from `classes`
    VARIABLES: tl.constexpr  # that a tile samples
    GATHERED: tl.constexpr  # variables whose rows are picked at once


class Memory(NamedTuple):
    """What the forward reads and writes beside the weights. Rows are (T·B, size) unless said otherwise."""

    from_action: Any  # what the action brings, bias included: to the layer of z, or, block_gru, to that of the mix
    action: Any  # or, where that is None, the action as its layer reads it
    embeds: Any  # what the embedding brings to the head, or None
    is_first: Any  # None without resets
    noise: Any  # arrival times, one number a variable, or standard normal
    initial_deter: Any  # of resets
    initial_stoch: Any
    stoch_first: Any  # (B, ·) and (·) of step 0 and of resets: z, or for categorical latents what it brings
    stoch_start: Any
    previous: Any  # (2, B, D): h that a step starts from, resets made; steps take turns
    sums: Any  # (·, B): per tile of a norm two sums
    deter: Any
    stoch: Any
    statistics: Any
    tape: Any
    index: Any


class Gradients(NamedTuple):
    """What the backward reads and writes beside the weights and the tape."""

    deter: Any  # of the results, or None
    stoch: Any
    statistics: Any
    action: Any
    is_first: Any  # None without resets
    noise: Any
    before: Any  # h that each step started from
    given: Any  # the statistics that the forward gave
    tape: Any
    sums: Any
    statistics_rows: Any  # written: of what left the linear maps; before the norm's gain, where there is one
    prior_rows: Any  # of each layer
    gate_rows: Any  # gru: reset, update, new, and new as hidden_gates knows it; block_gru: per block three
    mix_rows: Any
    in_rows: Any  # of z, then, block_gru, of h and of actions that come in with the steps
    action_rows: Any  # of a policy's statistics
    policy_rows: Any  # of each of its layers
    carry: Any  # (B, D)
    initial: Any  # (B, D): what resets stopped


# ---------------------------------------------------------------------------------------------------------------------
# Between phases.


@triton.jit
def meet(arrivals, met, PHASE: tl.constexpr, GRID: tl.constexpr):
    """Waits for all programs of a tile of sequences, and for what they wrote. The counter starts at 0."""
    if PHASE == ALL:
        tl.debug_barrier()
        if GRID:
            met += tl.num_programs(0)
            counter = arrivals + tl.program_id(1)
            tl.atomic_add(counter, 1, sem="release", scope="gpu")
            while tl.atomic_add(counter, 0, sem="acquire", scope="gpu") < met:
                pass
            tl.debug_barrier()
    return met


# ---------------------------------------------------------------------------------------------------------------------
# Tiles.


@triton.jit
def opaque(i):
    """The number i, of which compilers know nothing more. What follows from it, they leave where it is: else they move
    the addresses of all phases out of the loop over time, into registers that each phase needs for itself."""
    i = tl.cast(i, tl.int32)  # the interpreter gives numbers
    if not INTERPRETED:
        i += tl.inline_asm_elementwise("mov.u32 $0, %ctaid.z;", "=r", [], dtype=tl.int32, is_pure=False, pack=1)
    return i


@triton.jit
def _tile(i, size: tl.constexpr, blocks: tl.constexpr, COLUMNS: tl.constexpr):
    """Features of tile i, which of them exist, how many, and their block."""
    i = opaque(i)
    each: tl.constexpr = size // blocks
    tiles: tl.constexpr = (each + COLUMNS - 1) // COLUMNS
    start = (i % tiles) * COLUMNS
    column = start + tl.arange(0, COLUMNS)
    return (i // tiles) * each + column, column < each, tl.minimum(-start + each, COLUMNS), i // tiles


@triton.jit
def _load(pointer, row, size, column, inside):
    return tl.load(pointer + row[:, None] * size + column[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store(pointer, row, size, column, inside, value):
    at = pointer + row[:, None] * size + column[None, :]
    tl.store(at, value.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def _vector(pointer, column, inside):
    return tl.load(pointer + column, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _resets(is_first, row, exists):
    found = exists & False
    if is_first is not None:
        found = tl.load(is_first + row, mask=exists, other=0) != 0
    return found


@triton.jit
def _sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def _tanh(x):
    return 2 / (1 + tl.exp(-2 * x)) - 1


@triton.jit
def _softplus(x):
    return tl.maximum(x, 0.0) + tl.log(1 + tl.exp(-tl.abs(x)))


@triton.jit
def _activate(u, ACT: tl.constexpr):
    if ACT == SILU:
        u = u * _sigmoid(u)
    elif ACT == ELU:
        u = tl.where(u > 0, u, tl.exp(tl.minimum(u, 0.0)) - 1)
    elif ACT == RELU:
        u = tl.where(u > 0, u, 0.0 * u)  # NaN passes through
    return u


@triton.jit
def _slope(u, ACT: tl.constexpr):
    if ACT == SILU:
        s = _sigmoid(u)
        u = s * (1 + u * (1 - s))
    elif ACT == ELU:
        u = tl.where(u > 0, 1.0, tl.exp(tl.minimum(u, 0.0)))
    else:
        u = tl.where(u > 0, 1.0, 0.0)
    return u


# ---------------------------------------------------------------------------------------------------------------------
# Layers.


@triton.jit
def _normalised(v, layer, mean, inverse):
    if layer.gain is not None:
        v = (v - mean[:, None]) * inverse[:, None]
    return v


@triton.jit
def _affine(n, layer, column, inside):
    if layer.gain is not None:
        n = n * _vector(layer.gain, column, inside)[None, :]
    if layer.shift is not None:
        n = n + _vector(layer.shift, column, inside)[None, :]
    return n


@triton.jit
def _keep_sums(sums, i, B, sequence, exists, first, second):
    tl.store(sums + 2 * i * B + sequence, first, mask=exists)
    tl.store(sums + (2 * i + 1) * B + sequence, second, mask=exists)


@triton.jit
def _enter(d, s, layer, i, value, row, B, sequence, exists, column, inside, count):
    """A tile before its norm: to the tape, and its sums for the norm."""
    _store(d.tape, row, s.tape, column + layer.tape, exists[:, None] & inside[None, :], value)
    if layer.gain is not None:
        value = tl.where(inside[None, :], value, 0.0)
        total = tl.sum(value, 1)
        if layer.shift is not None:
            value = tl.where(inside[None, :], value - (total / count)[:, None], 0.0)
        _keep_sums(d.sums + B * layer.sums, i, B, sequence, exists, total, tl.sum(value * value, 1))


@triton.jit
def _moments(d, s, layer, row, B, sequence, exists, KEEP):
    """Mean and 1/σ of the whole vector from the sums of its tiles (Chan et al. 1979); one program keeps them."""
    mean = tl.zeros((s.ROWS,), tl.float32)
    inverse = tl.zeros((s.ROWS,), tl.float32)
    if layer.gain is not None:
        each: tl.constexpr = layer.size // layer.blocks
        per_block: tl.constexpr = (each + s.COLUMNS - 1) // s.COLUMNS
        sums = d.sums + B * layer.sums
        if layer.shift is not None:
            for i0 in range(0, per_block * layer.blocks, 32):
                i = i0 + tl.arange(0, 32)
                inside = exists[:, None] & (i < per_block * layer.blocks)[None, :]
                mean += tl.sum(tl.load(sums + 2 * i[None, :] * B + sequence[:, None], mask=inside, other=0.0), 1)
            mean = mean / layer.size
        square = tl.zeros((s.ROWS,), tl.float32)
        for i0 in range(0, per_block * layer.blocks, 32):
            i = i0 + tl.arange(0, 32)
            inside = exists[:, None] & (i < per_block * layer.blocks)[None, :]
            at = sums + 2 * i[None, :] * B + sequence[:, None]
            part = tl.load(at + B, mask=inside, other=0.0)
            if layer.shift is not None:
                count = tl.minimum((i % per_block) * -s.COLUMNS + each, s.COLUMNS)[None, :]
                apart = tl.load(at, mask=inside, other=0.0) / count - mean[:, None]
                part += tl.where(inside, count * apart * apart, 0.0)
            square += tl.sum(part, 1)
        inverse = 1 / tl.sqrt(square / layer.size + layer.eps)
        if s.taped:
            at = d.tape + row * s.tape + layer.tape + layer.size
            tl.store(at, mean, mask=exists & KEEP)
            tl.store(at + 1, inverse, mask=exists & KEEP)
    return mean, inverse


@triton.jit
def _kept_moments(d, s, layer, row, exists):
    mean = tl.zeros((s.ROWS,), tl.float32)
    inverse = tl.zeros((s.ROWS,), tl.float32)
    if layer.gain is not None:
        at = d.tape + row * s.tape + layer.tape + layer.size
        mean = tl.load(at, mask=exists, other=0.0)
        inverse = tl.load(at + 1, mask=exists, other=0.0)
    return mean, inverse


@triton.jit
def _enter_backward(d, s, layer, i, value, rows, width, start, row, B, sequence, exists, column, inside, count):
    """The gradient of a tile of activated values, back through the activation, and its sums for the norm."""
    both = exists[:, None] & inside[None, :]
    mean, inverse = _kept_moments(d, s, layer, row, exists)
    n = _normalised(_load(d.tape, row, s.tape, column + layer.tape, both), layer, mean, inverse)
    value *= _slope(_affine(n, layer, column, inside), layer.act)
    _store(rows, row, width, column + start, both, value)
    if layer.gain is not None:
        value = tl.where(both, value * _vector(layer.gain, column, inside)[None, :], 0.0)
        _keep_sums(d.sums + B * layer.sums, i, B, sequence, exists, tl.sum(value, 1), tl.sum(value * n, 1))


@triton.jit
def _means(d, s, layer, tiles: tl.constexpr, B, sequence, exists):
    """Means of d and of d·n, from the sums of their tiles; the first is 0 where the norm has no mean."""
    mean = tl.zeros((s.ROWS,), tl.float32)
    along = tl.zeros((s.ROWS,), tl.float32)
    if layer.gain is not None:
        for i0 in range(0, tiles, 32):
            i = i0 + tl.arange(0, 32)
            inside = exists[:, None] & (i < tiles)[None, :]
            at = d.sums + (2 * i[None, :] + layer.sums) * B + sequence[:, None]
            if layer.shift is not None:
                mean += tl.sum(tl.load(at, mask=inside, other=0.0), 1)
            along += tl.sum(tl.load(at + B, mask=inside, other=0.0), 1)
    return mean / layer.size, along / layer.size


# ---------------------------------------------------------------------------------------------------------------------
# Products: acc (ROWS, n) += x (ROWS, K) times a tile (K, n) of a weight, whose strides are given.


@triton.jit
def _step(acc, x, s, weight, k, inside_k, k_stride, n, inside, n_stride):
    at = weight + k[:, None] * k_stride + n[None, :] * n_stride
    tile = tl.load(at, mask=inside_k[:, None] & inside[None, :], other=0.0)
    return tl.dot(x.to(tile.dtype), tile, acc, input_precision=s.precision)


@triton.jit
def _product(acc, s, x, row, width, exists, K: tl.constexpr, weight, k_stride, n, inside, n_stride):
    """Of values as they lie in rows."""
    first_k = opaque(0) + tl.arange(0, s.DEPTH)
    for k0 in range(0, K, s.DEPTH):
        k = k0 + first_k
        value = _load(x, row, width, k, exists[:, None] & (k < K)[None, :])
        acc = _step(acc, value, s, weight, k, k < K, k_stride, n, inside, n_stride)
    return acc


@triton.jit
def _product_of_layer(
    acc, d, s, layer, mean, inverse, start, K: tl.constexpr, row, exists, weight, k_stride, n, inside, n_stride
):
    """Of features [start, start + K) of a layer, which leave the norm and the activation here."""
    first_k = opaque(0) + tl.arange(0, s.DEPTH)
    for k0 in range(0, K, s.DEPTH):
        k = k0 + first_k
        value = _load(d.tape, row, s.tape, k + start + layer.tape, exists[:, None] & (k < K)[None, :])
        value = _affine(_normalised(value, layer, mean, inverse), layer, k + start, k < K)
        acc = _step(acc, _activate(value, layer.act), s, weight, k, k < K, k_stride, n, inside, n_stride)
    return acc


@triton.jit
def _product_of_gradient(
    acc, d, s, layer, tiles: tl.constexpr, rows, width, first, start, K: tl.constexpr, row, B, sequence, exists,
    weight, k_stride, n, inside, n_stride,
):  # fmt: skip
    """Of what flows into features [start, start + K) of a layer, which leaves the norm here:
    (d - mean d - n mean(d n)) / σ. Its rows start at column `first`."""
    mean, inverse = _kept_moments(d, s, layer, row, exists)
    mean_d, along = _means(d, s, layer, tiles, B, sequence, exists)
    first_k = opaque(0) + tl.arange(0, s.DEPTH)
    for k0 in range(0, K, s.DEPTH):
        k = k0 + first_k
        both = exists[:, None] & (k < K)[None, :]
        value = _load(rows, row, width, k + first + start, both)
        if layer.gain is not None:
            n_k = _normalised(_load(d.tape, row, s.tape, k + start + layer.tape, both), layer, mean, inverse)
            value = value * _vector(layer.gain, k + start, k < K)[None, :]
            value = inverse[:, None] * (value - mean_d[:, None] - n_k * along[:, None])
        acc = _step(acc, value, s, weight, k, k < K, k_stride, n, inside, n_stride)
    return acc


@triton.jit
def _product_of_all_gradient(
    acc, d, s, layer, rows, row, B, sequence, exists, weight, k_stride, n, inside, n_stride
):  # fmt: skip
    """Of what flows into a whole layer of a prior or policy."""
    tiles: tl.constexpr = (layer.size + s.COLUMNS - 1) // s.COLUMNS
    return _product_of_gradient(
        acc, d, s, layer, tiles, rows, layer.size, 0, 0, layer.size, row, B, sequence, exists, weight, k_stride, n,
        inside, n_stride,
    )  # fmt: skip


@triton.jit
def _bias(acc, bias, column, inside):
    if bias is not None:
        acc += _vector(bias, column, inside)[None, :]
    return acc


# ---------------------------------------------------------------------------------------------------------------------
# Forward. `tile` is that of the sequences, i that of the features.


@triton.jit
def _rows_of(t, tile, B, s):
    sequence = opaque(tile) * s.ROWS + tl.arange(0, s.ROWS)
    return sequence, sequence < B, tl.cast(t, tl.int64) * B + sequence


@triton.jit
def _kept_row(s, row, sequence):
    """Of the tape."""
    if not s.taped:
        row = tl.cast(sequence, tl.int64)
    return row


@triton.jit
def _picked(acc, weight, first, start, d, s, size: tl.constexpr, t, row, B, sequence, exists, column, inside):
    """What z brings to a layer where it is categorical: each one-hot picks a row of the transposed weight. `first` and
    `start` are what it brings at step 0 and at resets."""
    resets = _resets(d.is_first, row, exists)
    both = exists[:, None] & inside[None, :]
    if t == 0:
        acc += _load(first, sequence, size, column, both)
    else:
        if start is not None:
            acc += tl.where(resets[:, None], _vector(start, column, inside)[None, :], 0.0)
        kept = exists & (resets == 0)
        for v0 in range(0, s.stoch, s.GATHERED):
            v = v0 + tl.arange(0, s.GATHERED)
            is_one = kept[:, None] & (v < s.stoch)[None, :]
            index = tl.load(d.index + (row - B)[:, None] * s.stoch + v[None, :], mask=is_one, other=0)
            at = ((v * s.classes)[None, :] + index)[:, :, None] * size + column[None, None, :]
            tile = tl.load(weight + at, mask=is_one[:, :, None] & inside[None, None, :], other=0.0)
            acc += tl.sum(tile.to(tl.float32), 1)
    return acc


@triton.jit
def inputs(w, l, d, s, t, tile, B, i):
    """The layer of z, and in block_gru those of h and the action."""
    i = tl.cast(i, tl.int32)
    sequence, exists, row = _rows_of(t, tile, B, s)
    kept = _kept_row(s, row, sequence)
    tiles: tl.constexpr = (s.U + s.COLUMNS - 1) // s.COLUMNS
    column, inside, count, _ = _tile(i % tiles, s.U, 1, s.COLUMNS)
    acc = tl.zeros((s.ROWS, s.COLUMNS), tl.float32)
    if i < tiles:
        acc = _bias(acc, l.stoch.bias, column, inside)
        if s.cell != BLOCK_GRU:
            if s.A > 0:
                acc = _product(acc, s, d.action, row, s.A, exists, s.A, w.in_action, 1, column, inside, s.A)
            else:
                acc += _load(d.from_action, row, s.U, column, exists[:, None] & inside[None, :])
        if s.classes > 0:
            acc = _picked(
                acc, w.in_stoch, d.stoch_first, d.stoch_start, d, s, s.U, t, row, B, sequence, exists, column, inside
            )
        else:
            acc = _product(
                acc, s, d.stoch_first, sequence, s.stoch, exists, s.stoch, w.in_stoch, 1, column, inside, s.stoch
            )
        _enter(d, s, l.stoch, i, acc, kept, B, sequence, exists, column, inside, count)
    elif i < 2 * tiles:
        if s.cell == BLOCK_GRU:
            acc = _bias(acc, l.deter.bias, column, inside)
            previous = d.previous + (t % 2) * B * s.D
            acc = _product(acc, s, previous, sequence, s.D, exists, s.D, w.in_deter, 1, column, inside, s.D)
            _enter(d, s, l.deter, i - tiles, acc, kept, B, sequence, exists, column, inside, count)
    else:
        if s.cell == BLOCK_GRU and s.A > 0:
            acc = _bias(acc, l.action.bias, column, inside)
            acc = _product(acc, s, d.action, row, s.A, exists, s.A, w.in_action, 1, column, inside, s.A)
            _enter(d, s, l.action, i - 2 * tiles, acc, kept, B, sequence, exists, column, inside, count)


@triton.jit
def mix(w, l, d, s, t, tile, B, i):
    """block_gru: the layer that all inputs meet in."""
    sequence, exists, row = _rows_of(t, tile, B, s)
    kept = _kept_row(s, row, sequence)
    column, inside, count, block = _tile(i, s.D, s.blocks, s.COLUMNS)
    size: tl.constexpr = s.D // s.blocks
    if s.A > 0:
        acc = _bias(tl.zeros((s.ROWS, s.COLUMNS), tl.float32), l.mix.bias, column, inside)
        mean, inverse = _moments(d, s, l.action, kept, B, sequence, exists, i == 0)
        weight = w.mix_inputs + 2 * s.U
        acc = _product_of_layer(
            acc, d, s, l.action, mean, inverse, 0, s.U, kept, exists, weight, 1, column, inside, 3 * s.U
        )
    else:
        acc = _load(d.from_action, row, s.D, column, exists[:, None] & inside[None, :])
    previous = d.previous + (t % 2) * B * s.D + block * size
    weight = w.mix_deter + block * size * size - block * size  # `column` counts from the first block
    acc = _product(acc, s, previous, sequence, s.D, exists, size, weight, size, column, inside, 1)
    mean, inverse = _moments(d, s, l.deter, kept, B, sequence, exists, i == 0)
    acc = _product_of_layer(
        acc, d, s, l.deter, mean, inverse, 0, s.U, kept, exists, w.mix_inputs, 1, column, inside, 3 * s.U
    )
    mean, inverse = _moments(d, s, l.stoch, kept, B, sequence, exists, i == 0)
    acc = _product_of_layer(
        acc, d, s, l.stoch, mean, inverse, 0, s.U, kept, exists, w.mix_inputs + s.U, 1, column, inside, 3 * s.U
    )
    _enter(d, s, l.mix, i, acc, kept, B, sequence, exists, column, inside, count)


@triton.jit
def _put_deter(d, s, h, t, T, B, row, sequence, exists, column, inside):
    """The new state: to the result, and, with the resets of the next step, to what that starts from."""
    both = exists[:, None] & inside[None, :]
    _store(d.deter, row, s.D, column, both, h)
    if d.is_first is not None:
        resets = _resets(d.is_first, row + B, exists & (t + 1 < T))
        h = tl.where(resets[:, None], _vector(d.initial_deter, column, inside)[None, :], h)
    _store(d.previous + ((t + 1) % 2) * B * s.D, sequence, s.D, column, both, h)


@triton.jit
def _gru_update(reset, candidate, update, previous):
    return previous + _sigmoid(update - 1) * (_tanh(_sigmoid(reset) * candidate) - previous)


@triton.jit
def gates(w, l, d, s, t, tile, B, i):
    """layernorm_gru: the gates before their norm."""
    sequence, exists, row = _rows_of(t, tile, B, s)
    kept = _kept_row(s, row, sequence)
    column, inside, count, _ = _tile(i, 3 * s.D, 1, s.COLUMNS)
    mean, inverse = _moments(d, s, l.stoch, kept, B, sequence, exists, i == 0)
    acc = _bias(tl.zeros((s.ROWS, s.COLUMNS), tl.float32), l.gates.bias, column, inside)
    acc = _product_of_layer(
        acc, d, s, l.stoch, mean, inverse, 0, s.U, kept, exists, w.gates, 1, column, inside, s.U + s.D
    )
    previous = d.previous + (t % 2) * B * s.D
    acc = _product(acc, s, previous, sequence, s.D, exists, s.D, w.gates + s.U, 1, column, inside, s.U + s.D)
    _enter(d, s, l.gates, i, acc, kept, B, sequence, exists, column, inside, count)


@triton.jit
def _normalised_gate(d, s, layer, k: tl.constexpr, mean, inverse, row, exists, column, inside):
    at = column + k * s.D
    return _normalised(
        _load(d.tape, row, s.tape, at + layer.tape, exists[:, None] & inside[None, :]), layer, mean, inverse
    )


@triton.jit
def _normed_gate(d, s, layer, k: tl.constexpr, mean, inverse, row, exists, column, inside):
    n = _normalised_gate(d, s, layer, k, mean, inverse, row, exists, column, inside)
    return _affine(n, layer, column + k * s.D, inside)


@triton.jit
def _kept_gate(d, s, k: tl.constexpr, row, exists, column, inside):
    return _load(d.tape, row, s.tape, column + s.gates + k * s.D, exists[:, None] & inside[None, :])


@triton.jit
def _keep_gate(d, s, k: tl.constexpr, value, row, exists, column, inside):
    if s.taped:
        _store(d.tape, row, s.tape, column + s.gates + k * s.D, exists[:, None] & inside[None, :], value)


@triton.jit
def update(w, l, d, s, t, T, tile, B, i):
    """The new state: what is left of it in layernorm_gru, or gates and all."""
    sequence, exists, row = _rows_of(t, tile, B, s)
    kept = _kept_row(s, row, sequence)
    column, inside, _, block = _tile(i, s.D, s.blocks, s.COLUMNS)
    previous = d.previous + (t % 2) * B * s.D
    h = _load(previous, sequence, s.D, column, exists[:, None] & inside[None, :])
    if s.cell == LAYER_NORM_GRU:
        mean, inverse = _moments(d, s, l.gates, kept, B, sequence, exists, i == 0)
        reset = _normed_gate(d, s, l.gates, 0, mean, inverse, kept, exists, column, inside)
        candidate = _normed_gate(d, s, l.gates, 1, mean, inverse, kept, exists, column, inside)
        update = _normed_gate(d, s, l.gates, 2, mean, inverse, kept, exists, column, inside)
        h = _gru_update(reset, candidate, update, h)
    elif s.cell == GRU:
        mean, inverse = _moments(d, s, l.stoch, kept, B, sequence, exists, i == 0)
        reset = _gru_gate(w, l, d, s, 0, mean, inverse, previous, kept, sequence, exists, column, inside)
        update = _gru_gate(w, l, d, s, 1, mean, inverse, previous, kept, sequence, exists, column, inside)
        new = _gru_input(w, l, d, s, 2, mean, inverse, kept, exists, column, inside)
        hidden = _gru_hidden(w, s, 2, previous, sequence, exists, column, inside)
        new += _sigmoid(reset) * hidden
        _keep_gate(d, s, 0, reset, kept, exists, column, inside)
        _keep_gate(d, s, 1, update, kept, exists, column, inside)
        _keep_gate(d, s, 2, new, kept, exists, column, inside)
        _keep_gate(d, s, 3, hidden, kept, exists, column, inside)
        new = _tanh(new)
        h = new + _sigmoid(update) * (h - new)
    else:
        mean, inverse = _moments(d, s, l.mix, kept, B, sequence, exists, i == 0)
        reset = _block_gate(w, l, d, s, 0, mean, inverse, block, kept, exists, column, inside)
        candidate = _block_gate(w, l, d, s, 1, mean, inverse, block, kept, exists, column, inside)
        update = _block_gate(w, l, d, s, 2, mean, inverse, block, kept, exists, column, inside)
        _keep_gate(d, s, 0, reset, kept, exists, column, inside)
        _keep_gate(d, s, 1, candidate, kept, exists, column, inside)
        _keep_gate(d, s, 2, update, kept, exists, column, inside)
        h = _gru_update(reset, candidate, update, h)
    _put_deter(d, s, h, t, T, B, row, sequence, exists, column, inside)


@triton.jit
def _gru_input(w, l, d, s, k: tl.constexpr, mean, inverse, kept, exists, column, inside):
    acc = tl.zeros((s.ROWS, s.COLUMNS), tl.float32)
    acc = _bias(acc, w.gates_bias + k * s.D, column, inside)
    weight = w.gates + k * s.D * s.U
    return _product_of_layer(acc, d, s, l.stoch, mean, inverse, 0, s.U, kept, exists, weight, 1, column, inside, s.U)


@triton.jit
def _gru_hidden(w, s, k: tl.constexpr, previous, sequence, exists, column, inside):
    acc = tl.zeros((s.ROWS, s.COLUMNS), tl.float32)
    acc = _bias(acc, w.hidden_bias + k * s.D, column, inside)
    weight = w.hidden_gates + k * s.D * s.D
    return _product(acc, s, previous, sequence, s.D, exists, s.D, weight, 1, column, inside, s.D)


@triton.jit
def _gru_gate(w, l, d, s, k: tl.constexpr, mean, inverse, previous, kept, sequence, exists, column, inside):
    return _gru_input(w, l, d, s, k, mean, inverse, kept, exists, column, inside) + _gru_hidden(
        w, s, k, previous, sequence, exists, column, inside
    )


@triton.jit
def _block_gate(w, l, d, s, k: tl.constexpr, mean, inverse, block, kept, exists, column, inside):
    """Gates lie per block: (G, 3, D/G), their weights (G, D/G, 3·D/G) with the inputs first."""
    size: tl.constexpr = s.D // s.blocks
    at = (2 * block + k) * size + column
    acc = tl.zeros((s.ROWS, s.COLUMNS), tl.float32)
    acc = _bias(acc, w.gates_bias, at, inside)
    weight = w.gates + block * size * 3 * size + k * size
    return _product_of_layer(
        acc, d, s, l.mix, mean, inverse, block * size, size, kept, exists, weight, 3 * size, column - block * size,
        inside, 1,
    )  # fmt: skip


@triton.jit
def prior_layer(weight, width: tl.constexpr, layer, d, s, t, tile, B, i):
    """The first layer of the posterior or prior, from `width` inputs, the first of which are h."""
    sequence, exists, row = _rows_of(t, tile, B, s)
    kept = _kept_row(s, row, sequence)
    column, inside, count, _ = _tile(i, layer.size, 1, s.COLUMNS)
    acc = _bias(tl.zeros((s.ROWS, s.COLUMNS), tl.float32), layer.bias, column, inside)
    if d.embeds is not None:
        acc += _load(d.embeds, row, layer.size, column, exists[:, None] & inside[None, :])
    acc = _product(acc, s, d.deter, row, s.D, exists, s.D, weight, 1, column, inside, width)
    _enter(d, s, layer, i, acc, kept, B, sequence, exists, column, inside, count)


@triton.jit
def next_layer(weight, layer, before, d, s, t, tile, B, i):
    """Of a prior or policy, from the one before."""
    sequence, exists, row = _rows_of(t, tile, B, s)
    kept = _kept_row(s, row, sequence)
    column, inside, count, _ = _tile(i, layer.size, 1, s.COLUMNS)
    acc = _bias(tl.zeros((s.ROWS, s.COLUMNS), tl.float32), layer.bias, column, inside)
    mean, inverse = _moments(d, s, before, kept, B, sequence, exists, i == 0)
    acc = _product_of_layer(
        acc, d, s, before, mean, inverse, 0, before.size, kept, exists, weight, 1, column, inside, before.size
    )
    _enter(d, s, layer, i, acc, kept, B, sequence, exists, column, inside, count)


@triton.jit
def _statistics(
    w, l, d, s, mean, inverse, row, kept, exists, column, inside, COLUMNS: tl.constexpr, size: tl.constexpr
):
    acc = _bias(tl.zeros((s.ROWS, COLUMNS), tl.float32), w.out_bias, column, inside)
    V: tl.constexpr = l.head.size
    acc = _product_of_layer(acc, d, s, l.head, mean, inverse, 0, V, kept, exists, w.out, 1, column, inside, V)
    _store(d.statistics, row, size, column, exists[:, None] & inside[None, :], acc)
    return acc


@triton.jit
def sample(w, l, d, s, t, T, tile, B, i):
    """The statistics, and z."""
    sequence, exists, row = _rows_of(t, tile, B, s)
    kept = _kept_row(s, row, sequence)
    mean, inverse = _moments(d, s, l.head, kept, B, sequence, exists, i == 0)
    if s.classes == 0:
        column, inside, _, _ = _tile(i, s.stoch, 1, s.COLUMNS)
        both = exists[:, None] & inside[None, :]
        z = _statistics(w, l, d, s, mean, inverse, row, kept, exists, column, inside, s.COLUMNS, 2 * s.stoch)
        raw = _statistics(
            w, l, d, s, mean, inverse, row, kept, exists, column + s.stoch, inside, s.COLUMNS, 2 * s.stoch
        )
        std = _softplus(raw) + s.min_std
        z += std * _load(d.noise, row, s.stoch, column, both)
        _store(d.stoch, row, s.stoch, column, both, z)
        if d.is_first is not None:
            resets = _resets(d.is_first, row + B, exists & (t + 1 < T))
            z = tl.where(resets[:, None], _vector(d.stoch_start, column, inside)[None, :], z)
        _store(d.stoch_first, sequence, s.stoch, column, both, z)
    else:
        i = opaque(i)
        lane = tl.arange(0, s.VARIABLES * s.CLASSES)
        variable = i * s.VARIABLES + lane // s.CLASSES
        column = variable * s.classes + lane % s.CLASSES
        is_class = lane % s.CLASSES < s.classes
        inside = is_class & (variable < s.stoch)
        Z: tl.constexpr = s.stoch * s.classes
        logits = _statistics(w, l, d, s, mean, inverse, row, kept, exists, column, inside, s.VARIABLES * s.CLASSES, Z)
        logits = tl.where(is_class[None, :], logits, float("-inf"))
        p = _softmax(logits, s)
        p = p * (1 - s.unimix) + s.unimix / s.classes
        if s.cumulative:
            at = i * s.VARIABLES + tl.arange(0, s.VARIABLES)
            level = _load(d.noise, row, s.stoch, at, exists[:, None] & (at < s.stoch)[None, :])
            passed = tl.where(level[:, :, None] > tl.cumsum(p, 2), 1, 0)
            index = tl.minimum(tl.sum(passed, 2), s.classes - 1)
        else:
            time = tl.load(
                d.noise + row[:, None] * Z + column[None, :], mask=exists[:, None] & inside[None, :], other=1.0
            ).to(tl.float32)
            time = tl.reshape(tl.where(is_class[None, :], time, float("inf")), p.shape)
            index = tl.minimum(tl.argmin(time / p, 2), s.classes - 1)  # NaN must not lead beyond the table
        chosen = tl.arange(0, s.CLASSES)[None, None, :] == index[:, :, None]
        onehot = tl.reshape(tl.where(chosen, 1.0, 0.0), logits.shape)
        _store(d.stoch, row, Z, column, exists[:, None] & inside[None, :], onehot)
        variable = i * s.VARIABLES + tl.arange(0, s.VARIABLES)
        _store(d.index, row, s.stoch, variable, exists[:, None] & (variable < s.stoch)[None, :], index)


@triton.jit
def _softmax(logits, s):
    """(ROWS, VARIABLES · CLASSES) to (ROWS, VARIABLES, CLASSES)."""
    logits = tl.reshape(logits, (s.ROWS, s.VARIABLES, s.CLASSES))
    e = tl.exp(logits - tl.max(logits, 2)[:, :, None])
    return e / tl.sum(e, 2)[:, :, None]


@triton.jit
def policy_layer(p, layer, d, s, t, tile, B, i):
    """Its first layer, of the state before the step."""
    sequence, exists, row = _rows_of(t, tile, B, s)
    kept = _kept_row(s, row, sequence)
    column, inside, count, _ = _tile(i, layer.size, 1, s.COLUMNS)
    width: tl.constexpr = s.D + s.stoch * (s.classes if s.classes > 0 else 1)
    acc = _bias(tl.zeros((s.ROWS, s.COLUMNS), tl.float32), layer.bias, column, inside)
    previous = d.previous + (t % 2) * B * s.D
    acc = _product(acc, s, previous, sequence, s.D, exists, s.D, p.weights[0], 1, column, inside, width)
    if s.classes > 0:
        acc = _picked(acc, p.stoch, p.stoch_first, None, d, s, layer.size, t, row, B, sequence, exists, column, inside)
    else:
        weight = p.weights[0] + s.D
        acc = _product(acc, s, d.stoch_first, sequence, s.stoch, exists, s.stoch, weight, 1, column, inside, width)
    _enter(d, s, layer, i, acc, kept, B, sequence, exists, column, inside, count)


@triton.jit
def _action_statistics(p, d, s, layer, start: tl.constexpr, mean, inverse, kept, exists, column, inside):
    acc = _bias(tl.zeros((s.ROWS, p.LANES), tl.float32), p.out_bias + start, column, inside)
    weight = p.out + start * layer.size
    return _product_of_layer(
        acc, d, s, layer, mean, inverse, 0, layer.size, kept, exists, weight, 1, column, inside, layer.size
    )


@triton.jit
def _shares(logits, inside):
    """The softmax of those that are inside."""
    logits = tl.where(inside[None, :], logits, float("-inf"))
    e = tl.exp(logits - tl.max(logits, 1)[:, None])
    return e / tl.sum(e, 1)[:, None]


@triton.jit
def _wide_normal(mean, raw):
    """Of a tanh_normal: a fifth of the mean, the deviation, and its slope."""
    raw += 4.993239250550511  # softplus⁻¹(5)
    return _tanh(mean / 5), _softplus(raw) + 1e-4, _sigmoid(raw)


@triton.jit
def draw(p, layer, d, s, t, tile, B):
    """The action: to the result, and as its layer reads it."""
    sequence, exists, row = _rows_of(t, tile, B, s)
    kept = _kept_row(s, row, sequence)
    mean, inverse = _moments(d, s, layer, kept, B, sequence, exists, True)
    column = opaque(0) + tl.arange(0, p.LANES)
    inside = column < s.A
    both = exists[:, None] & inside[None, :]
    first = _action_statistics(p, d, s, layer, 0, mean, inverse, kept, exists, column, inside)
    if p.dist == CATEGORICAL:
        share = _shares(first, inside) * (1 - p.unimix) + p.unimix / s.A
        time = tl.where(inside[None, :], _load(p.noise, row, s.A, column, both), float("inf"))
        action = tl.where(column[None, :] == tl.argmin(time / share, 1)[:, None], 1.0, 0.0)
    else:
        raw = _action_statistics(p, d, s, layer, s.A, mean, inverse, kept, exists, column, inside)
        if p.dist == BOUNDED_NORMAL:
            center = _tanh(first)
            std = (p.max_std - p.min_std) * _sigmoid(raw + 2) + p.min_std
        else:
            center, std, _ = _wide_normal(first, raw)
            center *= 5
        action = center + std * _load(p.noise, row, s.A, column, both)
        if p.dist == TANH_NORMAL:
            action = _tanh(action)
    _store(p.action, row, s.A, column, both, action)
    if p.clip:
        _store(d.action, row, s.A, column, both, action / tl.maximum(tl.abs(action), 1.0))


# ---------------------------------------------------------------------------------------------------------------------
# Backward.


@triton.jit
def _stoch_gradient(acc, w, l, g, s, policy, t, T, row, B, sequence, exists, column, inside):
    """The gradient of z, which the next step read where it was not reset."""
    tiles: tl.constexpr = (s.U + s.COLUMNS - 1) // s.COLUMNS
    Z: tl.constexpr = s.stoch * s.classes if s.classes > 0 else s.stoch
    k_stride: tl.constexpr = 1 if s.classes > 0 else Z  # that of categorical latents is transposed
    n_stride: tl.constexpr = s.U if s.classes > 0 else 1
    if t + 1 < T:
        acc = _product_of_gradient(
            acc, g, s, l.stoch, tiles, g.in_rows, s.in_row, 0, 0, s.U, row + B, B, sequence, exists, w.in_stoch,
            k_stride, column, inside, n_stride,
        )  # fmt: skip
        if policy is not None and not policy.detach:
            weight = policy.stoch if s.classes > 0 else policy.weights[0] + s.D
            size: tl.constexpr = policy.layers[0].size
            acc = _product_of_all_gradient(
                acc, g, s, policy.layers[0], g.policy_rows[0], row + B, B, sequence, exists, weight,
                1 if s.classes > 0 else s.D + Z, column, inside, size if s.classes > 0 else 1,
            )  # fmt: skip
        acc = tl.where(_resets(g.is_first, row + B, exists)[:, None], 0.0, acc)
    if g.stoch is not None:
        acc += _load(g.stoch, row, Z, column, exists[:, None] & inside[None, :])
    return acc


@triton.jit
def _put_statistics(g, s, value, row, size: tl.constexpr, column, both):
    if g.statistics is not None:
        value += _load(g.statistics, row, size, column, both)
    _store(g.statistics_rows, row, size, column, both, value)


@triton.jit
def statistics_back(w, l, g, s, policy, t, T, tile, B, i):
    """Through the sample to the statistics. Of the categorical, p is computed again."""
    sequence, exists, row = _rows_of(t, tile, B, s)
    if s.classes == 0:
        column, inside, _, _ = _tile(i, s.stoch, 1, s.COLUMNS)
        both = exists[:, None] & inside[None, :]
        acc = tl.zeros((s.ROWS, s.COLUMNS), tl.float32)
        acc = _stoch_gradient(acc, w, l, g, s, policy, t, T, row, B, sequence, exists, column, inside)
        raw = _load(g.given, row, 2 * s.stoch, column + s.stoch, both)
        of_raw = acc * _load(g.noise, row, s.stoch, column, both) * _sigmoid(raw)
        _put_statistics(g, s, acc, row, 2 * s.stoch, column, both)
        _put_statistics(g, s, of_raw, row, 2 * s.stoch, column + s.stoch, both)
    else:
        i = opaque(i)
        lane = tl.arange(0, s.VARIABLES * s.CLASSES)
        variable = i * s.VARIABLES + lane // s.CLASSES
        column = variable * s.classes + lane % s.CLASSES
        is_class = lane % s.CLASSES < s.classes
        inside = is_class & (variable < s.stoch)
        both = exists[:, None] & inside[None, :]
        Z: tl.constexpr = s.stoch * s.classes
        acc = tl.zeros((s.ROWS, s.VARIABLES * s.CLASSES), tl.float32)
        acc = _stoch_gradient(acc, w, l, g, s, policy, t, T, row, B, sequence, exists, column, inside)
        logits = tl.where(is_class[None, :], _load(g.given, row, Z, column, both), float("-inf"))
        p = _softmax(logits, s)
        acc = tl.reshape(acc, p.shape)
        if g.noise is not None:  # to the gradient of what was mixed, from that of its Gumbel-softmax
            time = tl.load(g.noise + row[:, None] * Z + column[None, :], mask=both, other=1.0)
            time = tl.reshape(tl.where(is_class[None, :], time, float("inf")), p.shape)
            ratio = (p * (1 - s.unimix) + s.unimix / s.classes) / time
            total = tl.maximum(tl.sum(ratio, 2), 1.1754944e-38)[:, :, None]
            acc = (acc - tl.sum(acc * ratio, 2)[:, :, None] / total) / (time * total)
        acc = p * (acc - tl.sum(acc * p, 2)[:, :, None]) * (1 - s.unimix)
        _put_statistics(g, s, tl.reshape(acc, logits.shape), row, Z, column, both)


@triton.jit
def last_layer_back(out, size: tl.constexpr, of_result, layer, rows, g, s, t, tile, B, i):
    """Of a prior or policy, from the gradient (T·B, size) of what it ends in."""
    sequence, exists, row = _rows_of(t, tile, B, s)
    column, inside, count, _ = _tile(i, layer.size, 1, s.COLUMNS)
    acc = tl.zeros((s.ROWS, s.COLUMNS), tl.float32)
    acc = _product(acc, s, of_result, row, size, exists, size, out, layer.size, column, inside, 1)
    _enter_backward(g, s, layer, i, acc, rows, layer.size, 0, row, B, sequence, exists, column, inside, count)


@triton.jit
def layer_back(weight, after, after_rows, layer, rows, g, s, t, tile, B, i):
    """Of a prior or policy, from the one after it."""
    sequence, exists, row = _rows_of(t, tile, B, s)
    column, inside, count, _ = _tile(i, layer.size, 1, s.COLUMNS)
    acc = tl.zeros((s.ROWS, s.COLUMNS), tl.float32)
    acc = _product_of_all_gradient(
        acc, g, s, after, after_rows, row, B, sequence, exists, weight, layer.size, column, inside, 1
    )
    _enter_backward(g, s, layer, i, acc, rows, layer.size, 0, row, B, sequence, exists, column, inside, count)


@triton.jit
def update_back(w, l, g, s, prior, policy, t, T, tile, B, i):
    """Into the gates, and past them to the state before, which is the carry."""
    sequence, exists, row = _rows_of(t, tile, B, s)
    column, inside, _, block = _tile(i, s.D, s.blocks, s.COLUMNS)
    both = exists[:, None] & inside[None, :]
    acc = _load(g.carry, sequence, s.D, column, both)
    if g.deter is not None:
        acc += _load(g.deter, row, s.D, column, both)
    acc = _product_of_all_gradient(
        acc, g, s, prior.layers[0], g.prior_rows[0], row, B, sequence, exists, prior.weights[0], s.head_row, column,
        inside, 1,
    )  # fmt: skip
    if policy is not None and not policy.detach:  # which acted on this state at the next step  # noqa: SIM102
        if t + 1 < T:
            width: tl.constexpr = s.D + s.stoch * (s.classes if s.classes > 0 else 1)
            acc = _product_of_all_gradient(
                acc, g, s, policy.layers[0], g.policy_rows[0], row + B, B, sequence, exists, policy.weights[0], width,
                column, inside, 1,
            )  # fmt: skip
    before = _load(g.before, row, s.D, column, both)
    if s.cell == GRU:
        r = _sigmoid(_kept_gate(g, s, 0, row, exists, column, inside))
        u = _sigmoid(_kept_gate(g, s, 1, row, exists, column, inside))
        n = _tanh(_kept_gate(g, s, 2, row, exists, column, inside))
        hidden = _kept_gate(g, s, 3, row, exists, column, inside)
        inner = acc * (1 - u) * (1 - n * n)
        _store(g.gate_rows, row, 4 * s.D, column, both, inner * hidden * r * (1 - r))
        _store(g.gate_rows, row, 4 * s.D, column + s.D, both, acc * (before - n) * u * (1 - u))
        _store(g.gate_rows, row, 4 * s.D, column + 2 * s.D, both, inner)
        _store(g.gate_rows, row, 4 * s.D, column + 3 * s.D, both, inner * r)
        acc *= u
    else:
        mean, inverse = tl.zeros((s.ROWS,), tl.float32), tl.zeros((s.ROWS,), tl.float32)
        if s.cell == LAYER_NORM_GRU:
            mean, inverse = _kept_moments(g, s, l.gates, row, exists)
            reset = _normed_gate(g, s, l.gates, 0, mean, inverse, row, exists, column, inside)
            candidate = _normed_gate(g, s, l.gates, 1, mean, inverse, row, exists, column, inside)
            update = _normed_gate(g, s, l.gates, 2, mean, inverse, row, exists, column, inside)
        else:
            reset = _kept_gate(g, s, 0, row, exists, column, inside)
            candidate = _kept_gate(g, s, 1, row, exists, column, inside)
            update = _kept_gate(g, s, 2, row, exists, column, inside)
        r, u = _sigmoid(reset), _sigmoid(update - 1)
        c = _tanh(r * candidate)
        inner = acc * u * (1 - c * c)
        of_reset, of_candidate = inner * candidate * r * (1 - r), inner * r
        of_update = acc * (c - before) * u * (1 - u)
        # block_gru's gates lie per block.
        size: tl.constexpr = s.D // s.blocks
        start = 2 * block * size + column
        _store(g.gate_rows, row, 3 * s.D, start, both, of_reset)
        _store(g.gate_rows, row, 3 * s.D, start + size, both, of_candidate)
        _store(g.gate_rows, row, 3 * s.D, start + 2 * size, both, of_update)
        if s.cell == LAYER_NORM_GRU:
            total, along = tl.zeros((s.ROWS,), tl.float32), tl.zeros((s.ROWS,), tl.float32)
            for k in tl.static_range(3):
                value = of_reset if k == 0 else (of_candidate if k == 1 else of_update)
                value = value * _vector(l.gates.gain, column + k * s.D, inside)[None, :]
                value = tl.where(both, value, 0.0)
                total += tl.sum(value, 1)
                along += tl.sum(
                    value * _normalised_gate(g, s, l.gates, k, mean, inverse, row, exists, column, inside), 1
                )
            _keep_sums(g.sums + B * l.gates.sums, i, B, sequence, exists, total, along)
        acc *= 1 - u
    _store(g.carry, sequence, s.D, column, both, acc)


@triton.jit
def mix_back(w, l, g, s, t, tile, B, i):
    sequence, exists, row = _rows_of(t, tile, B, s)
    column, inside, count, block = _tile(i, s.D, s.blocks, s.COLUMNS)
    size: tl.constexpr = s.D // s.blocks
    acc = tl.zeros((s.ROWS, s.COLUMNS), tl.float32)
    weight = w.gates + block * size * 3 * size
    rows, local = g.gate_rows + block * 3 * size, column - block * size
    acc = _product(acc, s, rows, row, 3 * s.D, exists, 3 * size, weight, 1, local, inside, 3 * size)
    _enter_backward(g, s, l.mix, i, acc, g.mix_rows, s.D, 0, row, B, sequence, exists, column, inside, count)


@triton.jit
def _from_gates(acc, w, l, g, s, weight, k_stride, row, B, sequence, exists, column, inside):
    """What flows out of the gates of gru and layernorm_gru, or the mix of block_gru, into one side of a weight."""
    if s.cell == GRU:
        acc = _product(acc, s, g.gate_rows, row, 4 * s.D, exists, 3 * s.D, weight, k_stride, column, inside, 1)
    elif s.cell == LAYER_NORM_GRU:
        tiles: tl.constexpr = (s.D + s.COLUMNS - 1) // s.COLUMNS
        acc = _product_of_gradient(
            acc, g, s, l.gates, tiles, g.gate_rows, 3 * s.D, 0, 0, 3 * s.D, row, B, sequence, exists, weight, k_stride,
            column, inside, 1,
        )  # fmt: skip
    else:
        each: tl.constexpr = s.D // s.blocks
        tiles: tl.constexpr = (each + s.COLUMNS - 1) // s.COLUMNS * s.blocks
        acc = _product_of_gradient(
            acc, g, s, l.mix, tiles, g.mix_rows, s.D, 0, 0, s.D, row, B, sequence, exists, weight, k_stride, column,
            inside, 1,
        )  # fmt: skip
    return acc


@triton.jit
def inputs_back(w, l, g, s, t, tile, B, i):
    """Into the layers of z, h and the action."""
    i = tl.cast(i, tl.int32)
    sequence, exists, row = _rows_of(t, tile, B, s)
    tiles: tl.constexpr = (s.U + s.COLUMNS - 1) // s.COLUMNS
    column, inside, count, _ = _tile(i % tiles, s.U, 1, s.COLUMNS)
    acc = tl.zeros((s.ROWS, s.COLUMNS), tl.float32)
    if s.cell == BLOCK_GRU:
        part = i // tiles
        weight = w.mix_inputs + (1 - part + part // 2 * 3) * s.U  # its columns are those of h, z and the action
        acc = _from_gates(acc, w, l, g, s, weight, 3 * s.U, row, B, sequence, exists, column, inside)
        if part == 0:
            _enter_backward(
                g, s, l.stoch, i, acc, g.in_rows, s.in_row, 0, row, B, sequence, exists, column, inside, count
            )
        elif part == 1:
            _enter_backward(
                g, s, l.deter, i - tiles, acc, g.in_rows, s.in_row, s.U, row, B, sequence, exists, column, inside,
                count,
            )  # fmt: skip
        else:
            if s.A > 0:
                _enter_backward(
                    g, s, l.action, i - 2 * tiles, acc, g.in_rows, s.in_row, 2 * s.U, row, B, sequence, exists, column,
                    inside, count,
                )  # fmt: skip
    else:
        k_stride: tl.constexpr = s.U + s.D if s.cell == LAYER_NORM_GRU else s.U
        acc = _from_gates(acc, w, l, g, s, w.gates, k_stride, row, B, sequence, exists, column, inside)
        _enter_backward(g, s, l.stoch, i, acc, g.in_rows, s.U, 0, row, B, sequence, exists, column, inside, count)


@triton.jit
def carry_back(w, l, g, s, t, tile, B, i):
    """What the gates, or the mix, bring to the state before."""
    sequence, exists, row = _rows_of(t, tile, B, s)
    column, inside, _, block = _tile(i, s.D, s.blocks, s.COLUMNS)
    acc = _load(g.carry, sequence, s.D, column, exists[:, None] & inside[None, :])
    if s.cell == GRU:
        acc = _product(acc, s, g.gate_rows, row, 4 * s.D, exists, 2 * s.D, w.hidden_gates, s.D, column, inside, 1)
        weight = w.hidden_gates + 2 * s.D * s.D
        acc = _product(acc, s, g.gate_rows + 3 * s.D, row, 4 * s.D, exists, s.D, weight, s.D, column, inside, 1)
    elif s.cell == LAYER_NORM_GRU:
        acc = _from_gates(acc, w, l, g, s, w.gates + s.U, s.U + s.D, row, B, sequence, exists, column, inside)
    else:
        size: tl.constexpr = s.D // s.blocks
        tiles: tl.constexpr = (size + s.COLUMNS - 1) // s.COLUMNS * s.blocks
        weight = w.mix_deter + block * size * size
        acc = _product_of_gradient(
            acc, g, s, l.mix, tiles, g.mix_rows, s.D, 0, block * size, size, row, B, sequence, exists, weight, 1,
            column - block * size, inside, size,
        )  # fmt: skip
    _put_carry(g, s, acc, row, sequence, exists, column, inside, s.cell != BLOCK_GRU)


@triton.jit
def deter_back(w, l, g, s, t, tile, B, i):
    """block_gru: what the layer of h brings to the state before."""
    sequence, exists, row = _rows_of(t, tile, B, s)
    column, inside, _, _ = _tile(i, s.D, s.blocks, s.COLUMNS)
    acc = _load(g.carry, sequence, s.D, column, exists[:, None] & inside[None, :])
    tiles: tl.constexpr = (s.U + s.COLUMNS - 1) // s.COLUMNS
    acc = _product_of_gradient(
        acc, g, s, l.deter, tiles, g.in_rows, s.in_row, s.U, 0, s.U, row, B, sequence, exists, w.in_deter, s.D, column,
        inside, 1,
    )  # fmt: skip
    _put_carry(g, s, acc, row, sequence, exists, column, inside, True)


@triton.jit
def _put_carry(g, s, value, row, sequence, exists, column, inside, LAST: tl.constexpr):
    """The last that adds to the carry stops it where it came from a reset."""
    both = exists[:, None] & inside[None, :]
    if LAST and g.is_first is not None:
        resets = _resets(g.is_first, row, exists)[:, None]
        initial = _load(g.initial, sequence, s.D, column, both)
        _store(g.initial, sequence, s.D, column, both, initial + tl.where(resets, value, 0.0))
        value = tl.where(resets, 0.0, value)
    _store(g.carry, sequence, s.D, column, both, value)


@triton.jit
def draw_back(p, layer, w, l, g, s, t, tile, B):
    """Through the action to the policy's statistics, which are computed again."""
    sequence, exists, row = _rows_of(t, tile, B, s)
    column = opaque(0) + tl.arange(0, p.LANES)
    inside = column < s.A
    both = exists[:, None] & inside[None, :]
    tiles: tl.constexpr = (s.U + s.COLUMNS - 1) // s.COLUMNS
    acc = tl.zeros((s.ROWS, p.LANES), tl.float32)
    if s.cell == BLOCK_GRU:
        acc = _product_of_gradient(
            acc, g, s, l.action, tiles, g.in_rows, s.in_row, 2 * s.U, 0, s.U, row, B, sequence, exists, w.in_action,
            s.A, column, inside, 1,
        )  # fmt: skip
    else:
        acc = _product_of_gradient(
            acc, g, s, l.stoch, tiles, g.in_rows, s.in_row, 0, 0, s.U, row, B, sequence, exists, w.in_action, s.A,
            column, inside, 1,
        )  # fmt: skip
    if p.clip:
        acc /= tl.maximum(tl.abs(_load(p.action, row, s.A, column, both)), 1.0)
    if g.action is not None:
        acc += _load(g.action, row, s.A, column, both)
    mean, inverse = _kept_moments(g, s, layer, row, exists)
    first = _action_statistics(p, g, s, layer, 0, mean, inverse, row, exists, column, inside)
    if p.dist == CATEGORICAL:
        share = _shares(first, inside)
        acc = share * (acc - tl.sum(acc * share, 1)[:, None]) * (1 - p.unimix)
        _store(g.action_rows, row, s.A, column, both, acc)
    else:
        raw = _action_statistics(p, g, s, layer, s.A, mean, inverse, row, exists, column, inside)
        noise = _load(p.noise, row, s.A, column, both)
        if p.dist == BOUNDED_NORMAL:
            center, slope = _tanh(first), _sigmoid(raw + 2)
            of_center = acc * (1 - center * center)
            of_raw = acc * noise * (p.max_std - p.min_std) * slope * (1 - slope)
        else:
            center, std, slope = _wide_normal(first, raw)
            action = _tanh(5 * center + std * noise)
            acc *= 1 - action * action
            of_center, of_raw = acc * (1 - center * center), acc * noise * slope
        _store(g.action_rows, row, 2 * s.A, column, both, of_center)
        _store(g.action_rows, row, 2 * s.A, column + s.A, both, of_raw)
