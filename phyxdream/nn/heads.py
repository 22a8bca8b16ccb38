"""Heads: small MLPs on the model's feature that end in a distribution."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from phyxdream.errors import ConfigError, suggest
from phyxdream.nn.distributions import (
    Bernoulli,
    Constant,
    Normal,
    OneHotCategorical,
    TanhNormal,
    TwoHotSymlog,
    UnitNormal,
    symexp_bins,
)
from phyxdream.nn.layers import MLP, Dense, linear
from phyxdream.ops import rssm_cells


class TwoHotHead(nn.Module):
    """A scalar as symlog two-hot over 255 bins: rewards and values of V3. Starts at exactly zero (`scale=0`)."""

    def __init__(
        self,
        inputs: int,
        units: int,
        layers: int,
        act: str = "silu",
        norm: str = "rms",
        bins: int = 255,
        scale: float = 0.0,
    ):
        super().__init__()
        self.mlp = MLP(inputs, units, layers, act, norm)
        self.out = linear(self.mlp.out_size, bins, scale=scale)
        self.register_buffer("bins", symexp_bins(bins), persistent=False)

    def forward(self, feature: Tensor) -> TwoHotSymlog:
        return TwoHotSymlog(self.out(self.mlp(feature)), self.bins)


class BernoulliHead(nn.Module):
    """A probability: the continuation head."""

    def __init__(self, inputs: int, units: int, layers: int, act: str = "silu", norm: str = "rms"):
        super().__init__()
        self.mlp = MLP(inputs, units, layers, act, norm)
        self.out = linear(self.mlp.out_size, 1)

    def forward(self, feature: Tensor) -> Bernoulli:
        return Bernoulli(self.out(self.mlp(feature)).squeeze(-1))


class ScalarHead(nn.Module):
    """A scalar of unit variance: rewards and values of V1 and V2. (..., inputs) to UnitNormal (...)."""

    def __init__(self, inputs: int, units: int, layers: int, act: str = "elu", norm: str = "none"):
        super().__init__()
        self.mlp = MLP(inputs, units, layers, act, norm)
        self.out = linear(self.mlp.out_size, 1)

    def forward(self, feature: Tensor) -> UnitNormal:
        return UnitNormal(self.out(self.mlp(feature)).squeeze(-1))


class ConstantHead(nn.Module):
    """The same number for every feature."""

    def __init__(self, value: float):
        super().__init__()
        self.value = value

    def forward(self, feature: Tensor) -> Constant:
        return Constant(feature.new_full(feature.shape[:-1], self.value))


ACTORS = rssm_cells.POLICIES


class Actor(nn.Module):
    """The policy: features (..., inputs) to a distribution over actions (..., A).

    dist:
        categorical: one-hot actions with `unimix` of the uniform mixed in.
        bounded_normal: mean tanh(m), std in [min_std, max_std] (V3).
        tanh_normal: mean 5·tanh(m/5), std softplus(s + softplus⁻¹(5)) + 1e-4, squashed by tanh (V1).
    """

    def __init__(
        self,
        inputs: int,
        action_size: int,
        units: int,
        layers: int,
        dist: str,
        act: str = "silu",
        norm: str = "rms",
        unimix: float = 0.01,
        min_std: float = 0.1,
        max_std: float = 1.0,
    ):
        super().__init__()
        if dist not in ACTORS:
            raise ConfigError(f"dist: expected one of {list(ACTORS)}, got {dist!r}{suggest(dist, ACTORS)}")
        self.dist, self.act, self.unimix, self.min_std, self.max_std = dist, act, unimix, min_std, max_std
        self.action_size = action_size
        self.mlp = MLP(inputs, units, layers, act, norm)
        # Near-uniform start: a first policy with opinions explores badly.
        self.out = linear(self.mlp.out_size, action_size * (1 if dist == "categorical" else 2), scale=0.01)

    def forward(self, feature: Tensor) -> OneHotCategorical | Normal | TanhNormal:
        out = self.out(self.mlp(feature))
        if self.dist == "categorical":
            return OneHotCategorical(out, self.unimix)
        mean, std = rssm_cells.action_moments(out, self.dist, self.min_std, self.max_std)
        return Normal(mean, std) if self.dist == "bounded_normal" else TanhNormal(mean, std)

    def draw_noise(self, *leading: int, generator: torch.Generator | None = None) -> Tensor:
        """Noise (..., A) for `leading` actions of `RSSM.imagine_policy`: uniform for one-hot ones, else standard
        normal."""
        draw = torch.rand if self.dist == "categorical" else torch.randn
        like = self.out.weight
        return draw((*leading, self.action_size), generator=generator, device=like.device, dtype=like.dtype)


class SlotHead(nn.Module):
    """A head that reads all slots, in whatever order: a shared dense layer, mean and maximum over the slots, `head`.

    Args:
        inputs: size F of a slot's feature.
        units: width of the shared layer.
        make: builds the head for a feature of a given size, here 2 · `units`.
        act, norm: of the shared layer.

    Source: Zaheer et al., "Deep Sets", 2017. The mean tells how many slots are of a kind, the maximum whether one is.

    >>> head = SlotHead(8, 16, lambda size: BernoulliHead(size, 16, 1))
    >>> head(torch.randn(5, 2, 3, 8)).mean.shape
    torch.Size([5, 2])
    """

    def __init__(self, inputs: int, units: int, make: Callable[[int], nn.Module], act: str = "silu", norm: str = "rms"):
        super().__init__()
        self.each = Dense(inputs, units, act, norm)
        self.head = make(2 * units)

    def forward(self, feature: Tensor):
        """(..., K, F) to what the head returns for (..., 2 · units)."""
        x = self.each(feature)
        return self.head(torch.cat([x.mean(-2), x.amax(-2)], -1))
