"""DreamerV1: a Gaussian world model, and an actor that learns by gradients through its dynamics.

    world model   GRU, Gaussian latents; pictures, reward (and continuation) of unit variance; max(3, mean KL(q‖p))
    actor         max Σ weight · λ-target, differentiated through the imagined states and actions; tanh-normal, or
                  one-hot with straight-through gradients
    critic        ½ (v − sg target)², weighted alike
    exploration   noise added to actions
    optimisers    Adam, one learning rate each, gradients clipped at a norm of 100

Source: Hafner et al., "Dream to Control", 2020; danijar/dreamer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from phyxdream import distributed
from phyxdream.agents.config import DreamerConfig
from phyxdream.agents.lambda_behaviour import frozen, lambda_targets, state_weights
from phyxdream.agents.learner import Learner
from phyxdream.agents.optimizer import ClippedAdam
from phyxdream.agents.world_model import Batch, WorldModel
from phyxdream.nn.distributions import balanced_kl
from phyxdream.nn.heads import BernoulliHead, ConstantHead, ScalarHead
from phyxdream.nn.rssm import State


class WorldModelV1(WorldModel):
    """`WorldModel` with rewards of unit variance, free nats on the mean, and a constant discount where
    `continue_coeff` is 0. One KL is what both of its halves are at weight 1: their gradients add up to its own."""

    @property
    def rssm_options(self) -> dict[str, Any]:
        c = self.config
        return super().rssm_options | dict(act=c.act, norm=c.norm)

    def make_reward(self) -> nn.Module:
        c = self.config
        return self.make_head(lambda size: ScalarHead(size, c.units, c.reward_layers, c.act, c.norm))

    def make_cont(self) -> nn.Module:
        c = self.config
        if not c.continue_coeff:
            return ConstantHead(c.discount)
        return self.make_head(lambda size: BernoulliHead(size, c.units, c.continue_layers, c.act, c.norm))

    def kl(self, post: State, prior: State, free_nats: float) -> tuple[Tensor, Tensor]:
        """Both halves, each (T, B); where the mean of one is below the free nats, it is these, without gradient."""
        halves = balanced_kl(post, prior, 0.0, self.config.unimix)
        return tuple(torch.where(distributed.mean(half.mean()) > free_nats, half, free_nats) for half in halves)


class DreamerV1(Learner):
    """The learned parts of the agent and what they are trained on; the arguments are those of `Learner`."""

    continuous_dist = "tanh_normal"

    def __init__(self, config: DreamerConfig, shapes: Mapping[str, tuple[int, ...]], action_size: int, discrete: bool):
        super().__init__(config, shapes, action_size, discrete)
        self.critic = self.world_model.make_head(self.make_critic)

    def make_world_model(self, shapes: Mapping[str, tuple[int, ...]], action_size: int) -> WorldModel:
        """The world model of this agent."""
        return WorldModelV1(self.config, shapes, action_size)

    def make_critic(self, size: int) -> ScalarHead:
        c = self.config
        return ScalarHead(size, c.units, c.critic_layers, c.act, c.norm)

    def make_optimizer(self) -> ClippedAdam:
        c = self.config
        rates = (
            (self.world_model, c.learning_rate),
            (self.actor, c.actor_learning_rate or c.learning_rate),
            (self.critic, c.critic_learning_rate or c.learning_rate),
        )
        groups = [dict(params=list(module.parameters()), lr=rate) for module, rate in rates]
        return ClippedAdam(groups, clip=c.grad_clip, betas=(c.beta1, c.beta2), eps=c.adam_eps, decay=c.weight_decay)

    def explore(self, distribution: Any, generator: torch.Generator | None) -> Tensor:
        return self.add_noise(distribution.sample(generator), generator)

    def add_noise(self, action: Tensor, generator: torch.Generator | None) -> Tensor:
        """Normal noise on continuous actions, within [−1, 1]; a share of one-hot ones becomes uniform."""
        amount = self.config.exploration_noise
        if not amount:
            return action
        if self.actor.dist != "categorical":
            noise = torch.randn(action.shape, generator=generator, device=action.device)
            return (action + amount * noise).clamp(-1, 1)
        shape, device = action.shape[:-1], action.device
        index = torch.randint(action.shape[-1], shape, generator=generator, device=device)
        replaced = torch.rand(shape, generator=generator, device=device) < amount
        return torch.where(replaced.unsqueeze(-1), nn.functional.one_hot(index, action.shape[-1]).to(action), action)

    def behaviour(
        self, post: State, batch: Batch, generator: torch.Generator | None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return self.imagine(post.detach().flatten(), generator)

    def imagine(self, start: State, generator: torch.Generator | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Behaviour losses, each 0-d, of imagination from states (N, ...), and metrics."""
        c = self.config
        with frozen(self.world_model, self.critic):
            trajectory = self.world_model.rssm.imagine_policy(self.actor, start, c.imagine_horizon, generator=generator)
            feature = trajectory.state.feature[1:]  # the start is not the actor's doing
            reward, discount = self.world_model.reward(feature).mean, self.world_model.cont(feature).mean
            targets = lambda_targets(reward, self.critic(feature).mean, discount, c.td_lambda)
        weight = state_weights(discount)[:-1]
        value = self.critic(feature[:-1].detach())
        losses = {
            "actor": -(weight * targets).mean(),
            "critic": (weight * value.loss(targets.detach())).mean(),
        }
        metrics = {"imagined_return": targets.detach().mean(), "imagined_reward": reward.detach().mean(),
                   "value": value.mean.detach().mean()}  # fmt: skip
        return losses, metrics

    def after_update(self) -> None:
        """What follows each optimiser step: nothing."""
