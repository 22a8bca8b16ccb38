"""The checks every op makes of its tensors before anything runs."""

from __future__ import annotations

import torch
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)
FLOATING = (torch.float32, torch.float64, *HALF)


def require_alike(**tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, if they are floating-point and share shape, dtype and device; nothing is broadcast.

    Inside an autocast region, half precision and mixed dtypes become float32, as torch does for its own sums.

    Raises:
        TypeError: an argument is not a floating-point tensor, or the dtypes differ.
        ValueError: the shapes or devices differ, or there is nothing in them.
    """
    (first_name, first), *others = tensors.items()
    if not isinstance(first, Tensor):
        raise TypeError(f"{first_name}: expected a tensor, got {type(first).__name__}")
    shape, dtype, on_cpu = first.shape, first.dtype, first.is_cpu
    if dtype not in FLOATING:
        raise TypeError(f"{first_name}: expected a floating-point tensor, got {dtype}")
    if not shape or 0 in shape:
        raise ValueError(f"{first_name}: expected a tensor (T, ...) that is not empty, got shape {tuple(shape)}")
    mixed = False
    for name, x in others:
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
        if x.dtype is not dtype:
            if x.dtype not in FLOATING:
                raise TypeError(f"{name}: expected a floating-point tensor, got {x.dtype}")
            mixed = True
        if x.shape != shape:
            raise ValueError(
                f"{name}: expected the shape of {first_name}, {tuple(shape)}, got {tuple(x.shape)} (no broadcast)"
            )
        if not (on_cpu and x.is_cpu) and x.device != first.device:  # comparing devices costs more than a flag
            raise ValueError(f"{name}: expected the device of {first_name}, {first.device}, got {x.device}")
    if (mixed or dtype in HALF) and torch.is_autocast_enabled(first.device.type):
        return tuple(x.float() for x in tensors.values())
    if mixed:
        dtypes = ", ".join(f"{name} {x.dtype}" for name, x in tensors.items())
        raise TypeError(f"{', '.join(tensors)}: expected one dtype, got {dtypes}")
    return tuple(tensors.values())
