"""The world model: encoder, RSSM, and heads for observation, reward and continuation, with its loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from phyxdream.agents.config import DreamerConfig
from phyxdream.nn.distributions import balanced_kl, kl_divergence
from phyxdream.nn.heads import BernoulliHead, TwoHotHead
from phyxdream.nn.layers import linear
from phyxdream.nn.rssm import RSSM, State
from phyxdream.nn.vision import Decoder, Encoder, as_float_image

Batch = Mapping[str, Tensor]


@dataclass
class WorldModelOutput:
    """`losses`: unscaled, each (T, B); `post`: posterior states (T, B, ...), in the graph; `metrics`: 0-d tensors."""

    losses: dict[str, Tensor]
    post: State
    metrics: dict[str, Tensor]


class WorldModel(nn.Module):
    """Learns to predict what an environment shows, pays and whether it goes on.

    Args:
        config: a resolved `DreamerConfig`.
        shapes: observation shapes by name, pictures (C, H, W) and vectors (N,).
        action_size: A, size of the action vector (one-hot for discrete actions).
    """

    def __init__(self, config: DreamerConfig, shapes: Mapping[str, tuple[int, ...]], action_size: int):
        super().__init__()
        c = config
        self.config, self.names = c, sorted(shapes)
        vision = dict(depth=c.depth, mults=c.depth_mults, blocks=c.residual_blocks, units=c.units, act=c.act,
                      norm=c.norm)  # fmt: skip
        self.encoder = Encoder(shapes, layers=c.encoder_layers, **vision)
        embed_size = c.embed_size or self.encoder.out_size
        self.project = linear(self.encoder.out_size, embed_size) if c.embed_size else nn.Identity()
        self.rssm = RSSM(embed_size, action_size, c.deter_size, c.stoch_size, c.classes, c.hidden_size, c.cell,
                         c.blocks, c.unimix, c.initial)  # fmt: skip
        feature = self.rssm.feature_size
        self.decoder = Decoder(feature, shapes, layers=c.decoder_layers, **vision)
        self.reward = TwoHotHead(feature, c.units, c.reward_layers, c.act, c.norm)
        self.cont = BernoulliHead(feature, c.units, c.continue_layers, c.act, c.norm)

    def embed(self, observation: Batch) -> Tensor:
        """Observations (..., *shape) to embeddings (..., E)."""
        return self.project(self.encoder(observation))

    def loss(self, batch: Batch, generator: torch.Generator | None = None) -> WorldModelOutput:
        """Losses of a replayed batch.

        batch: observations (T, B, *shape), action (T, B, A), reward (T, B), is_first and is_terminal (T, B) bool.
        The continuation target carries the discount, so imagination multiplies by the predicted continuation alone.
        """
        c = self.config
        post, prior = self.rssm.observe(self.embed(batch), batch["action"], batch["is_first"], generator=generator)
        dynamics, representation = balanced_kl(post, prior, c.free_nats, c.unimix)
        feature = post.feature
        decoded = self.decoder(feature)
        target = c.discount * (~batch["is_terminal"]).to(feature.dtype)
        losses = {
            "dynamics": dynamics,
            "representation": representation,
            "reward": self.reward(feature).loss(batch["reward"]),
            "continue": self.cont(feature).loss(target),
            **{name: decoded[name].loss(self._target(batch[name])) for name in self.names},
        }
        with torch.no_grad():
            metrics = {"kl": kl_divergence(post, prior, c.unimix).mean()}
        return WorldModelOutput(losses, post, metrics)

    @staticmethod
    def _target(observation: Tensor) -> Tensor:
        """What the decoder is compared with: pictures (T, B, C, H, W) in [0, 1], vectors (T, B, N) as they are."""
        return as_float_image(observation) if observation.ndim == 5 else observation.float()

    def loss_coeff(self, name: str) -> float:
        """The weight of a loss of `loss` in the total."""
        c = self.config
        return {
            "dynamics": c.kl_loss_coeff * c.dynamics_coeff,
            "representation": c.kl_loss_coeff * c.representation_coeff,
            "reward": c.reward_coeff,
            "continue": c.continue_coeff,
        }.get(name, c.reconstruction_coeff)

    @torch.no_grad()
    def open_loop(self, batch: Batch, context: int, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Predictions (T, B, *shape) of every observation: filtered for `context` steps, then imagined from the
        recorded actions alone."""
        embed = self.embed({n: batch[n][:context] for n in self.names})
        post = self.rssm.filter(embed, batch["action"][:context], batch["is_first"][:context], generator=generator)
        prior = self.rssm.imagine(batch["action"][context:], post[-1], generator=generator)
        decoded = self.decoder(torch.cat([post.feature, prior.feature]))
        return {name: distribution.mode for name, distribution in decoded.items()}
