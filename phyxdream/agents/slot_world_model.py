"""The world model whose vision is made of slots: encoder, decoder, and in mode `per_slot` a state for each slot."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from phyxdream.agents.world_model import Batch, Encoded, WorldModel
from phyxdream.errors import ConfigError
from phyxdream.nn.distributions import SlotMixture, SquaredError
from phyxdream.nn.heads import SlotHead
from phyxdream.nn.layers import linear, norm_act
from phyxdream.nn.rssm import State
from phyxdream.nn.slot_rssm import SlotRSSM
from phyxdream.nn.slot_vision import SlotDecoder, SlotEncoder
from phyxdream.nn.vision import Decoder, Encoder, as_float_image, image_groups, split_shapes

Shapes = Mapping[str, tuple[int, ...]]


@dataclass
class SlotExplanation:
    """What `SlotWorldModel.explain_slots` returns, of the first picture.

    Attributes:
        pictures: (T, B, K, C, H, W), what each slot paints.
        masks: (T, B, K, H, W), where; they sum to 1 over slots.
        attention: (S, B, K, h, w), of the encoder at the S steps it saw; it sums to 1 over slots.
    """

    pictures: Tensor
    masks: Tensor
    attention: Tensor


class SlotWorldModel(WorldModel):
    """`WorldModel` over slots of the pictures; vectors are encoded and decoded as there.

    In mode `embed` the slots, in their order, and the vectors' code are the embedding (T, B, E) of one RSSM. In mode
    `per_slot` each slot, with the vectors' code beside it, is the embedding of its own latent state: tensors of a state
    are (T, B, K, ...), and the KL is that of all slots together.

    Args:
        config: a resolved `DreamerConfig` with a `slot_mode`.
        shapes, action_size: as for `WorldModel`. Pictures must be of one size; several are stacked over channels.

    Raises:
        ConfigError: there are no pictures, or pictures of several sizes.
    """

    def make_encoder(self, shapes: Shapes) -> tuple[nn.Module, nn.Module, int]:
        c = self.config
        encoder = SlotObservationEncoder(
            shapes,
            SlotEncoder(
                _stacked(shapes), c.slots, c.slot_size, 2 * c.slot_size, c.slot_iterations, initial=c.slot_initial,
                recurrent=c.slot_recurrent, predictor=c.slot_predictor, depth=c.slot_depth, layers=c.slot_layers,
                stride=c.slot_stride, token_size=c.slot_size, act=c.act, norm=c.norm,
            ),
            layers=c.encoder_layers,
            **self.vision,
        )  # fmt: skip
        size = encoder.vector_size + (c.slot_size if self.per_slot else c.slots * c.slot_size)
        embed_size = c.embed_size or size
        return encoder, linear(size, embed_size) if c.embed_size else nn.Identity(), embed_size

    def make_rssm(self, embed_size: int, action_size: int) -> nn.Module:
        if not self.per_slot:
            return super().make_rssm(embed_size, action_size)
        c = self.config
        return SlotRSSM(c.slots, embed_size, action_size, c.slot_message_size, **self.rssm_options)

    def make_decoder(self, shapes: Shapes) -> nn.Module:
        c = self.config
        painter = SlotDecoder(
            c.slot_size, _stacked(shapes), c.slot_decoder_size, c.slot_decoder_layers, c.slot_patch, c.act, c.norm,
            c.l1_coeff,
        )  # fmt: skip
        _, vectors = split_shapes(shapes)
        vector_net = None
        if vectors:
            vector_net = self.make_head(lambda size: Decoder(size, vectors, layers=c.decoder_layers, **self.vision))
        slots = None if self.per_slot else c.slots
        return SlotObservationDecoder(self.rssm.feature_size, shapes, painter, vector_net, slots, c.slot_size, c.act,
                                      c.norm)  # fmt: skip

    def make_head(self, make: Callable[[int], nn.Module]) -> nn.Module:
        if not self.per_slot:
            return super().make_head(make)
        c = self.config
        return SlotHead(self.rssm.feature_size, c.units, make, c.act, c.norm)

    @property
    def per_slot(self) -> bool:
        """Whether every slot has a latent state of its own."""
        return self.config.slot_mode == "per_slot"

    # -----------------------------------------------------------------------------------------------------------------

    def embed(self, observation: Batch) -> Tensor:
        """Observations (T, B, *shape) of sequences that start anew to embeddings (T, B, E), or (T, B, K, E)."""
        return self.encode(observation, None, None).embed

    def encode(self, batch: Batch, state: State | None, generator: torch.Generator | None) -> Encoded:
        carry = None if state is None else state.slots
        slots, vector, carry, _ = self.encoder(batch, batch.get("is_first"), carry, generator)
        embed = slots if self.per_slot else slots.flatten(-2)
        if vector is not None:
            vector = vector.unsqueeze(-2).expand(*slots.shape[:-1], -1) if self.per_slot else vector
            embed = torch.cat([embed, vector], -1)
        return Encoded(self.project(embed), carry, slots)

    def encoder_losses(self, encoded: Encoded, batch: Batch) -> dict[str, Tensor]:
        """Pictures painted from the encoder's own slots. What reaches slots through the RSSM alone is too noisy for
        long to tell objects apart."""
        if not self.config.slot_coeff:
            return {}
        painted = self.decoder.paint(encoded.slots)
        return {"slots": sum(picture.loss(self.target(batch[name])) for name, picture in painted.items())}

    def loss_coeff(self, name: str) -> float:
        return self.config.slot_coeff if name == "slots" else super().loss_coeff(name)

    @torch.no_grad()
    def explain_slots(
        self, batch: Batch, context: int | None = None, generator: torch.Generator | None = None
    ) -> SlotExplanation:
        """What every slot paints, where, and what it attends to.

        Args:
            batch: observations (T, B, *shape), action (T, B, A), is_first (T, B).
            context: as for `open_loop_feature`; None: all steps are filtered.
            generator: draws the noise.
        """
        T = len(batch["action"])
        context = T if context is None else context
        generator = generator or torch.Generator(batch["action"].device).manual_seed(0)
        before = generator.get_state()
        seen = {name: batch[name][:context] for name in self.names}
        *_, attention = self.encoder(seen, batch["is_first"][:context], None, generator, return_attention=True)
        generator.set_state(before)  # the filter's slots start where these did
        if context < T:
            feature = self.open_loop_feature(batch, context, generator)
        else:
            feature = self.filter(batch, generator=generator).feature
        mixture = self.decoder(feature)[self.encoder.images[0]]
        size = self.encoder.slots.tokens.size
        return SlotExplanation(mixture.pictures, mixture.masks, attention.unflatten(-1, size))

    def kl(self, post: State, prior: State, free_nats: float) -> tuple[Tensor, Tensor]:
        if self.per_slot:
            post, prior = _together(post), _together(prior)
        return super().kl(post, prior, free_nats)

    @property
    def latent_spec(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """As for `WorldModel`; with a leading K for each slot, and what the encoder hands on if it does."""
        c, spec = self.config, super().latent_spec
        if self.per_slot:
            spec = {name: ((c.slots, *shape), dtype) for name, (shape, dtype) in spec.items()}
        if self.encoder.slots.carries:
            spec["slots"] = ((c.slots, c.slot_size), "bfloat16")
        return spec


class SlotObservationEncoder(nn.Module):
    """Sequences of observations to slots of their pictures and a code of their vectors.

    Args:
        shapes: observation shapes by name.
        slots: what the pictures, stacked over channels, go through.
        **vector: arguments of the vectors' `Encoder`.
    """

    def __init__(self, shapes: Shapes, slots: SlotEncoder, **vector):
        super().__init__()
        images, vectors = split_shapes(shapes)
        self.images, self.slots = list(images), slots
        self.vector_net = Encoder(vectors, **vector) if vectors else None
        self.vector_size = self.vector_net.out_size if vectors else 0

    def forward(
        self,
        observation: Batch,
        is_first: Tensor | None = None,
        carry: Tensor | None = None,
        generator: torch.Generator | None = None,
        return_attention: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """slots (T, B, K, D), vectors' code (T, B, V) or None, carry and attention as `SlotEncoder` returns them."""
        image = torch.cat([as_float_image(observation[name]) for name in self.images], -3)
        slots, carry, attention = self.slots(image, is_first, carry, None, generator, return_attention)
        vector = None if self.vector_net is None else self.vector_net(observation)
        return slots, vector, carry, attention


class SlotObservationDecoder(nn.Module):
    """Features to a distribution per observation, as `nn.Decoder`; pictures are `SlotMixture`s.

    Args:
        inputs: size F of a feature.
        shapes: observation shapes by name.
        painter: what slots become pictures by.
        vector_net: what features become vectors by, if there are any.
        slots: how many slots a feature (..., F) is turned into; None: features are (..., K, F), of a slot each.
        slot_size: D.
        act, norm: after the layer that makes slots of features.
    """

    def __init__(
        self,
        inputs: int,
        shapes: Shapes,
        painter: SlotDecoder,
        vector_net: nn.Module | None,
        slots: int | None,
        slot_size: int,
        act: str,
        norm: str,
    ):
        super().__init__()
        images, _ = split_shapes(shapes)
        self.channels = {name: shape[0] for name, shape in images.items()}
        self.slots, self.slot_size = slots, slot_size
        self.to_slots = linear(inputs, slot_size * (slots or 1))
        self.slots_act = nn.Sequential(*norm_act(norm, slot_size, act))
        self.painter, self.vector_net = painter, vector_net

    def forward(self, feature: Tensor) -> dict[str, SquaredError]:
        slots = self.to_slots(feature)
        if self.slots is not None:
            slots = slots.unflatten(-1, (self.slots, self.slot_size))
        out = self.paint(self.slots_act(slots))
        return out if self.vector_net is None else out | self.vector_net(feature)

    def paint(self, slots: Tensor) -> dict[str, SlotMixture]:
        """Slots (..., K, D) to a distribution per picture."""
        mixture = self.painter(slots)
        out, first = {}, 0
        for name, channels in self.channels.items():
            one = len(self.channels) == 1
            out[name] = mixture if one else mixture.channels(first, first + channels)
            first += channels
        return out


def _stacked(shapes: Shapes) -> tuple[int, int, int]:
    """The shape of all pictures, stacked over channels."""
    images, _ = split_shapes(shapes)
    groups = image_groups(images)
    if len(groups) != 1:
        got = ", ".join(f"{name} {shape}" for name, shape in images.items()) or "none"
        raise ConfigError(f"slot_mode: expected pictures, all of one size, got {got}; image_size makes them so")
    (size,) = groups
    return sum(shape[0] for shape in images.values()), *size


def _together(state: State) -> State:
    """The variables of all slots as those of one state: statistics (T, B, K, S, ...) to (T, B, K·S, ...)."""
    return replace(state, slots=None).map(lambda x: x.flatten(2, 3))
