"""Distributions and divergences against torch.distributions and direct transcriptions."""

import math

import numpy as np
import pytest
import torch
from torch import distributions as td

from phyxdream import nn

GENERATOR = 123


def generator(seed=GENERATOR):
    return torch.Generator().manual_seed(seed)


# -- Two-hot ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", (255, 41, 40, 2))
def test_bins_are_symmetric_and_ascending(count):
    bins = nn.symexp_bins(count)
    assert bins.shape == (count,)
    assert torch.equal(bins, -bins.flip(0))  # exactly
    assert (bins.diff() > 0).all()
    expected = np.linspace(-20, 20, count)
    if count % 2:
        assert bins[count // 2] == 0
        # float32 rounding of symexp(±20) ≈ 4.9e8
        np.testing.assert_allclose(bins, np.sign(expected) * np.expm1(np.abs(expected)), rtol=1e-6)
    assert bins[-1].item() == pytest.approx(math.expm1(20), rel=1e-6)


@pytest.mark.parametrize("count", (255, 40))
def test_equal_logits_are_exactly_zero(count):
    for constant in (0.0, 3.3, -7.0):
        assert nn.TwoHotSymlog(torch.full((4, count), constant), nn.symexp_bins(count)).mode.tolist() == [0.0] * 4


def dense_two_hot(target, bins):
    """(N, bins): weights of the two neighbours by distance, from the definition, in float64."""
    bins = np.asarray(bins, np.float64)
    out = np.zeros((len(target), len(bins)))
    for n, x in enumerate(np.asarray(target, np.float64)):
        x = min(max(x, bins[0]), bins[-1])
        k = max(i for i in range(len(bins) - 1) if bins[i] <= x)
        share = (x - bins[k]) / (bins[k + 1] - bins[k])
        out[n, k], out[n, k + 1] = 1 - share, share
    return out


TARGETS = torch.tensor([-1e6, -1000.0, -3.7, -1.0, -1e-3, 0.0, 1e-4, 0.5, 1.0, 42.0, 12345.678, 1e6])


def test_two_hot_loss():
    bins = nn.symexp_bins()
    exact = torch.cat([TARGETS, bins[[0, 1, 127, 128, 254]], torch.tensor([-1e12, 1e12])])  # on bins, and beyond
    logits = torch.randn(len(exact), 255, generator=generator())
    loss = nn.TwoHotSymlog(logits, bins).loss(exact)
    logp = torch.log_softmax(logits.double(), -1).numpy()
    np.testing.assert_allclose(loss, -(dense_two_hot(exact, bins) * logp).sum(-1), rtol=1e-4)


def test_cross_entropy_minimum_is_the_target():
    """At the minimum the probabilities are the two-hot weights, whose mean is the target, for 12 decades."""
    bins = nn.symexp_bins()
    weights = torch.from_numpy(dense_two_hot(TARGETS, bins))
    best = nn.TwoHotSymlog(weights.clamp(min=1e-300).log(), bins.double())
    torch.testing.assert_close(best.mode, TARGETS.double(), rtol=1e-5, atol=1e-7)
    # The gradient of the cross-entropy at p = two-hot is p − two-hot = 0.
    logits = weights.clamp(min=1e-300).log().requires_grad_()
    nn.TwoHotSymlog(logits, bins.double()).loss(TARGETS.double()).sum().backward()
    assert logits.grad.abs().max() < 1e-6


def test_gradient_descent_finds_the_target():
    bins = nn.symexp_bins(41, limit=5.0)
    target = torch.tensor([-50.0, -1.0, 0.0, 7.3])
    logits = torch.zeros(4, 41, requires_grad=True)
    optimizer = torch.optim.Adam([logits], 0.5)
    for _ in range(300):
        optimizer.zero_grad()
        nn.TwoHotSymlog(logits, bins).loss(target).sum().backward()
        optimizer.step()
    torch.testing.assert_close(nn.TwoHotSymlog(logits, bins).mode, target, rtol=0.02, atol=0.02)


def test_two_hot_target_gets_no_gradient():
    target = torch.randn(3, requires_grad=True)
    logits = torch.randn(3, 255, requires_grad=True)
    (grad,) = torch.autograd.grad(nn.TwoHotSymlog(logits, nn.symexp_bins()).loss(target).sum(), target,
                                  allow_unused=True)  # fmt: skip
    assert grad is None


def test_a_nan_target_shows():
    assert nn.TwoHotSymlog(torch.zeros(1, 255), nn.symexp_bins()).loss(torch.tensor([math.nan])).isnan().all()


# -- Simple ones ------------------------------------------------------------------------------------------------------


def test_bernoulli():
    logit = torch.tensor([-80.0, -2.0, 0.5, 80.0], dtype=torch.float64)
    ours, theirs = nn.Bernoulli(logit), td.Bernoulli(logits=logit)
    torch.testing.assert_close(ours.mean, theirs.mean)
    assert ours.mode.tolist() == [0, 0, 1, 1]
    for target in (torch.zeros(4), torch.ones(4)):
        torch.testing.assert_close(ours.log_prob(target), theirs.log_prob(target.double()))
    assert torch.isfinite(ours.loss(torch.tensor([True, False, True, False]))).all()
    # Soft targets: minimal where the mean equals the target.
    soft = torch.tensor([0.997], dtype=torch.float64)
    logit = torch.logit(soft).requires_grad_()
    nn.Bernoulli(logit).loss(soft).sum().backward()
    assert logit.grad.abs().item() < 1e-12


def test_normal():
    g = generator()
    mean, std = torch.randn(5, 3, generator=g), torch.rand(5, 3, generator=g) + 0.1
    x = torch.randn(5, 3, generator=g)
    ours, theirs = nn.Normal(mean, std), td.Independent(td.Normal(mean, std), 1)
    torch.testing.assert_close(ours.log_prob(x), theirs.log_prob(x))
    torch.testing.assert_close(ours.loss(x), -theirs.log_prob(x))
    torch.testing.assert_close(ours.entropy(), theirs.entropy())
    assert torch.equal(ours.mode, mean)
    n = 20_000
    sample = nn.Normal(mean.expand(n, 5, 3), std.expand(n, 5, 3)).sample(g)
    # Standard errors: std/√n of the mean, std/√(2n) of the deviation; five of them.
    assert ((sample.mean(0) - mean).abs() < 5 * std / n**0.5).all()
    assert ((sample.std(0) - std).abs() < 5 * std / (2 * n) ** 0.5).all()


def test_tanh_normal():
    g = generator()
    mean = torch.randn(6, 2, generator=g, dtype=torch.float64)
    std = torch.rand(6, 2, generator=g, dtype=torch.float64) + 0.1
    ours = nn.TanhNormal(mean, std)
    theirs = td.Independent(td.TransformedDistribution(td.Normal(mean, std), [td.TanhTransform()]), 1)
    x = ours.sample(g)
    assert x.abs().max() < 1
    torch.testing.assert_close(ours.log_prob(x), theirs.log_prob(x))
    torch.testing.assert_close(ours.mode, torch.tanh(mean))
    # Entropy is a one-sample estimate of −E[log p]; both averages have a standard error of about 1/√n per nat.
    n = 20_000
    many = nn.TanhNormal(mean.expand(n, 6, 2), std.expand(n, 6, 2))
    torch.testing.assert_close(many.entropy(g).mean(0), -many.log_prob(many.sample(g)).mean(0), rtol=0, atol=0.08)


def test_saturated_tanh_actions_are_finite():
    mean = torch.tensor([[60.0, -60.0]], requires_grad=True)
    ours = nn.TanhNormal(mean, torch.full((1, 2), 0.1))
    action = ours.sample(generator())
    assert action.abs().tolist() == [[1.0, 1.0]]
    logp = ours.log_prob(action.detach())
    assert torch.isfinite(logp).all()
    (grad,) = torch.autograd.grad(logp.sum(), mean)
    assert torch.isfinite(grad).all()
    assert torch.isfinite(ours.entropy(generator())).all()


def test_squared_error():
    prediction = torch.randn(4, 2, 3)
    target = torch.randn(4, 2, 3)
    one = nn.SquaredError(prediction, event_dims=1)
    torch.testing.assert_close(one.loss(target), (prediction - target).pow(2).sum(-1))
    torch.testing.assert_close(nn.SquaredError(prediction, 2).loss(target), (prediction - target).pow(2).sum((-1, -2)))
    assert torch.equal(one.mode, prediction)
    log = nn.SquaredError(nn.symlog(target), 1, symlog_space=True)
    torch.testing.assert_close(log.mode, target)
    assert log.loss(target).abs().max() < 1e-10


def test_symlog():
    x = torch.tensor([-1e9, -3.0, -1e-6, 0.0, 1e-6, 3.0, 1e9], dtype=torch.float64)
    expected = np.sign(x.numpy()) * np.log1p(np.abs(x.numpy()))
    np.testing.assert_allclose(nn.symlog(x), expected, rtol=1e-15)
    torch.testing.assert_close(nn.symexp(nn.symlog(x)), x, rtol=1e-12, atol=0)


# -- Categorical actor ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unimix", (0.0, 0.01, 0.3))
def test_one_hot_categorical(unimix):
    logits = 3 * torch.randn(7, 5, generator=generator(), dtype=torch.float64)
    p = (1 - unimix) * torch.softmax(logits, -1) + unimix / 5
    ours, theirs = nn.OneHotCategorical(logits, unimix), td.OneHotCategorical(probs=p)
    x = ours.sample(generator())
    assert x.sum(-1).tolist() == [1.0] * 7
    torch.testing.assert_close(ours.log_prob(x), theirs.log_prob(x))
    torch.testing.assert_close(ours.entropy(), theirs.entropy())
    assert torch.equal(ours.mode.argmax(-1), p.argmax(-1))
    assert ours.probs.min() >= unimix / 5


def test_one_hot_frequencies():
    """χ² of 40,000 draws; the 99.99 % quantile for 4 degrees of freedom is 23.5."""
    logits = torch.tensor([2.0, -1.0, 0.0, 0.5, -5.0])
    n = 40_000
    counts = nn.OneHotCategorical(logits.expand(n, 5), 0.01).sample(generator()).sum(0)
    p = 0.99 * torch.softmax(logits, -1) + 0.01 / 5
    assert ((counts - n * p).square() / (n * p)).sum() < 23.5


def test_impossible_actions_have_no_weight_in_the_entropy():
    ours = nn.OneHotCategorical(torch.tensor([[0.0, -1e4]]))
    assert ours.entropy().tolist() == [0.0]
    assert ours.sample(generator()).tolist() == [[1.0, 0.0]]


def test_one_hot_straight_through():
    logits = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    sample = nn.OneHotCategorical(logits, 0.1).sample(generator())
    assert set(sample.detach().round(decimals=12).unique().tolist()) == {0.0, 1.0}
    weight = torch.randn(4, 3, dtype=torch.float64)
    (grad,) = torch.autograd.grad((sample * weight).sum(), logits)
    (expected,) = torch.autograd.grad(((0.9 * torch.softmax(logits, -1) + 0.1 / 3) * weight).sum(), logits)
    torch.testing.assert_close(grad, expected)


# -- Divergences ------------------------------------------------------------------------------------------------------


def categorical_state(seed, grad=False):
    logits = 2 * torch.randn(4, 2, 3, 5, generator=generator(seed), dtype=torch.float64)
    return nn.State(torch.zeros(4, 2, 1), torch.zeros(4, 2, 3, 5), logits=logits.requires_grad_(grad))


def gaussian_state(seed, grad=False):
    g = generator(seed)
    mean = torch.randn(4, 2, 3, generator=g, dtype=torch.float64).requires_grad_(grad)
    std = (torch.rand(4, 2, 3, generator=g, dtype=torch.float64) + 0.2).requires_grad_(grad)
    return nn.State(torch.zeros(4, 2, 1), torch.zeros(4, 2, 3), mean=mean, std=std)


@pytest.mark.parametrize("unimix", (0.0, 0.01))
def test_categorical_kl(unimix):
    p, q = categorical_state(1), categorical_state(2)

    def reference(state):
        probs = (1 - unimix) * torch.softmax(state.logits, -1) + unimix / 5
        return td.Independent(td.Categorical(probs=probs), 1)

    kl = nn.kl_divergence(p, q, unimix)
    assert kl.shape == (4, 2)
    torch.testing.assert_close(kl, td.kl_divergence(reference(p), reference(q)))
    assert nn.kl_divergence(p, p, unimix).abs().max() < 1e-12


def test_gaussian_kl():
    p, q = gaussian_state(1), gaussian_state(2)
    theirs = td.kl_divergence(*(td.Independent(td.Normal(s.mean, s.std), 1) for s in (p, q)))
    torch.testing.assert_close(nn.kl_divergence(p, q), theirs)


@pytest.mark.parametrize("state", (categorical_state, gaussian_state))
def test_balanced_kl_routes_gradients(state):
    """The dynamics half trains the prior alone, the representation half the posterior alone."""
    post, prior = state(1, grad=True), state(2, grad=True)
    dynamics, representation = nn.balanced_kl(post, prior, free_nats=0.0)
    kl = nn.kl_divergence(post, prior)
    torch.testing.assert_close(dynamics, kl)
    torch.testing.assert_close(representation, kl)
    leaves = [s.logits if s.logits is not None else s.mean for s in (post, prior)]
    full = torch.autograd.grad(kl.sum(), leaves, retain_graph=True)
    of_dynamics = torch.autograd.grad(dynamics.sum(), leaves, allow_unused=True)
    of_representation = torch.autograd.grad(representation.sum(), leaves, allow_unused=True)
    assert of_dynamics[0] is None
    assert of_representation[1] is None
    torch.testing.assert_close(of_dynamics[1], full[1])
    torch.testing.assert_close(of_representation[0], full[0])


def test_free_nats_clip_every_step():
    post, prior = categorical_state(1, grad=True), categorical_state(2, grad=True)
    kl = nn.kl_divergence(post, prior).detach()
    free = kl.median().item()  # half of the steps are below
    dynamics, representation = nn.balanced_kl(post, prior, free)
    for half, leaf in ((dynamics, prior.logits), (representation, post.logits)):
        torch.testing.assert_close(half, kl.clamp(min=free))
        (grad,) = torch.autograd.grad(half.sum(), leaf)
        moved = grad.abs().amax((-1, -2)) > 0
        assert torch.equal(moved[kl != free], (kl > free)[kl != free])
