"""What the agents have in common: a world model, a way to act on its states, and a loss made of all that is learned.

`ActorLearner` acts by a policy that it learns by gradients (DreamerV1, V2, V3), `PlannerLearner` by planning (PlaNet).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from phyxdream.agents.config import DreamerConfig
from phyxdream.agents.planner import Planner
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
    """The learned parts of an agent and what they are trained on.

    Args:
        config: a resolved `DreamerConfig`.
        shapes: observation shapes by name, pictures (C, H, W) and vectors (N,).
        action_size: A, the number of discrete actions or the length of the continuous action.
        discrete: whether actions are one-hot.
    """

    # Whether nothing in an update waits for the device, so that a CUDA graph can hold it.
    recordable = True
    # Whether actions to learn from are drawn at random until the first update: seed episodes, for as long as `prefill`
    # says.
    seeds = False

    def __init__(self, config: DreamerConfig, shapes: Mapping[str, tuple[int, ...]], action_size: int, discrete: bool):
        super().__init__()
        self.config, self.action_size, self.discrete = config, action_size, discrete
        self.world_model = self.make_world_model(shapes, action_size)
        if self.seeds:
            self.register_buffer("learned", torch.zeros((), dtype=torch.bool))

    def make_world_model(self, shapes: Mapping[str, tuple[int, ...]], action_size: int) -> WorldModel:
        """The world model of this agent."""
        return WorldModel(self.config, shapes, action_size)

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
        if explore and self.seeds and not self.learned:
            return self.random_action(post, generator), post
        return self.act(post, generator, explore), post

    def act(self, post: State, generator: torch.Generator | None, explore: bool) -> Tensor:
        """The action (B, A) at states (B, ...): one to learn from, or the best one."""
        raise NotImplementedError

    def random_action(self, state: State, generator: torch.Generator | None) -> Tensor:
        """Actions (B, A) for states (B, ...) drawn uniformly: within [−1, 1], or one-hot."""
        shape, device = (state.deter.shape[0],), state.deter.device
        if self.discrete:
            index = torch.randint(self.action_size, shape, generator=generator, device=device)
            return F.one_hot(index, self.action_size).to(state.deter)
        uniform = torch.rand(*shape, self.action_size, generator=generator, device=device, dtype=state.deter.dtype)
        return 2 * uniform - 1

    def add_noise(self, action: Tensor, generator: torch.Generator | None) -> Tensor:
        """Normal noise on continuous actions, within [−1, 1]; a share of one-hot ones becomes uniform."""
        amount = self.config.exploration_noise
        if not amount:
            return action
        if not self.discrete:
            noise = torch.randn(action.shape, generator=generator, device=action.device)
            return (action + amount * noise).clamp(-1, 1)
        shape, device = action.shape[:-1], action.device
        index = torch.randint(action.shape[-1], shape, generator=generator, device=device)
        replaced = torch.rand(shape, generator=generator, device=device) < amount
        return torch.where(replaced.unsqueeze(-1), F.one_hot(index, action.shape[-1]).to(action), action)

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
        """Losses of what is learned beside the world model, each 0-d, and metrics, from the posterior states
        (K, B, ...) of the last K steps of a batch (T, B, ...)."""
        raise NotImplementedError

    def after_update(self) -> None:
        """What follows each optimiser step."""
        if self.seeds:
            self.learned.fill_(True)


class ActorLearner(Learner):
    """`Learner` with an actor; critics are the subclasses' own. The arguments are the same."""

    continuous_dist = "bounded_normal"

    def __init__(self, config: DreamerConfig, shapes: Mapping[str, tuple[int, ...]], action_size: int, discrete: bool):
        super().__init__(config, shapes, action_size, discrete)
        c = config
        dist = c.actor_dist or ("categorical" if discrete else self.continuous_dist)
        self.actor = self.world_model.make_head(
            lambda size: Actor(size, action_size, c.units, c.actor_layers, dist, c.act, c.norm, c.unimix)
        )

    def act(self, post: State, generator: torch.Generator | None, explore: bool) -> Tensor:
        distribution = self.actor(post.feature)
        return self.explore(distribution, generator) if explore else distribution.mode

    def explore(self, distribution: Any, generator: torch.Generator | None) -> Tensor:
        """An action (B, A) to learn from."""
        return distribution.sample(generator)


class PlannerLearner(Learner):
    """`Learner` that plans, and learns nothing but the world model. The arguments are the same."""

    seeds = True

    def __init__(self, config: DreamerConfig, shapes: Mapping[str, tuple[int, ...]], action_size: int, discrete: bool):
        super().__init__(config, shapes, action_size, discrete)
        c = config
        self.planner = Planner(
            action_size, discrete, c.plan_horizon, c.plan_candidates, c.plan_iterations, c.plan_elites, c.plan_noise
        )

    def act(self, post: State, generator: torch.Generator | None, explore: bool) -> Tensor:
        action = self.planner(self.world_model, post, generator)
        return self.add_noise(action, generator) if explore else action

    def behaviour(
        self, post: State, batch: Batch, generator: torch.Generator | None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return {}, {}
