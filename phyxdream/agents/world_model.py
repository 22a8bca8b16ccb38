"""The world model: encoder, RSSM, and heads for observation, reward and continuation, with its loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from phyxdream.agents.config import DreamerConfig
from phyxdream.nn.distributions import balanced_kl
from phyxdream.nn.heads import BernoulliHead, TwoHotHead
from phyxdream.nn.layers import linear
from phyxdream.nn.rssm import RSSM, State
from phyxdream.nn.vision import Decoder, Encoder, as_float_image

Batch = Mapping[str, Tensor]


@dataclass
class Encoded:
    """What an encoder makes of a sequence.

    Attributes:
        embed: (T, B, E), or (T, B, K, E) for a state of each slot.
        carry: what an encoder with a memory hands on after every step, (T, B, ...), or None.
        slots: (T, B, K, D) of its pictures, or None.
    """

    embed: Tensor
    carry: Tensor | None = None
    slots: Tensor | None = None


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
        self.encoder, self.project, embed_size = self.make_encoder(shapes)
        self.rssm = self.make_rssm(embed_size, action_size)
        self.decoder = self.make_decoder(shapes)
        self.reward, self.cont = self.make_reward(), self.make_cont()

    # -----------------------------------------------------------------------------------------------------------------
    # Parts, which another design of the latent state makes otherwise.

    @property
    def vision(self) -> dict[str, Any]:
        """What encoder and decoder have in common."""
        c = self.config
        return dict(depth=c.depth, mults=c.depth_mults, blocks=c.residual_blocks, units=c.units, act=c.act,
                    conv_act=c.conv_act, norm=c.norm)  # fmt: skip

    def make_encoder(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[nn.Module, nn.Module, int]:
        """Encoder, projection of what it returns, and the size E of an embedding."""
        encoder = Encoder(shapes, layers=self.config.encoder_layers, **self.vision)
        size = self.config.embed_size or encoder.out_size
        return encoder, linear(encoder.out_size, size) if self.config.embed_size else nn.Identity(), size

    @property
    def rssm_options(self) -> dict[str, Any]:
        """Arguments of an `RSSM` beside its inputs' sizes."""
        c = self.config
        return dict(deter_size=c.deter_size, stoch_size=c.stoch_size, classes=c.classes, hidden_size=c.hidden_size,
                    cell=c.cell, blocks=c.blocks, unimix=c.unimix, initial=c.initial)  # fmt: skip

    def make_rssm(self, embed_size: int, action_size: int) -> nn.Module:
        """The recurrent state-space model."""
        return RSSM(embed_size, action_size, **self.rssm_options)

    def make_decoder(self, shapes: Mapping[str, tuple[int, ...]]) -> nn.Module:
        """Features to a distribution per observation."""
        c = self.config
        return Decoder(self.rssm.feature_size, shapes, layers=c.decoder_layers, l1=c.l1_coeff, **self.vision)

    def make_head(self, make: Callable[[int], nn.Module]) -> nn.Module:
        """A head that reads features; `make` builds it for features of a given size."""
        return make(self.rssm.feature_size)

    def make_reward(self) -> nn.Module:
        """Features to a distribution over rewards."""
        c = self.config
        return self.make_head(lambda size: TwoHotHead(size, c.units, c.reward_layers, c.act, c.norm))

    def make_cont(self) -> nn.Module:
        """Features to a distribution whose mean is the discount times the chance to go on."""
        c = self.config
        return self.make_head(lambda size: BernoulliHead(size, c.units, c.continue_layers, c.act, c.norm))

    # -----------------------------------------------------------------------------------------------------------------

    def embed(self, observation: Batch) -> Tensor:
        """Observations (..., *shape) to embeddings (..., E)."""
        return self.project(self.encoder(observation))

    def encode(self, batch: Batch, state: State | None, generator: torch.Generator | None) -> Encoded:
        """Embeddings of a batch with is_first that follows `state` (B, ...)."""
        return Encoded(self.embed(batch))

    def encode_replayed(self, batch: Batch, state: State | None, generator: torch.Generator | None) -> Encoded:
        """As `encode`, of a batch to learn from."""
        return self.encode(batch, state, generator)

    def observation_losses(
        self, encoded: Encoded, post: State, feature: Tensor, batch: Batch, generator: torch.Generator | None
    ) -> dict[str, Tensor]:
        """What posterior states are taught of what was seen: losses (T, B) by name; `feature` (T, B, F) is theirs."""
        return self.reconstruction(feature, batch)

    def reconstruction(self, feature: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Losses (T, B) of the decoder by observation."""
        decoded = self.decoder(feature)
        return {name: decoded[name].loss(self.target(batch[name])) for name in self.names if name in decoded}

    def encoder_losses(self, encoded: Encoded, batch: Batch) -> dict[str, Tensor]:
        """What the encoder is taught of itself: losses (T, B) by name."""
        return {}

    def filter(self, batch: Batch, state: State | None = None, generator: torch.Generator | None = None) -> State:
        """Posterior states (T, B, ...) of a batch: observations (T, B, *shape), action (T, B, A), is_first (T, B)."""
        return self._filter(self.encode(batch, state, generator), batch, state, generator)

    def _filter(self, encoded: Encoded, batch: Batch, state: State | None, generator: torch.Generator | None) -> State:
        post = self.rssm.filter(encoded.embed, batch["action"], batch["is_first"], state, generator=generator)
        return replace(post, slots=encoded.carry)

    def kl(self, post: State, prior: State, free_nats: float) -> tuple[Tensor, Tensor]:
        """`balanced_kl` of all latent variables: each (T, B)."""
        return balanced_kl(post, prior, free_nats, self.config.unimix)

    @property
    def latent_spec(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype of a state as a replay keeps it: bfloat16 deter, and class indices for categorical stoch."""
        c = self.config
        index = "uint8" if c.classes <= 256 else "int16"
        return {"deter": ((c.deter_size,), "bfloat16"), "stoch": ((c.stoch_size,), index if c.classes else "bfloat16")}

    @torch.no_grad()
    def pack(self, state: State) -> dict[str, Tensor]:
        """States (..., D) and (..., S, C) or (..., S) as `latent_spec` says: deter (..., D) and stoch (..., S)."""
        stoch = state.stoch.argmax(-1) if self.config.classes else state.stoch
        values = {"deter": state.deter, "stoch": stoch, "slots": state.slots}
        return {name: values[name].to(getattr(torch, dtype)) for name, (_, dtype) in self.latent_spec.items()}

    def unpack(self, latents: Batch) -> State:
        """The inverse of `pack`, up to the rounding; without the statistics, which are not kept."""
        dtype = next(self.rssm.parameters()).dtype
        stoch = F.one_hot(latents["stoch"].long(), self.config.classes) if self.config.classes else latents["stoch"]
        slots = latents["slots"].to(dtype) if "slots" in self.latent_spec else None
        return State(latents["deter"].to(dtype), stoch.to(dtype), slots=slots)

    @torch.no_grad()
    def replay_context(self, batch: Batch, generator: torch.Generator | None = None) -> tuple[Batch, State | None]:
        """Split a batch into what is learned from, (T, B, ...), and the state (B, ...) before it.

        With latents, the batch holds K = `config.replay_context` more steps at its beginning: the latent stored with
        the first is the state there, and the others are filtered from it. Without, the state is the initial one, None.
        """
        K = self.config.replay_context
        if not K or "deter" not in batch:
            return batch, None
        state = self.unpack({name: batch[name][0] for name in self.latent_spec})
        if K > 1:
            context = {name: batch[name][1:K] for name in (*self.names, "action", "is_first")}
            state = self.filter(context, state, generator)[-1]
        return {name: value[K:] for name, value in batch.items()}, state

    def loss(
        self, batch: Batch, generator: torch.Generator | None = None, state: State | None = None
    ) -> WorldModelOutput:
        """Losses of a replayed batch.

        batch: observations (T, B, *shape), action (T, B, A), reward (T, B), is_first and is_terminal (T, B) bool.
        state: the state (B, ...) before it; None is the initial one.
        The continuation target carries the discount, so imagination multiplies by the predicted continuation alone.
        """
        c = self.config
        encoded = self.encode_replayed(batch, state, generator)
        post = self._filter(encoded, batch, state, generator)
        prior = self.rssm.prior_at(post)
        dynamics, representation = self.kl(post, prior, c.free_nats)
        feature = post.feature
        observed = self.observation_losses(encoded, post, feature, batch, generator)
        target = c.discount * (~batch["is_terminal"]).to(feature.dtype)
        losses = {
            "dynamics": dynamics,
            "representation": representation,
            "reward": self.reward(feature).loss(batch["reward"]),
            "continue": self.cont(feature).loss(target),
            **observed,
            **self.encoder_losses(encoded, batch),
        }
        with torch.no_grad():
            metrics = {"kl": self.kl(post, prior, 0.0)[0].mean()}
        return WorldModelOutput(losses, post, metrics)

    @staticmethod
    def target(observation: Tensor) -> Tensor:
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
    def open_loop_feature(self, batch: Batch, context: int, generator: torch.Generator | None = None) -> Tensor:
        """Features (T, B, F): filtered for `context` steps of a batch, then imagined from its actions alone."""
        seen = {name: batch[name][:context] for name in (*self.names, "action", "is_first")}
        post = self.filter(seen, generator=generator)
        prior = self.rssm.imagine(batch["action"][context:], post[-1], generator=generator)
        return torch.cat([post.feature, prior.feature])

    @torch.no_grad()
    def open_loop(self, batch: Batch, context: int, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Predictions (T, B, *shape) of every observation at the states of `open_loop_feature`."""
        decoded = self.decoder(self.open_loop_feature(batch, context, generator))
        return {name: distribution.mode for name, distribution in decoded.items()}
