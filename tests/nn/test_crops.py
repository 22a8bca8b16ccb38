"""Random crops: windows by hand, and what is drawn."""

import pytest
import torch

from phyxdream.errors import ConfigError
from phyxdream.nn import Crops
from phyxdream.nn.crops import window


def grid(side, T=1, B=1):
    """Pictures (T, B, 1, side, side) whose pixels say where they are: 10 · row + column."""
    index = torch.arange(side)
    return (10 * index[:, None] + index).expand(T, B, 1, side, side)


def moves(*rows):
    return torch.tensor(rows).unsqueeze(-1)


def test_windows_by_hand():
    found = window(grid(3), moves([1]), moves([-1]))
    assert found[0, 0, 0].tolist() == [[10, 10, 11], [20, 20, 21], [20, 20, 21]]
    found = window(grid(4), moves([1]), moves([-1]), margin=1)
    assert found[0, 0, 0].tolist() == [[20, 21], [30, 31]]
    # Two steps of two sequences, each with a window of its own; then one for both steps.
    down, right = moves([0, 1], [-1, 0]), moves([1, 0], [0, -1])
    found = window(grid(4, 2, 2), down, right, margin=1)[:, :, 0, 0, 0]
    assert found.tolist() == [[12, 21], [1, 10]]
    found = window(grid(4, 2, 2), moves([0, 1]), moves([1, -1]), margin=1)[:, :, 0, 0, 0]
    assert found.tolist() == [[12, 20], [12, 20]]


def test_channels_and_dtypes_stay_together():
    picture = torch.randint(0, 256, (2, 3, 3, 6, 5), dtype=torch.uint8)
    found = window(picture, torch.ones(1, 3, 1, dtype=torch.long), torch.zeros(1, 3, 1, dtype=torch.long))
    assert found.dtype == torch.uint8
    torch.testing.assert_close(found[..., :-1, :], picture[..., 1:, :], rtol=0, atol=0)


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_what_is_drawn(padding, shared):
    """Every shift within reach is, of each sequence (or step) by itself; vectors stay as they are."""
    crops = Crops({"image": (1, 12, 12), "state": (2,)}, 2, padding, shared)
    side = 12 if padding else 8
    assert crops.shapes == {"image": (1, side, side), "state": (2,)}
    batch = {"image": grid(12, 4, 500), "state": torch.randn(4, 500, 2)}
    found = crops.random(batch, torch.Generator().manual_seed(0))
    assert found["state"] is batch["state"] and found["image"].shape == (4, 500, 1, side, side)
    # A pixel in the middle tells the shift, whatever happens at the edges.
    shift = found["image"][:, :, 0, 4, 4] - crops.centre(batch)["image"][:, :, 0, 4, 4]
    reached = {10 * y + x for y in range(-2, 3) for x in range(-2, 3)}
    assert set(shift.flatten().tolist()) == reached
    assert bool((shift == shift[0]).all()) is shared
    again = crops.random(batch, torch.Generator().manual_seed(1))
    assert not torch.equal(again["image"], found["image"])


def test_the_centre():
    picture = torch.randn(7, 3, 10, 9)
    for padding, expected in ((True, picture), (False, picture[..., 2:8, 2:7])):
        crops = Crops({"image": (3, 10, 9)}, 2, padding)
        torch.testing.assert_close(crops.centre({"image": picture})["image"], expected, rtol=0, atol=0)
    batch = {"image": grid(9)}
    assert Crops({"image": (1, 9, 9)}, 0).random(batch)["image"] is batch["image"]


def test_crops_that_hide_too_much_are_refused():
    Crops({"image": (1, 10, 9), "state": (2,)}, 2)
    with pytest.raises(ConfigError, match=r"crop_pixels: .*quarter.*'image'.*\(1, 10, 8\), got 2"):
        Crops({"image": (1, 10, 8)}, 2)
