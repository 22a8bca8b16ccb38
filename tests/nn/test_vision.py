"""Encoders and decoders: every size, every mix of observations, exact shapes."""

import itertools
import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from phyxdream import nn
from phyxdream.errors import ConfigError
from phyxdream.nn.vision import pyramid, split_shapes

SMALL = dict(depth=2, mults=(1, 2), units=8, layers=1)


def observations(shapes, leading=(2, 3), seed=0):
    g = torch.Generator().manual_seed(seed)
    return {
        name: torch.randint(0, 256, (*leading, *shape), generator=g, dtype=torch.uint8)
        if len(shape) == 3
        else 10 * torch.randn(*leading, *shape, generator=g)
        for name, shape in shapes.items()
    }


def round_trip(shapes, **options):
    """Encoder, decoder, and what they make of two random batches of shape (2, 3)."""
    torch.manual_seed(0)
    options = SMALL | options
    encoder, decoder = nn.Encoder(shapes, **options), nn.Decoder(6, shapes, **options)
    observation = observations(shapes)
    embed = encoder(observation)
    decoded = decoder(torch.randn(2, 3, 6))
    return encoder, decoder, observation, embed, decoded


def check(shapes, **options):
    encoder, decoder, observation, embed, decoded = round_trip(shapes, **options)
    assert embed.shape == (2, 3, encoder.out_size)
    assert torch.isfinite(embed).all()
    assert decoded.keys() == shapes.keys()
    loss = embed.square().sum()
    for name, shape in shapes.items():
        assert decoded[name].mode.shape == (2, 3, *shape), name
        target = observation[name] / 255 if len(shape) == 3 else observation[name]
        if len(shape) == 3:
            assert decoded[name].mode.min() >= 0
            assert decoded[name].mode.max() <= 1
        per_step = decoded[name].loss(target)
        assert per_step.shape == (2, 3)
        loss = loss + per_step.sum()
    loss.backward()
    for module in (encoder, decoder):
        still = [n for n, p in module.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
        assert still == []


sides = st.integers(5, 128)


@settings(max_examples=25, deadline=None)
@given(height=sides, width=sides, channels=st.sampled_from((1, 3)))
@example(5, 5, 3)
@example(128, 128, 3)
@example(5, 128, 1)
@example(128, 5, 3)
@example(7, 8, 1)
@example(9, 15, 3)
@example(127, 63, 1)
@example(64, 64, 3)
@example(10, 5, 1)
def test_any_size(height, width, channels):
    check({"image": (channels, height, width)})


@pytest.mark.parametrize("size", range(5, 129, 3))
def test_pyramids_halve_until_four(size):
    sizes = pyramid(size, 2 * size)
    assert sizes[0] == (size, 2 * size)
    assert all(b == (math.ceil(a[0] / 2), math.ceil(a[1] / 2)) for a, b in itertools.pairwise(sizes))
    assert min(sizes[-1]) >= 4
    assert min(sizes[-1]) // 2 < 4


@pytest.mark.parametrize(
    "shapes",
    [
        {"state": (7,)},
        {"a": (3,), "b": (1,), "c": (20,)},
        {"front": (3, 16, 16), "top": (1, 16, 16)},
        {"front": (3, 16, 16), "hand": (3, 9, 24), "wrist": (1, 16, 16)},
        {"z_image": (3, 11, 8), "a_state": (4,), "m_image": (1, 5, 5), "q": (2,)},
    ],
)
def test_dicts(shapes):
    check(shapes)


@pytest.mark.parametrize("options", [dict(blocks=2), dict(act="elu", norm="layer"), dict(norm="none"), dict(layers=3)])
def test_options(options):
    check({"image": (3, 12, 17), "state": (3,)}, **options)


def test_every_observation_reaches_the_embedding():
    shapes = {"front": (3, 16, 16), "hand": (3, 9, 24), "top": (1, 16, 16), "a": (3,), "b": (2,)}
    encoder, _, observation, embed, _ = round_trip(shapes)
    for name in shapes:
        changed = dict(observation)
        changed[name] = 255 - observation[name] if len(shapes[name]) == 3 else -observation[name]
        assert not torch.allclose(encoder(changed), embed), name


def test_cameras_keep_their_names():
    """Two cameras of one size share a net: each must come out under its own name, whatever the order given."""
    torch.manual_seed(0)
    shapes = {"b": (3, 8, 8), "a": (1, 8, 8)}
    decoder = nn.Decoder(4, shapes, **SMALL)
    optimizer = torch.optim.Adam(decoder.parameters(), 0.02)
    feature = torch.ones(1, 4)
    target = {"a": torch.full((1, 1, 8, 8), 0.9), "b": torch.full((1, 3, 8, 8), 0.1)}
    for _ in range(60):
        decoded = decoder(feature)
        loss = sum(decoded[n].loss(target[n]).sum() for n in shapes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert decoded["a"].mode.mean() > 0.7
    assert decoded["b"].mode.mean() < 0.3


def test_batch_entries_do_not_mix_and_leading_axes_do_not_matter():
    shapes = {"image": (3, 9, 12), "state": (4,)}
    encoder, decoder, observation, embed, _ = round_trip(shapes)
    one = encoder({n: x[1, 2:3] for n, x in observation.items()})
    torch.testing.assert_close(one, embed[1, 2:3], rtol=1e-4, atol=1e-5)
    feature = torch.randn(2, 3, 6)
    whole, single = decoder(feature), decoder(feature[1, 2:3])
    for name in shapes:
        torch.testing.assert_close(single[name].mode, whole[name].mode[1, 2:3], rtol=1e-4, atol=1e-5)


def test_uint8_and_float_pictures_agree():
    encoder, _, observation, embed, _ = round_trip({"image": (3, 10, 10)})
    torch.testing.assert_close(encoder({"image": observation["image"].float() / 255}), embed)


def test_vectors_pass_through_symlog():
    """Integer and double vectors are taken, and a million is no larger than ln(1 + 10⁶) to the net."""
    encoder, _, observation, embed, decoded = round_trip({"state": (5,)})
    x = observation["state"]
    squashed = torch.sign(x) * torch.log(1 + x.abs())
    torch.testing.assert_close(encoder.vector_net(squashed), embed)
    torch.testing.assert_close(encoder({"state": x.double()}), embed)
    target = torch.full((2, 3, 5), -1e6)
    raw = decoded["state"].prediction
    torch.testing.assert_close(decoded["state"].loss(target), (raw + math.log(1 + 1e6)).square().sum(-1))
    torch.testing.assert_close(decoded["state"].mode, torch.sign(raw) * (raw.abs().exp() - 1), rtol=1e-5, atol=1e-6)


def test_picture_loss_is_the_squared_error_summed_over_the_picture():
    _, _, observation, _, decoded = round_trip({"image": (3, 6, 5)})
    target = observation["image"] / 255
    expected = sum(
        (decoded["image"].mode[..., c, i, j] - target[..., c, i, j]) ** 2
        for c in range(3) for i in range(6) for j in range(5)
    )  # fmt: skip
    torch.testing.assert_close(decoded["image"].loss(target), expected)


@pytest.mark.parametrize("shape", [(3, 5, 5), (1, 10, 5), (3, 16, 16)])
def test_an_autoencoder_learns(shape):
    """160 Adam steps must explain most of four noise pictures and vectors: errors fall below a fifth."""
    torch.manual_seed(0)
    shapes = {"image": shape, "state": (3,)}
    options = dict(depth=8, mults=(1, 2), units=32, layers=1)
    encoder = nn.Encoder(shapes, **options)
    decoder = nn.Decoder(encoder.out_size, shapes, **options)
    data = {"image": torch.rand(4, *shape).round(), "state": 100 * torch.randn(4, 3)}
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], 5e-3)
    losses = []
    for _ in range(160):
        decoded = decoder(encoder(data))
        parts = torch.stack([decoded[n].loss(data[n]).mean() for n in shapes])
        optimizer.zero_grad()
        parts.sum().backward()
        optimizer.step()
        losses.append(parts.detach())
    assert (losses[-1] < 0.2 * losses[0]).all(), (losses[0], losses[-1])


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"image": (3, 4, 4)}, r"'image'.*5x5 to 128x128.*\(3, 4, 4\)"),
        ({"image": (3, 129, 129)}, r"'image'.*\(3, 129, 129\)"),
        ({"image": (3, 64, 4)}, r"'image'.*\(3, 64, 4\)"),
        ({"image": (64, 64)}, r"'image'.*\(64, 64\)"),
        ({"ok": (3,), "scalar": ()}, r"'scalar'.*\(\)"),
        ({"video": (4, 3, 64, 64)}, r"'video'.*\(4, 3, 64, 64\)"),
        ({}, r"at least one"),
    ],
)
def test_bad_shapes(shapes, message):
    with pytest.raises(ConfigError, match=message):
        split_shapes(shapes)
    with pytest.raises(ConfigError, match=message):
        nn.Encoder(shapes)
    with pytest.raises(ConfigError, match=message):
        nn.Decoder(4, shapes)


@pytest.mark.parametrize(("conv_act", "expected"), [(None, torch.nn.ELU), ("relu", torch.nn.ReLU)])
@pytest.mark.parametrize(("cls", "first"), [(nn.Encoder, ()), (nn.Decoder, (6,))])
def test_convolutions_may_have_an_activation_of_their_own(cls, first, conv_act, expected):
    net = cls(*first, {"image": (3, 16, 16), "state": (4,)}, **SMALL, act="elu", conv_act=conv_act)

    def activations(module):
        return {type(m) for m in module.modules()} & {torch.nn.ELU, torch.nn.ReLU, torch.nn.SiLU}

    assert activations(net.image_nets) == {expected}
    assert activations(net.vector_net) == {torch.nn.ELU}
