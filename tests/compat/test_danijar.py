"""Our RSSM behind the calls of DreamerV1 and V2."""

import torch

from phyxdream import nn
from phyxdream.compat import danijar

B, T, E, A = 3, 5, 7, 2


def same(found, expected):
    for key, x in found.items():
        torch.testing.assert_close(x, getattr(expected, "logits" if key == "logit" else key).transpose(0, 1))


def test_v1():
    rssm = nn.RSSM(E, A, deter_size=16, stoch_size=4, classes=0, hidden_size=12, cell="gru")
    calls = danijar.RSSMV1(rssm)
    embed, action = torch.randn(B, T, E), torch.randn(B, T, A)
    torch.manual_seed(1)
    post, prior = calls.observe(embed, action)
    torch.manual_seed(1)
    first = torch.zeros(T, B, dtype=torch.bool)
    expected = rssm.filter(embed.transpose(0, 1), action.transpose(0, 1), first)
    same(post, expected)
    prior_there = rssm.prior_at(expected)
    torch.testing.assert_close(prior["mean"].transpose(0, 1), prior_there.mean)
    assert not torch.equal(prior["stoch"], post["stoch"])  # a sample of its own
    assert torch.equal(calls.get_feat(post), torch.cat([post["stoch"], post["deter"]], -1))

    start = {k: x[:, -1] for k, x in post.items()}
    torch.manual_seed(2)
    imagined = calls.imagine(action, start)
    torch.manual_seed(2)
    same(imagined, rssm.imagine(action.transpose(0, 1), expected[-1]))
    torch.manual_seed(2)
    step = calls.img_step(start, action[:, 0])
    torch.testing.assert_close(step["mean"], imagined["mean"][:, 0])
    torch.manual_seed(3)
    (stepped, _), whole = (
        calls.obs_step(start, action[:, 0], embed[:, 0]),
        calls.observe(embed[:, :1], action[:, :1], start),
    )
    torch.testing.assert_close(stepped["mean"], whole[0]["mean"][:, 0])
    assert calls.initial(2)["deter"].shape == (2, 16)


def test_v2():
    rssm = nn.RSSM(E, A, deter_size=16, stoch_size=4, classes=5, hidden_size=12, unimix=0.0, act="elu", norm="none")
    calls = danijar.RSSMV2(rssm)
    embed, action, first = torch.randn(B, T, E), torch.randn(B, T, A), torch.zeros(B, T)
    first[1, 2] = 1
    torch.manual_seed(1)
    post, prior = calls.observe(embed, action, first)
    torch.manual_seed(1)
    expected = rssm.filter(embed.transpose(0, 1), action.transpose(0, 1), first.t() > 0)
    same(post, expected)
    assert prior["stoch"].sum(-1).allclose(torch.ones(B, T, 4))
    assert calls.get_feat(post).shape == (B, T, 4 * 5 + 16)
    assert list(calls.state_dict()) == [f"rssm.{k}" for k in rssm.state_dict()]
    (post["logit"].sum() + prior["stoch"].square().sum()).backward()
    assert rssm.prior[0][0][0].weight.grad.abs().sum() > 0
