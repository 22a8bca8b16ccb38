"""λ-returns under the names and conventions of other codebases, against loops that follow their equations."""

import pytest
import torch

from phyxdream.compat import danijar, dreamerv3_torch, r2dreamer, sheeprl, torchrl

T, B = 6, 4


def draw(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.rand(shape, generator=g, dtype=torch.float64).requires_grad_() for _ in range(3)]


def classic(reward, value, pcont, bootstrap, lambda_):
    """Backwards over axis 0; `value` of the states that rewards came from."""
    found, following = [], bootstrap
    next_value = torch.cat([value[1:], bootstrap[None]])
    for t in reversed(range(len(reward))):
        following = reward[t] + pcont[t] * ((1 - lambda_) * next_value[t] + lambda_ * following)
        found.append(following)
    return torch.stack(found[::-1])


def assert_same(found, expected, leaves):
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    weight = torch.linspace(-1, 1, expected.numel(), dtype=expected.dtype).view(expected.shape)
    grads = [torch.autograd.grad((x * weight).sum(), leaves, allow_unused=True) for x in (found, expected)]
    for actual, wanted in zip(*grads, strict=True):
        zeros = torch.zeros(())
        actual, wanted = (zeros if x is None else x for x in (actual, wanted))
        torch.testing.assert_close(*torch.broadcast_tensors(actual.to(wanted), wanted), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("lambda_", [0.0, 0.95, 1.0])
@pytest.mark.parametrize("function", [danijar.lambda_return, dreamerv3_torch.lambda_return])
def test_danijar_and_dreamerv3_torch(function, lambda_):
    reward, value, pcont = draw(T, B, 1)
    bootstrap = torch.rand(B, 1, dtype=torch.float64, requires_grad=True)
    found = function(reward, value, pcont, bootstrap, lambda_, axis=0)
    if function is dreamerv3_torch.lambda_return:
        assert isinstance(found, tuple) and len(found) == B and found[0].shape == (T, 1)
        found = torch.stack(found, dim=1)
    leaves = reward, value, pcont, bootstrap
    assert_same(found, classic(reward, value, pcont, bootstrap, lambda_), leaves)


def test_danijar_with_a_number_no_bootstrap_and_another_axis():
    reward, value, _ = draw(B, T)
    found = danijar.lambda_return(reward, value, 0.9, None, 0.95, axis=1)
    pcont = torch.full((T, B), 0.9, dtype=torch.float64)
    expected = classic(reward.t(), value.t(), pcont, torch.zeros(B, dtype=torch.float64), 0.95).t()
    assert_same(found, expected, (reward, value))


@pytest.mark.parametrize("dtype", [torch.bool, torch.float64])
def test_r2dreamer(dtype):
    reward, value, boot = draw(B, T, 1)
    last, term = ((torch.rand(B, T, 1) < 0.3).to(dtype) for _ in range(2))
    found = r2dreamer.lambda_return(last, term, reward, value, boot, 0.997, 0.95)
    following, expected = boot[:, -1], []
    for t in reversed(range(1, T)):
        live = (1 - term[:, t].double()) * 0.997
        share = (1 - last[:, t].double()) * 0.95
        following = reward[:, t] + live * ((1 - share) * boot[:, t] + share * following)
        expected.append(following)
    assert found.shape == (B, T - 1, 1)
    assert_same(found, torch.stack(expected[::-1], 1), (reward, boot))
    with pytest.raises(ValueError, match=r"lamb: expected a number in \[0, 1\], got 1.5"):
        r2dreamer.lambda_return(last, term, reward, value, boot, 0.997, 1.5)


def test_sheeprl_v3():
    rewards, values, continues = draw(T, B, 1)
    found = sheeprl.compute_lambda_values(rewards, values, continues, lmbda=0.9)
    following, expected = values[-1], []
    for t in reversed(range(T)):
        following = rewards[t] + continues[t] * ((1 - 0.9) * values[t] + 0.9 * following)
        expected.append(following)
    assert_same(found, torch.stack(expected[::-1]), (rewards, values, continues))


@pytest.mark.parametrize("horizon", [T, T - 2, 1])
@pytest.mark.parametrize("with_bootstrap", [True, False])
def test_sheeprl_v2(horizon, with_bootstrap):
    rewards, values, continues = draw(T, B, 1)
    bootstrap = torch.rand(1, B, 1, dtype=torch.float64, requires_grad=True) if with_bootstrap else None
    found = sheeprl.compute_lambda_values_v2(rewards, values, continues, bootstrap, horizon, 0.9)
    end = torch.zeros(1, B, 1, dtype=torch.float64) if bootstrap is None else bootstrap
    next_value, following, expected = torch.cat([values[1:], end]), end[0], []
    for t in reversed(range(horizon)):
        following = rewards[t] + continues[t] * ((1 - 0.9) * next_value[t] + 0.9 * following)
        expected.append(following)
    leaves = [rewards, values, continues, *([bootstrap] if with_bootstrap else [])]
    assert_same(found, torch.stack(expected[::-1]), leaves)
    with pytest.raises(ValueError, match="horizon: expected 1 to 6, the steps of rewards, got 7"):
        sheeprl.compute_lambda_values_v2(rewards, values, continues, bootstrap, T + 1)


@pytest.mark.parametrize("horizon", [T, T - 2, 2])
def test_sheeprl_v1(horizon):
    rewards, values, done_mask = draw(T, B, 1)
    last_values = torch.rand(B, 1, dtype=torch.float64, requires_grad=True)
    found = sheeprl.compute_lambda_values_v1(rewards, values, done_mask, last_values, horizon, 0.9)
    following, expected = 0.0, []
    for t in reversed(range(horizon - 1)):
        ends = t == horizon - 2  # the last value stands for the whole rest
        next_value = last_values if ends else values[t + 1] * (1 - 0.9)
        following = rewards[t] + done_mask[t] * (next_value + 0.9 * following)
        expected.append(following)
    assert found.shape == (horizon - 1, B, 1)
    assert_same(found, torch.stack(expected[::-1]), (rewards, values, done_mask, last_values))
    with pytest.raises(ValueError, match="horizon: expected 2 to 6, the steps of rewards, got 1"):
        sheeprl.compute_lambda_values_v1(rewards, values, done_mask, last_values, 1)


@pytest.mark.parametrize("batch", [(B,), (2, 3), ()])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_torchrl(batch, as_tensor):
    reward, value, continuation = draw(*batch, T, 1)
    gamma, lmbda = (torch.tensor(x) if as_tensor else x for x in (0.997, 0.95))
    found = torchrl.lambda_target(reward, value, continuation, gamma, lmbda)
    following, expected = value[..., -1, :], []
    for t in reversed(range(T)):
        mixed = (1 - float(lmbda)) * value[..., t, :] + float(lmbda) * following
        following = reward[..., t, :] + float(gamma) * continuation[..., t, :] * mixed
        expected.append(following)
    torch.testing.assert_close(found, torch.stack(expected[::-1], -2), rtol=1e-6, atol=1e-6)
    if not as_tensor:
        assert_same(found, torch.stack(expected[::-1], -2), (reward, value, continuation))
