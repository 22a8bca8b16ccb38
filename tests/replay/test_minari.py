"""Datasets are made with Minari itself and compared with what lies in the replay, step by step."""

import builtins

import numpy as np
import pytest
from gymnasium import spaces

from phyxdream.errors import ConfigError, EnvError, MissingDependency
from phyxdream.replay import Replay
from phyxdream.replay.inspect import find_episodes
from phyxdream.replay.minari import from_minari, to_minari

minari = pytest.importorskip("minari", minversion="0.5.4")  # older ones cannot store pictures without loss
pytest.importorskip("h5py")
EpisodeBuffer = pytest.importorskip("minari.data_collector.episode_buffer").EpisodeBuffer

pytestmark = pytest.mark.filterwarnings("ignore:.*set to None:UserWarning", "ignore:env_spec is None:UserWarning")

FLAGS = {"is_first": ((), "bool"), "is_last": ((), "bool"), "is_terminal": ((), "bool")}


@pytest.fixture(autouse=True)
def datasets(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "datasets"))
    return tmp_path / "datasets"


def make(observation_space, action_space, lengths=(3, 5, 2), *, id="made-v0", seed=0, change=None, **metadata):
    """A Minari dataset of random episodes: odd ones end by termination, even ones by truncation."""
    observation_space.seed(seed)
    action_space.seed(seed)
    rng = np.random.default_rng(seed)
    buffers = []
    for number, length in enumerate(lengths):
        ends = np.arange(length) == length - 1
        parts = {
            "observations": batch([observation_space.sample() for _ in range(length + 1)]),
            "actions": np.stack([action_space.sample() for _ in range(length)]),
            "rewards": rng.normal(size=length),
            "terminations": ends & (number % 2 == 1),
            "truncations": ends & (number % 2 == 0),
        }
        if change:
            change(number, parts)
        buffers.append(EpisodeBuffer(infos={}, **parts))
    return minari.create_dataset_from_buffers(
        id, buffers, observation_space=observation_space, action_space=action_space,
        **{"jpeg_encoding": False, **metadata},
    )  # fmt: skip


def batch(samples):
    if isinstance(samples[0], dict):
        return {key: batch([sample[key] for sample in samples]) for key in samples[0]}
    return samples if isinstance(samples[0], str) else np.stack(samples)


def box(*shape, dtype=np.float64):
    return spaces.Box(-5, 5, shape, dtype)


def pixels(*shape):
    return spaces.Box(0, 255, shape, np.uint8)


def episodes(replay):
    """Every stored episode as {key: (steps, ...) array}, in the order they were stored."""
    found = find_episodes(replay)
    return [
        {key: value.float().numpy() if replay.spec[key][1] == "bfloat16" else value.numpy()
         for key, value in replay.read(int(e["env"]), int(e["start"]), int(e["steps"])).items() if key in replay.spec}
        for e in found
    ]  # fmt: skip


def fill(spec, lengths, *, num_envs=1, seed=0, terminal=lambda number: number % 2 == 0):
    """A replay of random complete episodes, dealt to the rings in turn."""
    rng = np.random.default_rng(seed)
    replay = Replay(spec, 10_000, num_envs)
    for number, length in enumerate(lengths):
        for t in range(length + 1):
            step = {key: sample(rng, *entry) for key, entry in spec.items()}
            if t == 0:
                step |= {key: np.zeros_like(step[key]) for key in ("action", "reward")}
            last = t == length
            flags = {"is_first": t == 0, "is_last": last, "is_terminal": last and terminal(number)}
            step |= {key: np.array([value]) for key, value in flags.items() if key in spec}
            replay.add(step, [number % num_envs])
    return replay


def sample(rng, shape, dtype):
    if dtype == "bool":
        return rng.random((1, *shape)) < 0.5
    if dtype == "uint8":
        return rng.integers(0, 256, (1, *shape), np.uint8)
    if dtype.startswith("int"):
        return rng.integers(0, 7, (1, *shape)).astype(dtype)
    values = rng.uniform(-1, 1, (1, *shape)).astype("float32")
    if dtype == "bfloat16":
        return (values.view(np.uint32) & 0xFFFF0000).view("float32")
    return values.astype(dtype)


def assert_same(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert a[key].dtype == b[key].dtype, key
            np.testing.assert_array_equal(a[key], b[key], err_msg=key)


# Import


def test_actions_rewards_and_flags_move_to_the_observation_they_led_to():
    dataset = make(box(3), spaces.Discrete(4), (3, 4))
    replay = from_minari(dataset)
    assert replay.spec == {
        "state": ((3,), "float32"), "action": ((), "int32"), "reward": ((), "float32"), **FLAGS,
    }  # fmt: skip
    assert (replay.num_envs, replay.capacity, len(replay)) == (1, 9, 9)
    for got, given in zip(episodes(replay), dataset, strict=True):
        length = len(given.rewards)
        np.testing.assert_array_equal(got["state"], given.observations.astype("float32"))
        np.testing.assert_array_equal(got["action"], [0, *given.actions])
        np.testing.assert_array_equal(got["reward"], np.float32([0, *given.rewards]))
        assert got["is_first"].tolist() == [True] + [False] * length
        assert got["is_last"].tolist() == [False] * length + [True]
        assert got["is_terminal"].tolist() == [False] * length + [bool(given.terminations[-1])]


@pytest.mark.parametrize(
    ("space", "expected"),
    [
        (pixels(16, 12, 3), {"image": ((3, 16, 12), "uint8")}),
        (pixels(3, 16, 12), {"image": ((3, 16, 12), "uint8")}),
        (pixels(16, 12), {"image": ((1, 16, 12), "uint8")}),
        (box(2, 2), {"state": ((4,), "float32")}),
        (spaces.Discrete(5, start=2), {"state": ((5,), "float32")}),
        (spaces.Dict(camera=pixels(8, 8, 3), arm=spaces.Dict(angle=box(2), reward=box(1))),
         {"image": ((3, 8, 8), "uint8"), "arm_angle": ((2,), "float32"), "arm_reward": ((1,), "float32")}),
    ],
)  # fmt: skip
def test_keys_are_those_of_the_environments(space, expected):
    replay = from_minari(make(space, spaces.Discrete(2)))
    assert {key: entry for key, entry in replay.spec.items() if key in expected} == expected
    assert replay.spec.keys() - expected.keys() == {"action", "reward", *FLAGS}


def test_pictures_are_channels_first_and_resized_on_request():
    dataset = make(pixels(16, 12, 3), spaces.Discrete(2))
    for got, given in zip(episodes(from_minari(dataset)), dataset, strict=True):
        np.testing.assert_array_equal(got["image"], np.moveaxis(given.observations, -1, 1))
    small = from_minari(dataset, image_size=(8, 6))
    assert small.spec["image"] == ((3, 8, 6), "uint8")
    blocks = dataset[0].observations[0].reshape(8, 2, 6, 2, 3).mean((1, 3))
    assert np.abs(episodes(small)[0]["image"][0] - np.moveaxis(blocks, -1, 0)).max() <= 1


def test_jpeg_coded_pictures_are_read_as_minari_decodes_them():
    dataset = make(pixels(32, 40, 3), spaces.Discrete(2), jpeg_encoding=True)
    for got, given in zip(episodes(from_minari(dataset)), dataset, strict=True):
        np.testing.assert_array_equal(got["image"], np.moveaxis(given.observations, -1, 1))


def test_actions_are_rescaled_to_what_agents_send():
    space = spaces.Box(np.float32([-2, 0]), np.float32([2, 10]))
    dataset = make(box(3), space)
    raw = episodes(from_minari(dataset, rescale_actions=False))
    for got, plain, given in zip(episodes(from_minari(dataset)), raw, dataset, strict=True):
        np.testing.assert_allclose(got["action"][1:], given.actions / [2, 5] - [0, 1], atol=1e-6)
        np.testing.assert_array_equal(got["action"][0], [0, 0])
        np.testing.assert_array_equal(plain["action"][1:], given.actions)
    unbounded = make(box(3), spaces.Box(-np.inf, np.inf, (2,)), id="unbounded-v0")
    np.testing.assert_array_equal(episodes(from_minari(unbounded))[0]["action"][1:], unbounded[0].actions)
    shifted = make(box(3), spaces.Discrete(3, start=5), id="shifted-v0")
    np.testing.assert_array_equal(episodes(from_minari(shifted))[0]["action"][1:], shifted[0].actions - 5)


def test_an_episode_without_a_flag_at_its_end_was_cut_off_there():
    def change(number, parts):
        parts["truncations"][:] = False

    got = episodes(from_minari(make(box(1), spaces.Discrete(2), (3,), change=change)))[0]
    assert got["is_last"].tolist() == [False, False, False, True] and not got["is_terminal"].any()


def test_episodes_are_dealt_to_the_emptiest_ring_and_all_fit():
    dataset = make(box(1), spaces.Discrete(2), (9, 2, 3, 4, 1))
    replay = from_minari(dataset, num_envs=2)
    found = find_episodes(replay)
    assert [found["steps"][found["env"] == env].tolist() for env in (0, 1)] == [[10, 2], [3, 4, 5]]
    assert (replay.capacity, len(replay)) == (24, 24)
    assert found["begun"].all() and found["ended"].all()


def test_too_small_a_capacity_keeps_the_latest_and_says_so():
    dataset = make(box(1), spaces.Discrete(2), (4,) * 40)
    with pytest.warns(UserWarning, match=r"200 steps.*latest 22"):
        replay = from_minari(dataset, capacity=22, num_envs=2)
    stored = [ep["state"] for ep in episodes(replay) if len(ep["state"]) == 5]
    latest = [dataset[i].observations.astype("float32") for i in range(36, 40)]
    assert len(stored) == 4
    for expected in latest:
        assert any(np.array_equal(expected, got) for got in stored)


def test_an_episode_longer_than_a_ring_keeps_its_end():
    dataset = make(box(1), spaces.Discrete(2), (20,))
    with pytest.warns(UserWarning, match="capacity"):
        replay = from_minari(dataset, capacity=8)
    got = episodes(replay)[0]
    np.testing.assert_array_equal(got["state"], dataset[0].observations[-8:].astype("float32"))
    assert not got["is_first"].any() and got["is_last"][-1]


def test_a_filtered_dataset_and_chosen_keys():
    space = spaces.Dict(a=box(2), b=box(3), mission=spaces.Text(5))
    dataset = make(space, spaces.Discrete(2), (3, 5, 2, 4))
    with pytest.raises(EnvError, match=r"made-v0.*mission.*Text.*keys"):
        from_minari(dataset)
    terminated = dataset.filter_episodes(lambda episode: episode.terminations[-1])
    replay = from_minari(terminated, keys=["b"], seed=3)
    assert {key for key in replay.spec} == {"b", "action", "reward", *FLAGS}
    assert [len(ep["b"]) for ep in episodes(replay)] == [6, 5]
    with pytest.raises(ValueError, match="no observation 'c'"):
        from_minari(dataset, keys=["c"])


def test_by_id_without_a_download(datasets):
    make(box(1), spaces.Discrete(2), id="some/made-v1")
    assert len(from_minari("some/made-v1")) == 13
    with pytest.raises(ConfigError, match=r"no Minari dataset 'some/maed-v1'.*did you mean 'some/made-v1'"):
        from_minari("some/maed-v1")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda n, parts: parts["rewards"].__setitem__(1, np.nan), "episode 0.*reward is not finite at observation 2"),
        (lambda n, parts: parts["observations"].__setitem__((2, 0), np.inf), "state is not finite at observation 2"),
        (lambda n, parts: parts["observations"].__setitem__((2, 0), 1e300), "state is not finite at observation 2"),
        (lambda n, parts: parts["terminations"].__setitem__(0, True), "ended at action 1 of 3"),
        (lambda n, parts: parts.update(observations=parts["observations"][1:]), "3 observations beside 3 rewards"),
        (lambda n, parts: parts.update(actions=parts["actions"][1:]), "2 actions beside 3 rewards"),
    ],
)
def test_a_broken_episode_is_named(change, words):
    dataset = make(box(1), spaces.Discrete(2), (3,), change=change)
    with pytest.raises(ValueError, match=words):
        from_minari(dataset)


@pytest.mark.parametrize(
    ("observation_space", "action_space", "word"),
    [
        (spaces.Text(5), spaces.Discrete(2), "Text"),
        (box(1), spaces.MultiDiscrete([2, 3]), "MultiDiscrete"),
        (box(1), spaces.Box(0, 3, (2,), np.int64), "Box"),
    ],
)
def test_a_space_that_no_agent_takes_is_named(observation_space, action_space, word):
    with pytest.raises(EnvError, match=word):
        from_minari(make(observation_space, action_space))


def test_other_arguments():
    dataset = make(box(1), spaces.Discrete(2))
    with pytest.raises(TypeError, match="MinariDataset"):
        from_minari(7)
    with pytest.raises(ValueError, match="num_envs"):
        from_minari(dataset, num_envs=0)
    with pytest.raises(ConfigError, match="no episodes"):
        from_minari(dataset.filter_episodes(lambda episode: False))


def test_without_minari_the_message_says_how_to_get_it(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "minari":
            raise ModuleNotFoundError("No module named 'minari'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingDependency, match=r"phyxdream\[minari\]"):
        from_minari("made-v0")


# Export


SPECS = {
    "pictures": {"image": ((3, 64, 48), "uint8"), "action": ((), "int32"), "reward": ((), "float32"), **FLAGS},
    "vectors": {"state": ((5,), "float32"), "action": ((2,), "float32"), "reward": ((), "float32"), **FLAGS},
    "both, several": {"wrist": ((1, 16, 16), "uint8"), "front": ((16, 16, 3), "uint8"), "touch": ((4,), "float32"),
                      "action": ((2,), "float32"), "reward": ((), "float32"), **FLAGS},
    "odd ones": {"grid": ((10, 5), "uint8"), "matrix": ((2, 3), "float16"), "touched": ((3,), "bool"),
                 "on": ((), "bool"), "count": ((), "int64"), "brain": ((4,), "bfloat16"), "action": ((2, 2), "int16"),
                 "reward": ((), "float16"), "is_first": ((), "bool")},
}  # fmt: skip


@pytest.mark.parametrize("name", SPECS)
def test_export_and_import_give_the_same_steps(name):
    replay = fill(SPECS[name], (4, 1, 7, 3))
    dataset = to_minari(replay, "round/trip-v0")
    # Without is_last the newest episode may go on.
    whole = 4 if "is_last" in replay.spec else 3
    assert dataset.total_episodes == whole
    back = from_minari("round/trip-v0")
    assert back.spec == replay.spec
    assert_same(episodes(replay)[:whole], episodes(back))


def test_several_environments_round_trip():
    replay = fill(SPECS["vectors"], (4, 4, 4, 6, 6, 6), num_envs=3)
    to_minari(replay, "round-v0")
    back = from_minari("round-v0", num_envs=3)
    assert_same(episodes(replay), episodes(back))


def test_a_minari_user_sees_what_they_expect():
    replay = fill(SPECS["pictures"], (4, 2))
    dataset = to_minari(replay, "seen-v0", author="someone", algorithm_name="random")
    assert dataset.observation_space == spaces.Dict(image=pixels(64, 48, 3))
    largest = max(int(ep["action"].max()) for ep in episodes(replay))
    assert dataset.action_space == spaces.Discrete(largest + 1)
    for given, got in zip(dataset, episodes(replay), strict=True):
        np.testing.assert_array_equal(given.observations["image"], np.moveaxis(got["image"], 1, -1))
        np.testing.assert_array_equal(given.actions, got["action"][1:])
        np.testing.assert_array_equal(given.rewards, got["reward"][1:])
        np.testing.assert_array_equal(given.terminations, got["is_terminal"][1:])
        np.testing.assert_array_equal(given.truncations, (got["is_last"] & ~got["is_terminal"])[1:])
        assert dataset.action_space.contains(given.actions[0])
    assert dataset.storage.metadata["author"] == {"someone"}
    assert minari.load_dataset("seen-v0").total_steps == 6


def test_only_complete_episodes_are_exported():
    spec = SPECS["vectors"]
    replay = Replay(spec, 10, 1)
    rng = np.random.default_rng(0)
    # Ten of these are left: the end of one, a whole one, an abandoned one, one without an action, an open one.
    firsts = [1, 0, 0, 0, 1, 0, 0, 1, 0, 1, 1, 0]
    lasts = [0, 0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0]
    for first, last in zip(firsts, lasts, strict=True):
        step = {key: sample(rng, *entry) for key, entry in spec.items()}
        replay.add(step | {"is_first": [bool(first)], "is_last": [bool(last)], "is_terminal": [False]})
    dataset = to_minari(replay, "complete-v0")
    assert [len(episode) for episode in dataset] == [2, 1]
    assert [bool(episode.truncations[-1]) for episode in dataset] == [True, True]


@pytest.mark.parametrize("id", ["CartPole-v1", "Pendulum-v1"])
def test_a_dataset_of_an_environment(id):
    from phyxdream import envs

    env = envs.make(f"gym:{id}", num_envs=2, seed=0)
    observation, info = env.reset(seed=1)
    action = np.zeros((2, *env.single_action_space.shape), env.single_action_space.dtype)
    spec = {"state": (observation["state"].shape[1:], "float32"), "reward": ((), "float32"), **FLAGS,
            "action": (action.shape[1:], "float32" if action.ndim > 1 else "int32")}  # fmt: skip
    replay = Replay(spec, 2000, 2)
    replay.add({**observation, **info, "reward": np.zeros(2), "action": action})
    env.action_space.seed(0)
    for _ in range(250):
        action = env.action_space.sample()
        observation, reward, _, _, info = env.step(action)
        led_here = np.where(info["is_first"].reshape(2, *[1] * (action.ndim - 1)), 0, action)
        replay.add({**observation, **info, "reward": reward, "action": led_here})
    dataset = to_minari(replay, "real-v0", env=id)
    made = dataset.recover_environment()
    assert dataset.observation_space == made.observation_space and dataset.action_space == made.action_space
    # What was recorded is what that environment does.
    if id == "Pendulum-v1":
        episode = dataset[0]
        angle = np.arctan2(episode.observations[0][1], episode.observations[0][0])
        speed = episode.observations[0][2]
        reward = -(angle**2 + 0.1 * speed**2 + 0.001 * episode.actions[0].item() ** 2)
        assert reward == pytest.approx(episode.rewards[0], abs=1e-4)
    back = from_minari(dataset)
    assert back.spec == replay.spec
    complete = [ep for ep in episodes(replay) if ep["is_first"][0] and ep["is_last"][-1]]
    for left, right in zip(complete, episodes(back), strict=True):
        for key in left:
            if key == "action":
                np.testing.assert_allclose(left[key], right[key], atol=3e-7)
            else:
                np.testing.assert_array_equal(left[key], right[key])


def test_given_spaces_get_their_own_form_back():
    space = spaces.Dict(
        camera=pixels(16, 12, 3), place=spaces.Discrete(5, start=1),
        inner=spaces.Dict(pair=spaces.MultiDiscrete([2, 3])), arm=box(2, 2), grey=spaces.Box(0, 1, (8, 8), np.float32),
    )  # fmt: skip
    dataset = make(space, spaces.Discrete(3, start=2), (3, 2), change=lambda n, parts: parts["observations"].update(
        grey=np.round(parts["observations"]["grey"] * 255).astype("float32") / np.float32(255)))  # fmt: skip
    again = to_minari(from_minari(dataset), "again-v0", observation_space=space, action_space=dataset.action_space)
    assert again.observation_space == space and again.action_space == dataset.action_space
    for left, right in zip(dataset, again, strict=True):
        np.testing.assert_array_equal(left.actions, right.actions)
        np.testing.assert_array_equal(left.observations["camera"], right.observations["camera"])
        np.testing.assert_array_equal(left.observations["place"], right.observations["place"])
        np.testing.assert_array_equal(left.observations["inner"]["pair"], right.observations["inner"]["pair"])
        np.testing.assert_allclose(left.observations["arm"], right.observations["arm"], rtol=1e-6)
        np.testing.assert_allclose(left.observations["grey"], right.observations["grey"], atol=1e-6)
        np.testing.assert_allclose(left.rewards, right.rewards, rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"observation_space": spaces.Dict(stat=box(5))}, "no key 'stat'; did you mean 'state'"),
        ({"observation_space": box(4)}, r"float32 \[5\] in the replay, but float32 \[4\]"),
        ({"observation_space": spaces.Dict(state=box(5), more=box(1))}, "no key 'more'"),
        ({"action_space": spaces.Discrete(3)}, r"Discrete\(3\).*float32 \[2\]"),
        ({"action_space": spaces.Box(-2, 2, (3,))}, r"float32 \[2\]"),
        ({"dataset_id": "no version"}, "dataset_id"),
        ({"dataset_id": "../up-v0"}, "dataset_id"),
        ({"env": "CartPol-v1"}, "CartPol"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(arguments, words, datasets):
    replay = fill(SPECS["vectors"], (3,))
    with pytest.raises(ValueError, match=words):
        to_minari(replay, **{"dataset_id": "bad-v0", **arguments})
    assert not (datasets / "bad-v0").exists()


def test_a_failed_export_leaves_nothing(datasets):
    spec = SPECS["vectors"]
    replay = fill(spec, (3,))
    step = {key: np.ones((1, *shape), dtype) for key, (shape, dtype) in spec.items()}
    for t in range(2):
        replay.add(step | {"action": np.full((1, 2), 3.0), "is_first": [t == 0]})
    with pytest.raises(ValueError, match=r"outside \[-1, 1\].*rescale_actions"):
        to_minari(replay, "bad-v0", action_space=spaces.Box(-5, 5, (2,)))
    assert not (datasets / "bad-v0").exists()
    dataset = to_minari(replay, "good-v0", action_space=spaces.Box(-5, 5, (2,)), rescale_actions=False)
    assert dataset[1].actions.tolist() == [[3.0, 3.0]]


def test_refusals_of_the_replay():
    no_action = fill({"state": ((1,), "float32"), "action": ((), "int32"), "reward": ((), "float32"),
                      "is_first": ((), "bool")}, ())  # fmt: skip
    with pytest.raises(ConfigError, match="no complete episode"):
        to_minari(no_action, "empty-v0")
    with pytest.raises(ValueError, match="no key 'action'"):
        to_minari(Replay({"reward": ((), "float32"), "is_first": ((), "bool")}, 10, 1), "bad-v0")
    with pytest.raises(ValueError, match="no observation"):
        to_minari(
            fill({"action": ((), "int32"), "reward": ((), "float32"), "is_first": ((), "bool")}, (2, 2)), "bad-v0"
        )
    replay = fill(SPECS["vectors"], (2,))
    to_minari(replay, "twice-v0")
    with pytest.raises(ConfigError, match=r"'twice-v0' exists already"):
        to_minari(replay, "twice-v0")
    assert minari.load_dataset("twice-v0").total_steps == 2


def test_large_exports_are_written_in_batches(monkeypatch):
    import phyxdream.replay.minari as module

    replay = fill(SPECS["vectors"], (3,) * 20)
    monkeypatch.setattr(module, "_BATCH_BYTES", 300)
    dataset = to_minari(replay, "many-v0")
    assert dataset.total_episodes == 20 and dataset.total_steps == 60
    assert_same(episodes(replay), episodes(from_minari(dataset)))
