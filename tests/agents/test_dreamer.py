"""`DreamerAgent` without an environment: acting, learning, saving, and who may touch which random numbers."""

import copy
import doctest

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeCopyMode, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from phyxdream import DreamerAgent, DreamerConfig
from phyxdream.agents import dreamer
from phyxdream.errors import CheckpointError, ConfigError, EnvError

OBSERVATION = spaces.Dict(
    {"image": spaces.Box(0, 255, (3, 8, 8), np.uint8), "state": spaces.Box(-np.inf, np.inf, (3,), np.float32)}
)
DISCRETE = spaces.Discrete(4)
CONTINUOUS = spaces.Box(-1, 1, (2,), np.float32)
T, B = 8, 4


def make(action_space=DISCRETE, **options):
    tiny = dict(
        size="1m", deter_size=32, hidden_size=16, stoch_size=4, classes=4, blocks=4, units=16, depth=4,
        depth_mults=(1,), encoder_layers=1, decoder_layers=1, actor_layers=1, critic_layers=1, batch_size=B,
        batch_length=T, num_envs=2, imagine_horizon=5, learning_rate=1e-3, warmup=0, device="cpu",
    )  # fmt: skip
    return DreamerAgent(DreamerConfig(**(tiny | options)), OBSERVATION, action_space)


def observe(n=3, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "image": rng.integers(0, 256, (n, 3, 8, 8), dtype=np.uint8),
        "state": rng.normal(size=(n, 3)).astype(np.float32),
    }


def make_batch(agent, seed=0):
    """What `Replay.sample` returns: time-major tensors, actions as stored."""
    g = torch.Generator().manual_seed(seed)
    is_first = torch.zeros(T, B, dtype=torch.bool)
    is_last, is_terminal = is_first.clone(), is_first.clone()
    is_last[3, 1] = is_terminal[3, 1] = is_first[4, 1] = True
    action = (
        torch.randint(0, 4, (T, B), generator=g, dtype=torch.int32)
        if agent.discrete
        else torch.rand(T, B, 2, generator=g) * 2 - 1
    )
    return {
        "image": torch.randint(0, 256, (T, B, 3, 1, 1), generator=g, dtype=torch.uint8).repeat(1, 1, 1, 8, 8),
        "state": torch.randn(T, B, 3, generator=g),
        "action": action,
        "reward": torch.randn(T, B, generator=g),
        "is_first": is_first,
        "is_last": is_last,
        "is_terminal": is_terminal,
        "step_id": torch.arange(T * B).view(T, B),
    }


def first(n=3, value=True):
    return np.full(n, value)


# -- Acting -----------------------------------------------------------------------------------------------------------


def test_discrete_actions():
    agent = make()
    action, carry = agent.act(observe(), first())
    assert action.shape == (3,)
    assert action.dtype == np.int64
    assert ((action >= 0) & (action < 4)).all()
    assert carry.action.tolist() == torch.nn.functional.one_hot(torch.as_tensor(action), 4).tolist()
    assert carry.state.deter.shape == (3, 32)
    assert (agent.action_size, agent.discrete) == (4, True)
    assert agent.replay_spec["action"] == ((), "int32")


@pytest.mark.parametrize("dist", (None, "bounded_normal", "tanh_normal"))
def test_continuous_actions(dist):
    agent = make(CONTINUOUS, actor_dist=dist)
    carry, seen = None, []
    for i in range(20):
        action, carry = agent.act(observe(seed=i), first(value=i == 0), carry)
        assert action.shape == (3, 2)
        assert action.dtype == np.float32
        np.testing.assert_array_equal(carry.action, action)
        seen.append(action)
    assert np.abs(seen).max() <= 1
    assert np.std(seen) > 0.2
    assert agent.replay_spec["action"] == ((2,), "float32")


@pytest.mark.parametrize("space", (DISCRETE, CONTINUOUS))
def test_acting_is_deterministic_under_the_seed(space):
    def play(agent, **kw):
        carry, out = None, []
        for i in range(6):
            action, carry = agent.act(observe(seed=i), first(value=i == 0), carry, **kw)
            out.append(action)
        return np.stack(out)

    a, b, c = make(space), make(space), make(space, seed=1)
    torch.rand(7)  # the global generator plays no part
    np.testing.assert_array_equal(play(a), play(b))
    assert not np.array_equal(play(make(space)), play(c))
    # A generator of one's own replaces the agent's, and leaves it alone.
    own = [play(a, generator=torch.Generator().manual_seed(5)) for _ in range(2)]
    np.testing.assert_array_equal(*own)
    np.testing.assert_array_equal(play(a), play(b))


def test_explore_false_takes_the_mode():
    agent = make()
    torch.nn.init.normal_(agent.model.actor.out.weight, std=1.0)
    action, carry = agent.act(observe(), first(), explore=False)
    np.testing.assert_array_equal(action, agent.model.actor(carry.state.feature).probs.argmax(-1))
    agent = make(CONTINUOUS)
    torch.nn.init.normal_(agent.model.actor.out.weight, std=1.0)
    action, carry = agent.act(observe(), first(), explore=False)
    np.testing.assert_allclose(action, agent.model.actor(carry.state.feature).mean.detach(), rtol=1e-6)


@pytest.mark.parametrize("space", (DISCRETE, CONTINUOUS))
def test_is_first_resets_one_environment_alone(space):
    """After a reset an environment acts as if its episode had just begun; its neighbours go on undisturbed."""
    agent = make(space)

    def seeded():
        return torch.Generator().manual_seed(3)

    _, carry = agent.act(observe(seed=1), first())
    mixed = np.array([False, True, False])
    _, after = agent.act(observe(seed=2), mixed, carry, generator=seeded())
    _, going_on = agent.act(observe(seed=2), first(value=False), carry, generator=seeded())
    _, fresh = agent.act(observe(seed=2), first(), None, generator=seeded())
    for i in range(3):
        expected, other = (fresh, going_on) if mixed[i] else (going_on, fresh)
        torch.testing.assert_close(after.state.deter[i], expected.state.deter[i])
        torch.testing.assert_close(after.state.stoch[i], expected.state.stoch[i])
        assert not torch.allclose(after.state.deter[i], other.state.deter[i])


def test_acting_filters_as_training_does():
    """Step by step with the carry, and one sequence with the stored actions, reach the same states."""
    agent = make(CONTINUOUS)
    carry, actions, states = None, [np.zeros((3, 2), np.float32)], []
    for i in range(5):
        action, carry = agent.act(observe(seed=i), first(value=i == 0), carry)
        actions.append(action)
        states.append(carry.state)
    batch = {n: torch.stack([torch.as_tensor(observe(seed=i)[n]) for i in range(5)]) for n in OBSERVATION}
    is_first = torch.zeros(5, 3, dtype=torch.bool)
    is_first[0] = True
    model = agent.model.world_model
    statistics = []
    with torch.no_grad():
        state = None
        for t in range(5):
            embed = model.embed({n: x[t] for n, x in batch.items()})[None]
            action = agent.encode_action(torch.as_tensor(actions[t]))[None]
            state = model.rssm.filter(embed, action, is_first[t : t + 1], state)[0]
            statistics.append(state.logits)
            state = states[t]  # go on with the sample that was acted on
    for t in range(5):
        torch.testing.assert_close(statistics[t], states[t].logits, rtol=1e-4, atol=1e-5)


def test_bad_observations():
    agent = make()
    with pytest.raises(EnvError, match="missing 'state'"):
        agent.act({"image": observe()["image"]}, first())
    with pytest.raises(EnvError, match=r"'image': expected shape \(3, 3, 8, 8\).*got \(3, 8, 8, 3\)"):
        agent.act({**observe(), "image": np.zeros((3, 8, 8, 3), np.uint8)}, first())
    with pytest.raises(EnvError, match=r"'image': expected shape \(2, 3, 8, 8\) for is_first of length 2"):
        agent.act(observe(3), first(2))


# -- Building ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("space", "dist", "message"),
    [
        (CONTINUOUS, "categorical", "actor_dist: 'categorical' needs discrete"),
        (DISCRETE, "bounded_normal", "actor_dist: 'bounded_normal' needs continuous"),
        (DISCRETE, "tanh_normal", "actor_dist: 'tanh_normal' needs continuous"),
    ],
)
def test_actor_and_actions_must_fit(space, dist, message):
    with pytest.raises(ConfigError, match=message):
        make(space, actor_dist=dist)


@pytest.mark.parametrize(
    ("observation", "action", "message"),
    [
        (OBSERVATION, spaces.MultiDiscrete([2, 3]), "action_space: expected Discrete or Box.*MultiDiscrete"),
        (OBSERVATION, spaces.Discrete(3, start=1), "action_space: .*start"),
        (spaces.Box(0, 1, (3,)), DISCRETE, "observation_space: expected a Dict.*Box"),
        (spaces.Dict({"reward": spaces.Box(0, 1, (3,))}), DISCRETE, "observation 'reward'.*reserved"),
        (spaces.Dict({"dynamics": spaces.Box(0, 1, (3,))}), DISCRETE, "observation 'dynamics'.*reserved"),
        (spaces.Dict({"deter": spaces.Box(0, 1, (3,))}), DISCRETE, "observation 'deter'.*reserved"),
        (spaces.Dict({"slots": spaces.Box(0, 1, (3,))}), DISCRETE, "observation 'slots'.*reserved"),
    ],
)
def test_spaces_that_cannot_be_handled(observation, action, message):
    with pytest.raises(EnvError, match=message):
        DreamerAgent(DreamerConfig(size="1m", device="cpu"), observation, action)


def test_unknown_device():
    with pytest.raises(ConfigError, match=r"device: .*'gpu'"):
        make(device="gpu")


def weights(agent):
    return torch.cat([p.flatten() for p in agent.model.state_dict().values()])


def test_building_neither_changes_nor_needs_the_global_generator():
    torch.manual_seed(10)
    before = torch.get_rng_state()
    a = make()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(11)
    assert torch.equal(weights(a), weights(make()))
    assert not torch.equal(weights(a), weights(make(seed=1)))


def test_slow_critic_starts_as_the_critic():
    model = make().model
    for s, f in zip(model.slow_critic.parameters(), model.critic.parameters(), strict=True):
        assert torch.equal(s, f)
        assert not s.requires_grad
    trained = {id(p) for group in model.make_optimizer().param_groups for p in group["params"]}
    assert trained == {id(p) for n, p in model.named_parameters() if not n.startswith("slow_critic")}


# -- Learning ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, dict(cell="layernorm_gru"), dict(cell="gru", classes=0, initial="learned")])
@pytest.mark.parametrize("space", (DISCRETE, CONTINUOUS), ids=("discrete", "continuous"))
def test_update_learns_a_fixed_batch(space, options):
    agent = make(space, learning_rate=5e-3, **options)
    batch = make_batch(agent)
    history = [{k: float(v) for k, v in agent.update(batch).metrics.items()} for _ in range(60)]
    assert all(np.isfinite(list(m.values())).all() for m in history)
    expected = {
        "actor",
        "critic",
        "replay_critic",
        "dynamics",
        "representation",
        "reward",
        "continue",
        "image",
        "state",
    }
    assert {k.removeprefix("loss/") for k in history[0] if k.startswith("loss/")} == expected | {"total"}
    assert history[-1]["loss/image"] < 0.8 * history[0]["loss/image"]
    assert history[-1]["loss/reward"] < 0.8 * history[0]["loss/reward"]
    assert history[-1]["loss/continue"] < 0.8 * history[0]["loss/continue"]
    # The imagined critic's loss may rise: its weights grow with the predicted continuation.
    assert history[-1]["loss/replay_critic"] < 0.8 * history[0]["loss/replay_critic"]
    assert history[-1]["loss/total"] < 0.9 * history[0]["loss/total"]
    assert history[0]["loss/total"] == pytest.approx(
        sum(v for k, v in history[0].items() if k.startswith("loss/") and k != "loss/total"), rel=1e-4
    )


def test_update_moves_everything_and_leaves_the_batch_alone():
    agent = make()
    batch = make_batch(agent)
    copy = {k: v.clone() for k, v in batch.items()}
    before = {n: p.detach().clone() for n, p in agent.model.named_parameters()}
    for _ in range(3):
        agent.update(batch)
    assert all(torch.equal(batch[k], copy[k]) for k in copy)
    assert [n for n, p in agent.model.named_parameters() if torch.equal(p, before[n])] == []


def test_losses_are_weighted_as_published():
    """1·dyn, 0.1·rep, 1·others, 0.3·replay critic: a term's metric is its weight times its mean."""
    agent, plain = make(), make(representation_coeff=1.0, replay_critic_coeff=1.0, free_nats=1.0)
    batch = make_batch(agent)
    ours, theirs = agent.update(batch).metrics, plain.update(batch).metrics
    torch.testing.assert_close(ours["loss/representation"], 0.1 * theirs["loss/representation"])
    torch.testing.assert_close(ours["loss/replay_critic"], 0.3 * theirs["loss/replay_critic"])
    torch.testing.assert_close(ours["loss/dynamics"], theirs["loss/dynamics"])


def test_behaviour_does_not_shape_the_model():
    """Without the replay critic, actor and critic leave the world model's gradients as they are."""

    def gradients(**options):
        agent = make(replay_critic_coeff=0.0, **options)
        batch = make_batch(agent)
        batch["action"] = agent.encode_action(batch["action"])
        agent.model.loss(batch, torch.Generator().manual_seed(0)).total.backward()
        return [p.grad for p in agent.model.world_model.parameters()]

    for a, b in zip(gradients(), gradients(entropy_coeff=5.0, imagine_horizon=2), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_imagining_from_the_last_steps_alone():
    """`imagine_last` starts imagination, and the replay critic, from the newest steps; all of them is the default."""
    agent, whole, default = make(imagine_last=3), make(imagine_last=T), make()
    batch = make_batch(agent)
    part, full, plain = (a.update(batch).metrics for a in (agent, whole, default))
    assert all(torch.equal(full[k], plain[k]) for k in full)
    # What the configuration samples does not limit what is learned from.
    shorter = make(batch_length=4).update(batch).metrics
    assert all(torch.equal(shorter[k], plain[k]) for k in plain)
    assert part.keys() == full.keys()
    for name in ("image", "reward", "continue", "dynamics", "representation"):
        assert torch.equal(part[f"loss/{name}"], full[f"loss/{name}"])
    # With critics at zero the returns are zero too, so log(255) twice is what each counted step costs.
    counted = (~batch["is_last"][T - 3 : T - 1]).float().mean().item()
    assert part["loss/replay_critic"].item() == pytest.approx(0.3 * 2 * np.log(255) * counted, rel=1e-5)
    counted = (~batch["is_last"][: T - 1]).float().mean().item()
    assert full["loss/replay_critic"].item() == pytest.approx(0.3 * 2 * np.log(255) * counted, rel=1e-5)


# -- Replay context ---------------------------------------------------------------------------------------------------

LATENTS = pytest.mark.parametrize("classes", (4, 0), ids=("categorical", "gaussian"))


def with_latents(agent, seed=0):
    """`make_batch` as a replay with latents returns it, its first steps being the context."""
    g = torch.Generator().manual_seed(seed)
    batch, spec = make_batch(agent, seed), agent.latent_spec
    batch["deter"] = torch.randn(T, B, *spec["deter"][0], generator=g).bfloat16()
    batch["stoch"] = torch.randint(0, 4, (T, B, *spec["stoch"][0]), generator=g).to(getattr(torch, spec["stoch"][1]))
    return batch


def total(agent, batch):
    """The loss of a batch, whatever the agent has drawn before."""
    batch = {**batch, "action": agent.encode_action(batch["action"])}
    return agent.model.loss(batch, torch.Generator().manual_seed(0)).total.item()


@LATENTS
@pytest.mark.parametrize("context", (0, 1, 3))
def test_what_goes_back_to_the_replay(context, classes):
    """New latents as the replay stores them, and the world model's loss, of every step that was learned from."""
    agent = make(replay_context=context, classes=classes)
    batch = with_latents(agent) if context else make_batch(agent)
    update = agent.update(batch)
    assert update.latents.keys() == agent.latent_spec.keys() == ({"deter", "stoch"} if context else set())
    for name, (shape, dtype) in agent.latent_spec.items():
        assert update.latents[name].shape == (T - context, B, *shape)
        assert update.latents[name].dtype == getattr(torch, dtype)
        assert not update.latents[name].requires_grad
    assert update.model_loss.shape == (T - context, B)
    assert (update.model_loss > 0).all() and not update.model_loss.requires_grad
    model = ("image", "state", "reward", "continue", "dynamics", "representation")
    expected = sum(update.metrics[f"loss/{name}"] for name in model)
    torch.testing.assert_close(update.model_loss.mean(), expected)


@LATENTS
@pytest.mark.parametrize("context", (1, 3))
def test_what_the_context_decides(context, classes):
    """The stored state of its first step and what was seen after it; a new episode right after it forgets it all."""
    agent = make(replay_context=context, classes=classes)
    batch = with_latents(agent)
    base = total(agent, batch)
    for name, step, counts in (
        ("deter", 0, True), ("stoch", 0, True), ("state", 0, False), ("reward", 0, False), ("deter", 1, False),
        ("stoch", 1, False), ("action", 0, False), ("state", context - 1, context > 1),
        ("reward", context - 1, False), ("state", context, True), ("action", context, True),
    ):  # fmt: skip
        changed = batch[name].clone()
        changed[step] = changed[step] + 50 if changed.dtype.is_floating_point else 3 - changed[step]
        assert (total(agent, {**batch, name: changed}) != base) == counts, (name, step)
    fresh = {**batch, "is_first": batch["is_first"].clone()}
    fresh["is_first"][context] = True
    alone = {name: x[context:] for name, x in fresh.items() if name not in agent.latent_spec}
    if context == 1:  # filtering the context draws noise
        assert total(agent, fresh) == total(agent, alone)
    other = {**fresh, "deter": -fresh["deter"], "state": fresh["state"].clone()}
    other["state"][:context] = 7
    assert total(agent, other) == total(agent, fresh)


def test_a_batch_without_latents_starts_from_the_initial_state():
    """With a context asked for and without it alike, and so does one whose latents nobody asked for."""
    plain, agent = make(replay_context=0), make(replay_context=3)
    batch = make_batch(agent)
    expected = plain.update(batch).metrics
    for actual in (agent.update(batch), make(replay_context=0).update(with_latents(agent))):
        assert all(torch.equal(actual.metrics[name], value) for name, value in expected.items())


@LATENTS
def test_latents_of_acting(classes):
    agent = make(replay_context=1, classes=classes)
    _, carry = agent.act(observe(), first())
    latents = agent.latents(carry)
    assert latents.keys() == agent.latent_spec.keys()
    for name, (shape, dtype) in agent.latent_spec.items():
        assert (latents[name].shape, latents[name].dtype) == ((3, *shape), getattr(torch, dtype))
    torch.testing.assert_close(latents["deter"].float(), carry.state.deter, rtol=2**-8, atol=0)
    assert make(replay_context=0).latents(carry) == {}


# -- Saving -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", (DISCRETE, CONTINUOUS), ids=("discrete", "continuous"))
def test_round_trip_continues_bit_exactly(space):
    agent = make(space)
    batch = make_batch(agent)
    for _ in range(3):
        agent.update(batch)
    agent.act(observe(), first())
    other = make(space, seed=7)
    other.load_tensors(agent.tensors())
    for i in range(3):
        batch = make_batch(agent, seed=i + 1)
        a, b = agent.update(batch).metrics, other.update(batch).metrics
        assert a.keys() == b.keys()
        assert {k for k in a if not torch.equal(a[k], b[k])} == set()
    assert torch.equal(weights(agent), weights(other))
    np.testing.assert_array_equal(agent.act(observe(), first())[0], other.act(observe(), first())[0])


def test_a_fresh_agent_can_be_saved():
    agent, other = make(), make(seed=3)
    other.load_tensors(agent.tensors())
    batch = make_batch(agent)
    assert torch.equal(agent.update(batch).metrics["loss/total"], other.update(batch).metrics["loss/total"])


def test_weights_only():
    agent, other = make(), make(seed=3)
    agent.update(make_batch(agent))
    states = {n: g.get_state() for n, g in other.generators.items()}
    other.load_tensors({"model": agent.tensors()["model"]}, weights_only=True)
    assert torch.equal(weights(agent), weights(other))
    assert all(torch.equal(g.get_state(), states[n]) for n, g in other.generators.items())
    assert other.optimizer.param_groups[0]["step"] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(deter_size=64), r"has shape \(16, 80\), expected \(16, 48\)"),
        (dict(actor_layers=2), r"actor\.mlp\.1.* is unknown"),
        (dict(initial="learned"), r"world_model\.rssm\.initial_deter is unknown"),
        (dict(norm="none"), r" is missing"),
    ],
)
def test_foreign_weights_are_refused_untouched(options, message):
    agent = make()
    agent.update(make_batch(agent))
    before = weights(agent).clone()
    with pytest.raises(CheckpointError, match=message):
        agent.load_tensors(make(**options).tensors())
    assert torch.equal(weights(agent), before)
    assert agent.optimizer.param_groups[0]["step"] == 1


# ---------------------------------------------------------------------------------------------------------------------
# Updates in a CUDA graph: nothing in an update may ask the device for a number, and replays are ordinary updates.


class FromTheHost(TorchDispatchMode):
    """Refuses tensors made of Python numbers: on a GPU they are copies from memory that a graph may not wait for."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function is not torch.ops.aten.lift_fresh.default, "a tensor made of Python numbers"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("action_space", [DISCRETE, CONTINUOUS], ids=["discrete", "continuous"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(cell="gru", classes=0),
        dict(cell="layernorm_gru", initial="learned"),
        dict(slot_mode="embed", slots=2, slot_initial="gaussian"),
        dict(slot_mode="per_slot", slots=2, slot_recurrent=True),
        dict(agent="planet", cell="gru", classes=0, overshooting=2, image_bits=5),
    ],
)
def test_an_update_never_waits_for_the_device(action_space, options):
    """Fake tensors have no values: whatever asks for one (`item`, a boolean index) raises."""
    agent = make(action_space, **options)
    mode = FakeTensorMode()
    with FakeCopyMode(mode):
        agent.model = copy.deepcopy(agent.model)
    agent.optimizer = agent.model.make_optimizer()
    agent.generators["learn"] = None
    batch = make_batch(agent)
    batch |= {name: torch.zeros(8, 4, *shape).to(getattr(torch, dtype))
              for name, (shape, dtype) in agent.latent_spec.items()}  # fmt: skip
    names = (*agent.replay_spec, *agent.latent_spec)
    with mode:
        batch = {name: torch.empty(batch[name].shape, dtype=batch[name].dtype) for name in names}
        agent._update(batch)  # makes the optimiser's states
        with FromTheHost():
            metrics, _, model_loss = agent._update(batch)
    assert metrics["loss/total"].shape == ()
    assert model_loss.shape == (7, 4)


def test_the_check_finds_what_it_looks_for():
    with FakeTensorMode(), FromTheHost():
        with pytest.raises(DataDependentOutputException):
            torch.ones(3).sum().item()
        with pytest.raises(AssertionError, match="Python numbers"):
            torch.tensor([1.0, 2.0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_replays_equal_ordinary_updates():
    ordinary, graphed = (make(device="cuda", cuda_graph=on) for on in (False, True))
    for i in range(8):
        batch = make_batch(ordinary, seed=i)
        expected, found = (agent.update(batch) for agent in (ordinary, graphed))
        for name, value in expected.metrics.items():
            torch.testing.assert_close(found.metrics[name], value, rtol=1e-4, atol=1e-5, msg=f"{name}, update {i}")
    assert graphed._run_update._graph is not None
    for a, b in zip(ordinary.model.parameters(), graphed.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)  # sums on a GPU come in any order, eight times


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_results_outlive_the_next_replay_and_loading_starts_anew():
    agent = make(device="cuda")
    for i in range(5):
        agent.update(make_batch(agent, seed=i))
    kept = agent.update(make_batch(agent, seed=5)).metrics["loss/total"]
    before = kept.item()
    saved = {group: {k: v.clone() for k, v in values.items()} for group, values in agent.tensors().items()}
    after = [agent.update(make_batch(agent, seed=i)).metrics["loss/total"].item() for i in (6, 7, 8, 9)]
    assert kept.item() == before
    agent.load_tensors(saved)
    again = [agent.update(make_batch(agent, seed=i)).metrics["loss/total"].item() for i in (6, 7, 8, 9)]
    assert again == pytest.approx(after, rel=1e-4)


def test_doctests():
    result = doctest.testmod(dreamer)
    assert result.attempted > 0
    assert result.failed == 0
