"""Encoders and decoders for pictures of 5×5 to 128×128, for vectors, and for dicts of both.

Pictures are (..., C, H, W) uint8, or float in [0, 1]; vectors are (..., N) and pass through symlog. A picture is halved
by strided convolutions until its shorter side would fall below 4; a picture too small to halve keeps its size and gets
stride-1 convolutions. Decoders mirror the sizes of their encoder exactly, odd ones too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from phyxdream.errors import ConfigError
from phyxdream.nn.distributions import SquaredError
from phyxdream.nn.layers import MLP, init_, linear, norm_act, symlog

Shapes = Mapping[str, tuple[int, ...]]
SMALLEST, LARGEST = 5, 128


def check_image(name: str, shape: tuple[int, ...]) -> None:
    """Raise `ConfigError` unless (C, H, W) is a picture these nets take."""
    if len(shape) != 3 or not all(SMALLEST <= side <= LARGEST for side in shape[1:]):
        raise ConfigError(
            f"observation {name!r}: pictures of {SMALLEST}x{SMALLEST} to {LARGEST}x{LARGEST} as (C, H, W) are "
            f"supported, got {tuple(shape)}; set image_size to have it resized"
        )


def pyramid(height: int, width: int) -> list[tuple[int, int]]:
    """Sizes from the full picture down: each stage halves (rounding up) while the shorter side stays at least 4."""
    sizes = [(height, width)]
    while min(sizes[-1]) // 2 >= 4:
        sizes.append(tuple(math.ceil(s / 2) for s in sizes[-1]))
    return sizes


class ChannelNormAct(nn.Module):
    """act(norm(x)), every pixel normalised over its channels. With channels-last memory the permuted view is free."""

    def __init__(self, norm_: str, channels: int, act: str):
        super().__init__()
        self.norm, self.act = norm_act(norm_, channels, act)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    layer = nn.Conv2d(inputs, outputs, kernel, stride, padding=(kernel - 1) // 2)
    init_(layer.weight.data, inputs * kernel * kernel)
    nn.init.zeros_(layer.bias)
    return layer


def _upconv(inputs: int, outputs: int) -> nn.ConvTranspose2d:
    layer = nn.ConvTranspose2d(inputs, outputs, 4, 2, padding=1)
    init_(layer.weight.data, inputs * 4)  # every output pixel sees 2x2 of the 4x4 kernel
    nn.init.zeros_(layer.bias)
    return layer


class Residual(nn.Module):
    """x + conv(act(norm(conv(act(norm(x)))))), 3x3."""

    def __init__(self, channels: int, act: str, norm_: str):
        super().__init__()
        self.body = nn.Sequential(
            ChannelNormAct(norm_, channels, act), conv(channels, channels, 3),
            ChannelNormAct(norm_, channels, act), conv(channels, channels, 3),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def _channels(depth: int, mults: tuple[int, ...], stages: int) -> list[int]:
    """Width of each stage; the last multiplier repeats for taller pyramids, and a single stage takes the last."""
    if stages == 1:
        return [depth * mults[-1]]
    return [depth * mults[min(i, len(mults) - 1)] for i in range(stages)]


class ImageEncoder(nn.Module):
    """(N, C, H, W) in [0, 1] to (N, out_size)."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        depth: int = 32,
        mults: tuple[int, ...] = (1, 2, 4, 8),
        blocks: int = 0,
        act: str = "silu",
        norm: str = "rms",
    ):
        super().__init__()
        channels_in, height, width = shape
        sizes = pyramid(height, width)
        stages = max(1, len(sizes) - 1)
        layers: list[nn.Module] = []
        for channels in _channels(depth, mults, stages):
            kernel, stride = (4, 2) if len(sizes) > 1 else (3, 1)
            layers += [_Halve(channels_in, channels) if stride == 2 else conv(channels_in, channels, kernel)]
            layers += [ChannelNormAct(norm, channels, act)]
            layers += [Residual(channels, act, norm) for _ in range(blocks)]
            channels_in = channels
        self.net = nn.Sequential(*layers)
        self.out_size = channels_in * math.prod(sizes[-1])

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.contiguous(memory_format=torch.channels_last)).flatten(1)


class _Halve(nn.Module):
    """4x4 convolution of stride 2 with out = ceil(in / 2) for odd sides too."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.conv = conv(inputs, outputs, 4, 2)

    def forward(self, x: Tensor) -> Tensor:
        odd_h, odd_w = x.shape[-2] % 2, x.shape[-1] % 2
        if odd_h or odd_w:
            x = nn.functional.pad(x, (0, odd_w, 0, odd_h))
        return self.conv(x)


class ImageDecoder(nn.Module):
    """(N, inputs) to (N, C, H, W) in [0, 1], through the encoder's sizes backwards."""

    def __init__(
        self,
        inputs: int,
        shape: tuple[int, int, int],
        depth: int = 32,
        mults: tuple[int, ...] = (1, 2, 4, 8),
        blocks: int = 0,
        act: str = "silu",
        norm: str = "rms",
    ):
        super().__init__()
        channels_out, height, width = shape
        self.sizes = pyramid(height, width)[::-1]
        widths = _channels(depth, mults, max(1, len(self.sizes) - 1))[::-1]
        self.first = (widths[0], *self.sizes[0])
        self.inp = nn.Sequential(linear(inputs, math.prod(self.first)))
        self.first_norm = ChannelNormAct(norm, widths[0], act)
        self.stages = nn.ModuleList()
        for i, channels in enumerate(widths):
            last = i == len(widths) - 1
            out = channels_out if last else widths[i + 1]
            body = [Residual(channels, act, norm) for _ in range(blocks)]
            body += [_upconv(channels, out) if len(self.sizes) > 1 else conv(channels, out, 3)]
            body += [] if last else [ChannelNormAct(norm, out, act)]
            self.stages.append(nn.Sequential(*body))

    def forward(self, x: Tensor) -> Tensor:
        c, h, w = self.first
        # Unflattened as channels-last, the layout the convolutions want.
        x = self.inp(x).view(-1, h, w, c).permute(0, 3, 1, 2)
        x = self.first_norm(x)
        for stage, (h, w) in zip(self.stages, self.sizes[1:] or self.sizes, strict=True):
            x = stage(x)[..., :h, :w]
        return torch.sigmoid(x)


def split_shapes(shapes: Shapes) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """Observations sorted by name into pictures (3 axes) and vectors (1 axis); `ConfigError` for anything else."""
    images, vectors = {}, {}
    for name, shape in sorted(shapes.items()):
        if len(shape) == 3:
            check_image(name, shape)
            images[name] = tuple(shape)
        elif len(shape) == 1:
            vectors[name] = tuple(shape)
        else:
            raise ConfigError(f"observation {name!r}: expected (C, H, W) or (N,), got shape {tuple(shape)}")
    if not images and not vectors:
        raise ConfigError("observations: expected at least one picture or vector, got none")
    return images, vectors


def image_groups(images: Shapes) -> dict[tuple[int, int], list[str]]:
    """Pictures of one size share a net, stacked over channels: several cameras cost one pass."""
    groups: dict[tuple[int, int], list[str]] = {}
    for name, shape in images.items():
        groups.setdefault(shape[1:], []).append(name)
    return groups


class Encoder(nn.Module):
    """A dict of observations (..., *shape) to one embedding (..., out_size): pictures through convolutions, vectors
    through symlog and an MLP, concatenated. `conv_act` is the activation of convolutions, where it is not `act`."""

    def __init__(
        self,
        shapes: Shapes,
        depth: int = 32,
        mults: tuple[int, ...] = (1, 2, 4, 8),
        blocks: int = 0,
        units: int = 512,
        layers: int = 3,
        act: str = "silu",
        norm: str = "rms",
        conv_act: str | None = None,
    ):
        super().__init__()
        images, vectors = split_shapes(shapes)
        conv_act = conv_act or act
        self.groups, self.vectors = list(image_groups(images).values()), list(vectors)
        self.image_nets = nn.ModuleList(
            ImageEncoder(
                (sum(images[n][0] for n in names), *images[names[0]][1:]), depth, mults, blocks, conv_act, norm
            )
            for names in self.groups
        )
        self.vector_net = MLP(sum(s[0] for s in vectors.values()), units, layers, act, norm) if vectors else None
        self.out_size = sum(net.out_size for net in self.image_nets) + (units if vectors else 0)

    def forward(self, observation: Mapping[str, Tensor]) -> Tensor:
        parts = []
        for names, net in zip(self.groups, self.image_nets, strict=True):
            image = torch.cat([as_float_image(observation[n]) for n in names], -3)
            parts.append(net(image.flatten(0, -4)).view(*image.shape[:-3], -1))
        if self.vector_net is not None:
            dtype = next(self.vector_net.parameters()).dtype
            vector = torch.cat([observation[n].to(dtype) for n in self.vectors], -1)
            parts.append(self.vector_net(symlog(vector)))
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


class Decoder(nn.Module):
    """A feature (..., F) to a distribution per observation: `SquaredError` on [0, 1] pictures and symlog vectors.
    `l1` is the λ of the pictures' absolute error; `conv_act` as for `Encoder`."""

    def __init__(
        self,
        inputs: int,
        shapes: Shapes,
        depth: int = 32,
        mults: tuple[int, ...] = (1, 2, 4, 8),
        blocks: int = 0,
        units: int = 512,
        layers: int = 3,
        act: str = "silu",
        norm: str = "rms",
        l1: float = 0.0,
        conv_act: str | None = None,
    ):
        super().__init__()
        images, vectors = split_shapes(shapes)
        self.l1, conv_act = l1, conv_act or act
        self.groups = list(image_groups(images).values())
        self.image_channels = [[images[n][0] for n in names] for names in self.groups]
        self.vectors = {n: s[0] for n, s in vectors.items()}
        self.image_nets = nn.ModuleList(
            ImageDecoder(inputs, (sum(channels), *images[names[0]][1:]), depth, mults, blocks, conv_act, norm)
            for names, channels in zip(self.groups, self.image_channels, strict=True)
        )
        self.vector_net = None
        if vectors:
            mlp = MLP(inputs, units, layers, act, norm)
            self.vector_net = nn.Sequential(mlp, linear(mlp.out_size, sum(self.vectors.values())))

    def forward(self, feature: Tensor) -> dict[str, SquaredError]:
        out = {}
        for names, channels, net in zip(self.groups, self.image_channels, self.image_nets, strict=True):
            image = net(feature.flatten(0, -2)).unflatten(0, feature.shape[:-1])
            parts = image.split(channels, -3)
            out |= {n: SquaredError(p, event_dims=3, l1=self.l1) for n, p in zip(names, parts, strict=True)}
        if self.vector_net is not None:
            parts = self.vector_net(feature).split(list(self.vectors.values()), -1)
            out |= {n: SquaredError(p, 1, symlog_space=True) for n, p in zip(self.vectors, parts, strict=True)}
        return out


def as_float_image(image: Tensor) -> Tensor:
    """uint8 pictures as float in [0, 1]; float pictures as they are."""
    return image.float() / 255 if image.dtype == torch.uint8 else image
