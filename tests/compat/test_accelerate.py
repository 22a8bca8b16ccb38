"""`accelerate` on stand-ins of other codebases: same numbers, same samples from the same seed, same everything else."""

import copy
import io
import pickle
import re
from functools import partial

import pytest
import stand_ins as s
import torch
from torch import nn

import phyxdream
from phyxdream.compat import acceleration

B, T = 3, 5


def normal(*shape, like=None, grad=True):
    return torch.randn(shape, dtype=torch.float32 if like is None else like.dtype).requires_grad_(grad)


class Kind:
    """A stand-in, and calls of it: each takes the module and returns outputs and the inputs that have gradients."""

    def __init__(self, make, **calls):
        self.make, self.calls = make, calls


def first_steps(dtype, *shape):
    first = torch.zeros(T, B, *shape, dtype=dtype)
    first[2, 1] = first[4, 2] = first[4, 0] = 1
    return first


def observe_dreamerv3(m, with_state=False):
    embed, action = normal(B, T, s.E, like=m._obs_stat_layer.weight), normal(B, T, s.A, like=m._obs_stat_layer.weight)
    state = {k: x.detach() for k, x in m.initial(B).items()} if with_state else None
    if with_state:
        state["deter"] = torch.randn_like(state["deter"]).requires_grad_()
    return m.observe(embed, action, first_steps(embed.dtype).t(), state), [embed, action]


def imagine_dreamerv3(m):
    like = m._obs_stat_layer.weight
    state = dict(stoch=normal(B, s.S, s.C, like=like), deter=normal(B, s.D, like=like))
    action = normal(B, T, s.A, like=like)
    return m.imagine_with_action(action, state), [action, *state.values()]


def step_dreamerv3(m):
    like = m._obs_stat_layer.weight
    state = dict(stoch=normal(B, s.S, s.C, like=like), deter=normal(B, s.D, like=like))
    embed, action = normal(B, s.E, like=like), normal(B, s.A, like=like)
    post, prior = m.obs_step(dict(state), action, embed, torch.tensor([0.0, 1.0, 0.0], dtype=like.dtype))
    return (post, prior, m.img_step(post, action), m.img_step(prior, action, sample=False)), [embed, action]


def observe_r2(m):
    like = m._deter_net._dyn_gru.weight
    embed, action, state = normal(B, T, s.E, like=like), normal(B, T, s.A, like=like), m.initial(B)
    return m.observe(embed, 2 * action, state, first_steps(torch.float32).t() > 0), [embed, action]


def imagine_r2(m):
    like = m._deter_net._dyn_gru.weight
    stoch, deter, action = (normal(*x, like=like) for x in ((B, s.S, s.C), (B, s.D), (B, T, s.A)))
    stepped = m.obs_step(stoch, deter, action[:, 0], normal(B, s.E, like=like), torch.tensor([False, True, False]))
    return (m.imagine_with_action(stoch, deter, action), m.img_step(stoch, deter, action[:, 0]), stepped), [
        stoch,
        deter,
    ]


def loop_sheeprl(m, latent, resets=True):
    """As in its training."""
    like = m.transition_model._model[0].weight
    embeds, actions = normal(T, B, s.E, like=like), normal(T, B, s.A, like=like)
    first = [first_steps(like.dtype, 1)] * resets
    z, h, found = like.new_zeros(1, B, *latent), like.new_zeros(1, B, s.D), []
    for t in range(T):
        found.append(m.dynamic(z, h, actions[t : t + 1], embeds[t : t + 1], *(x[t : t + 1] for x in first)))
        h, z = found[-1][:2]
    return found, [embeds, actions]


def imagine_sheeprl(m, flat):
    like = m.transition_model._model[0].weight
    z, h = normal(1, B, flat, like=like), normal(1, B, s.D, like=like)
    return m.imagination(z, h, normal(1, B, s.A, like=like)), [z, h]


def rollout_torchrl(m):
    TensorDict = pytest.importorskip("tensordict").TensorDict
    embed = normal(B, T, s.E)
    data = TensorDict(
        {
            "state": torch.randn(B, T, s.S * s.C),
            "belief": torch.randn(B, T, s.D),
            "action": 2 * torch.randn(B, T, s.A),
            "is_init": first_steps(torch.float32, 1).transpose(0, 1) > 0,
            "next": TensorDict({"encoded_latents": embed, "reward": torch.randn(B, T, 1)}, [B, T]),
        },
        [B, T],
    )
    given = data.clone()
    found = m(data)
    assert all((data.get(key) == given.get(key)).all() for key in ("state", "action", "is_init"))
    return found, [embed]


def prior_torchrl(m):
    state, belief, action = (normal(2, B, n) for n in (s.S * s.C, s.D, s.A))
    return m(state, belief, 2 * action), [state, belief]


def train_rllib(m):
    observations = torch.randn(B, T, 6)
    return m.forward_train(observations, torch.randn(B, T, s.A), first_steps(torch.float32).t()), []


def attend(m):
    inputs = normal(B, 11, 8, like=m.to_k.weight)
    return (m(inputs), m(inputs, num_slots=5)), [inputs]


latents = s.S, s.C
KINDS = {
    "dreamerv3-torch": Kind(
        s.DreamerV3Torch, observe=observe_dreamerv3, go_on=partial(observe_dreamerv3, with_state=True),
        imagine=imagine_dreamerv3, step=step_dreamerv3,
    ),
    "dreamerv3-torch zeros": Kind(partial(s.DreamerV3Torch, initial="zeros", unimix=0.0), observe=observe_dreamerv3),
    "dreamerv3-torch V2": Kind(partial(s.DreamerV3Torch, act=nn.ELU, eps=1e-5), observe=observe_dreamerv3),
    "dreamerv3-torch prior": Kind(partial(s.DreamerV3Torch, prior_layers=2), imagine=imagine_dreamerv3),
    "r2dreamer": Kind(s.R2Dreamer, observe=observe_r2, imagine=imagine_r2),
    "r2dreamer relu": Kind(partial(s.R2Dreamer, act=nn.ReLU, eps=1e-5, unimix=0.0), observe=observe_r2),
    "sheeprl V3": Kind(
        s.SheeprlV3, loop=partial(loop_sheeprl, latent=latents), imagine=partial(imagine_sheeprl, flat=s.S * s.C)
    ),
    "sheeprl V3 unimix 0": Kind(partial(s.SheeprlV3, unimix=0.0), loop=partial(loop_sheeprl, latent=latents)),
    "sheeprl V2": Kind(
        s.SheeprlV2, loop=partial(loop_sheeprl, latent=latents), imagine=partial(imagine_sheeprl, flat=s.S * s.C)
    ),
    "sheeprl V2 norm": Kind(partial(s.SheeprlV2, mlp_eps=1e-5), loop=partial(loop_sheeprl, latent=latents)),
    "sheeprl V1": Kind(
        s.SheeprlV1, loop=partial(loop_sheeprl, latent=(s.S,), resets=False), imagine=partial(imagine_sheeprl, flat=s.S)
    ),
    "torchrl": Kind(s.TorchrlRollout, forward=rollout_torchrl),
    "torchrl gru": Kind(partial(s.TorchrlRollout, "gru"), forward=rollout_torchrl),
    "torchrl without resets": Kind(partial(s.TorchrlRollout, reset_key=None), forward=rollout_torchrl),
    "torchrl prior": Kind(s.TorchrlPrior, forward=prior_torchrl),
    "torchrl cumulative": Kind(partial(s.TorchrlRollout, draw=s.cumulative), forward=rollout_torchrl),
    "torchrl prior cumulative": Kind(partial(s.TorchrlPrior, draw=s.cumulative), forward=prior_torchrl),
    "RLlib": Kind(s.RLlib, train=train_rllib),
    "RLlib normed": Kind(partial(s.RLlib, normed=True), train=train_rllib),
    "slot attention": Kind(s.SlotAttention, forward=attend),
    "slot attention, no biases": Kind(
        partial(s.SlotAttention, bias=False, sequence=True, split=True, eps=1e-3, log="slots_log_sigma"), forward=attend
    ),
}  # fmt: skip
CALLS = [(kind, call) for kind, found in KINDS.items() for call in found.calls]
TENSORDICT = {"torchrl", "torchrl cumulative", "torchrl gru", "torchrl without resets"}


def pair(kind):
    """A module with weights of no special values, and an accelerated copy."""
    if kind in TENSORDICT:
        pytest.importorskip("tensordict")
    torch.manual_seed(0)
    module = KINDS[kind].make()
    with torch.no_grad():
        for x in module.parameters():
            x.add_(0.3 * torch.randn_like(x) / (x[0].numel() if x.dim() > 1 else 1) ** 0.5)
    fast = copy.deepcopy(module)
    summary = phyxdream.accelerate(fast)
    assert summary.replaced, str(summary)
    return module, fast


def results(call, module, seed=7):
    """Outputs and gradients by name, of inputs and Parameters."""
    torch.manual_seed(seed)
    outputs, inputs = call(module)
    named = {k: x for k, x in acceleration._leaves(outputs, "output") if x.is_floating_point()}
    total = sum((x * torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view(x.shape).sin()).sum() for x in named.values())
    leaves = dict(enumerate(x for x in inputs if x.requires_grad)) | dict(module.named_parameters())
    wanted = {k: x for k, x in leaves.items() if x.requires_grad}
    grads = torch.autograd.grad(total, list(wanted.values()), allow_unused=True) if total.requires_grad else []
    named = {k: x.detach() for k, x in named.items()}
    return named | {f"gradient of {k}": g for k, g in zip(wanted, grads, strict=False)}


def assert_same(found, expected, tolerance):
    assert found.keys() == expected.keys()
    largest = max(x.norm().item() for k, x in expected.items() if "gradient" in k and x is not None)
    for name, value in expected.items():
        if value is None:
            assert found[name] is None, name
            continue
        assert found[name].shape == value.shape and found[name].dtype == value.dtype, name
        # Some gradients are 0 but for rounding: then the largest is the scale.
        scale = max(value.norm().item(), 1e-2 * largest if "gradient" in name else 0.0) or 1.0
        assert (found[name] - value).norm().item() <= tolerance * scale, name


@pytest.mark.parametrize(("kind", "call"), CALLS)
def test_same_outputs_samples_and_gradients(kind, call):
    module, fast = pair(kind)
    call = KINDS[kind].calls[call]
    for seed in (7, 8):
        expected, found = results(call, module, seed), results(call, fast, seed)
        assert_same(found, expected, 1e-5)
        for name in (k for k in expected if "stoch" in k):
            assert torch.equal(found[name].round(), expected[name].round()), name


@pytest.mark.parametrize(("kind", "call"), [(k, c) for k, c in CALLS if "torchrl" not in k and "RLlib" not in k])
def test_the_same_in_float64(kind, call):
    module, fast = pair(kind)
    call = KINDS[kind].calls[call]
    assert_same(results(call, fast.double()), results(call, module.double()), 1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_else_changes(kind):
    """State dict, Parameters, pickling, deepcopy, repr; an optimiser made before goes on."""
    if kind in TENSORDICT:
        pytest.importorskip("tensordict")
    torch.manual_seed(0)
    module = KINDS[kind].make()
    before = {k: x.data_ptr() for k, x in module.state_dict().items()}
    shown, parameters, own = repr(module), list(module.parameters()), type(module)
    phyxdream.accelerate(module)
    assert {k: x.data_ptr() for k, x in module.state_dict().items()} == before
    assert all(a is b for a, b in zip(module.parameters(), parameters, strict=True))
    assert repr(module) == shown and isinstance(module, own)

    call = next(iter(KINDS[kind].calls.values()))
    expected = results(call, module)
    stored = io.BytesIO()
    torch.save(module, stored)
    stored.seek(0)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(stored, weights_only=False)):
        assert type(other) is type(module)
        assert_same(results(call, other), expected, 0.0)
    fresh = KINDS[kind].make()
    fresh.load_state_dict(module.state_dict())
    phyxdream.accelerate(fresh)
    assert_same(results(call, fresh), expected, 0.0)

    assert phyxdream.restore(module)
    assert type(module) is own and phyxdream.restore(module) == ()
    assert_same(results(call, module), expected, 1e-5)


def test_training_steps_are_the_same():
    module, fast = pair("dreamerv3-torch")
    losses = []
    for m in (module, fast):
        optimiser = torch.optim.Adam(m.parameters(), 1e-2)
        torch.manual_seed(3)
        losses.append([])
        for _ in range(5):
            (post, prior), _ = observe_dreamerv3(m)
            loss = (post["deter"].square() + prior["deter"]).mean() + (post["logit"] - prior["logit"]).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses[-1].append(loss.item())
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["dreamerv3-torch", "r2dreamer", "slot attention"])
def test_compiles(kind):
    _, fast = pair(kind)
    call = next(iter(KINDS[kind].calls.values()))
    expected = results(call, fast)
    method = {"slot attention": "forward"}.get(kind, "observe")
    eager = getattr(fast, method)
    torch.compiler.reset()
    setattr(fast, method, torch.compile(eager, backend="aot_eager"))
    try:
        assert_same(results(call, fast), expected, 1e-5)
    finally:
        delattr(fast, method)


class Whole(nn.Module):
    """A model with an RSSM inside."""

    def __init__(self, rssm):
        super().__init__()
        self.encoder, self.rssm = nn.Linear(6, s.E), rssm

    def forward(self, x, action, first):
        post, prior = self.rssm.observe(self.encoder(x), action, first)
        return post["deter"].mean() + post["logit"].square().mean() + prior["logit"].square().mean()


def test_data_parallel(tmp_path):
    module, fast = pair("dreamerv3-torch")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        grads = []
        for rssm in (module, fast):
            torch.manual_seed(1)
            whole = nn.parallel.DistributedDataParallel(Whole(rssm))
            torch.manual_seed(1)
            whole(torch.randn(B, T, 6), torch.randn(B, T, s.A), first_steps(torch.float32).t()).backward()
            grads.append({k: x.grad for k, x in whole.named_parameters()})
    finally:
        torch.distributed.destroy_process_group()
    assert all(x is not None for x in grads[1].values())
    for name, expected in grads[0].items():
        torch.testing.assert_close(grads[1][name], expected, rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# What is found, and what is said.


def test_the_summary_names_what_was_replaced():
    whole = Whole(s.DreamerV3Torch())
    whole.add_module("slots", s.SlotAttention())
    summary = phyxdream.accelerate(whole)
    assert [part.path for part in summary.replaced] == ["rssm", "slots"] and not summary.left
    assert "rssm: RSSM of dreamerv3-torch: observe, imagine_with_action, obs_step, img_step replaced" in str(summary)
    again = phyxdream.accelerate(whole)
    assert again == summary
    assert phyxdream.restore(whole) == ("rssm", "slots")


def test_an_agent_that_is_no_module():
    class Agent:
        def __init__(self):
            self.world_model, self.steps = Whole(s.R2Dreamer()), 0

    agent = Agent()
    assert [part.path for part in phyxdream.accelerate(agent).replaced] == ["world_model.rssm"]
    assert phyxdream.restore(agent) == ("world_model.rssm",)


def test_linear_layers_if_wanted():
    torch.manual_seed(0)
    whole = Whole(s.DreamerV3Torch())
    plain = copy.deepcopy(whole)
    call = lambda m: (m(torch.randn(B, T, 6), torch.randn(B, T, s.A), first_steps(torch.float32).t()), [])  # noqa: E731
    summary = phyxdream.accelerate(whole, linear=True)
    assert len(summary.replaced) == 2
    assert "7 layers: torch.nn.Linear: forward replaced: differentiable once" in str(summary)
    assert phyxdream.accelerate(whole) == summary
    assert_same(results(call, whole), results(call, plain), 1e-5)
    assert_same(results(call, pickle.loads(pickle.dumps(whole))), results(call, plain), 1e-5)
    x = torch.randn(40, 6, dtype=torch.float64)
    torch.testing.assert_close(whole.encoder.double()(x), plain.encoder.double()(x))
    assert len(phyxdream.restore(whole)) == 8 and type(whole.encoder) is nn.Linear
    with pytest.raises(TypeError, match="linear: expected True or False, got int"):
        phyxdream.accelerate(whole, linear=1)


def test_nothing_to_replace():
    assert "nothing replaced" in str(phyxdream.accelerate(nn.Linear(2, 2)))
    for wrong in (3, object()):
        with pytest.raises(TypeError, match=r"module: expected an nn\.Module, or an agent that holds some"):
            phyxdream.accelerate(wrong)
        with pytest.raises(TypeError, match=r"module: expected an nn\.Module"):
            phyxdream.restore(wrong)


def hooked():
    module = s.DreamerV3Torch()
    module._obs_out_layers.register_forward_hook(lambda *args: None)
    return module


def with_dropout():
    module = s.SheeprlV3()
    module.transition_model._model.insert(3, nn.Dropout(0.1))
    return module


def changed(module, **attributes):
    for name, x in attributes.items():
        setattr(module, name, x)
    return module


class OwnStep(s.DreamerV3Torch):
    """A fork with the same parts and another equation."""

    def img_step(self, prev_state, prev_action, sample=True):
        found = super().img_step(prev_state, prev_action, sample)
        return {**found, "deter": 0.9 * found["deter"]}


class EnsembleRSSM(nn.Module):
    def __init__(self):
        super().__init__()
        self.members = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))


MISFITS = {
    "another norm eps in one layer": (
        lambda: s.DreamerV3Torch(prior_eps=1e-5),
        r"different eps of its layer norms in its layers: 1e-05, 0.001",
    ),
    "an activation no op has": (lambda: s.DreamerV3Torch(act=nn.Mish), "Mish in _img_in_layers, where the ops know"),
    "two activations": (
        lambda: changed(s.R2Dreamer(), _img_net=s.R2Dreamer(act=nn.ELU)._img_net),
        "different activations in its layers: elu, silu",
    ),
    "an ELU with alpha": (lambda: s.DreamerV3Torch(act=partial(nn.ELU, alpha=0.5)), "an ELU with alpha 0.5"),
    "an extra layer": (lambda: s.DreamerV3Torch(post_layers=2), "a posterior of 2 hidden layers instead of 1"),
    "an extra block layer": (lambda: s.R2Dreamer(dyn_layers=2), "2 block layers before the gates instead of 1"),
    "Gaussian latents": (lambda: changed(s.DreamerV3Torch(), _discrete=0), "Gaussian latents"),
    "a deeper recurrence": (lambda: changed(s.DreamerV3Torch(), _rec_depth=2), "a recurrence 2 deep instead of 1"),
    "half precision": (lambda: s.R2Dreamer().half(), "weights in float16"),
    "bfloat16": (lambda: s.SlotAttention().bfloat16(), "weights in bfloat16"),
    "a hook": (hooked, "hooks on its part _obs_out_layers, which would not run"),
    "dropout": (with_dropout, "dropout in transition_model"),
    "another equation": (OwnStep, r"its observe computes something else: output 0 deter differs by \d+%"),
    "an ensemble": (EnsembleRSSM, "an ensemble, or a composition that is not known"),
    "a GRU of two layers": (
        lambda: changed(s.SheeprlV1(), recurrent_model=changed(s.RecurrentV1(nn.ELU), rnn=nn.GRU(s.D, s.D, 2))),
        "no GRU of one layer",
    ),
    "slots of another start": (lambda: s.SlotAttention(log="slots_sigma"), "slots_mu and the logarithm of a deviation"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISFITS)
def test_what_is_almost_right_is_left_alone_and_said(name):
    make, message = MISFITS[name]
    module = make()
    before = type(module)
    summary = phyxdream.accelerate(module)
    assert not summary.replaced and type(module) is before
    assert len(summary.left) == 1
    assert re.search(message, str(summary)), str(summary)
    assert "left alone" in str(summary)


def test_frozen_weights_are_matched():
    module, fast = pair("dreamerv3-torch")
    for m in (module, fast):
        for name, x in m.named_parameters():
            x.requires_grad_("_img" not in name)
    found, expected = results(observe_dreamerv3, fast), results(observe_dreamerv3, module)
    assert_same(found, expected, 1e-5)
    phyxdream.restore(fast)
    assert phyxdream.accelerate(fast).replaced
    for x in fast.parameters():
        x.requires_grad_(False)
    with torch.no_grad():
        (post, _), _ = observe_dreamerv3(fast)
    assert not post["deter"].requires_grad


# ---------------------------------------------------------------------------------------------------------------------
# Calls that go to the original.


def counted(monkeypatch, kind, method):
    calls = []
    original = getattr(kind, method)
    monkeypatch.setattr(kind, method, lambda *args: calls.append(1) or original(*args))
    return calls


def test_what_changes_later_goes_to_the_original(monkeypatch):
    calls = counted(monkeypatch, s.DreamerV3Torch, "observe")
    _, fast = pair("dreamerv3-torch")
    calls.clear()
    observe_dreamerv3(fast)
    assert not calls
    with torch.autocast("cpu", torch.bfloat16):
        observe_dreamerv3(fast)
    assert len(calls) == 1
    observe_dreamerv3(fast.bfloat16())
    assert len(calls) == 2
    observe_dreamerv3(fast.float())
    assert len(calls) == 2
    fast._cell._update_bias = 0
    observe_dreamerv3(fast)
    assert len(calls) == 3


def test_new_parameters_are_seen():
    """The ops read what the module holds at the call."""
    module, fast = pair("r2dreamer")
    other = s.R2Dreamer()
    for m in (module, fast):
        m.load_state_dict(other.state_dict())
        m._obs_net[0].weight = nn.Parameter(2 * other._obs_net[0].weight.detach())
    assert_same(results(observe_r2, fast), results(observe_r2, module), 1e-5)


@pytest.mark.parametrize("change", ["detached", "half way", "edited", "other slices"])
def test_a_loop_of_sheeprl_that_is_not_the_foreseen_one(change):
    """dynamic looks ahead only as far as the calls are what it foresaw; the numbers are those of single steps."""
    module, fast = pair("sheeprl V3")

    def loop(m):
        torch.manual_seed(5)
        embeds, actions, first = torch.randn(T, B, s.E), torch.randn(T, B, s.A), first_steps(torch.float32, 1)
        z, h, found = torch.zeros(1, B, *latents), torch.zeros(1, B, s.D), []
        for t in range(T):
            if change == "edited" and t == 2:
                actions += 1.0
            i = 4 - t if change == "other slices" else t
            if change == "half way" and t == 3:
                break
            noise_free = m.recurrent_model  # h does not depend on the samples of this step
            h, z, *_ = m.dynamic(z, h, actions[i : i + 1], embeds[i : i + 1], first[i : i + 1])
            assert noise_free is m.recurrent_model
            found.append(h)
            if change == "detached":
                h, z = h.detach(), torch.zeros_like(z)
            if change in ("edited", "other slices"):
                z = torch.zeros_like(z)
        return torch.cat(found)

    torch.testing.assert_close(loop(fast), loop(module), rtol=1e-5, atol=1e-5)
    found, expected = (
        results(KINDS["sheeprl V3"].calls["loop"], fast),
        results(KINDS["sheeprl V3"].calls["loop"], module),
    )
    assert_same(found, expected, 1e-5)  # and the next loop is a fresh one


def test_sheeprl_observe_needs_no_accelerate():
    from phyxdream.compat import sheeprl

    module, fast = pair("sheeprl V2")
    torch.manual_seed(2)
    embeds, actions, first = torch.randn(T, B, s.E), torch.randn(T, B, s.A), first_steps(torch.float32, 1)
    for m in (module, fast):
        torch.manual_seed(4)
        found = sheeprl.observe(m, embeds, actions, first)
        torch.manual_seed(4)
        z, h, steps = torch.zeros(1, B, *latents), torch.zeros(1, B, s.D), []
        for t in range(T):
            steps.append(module.dynamic(z, h, actions[t : t + 1], embeds[t : t + 1], first[t : t + 1]))
            h, z = steps[-1][:2]
        for x, y in zip(found, zip(*steps, strict=True), strict=True):
            torch.testing.assert_close(x, torch.cat(y), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="rssm: expected an RSSM of sheeprl's DreamerV1, V2 or V3, got Linear"):
        sheeprl.observe(nn.Linear(2, 2), embeds, actions, first)
    with pytest.raises(ValueError, match="rssm: expected one that the fused ops compute, got a posterior of 2 hidden"):
        sheeprl.observe(s.SheeprlV2(layers=2), embeds, actions, first)
