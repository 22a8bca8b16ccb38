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

import torch
from torch import Tensor

from phyxdream.agents.actor_critic import ReturnNormalizer, imagination_loss, replay_critic_loss, update_slow
from phyxdream.agents.config import DreamerConfig
from phyxdream.agents.learner import ActorLearner
from phyxdream.agents.optimizer import LaProp
from phyxdream.agents.world_model import Batch
from phyxdream.nn.heads import TwoHotHead
from phyxdream.nn.rssm import State


class DreamerV3(ActorLearner):
    """The learned parts of the agent and what they are trained on; the arguments are those of `Learner`."""

    def __init__(self, config: DreamerConfig, shapes: Mapping[str, tuple[int, ...]], action_size: int, discrete: bool):
        super().__init__(config, shapes, action_size, discrete)
        c = config
        self.critic = self.world_model.make_head(lambda size: TwoHotHead(size, c.units, c.critic_layers, c.act, c.norm))
        self.slow_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.normalizer = ReturnNormalizer(c.return_norm_rate)

    def make_optimizer(self) -> LaProp:
        c = self.config
        weights = [p for p in self.parameters() if p.requires_grad]
        return LaProp(weights, c.learning_rate, c.agc, betas=(c.beta1, c.beta2), eps=c.adam_eps, warmup=c.warmup)

    def behaviour(
        self, post: State, batch: Batch, generator: torch.Generator | None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        c = self.config
        last = slice(-len(post.deter), None)
        imagined, returns = self._imagine(post.detach(), generator)
        losses = {name: loss.mean() for name, loss in imagined.losses.items()}
        if c.replay_critic_coeff:
            losses["replay_critic"] = c.replay_critic_coeff * replay_critic_loss(
                self.critic, self.slow_critic, post.feature, batch["reward"][last], batch["is_last"][last],
                batch["is_terminal"][last], returns, c.discount, c.td_lambda, c.slow_critic_coeff,
            ).mean()  # fmt: skip
        return losses, imagined.metrics

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
            c.td_lambda, c.entropy_coeff, c.slow_critic_coeff, generator,
        )  # fmt: skip
        return behaviour, returns[0].view(post.deter.shape[:2])

    def after_update(self) -> None:
        """What follows each optimiser step: the slow critic moves towards the critic."""
        update_slow(self.slow_critic, self.critic, self.config.slow_critic_rate)
