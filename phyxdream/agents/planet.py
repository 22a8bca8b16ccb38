"""PlaNet: a world model and no policy; actions are planned in the model, anew at every step.

    world model   GRU, Gaussian latents, ReLU; pictures and reward of unit variance, rewards ten times as much;
                  max(3, KL(q‖p)) at every step
    overshooting  β · 1/D Σ_d max(3, KL(sg q_{t+d} ‖ p_{t+d} rolled from q_t)), d = 2 .. D + 1; off by default, as there
    pictures      of 5 bits, the bits below them replaced by noise
    planner       cross-entropy method: 12 actions ahead, 1000 candidates, 10 iterations, 100 elites
    exploration   episodes of random actions first, then noise added to planned ones
    optimiser     Adam, gradients clipped at a norm of 1000

All else of the world model is V1's. Source: Hafner et al., "Learning Latent Dynamics for Planning from Pixels", 2019;
google-research/planet.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from phyxdream.agents.dreamer_v1 import WorldModelV1, same_episode
from phyxdream.agents.learner import PlannerLearner
from phyxdream.agents.optimizer import ClippedAdam
from phyxdream.agents.world_model import Batch, WorldModel, WorldModelOutput
from phyxdream.nn.distributions import balanced_kl
from phyxdream.nn.rssm import State


class WorldModelPlaNet(WorldModelV1):
    """`WorldModelV1` with free nats at every step, pictures of `image_bits`, and latent overshooting."""

    kl = WorldModel.kl

    def filter(self, batch: Batch, state: State | None = None, generator: torch.Generator | None = None) -> State:
        return super().filter(self.coarse(batch, generator), state, generator)

    def loss(
        self, batch: Batch, generator: torch.Generator | None = None, state: State | None = None
    ) -> WorldModelOutput:
        out = super().loss(self.coarse(batch, generator), generator, state)
        if self.config.overshooting:
            out.losses["overshooting"] = self.overshoot(out.post, batch["action"], batch["is_first"], generator)
        return out

    def coarse(self, batch: Batch, generator: torch.Generator | None) -> Batch:
        """The batch with its uint8 pictures as floats of `image_bits`: each value is drawn uniformly from its bin."""
        bins = 2**self.config.image_bits
        if bins == 256:
            return batch

        coarse = dict(batch)
        for name in self.names:
            x = batch[name]
            if x.ndim == 5 and x.dtype == torch.uint8:
                noise = torch.rand(x.shape, generator=generator, device=x.device)
                coarse[name] = (torch.div(x, 256 // bins, rounding_mode="floor") + noise) / bins
        return coarse

    def overshoot(
        self, post: State, action: Tensor, is_first: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """Latent overshooting (T, B): at each step, what is to be expected 2 to D + 1 steps later compared with what
        came, the mean over these D distances.

        A distance that reaches beyond the sequence, or over the beginning of an episode, counts as nothing. Gradients
        go to the dynamics and to the state they start from, not to the posterior that came.
        """
        c, D, T = self.config, self.config.overshooting, len(is_first)
        prior, came = self.imagine_from_all(post, action, D + 1, generator), post.detach()
        total = torch.zeros_like(came.deter[..., 0])
        for k in range(2, D + 2):
            kl, _ = balanced_kl(came[k:], prior[k - 1, : T - k], c.free_nats, c.unimix)
            total[: T - k] += kl * same_episode(is_first, k)
        return total / D

    def loss_coeff(self, name: str) -> float:
        return self.config.overshooting_coeff if name == "overshooting" else super().loss_coeff(name)


class PlaNet(PlannerLearner):
    """The learned parts of the agent and what they are trained on; the arguments are those of `Learner`."""

    def make_world_model(self, shapes: Mapping[str, tuple[int, ...]], action_size: int) -> WorldModelPlaNet:
        return WorldModelPlaNet(self.config, shapes, action_size)

    def make_optimizer(self) -> ClippedAdam:
        c = self.config
        group = dict(params=list(self.world_model.parameters()), lr=c.learning_rate)
        return ClippedAdam([group], clip=c.grad_clip, betas=(c.beta1, c.beta2), eps=c.adam_eps, decay=c.weight_decay)
