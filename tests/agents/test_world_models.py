"""World Models: losses on numbers small enough to be done on paper, memory, dreams, CMA-ES, and whole agents."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from phyxdream.agents import DreamerAgent, preset
from phyxdream.agents.cma_es import CMAES
from phyxdream.agents.world_models import Controller
from phyxdream.errors import ConfigError
from phyxdream.nn.distributions import GaussianMixture, SquaredError
from phyxdream.nn.mdn_lstm import MDNLSTM
from phyxdream.nn.rssm import State

SMALL = dict(
    batch_size=3, batch_length=6, units=16, deter_size=8, stoch_size=3, mixtures=2, imagine_horizon=4, population=6,
    dreams=5, evolve_after=2, evolve_every=2, num_envs=2, prefill=0, replay_capacity=2_000, encoder_layers=1,
    decoder_layers=1, depth=4,
)  # fmt: skip


def make(env="gym:Pendulum-v1", **options):
    return DreamerAgent(preset("world_models", env=env, **{**SMALL, **options}))


def batch_of(agent, T=6, B=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    batch = {}
    for name, (shape, dtype) in agent.replay_spec.items():
        x = torch.randn(T, B, *shape, generator=g)
        values = {"bool": x > 1, "int32": x > 0, "uint8": x.abs() * 100}.get(dtype, x)
        batch[name] = values.to(getattr(torch, dtype))
    batch["is_first"][:] = False
    batch["is_first"][0] = True
    return batch


# ---------------------------------------------------------------------------------------------------------------------
# Equations, on numbers small enough to be done on paper.


def test_mixture_by_hand():
    """Weights ¼ and ¾, N(0, 1) and N(2, ½²), at x = 1: exp(−½)/√2π in the first, 2 exp(−2)/√2π in the second."""
    logits, mean = torch.tensor([[0.0, math.log(3.0)]]), torch.tensor([[0.0, 2.0]])
    mixture = GaussianMixture(logits, mean, torch.tensor([[0.0, math.log(0.5)]]))
    density = (0.25 * math.exp(-0.5) + 0.75 * 2 * math.exp(-2)) / math.sqrt(2 * math.pi)
    assert mixture.log_prob(torch.tensor([1.0])).item() == pytest.approx(math.log(density))
    assert mixture.mode.tolist() == [2.0]
    # Two such variables are independent.
    twice = GaussianMixture(*(x.repeat(2, 1) for x in (mixture.logits, mixture.mean, mixture.log_std)))
    assert twice.loss(torch.tensor([1.0, 1.0])).item() == pytest.approx(-2 * math.log(density))


def test_mixture_is_drawn_by_its_noise():
    """Noise below ¼ chooses N(0, 1). A temperature of 4 makes the weights 1 : 3^¼ (0.432 and 0.568) and √4 as wide."""
    parts = torch.tensor([[[0.0, math.log(3.0)]], [[0.0, 2.0]], [[0.0, math.log(0.5)]]])
    mixture = GaussianMixture(*parts.unsqueeze(1).expand(3, 4, 1, 2))
    uniform, normal = torch.tensor([[0.0], [0.24], [0.26], [0.99]]), torch.tensor([[1.0], [-1.0], [1.0], [-1.0]])
    assert mixture.draw(uniform, normal).flatten().tolist() == pytest.approx([1.0, -1.0, 2.5, 1.5])
    uniform = torch.tensor([[0.0], [0.42], [0.44], [0.99]])
    found = mixture.draw(uniform, torch.ones(4, 1), temperature=4.0)
    assert found.flatten().tolist() == pytest.approx([2.0, 2.0, 3.0, 3.0])


class Fixed(nn.Module):
    """Gives the same whatever it reads."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x):
        return self.value


def test_losses_by_hand():
    """One variable in z, q(z) = N(1, ½²): KL = ½ (1 + ¼ − 1 − 2 ln ½) = ⅛ + ln 2.

    Its sample is 1 + ½ ε. M expects N(0, 1) with a weight of 1, a reward of 2 where 5 came, and the episode to go on
    with a chance of ¾. The first of the two steps is nothing that M could expect.
    """
    agent = make(stoch_size=1, mixtures=1)
    model = agent.model.world_model
    model.encoder, model.project = Fixed(None), Fixed(torch.tensor([1.0, math.log(0.5)]).expand(2, 1, 2))
    with torch.no_grad():
        for layer in (model.rssm.mixture, model.reward.module.out, model.cont.module.out):
            layer.weight.zero_()
            layer.bias.zero_()
        model.reward.module.out.bias.fill_(2.0)
        model.cont.module.out.bias.fill_(math.log(3.0))
    model.decoder = Fixed({"obs": SquaredError(torch.full((2, 1, 3), 0.5), 1)})
    model.names = ["obs"]
    batch = {"obs": torch.ones(2, 1, 3), "action": torch.zeros(2, 1, 1), "reward": torch.full((2, 1), 5.0),
             "is_first": torch.tensor([[True], [False]]), "is_terminal": torch.tensor([[False], [True]])}  # fmt: skip
    losses = model.loss(batch, torch.Generator().manual_seed(0)).losses
    noise = torch.randn(2, 1, 1, generator=torch.Generator().manual_seed(0))[1].item()
    z = 1 + 0.5 * noise
    expected = {
        "representation": [0.125 + math.log(2)] * 2,
        "dynamics": [0.0, 0.5 * z * z + 0.5 * math.log(2 * math.pi)],
        "reward": [0.0, 9.0],
        "continue": [0.0, -math.log(0.25)],
        "obs": [3 * 0.25] * 2,
    }
    assert losses.keys() == expected.keys()
    for name, values in expected.items():
        assert losses[name].flatten().tolist() == pytest.approx(values, rel=1e-5), name
    # V's losses count as they are, M's are shared out over the dimensions of z, reward and termination.
    assert [model.loss_coeff(name) for name in expected] == [1.0, 1 / 3, 1 / 3, 1 / 3, 1.0]


def test_vision_learns_nothing_of_memory():
    agent = make()
    model, batch = agent.model.world_model, batch_of(agent)
    batch["action"] = agent.encode_action(batch["action"])
    losses = model.loss(batch, torch.Generator().manual_seed(0)).losses

    def learning(*names):
        model.zero_grad()
        sum(losses[name].sum() for name in names).backward(retain_graph=True)
        return {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}

    assert learning("dynamics", "reward", "continue") == {"rssm", "reward", "cont"}
    assert learning("representation", *model.names) == {"encoder", "project", "decoder"}


# ---------------------------------------------------------------------------------------------------------------------
# Memory.


def by_steps(memory, z, action, is_first, state):
    """`MDNLSTM.filter` one step and one sequence at a time."""
    w, H = memory.lstm, memory.deter_size
    out = torch.zeros(*is_first.shape, 2 * H)
    for b in range(z.shape[1]):
        last, h, c = state.stoch[b], state.deter[b, :H], state.deter[b, H:]
        for t in range(len(z)):
            x = torch.cat([last, action[t, b]])
            if is_first[t, b]:
                x, h, c = (torch.zeros_like(v) for v in (x, h, c))
            gates = w.weight_ih_l0 @ x + w.bias_ih_l0 + w.weight_hh_l0 @ h + w.bias_hh_l0
            i, f, g, o = gates.chunk(4)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            out[t, b], last = torch.cat([h, c]), z[t, b]
    return out


@pytest.mark.parametrize("resets", ["none", "first", "some", "all"])
def test_memory_forgets_at_resets(resets):
    torch.manual_seed(0)
    T, B = 7, 4
    memory = MDNLSTM(stoch_size=3, action_size=2, deter_size=5)
    z, action = torch.randn(T, B, 3), torch.randn(T, B, 2)
    is_first = torch.zeros(T, B, dtype=torch.bool)
    if resets == "first":
        is_first[0] = True
    elif resets == "some":
        is_first[0, 1] = is_first[3, 1] = is_first[4, 1] = is_first[6, 2] = True
    elif resets == "all":
        is_first[:] = True
    state = State(torch.randn(B, 10), torch.randn(B, 3))
    found = memory.filter(z, action, is_first, state)
    expected = by_steps(memory, z, action, is_first, state)
    torch.testing.assert_close(found.deter, expected, rtol=1e-5, atol=1e-6)
    weight = torch.randn(T, B, 5)
    grads = [
        torch.autograd.grad((weight * x[..., :5]).sum(), memory.lstm.parameters()) for x in (found.deter, expected)
    ]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)
    # In two halves it is the same.
    first = memory.filter(z[:3], action[:3], is_first[:3], state)
    second = memory.filter(z[3:], action[3:], is_first[3:], first[-1])
    torch.testing.assert_close(torch.cat([first.deter, second.deter]), expected, rtol=1e-5, atol=1e-6)


def test_imagination_goes_on_from_what_was_seen():
    """A step of imagination is a step of the memory, with z drawn from what is expected there."""
    torch.manual_seed(0)
    memory = MDNLSTM(stoch_size=3, action_size=2, deter_size=5)
    state, action = State(torch.randn(4, 10), torch.randn(4, 3)), torch.randn(2, 4, 2)
    noise = memory.draw_noise(2, 4)
    dreamt = memory.imagine(action, state, noise)
    never = torch.zeros(2, 4, dtype=torch.bool)
    z = dreamt.stoch
    torch.testing.assert_close(dreamt.deter, memory.filter(z, action, never, state).deter, rtol=1e-5, atol=1e-6)
    expected = memory.expect(memory.hidden(dreamt.deter))
    torch.testing.assert_close(z, expected.draw(*noise))


# ---------------------------------------------------------------------------------------------------------------------
# The controller and its dreams.


def test_controller_by_hand():
    """Two scores of z = 3 and h = (1, 2), with rows [z, h, bias]."""
    weights = torch.tensor([[1.0, 0.5, 0.25, -4.0, 0.0, 1.0, -1.0, 2.0]], dtype=torch.float64)
    feature = torch.tensor([[[1.0, 2.0, 77.0, 88.0, 3.0]]])  # h, c, z
    scores = [3 + 0.5 + 0.5 - 4, 1 - 2 + 2.0]

    def controller(discrete):
        return Controller(2, 1, 2, discrete, lambda size: CMAES(size, population=4))

    assert controller(False).search.size == 8
    assert controller(False).act(weights, feature).flatten().tolist() == pytest.approx([math.tanh(x) for x in scores])
    assert controller(True).act(weights, feature).flatten().tolist() == [0.0, 1.0]


def test_dreams_by_hand():
    """Whatever is done, a reward of 2 and a chance of ½ to go on: 2 + ½·2 + ¼·2 after three steps."""
    agent = make(imagine_horizon=3)
    model = agent.model
    with torch.no_grad():
        for head, bias in ((model.world_model.reward, 2.0), (model.world_model.cont, 0.0)):
            head.module.out.weight.zero_()
            head.module.out.bias.fill_(bias)
    start, controllers = model.world_model.rssm.initial(2), torch.randn(3, model.actor.search.size)
    torch.testing.assert_close(model.dream(controllers, start), torch.full((3, 2), 3.5))
    model.config.discount = 0.5
    torch.testing.assert_close(model.dream(controllers, start), torch.full((3, 2), 2 + 0.25 * 2 + 0.0625 * 2))


def test_dreams_start_where_episodes_do():
    """The first step of a sequence says is_first wherever it was cut out, and no dream begins where an episode ends."""
    agent, found = make(dream_start="episode", evolve_after=0, evolve_every=1, dreams=40), []
    model, batch = agent.model, batch_of(agent)
    model.dream = lambda controllers, start, generator: found.append(start) or torch.zeros(len(controllers), 40)
    post = State(torch.arange(18.0).view(6, 3, 1).expand(6, 3, 16), torch.zeros(6, 3, 3))
    batch["is_terminal"][:] = False
    model.behaviour(post, batch, None)
    assert not found  # no episode starts in this batch, and the generation waits
    batch["is_first"][2, 1] = batch["is_first"][5, 0] = batch["is_first"][3, 0] = batch["is_terminal"][3, 0] = True
    model.behaviour(post, batch, None)
    assert set(found.pop().deter[:, 0].tolist()) == {7.0, 15.0} and int(model.actor.search.generation) == 1
    model.behaviour(post, batch, None)
    assert not found  # not yet due again
    model.updates += 1
    model.behaviour(post[-2:], batch, None)  # with imagine_last
    assert set(found.pop().deter[:, 0].tolist()) == {15.0}
    model.updates += 1
    model.config.dream_start = "anywhere"
    batch["is_terminal"][:5] = True
    model.behaviour(post, batch, None)
    assert set(found.pop().deter[:, 0].tolist()) == {15.0, 16.0, 17.0}


@pytest.mark.parametrize("env", ["gym:Pendulum-v1", "gym:CartPole-v1"])
def test_a_population_dreams_as_each_of_it_would(env):
    agent = make(env)
    model, N = agent.model, 5
    torch.manual_seed(0)
    start = State(torch.randn(N, 16), torch.randn(N, 3))
    controllers = torch.randn(4, model.actor.search.size)

    def dream(some):
        return model.dream(some, start, torch.Generator().manual_seed(1))

    together = dream(controllers)
    assert together.shape == (4, N) and not torch.equal(together[0], together[1])
    for controller, row in zip(controllers, together, strict=True):
        torch.testing.assert_close(dream(controller[None])[0], row)


# ---------------------------------------------------------------------------------------------------------------------
# CMA-ES.


def quadratic(x):
    return -((x - 1).square() * torch.logspace(0, 2, x.shape[-1], dtype=x.dtype)).sum(-1)


def test_search_finds_the_top_of_a_quadratic():
    search = CMAES(6, population=12, sigma=0.3, seed=3)
    before = quadratic(search.mean).item()
    for _ in range(150):
        fitness = search.evolve(quadratic)
    assert fitness.shape == (12,) and int(search.generation) == 150
    assert before < -100 and quadratic(search.mean).item() > -1e-6


def test_search_is_pycmas():
    """Built anew for every generation, it goes where a strategy that was never taken apart goes."""
    import cma

    search, drawn = CMAES(6, population=8, sigma=0.3, seed=3), [0]

    def normal(*shape):
        return np.random.default_rng((3, drawn[0])).standard_normal(shape)

    options = {"popsize": 8, "randn": normal, "seed": np.nan, "verbose": -9, "conditioncov_alleviate": False}
    strategy = cma.CMAEvolutionStrategy(np.zeros(6), 0.3, options)
    for drawn[0] in range(60):
        vectors = strategy.ask()
        strategy.tell(vectors, (-quadratic(torch.tensor(np.stack(vectors)))).tolist())
        search.evolve(quadratic)
    np.testing.assert_allclose(search.mean.numpy(), strategy.mean, rtol=1e-9)
    assert float(search.sigma) == pytest.approx(strategy.sigma, rel=1e-9)


def test_search_goes_on_from_its_tensors():
    whole, half = CMAES(5, 8, 0.3, seed=1), CMAES(5, 8, 0.3, seed=1)
    np.random.seed(0)  # noqa: NPY002 - its own generator is the user's
    for i in range(21):
        if i == 10:
            half.load_state_dict({name: value.clone() for name, value in whole.state_dict().items()})
        fitness = whole.evolve(quadratic)
        if i >= 10:
            assert torch.equal(half.evolve(quadratic), fitness)
    for (name, a), b in zip(whole.state_dict().items(), half.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert np.random.rand() == np.random.RandomState(0).rand()  # noqa: NPY002


# ---------------------------------------------------------------------------------------------------------------------
# Whole agents.


@pytest.mark.parametrize("env", ["gym:Pendulum-v1", "gym:CartPole-v1"])
def test_generations_come_when_they_are_due(env):
    agent = make(env, evolve_after=3, evolve_every=2, dream_start="anywhere")
    batch, found = batch_of(agent), []
    for _ in range(8):
        update = agent.update(batch)
        found.append(int(update.metrics["generation"]))
    assert found == [0, 0, 0, 1, 1, 2, 2, 3]
    assert update.metrics["dream_return"] < update.metrics["best_dream_return"]  # controllers differ in what they earn
    assert agent.model.actor.search.mean.any()


@pytest.mark.parametrize("env", ["gym:Pendulum-v1", "gym:CartPole-v1"])
def test_acts_at_random_until_there_was_a_generation(env):
    agent = make(env, exploration_noise=0.0, evolve_after=0, dream_start="anywhere")
    shape = agent.observation_space.spaces
    observation = {name: np.ones((400, *space.shape), np.float32) for name, space in shape.items()}
    first = np.ones(400, bool)

    def kinds(explore):
        return len(np.unique(agent.act(observation, first, explore=explore)[0]))

    random = 2 if agent.discrete else 400
    assert kinds(True) == random and kinds(False) == 1
    agent.update(batch_of(agent))
    assert kinds(True) == 1  # all see the same and do the same
    agent.model.config.exploration_noise = 0.5
    assert kinds(True) > 1


@pytest.mark.parametrize("context", [0, 1, 3])
def test_pictures_vectors_and_replayed_states(context):
    import gymnasium

    spaces = {"image": gymnasium.spaces.Box(0, 255, (3, 10, 8), np.uint8), "state": gymnasium.spaces.Box(-1, 1, (4,))}
    agent = DreamerAgent(
        preset("world_models", **SMALL, replay_context=context),
        gymnasium.spaces.Dict(spaces), gymnasium.spaces.Discrete(3),
    )  # fmt: skip
    batch = batch_of(agent, T=6 + context)
    if context:
        batch |= {name: torch.zeros(6 + context, 3, *shape, dtype=getattr(torch, dtype))
                  for name, (shape, dtype) in agent.latent_spec.items()}  # fmt: skip
    update = agent.update(batch)
    assert all(torch.isfinite(value) for value in update.metrics.values())
    assert {name: (tuple(x.shape), x.dtype) for name, x in update.latents.items()} == (
        {"deter": ((6, 3, 16), torch.bfloat16), "stoch": ((6, 3, 3), torch.bfloat16)} if context else {}
    )
    batch["action"] = agent.encode_action(batch["action"])
    predicted = agent.model.world_model.open_loop(batch, 2, torch.Generator().manual_seed(0))
    assert predicted["image"].shape == (6 + context, 3, 3, 10, 8) and predicted["state"].shape == (6 + context, 3, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(classes=8), "classes: agent 'world_models' has Gaussian latents, expected 0, got 8"),
        (dict(actor_dist="tanh_normal"), "actor_dist: agent 'world_models' has a linear controller"),
        (dict(slot_mode="embed"), "slot_mode: needs agent 'dreamer_v3', got 'world_models'"),
    ],
)
def test_what_it_has_not_is_refused(options, message):
    with pytest.raises(ConfigError) as error:
        preset("world_models", **{**SMALL, **options}).resolve()
    assert str(error.value).startswith(message)


def test_trains_stops_and_resumes(in_two_halves, tmp_path):
    """A run in two halves, CMA-ES amidst its generations, ends where one in a piece does."""
    options = dict(total_steps=120, log_every=40, eval_episodes=1, train_ratio=9.0, time_limit=20, action_repeat=1)
    whole = make(logdir=str(tmp_path / "whole"), **options)
    half = in_two_halves(whole, at=60)
    assert int(whole.model.actor.search.generation) > int(half.model.actor.search.generation) >= 3
