"""RMS norm and SiLU for CUDA devices (contract and reference: phyxdream/ops/rms_norm_silu.py).

A program takes a tile of whole rows, so that the mean is one reduction in registers. Backward, a program walks several
tiles and keeps its share of the weight's gradient in registers; the shares are summed in a fixed order afterwards. All
arithmetic is float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from phyxdream.kernels.rows import flat, memory_order, written

TILE = 4096  # elements per tile, where rows are short enough for several
PROGRAMS = 1024  # of the backward, at most: some eight per multiprocessor of the largest GPUs


@triton.jit
def _load(pointer, row, column, stride_row, stride_column, inside):
    # 64-bit: a picture batch has more than 2^31 elements soon enough.
    at = row.to(tl.int64)[:, None] * stride_row + column.to(tl.int64)[None, :] * stride_column
    return tl.load(pointer + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store(pointer, value, row, column, stride_row, stride_column, inside):
    at = row.to(tl.int64)[:, None] * stride_row + column.to(tl.int64)[None, :] * stride_column
    tl.store(pointer + at, value.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def forward_kernel(
    y, x, weight, rows, size, eps, y_row, y_column, x_row, x_column, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < size)[None, :]
    w = tl.load(weight + column, mask=column < size, other=0.0).to(tl.float32)
    v = _load(x, row, column, x_row, x_column, inside)
    r = 1 / tl.sqrt(tl.sum(v * v, 1) / size + eps)
    u = v * r[:, None] * w[None, :]
    _store(y, u * tl.sigmoid(u), row, column, y_row, y_column, inside)


@triton.jit
def backward_kernel(
    grad_x,
    shares,
    grad,
    x,
    weight,
    rows,
    size,
    eps,
    gx_row,
    gx_column,
    g_row,
    g_column,
    x_row,
    x_column,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    column = tl.arange(0, COLUMNS)
    w = tl.load(weight + column, mask=column < size, other=0.0).to(tl.float32)
    share = tl.zeros((COLUMNS,), tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = tile * ROWS + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (column < size)[None, :]
        v = _load(x, row, column, x_row, x_column, inside)
        g = _load(grad, row, column, g_row, g_column, inside)
        r = 1 / tl.sqrt(tl.sum(v * v, 1) / size + eps)
        n = v * r[:, None]
        u = n * w[None, :]
        sigma = tl.sigmoid(u)
        h = g * sigma * (1 + u * (1 - sigma))
        share += tl.sum(h * n, 0)
        t = h * w[None, :]
        along = tl.sum(t * n, 1) / size
        _store(grad_x, r[:, None] * (t - n * along[:, None]), row, column, gx_row, gx_column, inside)
    tl.store(shares + tl.program_id(0).to(tl.int64) * size + column, share, mask=column < size)


@dataclass(frozen=True)
class Plan:
    """What is launched for (rows, size); a row takes `columns` lanes, the next power of two."""

    rows: int
    columns: int
    warps: int
    programs: int
    backward_programs: int

    def __str__(self) -> str:
        return f"Triton, {self.programs} programs of {self.rows} rows, {self.backward_programs} backward"


def plan(rows: int, size: int) -> Plan:
    columns = triton.next_power_of_2(size)
    tile_rows = max(1, TILE // columns)
    tiles = triton.cdiv(rows, tile_rows)
    warps = min(32, max(4, columns // 1024))
    return Plan(tile_rows, columns, warps, tiles, min(tiles, PROGRAMS))


def forward(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    y = torch.empty_like(x)
    order = memory_order(x)
    flat_x, flat_y = flat(x, order), flat(y, order)
    rows, size = flat_x.shape
    p = plan(rows, size)
    with torch.cuda.device_of(x):
        forward_kernel[(p.programs,)](
            flat_y, flat_x, weight.contiguous(), rows, size, eps, *flat_y.stride(), *flat_x.stride(), ROWS=p.rows,
            COLUMNS=p.columns, num_warps=p.warps,
        )  # fmt: skip
    return written(y, flat_y, order)


def backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    grad_x = torch.empty_like(x)
    order = memory_order(x)
    flat_grad, flat_x, flat_grad_x = flat(grad, order), flat(x, order), flat(grad_x, order)
    rows, size = flat_x.shape
    p = plan(rows, size)
    shares = torch.empty(p.backward_programs, size, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        backward_kernel[(p.backward_programs,)](
            flat_grad_x, shares, flat_grad, flat_x, weight.contiguous(), rows, size, eps, *flat_grad_x.stride(),
            *flat_grad.stride(), *flat_x.stride(), ROWS=p.rows, COLUMNS=p.columns, num_warps=p.warps,
        )  # fmt: skip
    return written(grad_x, flat_grad_x, order), shares.sum(0).to(weight.dtype)
