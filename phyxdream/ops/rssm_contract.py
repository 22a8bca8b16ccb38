"""The checks that the scans of an RSSM make of their arguments before anything runs."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from phyxdream.ops.contract import FLOATING, HALF
from phyxdream.ops.rssm_cells import ACTIVATIONS, CELLS, CellWeights, HeadWeights, LayerWeights, Sizes


def check_tensors(tensors: dict[str, Tensor]) -> None:
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")


def check_shape(name: str, x: Tensor, shape: Sequence[int]) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.shape != tuple(shape):
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(x.shape)}")


def cell_name(cell: CellWeights) -> str:
    """The name of the cell whose weights these are."""
    name = next((name for name, kind in CELLS.items() if isinstance(cell, kind)), None)
    if name is None:
        kinds = ", ".join(kind.__name__ for kind in CELLS.values())
        raise TypeError(f"cell: expected one of {kinds}, got {type(cell).__name__}")
    return name


OPTIONAL = ("bias", "gain", "shift")
NEEDED = {"gates_gain", "gates_shift", "gates_bias", "input_bias", "hidden_bias", "out_bias"}


def check_weights(owner: str, weights: tuple[Tensor | None, ...], shapes: dict[str, tuple[int, ...]]) -> None:
    """Every field against its shape; biases and norms may be left out where the cell's own equations have none."""
    blocks = getattr(weights, "mix_deter", None)
    if isinstance(blocks, Tensor) and (blocks.dim() != 3 or not blocks.shape[0]):
        raise ValueError(f"cell.mix_deter: expected shape (G, D/G, D/G), got {tuple(blocks.shape)}")
    for field, x in zip(weights._fields, weights, strict=True):
        if isinstance(x, Tensor) and x.shape == shapes[field]:
            continue
        optional = (field.endswith(OPTIONAL) and field not in NEEDED) or field in weights._field_defaults
        if x is None and optional:
            if field.endswith("gain") and getattr(weights, field.removesuffix("gain") + "shift") is not None:
                raise ValueError(f"{owner}.{field}: expected a tensor beside the shift of a LayerNorm, got None")
            continue
        check_shape(f"{owner}.{field}", x, shapes[field])


def check_head(owner: str, head: HeadWeights, inputs: int, statistics: int) -> None:
    if not isinstance(head, HeadWeights):
        raise TypeError(f"{owner}: expected HeadWeights, got {type(head).__name__}")
    if not len(head.layers):
        raise ValueError(f"{owner}.layers: expected at least one layer, got none")
    for i, layer in enumerate(head.layers):
        if not isinstance(layer, LayerWeights):
            raise TypeError(f"{owner}.layers[{i}]: expected LayerWeights, got {type(layer).__name__}")
        check_tensors({f"{owner}.layers[{i}].weight": layer.weight})
        size = layer.weight.shape[0] if layer.weight.dim() else 0
        shapes = dict(weight=(size, inputs), bias=(size,), gain=(size,), shift=(size,))
        check_weights(f"{owner}.layers[{i}]", layer, shapes)
        inputs = size
    check_shape(f"{owner}.out_weight", head.out_weight, (statistics, inputs))
    check_shape(f"{owner}.out_bias", head.out_bias, (statistics,))


def check_cell(cell: CellWeights, sizes: Sizes) -> None:
    check_weights("cell", cell, cell.shapes(sizes))


def alike(tensors: dict[str, Tensor | None], half: bool = False) -> list[Tensor | None]:
    """The tensors, which share dtype and device; of a bool only the device is looked at.

    Inside autocast they are brought to one dtype. `half` is for scans that half precision does no harm: then that is
    the region's on CUDA, as for the products that torch casts, and float32 noise may go with half precision.
    """
    precise = ("noise", "action_noise") if half else ()
    first_name, first = next((name, x) for name, x in tensors.items() if name not in precise)
    device = first.device.type
    mixed = {}
    for name, x in tensors.items():
        if x is None:
            continue
        if not (x.is_cpu and first.is_cpu) and x.device != first.device:
            raise ValueError(f"{name}: expected the device of {first_name}, {first.device}, got {x.device}")
        if x.dtype is torch.bool:
            continue
        if x.dtype not in FLOATING:
            raise TypeError(f"{name}: expected a floating-point tensor, got {x.dtype}")
        fits = x.dtype is first.dtype or (name in precise and x.dtype is torch.float32 and first.dtype in HALF)
        if not fits:
            mixed[name] = x.dtype
    cast = mixed or first.dtype in HALF or (half and device == "cuda" and first.dtype is torch.float32)
    if cast and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device) if half and device == "cuda" else torch.float32
        return [
            x if x is None or x.dtype is torch.bool else x.float() if name in precise else x.to(dtype)
            for name, x in tensors.items()
        ]
    if mixed:
        got = ", ".join(f"{name} {dtype}" for name, dtype in mixed.items())
        raise TypeError(f"expected all tensors in the dtype of {first_name}, {first.dtype}, got {got}")
    return list(tensors.values())


def in_float32(scan: Callable[..., tuple[Tensor, ...]], args: tuple) -> tuple[Tensor, ...]:
    """`scan(*args)` outside autocast; half precision is computed in float32 and rounded once. `args` may have lists."""
    flat = [x for arg in args for x in (arg if isinstance(arg, list) else [arg]) if isinstance(x, Tensor)]
    device, dtype = flat[0].device.type, next((x.dtype for x in flat if x.dtype in HALF), None)

    def precise(x):
        if isinstance(x, list):
            return [precise(y) for y in x]
        return x.float() if isinstance(x, Tensor) and x.dtype in HALF else x

    plain = torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else contextlib.nullcontext()
    with plain:
        if dtype is None:
            return scan(*args)
        return tuple(x.to(dtype) for x in scan(*map(precise, args)))


def named_weights(owner: str, weights: tuple) -> dict[str, Tensor | None]:
    return {f"{owner}.{field}": x for field, x in zip(weights._fields, weights, strict=True)}


def check_act(name: str, act: str) -> None:
    if act not in ACTIVATIONS:
        raise ValueError(f"{name}: expected one of {sorted(ACTIVATIONS)}, got {act!r}")


def per_class(noise: Tensor, stoch: Tensor) -> tuple[Tensor, bool]:
    """Noise (T, B, S) of categorical latents as (T, B, S, C), without a copy, and whether that was done."""
    if noise.dim() == 3 and stoch.dim() == 3 and stoch.shape[1] == noise.shape[2]:
        return noise.unsqueeze(-1).expand(*noise.shape, stoch.shape[2]), True
    return noise, False


def check_flag(name: str, flag: bool) -> None:
    if not isinstance(flag, bool):
        raise TypeError(f"{name}: expected True or False, got {type(flag).__name__}")


def check_numbers(numbers: dict[str, float]) -> None:
    """Shares of the uniform distribution (`unimix`) below 1, all else finite; none is negative."""
    for name, number in numbers.items():
        share = name.endswith("unimix")
        if not isinstance(number, (float, int)):
            raise TypeError(f"{name}: expected a number, got {type(number).__name__}")
        if not 0 <= number < (1 if share else math.inf):
            bound = "a number in [0, 1)" if share else "a finite number that is not negative"
            raise ValueError(f"{name}: expected {bound}, got {number}")
