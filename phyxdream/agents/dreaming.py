"""Dreaming and DreamingV2: world models that learn what to keep of pictures by telling them apart, without painting
them.

    objective     Σ_{k=0..K} (J_k^NCE + J_k^KL), beside reward (and continuation)
    J_k^NCE       E[ln p(z_t|o_t) − ln Σ_o' p(z_t|o')] over all frames o' of the batch; z_t ~ p̃(z_t|z_{t−k}, a), the
                  posterior's sample at t − k and k steps of z ← A z + B a + c, which knows nothing of the GRU
    J_k^KL        −E[KL(posterior at t+1 ‖ the RSSM's prior there, k + 1 steps after the last posterior, or after
                  the state before an episode)]
    pictures      two independent random crops: one for the posterior, one as the o to be told apart
    decoder       reads features whose gradient is stopped: for those who look on

Behaviour, optimisers, and all else are `DreamerV1`'s (Gaussian z) and `DreamerV2`'s (categorical z: A z + B a + c are
logits, and samples carry straight-through gradients). Terms that would reach over the beginning of a sequence or an
episode are left out. Source: Okada & Taniguchi, "Dreaming: Model-based Reinforcement Learning by Latent Imagination
without Reconstruction", 2021; "DreamingV2", 2022. What these leave open are options: `contrastive_critic`,
`contrastive_coeff`, `overshooting` (K), `crop_pixels`, `crop_padding`, `crop_shared`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from phyxdream import distributed
from phyxdream.agents.config import DreamerConfig
from phyxdream.agents.dreamer_v1 import DreamerV1, WorldModelV1, same_episode
from phyxdream.agents.dreamer_v2 import DreamerV2
from phyxdream.agents.world_model import Batch, Encoded, WorldModelOutput
from phyxdream.nn.crops import Crops
from phyxdream.nn.distributions import balanced_kl
from phyxdream.nn.layers import linear
from phyxdream.nn.rssm import RSSM, State
from phyxdream.ops import rssm_cells

Shapes = Mapping[str, tuple[int, ...]]


class LinearDynamics(nn.Module):
    """p̃(z_t | z_{t−1}, a_t), beside an `RSSM` with whose latents it shares nothing but their shape: A z + B a + c is
    the mean of a normal distribution, whose deviation is the same everywhere, or the logits of categoricals."""

    def __init__(self, rssm: RSSM):
        super().__init__()
        self.sizes, self.unimix, self.min_std = (rssm.stoch_size, rssm.classes), rssm.unimix, rssm.min_std
        flat = rssm.stoch_size * (rssm.classes or 1)
        self.step = linear(flat + rssm.action_size, flat)
        self.raw_std = None if rssm.classes else nn.Parameter(torch.zeros(flat))

    def forward(self, stoch: Tensor, action: Tensor, noise: Tensor) -> Tensor:
        """A sample of z after z (..., S·C) or (..., S) and an action (..., A), alike; noise as the RSSM's, (..., S, C)
        or (..., S)."""
        out = self.step(torch.cat([stoch, action], -1))
        if self.raw_std is not None:
            return out + rssm_cells.deviation(self.raw_std, self.min_std) * noise
        p = rssm_cells.class_probabilities(out.unflatten(-1, self.sizes), self.unimix)
        return rssm_cells.draw_class(p, rssm_cells.arrival_times(noise)).flatten(-2)


class DreamingWorldModel(WorldModelV1):
    """`WorldModelV1` with the objective above; the arguments are the same."""

    def __init__(self, config: DreamerConfig, shapes: Shapes, action_size: int):
        super().__init__(config, shapes, action_size)
        if config.representation == "contrastive":
            self.linear_dynamics = LinearDynamics(self.rssm)

    def make_encoder(self, shapes: Shapes) -> tuple[nn.Module, nn.Module, int]:
        c = self.config
        self.crops = Crops(shapes, c.crop_pixels, c.crop_padding, c.crop_shared)
        return super().make_encoder(self.crops.shapes)

    @property
    def contrasted_size(self) -> int:
        return self.rssm.feature_size - self.rssm.deter_size

    def embed(self, observation: Batch) -> Tensor:
        """As for `WorldModel`, of the crop in the centre: what acting sees."""
        return super().embed(self.crops.centre(observation))

    def encode_replayed(self, batch: Batch, state: State | None, generator: torch.Generator | None) -> Encoded:
        return Encoded(super().embed(self.crops.random(batch, generator)))

    def loss(
        self, batch: Batch, generator: torch.Generator | None = None, state: State | None = None
    ) -> WorldModelOutput:
        """As for `WorldModel`, where J_0^KL is; `overshooting` is the others of them."""
        out = super().loss(batch, generator, state)
        if self.config.overshooting:
            out.losses["overshooting"] = self.overshooting_loss(out.post, batch, generator)
        return out

    def loss_coeff(self, name: str) -> float:
        return self.config.kl_loss_coeff if name == "overshooting" else super().loss_coeff(name)

    def contrastive_loss(
        self, encoded: Encoded, feature: Tensor, batch: Batch, generator: torch.Generator | None
    ) -> Tensor:
        """−Σ_k J_k^NCE (T, B), each term at the step t that it is about."""
        K, (T, B) = self.config.overshooting, feature.shape[:2]
        embed = encoded.embed
        if self.crops.pictures:
            embed = super().embed(self.crops.random(batch, generator))
        keys = self.keys(embed)
        z, action = feature[..., self.rssm.deter_size :], batch["action"]
        loss = self.contrasted(z, keys)
        for k in range(1, K + 1):
            z = self.linear_dynamics(z[:-1], action[k:], self.rssm.draw_noise(T - k, B, generator=generator))
            loss = loss + _later(self.contrasted(z, keys) * same_episode(batch["is_first"], k), k)
        return loss

    def overshooting_loss(self, post: State, batch: Batch, generator: torch.Generator | None) -> Tensor:
        """−Σ_{k≥1} J_k^KL (T, B), each term at the step that it is about; free nats are of the mean of each."""
        c, action = self.config, batch["action"]
        K, T = c.overshooting, len(action)
        # From the prior of every step, one step after a posterior, under the K actions that followed.
        start = self.rssm.sample_prior(post.deter, generator=generator)
        prior = self.imagine_from_all(start, action, K, generator)
        loss = torch.zeros_like(post.deter[..., 0])
        for k in range(1, K + 1):
            valid = same_episode(batch["is_first"], k)
            count = distributed.mean(valid.mean()).clamp(min=torch.finfo(valid.dtype).tiny)
            halves = balanced_kl(post[k:], prior[k - 1, : T - k], 0.0, c.unimix)
            for half, coeff in zip(halves, (c.dynamics_coeff, c.representation_coeff), strict=True):
                mean = distributed.mean((half * valid).mean()) / count
                loss = loss + _later(coeff * valid * torch.where(mean > c.free_nats, half, c.free_nats), k)
        return loss


def _later(x: Tensor, k: int) -> Tensor:
    """(T − k, B) to (T, B), zeros first."""
    return nn.functional.pad(x, (0, 0, k, 0))


class Dreaming(DreamerV1):
    """The learned parts of the agent and what they are trained on; the arguments are those of `Learner`."""

    def make_world_model(self, shapes: Shapes, action_size: int) -> DreamingWorldModel:
        return DreamingWorldModel(self.config, shapes, action_size)


class DreamingV2(DreamerV2):
    """The learned parts of the agent and what they are trained on; the arguments are those of `Learner`."""

    def make_world_model(self, shapes: Shapes, action_size: int) -> DreamingWorldModel:
        return DreamingWorldModel(self.config, shapes, action_size)
