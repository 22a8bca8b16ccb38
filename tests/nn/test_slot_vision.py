"""Pictures to slots and back: shapes, what permuting slots does, where slots start, the mixture and its loss."""

import pytest
import torch

from phyxdream import nn
from phyxdream.errors import ConfigError

T, B, K, D = 4, 3, 3, 8
SHAPE = (3, 9, 11)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def encoder(**options):
    tiny = dict(slots=K, slot_size=D, hidden_size=12, depth=4, layers=2, kernel=3, token_size=6)
    return nn.SlotEncoder(SHAPE, **(tiny | options))


def decoder(**options):
    return nn.SlotDecoder(D, SHAPE, **(dict(hidden_size=10, layers=1, patch=2) | options))


def pictures(*lead):
    return torch.rand(*lead, *SHAPE)


# -- Encoder ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "stride", "cells"), [((1, 5, 5), 1, 25), ((3, 9, 11), 2, 30), ((3, 16, 17), 4, 20)])
@pytest.mark.parametrize("kernel", [3, 5])
def test_a_token_per_cell(shape, stride, cells, kernel):
    tokens = nn.SlotTokens(shape, depth=4, layers=2, kernel=kernel, stride=stride, out_size=6)
    assert tokens(torch.rand(2, *shape)).shape == (2, cells, 6)
    assert tokens.size[0] * tokens.size[1] == cells


def test_positions_are_those_of_the_cells():
    position = nn.SoftPosition(2, 3, 5)
    grid = [[(x + 0.5) / 3, (y + 0.5) / 2, 1 - (x + 0.5) / 3, 1 - (y + 0.5) / 2] for y in range(2) for x in range(3)]
    torch.testing.assert_close(position(), position.project(torch.tensor(grid)))


@pytest.mark.parametrize("initial", ["gaussian", "learned"])
def test_slots_start_close_together_and_apart(initial):
    model = encoder(initial=initial, slots=64, slot_size=64).attention
    spread = model.initial_state(1, None if initial == "learned" else model.draw_noise(1))[0].std(0)
    assert spread.min() > 0.05 and spread.max() < 0.2


OPTIONS = [{}, dict(initial="learned"), dict(recurrent=True), dict(recurrent=True, predictor=True, initial="learned")]


@pytest.mark.parametrize("options", OPTIONS)
def test_shapes_of_a_sequence(options):
    model = encoder(**options)
    slots, carry, attention = model(pictures(T, B), torch.zeros(T, B, dtype=torch.bool))
    assert slots.shape == (T, B, K, D)
    assert attention.shape == (T, B, K, 99)
    torch.testing.assert_close(attention.sum(2), torch.ones(T, B, 99))
    assert (None if carry is None else carry.shape) == ((T, B, K, D) if model.carries else None)
    assert model.carries == (options != dict(initial="learned"))
    assert model(pictures(T, B), return_attention=False)[2] is None
    image = torch.randint(0, 256, (T, B, *SHAPE), dtype=torch.uint8)
    noise = model.draw_noise(T, B)
    torch.testing.assert_close(model(image, noise=noise)[0], model(image / 255, noise=noise)[0])


def test_one_draw_serves_a_sequence():
    """The same picture has the same slots all along a sequence, and others after a reset and in other sequences."""
    model = encoder()
    still = pictures(1, 1).expand(T, B, *SHAPE)
    is_first = torch.zeros(T, B, dtype=torch.bool)
    is_first[2, 1] = True
    noise = model.draw_noise(T, B)
    slots, carry, _ = model(still, is_first, noise=noise)
    expected = model.attention.initial_state(B, noise[0])
    for t in range(T):
        for b in range(B):
            if (t >= 2) and b == 1:
                torch.testing.assert_close(slots[t, b], slots[2, 1])
                torch.testing.assert_close(carry[t, b], model.attention.initial_state(1, noise[2, 1:2])[0])
            else:
                torch.testing.assert_close(slots[t, b], slots[0, b])
                torch.testing.assert_close(carry[t, b], expected[b])
    assert not torch.allclose(slots[0, 1], slots[2, 1])
    assert not torch.allclose(slots[0, 0], slots[0, 1])


def test_recurrent_slots_start_from_those_before():
    model = encoder(recurrent=True, predictor=True)
    image, noise = pictures(T, B), model.draw_noise(T, B)
    is_first = torch.zeros(T, B, dtype=torch.bool)
    is_first[2, 1] = True
    slots, carry, attention = model(image, is_first, noise=noise)
    assert carry is slots
    for b in range(B):
        before = None
        for t in range(T):
            tokens = model.tokens(image[t, b : b + 1])
            if before is None or is_first[t, b]:
                start = model.attention.initial_state(1, noise[t, b : b + 1])
                before, masks = model.attention(tokens, start)
            else:
                before, masks = model.attention(tokens, model.predictor(before), iterations=1)
            torch.testing.assert_close(slots[t, b], before[0])
            torch.testing.assert_close(attention[t, b], masks[0])


@pytest.mark.parametrize("options", OPTIONS)
def test_a_sequence_may_be_cut(options):
    model, image = encoder(**options), pictures(T, B)
    is_first = torch.zeros(T, B, dtype=torch.bool)
    is_first[0] = is_first[3, 2] = True
    noise = model.draw_noise(T, B)
    whole = model(image, is_first, noise=noise)[0]
    carry, parts = None, []
    for part in (slice(0, 1), slice(1, 2), slice(2, 4)):
        slots, handed, _ = model(image[part], is_first[part], carry, None if noise is None else noise[part])
        carry = None if handed is None else handed[-1]
        parts.append(slots)
    torch.testing.assert_close(torch.cat(parts), whole)


def test_noise_comes_from_the_generator():
    model, image = encoder(), pictures(T, B)
    first, second = (model(image, generator=torch.Generator().manual_seed(1))[0] for _ in range(2))
    assert torch.equal(first, second)
    noise = model.draw_noise(T, B, torch.Generator().manual_seed(1))
    assert torch.equal(model(image, noise=noise)[0], first)


# -- Decoder and mixture ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "patch"), [((3, 8, 8), 4), ((1, 5, 7), 4), ((4, 9, 11), 2), ((3, 6, 5), 1)])
def test_mixture(shape, patch):
    mixture = nn.SlotDecoder(D, shape, 10, 1, patch)(torch.randn(2, B, K, D))
    assert mixture.mode.shape == (2, B, *shape)
    assert mixture.masks.shape == (2, B, K, *shape[1:])
    assert mixture.pictures.shape == (2, B, K, *shape)
    torch.testing.assert_close(mixture.masks.sum(2), torch.ones(2, B, *shape[1:]))
    mixed = (mixture.masks.unsqueeze(3) * mixture.pictures).sum(2)
    torch.testing.assert_close(mixture.mode, mixed)


def test_the_order_of_slots_is_that_of_masks_and_changes_no_picture():
    model, slots, order = decoder(), torch.randn(B, K, D), torch.tensor([2, 0, 1])
    mixture, permuted = model(slots), model(slots[:, order])
    torch.testing.assert_close(permuted.mode, mixture.mode)
    torch.testing.assert_close(permuted.masks, mixture.masks[:, order])
    torch.testing.assert_close(permuted.pictures, mixture.pictures[:, order])


def test_patches_lie_where_they_belong():
    """A patch is a part of the picture, rows first: each pixel is where a loop puts it."""
    patches = torch.randn(2, K, 3, 2, 4, 5, 5)  # 3x2 patches of 5x5 pixels: colours and logits
    mixture = nn.SlotMixture(patches, (13, 10))
    assert mixture.mode.shape == (2, 3, 13, 10)
    for row, column in ((0, 0), (5, 2), (12, 9), (9, 6), (2, 8)):
        pixel = patches[:, :, row // 5, column // 5, :, row % 5, column % 5]  # (2, K, C + 1)
        torch.testing.assert_close(mixture.masks[:, :, row, column], pixel[..., 3].softmax(1))
        torch.testing.assert_close(mixture.pictures[:, :, :, row, column], pixel[..., :3])


def test_gradients_of_the_mixture():
    patches = torch.randn(2, K, 2, 1, 4, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: nn.SlotMixture(x, (3, 2)).mode, patches)
    mixture = nn.SlotMixture(patches, (3, 2))
    mixed = (mixture.masks.unsqueeze(2) * mixture.pictures).sum(1)
    weight = torch.randn_like(mixed)
    expected = torch.autograd.grad((mixed * weight).sum(), patches)
    torch.testing.assert_close(torch.autograd.grad((mixture.mode * weight).sum(), patches), expected)


def test_channels_share_the_masks():
    mixture = nn.SlotDecoder(D, (4, 8, 8))(torch.randn(B, K, D))
    part = mixture.channels(1, 4)
    torch.testing.assert_close(part.mode, mixture.mode[:, 1:4])
    torch.testing.assert_close(part.masks, mixture.masks)


@pytest.mark.parametrize("l1", [0.0, 0.3])
def test_loss(l1):
    mixture, image = decoder(l1=l1)(torch.randn(T, B, K, D)), pictures(T, B)
    error = mixture.mode - image
    torch.testing.assert_close(mixture.loss(image), (error**2 + l1 * error.abs()).sum((-1, -2, -3)))


# -- Autoencoder ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS)
def test_every_parameter_of_the_autoencoder_learns(options):
    model = nn.SlotAutoencoder(SHAPE, K, D, 12, depth=4, layers=2, **options)
    image = pictures(T, B)
    found = model(image)
    found.mixture.loss(image).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_single_pictures():
    model = nn.SlotAutoencoder(SHAPE, K, D, 12, depth=4, layers=2)
    image, noise = pictures(B), model.encoder.draw_noise(1, B)
    found = model(image, noise=noise, return_attention=True)
    assert found.slots.shape == (B, K, D)
    assert found.attention.shape == (B, K, 99)
    sequence = model(image[None], noise=noise)
    torch.testing.assert_close(sequence.mixture.mode[0], found.mixture.mode)
    assert sequence.attention is None


def test_bad_arguments():
    with pytest.raises(ConfigError, match=r"observation 'image'.*\(3, 4, 8\)"):
        nn.SlotAutoencoder((3, 4, 8))
    with pytest.raises(ConfigError, match="kernel: expected an odd number, got 4"):
        encoder(kernel=4)
    with pytest.raises(ConfigError, match="stride: expected at least 1, got 0"):
        encoder(stride=0)
    with pytest.raises(ConfigError, match="patch: expected at least 1, got 0"):
        decoder(patch=0)
    with pytest.raises(ConfigError, match="predictor: expected False"):
        encoder(predictor=True)
