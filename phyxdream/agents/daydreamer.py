"""DayDreamer: DreamerV2 on robots, with one set of hyperparameters for every task.

    acting        in a process of its own while this one learns without a train ratio: `phyxdream.train.parallel`
    sensors       vectors, cameras and depth pictures of any sizes, fused by the encoder
    world model   V2's, with a share of the uniform distribution in the latents, LayerNorm everywhere, and rewards of
                  unit variance in symlog space
    actor         V2's objective divided by the moving standard deviation of the advantages, so that one entropy weight
                  fits rewards of any size; REINFORCE for discrete actions, gradients through the dynamics for
                  continuous ones
    critic        V2's, of unit variance in symlog space: behind LayerNorm, large values are a long way for weights
    optimisers    as V2's, one learning rate for all

Everything else is `DreamerV2`. Theirs also adapts the weights of KL and entropy while it learns, towards targets that
they set for each robot; here they are constants, as in V2. Source: Wu et al., "DayDreamer: World Models for Physical
Robot Learning", 2022; danijar/daydreamer.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from phyxdream import distributed
from phyxdream.agents.config import DreamerConfig
from phyxdream.agents.dreamer_v1 import WorldModelV1
from phyxdream.agents.dreamer_v2 import DreamerV2
from phyxdream.agents.world_model import WorldModel
from phyxdream.nn.heads import ScalarHead
from phyxdream.nn.layers import symexp, symlog


class MovingDeviation(nn.Module):
    """Standard deviation of what came in, older values counting less by `rate` with each call."""

    def __init__(self, rate: float = 0.01, least: float = 1e-6):
        super().__init__()
        self.rate, self.least = rate, least
        self.register_buffer("moments", torch.zeros(2))
        self.register_buffer("weight", torch.zeros(()))

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Take in values of any shape, of all processes that learn together; the deviation now, 0-d."""
        found = distributed.mean(torch.stack([x.mean(), x.square().mean()]))
        self.moments.lerp_(found.float(), self.rate)
        self.weight.lerp_(torch.ones_like(self.weight), self.rate)
        mean, square = self.moments / self.weight  # which removes the bias towards the zeros it started from
        return (square - mean.square()).clamp(min=self.least**2).sqrt()


class Symlog:
    """Scalars (...) of unit variance in symlog space, where their prediction is."""

    def __init__(self, prediction: Tensor):
        self.prediction = prediction

    @property
    def mean(self) -> Tensor:
        return symexp(self.prediction)

    mode = mean

    def loss(self, target: Tensor) -> Tensor:
        """(...): half the squared error in symlog space."""
        return 0.5 * (self.prediction - symlog(target)).square()


class SymlogHead(ScalarHead):
    """A scalar of any size: (..., inputs) to Symlog (...)."""

    def forward(self, feature: Tensor) -> Symlog:
        return Symlog(super().forward(feature).mean)


class WorldModelDay(WorldModelV1):
    """V2's world model with rewards in symlog space."""

    def make_reward(self) -> nn.Module:
        c = self.config
        return self.make_head(lambda size: SymlogHead(size, c.units, c.reward_layers, c.act, c.norm))


class DayDreamer(DreamerV2):
    """The learned parts of the agent and what they are trained on; the arguments are those of `Learner`."""

    def __init__(self, config: DreamerConfig, shapes: Mapping[str, tuple[int, ...]], action_size: int, discrete: bool):
        super().__init__(config, shapes, action_size, discrete)
        self.deviation = MovingDeviation(config.return_norm_rate)

    def make_world_model(self, shapes: Mapping[str, tuple[int, ...]], action_size: int) -> WorldModel:
        """The world model of this agent."""
        return WorldModelDay(self.config, shapes, action_size)

    def make_critic(self, size: int) -> SymlogHead:
        c = self.config
        return SymlogHead(size, c.units, c.critic_layers, c.act, c.norm)

    def scale(self, advantage: Tensor) -> Tensor:
        return self.deviation(advantage)
