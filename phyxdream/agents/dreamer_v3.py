"""DreamerV3 (2024 code): one loss over world model, actor and critic, one optimiser.

    world model   reconstruction + reward + continue + 1.0·max(1, KL(sg q‖p)) + 0.1·max(1, KL(q‖sg p))
    behaviour     REINFORCE on imagined λ-returns, percentile-normalised, entropy 3e-4
    critic        symlog two-hot regression to λ-returns and to its own moving average, imagined and replayed
    replay        sequences go on from the state stored with the step before them, and their states are stored anew

Source: Hafner et al. 2023/2025, danijar/dreamerv3 agent.py and configs.yaml.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from phyxdream.agents.actor_critic import ReturnNormalizer, imagination_loss, replay_critic_loss, update_slow
from phyxdream.agents.config import DreamerConfig
from phyxdream.agents.optimizer import LaProp
from phyxdream.agents.world_model import Batch, WorldModel
from phyxdream.nn.heads import Actor, TwoHotHead
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


class DreamerV3(nn.Module):
    """The learned parts of the agent and what they are trained on.

    Args:
        config: a resolved `DreamerConfig`.
        shapes: observation shapes by name, pictures (C, H, W) and vectors (N,).
        action_size: A, the number of discrete actions or the length of the continuous action.
        discrete: whether actions are one-hot.
    """

    def __init__(self, config: DreamerConfig, shapes: Mapping[str, tuple[int, ...]], action_size: int, discrete: bool):
        super().__init__()
        c = self.config = config
        self.world_model = self.make_world_model(shapes, action_size)
        make_head = self.world_model.make_head
        dist = c.actor_dist or ("categorical" if discrete else "bounded_normal")
        self.actor = make_head(
            lambda size: Actor(size, action_size, c.units, c.actor_layers, dist, c.act, c.norm, c.unimix)
        )
        self.critic = make_head(lambda size: TwoHotHead(size, c.units, c.critic_layers, c.act, c.norm))
        self.slow_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.normalizer = ReturnNormalizer(c.return_norm_rate)

    def make_world_model(self, shapes: Mapping[str, tuple[int, ...]], action_size: int) -> WorldModel:
        """The world model of this agent."""
        return WorldModel(self.config, shapes, action_size)

    def make_optimizer(self) -> LaProp:
        c = self.config
        weights = [p for p in self.parameters() if p.requires_grad]
        return LaProp(weights, c.learning_rate, c.agc, betas=(c.beta1, c.beta2), eps=c.adam_eps, warmup=c.warmup)

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
        return (distribution.sample(generator) if explore else distribution.mode), post

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
        post = out.post[last]
        behaviour, returns = self._imagine(post.detach(), generator)
        losses |= {name: loss.mean() for name, loss in behaviour.losses.items()}
        if c.replay_critic_coeff:
            losses["replay_critic"] = c.replay_critic_coeff * replay_critic_loss(
                self.critic, self.slow_critic, post.feature, batch["reward"][last], batch["is_last"][last],
                batch["is_terminal"][last], returns, c.discount, c.td_lambda, c.slow_critic_coeff,
            ).mean()  # fmt: skip
        metrics = {f"loss/{name}": loss.detach() for name, loss in losses.items()}
        metrics |= out.metrics | behaviour.metrics
        return Loss(sum(losses.values()), metrics, out.post.detach(), model_loss)

    def _imagine(self, post: State, generator: torch.Generator | None):
        """Behaviour losses from imagination started at the posterior states (K, B, ...), and the λ-return imagined
        from each of them, (K, B)."""
        c = self.config
        # REINFORCE needs no gradient through the dynamics.
        with torch.no_grad():
            rssm, start = self.world_model.rssm, post.flatten()
            trajectory = rssm.imagine_policy(self.actor, start, c.imagine_horizon, generator=generator)
            feature = trajectory.state.feature
            reward, cont = self.world_model.reward(feature).mode, self.world_model.cont(feature).mean
        behaviour, returns = imagination_loss(
            self.actor, self.critic, self.slow_critic, self.normalizer, feature, trajectory.action, reward, cont,
            c.td_lambda, c.entropy_coeff, c.slow_critic_coeff,
        )  # fmt: skip
        return behaviour, returns[0].view(post.deter.shape[:2])

    def after_update(self) -> None:
        """What follows each optimiser step: the slow critic moves towards the critic."""
        update_slow(self.slow_critic, self.critic, self.config.slow_critic_rate)
