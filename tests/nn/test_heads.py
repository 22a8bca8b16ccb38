"""Heads and layers: shapes, starting points, bounds, and the actors' parameterisations."""

import math

import pytest
import torch
from torch.nn import functional as F

from phyxdream import nn
from phyxdream.errors import ConfigError
from phyxdream.nn.layers import linear, norm

FEATURE = 6


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def features(*leading):
    return torch.randn(*leading, FEATURE)


def test_two_hot_head_starts_at_zero_and_learns():
    head = nn.TwoHotHead(FEATURE, 16, 2)
    feature = features(5, 3)
    out = head(feature)
    assert out.mode.shape == (5, 3)
    assert not out.mode.any()
    assert out.loss(torch.zeros(5, 3)).flatten().tolist() == pytest.approx([math.log(255)] * 15)
    assert "bins" not in head.state_dict()
    target = torch.linspace(-10, 10, 15).view(5, 3)
    optimizer = torch.optim.Adam(head.parameters(), 0.02)
    for _ in range(150):
        optimizer.zero_grad()
        head(feature).loss(target).mean().backward()
        optimizer.step()
    assert (head(feature).mode - target).abs().max() < 1.0


def test_shapes():
    assert nn.BernoulliHead(FEATURE, 8, 1)(features(4, 2)).mean.shape == (4, 2)
    scalar = nn.ScalarHead(FEATURE, 8, 2)(features(4, 2))
    assert scalar.mode.shape == (4, 2)
    torch.testing.assert_close(scalar.loss(scalar.mean + 2), torch.full((4, 2), 2.0))
    for dist in ("categorical", "bounded_normal", "tanh_normal"):
        policy = nn.Actor(FEATURE, 3, 8, 2, dist)(features(4, 2))
        action = policy.sample()
        assert action.shape == (4, 2, 3)
        assert policy.mode.shape == (4, 2, 3)
        assert policy.log_prob(action).shape == (4, 2)
        assert policy.entropy().shape == (4, 2)


def test_categorical_actor_starts_near_uniform_and_keeps_the_floor():
    actor = nn.Actor(FEATURE, 4, 32, 2, "categorical", unimix=0.04)
    probs = actor(features(100)).probs
    assert (probs - 0.25).abs().max() < 0.05
    torch.nn.init.normal_(actor.out.weight, std=100)
    assert actor(features(100)).probs.min().item() == pytest.approx(0.01, rel=1e-4)


def test_bounded_normal_actor():
    """mean tanh(m); std (max − min)·σ(s + 2) + min, within its bounds whatever the network says."""
    actor = nn.Actor(FEATURE, 2, 32, 2, "bounded_normal", min_std=0.1, max_std=1.0)
    feature = features(200)
    m, s = actor.out(actor.mlp(feature)).chunk(2, -1)
    policy = actor(feature)
    torch.testing.assert_close(policy.mean, torch.tanh(m))
    torch.testing.assert_close(policy.std, 0.9 / (1 + torch.exp(-s - 2)) + 0.1)
    assert policy.mean.abs().max() < 0.1  # a first policy has no opinion
    torch.nn.init.normal_(actor.out.weight, std=100)
    policy = actor(feature)
    assert policy.mean.abs().max() <= 1
    assert policy.std.min() >= 0.1
    assert policy.std.max() <= 1.0
    assert policy.std.max() - policy.std.min() > 0.8


def test_tanh_normal_actor():
    """mean 5·tanh(m / 5), std softplus(s + softplus⁻¹(5)) + 1e-4: it starts at 5 (DreamerV1)."""
    actor = nn.Actor(FEATURE, 2, 32, 2, "tanh_normal", act="elu", norm="none")
    torch.nn.init.zeros_(actor.out.weight)
    policy = actor(features(1))
    torch.testing.assert_close(policy.base.std, torch.full((1, 2), 5 + 1e-4))
    torch.nn.init.normal_(actor.out.weight, std=3)
    feature = features(50)
    m, s = actor.out(actor.mlp(feature)).chunk(2, -1)
    policy = actor(feature)
    torch.testing.assert_close(policy.base.mean, 5 * torch.tanh(m / 5))
    torch.testing.assert_close(policy.base.std, F.softplus(s + math.log(math.expm1(5))) + 1e-4)


def test_every_parameter_learns():
    heads = (
        nn.BernoulliHead(FEATURE, 8, 1),
        nn.ScalarHead(FEATURE, 8, 2),
        nn.Actor(FEATURE, 3, 8, 2, "categorical"),
        nn.TwoHotHead(FEATURE, 8, 2, scale=1.0),
    )
    for head in heads:
        out = head(features(4))
        target = torch.rand(4)
        loss = -out.log_prob(out.mode) if isinstance(head, nn.Actor) else out.loss(target)
        loss.sum().backward()
        still = [n for n, p in head.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
        assert still == [], type(head).__name__


def test_unknown_names():
    with pytest.raises(ConfigError, match=r"dist: .*'bounded'.*did you mean 'bounded_normal'"):
        nn.Actor(FEATURE, 2, 8, 1, "bounded")
    with pytest.raises(ConfigError, match=r"act: .*'slu'.*did you mean 'silu'"):
        nn.MLP(FEATURE, 8, 1, "slu")
    with pytest.raises(ConfigError, match=r"norm: .*'rsm'"):
        nn.MLP(FEATURE, 8, 1, "silu", "rsm")


# -- Layers -----------------------------------------------------------------------------------------------------------


def test_block_linear_is_a_block_diagonal_matrix():
    layer = nn.BlockLinear(8, 12, 4)
    torch.nn.init.normal_(layer.bias)
    dense = torch.block_diag(*layer.weight)
    x = torch.randn(3, 2, 8)
    torch.testing.assert_close(layer(x), x @ dense + layer.bias)
    with pytest.raises(ConfigError, match=r"blocks: .*8 and 12.*3"):
        nn.BlockLinear(8, 12, 3)


def test_norms():
    x = 0.01 * torch.randn(5, 7)  # small, so that eps shows
    torch.testing.assert_close(norm("rms", 7)(x), x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-4))
    centred = x - x.mean(-1, keepdim=True)
    expected = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + 1e-3)
    torch.testing.assert_close(norm("layer", 7)(x), expected)
    assert torch.equal(norm("none", 7)(x), x)


def test_initialisation():
    """Variance scale² / fan-in, cut at two deviations of the normal before truncation; biases zero."""
    layer = linear(400, 300, scale=0.5)
    assert layer.weight.std().item() * 20 / 0.5 == pytest.approx(1, abs=0.02)
    assert layer.weight.abs().max().item() <= 2 * 0.5 / 20 / 0.8796
    assert not layer.bias.any()
    assert not linear(400, 300, scale=0).weight.any()
