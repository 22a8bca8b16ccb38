"""DreamerV2: discrete latents, a KL that is balanced, and an actor that learns by REINFORCE, the dynamics, or both.

    world model   LayerNorm GRU, 32×32 categoricals; 0.8 · KL(sg q‖p) + 0.2 · KL(q‖sg p), free nats on the mean of each;
                  a head for the discount where episodes end
    actor         weight · (mix · log π(a) sg(target − v) + (1 − mix) · target) + entropy; normal with mean tanh(m), or
                  one-hot
    critic        ½ (v − sg target)²; targets bootstrap from a copy of it that is renewed every 100 updates
    optimisers    as V1's

Everything else, the targets' convention too, is `DreamerV1`. Source: Hafner et al., "Mastering Atari with Discrete
World Models", 2021; danijar/dreamerv2.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor

from phyxdream.agents.config import DreamerConfig
from phyxdream.agents.dreamer_v1 import DreamerV1
from phyxdream.agents.lambda_behaviour import frozen, lambda_targets, state_weights
from phyxdream.nn.rssm import State


class DreamerV2(DreamerV1):
    """The learned parts of the agent and what they are trained on; the arguments are those of `Learner`."""

    continuous_dist = "bounded_normal"  # theirs is truncated at ±1; here the model and the environment read it clipped

    def __init__(self, config: DreamerConfig, shapes: Mapping[str, tuple[int, ...]], action_size: int, discrete: bool):
        super().__init__(config, shapes, action_size, discrete)
        self.slow_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        gradient = config.actor_gradient or ("reinforce" if discrete else "dynamics")
        self.mix = {"reinforce": 1.0, "dynamics": 0.0, "both": 1 - config.actor_mix}[gradient]

    def imagine(
        self, start: State, ended: Tensor, generator: torch.Generator | None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Behaviour losses, each 0-d, of imagination from states (N, ...), and metrics. Where the episode has ended,
        (N,) bool, the discount is known, and 0."""
        c = self.config
        with frozen(self.world_model), torch.set_grad_enabled(self.mix < 1):
            trajectory = self.trajectory(start, generator)
            feature, action = trajectory.state.feature, trajectory.action
            reward, discount = self.world_model.reward(feature).mean, self.world_model.cont(feature).mean
            discount = torch.cat([c.discount * ~ended.unsqueeze(0), discount[1:]])
            baseline = self.slow_critic(feature).mean
            targets = lambda_targets(reward, baseline, discount, c.td_lambda)
        weight = state_weights(discount)
        policy = self.actor(feature[:-2].detach())
        objective = (1 - self.mix) * targets[1:]  # the action at a state is paid from the next one on
        advantage = (targets[1:] - baseline[:-2]).detach()
        if self.mix:
            objective = objective + self.mix * policy.log_prob(action[:-1].detach()) * advantage
        objective = objective / self.scale(advantage)
        entropy = policy.entropy(generator)
        value = self.critic(feature[:-1].detach())
        losses = {
            "actor": -(weight[:-2] * (objective + c.entropy_coeff * entropy)).mean(),
            "critic": (weight[:-1] * value.loss(targets.detach())).mean(),
        }
        metrics = {"imagined_return": targets.detach().mean(), "imagined_reward": reward.detach()[1:].mean(),
                   "value": value.mean.detach().mean(), "entropy": entropy.detach().mean()}  # fmt: skip
        return losses, metrics

    def scale(self, advantage: Tensor) -> Tensor | float:
        """What the actor's objective is divided by, given the advantages (H-1, N) of this update: nothing."""
        return 1.0

    def after_update(self) -> None:
        """What follows each optimiser step: every `slow_critic_every` of them, the slow critic becomes the critic."""
        super().after_update()
        due = (self.updates % self.config.slow_critic_every == 0).float()  # a tensor: a CUDA graph may hold this
        with torch.no_grad():
            for slow, fast in zip(self.slow_critic.parameters(), self.critic.parameters(), strict=True):
                slow.lerp_(fast, due)
            self.updates += 1
