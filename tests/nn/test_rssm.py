"""The RSSM against direct transcriptions of its equations, and the promises of its scans."""

import doctest
import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from phyxdream import nn
from phyxdream.errors import ConfigError
from phyxdream.nn import rssm as rssm_module

CELLS = ("gru", "layernorm_gru", "block_gru")
KINDS = list(itertools.product(CELLS, (4, 0), ("zeros", "learned")))
EMBED, ACTION, DETER, STOCH, HIDDEN, BLOCKS = 5, 3, 8, 3, 6, 4


def make(cell="block_gru", classes=4, initial="zeros", seed=0, dtype=torch.float32, **options):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.RSSM(EMBED, ACTION, DETER, STOCH, classes, HIDDEN, cell, BLOCKS, initial=initial, **options)
        # Zero-initialised parameters (biases, the learned start) would hide mistakes in where they are used.
        for p in model.parameters():
            if p.ndim == 1:
                torch.nn.init.normal_(p, std=0.5)
    return model.to(dtype)


def inputs(T, B, seed=1, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    embed = torch.randn(T, B, EMBED, generator=g, dtype=dtype)
    action = 2 * torch.randn(T, B, ACTION, generator=g, dtype=dtype)
    return embed, action, torch.zeros(T, B, dtype=torch.bool)


def noise_for(model, *leading, seed=2):
    return model.draw_noise(*leading, generator=torch.Generator().manual_seed(seed))


def same(a, b, tol=1e-6):
    for name in ("deter", "stoch", "logits", "mean", "std"):
        x, y = getattr(a, name), getattr(b, name)
        assert (x is None) == (y is None), name
        if x is not None:
            torch.testing.assert_close(x, y, rtol=tol, atol=tol, msg=lambda m, n=name: f"{n}: {m}")


# -- Shapes and the promises of the scans -----------------------------------------------------------------------------


@pytest.mark.parametrize(("cell", "classes", "initial"), KINDS)
def test_shapes(cell, classes, initial):
    model = make(cell, classes, initial)
    post, prior = model.observe(*inputs(5, 2))
    stoch = (5, 2, STOCH, classes) if classes else (5, 2, STOCH)
    for state in (post, prior):
        assert state.deter.shape == (5, 2, DETER)
        assert state.stoch.shape == stoch
        assert state.feature.shape == (5, 2, model.feature_size)
        statistics = [state.logits] if classes else [state.mean, state.std]
        assert [s.shape for s in statistics] == [stoch] * len(statistics)
    assert model.feature_size == DETER + STOCH * (classes or 1)
    torch.testing.assert_close(post.feature, torch.cat([post.deter, post.stoch.flatten(2)], -1), rtol=0, atol=0)
    start = model.initial(2)
    assert start.deter.shape == (2, DETER)
    assert start.stoch.shape == stoch[1:]
    assert bool(start.deter.any()) == (initial == "learned")
    trajectory = model.imagine_policy(lambda f: torch.zeros(2, ACTION), post[-1], 4)
    assert trajectory.state.deter.shape == (5, 2, DETER)
    assert trajectory.action.shape == (4, 2, ACTION)
    assert model.imagine(torch.zeros(4, 2, ACTION), post[-1]).stoch.shape == (4, *stoch[1:])
    flat = post.flatten()
    assert flat.deter.shape == (10, DETER)
    torch.testing.assert_close(flat.stoch[2 * 3 + 1], post.stoch[3, 1], rtol=0, atol=0)


@pytest.mark.parametrize(("cell", "classes", "initial"), KINDS)
def test_a_reset_starts_a_new_sequence(cell, classes, initial):
    """Nothing before `is_first` matters: neither the state nor the action, not even when they are NaN."""
    model = make(cell, classes, initial)
    embed, action, is_first = inputs(6, 3)
    noise = noise_for(model, 6, 3)
    is_first[2] = torch.tensor([True, False, True])
    is_first[0] = True
    poisoned = action.clone()
    poisoned[is_first] = math.nan
    garbage = model.initial(3).map(lambda x: torch.full_like(x, math.nan))
    whole, _ = model.observe(embed, poisoned, is_first, garbage, noise)
    fresh_action = action[2:].clone()
    fresh_action[0] = 7.0  # ignored where is_first
    fresh, _ = model.observe(embed[2:], fresh_action, is_first[2:], None, noise[2:])
    for b in (0, 2):
        same(whole[2:].map(lambda x, b=b: x[:, b]), fresh.map(lambda x, b=b: x[:, b]))
    # The sequence that was not reset still depends on what came before.
    assert torch.isfinite(whole.deter).all()
    assert not torch.allclose(whole.deter[2:, 1], fresh.deter[:, 1])


def test_gradients_do_not_cross_a_reset():
    model = make("block_gru")
    embed, action, is_first = inputs(4, 2)
    embed.requires_grad_()
    is_first[2, 0] = True
    post, _ = model.observe(embed, action, is_first, noise=noise_for(model, 4, 2))
    feature = post.feature[3]
    # Unequal weights: the classes of a variable sum to one whatever the embedding is.
    (feature * torch.linspace(-1, 1, feature.shape[-1], dtype=feature.dtype)).sum().backward()
    assert embed.grad[:2, 0].abs().max() == 0
    assert embed.grad[:2, 1].abs().max() > 0
    assert embed.grad[2:].abs().amax(-1).min() > 0


@pytest.mark.parametrize(("cell", "classes", "initial"), KINDS)
def test_a_sequence_equals_single_steps_with_carry(cell, classes, initial):
    model = make(cell, classes, initial)
    embed, action, is_first = inputs(5, 2)
    is_first[3, 1] = True
    noise = noise_for(model, 5, 2)
    post, _ = model.observe(embed, action, is_first, None, noise)
    state, steps = None, []
    for t in range(5):
        states = model.filter(embed[t : t + 1], action[t : t + 1], is_first[t : t + 1], state, noise[t : t + 1])
        state = states[0]
        steps.append(state)
    same(post, nn.State.stack(steps))
    # A state handed over is used: a chunk cut anywhere goes on where the first half stopped.
    tail, _ = model.observe(embed[2:], action[2:], is_first[2:], post[1], noise[2:])
    same(post[2:], tail)


@pytest.mark.parametrize(("cell", "classes", "initial"), KINDS)
def test_prior_is_the_posterior_one_step_ahead(cell, classes, initial):
    model = make(cell, classes, initial)
    embed, action, is_first = inputs(5, 2)
    post, prior = model.observe(embed, action, is_first)
    for t in range(4):
        ahead = model.imagine(action[t + 1 : t + 2], post[t])[0]
        torch.testing.assert_close(ahead.deter, prior.deter[t + 1])
        for name in ("logits",) if classes else ("mean", "std"):
            torch.testing.assert_close(getattr(ahead, name), getattr(prior, name)[t + 1])
    name = "logits" if classes else "mean"
    assert not torch.allclose(getattr(post, name), getattr(prior, name))


@pytest.mark.parametrize("classes", (4, 0))
def test_noise_decides_the_sample(classes):
    model = make(classes=classes)
    data = inputs(4, 64)
    noise = noise_for(model, 4, 64)
    first, second = model.observe(*data, noise=noise)[0], model.observe(*data, noise=noise.clone())[0]
    assert torch.equal(first.stoch, second.stoch)
    assert not torch.equal(first.stoch, model.observe(*data, noise=noise_for(model, 4, 64, seed=3))[0].stoch)
    drawn = model.observe(*data, generator=torch.Generator().manual_seed(2))[0]
    assert torch.equal(first.stoch, drawn.stoch)  # a generator draws what draw_noise draws


@pytest.mark.parametrize(("cell", "classes"), list(itertools.product(CELLS, (4, 0))))
def test_policy_imagination_equals_open_loop(cell, classes):
    model = make(cell, classes)
    start = model.observe(*inputs(3, 2))[0][-1]
    noise = noise_for(model, 6, 2)
    weight = torch.randn(model.feature_size, ACTION, generator=torch.Generator().manual_seed(4))
    trajectory = model.imagine_policy(lambda feature: torch.tanh(feature @ weight), start, 6, noise)
    same(trajectory.state[0], start)
    same(trajectory.state[1:], model.imagine(trajectory.action, start, noise))
    # action[t] is the policy's answer to state t, before the step.
    torch.testing.assert_close(trajectory.action, torch.tanh(trajectory.state.feature[:-1] @ weight))


@pytest.mark.parametrize(
    ("cell", "classes", "dist"), [("gru", 0, "tanh_normal"), ("layernorm_gru", 4, "categorical"),
                                  ("block_gru", 4, "bounded_normal")]
)  # fmt: skip
@pytest.mark.parametrize("norm", ["rms", "layer", "none"])
def test_imagination_under_an_actor_is_the_loop_over_it(cell, classes, dist, norm):
    """The same trajectory and gradients as from asking the actor step by step, given the noise in its order: first that
    of the states, then that of the actions."""
    model, H, B = make(cell, classes, dtype=torch.float64), 4, 2
    actor = nn.Actor(model.feature_size, ACTION, 7, 2, dist, act="elu", norm=norm, unimix=0.2, min_std=0.3).double()
    torch.nn.init.normal_(actor.out.weight)
    start = model.observe(*inputs(3, B, dtype=torch.float64))[0][-1].detach()
    g = torch.Generator().manual_seed(2)
    noise = model.draw_noise(H, B, generator=g)
    drawn = iter(actor.draw_noise(H, B, generator=g))

    def ask(feature):
        distribution, u = actor(feature), next(drawn)
        if dist == "categorical":
            p = distribution.probs
            onehot = F.one_hot((-u.log() / p.detach()).argmin(-1), ACTION)
            return onehot + p - p.detach()
        if dist == "tanh_normal":
            return torch.tanh(distribution.base.mean + distribution.base.std * u)
        return distribution.mean + distribution.std * u

    results = []
    for policy, given in ((actor, None), (ask, noise)):
        trajectory = model.imagine_policy(policy, start, H, given, torch.Generator().manual_seed(2))
        state = trajectory.state
        statistics = state.logits if classes else state.std
        loss = (state.feature[-1].square().sum() + statistics.square().sum()) * trajectory.action.square().sum()
        parameters = [*actor.parameters(), *model.cell.parameters(), *model.prior.parameters()]
        grads = torch.autograd.grad(loss, parameters)
        results.append((trajectory, grads))
    (fused, fused_grads), (loop, loop_grads) = results
    same(fused.state, loop.state, 1e-10)
    same(fused.state[0], start)
    torch.testing.assert_close(fused.action, loop.action)
    torch.testing.assert_close(fused_grads, loop_grads)


# -- Cells against direct transcriptions ------------------------------------------------------------------------------


def rms(x, layer):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-4) * layer.weight


def layer_norm(x, layer):
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + 1e-3) * layer.weight + layer.bias


def dense(x, block):
    return F.silu(rms(x @ block[0].weight.T + block[0].bias, block[1]))


def gru_update(h, r, c, u):
    c = torch.tanh(torch.sigmoid(r) * c)
    u = torch.sigmoid(u - 1)
    return u * c + (1 - u) * h


def block_gru(cell, h, z, a):
    """Block by block: [h_b, all inputs] → D/G hidden units, normalised over D → three gates of the block."""
    a = a / torch.clamp(a.abs(), min=1)
    x = torch.cat([dense(h, cell.in_deter), dense(z, cell.in_stoch), dense(a, cell.in_action)], -1)
    per = DETER // BLOCKS
    hidden = []
    for b in range(BLOCKS):
        weight = torch.cat([cell.mix_deter.weight[b], cell.mix_inputs.weight[b * per : (b + 1) * per].T])
        bias = cell.mix_inputs.bias[b * per : (b + 1) * per]
        hidden.append(torch.cat([h[:, b * per : (b + 1) * per], x], -1) @ weight + bias)
    hidden = F.silu(rms(torch.cat(hidden, -1), cell.norm))
    gates = [[], [], []]
    for b in range(BLOCKS):
        bias = cell.gates.bias[b * 3 * per : (b + 1) * 3 * per]
        out = hidden[:, b * per : (b + 1) * per] @ cell.gates.weight[b] + bias
        for gate, part in zip(gates, out.split(per, -1), strict=True):
            gate.append(part)
    return gru_update(h, *(torch.cat(gate, -1) for gate in gates))


def layernorm_gru(cell, h, z, a):
    x = z @ cell.in_stoch.weight.T + a @ cell.in_action.weight.T
    x = F.silu(layer_norm(x, cell.norm))
    gates = layer_norm(torch.cat([x, h], -1) @ cell.gates.weight.T, cell.gates_norm)
    return gru_update(h, gates[:, :DETER], gates[:, DETER : 2 * DETER], gates[:, 2 * DETER :])


def gru(cell, h, z, a):
    """PyTorch's GRU written out, after one ELU layer."""
    x = F.elu(z @ cell.in_stoch.weight.T + a @ cell.in_action.weight.T + cell.in_action.bias)
    xr, xz, xn = (x @ cell.gru.weight_ih.T + cell.gru.bias_ih).chunk(3, -1)
    hr, hz, hn = (h @ cell.gru.weight_hh.T + cell.gru.bias_hh).chunk(3, -1)
    update = torch.sigmoid(xz + hz)
    return (1 - update) * torch.tanh(xn + torch.sigmoid(xr + hr) * hn) + update * h


@pytest.mark.parametrize(
    ("name", "equation"), [("block_gru", block_gru), ("layernorm_gru", layernorm_gru), ("gru", gru)]
)
def test_cell_equations(name, equation):
    cell = make(name, dtype=torch.float64).cell
    g = torch.Generator().manual_seed(5)
    for _ in range(3):
        h = torch.randn(7, DETER, generator=g, dtype=torch.float64)
        z = torch.randn(7, STOCH * 4, generator=g, dtype=torch.float64)
        a = 3 * torch.randn(7, ACTION, generator=g, dtype=torch.float64)
        actual = cell(h, z, cell.embed_action(a))
        torch.testing.assert_close(actual, equation(cell, h, z, a), rtol=1e-12, atol=1e-12)


def test_block_gru_action_scale_carries_no_gradient():
    """a / max(1, |a|) with the divisor held fixed: the slope of a large action is 1/|a|, not 0."""
    cell = make("block_gru", dtype=torch.float64).cell
    action = torch.tensor([[0.5, -4.0, 2.0]], dtype=torch.float64, requires_grad=True)
    embedded = cell.embed_action(action)
    bounded = (action / torch.tensor([1.0, 4.0, 2.0])).detach().requires_grad_()
    direct = dense(bounded, cell.in_action)
    torch.testing.assert_close(embedded, direct)
    (grad,) = torch.autograd.grad(embedded.sum(), action)
    (expected,) = torch.autograd.grad(direct.sum(), bounded)
    torch.testing.assert_close(grad, expected / torch.tensor([1.0, 4.0, 2.0]))


@pytest.mark.parametrize("cell", CELLS)
def test_prior_and_posterior_layers(cell):
    """One hidden layer for the posterior on [h', e]; the prior has two layers in V3, one before."""
    model = make(cell, dtype=torch.float64)
    embed, action, is_first = inputs(1, 4, dtype=torch.float64)
    post, prior = model.observe(embed, action, is_first)
    act = F.elu if cell == "gru" else F.silu
    normalise = {"gru": lambda x, _: x, "layernorm_gru": layer_norm, "block_gru": rms}[cell]

    def block(x, layer):
        return act(normalise(F.linear(x, layer[0].weight, layer[0].bias), layer[1]))

    h = post.deter[0]
    out = model.posterior_out
    expected = block(torch.cat([h, embed[0]], -1), model.posterior_in) @ out.weight.T + out.bias
    torch.testing.assert_close(post.logits[0].flatten(1), expected)
    mlp, out = model.prior
    assert len(mlp) == (2 if cell == "block_gru" else 1)
    x = h
    for layer in mlp:
        x = block(x, layer)
    torch.testing.assert_close(prior.logits[0].flatten(1), x @ out.weight.T + out.bias)


def test_gaussian_statistics():
    model = make("gru", classes=0, dtype=torch.float64, min_std=0.1)
    raw = torch.randn(2, 2 * STOCH, dtype=torch.float64)
    noise = torch.randn(2, STOCH, dtype=torch.float64)
    state = model._sample(torch.zeros(2, DETER, dtype=torch.float64), raw, noise)
    torch.testing.assert_close(state.mean, raw[:, :STOCH])
    torch.testing.assert_close(state.std, torch.log1p(raw[:, STOCH:].exp()) + 0.1)
    torch.testing.assert_close(state.stoch, state.mean + state.std * noise)


@pytest.mark.parametrize("classes", (4, 0))
def test_learned_start_is_the_mode_of_the_prior(classes):
    model = make("layernorm_gru", classes, "learned")
    start = model.initial(2)
    torch.testing.assert_close(start.deter, torch.tanh(model.initial_deter).expand(2, -1))
    statistics = model.prior(start.deter)
    if classes:
        index = statistics.unflatten(-1, (STOCH, classes)).argmax(-1)
        torch.testing.assert_close(start.stoch, F.one_hot(index, classes).float())
    else:
        torch.testing.assert_close(start.stoch, statistics[:, :STOCH])
    start.deter.sum().backward()
    assert model.initial_deter.grad.abs().min() > 0


def test_initial_weights_have_the_fan_in_of_the_map_they_are_part_of():
    """Split or block-diagonal weights are drawn like the one matrix they stand for (variance 1 / fan-in)."""
    torch.manual_seed(0)
    deter, stoch, classes, hidden, action, blocks = 256, 16, 16, 128, 64, 4
    block = nn.RSSM(8, action, deter, stoch, classes, hidden, "block_gru", blocks).cell
    layer = nn.RSSM(8, action, deter, stoch, classes, hidden, "layernorm_gru").cell
    fan = deter + blocks * 3 * hidden  # danijar/dreamerv3 counts the whole input, not the slice a block sees
    drawn = {
        "block gates": (block.gates.weight, deter),
        "mix_deter": (block.mix_deter.weight, fan),
        "mix_inputs": (block.mix_inputs.weight, fan),
        "in_stoch": (layer.in_stoch.weight, stoch * classes + action),
        "in_action": (layer.in_action.weight, stoch * classes + action),
        "gates": (layer.gates.weight, hidden + deter),
    }
    for name, (weight, fan_in) in drawn.items():
        # The relative error of a standard deviation from n draws is below 1 / sqrt(2 n) (the truncated normal has
        # lighter tails than the normal); five of those.
        assert weight.std().item() * math.sqrt(fan_in) == pytest.approx(1, abs=5 / math.sqrt(2 * weight.numel())), name


# -- Sampling ---------------------------------------------------------------------------------------------------------


def test_straight_through_value_and_gradient():
    """z = onehot + p − sg(p): the value is one-hot, the gradient that of p = (1 − u)·softmax + u / C."""
    model = make(dtype=torch.float64)
    logits = torch.randn(5, STOCH * 4, dtype=torch.float64, requires_grad=True)
    noise = noise_for(model, 5).double()
    state = model._sample(torch.zeros(5, DETER, dtype=torch.float64), logits, model._race(noise))
    hard = state.stoch.detach()
    torch.testing.assert_close(hard.round(), hard, rtol=0, atol=1e-15)
    assert torch.equal(hard.round().sum(-1), torch.ones(5, STOCH, dtype=torch.float64))
    weight = torch.randn_like(hard)
    (grad,) = torch.autograd.grad((state.stoch * weight).sum(), logits)
    p = 0.99 * torch.softmax(logits.unflatten(-1, (STOCH, 4)), -1) + 0.01 / 4
    (expected,) = torch.autograd.grad((p * weight).sum(), logits)
    torch.testing.assert_close(grad, expected)
    # Gumbel-max: the class with the largest log p − log(−log u).
    gumbel = p.log() - (-noise.log()).log()
    assert torch.equal(hard.argmax(-1), gumbel.argmax(-1))


def test_unimix_floor():
    model = make(unimix=0.08)
    p = model.probs(torch.tensor([[[1e4, 0.0, -1e4, 5.0]] * STOCH]))
    assert p.min().item() == pytest.approx(0.02, rel=1e-6)
    torch.testing.assert_close(p.sum(-1), torch.ones(1, STOCH))
    assert make(unimix=0.0).probs(torch.tensor([[[1e4, 0.0, -1e4, 5.0]]])).tolist() == [[[1.0, 0.0, 0.0, 0.0]]]


def test_class_frequencies():
    """χ² of 40,000 draws per variable against p; the 99.99 % quantile for 3 degrees of freedom is 21.1."""
    model = make()
    logits = torch.tensor([[0.0, 1.0, -1.0, 3.0], [0.0, 0.0, 0.0, 0.0], [-6.0, 6.0, 0.0, 5.0]])
    n = 40_000
    race = model._race(noise_for(model, n))
    stoch = model._sample(torch.zeros(n, DETER), logits.flatten().expand(n, -1), race).stoch
    p = 0.99 * torch.softmax(logits, -1) + 0.01 / 4
    counts = stoch.sum(0)
    assert counts.sum(-1).tolist() == [n] * 3
    chi2 = ((counts - n * p).square() / (n * p)).sum(-1)
    assert chi2.max() < 21.1, chi2


def test_extreme_noise_is_sampled():
    """Noise at the ends of [0, 1] gives neither NaN nor, away from 0, a class that cannot be."""
    model = make(unimix=0.0)
    statistics = torch.tensor([[-1e4, 0.0, -1e4, -1e4] * STOCH])
    for u in (0.0, 1 - 2**-24, 1.0):
        stoch = model._sample(torch.zeros(1, DETER), statistics, model._race(torch.full((1, STOCH, 4), u))).stoch
        assert torch.isfinite(stoch).all()
        assert stoch.sum(-1).tolist() == [[1.0] * STOCH]
        if u:
            assert stoch.argmax(-1).unique().tolist() == [1]


# -- Gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", CELLS)
def test_gradcheck_of_the_scan(cell):
    """Gaussian latents, so that the samples are differentiable; a reset in the middle of one sequence."""
    model = make(cell, 0, "learned", dtype=torch.float64)
    T, B = 2, 2
    g = torch.Generator().manual_seed(6)
    embed = torch.randn(T, B, EMBED, generator=g, dtype=torch.float64, requires_grad=True)
    # Below 1 in size: beyond it the divisor of block_gru is held fixed on purpose.
    action = (torch.rand(T, B, ACTION, generator=g, dtype=torch.float64) - 0.5).requires_grad_()
    is_first = torch.tensor([[False, False], [False, True]])
    noise = torch.randn(T, B, STOCH, generator=g, dtype=torch.float64)
    deter = torch.randn(B, DETER, generator=g, dtype=torch.float64, requires_grad=True)
    stoch = torch.randn(B, STOCH, generator=g, dtype=torch.float64, requires_grad=True)
    names = [*[n for n, p in model.named_parameters() if p.ndim == 1][:6], "initial_deter"]
    params = [dict(model.named_parameters())[n] for n in names]

    def scan(embed, action, deter, stoch, *params):
        state = nn.State(deter, stoch)
        weights = {f"rssm.{n}": p for n, p in zip(names, params, strict=True)}
        post, prior = torch.func.functional_call(Observe(model), weights, (embed, action, is_first, state, noise))
        return post.feature, post.std, prior.mean, prior.std

    assert torch.autograd.gradcheck(scan, (embed, action, deter, stoch, *params), fast_mode=True)


class Observe(torch.nn.Module):
    def __init__(self, rssm):
        super().__init__()
        self.rssm = rssm

    def forward(self, *args):
        return self.rssm.observe(*args)


@pytest.mark.parametrize(("cell", "classes", "initial"), KINDS)
def test_every_parameter_learns(cell, classes, initial):
    """Also through the discrete samples: the straight-through gradient reaches the posterior of earlier steps."""
    model = make(cell, classes, initial)
    post, prior = model.observe(*inputs(3, 2))
    statistics = (lambda s: s.logits) if classes else (lambda s: s.mean + s.std)
    (statistics(post) * statistics(prior)).sum().backward()
    still = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert still == []


def test_state_dict_round_trip():
    a, b = make("block_gru", initial="learned"), make("block_gru", initial="learned", seed=9)
    data, noise = inputs(3, 2), noise_for(a, 3, 2)
    assert not torch.equal(a.observe(*data, noise=noise)[0].deter, b.observe(*data, noise=noise)[0].deter)
    b.load_state_dict(a.state_dict())
    same(a.observe(*data, noise=noise)[0], b.observe(*data, noise=noise)[0], tol=0)


def test_state_helpers():
    model = make()
    post, _ = model.observe(*inputs(4, 2))
    same(nn.State.cat([post[:1], post[1:]]), post, tol=0)
    assert post.logits.requires_grad
    assert not any(x.requires_grad for x in (post.detach().deter, post.detach().stoch, post.detach().logits))


# -- Errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(cell="block_gur"), r"cell: .*'block_gur'.*did you mean 'block_gru'"),
        (dict(initial="ones"), r"initial: .*'ones'"),
        (dict(unimix=1.0), r"unimix: .*1\.0"),
        (dict(unimix=math.nan), r"unimix: .*nan"),
        (dict(deter_size=0), r"deter_size: .*0"),
        (dict(stoch_size=-1), r"stoch_size: .*-1"),
        (dict(classes=1), r"classes: .*1"),
        (dict(deter_size=10, blocks=4, cell="block_gru"), r"blocks: .*10.*4"),
        (dict(act="swish"), r"act: .*'swish'"),
        (dict(norm="batch"), r"norm: .*'batch'"),
    ],
)
def test_bad_construction(options, message):
    with pytest.raises(ConfigError, match=message):
        nn.RSSM(EMBED, ACTION, **{**dict(deter_size=8, stoch_size=2, classes=2, hidden_size=4), **options})


def test_bad_calls():
    model = make()
    embed, action, is_first = inputs(3, 2)
    start = model.initial(2)
    calls = {
        r"embed: expected shape \(\*, \*, 5\), got \(3, 2, 4\)": lambda: model.observe(
            embed[..., 1:], action, is_first
        ),
        r"embed: .*\(3, 5\)": lambda: model.observe(embed[:, 0], action, is_first),
        r"action: expected shape \(3, 2, 3\), got \(2, 2, 3\)": lambda: model.observe(embed, action[1:], is_first),
        r"is_first: expected shape \(3, 2\), got \(3, 2, 1\)": lambda: model.observe(
            embed, action, is_first[..., None]
        ),
        r"noise: expected shape \(3, 2, 3, 4\)": lambda: model.observe(
            embed, action, is_first, None, torch.rand(3, 2, 3, 5)
        ),
        r"state.deter: expected shape \(2, 8\), got \(1, 8\)": lambda: model.observe(
            embed, action, is_first, model.initial(1)
        ),
        r"state.stoch: expected shape \(2, 3, 4\), got \(2, 3\)": lambda: model.observe(
            embed, action, is_first, nn.State(start.deter, torch.zeros(2, 3))
        ),
        r"action: expected shape \(\*, 2, 3\), got \(4, 3, 3\)": lambda: model.imagine(torch.zeros(4, 3, 3), start),
        r"state.deter: .*\(2, 7\)": lambda: model.imagine(action, nn.State(torch.zeros(2, 7), start.stoch)),
        r"horizon: .*0": lambda: model.imagine_policy(lambda f: f[:, :3], start, 0),
        r"noise: expected shape \(4, 2": lambda: model.imagine_policy(
            lambda f: f[:, :3], start, 4, torch.rand(3, 2, 3, 4)
        ),
        r"action: expected shape \(2, 3\), got \(2, 2\)": lambda: model.imagine_policy(lambda f: f[:, :2], start, 4),
    }
    for message, call in calls.items():
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="action: expected a tensor, got ndarray"):
        model.observe(embed, action.numpy(), is_first)


def test_doctests():
    result = doctest.testmod(rssm_module)
    assert result.attempted > 0
    assert result.failed == 0
