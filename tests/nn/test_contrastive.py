"""Telling observations apart, on numbers small enough to be done on paper."""

import math

import pytest
import torch
from torch import nn

from phyxdream.errors import ConfigError
from phyxdream.nn import Contrast


def column(*values):
    return torch.tensor(values).view(-1, 1, 1)


def test_gaussian_by_hand():
    """s = 0 and 2, μ(o) = 1 and 3: −½ (s − μ)² is −½ and −4½, and twice −½."""
    contrast = Contrast(1, 1, 4, "gaussian")
    contrast.key = nn.Identity()
    keys = contrast.keys(column(1.0, 3.0))
    expected = [0.5 + math.log(math.exp(-0.5) + math.exp(-4.5)), math.log(2)]
    torch.testing.assert_close(contrast(column(0.0, 2.0), keys).flatten(), torch.tensor(expected))


def test_gaussian_of_one_hot_states_is_log_linear_in_them():
    contrast = Contrast(4, 3, 8, "gaussian")
    state, keys = torch.eye(4), contrast.keys(torch.randn(5, 3))
    torch.testing.assert_close(contrast.logits(state, keys), (keys - 0.5 * keys.square().sum(-1, keepdim=True)).T)


def test_bilinear_by_hand():
    """s = 0 and 2, W = 2, o = 1 and 3: s W o is twice 0, and 4 and 12."""
    contrast = Contrast(1, 1, 4, "bilinear")
    with torch.no_grad():
        contrast.key.weight.fill_(2.0)
    loss = contrast(column(0.0, 2.0), contrast.keys(column(1.0, 3.0))).flatten()
    torch.testing.assert_close(loss, torch.tensor([math.log(2), math.log1p(math.exp(-8))]))


def test_cosine_by_hand():
    """Of (3, 0) with (2, 0) and (0, 5): 1 and 0, over 0.1."""
    contrast = Contrast(2, 2, 2, "cosine")
    with torch.no_grad():
        contrast.key.weight.copy_(torch.eye(2))
        contrast.query.weight.copy_(torch.eye(2))
    states, embeds = torch.tensor([[[3.0, 0.0]], [[3.0, 0.0]]]), torch.tensor([[[2.0, 0.0]], [[0.0, 5.0]]])
    loss = contrast(states, contrast.keys(embeds)).flatten()
    torch.testing.assert_close(loss, torch.tensor([math.log1p(math.exp(-10)), 10 + math.log1p(math.exp(-10))]))


@pytest.mark.parametrize("start", [0, 2])
@pytest.mark.parametrize("critic", ["gaussian", "bilinear", "cosine"])
def test_states_belong_to_the_last_steps_and_meet_every_frame(critic, start):
    """Those of other sequences too."""
    contrast = Contrast(4, 5, 6, critic)
    states, embeds = torch.randn(2, 3, 4), torch.randn(4, 5, 5)
    loss = contrast(states, contrast.keys(embeds), start)
    for t in range(2):
        for b in range(3):
            logits = contrast.logits(states[t, b][None], contrast.keys(embeds).reshape(20, -1))[0]
            own = logits[(t + 2) * 5 + start + b]
            torch.testing.assert_close(loss[t, b], logits.exp().sum().log() - own, rtol=1e-4, atol=1e-5)


def test_unknown_critics_are_refused():
    with pytest.raises(ConfigError, match=r"contrastive_critic: .*'bilinear'.*got 'bilinaer'; did you mean 'bilinear'"):
        Contrast(1, 1, 4, "bilinaer")
