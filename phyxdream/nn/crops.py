"""Random crops of pictures, on the device that the pictures are on."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from phyxdream.errors import ConfigError


class Crops:
    """Windows of the pictures of a sequence, moved at random; vectors stay as they are.

    Args:
        shapes: observation shapes by name, pictures (C, H, W) and vectors (N,).
        pixels: p, the farthest that a window is moved from the centre in each direction. 0 leaves pictures alone.
        padding: windows have the size of pictures, and where they reach beyond the edge its pixels are repeated.
            Without, they are 2p smaller: 64x64 of 72x72 for p = 4.
        shared: a sequence has one window for all of its steps; else each step draws one.

    Raises:
        ConfigError: half a picture or more may lie outside of its window.

    >>> crops = Crops({"image": (3, 72, 72)}, pixels=4, padding=False)
    >>> crops.shapes
    {'image': (3, 64, 64)}
    >>> crops.random({"image": torch.zeros(5, 2, 3, 72, 72)})["image"].shape
    torch.Size([5, 2, 3, 64, 64])
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], pixels: int, padding: bool = True, shared: bool = True):
        self.pixels, self.padding, self.shared = pixels, padding, shared
        self.margin = 0 if padding else pixels  # from the picture's edge to that of the window in the centre
        self.pictures = [name for name, shape in shapes.items() if len(shape) == 3] if pixels else []
        for name in self.pictures:
            if 4 * pixels >= min(shapes[name][1:]):
                raise ConfigError(f"crop_pixels: expected less than a quarter of the sides of {name!r}, which is "
                                  f"{shapes[name]}, got {pixels}")  # fmt: skip
        self.shapes = {name: self._shape(name, shape) for name, shape in shapes.items()}

    def _shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (shape[0], *(side - 2 * self.margin for side in shape[1:])) if name in self.pictures else shape

    def centre(self, observation: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Observations with the window in the centre of every picture (..., C, H, W)."""
        m, names = self.margin, self.pictures if self.margin else ()
        return {**observation, **{name: observation[name][..., m:-m, m:-m] for name in names}}

    def random(self, observation: Mapping[str, Tensor], generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Observations with a random window of every picture (T, B, C, H, W)."""
        return {**observation, **{name: self._random(observation[name], generator) for name in self.pictures}}

    def _random(self, picture: Tensor, generator: torch.Generator | None) -> Tensor:
        T, B = picture.shape[:2]
        shape = (2, 1 if self.shared else T, B, 1)
        shift = torch.randint(2 * self.pixels + 1, shape, generator=generator, device=picture.device) - self.pixels
        return window(picture, *shift, self.margin)


def window(picture: Tensor, down: Tensor, right: Tensor, margin: int = 0) -> Tensor:
    """Windows (T, B, C, H − 2·margin, W − 2·margin) of pictures (T, B, C, H, W), the edges of which are repeated
    outwards: moved by `down` and `right` pixels, integers (T or 1, B, 1), from the centre."""
    T, B, _, H, W = picture.shape
    rows, columns = (
        (move + torch.arange(margin, side - margin, device=picture.device)).clamp(0, side - 1)
        for move, side in ((down, H), (right, W))
    )
    step = torch.arange(T, device=picture.device).view(T, 1, 1, 1)
    sequence = torch.arange(B, device=picture.device).view(1, B, 1, 1)
    # Indices apart from each other put what they choose first: (T, B, H', W', C).
    return picture[step, sequence, :, rows.unsqueeze(-1), columns.unsqueeze(-2)].movedim(-1, 2)
