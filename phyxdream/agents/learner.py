"""What DreamerV1, V2 and V3 have in common: a world model, an actor, and a loss put together of both their losses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from phyxdream.agents.config import DreamerConfig
from phyxdream.agents.world_model import Batch, WorldModel
from phyxdream.nn.heads import Actor
from phyxdream.nn.rssm import State


@dataclass
class Loss:
    """What a replayed batch costs.

    Attributes:
        total: 0-d, with its graph.
        metrics: 0-d tensors.
        post: posterior states (T, B, ...) of the steps learned from, without gradient.
        model_loss: (T, B) weighted world model loss of every step, without gradient.
    """

    total: Tensor
    metrics: dict[str, Tensor]
    post: State
    model_loss: Tensor


class Learner(nn.Module):
    """The learned parts of an agent and what they are trained on; critics are the subclasses' own.

    Args:
        config: a resolved `DreamerConfig`.
        shapes: observation shapes by name, pictures (C, H, W) and vectors (N,).
        action_size: A, the number of discrete actions or the length of the continuous action.
        discrete: whether actions are one-hot.
    """

    continuous_dist = "bounded_normal"
    # Whether nothing in an update waits for the device, so that a CUDA graph can hold it.
    recordable = True

    def __init__(self, config: DreamerConfig, shapes: Mapping[str, tuple[int, ...]], action_size: int, discrete: bool):
        super().__init__()
        self.config = config
        self.world_model = self.make_world_model(shapes, action_size)
        self.actor = self.make_actor(action_size, discrete)

    def make_world_model(self, shapes: Mapping[str, tuple[int, ...]], action_size: int) -> WorldModel:
        """The world model of this agent."""
        return WorldModel(self.config, shapes, action_size)

    def make_actor(self, action_size: int, discrete: bool) -> nn.Module:
        """Features to a distribution over actions, whose `dist` is "categorical" for one-hot ones."""
        c = self.config
        dist = c.actor_dist or ("categorical" if discrete else self.continuous_dist)
        return self.world_model.make_head(
            lambda size: Actor(size, action_size, c.units, c.actor_layers, dist, c.act, c.norm, c.unimix)
        )

    def policy(
        self,
        observation: Batch,
        action: Tensor,
        is_first: Tensor,
        state: State | None,
        generator: torch.Generator | None = None,
        explore: bool = True,
    ) -> tuple[Tensor, State]:
        """Act for one step: observations (B, *shape), the action (B, A) that led to them, is_first (B,), and the
        state (B, ...) before; returns the action (B, A) and the state after."""
        step = {**observation, "action": action, "is_first": is_first}
        post = self.world_model.filter({name: x[None] for name, x in step.items()}, state, generator)[0]
        distribution = self.actor(post.feature)
        return (self.explore(distribution, generator) if explore else distribution.mode), post

    def explore(self, distribution: Any, generator: torch.Generator | None) -> Tensor:
        """An action (B, A) to learn from."""
        return distribution.sample(generator)

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

    def loss(self, batch: Batch, generator: torch.Generator | None = None) -> Loss:
        """The loss of a replayed batch (T, B, ...) with one-hot or continuous actions; see
        `WorldModel.replay_context` for batches with latents."""
        c = self.config
        batch, state = self.world_model.replay_context(batch, generator)
        out = self.world_model.loss(batch, generator, state)
        coeff = self.world_model.loss_coeff
        model_loss = sum(coeff(name) * loss.detach() for name, loss in out.losses.items())
        losses = {name: coeff(name) * loss.mean() for name, loss in out.losses.items()}
        last = slice(-c.imagine_last if c.imagine_last else None, None)
        behaviour, metrics = self.behaviour(out.post[last], batch, generator)
        losses |= behaviour
        metrics = {f"loss/{name}": loss.detach() for name, loss in losses.items()} | out.metrics | metrics
        return Loss(sum(losses.values()), metrics, out.post.detach(), model_loss)

    def behaviour(
        self, post: State, batch: Batch, generator: torch.Generator | None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Losses of actor and critic, each 0-d, and metrics, from the posterior states (K, B, ...) of the last K steps
        of a batch (T, B, ...)."""
        raise NotImplementedError
