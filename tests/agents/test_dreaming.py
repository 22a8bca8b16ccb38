"""Dreaming, DreamingV2 and V1's representations: objectives against numbers worked out from the papers' equations, and
what learns from which loss."""

import math

import pytest
import torch
from torch import nn

from phyxdream.agents import DreamerAgent, preset
from phyxdream.agents.dreamer_v1 import same_episode
from phyxdream.agents.dreaming import DreamingWorldModel, LinearDynamics
from phyxdream.agents.world_model import Encoded
from phyxdream.errors import ConfigError
from phyxdream.nn import RSSM
from phyxdream.nn.rssm import State

SMALL = dict(
    batch_size=3, batch_length=6, units=16, deter_size=16, hidden_size=16, embed_size=16, imagine_horizon=4, depth=2,
    num_envs=2, prefill=0, replay_capacity=2_000, encoder_layers=1, decoder_layers=1,
)  # fmt: skip
STATES = dict(env="gym:Pendulum-v1", pixels=None, image_size=None)
CATCH = dict(env="envpool:Catch-v0", pixels=None, image_size=None, action_repeat=1, crop_pixels=1, crop_padding=True)
DREAMING = ["dreaming", "dreaming_v2"]


def make(name, **options):
    return DreamerAgent(preset(name, **{**SMALL, **options}))


def batch_of(agent, T=6, B=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    batch = {}
    for name, (shape, dtype) in agent.replay_spec.items():
        x = torch.randn(T, B, *shape, generator=g)
        values = {"bool": x > 1, "int32": x > 0, "uint8": (40 * x + 128).clamp(0, 255)}.get(dtype, x)
        batch[name] = values.to(getattr(torch, dtype))
    batch["is_first"][:] = False
    batch["is_first"][0] = True
    return batch


def learned(agent, batch):
    return {**batch, "action": agent.encode_action(batch["action"])}


def generator():
    return torch.Generator().manual_seed(0)


def column(*values):
    return torch.tensor(values).view(-1, 1, 1)


# ---------------------------------------------------------------------------------------------------------------------
# Equations, on numbers small enough to be done on paper.


def linear_dynamics(classes, A, B, c):
    rssm = RSSM(embed_size=1, action_size=1, deter_size=1, stoch_size=1, classes=classes, hidden_size=1, unimix=0.0)
    dynamics = LinearDynamics(rssm)
    with torch.no_grad():
        dynamics.step.weight.copy_(torch.cat([torch.tensor(A), torch.tensor(B)], -1))
        dynamics.step.bias.copy_(torch.tensor(c))
    return dynamics


def test_linear_dynamics_of_gaussians():
    """z = 1 and a = 1 under 2 z + 3 a + 1: a mean of 6. The deviation starts at softplus(0) + 0.1."""
    dynamics = linear_dynamics(0, [[2.0]], [[3.0]], [1.0])
    z = dynamics(torch.ones(1, 1), torch.ones(1, 1), torch.full((1, 1), 0.5))
    assert z.item() == pytest.approx(6 + 0.5 * (math.log(2) + 0.1))


def test_linear_dynamics_of_categoricals():
    """Logits A z + B a + c of z = (1, 0), a = 2: (1, 2) + (0, 2) + (−1, −4) = (0, 0). Of two equal classes the noise
    chooses, and the gradient is that of the probabilities: d p_0 / d logits = (¼, −¼)."""
    dynamics = linear_dynamics(2, [[1.0, 7.0], [2.0, 7.0]], [[0.0], [1.0]], [-1.0, -4.0])
    z, a = torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0]])
    first, second = (dynamics(z, a, torch.tensor([[noise]])) for noise in ([0.9, 0.1], [0.1, 0.9]))
    assert sorted([first.tolist(), second.tolist()]) == [[[0.0, 1.0]], [[1.0, 0.0]]]
    (grad,) = torch.autograd.grad(first[0, 0], dynamics.step.bias)
    torch.testing.assert_close(grad, torch.tensor([0.25, -0.25]))


def test_the_same_episode():
    is_first = torch.tensor([[1, 0, 0, 1, 0]], dtype=torch.bool).T
    assert same_episode(is_first, 1).flatten().tolist() == [1, 1, 0, 1]
    assert same_episode(is_first, 2).flatten().tolist() == [1, 0, 0]
    assert same_episode(is_first, 4).flatten().tolist() == [0]


def on_a_line(K, free_nats=0.0, name="dreaming"):
    """A world model of one number: p̃ adds the action to z, and an embedding is its own key."""
    options = dict(SMALL, stoch_size=1, deter_size=1, embed_size=1, overshooting=K, free_nats=free_nats, classes=0)
    model = DreamingWorldModel(preset(name, **options).resolve(), {"state": (1,)}, 1)
    with torch.no_grad():
        model.linear_dynamics.step.weight.fill_(1.0)
    model.contrast.key = nn.Identity()
    model.rssm.draw_noise = lambda *shape, generator=None: torch.zeros(*shape, 1)
    return model


def test_multi_step_nce_by_hand():
    """Posterior samples z = 0, 1, 3, actions 0, 1, 1, and keys 0, 1, 2, under −½ (z − key)²."""
    model = on_a_line(K=2)
    feature = torch.cat([torch.full((3, 1, 1), 9.0), column(0.0, 1.0, 3.0)], -1)  # h is not told apart
    is_first = torch.tensor([[True], [False], [False]])
    batch = {"action": column(0.0, 1.0, 1.0), "is_first": is_first}
    at_edge, at_middle = math.log(1 + math.exp(-0.5) + math.exp(-2)), math.log(1 + 2 * math.exp(-0.5))
    beyond = 0.5 + math.log(math.exp(-4.5) + math.exp(-2) + math.exp(-0.5))  # z = 3, key 2
    keys = Encoded(column(0.0, 1.0, 2.0))
    found = model.contrastive_loss(keys, feature, batch, None).flatten()
    # One step: z = 0 + 1 and 1 + 1. Two steps: 0 + 1 + 1.
    expected = [at_edge, at_middle + at_middle, beyond + at_edge + at_edge]
    torch.testing.assert_close(found, torch.tensor(expected))
    # An episode that begins at the second step: z = 0 leads nowhere.
    batch["is_first"] = torch.tensor([[True], [True], [False]])
    found = model.contrastive_loss(keys, feature, batch, None).flatten()
    torch.testing.assert_close(found, torch.tensor([at_edge, at_middle, beyond + at_edge]))


class Line(nn.Module):
    """A prior N(h, 1), and h' = h + a."""

    def sample_prior(self, deter, noise=None, generator=None):
        return State(deter, deter, mean=deter, std=torch.ones_like(deter))

    def imagine(self, action, state, noise=None, generator=None):
        return self.sample_prior(state.deter + action.cumsum(0))


def overshoot(means, K, free_nats=0.0, is_first=(True, False, False), name="dreaming"):
    """The loss at h = 0, 2, 5 with actions 0, 1, 1 and posteriors N(means, 1); KL(N(m, 1) ‖ N(h, 1)) = ½ (m − h)²."""
    model = on_a_line(K, free_nats, name)
    model.rssm = Line()
    deter, mean = column(0.0, 2.0, 5.0).requires_grad_(), column(*means).requires_grad_()
    post = State(deter, mean, mean=mean, std=torch.ones_like(mean))
    batch = {"action": column(0.0, 1.0, 1.0), "is_first": torch.tensor(is_first).view(3, 1)}
    return model.overshooting_loss(post, batch, None), deter, mean


def test_overshooting_by_hand():
    """Two steps after a posterior, priors are at h = 0 + 1 and 2 + 1; three steps after, at 0 + 1 + 1. KL 4.5, 4.5 and
    8, once for the prior and once for the posterior."""
    loss, deter, mean = overshoot((0.0, 4.0, 6.0), K=2)
    torch.testing.assert_close(loss.flatten(), 2 * torch.tensor([0.0, 4.5, 4.5 + 8.0]))
    grads = torch.autograd.grad(loss.sum(), (deter, mean))
    torch.testing.assert_close(grads[0].flatten(), torch.tensor([-3.0 - 4.0, -3.0, 0.0]))
    torch.testing.assert_close(grads[1].flatten(), torch.tensor([0.0, 3.0, 3.0 + 4.0]))
    # V2's balance: 0.8 of it moves the prior, 0.2 the posterior.
    loss, deter, mean = overshoot((0.0, 4.0, 6.0), K=1, name="dreaming_v2")
    torch.testing.assert_close(loss.flatten(), torch.tensor([0.0, 4.5, 4.5]))
    grads = torch.autograd.grad(loss.sum(), (deter, mean))
    torch.testing.assert_close(grads[0].flatten(), torch.tensor([-2.4, -2.4, 0.0]))
    torch.testing.assert_close(grads[1].flatten(), torch.tensor([0.0, 0.6, 0.6]))


def test_free_nats_of_overshooting_are_of_the_mean_of_what_counts():
    """The same with 6 free nats: 4.5 on average is below, 8 is not."""
    loss, deter, _ = overshoot((0.0, 4.0, 6.0), K=2, free_nats=6.0)
    torch.testing.assert_close(loss.flatten(), 2 * torch.tensor([0.0, 6.0, 6.0 + 8.0]))
    (grad,) = torch.autograd.grad(loss.sum(), deter)
    torch.testing.assert_close(grad.flatten(), torch.tensor([-4.0, 0.0, 0.0]))
    # A new episode at the second step: what would lead there is neither paid for nor part of the mean.
    first = (True, True, False)
    for free_nats, expected in ((4.0, 4.5), (5.0, 5.0)):
        loss, *_ = overshoot((0.0, 100.0, 6.0), K=2, free_nats=free_nats, is_first=first)
        torch.testing.assert_close(loss.flatten(), 2 * torch.tensor([0.0, 0.0, expected]))
    loss, *_ = overshoot((0.0, 100.0, 6.0), K=2, free_nats=1.0, is_first=(True, True, True))
    assert not loss.any()


@pytest.mark.parametrize("name", ["dreamer_v1", "dreamer_v2"])
def test_v1s_contrast_is_of_the_whole_state_and_all_frames(name):
    agent = make(name, env="gym:Pendulum-v1", representation="contrastive", contrastive_coeff=3.0)
    model, batch = agent.model.world_model, learned(agent, batch_of(agent))
    out = model.loss(batch, generator())
    mu = model.contrast.key(model.embed(batch)).flatten(0, 1)  # (18, F)
    s = out.post.feature.flatten(0, 1)
    logits = -0.5 * (s[:, None] - mu).square().sum(-1)
    expected = logits.exp().sum(-1).log() - logits.diagonal()
    torch.testing.assert_close(out.losses["contrastive"].flatten(), expected, rtol=1e-3, atol=1e-4)
    assert model.loss_coeff("contrastive") == 3.0


# ---------------------------------------------------------------------------------------------------------------------
# What learns from which loss.


def moved(module):
    return {n for n, p in module.named_parameters() if p.grad is not None and p.grad.any()}


@pytest.mark.parametrize(
    ("name", "representation", "env"),
    [
        ("dreaming", "contrastive", CATCH), ("dreaming_v2", "contrastive", CATCH), ("dreaming", "reward_only", STATES),
        ("dreaming_v2", "contrastive", STATES), ("dreamer_v1", "contrastive", STATES),
        ("dreamer_v1", "reward_only", STATES), ("dreamer_v2", "contrastive", dict(CATCH, crop_pixels=0)),
    ],
)  # fmt: skip
def test_decoders_only_look_on(name, representation, env):
    agent = make(name, **env, representation=representation)
    model, batch = agent.model.world_model, learned(agent, batch_of(agent))
    losses = model.loss(batch, generator()).losses
    expected = {"dynamics", "representation", "reward", "continue", *agent.shapes}
    expected |= {"contrastive"} if representation == "contrastive" else set()
    expected |= {"overshooting"} if name in DREAMING else set()
    assert losses.keys() == expected and all(loss.shape == (6, 3) for loss in losses.values())
    sum(losses[n].sum() for n in agent.shapes).backward(retain_graph=True)
    found = moved(model)
    assert found and all(n.startswith("decoder.") for n in found)
    for other in expected - set(agent.shapes) - {"continue"}:
        model.zero_grad()
        losses[other].sum().backward(retain_graph=True)
        found = moved(model)
        assert not any(n.startswith("decoder.") for n in found)
        if other == "contrastive":
            parts = {n.split(".")[0] for n in found}
            assert {"encoder", "rssm", "contrast"} <= parts
            assert ("linear_dynamics" in parts) is (name in DREAMING)


@pytest.mark.parametrize("name", ["dreaming", "dreamer_v1"])
def test_a_decoder_takes_no_part_in_the_clipping_of_the_others(name):
    """However large its gradients are, the rest learns the same."""
    options = dict(STATES, representation="contrastive", grad_clip=1e-3)
    agents = [make(name, **options, reconstruction_coeff=coeff) for coeff in (1.0, 1e4)]
    for agent in agents:
        agent.update(batch_of(agent))
    a, b = (dict(agent.model.named_parameters()) for agent in agents)
    start = dict(make(name, **options).model.named_parameters())
    same = {n for n in a if torch.equal(a[n], b[n])}
    assert all(n in same for n in a if "decoder" not in n)
    assert any(not torch.equal(a[n], start[n]) for n in a if n.startswith("world_model.rssm"))
    assert any(not torch.equal(a[n], start[n]) for n in a if n.startswith("world_model.decoder"))


@pytest.mark.parametrize("name", DREAMING)
def test_two_crops_to_learn_from_and_the_centre_to_act_on(name):
    agent = make(name, **dict(CATCH, crop_padding=False, image_size=16, crop_pixels=3))
    model, batch = agent.model.world_model, learned(agent, batch_of(agent))
    shape = agent.shapes["image"]
    assert shape[1:] == (16, 16)
    seen = []
    model.encoder.register_forward_hook(lambda module, inputs, out: seen.append(inputs[0]["image"]))
    model.loss(batch, generator())
    posterior, target = seen
    centre = batch["image"][..., 3:-3, 3:-3]
    assert posterior.shape == target.shape == centre.shape
    assert not torch.equal(posterior, target) and not torch.equal(posterior, centre)
    seen.clear()
    agent.act({"image": batch["image"][0].numpy()}, batch["is_first"][0].numpy())
    assert torch.equal(seen[0][0], centre[0])
    # Those who look on see all of it.
    assert model.open_loop(batch, 2, generator())["image"].shape == (6, 3, *shape)


def test_without_crops_a_frame_is_encoded_once():
    agent = make("dreaming", **STATES)
    model, calls = agent.model.world_model, []
    model.encoder.register_forward_hook(lambda *_: calls.append(1))
    model.loss(learned(agent, batch_of(agent)), generator())
    assert len(calls) == 1


@pytest.mark.parametrize("name", DREAMING)
@pytest.mark.parametrize("critic", ["gaussian", "bilinear", "cosine"])
def test_frames_are_told_apart_after_some_updates(name, critic):
    options = dict(CATCH, crop_pixels=0, contrastive_critic=critic, learning_rate=3e-3, stoch_size=8, free_nats=1e3,
                   overshooting=0)  # fmt: skip
    agent = make(name, **options, **({"classes": 4} if name == "dreaming_v2" else {}))
    batch = batch_of(agent)
    first, *_, last = (agent.update(batch).metrics["loss/contrastive"].item() for _ in range(40))
    assert last < 0.8 * first


# ---------------------------------------------------------------------------------------------------------------------
# Whole agents.


@pytest.mark.parametrize(
    ("agent", "representation"),
    [("dreamer_v3", "contrastive"), ("dreamer_v3", "reward_only"), ("dreaming", "reconstruction"),
     ("dreaming_v2", "reconstruction")],
)  # fmt: skip
def test_representations_are_refused_where_there_are_none(agent, representation):
    with pytest.raises(ConfigError, match=rf"^representation: .*agent '{agent}', got '{representation}'"):
        preset(agent, representation=representation).resolve()


def test_what_cannot_be_is_refused():
    with pytest.raises(ConfigError, match=r"^overshooting: .*batch_length - 2 = 4 steps, got 5"):
        make("dreaming", **STATES, overshooting=5)
    with pytest.raises(ConfigError, match=r"^crop_pixels: .*'image'.*got 2"):
        make("dreaming", **dict(CATCH, crop_pixels=2))


@pytest.mark.parametrize(("name", "env"), [("dreaming", CATCH), ("dreaming_v2", STATES)])
def test_trains_stops_and_resumes(name, env, in_two_halves, tmp_path):
    """A run in two halves ends where one in a piece does."""
    options = dict(env, total_steps=80, log_every=40, eval_episodes=1, train_ratio=9.0, time_limit=20)
    in_two_halves(make(name, logdir=str(tmp_path / "whole"), **options), at=40)
