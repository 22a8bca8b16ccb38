"""Pictures as slots: an encoder whose last layer is slot attention, a decoder that paints every slot on a canvas of its
own, and both together as an autoencoder.

    tokens  = MLP(LN(conv(picture) + position)), normalised over them    (N, H'·W', I)
    slots   = slot attention over the tokens                             (N, K, D)
    parts   = MLP(W slot + position), for every patch                    (N, K, H, W, C + 1)
    masks   = softmax over slots of the last channel     picture = Σ_k mask_k · colour_k

Sources: Locatello et al., "Object-Centric Learning with Slot Attention", 2020, for all but the decoder's layers; Kipf
et al., "Conditional Object-Centric Learning from Video", 2022, for slots that go on from frame to frame. Their decoder
is a stack of transposed convolutions for each slot, which is most of the work of a step. Here a slot meets the position
of each patch in a sum, of which the position's part is computed once for all pictures and slots, and dense layers turn
the sum into the patch: products of matrices, and nothing at full resolution but the answer. (Sines of the position, and
products of it with slots, fit given shapes in fewer steps. In the few short runs that compared them, masks then came to
follow regions rather than objects; those runs were too few to tell.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from phyxdream.errors import ConfigError
from phyxdream.nn.distributions import SlotMixture
from phyxdream.nn.layers import MLP, linear, norm_act
from phyxdream.nn.slots import SlotAttention, SlotTransformer
from phyxdream.nn.vision import ChannelNormAct, as_float_image, check_image, conv

TOKEN_EPS = 1e-4
# Slots that start far from each other by chance, and pictures painted loudly by a decoder that knows nothing yet, teach
# the decoder first of all not to listen to slots, from which it recovers after thousands of steps. So slots start close
# together, drawn or learned, queries tell them apart, and painting starts soft.
INITIAL_STD, QUERY_GAIN, PAINT_SCALE = 0.1, 4.0, 0.05


def grid(height: int, width: int) -> Tensor:
    """(height·width, 4): x, y, 1−x, 1−y of the middle of every cell, rows first, each in (0, 1)."""
    y, x = ((torch.arange(n) + 0.5) / n for n in (height, width))
    y, x = torch.meshgrid(y, x, indexing="ij")
    return torch.stack([x, y, 1 - x, 1 - y], -1).flatten(0, 1)


class SoftPosition(nn.Module):
    """Soft position embedding: (height·width, size), a linear map of x, y, 1−x and 1−y of every cell.

    >>> SoftPosition(4, 6, 8)().shape
    torch.Size([24, 8])
    """

    def __init__(self, height: int, width: int, size: int):
        super().__init__()
        self.project = linear(4, size)
        self.register_buffer("grid", grid(height, width), persistent=False)

    def forward(self) -> Tensor:
        return self.project(self.grid)


class SlotTokens(nn.Module):
    """Pictures (N, C, H, W) in [0, 1] to tokens (N, ceil(H / stride)·ceil(W / stride), out_size).

    Args:
        shape: (C, H, W).
        depth: channels of every convolution.
        layers: number of convolutions.
        kernel: their size, odd.
        stride: of the first convolution: 1 keeps the resolution, 2 makes all that follows four times cheaper.
        out_size: size I of a token.
        act, norm: after every convolution.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        depth: int = 32,
        layers: int = 4,
        kernel: int = 5,
        stride: int = 1,
        out_size: int = 64,
        act: str = "silu",
        norm: str = "rms",
    ):
        super().__init__()
        check_image("image", shape)
        for name, value in dict(depth=depth, layers=layers, stride=stride, out_size=out_size).items():
            if value < 1:
                raise ConfigError(f"{name}: expected at least 1, got {value}")
        if kernel % 2 == 0:
            raise ConfigError(f"kernel: expected an odd number, got {kernel}")
        channels, height, width = shape
        body: list[nn.Module] = []
        for i in range(layers):
            body += [conv(depth if i else channels, depth, kernel, 1 if i else stride)]
            body += [ChannelNormAct(norm, depth, act)]
        self.body = nn.Sequential(*body)
        # Padding by half of an odd kernel leaves ceil(side / stride) cells.
        self.size = math.ceil(height / stride), math.ceil(width / stride)
        self.position = SoftPosition(*self.size, depth)
        self.out = nn.Sequential(nn.LayerNorm(depth), linear(depth, out_size), nn.ReLU(), linear(out_size, out_size))

    def forward(self, image: Tensor) -> Tensor:
        x = self.body(image.contiguous(memory_format=torch.channels_last))
        x = self.out(x.permute(0, 2, 3, 1).flatten(1, 2) + self.position())
        # What all tokens of a picture have in common tells nothing apart, and would drown the little that differs.
        x = x - x.mean(1, keepdim=True)
        return x * torch.rsqrt(x.square().mean(1, keepdim=True) + TOKEN_EPS)


class SlotEncoder(nn.Module):
    """Sequences of pictures to sequences of slots.

    Without `recurrent`, the slots of every frame start where those of the sequence's first frame did: one draw for each
    sequence (or the learned slots), so that all frames go through slot attention in one call and a slot keeps its role.
    With it, slots start from those of the frame before, through a transformer block over the slots if there is a
    `predictor`; the first frame takes all iterations, each that follows one. Frames then follow each other.

    Args:
        shape: (C, H, W) of a picture.
        slots, slot_size, hidden_size, iterations, initial, implicit: as for `SlotAttention`.
        recurrent, predictor: see above.
        depth, layers, kernel, stride, token_size, act, norm: as for `SlotTokens`.

    Raises:
        ConfigError: a size is out of range, or a predictor is asked for without `recurrent`.

    Source: Locatello et al. 2020; Kipf et al. 2022 for `recurrent`.

    >>> encoder = SlotEncoder((3, 16, 16), slots=3, slot_size=8, stride=2)
    >>> slots, carry, attention = encoder(torch.rand(5, 2, 3, 16, 16))
    >>> slots.shape, attention.shape
    (torch.Size([5, 2, 3, 8]), torch.Size([5, 2, 3, 64]))
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        slots: int = 7,
        slot_size: int = 64,
        hidden_size: int = 128,
        iterations: int = 3,
        *,
        initial: str = "gaussian",
        implicit: bool = False,
        recurrent: bool = False,
        predictor: bool = False,
        depth: int = 32,
        layers: int = 4,
        kernel: int = 5,
        stride: int = 1,
        token_size: int = 64,
        act: str = "silu",
        norm: str = "rms",
    ):
        super().__init__()
        if predictor and not recurrent:
            raise ConfigError("predictor: expected False, since only recurrent slots go through it, got True")
        self.recurrent = recurrent
        self.tokens = SlotTokens(shape, depth, layers, kernel, stride, token_size, act, norm)
        self.attention = SlotAttention(
            slots, slot_size, token_size, hidden_size, iterations, initial=initial, implicit=implicit
        )
        with torch.no_grad():
            self.attention.to_q.weight.mul_(QUERY_GAIN)
            if initial == "gaussian":
                self.attention.initial_log_std.fill_(math.log(INITIAL_STD))
            else:
                self.attention.initial_slots.mul_(INITIAL_STD)
        self.predictor = SlotTransformer(slot_size, hidden_size=hidden_size) if predictor else None

    @property
    def carries(self) -> bool:
        """Whether a sequence that is cut must hand on where its slots start (see `forward`)."""
        return self.recurrent or self.attention.initial == "gaussian"

    def draw_noise(self, T: int, B: int, generator: torch.Generator | None = None) -> Tensor | None:
        """Standard normal noise (T, B, K, D) for `forward`; None for learned slots. A sequence uses that of the step
        where it starts."""
        if self.attention.initial == "learned":
            return None
        return self.attention.draw_noise(T * B, generator).unflatten(0, (T, B))

    def forward(
        self,
        image: Tensor,
        is_first: Tensor | None = None,
        carry: Tensor | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        return_attention: bool = True,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Slots of every frame.

        Args:
            image: (T, B, C, H, W), uint8 or float in [0, 1].
            is_first: (T, B) bool, where a sequence starts anew; None is at the first frame alone.
            carry: (B, K, D) of the frame before, as it was returned; None starts anew.
            noise: what `draw_noise(T, B)` returns; None draws it from `generator`.
            return_attention: whether the masks of the encoder are wanted.

        Returns:
            slots (T, B, K, D); carry (T, B, K, D), what a sequence that is cut after a frame hands on, or None if it
            `carries` nothing; attention (T, B, K, tokens) or None.
        """
        T, B = image.shape[:2]
        tokens = self.tokens(as_float_image(image.flatten(0, 1)))
        start = self._starts(T, B, noise, generator)
        if carry is None:
            fresh = torch.zeros(T, B, dtype=torch.bool, device=image.device)
            fresh[0] = True
            fresh = fresh if is_first is None else fresh | is_first
        else:
            fresh = torch.zeros(T, B, dtype=torch.bool, device=image.device) if is_first is None else is_first.bool()
        if self.recurrent:
            slots, attention = self._recur(tokens.unflatten(0, (T, B)), start, fresh, carry, return_attention)
            return slots, slots, attention
        if self.attention.initial == "gaussian":
            start = _hold(start, fresh, carry)
        slots, attention = self.attention(tokens, start.flatten(0, 1), return_attention=return_attention)
        attention = None if attention is None else attention.unflatten(0, (T, B))
        return slots.unflatten(0, (T, B)), start if self.carries else None, attention

    def _starts(self, T, B, noise, generator) -> Tensor:
        """Where slots start if a sequence starts at a step: (T, B, K, D)."""
        if noise is None:
            noise = self.draw_noise(T, B, generator)
        noise = None if noise is None else noise.flatten(0, 1)
        return self.attention.initial_state(T * B, noise).unflatten(0, (T, B))

    def _recur(self, tokens, start, fresh, carry, return_attention):
        slots, masks = [], []
        for t in range(tokens.shape[0]):
            if carry is None:
                now, attention = self.attention(tokens[t], start[t], return_attention=return_attention)
            else:
                going_on = carry if self.predictor is None else self.predictor(carry)
                now, attention = self.attention(tokens[t], going_on, iterations=1, return_attention=return_attention)
                # Both are computed where a sequence may start anew: which do is not known without waiting for them.
                anew, masks_anew = self.attention(tokens[t], start[t], return_attention=return_attention)
                which = fresh[t][:, None, None]
                now = torch.where(which, anew, now)
                attention = torch.where(which, masks_anew, attention) if return_attention else None
            carry = now
            slots.append(now)
            masks.append(attention)
        return torch.stack(slots), torch.stack(masks) if return_attention else None


def _hold(start: Tensor, fresh: Tensor, carry: Tensor | None) -> Tensor:
    """Of `start` (T, B, ...), what was in force last where `fresh` (T, B) was true; `carry` (B, ...) before that."""
    T, B = fresh.shape
    step = torch.arange(1, T + 1, device=fresh.device)[:, None]
    last = torch.where(fresh, step, 0).cummax(0).values  # 0: none yet
    before = start[:1] if carry is None else carry[None]
    return torch.cat([before, start])[last, torch.arange(B, device=fresh.device)]


class SlotDecoder(nn.Module):
    """Slots (..., K, D) to a `SlotMixture` over pictures (..., C, H, W).

    A patch of `patch`×`patch` pixels is what the dense layers make of a slot and the place of the patch. Cost grows
    with K·ceil(H / patch)·ceil(W / patch): smaller patches draw finer outlines.

    Args:
        slot_size: D.
        shape: (C, H, W).
        hidden_size: width of the layers.
        layers: how many there are between slot and position, and the patch.
        patch: side of a patch in pixels.
        act, norm: after every layer.
        l1: λ of the loss, see `SquaredError`.

    Raises:
        ConfigError: a size is out of range.

    >>> mixture = SlotDecoder(8, (3, 15, 17))(torch.randn(2, 5, 8))
    >>> mixture.mode.shape, mixture.masks.shape, mixture.pictures.shape
    (torch.Size([2, 3, 15, 17]), torch.Size([2, 5, 15, 17]), torch.Size([2, 5, 3, 15, 17]))
    """

    def __init__(
        self,
        slot_size: int,
        shape: tuple[int, int, int],
        hidden_size: int = 64,
        layers: int = 2,
        patch: int = 4,
        act: str = "silu",
        norm: str = "rms",
        l1: float = 0.0,
    ):
        super().__init__()
        check_image("image", shape)
        for name, value in dict(slot_size=slot_size, hidden_size=hidden_size, layers=layers, patch=patch).items():
            if value < 1:
                raise ConfigError(f"{name}: expected at least 1, got {value}")
        self.shape, self.patch, self.l1 = tuple(shape), patch, l1
        self.cells = math.ceil(shape[1] / patch), math.ceil(shape[2] / patch)
        self.from_slot = linear(slot_size, hidden_size)
        self.position = nn.Sequential(linear(4, hidden_size), nn.ReLU(), linear(hidden_size, hidden_size))
        self.register_buffer("grid", grid(*self.cells), persistent=False)
        self.first = nn.Sequential(*norm_act(norm, hidden_size, act))
        self.body = MLP(hidden_size, hidden_size, layers, act, norm)
        self.out = linear(hidden_size, patch * patch * (shape[0] + 1), scale=PAINT_SCALE)

    def forward(self, slots: Tensor) -> SlotMixture:
        x = self.first(self.from_slot(slots).unsqueeze(-2) + self.position(self.grid))  # (..., K, cells, hidden)
        parts = self.out(self.body(x))
        patches = parts.unflatten(-1, (-1, self.patch, self.patch)).unflatten(-4, self.cells)
        return SlotMixture(patches, self.shape[1:], self.l1)


@dataclass
class SlotPicture:
    """What `SlotAutoencoder` makes of pictures: `slots` (..., K, D); `attention` (..., K, tokens) of the encoder, or
    None; `mixture`, the picture painted from them, with its masks."""

    slots: Tensor
    attention: Tensor | None
    mixture: SlotMixture


class SlotAutoencoder(nn.Module):
    """Encoder, slot attention and decoder, to be trained on pictures alone.

    Args:
        shape: (C, H, W).
        slots, slot_size, hidden_size, iterations: of `SlotAttention`.
        l1: λ of the loss.
        decoder_size, decoder_layers, patch, decoder_act, decoder_norm: of `SlotDecoder`.
        **encoder: other arguments of `SlotEncoder`.

    >>> model = SlotAutoencoder((3, 32, 32), slots=5, slot_size=16)
    >>> image = torch.rand(2, 3, 32, 32)
    >>> found = model(image)
    >>> found.mixture.loss(image).shape, found.mixture.masks.shape
    (torch.Size([2]), torch.Size([2, 5, 32, 32]))
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        slots: int = 7,
        slot_size: int = 64,
        hidden_size: int = 128,
        iterations: int = 3,
        *,
        l1: float = 0.0,
        decoder_size: int = 64,
        decoder_layers: int = 2,
        patch: int = 4,
        decoder_act: str = "silu",
        decoder_norm: str = "rms",
        **encoder,
    ):
        super().__init__()
        self.encoder = SlotEncoder(shape, slots, slot_size, hidden_size, iterations, **encoder)
        self.decoder = SlotDecoder(slot_size, shape, decoder_size, decoder_layers, patch, decoder_act, decoder_norm, l1)

    def forward(
        self,
        image: Tensor,
        is_first: Tensor | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        return_attention: bool = False,
    ) -> SlotPicture:
        """Pictures (N, C, H, W), or sequences (T, B, C, H, W) of them with is_first (T, B); `noise` as
        `SlotEncoder.draw_noise` gives it, for single pictures with T = 1."""
        single = image.dim() == 4
        sequence = image.unsqueeze(0) if single else image
        slots, _, attention = self.encoder(sequence, is_first, None, noise, generator, return_attention)
        if single:
            slots, attention = slots[0], None if attention is None else attention[0]
        return SlotPicture(slots, attention, self.decoder(slots))
