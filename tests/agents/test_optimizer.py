"""LaProp with adaptive gradient clipping against a scalar float64 transcription of its docstring."""

import copy
import math

import pytest
import torch

from phyxdream.agents.optimizer import LaProp

OPTIONS = dict(lr=0.01, agc=0.3, pmin=1e-3, betas=(0.9, 0.999), eps=1e-20, warmup=5)


class Scalars:
    """The equations, one number at a time, for one tensor given as a list."""

    def __init__(self, w, lr, agc, pmin, betas, eps, warmup):
        self.w, self.lr, self.agc, self.pmin, (self.b1, self.b2) = list(w), lr, agc, pmin, betas
        self.eps, self.warmup, self.t = eps, warmup, 0
        self.v, self.m = [0.0] * len(self.w), [0.0] * len(self.w)

    def step(self, g):
        self.t += 1
        g_norm = math.sqrt(sum(x * x for x in g))
        limit = self.agc * max(self.pmin, math.sqrt(sum(x * x for x in self.w)))
        g = [x / max(1.0, g_norm / limit) for x in g]
        lr = self.lr * (min(1.0, self.t / self.warmup) if self.warmup else 1.0)
        for i, x in enumerate(g):
            self.v[i] = self.b2 * self.v[i] + (1 - self.b2) * x * x
            u = x / (math.sqrt(self.v[i] / (1 - self.b2**self.t)) + self.eps)
            self.m[i] = self.b1 * self.m[i] + (1 - self.b1) * u
            self.w[i] -= lr * self.m[i] / (1 - self.b1**self.t)


def run(weights, gradients, **options):
    optimizer = LaProp(weights, **options)
    for step in gradients:
        for w, g in zip(weights, step, strict=True):
            w.grad = None if g is None else g.clone()
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("options", [OPTIONS, OPTIONS | dict(eps=1e-3, warmup=0, betas=(0.8, 0.95), agc=0.01)])
def test_equals_the_transcription(options):
    g = torch.Generator().manual_seed(0)
    shapes = [(4, 3), (5,), (), (2, 1, 3)]
    weights = [torch.randn(s, generator=g, dtype=torch.float64).requires_grad_() for s in shapes]
    expected = [Scalars(w.flatten().tolist(), **options) for w in weights]
    # Sizes over four decades: some steps are clipped, some not.
    scales = 10 ** (4 * torch.rand(40, generator=g) - 3)
    gradients = [[s * torch.randn(w.shape, generator=g, dtype=torch.float64) for w in weights] for s in scales]
    run(weights, gradients, **options)
    for step in gradients:
        for scalar, x in zip(expected, step, strict=True):
            scalar.step(x.flatten().tolist())
    for w, scalar in zip(weights, expected, strict=True):
        torch.testing.assert_close(w.flatten(), torch.tensor(scalar.w, dtype=torch.float64), rtol=1e-10, atol=1e-12)


def test_float32_follows_float64():
    g = torch.Generator().manual_seed(1)
    start = torch.randn(20, generator=g)
    gradients = [[torch.randn(20, generator=g)] for _ in range(100)]
    single, double = start.clone().requires_grad_(), start.double().requires_grad_()
    run([single], gradients, **OPTIONS)
    run([double], [[x.double() for x in step] for step in gradients], **OPTIONS)
    # 100 updates of up to lr, each rounded to 2⁻²⁴ of weights of size 1, and u with a relative error of about 1e-6.
    torch.testing.assert_close(single.double(), double, rtol=1e-4, atol=1e-5)


def test_warm_up_and_first_steps():
    """A constant gradient gives u = 1 and so steps of exactly lr·t/warmup, then lr."""
    weight = torch.full((3,), 10.0, dtype=torch.float64, requires_grad=True)
    optimizer = LaProp([weight], **OPTIONS)
    steps = []
    for _ in range(8):
        before = weight.detach().clone()
        weight.grad = torch.full_like(weight, 0.5)
        optimizer.step()
        steps.append((before - weight.detach())[0].item())
    assert steps == pytest.approx([0.01 * min(1, t / 5) for t in range(1, 9)], rel=1e-9)


def clipped(weight, gradient):
    """What is left of the gradient after clipping: the running square after one step shows it."""
    weight = weight.clone().requires_grad_()
    optimizer = run([weight], [[gradient]], **OPTIONS)
    return (optimizer.state[weight]["rms"] / (1 - 0.999)).sqrt() * gradient.sign()


def test_clipping_only_where_the_norm_exceeds():
    weight = torch.tensor([3.0, 4.0], dtype=torch.float64)  # norm 5, limit 1.5
    small, large = torch.tensor([0.9, -1.19], dtype=torch.float64), torch.tensor([6.0, -8.0], dtype=torch.float64)
    torch.testing.assert_close(clipped(weight, small), small)
    torch.testing.assert_close(clipped(weight, large), large * 1.5 / 10)


def test_clipping_is_per_tensor():
    """One tensor's explosion does not shrink another's gradient."""
    weights = [torch.ones(4, requires_grad=True), torch.ones(4, requires_grad=True)]
    gradient = torch.full((4,), 0.01)
    optimizer = run(weights, [[torch.full((4,), 1e6), gradient]], **OPTIONS)
    torch.testing.assert_close(optimizer.state[weights[1]]["rms"], 0.001 * gradient.square())


def test_zero_weights_move():
    """Weights that start at zero (value and reward heads) are clipped to agc·pmin, not to nothing."""
    zero = torch.zeros(2, dtype=torch.float64)
    gradient = torch.tensor([3.0, -4.0], dtype=torch.float64)
    torch.testing.assert_close(clipped(zero, gradient), gradient / 5 * 0.3e-3)
    weight = zero.clone().requires_grad_()
    run([weight], [[gradient]], **OPTIONS)
    torch.testing.assert_close(weight.detach(), torch.tensor([-0.002, 0.002], dtype=torch.float64))


def test_zero_and_missing_gradients():
    """A zero gradient moves nothing and is no NaN (0 / eps); a missing one is left alone."""
    a, b = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    optimizer = LaProp([a, b], **OPTIONS)
    assert optimizer.step().item() == 0
    a.grad = torch.zeros(3)
    norm = optimizer.step()
    assert norm.item() == 0
    assert a.tolist() == b.tolist() == [1.0] * 3
    assert b not in optimizer.state
    a.grad = torch.tensor([3.0, 0.0, 4.0])
    assert optimizer.step().item() == pytest.approx(5)  # the norm before clipping
    assert a[1] == 1
    assert torch.isfinite(a).all()


def test_tiny_gradients_do_not_explode():
    """Squares that underflow leave an RMS of zero: eps keeps the step finite."""
    weight = torch.ones(2, requires_grad=True)
    run([weight], [[torch.tensor([1e-30, 1e-21])]], **OPTIONS)
    assert torch.isfinite(weight).all()
    assert (weight - 1).abs().max() <= 0.01


def test_state_dict_round_trip_continues_bit_exactly():
    g = torch.Generator().manual_seed(2)
    weights = [torch.randn(4, generator=g).requires_grad_(), torch.randn(2, 2, generator=g).requires_grad_()]
    gradients = [[torch.randn(w.shape, generator=g) for w in weights] for _ in range(6)]
    optimizer = run(weights, gradients[:3], **OPTIONS)
    others = [w.detach().clone().requires_grad_() for w in weights]
    restored = LaProp(others, **OPTIONS)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for step in gradients[3:]:
        for group, opt in ((weights, optimizer), (others, restored)):
            for w, x in zip(group, step, strict=True):
                w.grad = x.clone()
            opt.step()
    for a, b in zip(weights, others, strict=True):
        assert torch.equal(a, b)


def test_closure_is_refused():
    with pytest.raises(ValueError, match="closure"):
        LaProp([torch.ones(1, requires_grad=True)]).step(lambda: 0)
