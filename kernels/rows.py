"""Tensors (..., *event) as kernels see them that take whole rows: (rows, *event) in the order of their memory."""

from __future__ import annotations

from torch import Tensor


def memory_order(x: Tensor, event_axes: int = 1) -> list[int]:
    """The leading axes as rows lie in memory, so that a dense tensor of any layout is one view of rows."""
    return sorted(range(x.dim() - event_axes), key=lambda axis: -x.stride(axis))


def flat(x: Tensor, order: list[int]) -> Tensor:
    """(rows, *event): a view where the rows have one stride in this order, otherwise a copy."""
    lead = len(order)
    return x.permute([*order, *range(lead, x.dim())]).reshape(-1, *x.shape[lead:])


def written(y: Tensor, flat_y: Tensor, order: list[int]) -> Tensor:
    """`y` with what was written to its flat form, which may be a copy."""
    if flat_y.data_ptr() != y.data_ptr():
        permuted = y.permute([*order, *range(len(order), y.dim())])
        permuted.copy_(flat_y.view(permuted.shape))
    return y
