"""DreamerV1: a Gaussian world model, and an actor that learns by gradients through its dynamics.

    world model   GRU, Gaussian latents; pictures, reward (and continuation) of unit variance; max(3, mean KL(q‖p))
    observations  reconstructed; or told apart from all others of the batch, ln q(s|o) − ln Σ_o' q(s|o'); or nothing but
                  the reward (`representation`)
    actor         max Σ weight · λ-target, differentiated through the imagined states and actions, but not through what
                  the actor itself reads; tanh-normal, or one-hot with straight-through gradients
    critic        ½ (v − sg target)², weighted alike
    exploration   random actions until the first update, then noise added to actions
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
from phyxdream.agents.learner import ActorLearner
from phyxdream.agents.optimizer import ClippedAdam
from phyxdream.agents.world_model import Batch, Encoded, WorldModel
from phyxdream.nn.contrastive import Contrast
from phyxdream.nn.distributions import balanced_kl
from phyxdream.nn.heads import BernoulliHead, ConstantHead, ScalarHead
from phyxdream.nn.rssm import State, Trajectory


class WorldModelV1(WorldModel):
    """`WorldModel` with rewards of unit variance, free nats on the mean, and a constant discount where
    `continue_coeff` is 0. One KL is what both of its halves are at weight 1: their gradients add up to its own.

    Without reconstruction the decoder reads features whose gradient is stopped, for those who look on.
    """

    def __init__(self, config: DreamerConfig, shapes: Mapping[str, tuple[int, ...]], action_size: int):
        super().__init__(config, shapes, action_size)
        c = config
        if c.representation == "contrastive":
            size, embed_size = self.contrasted_size, self.rssm.embed_size
            self.contrast = Contrast(size, embed_size, c.units, c.contrastive_critic, c.act, c.norm)

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

    @property
    def contrasted_size(self) -> int:
        """The size of a state as observations are told apart by."""
        return self.rssm.feature_size

    def observation_losses(
        self, encoded: Encoded, post: State, feature: Tensor, batch: Batch, generator: torch.Generator | None
    ) -> dict[str, Tensor]:
        kind = self.config.representation
        losses = self.reconstruction(feature if kind == "reconstruction" else feature.detach(), batch)
        if kind == "contrastive":
            losses["contrastive"] = self.contrastive_loss(encoded, feature, batch, generator)
        return losses

    def contrastive_loss(
        self, encoded: Encoded, feature: Tensor, batch: Batch, generator: torch.Generator | None
    ) -> Tensor:
        """−(ln q(s|o) − ln Σ_o' q(s|o')) over all frames o' of the batch, of all processes: (T, B)."""
        return self.contrasted(feature, self.keys(encoded.embed))

    def keys(self, embed: Tensor) -> Tensor:
        """What states are compared with, (T, N, D): the embeddings (T, B, E) of all processes that learn together."""
        return distributed.joined(self.contrast.keys(embed))

    def contrasted(self, state: Tensor, keys: Tensor) -> Tensor:
        """The loss (T', B) of states (T', B, S) that belong to the last T' steps of this process's sequences."""
        return self.contrast(state, keys, distributed.rank() * state.shape[1])

    def imagine_from_all(self, state: State, action: Tensor, steps: int, generator: torch.Generator | None) -> State:
        """Prior states (K, T, B, ...), 1 to K = `steps` steps after each state (T, B, ...) of a sequence, under its
        actions (T, B, A). What reaches beyond the end means nothing."""
        T, B = action.shape[:2]
        padded = torch.cat([action, action.new_zeros(steps, *action.shape[1:])])
        future = torch.stack([padded[k : k + T] for k in range(1, steps + 1)])
        prior = self.rssm.imagine(future.flatten(1, 2), state.flatten(), generator=generator)
        return prior.map(lambda x: x.unflatten(1, (T, B)))

    def loss_coeff(self, name: str) -> float:
        return self.config.contrastive_coeff if name == "contrastive" else super().loss_coeff(name)

    def kl(self, post: State, prior: State, free_nats: float) -> tuple[Tensor, Tensor]:
        """Both halves, each (T, B); where the mean of one is below the free nats, it is these, without gradient."""
        halves = balanced_kl(post, prior, 0.0, self.config.unimix)
        return tuple(torch.where(distributed.mean(half.mean()) > free_nats, half, free_nats) for half in halves)


def same_episode(is_first: Tensor, k: int) -> Tensor:
    """1.0 where the step t − k of a sequence (T, B) is of the same episode as t, for t from k on: (T − k, B)."""
    episode = is_first.int().cumsum(0)
    return (episode[k:] == episode[: len(episode) - k]).float()


class DreamerV1(ActorLearner):
    """The learned parts of the agent and what they are trained on; the arguments are those of `Learner`."""

    continuous_dist = "tanh_normal"
    seeds = True

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
        # A decoder that only looks on takes no part in the clipping of the others.
        apart = [] if c.representation == "reconstruction" else list(self.world_model.decoder.parameters())
        watching = set(apart)
        rates = [
            ([p for p in self.world_model.parameters() if p not in watching], c.learning_rate),
            (self.actor.parameters(), c.actor_learning_rate or c.learning_rate),
            (self.critic.parameters(), c.critic_learning_rate or c.learning_rate),
            *([(apart, c.learning_rate)] if apart else []),
        ]
        groups = [dict(params=list(parameters), lr=rate) for parameters, rate in rates]
        return ClippedAdam(groups, clip=c.grad_clip, betas=(c.beta1, c.beta2), eps=c.adam_eps, decay=c.weight_decay)

    def explore(self, distribution: Any, generator: torch.Generator | None) -> Tensor:
        return self.add_noise(distribution.sample(generator), generator)

    def behaviour(
        self, post: State, batch: Batch, generator: torch.Generator | None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        ended = batch["is_terminal"][-len(post.deter) :].flatten()
        return self.imagine(post.detach().flatten(), ended, generator)

    def trajectory(self, start: State, generator: torch.Generator | None) -> Trajectory:
        """Imagined from states (N, ...) under the actor, which reads them as constants; the model reads its actions as
        the environment takes them."""
        return self.world_model.rssm.imagine_policy(
            self.actor, start, self.config.imagine_horizon, generator=generator, detach_feature=True, clip_action=True
        )

    def imagine(
        self, start: State, ended: Tensor, generator: torch.Generator | None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Behaviour losses, each 0-d, of imagination from states (N, ...), and metrics. Where the episode has ended,
        (N,) bool, there is nothing to learn from what would follow."""
        c = self.config
        with frozen(self.world_model, self.critic):
            feature = self.trajectory(start, generator).state.feature[1:]  # the start is not the actor's doing
            reward, discount = self.world_model.reward(feature).mean, self.world_model.cont(feature).mean
            targets = lambda_targets(reward, self.critic(feature).mean, discount, c.td_lambda)
        weight = state_weights(discount)[:-1] * ~ended
        value = self.critic(feature[:-1].detach())
        losses = {
            "actor": -(weight * targets).mean(),
            "critic": (weight * value.loss(targets.detach())).mean(),
        }
        metrics = {"imagined_return": targets.detach().mean(), "imagined_reward": reward.detach().mean(),
                   "value": value.mean.detach().mean()}  # fmt: skip
        return losses, metrics
