"""Two-hot loss and mean for CUDA devices (contracts and references: phyxdream/ops/two_hot_loss.py).

A program takes a tile of whole rows, so that maximum and sum of a row are reductions in registers. Backward computes
the exponentials again: the logits must be read anyhow. All arithmetic is float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from phyxdream.kernels.rows import flat, memory_order, written

TILE = 1024  # elements per tile where rows are short enough for several: 1024 rows of 255 occupy a large GPU
MOST_ROWS = 8  # per tile, which keeps the backward's addresses in registers


@triton.jit
def _at(pointer, row, column, stride_row, stride_column):
    # 64-bit: strides may lead beyond 2^31 elements.
    return pointer + row.to(tl.int64)[:, None] * stride_row + column.to(tl.int64)[None, :] * stride_column


@triton.jit
def _per_row(pointer, row, rows, stride):
    return tl.load(pointer + row.to(tl.int64) * stride, mask=row < rows, other=0.0).to(tl.float32)


@triton.jit
def _exponentials(x, row, column, rows, size, stride_row, stride_column):
    """e^(x - max), 0 outside, and the maximum and sum of every row."""
    inside = (row < rows)[:, None] & (column < size)[None, :]
    v = tl.load(_at(x, row, column, stride_row, stride_column), mask=inside, other=-float("inf")).to(tl.float32)
    v = tl.where((row < rows)[:, None], v, 0.0)  # rows that are not there must not give NaN
    top = tl.max(v, 1)
    e = tl.exp(v - top[:, None])
    return e, top, tl.sum(e, 1)


@triton.jit
def _two_hot(target, bins, row, rows, size, stride, COLUMNS: tl.constexpr):
    """Index of the bin below the target, and the weight of the one above it."""
    t = _per_row(target, row, rows, stride)
    column = tl.arange(0, COLUMNS)
    b = tl.load(bins + column, mask=column < size, other=float("inf"))
    # As searchsorted: NaN is above all. It must not be cut off below either.
    above = tl.sum((~(b[None, :] >= t[:, None]) & (column < size)[None, :]).to(tl.int32), 1)
    above = tl.minimum(tl.maximum(above, 1), size - 1)
    low = tl.load(bins + above - 1)
    weight = (t - low) / (tl.load(bins + above) - low)
    weight = tl.where(weight < 0.0, 0.0, weight)
    return above - 1, tl.where(weight > 1.0, 1.0, weight)


@triton.jit
def loss_forward_kernel(
    loss, x, target, bins, rows, size, x_row, x_column, target_row, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    _, top, total = _exponentials(x, row, tl.arange(0, COLUMNS), rows, size, x_row, x_column)
    below, weight = _two_hot(target, bins, row, rows, size, target_row, COLUMNS)
    chosen = x + row.to(tl.int64) * x_row + below.to(tl.int64) * x_column
    low = tl.load(chosen, mask=row < rows, other=0.0).to(tl.float32)
    high = tl.load(chosen + x_column, mask=row < rows, other=0.0).to(tl.float32)
    log_total = tl.log(total)
    y = (1 - weight) * (log_total + (top - low)) + weight * (log_total + (top - high))
    tl.store(loss + row, y, mask=row < rows)


@triton.jit
def loss_backward_kernel(
    grad_x, grad, x, target, bins, rows, size, gx_row, gx_column, grad_row, x_row, x_column, target_row,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    e, _, total = _exponentials(x, row, column, rows, size, x_row, x_column)
    below, weight = _two_hot(target, bins, row, rows, size, target_row, COLUMNS)
    from_below = column[None, :] - below[:, None]
    two_hot = tl.where(from_below == 0, 1 - weight[:, None], tl.where(from_below == 1, weight[:, None], 0.0))
    g = _per_row(grad, row, rows, grad_row)[:, None] * (e / total[:, None] - two_hot)
    inside = (row < rows)[:, None] & (column < size)[None, :]
    tl.store(_at(grad_x, row, column, gx_row, gx_column), g.to(grad_x.dtype.element_ty), mask=inside)


@triton.jit
def mean_forward_kernel(
    mean, x, bins, rows, size, x_row, x_column, ROWS: tl.constexpr, COLUMNS: tl.constexpr, HALF: tl.constexpr
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    _, top, total = _exponentials(x, row, tl.arange(0, COLUMNS), rows, size, x_row, x_column)
    # Pairs from the centre; the middle one of an odd number of bins has no partner and comes by itself.
    half = size // 2
    i = tl.arange(0, HALF)
    inside = (row < rows)[:, None] & (i < half)[None, :]
    low = tl.load(_at(x, row, half - 1 - i, x_row, x_column), mask=inside, other=-float("inf")).to(tl.float32)
    high = tl.load(_at(x, row, size - half + i, x_row, x_column), mask=inside, other=-float("inf")).to(tl.float32)
    low_bin = tl.load(bins + half - 1 - i, mask=i < half, other=0.0)
    high_bin = tl.load(bins + size - half + i, mask=i < half, other=0.0)
    pairs = tl.exp(low - top[:, None]) * low_bin[None, :] + tl.exp(high - top[:, None]) * high_bin[None, :]
    odd = (row < rows) & (size % 2 == 1)
    centre = tl.load(x + row.to(tl.int64) * x_row + half.to(tl.int64) * x_column, mask=odd, other=-float("inf")).to(
        tl.float32
    )
    y = (tl.sum(pairs, 1) + tl.exp(centre - top) * tl.load(bins + half)) / total
    tl.store(mean + row, y, mask=row < rows)


@triton.jit
def mean_backward_kernel(
    grad_x, grad, x, mean, bins, rows, size, gx_row, gx_column, grad_row, x_row, x_column, mean_row,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    e, _, total = _exponentials(x, row, column, rows, size, x_row, x_column)
    b = tl.load(bins + column, mask=column < size, other=0.0)
    scale = _per_row(grad, row, rows, grad_row) / total
    g = e * scale[:, None] * (b[None, :] - _per_row(mean, row, rows, mean_row)[:, None])
    inside = (row < rows)[:, None] & (column < size)[None, :]
    tl.store(_at(grad_x, row, column, gx_row, gx_column), g.to(grad_x.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class Plan:
    """What is launched for (rows, size); a row takes `columns` lanes, the next power of two."""

    rows: int
    columns: int
    warps: int
    programs: int

    def __str__(self) -> str:
        return f"Triton, {self.programs} programs of {self.rows} rows"


def plan(rows: int, size: int) -> Plan:
    columns = triton.next_power_of_2(size)
    tile_rows = min(MOST_ROWS, max(1, TILE // columns))
    return Plan(tile_rows, columns, min(32, max(4, columns // 512)), triton.cdiv(rows, tile_rows))


def two_hot_loss_forward(logits: Tensor, target: Tensor, bins: Tensor) -> Tensor:
    return _forward(loss_forward_kernel, logits, (target,), bins)


def two_hot_mean_forward(logits: Tensor, bins: Tensor) -> Tensor:
    # A fused multiply-add would leave the rounding error of a product where -ab + ab must be 0.
    half = triton.next_power_of_2(logits.shape[-1] // 2)
    return _forward(mean_forward_kernel, logits, (), bins, HALF=half, enable_fp_fusion=False)


def two_hot_loss_backward(grad: Tensor, logits: Tensor, target: Tensor, bins: Tensor) -> Tensor:
    return _backward(loss_backward_kernel, grad, logits, target, bins)


def two_hot_mean_backward(grad: Tensor, logits: Tensor, mean: Tensor, bins: Tensor) -> Tensor:
    return _backward(mean_backward_kernel, grad, logits, mean, bins)


def _forward(kernel, logits, per_row, bins, **options):
    order = memory_order(logits)
    x, per_row = flat(logits, order), [t.permute(order).flatten() for t in per_row]
    y = torch.empty(len(x), dtype=bins.dtype, device=x.device)
    p = plan(*x.shape)
    with torch.cuda.device_of(x):
        kernel[(p.programs,)](
            y, x, *per_row, bins.contiguous(), *x.shape, *x.stride(), *[t.stride(0) for t in per_row], ROWS=p.rows,
            COLUMNS=p.columns, num_warps=p.warps, **options,
        )  # fmt: skip
    return _unpermuted(y, logits.shape[:-1], order)


def _backward(kernel, grad, logits, target_or_mean, bins):
    grad_logits = torch.empty_like(logits)
    order = memory_order(logits)
    x, gx = flat(logits, order), flat(grad_logits, order)
    grad, per_row = grad.permute(order).flatten(), target_or_mean.permute(order).flatten()
    p = plan(*x.shape)
    with torch.cuda.device_of(x):
        kernel[(p.programs,)](
            gx, grad, x, per_row, bins.contiguous(), *x.shape, *gx.stride(), grad.stride(0), *x.stride(),
            per_row.stride(0), ROWS=p.rows, COLUMNS=p.columns, num_warps=p.warps,
        )  # fmt: skip
    return written(grad_logits, gx, order)


def _unpermuted(values: Tensor, shape: torch.Size, order: list[int]) -> Tensor:
    """The contiguous (...) tensor whose values in this order of axes are `values`."""
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return values.view([shape[axis] for axis in order]).permute(inverse).contiguous()
