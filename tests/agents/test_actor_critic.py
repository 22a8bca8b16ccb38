"""Behaviour losses against slow transcriptions with loops, where gradients go, and what must not leak."""

import copy

import numpy as np
import pytest
import torch

from phyxdream import nn
from phyxdream.agents.actor_critic import ReturnNormalizer, imagination_loss, replay_critic_loss, update_slow

H, N, F, A = 6, 4, 5, 3
LAMBDA, ENTROPY, SLOW = 0.8, 0.02, 0.7


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def networks(dist="categorical"):
    """Actor, critic and slow critic whose outputs are far from their quiet start."""
    actor = nn.Actor(F, A, 8, 1, dist)
    torch.nn.init.normal_(actor.out.weight, std=0.5)
    critic, slow = nn.TwoHotHead(F, 8, 1, scale=1.0), nn.TwoHotHead(F, 8, 1, scale=1.0)
    return actor.double(), critic.double(), slow.double().requires_grad_(False)


def trajectory(actor):
    g = torch.Generator().manual_seed(1)
    feature = torch.randn(H + 1, N, F, generator=g, dtype=torch.float64)
    action = actor(feature[:-1]).sample(g).detach()
    reward = torch.randn(H + 1, N, generator=g, dtype=torch.float64)
    cont = torch.rand(H + 1, N, generator=g, dtype=torch.float64)
    cont[3, 0] = 0.0  # an episode that surely ends
    return feature, action, reward, cont


# -- Return normaliser ------------------------------------------------------------------------------------------------


def test_normalizer_is_a_debiased_moving_percentile():
    rng = np.random.default_rng(0)
    normalizer = ReturnNormalizer(rate=0.1)
    low = high = weight = 0.0
    for i in range(30):
        returns = rng.normal(i, 3, (7, 11)).astype(np.float32)
        scale = normalizer(torch.from_numpy(returns))
        low = 0.9 * low + 0.1 * np.percentile(returns, 5)
        high = 0.9 * high + 0.1 * np.percentile(returns, 95)
        weight = 0.9 * weight + 0.1
        assert scale.shape == ()
        assert scale.item() == pytest.approx(max(1.0, (high - low) / weight), rel=1e-5)
    assert scale > 5  # the spread is about 3.3 standard deviations


def test_normalizer_is_unbiased_from_the_first_call_and_never_below_one():
    returns = torch.linspace(-100, 100, 201)
    assert ReturnNormalizer()(returns).item() == pytest.approx(180, rel=1e-5)
    assert ReturnNormalizer()(returns / 1000).item() == 1.0
    assert ReturnNormalizer().scale.item() == 1.0  # before any call


def test_normalizer_round_trip():
    a, b = ReturnNormalizer(), ReturnNormalizer()
    for i in range(5):
        a(torch.randn(50) * i)
    b.load_state_dict(a.state_dict())
    more = torch.randn(50) * 9
    assert torch.equal(a(more), b(more))


# -- Imagination ------------------------------------------------------------------------------------------------------


def slow_imagination(actor, critic, slow, feature, action, reward, cont):
    """DreamerV3's loss, one trajectory and one step at a time."""
    value = [[critic(feature[t, n]).mode.item() for n in range(N)] for t in range(H + 1)]
    returns = np.zeros((H, N))
    for n in range(N):
        following = value[H][n]
        for t in reversed(range(H)):
            target = (1 - LAMBDA) * value[t + 1][n] + LAMBDA * following
            following = returns[t, n] = reward[t + 1, n].item() + cont[t + 1, n].item() * target
    # One update of a fresh normaliser, debiased, is the percentile of these returns.
    scale = max(1.0, np.percentile(returns, 95) - np.percentile(returns, 5))
    actor_loss, critic_loss = np.zeros((H, N)), np.zeros((H, N))
    for n in range(N):
        weight = 1.0
        for t in range(H):
            weight *= cont[t, n].item()
            policy = actor(feature[t, n])
            advantage = (returns[t, n] - value[t][n]) / scale
            gain = policy.log_prob(action[t, n]).item() * advantage + ENTROPY * policy.entropy().item()
            actor_loss[t, n] = -weight * gain
            out = critic(feature[t, n])
            target = torch.tensor(returns[t, n], dtype=torch.float64)
            regular = out.loss(slow(feature[t, n]).mode).item()
            critic_loss[t, n] = weight * (out.loss(target).item() + SLOW * regular)
    return actor_loss, critic_loss, returns


def test_an_entropy_that_is_sampled_takes_the_generator():
    actor, critic, slow = networks("tanh_normal")
    data, state = trajectory(actor), torch.get_rng_state()

    def entropy(seed):
        g = torch.Generator().manual_seed(seed)
        out, _ = imagination_loss(actor, critic, slow, ReturnNormalizer(), *data, LAMBDA, ENTROPY, SLOW, g)
        return out.metrics["entropy"]

    assert entropy(1) == entropy(1) != entropy(2)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dist", ("categorical", "bounded_normal", "tanh_normal"))
def test_imagination_loss(dist, monkeypatch):
    actor, critic, slow = networks(dist)
    data = trajectory(actor)
    # Its entropy is sampled; the comparison needs the same estimate twice.
    monkeypatch.setattr(nn.TanhNormal, "entropy", lambda self, generator=None: self.base.entropy())
    out, returns = imagination_loss(actor, critic, slow, ReturnNormalizer(), *data, LAMBDA, ENTROPY, SLOW)
    expected = slow_imagination(actor, critic, slow, *data)
    for name, actual, wanted in zip(
        ("actor", "critic", "returns"), (out.losses["actor"], out.losses["critic"], returns), expected, strict=True
    ):
        # The normaliser keeps its percentiles in float32.
        np.testing.assert_allclose(actual.detach(), wanted, rtol=1e-5, atol=1e-6, err_msg=name)
    assert all(m.ndim == 0 and not m.requires_grad for m in out.metrics.values())


def test_imagination_gradients():
    """They reach the actor and the critic only; the actor's come from REINFORCE and entropy, not from the critic."""
    actor, critic, slow = networks()
    feature, action, reward, cont = trajectory(actor)
    normalizer = ReturnNormalizer()
    out, returns = imagination_loss(
        actor, critic, slow, normalizer, feature, action, reward, cont, LAMBDA, ENTROPY, SLOW
    )
    assert not returns.requires_grad
    out.losses["actor"].mean().backward(retain_graph=True)
    assert all(p.grad is not None for p in actor.parameters())
    assert all(p.grad is None for p in critic.parameters())
    actor.zero_grad()
    out.losses["critic"].mean().backward()
    assert all(p.grad is not None for p in critic.parameters())
    assert all(p.grad is None for p in [*actor.parameters(), *slow.parameters()])
    # The score-function gradient by hand: −Σ w·A·∇log π − η·∇H.
    scale = normalizer.scale.double()
    value = critic(feature).mode.detach()
    weight = torch.cumprod(cont, 0)[:-1]
    policy = actor(feature[:-1])
    chosen = policy.probs.gather(-1, action.argmax(-1, keepdim=True)).squeeze(-1).log()
    entropy = -(policy.probs * policy.probs.log()).sum(-1)
    loss = -(weight * (returns - value[:-1]) / scale * chosen + ENTROPY * weight * entropy).mean()
    expected = torch.autograd.grad(loss, list(actor.parameters()))
    actual = torch.autograd.grad(
        imagination_loss(actor, critic, slow, Frozen(scale), feature, action, reward, cont, LAMBDA, ENTROPY, SLOW)[
            0
        ].losses["actor"].mean(),
        list(actor.parameters()),
    )  # fmt: skip
    torch.testing.assert_close(actual, expected)


class Frozen:
    def __init__(self, scale):
        self.scale = scale

    def __call__(self, returns):
        return self.scale


def test_a_better_action_becomes_more_likely():
    actor, critic, slow = networks()
    feature, _, reward, cont = trajectory(actor)
    action = torch.zeros(H, N, A, dtype=torch.float64)
    action[..., 0] = 1
    torch.nn.init.zeros_(critic.out.weight)  # the critic expects nothing, so every advantage is positive
    torch.nn.init.zeros_(critic.out.bias)
    reward[1:] = 50.0
    before = actor(feature[:-1]).log_prob(action).mean()
    optimizer = torch.optim.SGD(actor.parameters(), 1e-3)
    cont[:] = 0.9
    out, _ = imagination_loss(actor, critic, slow, ReturnNormalizer(), feature, action, reward, cont, LAMBDA, 0.0, SLOW)
    out.losses["actor"].mean().backward()
    optimizer.step()
    assert actor(feature[:-1]).log_prob(action).mean() > before


def test_nothing_counts_after_a_sure_end():
    actor, critic, slow = networks()
    feature, action, reward, cont = trajectory(actor)
    out, returns = imagination_loss(
        actor, critic, slow, ReturnNormalizer(), feature, action, reward, cont, LAMBDA, ENTROPY, SLOW
    )
    assert not out.losses["actor"][3:, 0].any()
    assert not out.losses["critic"][3:, 0].any()
    assert out.losses["actor"][3:, 1].all()
    assert returns[2, 0].item() == pytest.approx(reward[3, 0].item())
    reward[4:, 0] += 100
    changed = imagination_loss(
        actor, critic, slow, ReturnNormalizer(), feature, action, reward, cont, LAMBDA, ENTROPY, SLOW
    )[1]
    torch.testing.assert_close(changed[:3], returns[:3], rtol=0, atol=0)


# -- Replay -----------------------------------------------------------------------------------------------------------

T, B, DISCOUNT = 7, 3, 0.97


def replayed():
    g = torch.Generator().manual_seed(2)
    feature = torch.randn(T, B, F, generator=g, dtype=torch.float64)
    reward = torch.randn(T, B, generator=g, dtype=torch.float64)
    bootstrap = torch.randn(T, B, generator=g, dtype=torch.float64)
    is_last, is_terminal = torch.zeros(T, B, dtype=torch.bool), torch.zeros(T, B, dtype=torch.bool)
    is_last[3, 0] = True  # cut off
    is_last[4, 1] = is_terminal[4, 1] = True  # ended
    return feature, reward, is_last, is_terminal, bootstrap


def replay_transcription(last, term, rew, boot, disc, lam):
    """danijar/dreamerv3's lambda_return, batch-major (B, T) to (B, T−1), as its arithmetic reads."""
    rets = [boot[:, -1]]
    live = (1 - term.double())[:, 1:] * disc
    cont = (1 - last.double())[:, 1:] * lam
    interm = rew[:, 1:] + (1 - cont) * live * boot[:, 1:]
    for t in reversed(range(live.shape[1])):
        rets.append(interm[:, t] + live[:, t] * cont[:, t] * rets[-1])
    return torch.stack(list(reversed(rets))[:-1], 1)


def replay_loss(critic, slow, feature, reward, is_last, is_terminal, bootstrap):
    return replay_critic_loss(critic, slow, feature, reward, is_last, is_terminal, bootstrap, DISCOUNT, LAMBDA, SLOW)


def test_replay_critic_loss():
    _, critic, slow = networks()
    feature, reward, is_last, is_terminal, bootstrap = replayed()
    returns = replay_transcription(is_last.T, is_terminal.T, reward.T, bootstrap.T, DISCOUNT, LAMBDA).T
    expected = torch.zeros(T - 1, B, dtype=torch.float64)
    for t in range(T - 1):
        for b in range(B):
            out = critic(feature[t, b])
            loss = out.loss(returns[t, b]) + SLOW * out.loss(slow(feature[t, b]).mode)
            expected[t, b] = 0.0 if is_last[t, b] else loss
    torch.testing.assert_close(replay_loss(critic, slow, *replayed()), expected)
    # By hand at the ends: a cut-off step goes on with the value there, an ended one with nothing.
    torch.testing.assert_close(returns[2, 0], reward[3, 0] + DISCOUNT * bootstrap[3, 0])
    torch.testing.assert_close(returns[3, 1], reward[4, 1])
    torch.testing.assert_close(returns[T - 2], reward[T - 1] + DISCOUNT * bootstrap[T - 1])


def test_nothing_leaks_into_the_episode_before():
    _, critic, slow = networks()
    feature, reward, is_last, is_terminal, bootstrap = replayed()
    base = replay_loss(critic, slow, feature, reward, is_last, is_terminal, bootstrap)
    for b, end in ((0, 3), (1, 4)):
        reward2, bootstrap2 = reward.clone(), bootstrap.clone()
        reward2[end + 1 :, b] += 50
        bootstrap2[end + 1 :, b] -= 70
        feature2 = feature.clone()
        feature2[end + 1 :, b] += 1
        changed = replay_loss(critic, slow, feature2, reward2, is_last, is_terminal, bootstrap2)
        torch.testing.assert_close(changed[: end + 1, b], base[: end + 1, b], rtol=0, atol=0)
        assert not torch.allclose(changed[end + 1 :, b], base[end + 1 :, b])
    # What comes with the last step itself does count before it.
    reward[3, 0] += 50
    changed = replay_loss(critic, slow, feature, reward, is_last, is_terminal, bootstrap)
    assert not torch.isclose(changed[2, 0], base[2, 0])
    assert not torch.isclose(changed[1, 0], base[1, 0])


def test_replay_gradients():
    """They shape critic and features, not the slow critic and not the bootstrap."""
    _, critic, slow = networks()
    feature, reward, is_last, is_terminal, bootstrap = replayed()
    feature.requires_grad_()
    bootstrap.requires_grad_()
    replay_loss(critic, slow, feature, reward, is_last, is_terminal, bootstrap).mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in critic.parameters())
    assert all(p.grad is None for p in slow.parameters())
    assert bootstrap.grad is None
    assert feature.grad[0].abs().max() > 0
    assert not feature.grad[3, 0].any()  # a last step has no return
    assert not feature.grad[T - 1].any()


def test_update_slow():
    fast, slow = nn.TwoHotHead(F, 8, 2), nn.TwoHotHead(F, 8, 2, scale=1.0)
    before = copy.deepcopy(slow)
    kept = copy.deepcopy(fast)
    for _ in range(3):
        update_slow(slow, fast, 0.1)
    share = 1 - 0.9**3
    for s, b, f, k in zip(slow.parameters(), before.parameters(), fast.parameters(), kept.parameters(), strict=True):
        torch.testing.assert_close(s, (1 - share) * b + share * f)
        assert torch.equal(f, k)
    update_slow(slow, fast, 1.0)
    assert all(torch.equal(s, f) for s, f in zip(slow.parameters(), fast.parameters(), strict=True))
