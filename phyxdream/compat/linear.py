"""Dense layers of any model, by our own matrix products."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from phyxdream import ops
from phyxdream.compat.acceleration import Accelerated
from phyxdream.compat.structure import Misfit


class _Model(NamedTuple):
    like: Tensor


class Linear(Accelerated):
    """`torch.nn.Linear`."""

    kind = "torch.nn.Linear"
    replaces = ("forward",)
    remark = "differentiable once, where torch's is any number of times"

    @staticmethod
    def recognises(module: nn.Module) -> bool:
        return type(module) is nn.Linear

    @staticmethod
    def read(module: nn.Module) -> _Model:
        if module.weight.dtype is not torch.float32:
            raise Misfit(f"weights in {str(module.weight.dtype).removeprefix('torch.')}")
        return _Model(module.weight)

    @staticmethod
    def trials(module: nn.Module):
        """None: nothing of it is a guess."""
        return []

    def forward(self, input: Tensor) -> Tensor:
        if self.fitted(input) is None:
            return super().forward(input)
        return ops.linear(input, self.weight, self.bias)
