"""docs/use-in-your-dreamer.md: what it shows before and after gives the same, on stand-ins with the names it uses."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import stand_ins as s
import torch
from torch import nn

from phyxdream.compat import acceleration

PAGE = (Path(__file__).parents[2] / "docs" / "use-in-your-dreamer.md").read_text()
B, T = 3, 6


def blocks(heading):
    """The Python blocks under a heading."""
    section = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)[1]
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)


def returns(*shape):
    g = torch.Generator().manual_seed(1)
    return [torch.rand(shape, generator=g) for _ in range(3)]


def stacked(reward, value, pcont, bootstrap, lambda_, axis):
    """dreamerv3-torch's λ-return: a tuple of B tensors (T, 1)."""
    found, following = [], bootstrap
    next_value = torch.cat([value[1:], bootstrap[None]])
    for t in reversed(range(len(reward))):
        following = reward[t] + pcont[t] * ((1 - lambda_) * next_value[t] + lambda_ * following)
        found.append(following)
    return torch.stack(found[::-1]).unbind(1)


class R2Agent(nn.Module):
    def __init__(self, *_):
        super().__init__()
        self.rssm = s.R2Dreamer()

    def _lambda_return(self, last, term, reward, value, boot, disc, lamb):
        following, found = boot[:, -1], []
        for t in reversed(range(1, reward.shape[1])):
            share, live = (1 - last[:, t]) * lamb, (1 - term[:, t]) * disc
            following = reward[:, t] + live * ((1 - share) * boot[:, t] + share * following)
            found.append(following)
        return torch.stack(found[::-1], 1)


class Agent(nn.Module):
    def __init__(self, *_):
        super().__init__()
        self._wm = nn.Module()
        self._wm.dynamics = s.DreamerV3Torch()


def dreamerv3():
    reward, value, discount = returns(T, B, 1)
    return dict(
        Dreamer=Agent, obs_space=None, act_space=None, config=None, logger=None, dataset=None,
        embed=torch.randn(B, T, s.E), action=torch.randn(B, T, s.A), is_first=first_steps(B, T), reward=reward,
        value=value, discount=discount, last_value=torch.rand(B, 1), tools=SimpleNamespace(lambda_return=stacked),
    )  # fmt: skip


def r2dreamer():
    reward, value, _ = returns(B, T, 1)
    flags = torch.zeros(B, T, 1)
    return dict(
        Dreamer=R2Agent, config=None, obs_space=None, act_space=None, embed=torch.randn(B, T, s.E),
        action=torch.randn(B, T, s.A), initial=s.R2Dreamer().initial(B), is_first=first_steps(B, T) > 0, last=flags,
        term=flags, reward=reward, value=value,
    )  # fmt: skip


def sheeprl():
    world_model = nn.Module()
    world_model.rssm = s.SheeprlV3()
    return dict(
        world_model=world_model, sequence_length=T, batch_actions=torch.randn(T, B, s.A),
        embedded_obs=torch.randn(T, B, s.E, requires_grad=True),
        is_first=first_steps(B, T).t().unsqueeze(2).contiguous(),
        posterior=torch.zeros(1, B, s.S, s.C), recurrent_state=torch.zeros(1, B, s.D),
    )  # fmt: skip


def torchrl():
    TensorDict = pytest.importorskip("tensordict").TensorDict
    whole = s.TorchrlRollout()

    def rollout(prior, posterior):
        whole.rssm_prior, whole.rssm_posterior = prior, posterior
        return whole

    data = TensorDict(
        {
            "state": torch.zeros(B, T, s.S * s.C), "belief": torch.zeros(B, T, s.D), "action": torch.randn(B, T, s.A),
            "is_init": first_steps(B, T).unsqueeze(2) > 0,
            "next": TensorDict({"encoded_latents": torch.randn(B, T, s.E)}, [B, T]),
        },
        [B, T],
    )  # fmt: skip
    return dict(RSSMRolloutV3=rollout, rssm_prior=whole.rssm_prior, rssm_posterior=whole.rssm_posterior, data=data)


def rllib():
    return dict(world_model=s.RLlib(T), observations=torch.randn(B, T, 6), actions=torch.randn(B, T, s.A),
                is_first=first_steps(B, T))  # fmt: skip


def slots():
    return dict(SlotAttention=lambda num_slots, dim: s.SlotAttention(dim=8), tokens=torch.randn(B, 9, 8))


def first_steps(*shape):
    first = torch.zeros(shape)
    first[:, 0] = first[1, 3] = 1
    return first


SECTIONS = {
    "dreamerv3-torch": (dreamerv3, ("post", "prior", "target")),
    "r2dreamer": (r2dreamer, ("stoch", "deter", "logit", "target")),
    "sheeprl": (sheeprl, ("recurrent_states", "posteriors", "prior_logits")),
    "torchrl": (torchrl, ("out",)),
    "RLlib": (rllib, ("outs",)),
    "Slot attention": (slots, ("slots",)),
}


@pytest.mark.parametrize("heading", SECTIONS)
def test_before_and_after(heading):
    make, names = SECTIONS[heading]
    before, after, *_ = blocks(heading)
    assert "phyxdream" not in before and "phyxdream.accelerate(" in after
    found = []
    for code in (before, after):
        torch.manual_seed(0)
        names_given = make()
        torch.manual_seed(7)  # of the model's weights, too, where the code makes it
        exec(compile(code, heading, "exec"), names_given)
        found.append(dict(acceleration._leaves({name: names_given[name] for name in names}, "")))
    assert found[0].keys() == found[1].keys()
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, rtol=1e-4, atol=1e-5)


def test_other_blocks_run(monkeypatch):
    (replay,) = blocks("sheeprl")[2:]
    exec(replay, {})
    reward, value, discount = returns(B, T)
    given = dict(embed=torch.randn(B, T, 1024), action=torch.randn(B, T, 6), is_first=first_steps(B, T),
                 reward=reward.t(), value=value.t(), discount=discount.t(), last_value=torch.rand(B))  # fmt: skip
    (danijar,) = blocks("danijar's DreamerV1 and V2")
    exec(danijar, given)
    assert given["returns"].shape == (T, B) and given["post"]["deter"].shape == (B, T, 200)
    (checkpoints,) = blocks("Checkpoints")
    assert checkpoints.count("\n") == 3
    exec(checkpoints.splitlines()[0], {})  # the file that the rest loads is in test_checkpoints.py
    first = PAGE.split("## ")[0]
    (line,) = re.findall(r"```python\n(.*?)```", first, re.DOTALL)
    exec(line, dict(agent=s.R2Dreamer()))


def test_every_link_exists():
    folder = Path(__file__).parents[2] / "docs"
    for target in re.findall(r"\]\(([^)#:]+)\)", PAGE):
        assert (folder / target).exists(), target
