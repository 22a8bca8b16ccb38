"""Contrastive learning of states: which of many observations does a state belong to?"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from phyxdream.errors import ConfigError, suggest
from phyxdream.nn.layers import Dense, linear

CRITICS = ("gaussian", "bilinear", "cosine")


class Contrast(nn.Module):
    """ln q(s|o) − ln Σ_o' q(s|o'), where o' runs over all frames of a batch, o among them (InfoNCE).

    Args:
        state_size: S, of a flat state.
        embed_size: E, of the embedding of an observation.
        units: width of the hidden layer of `gaussian`, and of what `cosine` projects to.
        critic: what stands for ln q(s|o). Each leaves out what is the same for all o', and so is one matrix product
            of states and keys, plus a bias for each key.
            `gaussian`: q is normal of unit variance, −½ ‖s − μ(o)‖², with μ a hidden layer and a linear map. For
            one-hot states it is s·μ(o) − ½ ‖μ(o)‖²: log-linear in the classes, as a categorical's.
            `bilinear`: sᵀ W o.
            `cosine`: of the angle between P s and R o, over a temperature of 0.1.
        act, norm: of the hidden layer.

    Raises:
        ConfigError: for an unknown critic.

    Source: Hafner et al., "Dream to Control", 2020; van den Oord et al., "Representation Learning with
    Contrastive Predictive Coding", 2018.

    >>> contrast = Contrast(state_size=8, embed_size=16, units=32)
    >>> contrast(torch.randn(5, 3, 8), contrast.keys(torch.randn(5, 3, 16))).shape
    torch.Size([5, 3])
    """

    TEMPERATURE = 0.1

    def __init__(
        self,
        state_size: int,
        embed_size: int,
        units: int,
        critic: str = "gaussian",
        act: str = "elu",
        norm: str = "none",
    ):
        super().__init__()
        if critic not in CRITICS:
            raise ConfigError(f"contrastive_critic: expected one of {list(CRITICS)}, got {critic!r}"
                              f"{suggest(critic, CRITICS)}")  # fmt: skip
        self.critic = critic
        if critic == "gaussian":
            self.key = nn.Sequential(Dense(embed_size, units, act, norm), linear(units, state_size))
        else:
            self.key = linear(embed_size, state_size if critic == "bilinear" else units, bias=False)
        self.query = linear(state_size, units, bias=False) if critic == "cosine" else nn.Identity()

    def keys(self, embed: Tensor) -> Tensor:
        """Embeddings (T, B, E) to what states are compared with, (T, B, D)."""
        key = self.key(embed)
        return F.normalize(key, dim=-1) if self.critic == "cosine" else key

    def logits(self, state: Tensor, keys: Tensor) -> Tensor:
        """ln q(s|o) up to what does not depend on o, of every state (M, S) and every key (N, D): (M, N)."""
        query = self.query(state)
        if self.critic == "gaussian":
            return torch.addmm(-0.5 * keys.square().sum(-1), query, keys.T)
        return query @ keys.T if self.critic == "bilinear" else F.normalize(query, dim=-1) @ keys.T / self.TEMPERATURE

    def forward(self, state: Tensor, keys: Tensor, start: int = 0) -> Tensor:
        """−(ln q(s|o) − ln Σ_o' q(s|o')): (T', B), of states (T', B, S) that belong to the last T' steps of keys
        (T, N, D), and there to the B sequences from `start` on."""
        (T, N), (length, B) = keys.shape[:2], state.shape[:2]
        own = torch.arange(T * N, device=keys.device).view(T, N)[T - length :, start : start + B]
        logits = self.logits(state.flatten(0, 1), keys.flatten(0, 1))
        return F.cross_entropy(logits, own.flatten(), reduction="none").view(length, B)
