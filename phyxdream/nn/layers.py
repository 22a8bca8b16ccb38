"""Layers every part of the model is made of: norms, dense blocks, block-diagonal linear maps, MLPs."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn

from phyxdream import ops
from phyxdream.errors import ConfigError, suggest
from phyxdream.ops.rssm_cells import HeadWeights, LayerWeights

ACTIVATIONS = {"silu": nn.SiLU, "elu": nn.ELU, "relu": nn.ReLU, "gelu": nn.GELU, "tanh": nn.Tanh}
NORMS = ("rms", "layer", "none")
RMS_EPS, LAYER_EPS = 1e-4, 1e-3


def activation(name: str) -> nn.Module:
    """The activation called `name`; raises `ConfigError` with the nearest names otherwise."""
    if name not in ACTIVATIONS:
        raise ConfigError(f"act: expected one of {sorted(ACTIVATIONS)}, got {name!r}{suggest(name, ACTIVATIONS)}")
    return ACTIVATIONS[name]()


def norm(name: str, size: int) -> nn.Module:
    """Normalisation over the last axis: `rms` (eps 1e-4, current V3), `layer` (eps 1e-3, early V3) or `none`."""
    if name == "rms":
        return nn.RMSNorm(size, eps=RMS_EPS)
    if name == "layer":
        return nn.LayerNorm(size, eps=LAYER_EPS)
    if name == "none":
        return nn.Identity()
    raise ConfigError(f"norm: expected one of {list(NORMS)}, got {name!r}{suggest(name, NORMS)}")


class RMSNormSiLU(nn.RMSNorm):
    """The RMS norm of `norm`, and SiLU after it, as one fused op."""

    def __init__(self, size: int):
        super().__init__(size, eps=RMS_EPS)

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm_silu(x, self.weight, self.eps)


def norm_act(norm_: str, size: int, act: str) -> tuple[nn.Module, nn.Module]:
    """Norm over the last axis and activation, to be applied in turn. RMS norm with SiLU is fused: its activation is
    the identity."""
    if (norm_, act) == ("rms", "silu"):
        return RMSNormSiLU(size), nn.Identity()
    return norm(norm_, size), activation(act)


def init_(weight: Tensor, fan_in: int, scale: float = 1.0) -> Tensor:
    """Truncated normal with variance `scale`² / fan_in, in place (DreamerV3's initialiser)."""
    # 0.8796 is the standard deviation of a unit normal truncated at two deviations.
    std = scale / math.sqrt(fan_in) / 0.87962566103423978
    if scale == 0:
        return nn.init.zeros_(weight)
    return nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


class Linear(nn.Linear):
    """`nn.Linear` as the fused op: its parameters, its results."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight, self.bias)


def linear(inputs: int, outputs: int, bias: bool = True, scale: float = 1.0) -> Linear:
    """A dense layer with DreamerV3's initialisation; `scale=0` starts at zero."""
    layer = Linear(inputs, outputs, bias=bias)
    init_(layer.weight.data, inputs, scale)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


class Dense(nn.Sequential):
    """Linear, norm, activation: (..., inputs) to (..., outputs). A normalised layer needs no bias of its own."""

    def __init__(self, inputs: int, outputs: int, act: str = "silu", norm_: str = "rms"):
        super().__init__(linear(inputs, outputs, bias=norm_ != "layer"), *norm_act(norm_, outputs, act))


class MLP(nn.Sequential):
    """`layers` dense blocks of width `units`: (..., inputs) to (..., units)."""

    def __init__(self, inputs: int, units: int, layers: int, act: str = "silu", norm_: str = "rms"):
        sizes = [inputs] + [units] * layers
        super().__init__(*(Dense(i, o, act, norm_) for i, o in itertools.pairwise(sizes)))
        self.out_size = sizes[-1]


def affine(norm_: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    """Gain and shift of a norm, None where it has none."""
    return getattr(norm_, "weight", None), getattr(norm_, "bias", None)


def head_weights(mlp: MLP, out: nn.Linear) -> HeadWeights:
    """The parameters of an MLP and the layer after it, as the ops take them."""
    layers = tuple(LayerWeights(layer.weight, layer.bias, *affine(norm_)) for layer, norm_, _ in mlp)
    return HeadWeights(layers, out.weight, out.bias)


class BlockLinear(nn.Module):
    """Block-diagonal linear map: (..., inputs) to (..., outputs), each of `blocks` slices with weights of its own.

    Initialised for `fan_in`, by default the whole input as in danijar/dreamerv3, not the slice a block sees.
    """

    def __init__(self, inputs: int, outputs: int, blocks: int, bias: bool = True, fan_in: int | None = None):
        super().__init__()
        if inputs % blocks or outputs % blocks:
            raise ConfigError(f"blocks: must divide the sizes {inputs} and {outputs}, got {blocks}")
        self.blocks = blocks
        self.weight = nn.Parameter(torch.empty(blocks, inputs // blocks, outputs // blocks))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        init_(self.weight.data, fan_in or inputs)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, self.blocks, self.weight.shape[1]).transpose(0, 1)  # (G, N, I/G)
        y = torch.bmm(flat, self.weight).transpose(0, 1).reshape(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


def symlog(x: Tensor) -> Tensor:
    """sign(x) · ln(1 + |x|), elementwise (Hafner et al. 2023)."""
    return torch.sign(x) * torch.log1p(torch.abs(x))


def symexp(x: Tensor) -> Tensor:
    """Inverse of `symlog`: sign(x) · (exp|x| − 1)."""
    return torch.sign(x) * torch.expm1(torch.abs(x))


__all__ = ["MLP", "BlockLinear", "Dense", "activation", "init_", "linear", "norm", "norm_act", "symexp", "symlog"]
