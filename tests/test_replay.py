import doctest
import resource
import struct
import subprocess
import sys
import tempfile
import threading
from collections import deque

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import phyxdream.replay
from phyxdream.errors import CheckpointError, ConfigError
from phyxdream.replay import Replay

# Counter-coded: every key of a step can be computed from its env and its number in that env.
CODED = {
    "image": ((3, 5), "uint8"),
    "pair": ((2,), "int32"),
    "number": ((), "int64"),
    "feature": ((3,), "float32"),
    "half": ((), "float16"),
    "reward": ((), "float32"),
    "is_first": ((), "bool"),
}
TINY = {"number": ((), "int64"), "reward": ((), "float32"), "is_first": ((), "bool")}


def coded(envs, numbers):
    """The values of step `numbers[i]` of env `envs[i]`."""
    env, number = np.asarray(envs, np.int64), np.asarray(numbers, np.int64)
    code = env * 1_000_000 + number
    return {
        "image": ((code[..., None] * 7 + np.arange(15)) % 251).astype(np.uint8).reshape(*code.shape, 3, 5),
        "pair": np.stack([env, number], -1).astype(np.int32),
        "number": code,
        "feature": (code[..., None] * np.array([1, 0.5, -1])).astype(np.float32),
        "half": (number % 100).astype(np.float16),
        "reward": (number % 17).astype(np.float32),
        "is_first": number % 5 == 0,
    }


def tiny(envs, numbers):
    step = coded(envs, numbers)
    return {name: step[name] for name in TINY}


def fill(replay, numbers, steps, rng=None):
    """Adds `steps` vector steps, with `rng` of a random set of envs each; `numbers` are the envs' next step numbers."""
    make = coded if "image" in replay.spec else tiny
    for _ in range(steps):
        envs = (
            np.arange(len(numbers)) if rng is None else rng.permutation(len(numbers))[: rng.integers(len(numbers) + 1)]
        )
        replay.add(make(envs, numbers[envs]), None if rng is None else envs)
        numbers[envs] += 1


def check_pieces(batch):
    """Every sequence is consecutive steps of one env, every key of every step as it was written."""
    env, number = batch["pair"].numpy().astype(np.int64)[..., 0], batch["pair"].numpy().astype(np.int64)[..., 1]
    assert (env == env[:1]).all()
    assert (np.diff(number, axis=0) == 1).all()
    assert (np.diff(batch["step_id"].numpy(), axis=0) == 1).all()
    for name, expected in coded(env, number).items():
        np.testing.assert_array_equal(batch[name].numpy(), expected, err_msg=name)
    return env, number


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def wrapped(capacity=23, envs=3, steps=40, seed=5, spec=CODED):
    """A buffer whose rings have different sizes and have wrapped."""
    replay, numbers = Replay(spec, capacity, envs, seed), np.zeros(envs, np.int64)
    fill(replay, numbers, steps, np.random.default_rng(seed))
    assert numbers.sum() > 1.5 * capacity
    return replay


# ---------------------------------------------------------------------------------------------- storing and sampling


def test_shapes_dtypes_and_order():
    replay = Replay(CODED, capacity=40, num_envs=2)
    fill(replay, np.zeros(2, np.int64), 8)
    batch = replay.sample(3, 8)
    assert list(batch) == [*CODED, "step_id"]
    for name, (shape, dtype) in CODED.items():
        assert batch[name].shape == (8, 3, *shape)
        assert batch[name].dtype == getattr(torch, dtype)
    assert batch["step_id"].shape == (8, 3) and batch["step_id"].dtype == torch.int64
    check_pieces(batch)


def test_batches_are_new_tensors():
    replay = wrapped()
    first = replay.sample(4, 3)
    kept = {name: value.clone() for name, value in first.items()}
    replay.sample(4, 3)
    assert equal(first, kept)


def test_counters_and_properties():
    replay, numbers = Replay(CODED, capacity=11, num_envs=3), np.zeros(3, np.int64)
    step_bytes = 15 + 8 + 8 + 12 + 2 + 4 + 1
    assert (len(replay), replay.total_added, replay.nbytes, replay.num_sequences(1)) == (0, 0, 0, 0)
    fill(replay, numbers, 3)
    assert (len(replay), replay.total_added, replay.nbytes) == (9, 9, 9 * step_bytes)
    assert [replay.num_sequences(n) for n in (1, 2, 3, 4, 2**62)] == [9, 6, 3, 0, 0]
    fill(replay, numbers, 7)
    assert (len(replay), replay.total_added, replay.capacity, replay.num_envs) == (11, 30, 11, 3)
    assert replay.num_sequences(4) == 1 + 1 + 0  # 11 steps over 3 envs: 4, 4 and 3
    assert replay.spec == CODED
    assert repr(replay).startswith("Replay(11 of 11 steps, 0.0 of 0.0 MB, 3 envs: image uint8[3, 5], pair int32[2], ")
    replay.spec.clear()
    assert replay.spec == CODED


@pytest.mark.parametrize("length", [1, 2, 13, 64, 100])
@pytest.mark.parametrize("partial", [False, True])
def test_every_sequence_is_a_piece_of_what_was_written(length, partial):
    envs, capacity = 5, 502  # two envs hold 101 steps, three hold 100
    replay, numbers = Replay(CODED, capacity, envs, seed=length), np.zeros(envs, np.int64)
    rng = np.random.default_rng(length) if partial else None
    rooms = np.array([101, 101, 100, 100, 100])
    sampled = 0
    for _ in range(12):
        fill(replay, numbers, 40, rng)
        assert len(replay) == np.minimum(numbers, rooms).sum()
        if replay.num_sequences(length):
            env, number = check_pieces(replay.sample(900 // length + 1, length))
            assert (number < numbers[env]).all() and (number >= (numbers - rooms)[env]).all()
            sampled += env.size
    assert sampled > 6_000 and (numbers > rooms).all()


def test_step_ids_are_stable_and_never_used_again():
    replay, numbers, ids = Replay(CODED, 20, 2), np.zeros(2, np.int64), {}
    for _ in range(50):
        fill(replay, numbers, 3)
        batch = replay.sample(20, 1)
        for code, step_id in zip(batch["number"].flatten().tolist(), batch["step_id"].flatten().tolist(), strict=True):
            assert ids.setdefault(code, step_id) == step_id
    assert len(set(ids.values())) == len(ids) > 100


def test_uniform_over_all_starts_of_uneven_envs():
    replay, numbers, length = Replay(TINY, 600, 6, seed=3), np.zeros(6, np.int64), 4
    for env, steps in enumerate([70, 0, 3, 160, 4, 41]):  # env 3 wraps, env 2 is too short, env 4 has one start
        for _ in range(steps):
            replay.add(tiny([env], numbers[[env]]), [env])
            numbers[env] += 1
    cells = replay.num_sequences(length)
    assert cells == 67 + 0 + 0 + 97 + 1 + 38
    draws = 200 * cells
    starts, counts = np.unique(replay.sample(draws, length)["number"][0].numpy(), return_counts=True)
    assert len(starts) == cells
    assert set(starts[starts // 1_000_000 == 3] % 1_000_000) == set(range(60, 157))
    chi_square = ((counts - 200) ** 2 / 200).sum()
    freedom = cells - 1
    assert abs(chi_square - freedom) < 4 * np.sqrt(2 * freedom)  # not too uneven, and not suspiciously even


def test_successive_draws_are_independent():
    replay = Replay(TINY, 8, 1, seed=1)
    fill(replay, np.zeros(1, np.int64), 8)
    draws = replay.sample(64_001, 1)["number"][0].numpy()
    counts = np.bincount(draws[:-1] * 8 + draws[1:], minlength=64)
    assert abs(((counts - 1000) ** 2 / 1000).sum() - 63) < 4 * np.sqrt(2 * 63)


def test_the_seed_decides():
    a, b, other = wrapped(seed=5), wrapped(seed=5), Replay(CODED, 23, 3, seed=6)
    numbers = np.zeros(3, np.int64)
    fill(other, numbers, 40, np.random.default_rng(5))
    first, second = a.sample(6, 4), a.sample(6, 4)
    assert equal(first, b.sample(6, 4)) and equal(second, b.sample(6, 4))
    assert not equal(first, second)
    assert not equal(first, other.sample(6, 4))
    # Splitting the draws over calls does not change them.
    c = wrapped(seed=5)
    parts = [c.sample(2, 4) for _ in range(3)]
    assert equal(first, {name: torch.cat([part[name] for part in parts], 1) for name in first})


@settings(max_examples=40, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck))
class AgainstModel(RuleBasedStateMachine):
    """The buffer against one bounded deque per env."""

    @initialize(envs=st.integers(1, 5), extra=st.integers(0, 30), seed=st.integers(0, 2**63 - 1))
    def make(self, envs, extra, seed):
        self.envs, self.capacity = envs, envs + extra
        self.replay = Replay(CODED, self.capacity, envs, seed)
        rooms = [self.capacity // envs + (env < self.capacity % envs) for env in range(envs)]
        self.model = [deque(maxlen=room) for room in rooms]
        self.numbers = np.zeros(envs, np.int64)
        self.ids = {}

    def record(self, envs):
        for env in envs:
            self.model[env].append(int(self.numbers[env]))
        self.numbers[np.asarray(envs, int)] += 1

    @rule()
    def add_all(self):
        envs = np.arange(self.envs)
        self.replay.add(coded(envs, self.numbers[envs]))
        self.record(envs)

    @rule(data=st.data(), form=st.sampled_from([list, np.array, lambda e: np.array(e, np.int32), torch.tensor]))
    def add_some(self, data, form):
        envs = data.draw(st.permutations(range(self.envs)))[: data.draw(st.integers(1, self.envs))]
        self.replay.add(coded(envs, self.numbers[list(envs)]), form(envs))
        self.record(envs)

    @rule(data=st.data())
    def refuse_a_bad_step(self, data):
        envs = np.arange(self.envs)
        step = coded(envs, self.numbers)
        name = data.draw(st.sampled_from(sorted(CODED)))
        if name == "reward":
            step["reward"][data.draw(st.integers(0, self.envs - 1))] = np.nan
        else:
            del step[name]
        with pytest.raises(ValueError, match=name):
            self.replay.add(step)

    @rule(batch=st.integers(1, 6), length=st.integers(1, 12))
    def sample(self, batch, length):
        if max(map(len, self.model)) < length:
            with pytest.raises(ValueError, match="no env has"):
                self.replay.sample(batch, length)
            return
        sequences = self.replay.sample(batch, length)
        env, number = check_pieces(sequences)
        for b in range(batch):
            stored = self.model[env[0, b]]
            assert stored[0] <= number[0, b] and number[-1, b] <= stored[-1]
        codes, ids = sequences["number"].flatten().tolist(), sequences["step_id"].flatten().tolist()
        for code, step_id in zip(codes, ids, strict=True):
            assert self.ids.setdefault(code, step_id) == step_id

    @precondition(lambda self: len(self.replay))
    @rule()
    def save_and_load(self):
        with tempfile.TemporaryDirectory() as folder:
            self.replay.save(f"{folder}/replay")
            loaded = Replay.load(f"{folder}/replay")
        assert equal(loaded.sample(5, 1), self.replay.sample(5, 1))
        self.replay = loaded

    @invariant()
    def counts_agree(self):
        assert len(self.replay) == sum(map(len, self.model))
        assert self.replay.total_added == self.numbers.sum()
        for length in (1, 3, 9):
            assert self.replay.num_sequences(length) == sum(max(0, len(d) - length + 1) for d in self.model)


TestAgainstModel = AgainstModel.TestCase


def test_threads_never_see_a_torn_sequence(tmp_path):
    envs, replay, failures = 4, Replay(CODED, 4 * 50, 4), []
    fill(replay, np.zeros(envs, np.int64), 20)
    writing = threading.Barrier(envs)

    def guarded(work):
        try:
            work()
        except BaseException as error:
            failures.append(error)

    def write(env):
        writing.wait()
        for number in range(20, 1500):
            replay.add(coded([env], [number]), [env])

    def read():
        while any(writer.is_alive() for writer in writers):
            check_pieces(replay.sample(8, 17))

    def save():
        for _ in range(5):
            replay.save(tmp_path / "replay")
            check_pieces(Replay.load(tmp_path / "replay").sample(20, 17))

    writers = [threading.Thread(target=guarded, args=(lambda env=env: write(env),)) for env in range(envs)]
    others = [threading.Thread(target=guarded, args=(work,)) for work in (read, read, save)]
    for thread in writers + others:
        thread.start()
    for thread in writers + others:
        thread.join()
    assert not failures
    assert replay.total_added == envs * 1500 and len(replay) == 200
    assert set(replay.sample(500, 50)["pair"][-1, :, 1].tolist()) == {1499}


# ------------------------------------------------------------------------------------------------- forms of the input


def test_conversions_of_the_same_kind():
    replay = Replay(CODED, 40, 4)
    envs = np.arange(4)
    for number in range(8):
        step = coded(envs, np.full(4, number))
        step["image"] = np.asfortranarray(step["image"])
        step["pair"] = step["pair"].astype(np.int64)
        step["number"] = torch.from_numpy(step["number"].astype(np.int32))
        step["feature"] = torch.from_numpy(step["feature"].astype(np.float64)).requires_grad_()
        step["half"] = step["half"].astype(">f4")
        step["reward"] = step["reward"].tolist() if number % 2 else step["reward"].astype(np.int32)
        step["is_first"] = np.repeat(step["is_first"], 2)[::2]
        replay.add(step)
    check_pieces(replay.sample(50, 8))


def test_the_caller_may_reuse_its_arrays():
    replay, step = Replay(CODED, 10, 1), coded([0], [0])
    replay.add(step)
    for value in step.values():
        value.fill(1)
    replay.add(coded([0], [1]))
    check_pieces(replay.sample(4, 2))


def test_readonly_arrays_extra_references_and_no_envs():
    replay, step = Replay(TINY, 10, 2), tiny([0, 1], [0, 0])
    for value in step.values():
        value.setflags(write=False)
    before = {name: sys.getrefcount(value) for name, value in step.items()}
    for _ in range(10):
        replay.add(step)
    assert {name: sys.getrefcount(value) for name, value in step.items()} == before
    replay.add({name: value[:0] for name, value in step.items()}, [])
    assert replay.total_added == 20


def change(**values):
    return {**tiny([0, 1], [0, 0]), **values}


BAD_STEPS = [
    ([1, 2], None, TypeError, "step: got list, expected a dict of arrays"),
    ({}, None, ValueError, "step: no 'number', 'reward', 'is_first'; expected the keys number, reward, is_first"),
    (change(rewards=np.zeros(2)), None, ValueError, "step: unknown key 'rewards'; did you mean 'reward'?"),
    (change(number=np.zeros((2, 1), int)), None, ValueError, "number: got shape (2, 1), expected (2,)"),
    (change(), [0], ValueError, "number: got shape (2,), expected (1,)"),
    (change(number=np.zeros(2)), None, TypeError, "number: got dtype float64, expected int64 or another of its kind"),
    (change(is_first=np.zeros(2, np.uint8)), None, TypeError, "is_first: got dtype uint8, expected bool"),
    (change(reward=[1, "a"]), None, TypeError, "reward: got dtype <U21, expected float32"),
    (change(reward=[[1], [1, 2]]), None, TypeError, "reward: got [[1], [1, 2]], which is no array"),
    (
        change(reward=torch.zeros(2, device="meta")),
        None,
        TypeError,
        "reward: got a tensor on meta, expected CPU memory",
    ),
    (
        change(number=np.array([1, 2**63], np.uint64)),
        None,
        ValueError,
        "number: holds values beyond the range of int64",
    ),
    (change(reward=np.array([0, 1e300])), None, ValueError, "reward: holds values beyond the range of float32"),
    (
        change(reward=np.array([0, np.nan], np.float32)),
        None,
        ValueError,
        "reward: the step of env 1 has a NaN or infin",
    ),
    (change(reward=np.array([-np.inf, 0])), [1, 0], ValueError, "reward: the step of env 1 has a NaN or infinite"),
    (change(), [0, 2], ValueError, "env_ids: got env 2, expected 0 to 1"),
    (change(), [-1, 0], ValueError, "env_ids: got env -1, expected 0 to 1"),
    (change(), [1, 1], ValueError, "env_ids: env 1 is named twice, expected every env at most once"),
    (change(), [0.0, 1.0], ValueError, "env_ids: got shape (2,) float64, expected a list of integers"),
    (change(), 0, ValueError, "env_ids: got shape () int64, expected a list of integers"),
    (change(), [True, False], ValueError, "env_ids: got shape (2,) bool, expected a list of integers"),
]


@pytest.mark.parametrize("step, env_ids, error, message", BAD_STEPS)
def test_a_bad_step_is_refused_whole(step, env_ids, error, message):
    replay = Replay(TINY, 10, 2)
    replay.add(tiny([0, 1], [0, 0]))
    with pytest.raises(error) as caught:
        replay.add(step, env_ids)
    assert str(caught.value).startswith(message)
    assert replay.total_added == 2
    assert replay.sample(50, 1)["number"].unique().tolist() == [0, 1_000_000]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_every_number_of_a_reward_vector_is_checked(dtype):
    replay = Replay({"reward": ((3,), dtype), "is_first": ((), "bool")}, 10, 4)
    reward = np.full((3, 3), np.finfo(dtype).max, dtype)
    step = {"reward": reward, "is_first": np.zeros(3, bool)}
    replay.add(step, [3, 1, 0])
    reward[1, 2] = -np.inf
    with pytest.raises(ValueError, match="the step of env 1 has"):
        replay.add(step, [3, 1, 0])
    assert len(replay) == 3


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"spec": [("a", 1)]}, TypeError, "spec: got list, expected a dict of key: (shape, dtype)"),
        ({"spec": {"number": ((), "int64")}}, ValueError, "spec: 'is_first' must be there as ((), 'bool')"),
        ({"spec": {"is_first": ((), "uint8")}}, ValueError, "spec: 'is_first' must be there as ((), 'bool')"),
        ({"spec": {**TINY, "step_id": ((), "int64")}}, ValueError, "spec: the key 'step_id' cannot be used"),
        ({"spec": {**TINY, "a\0b": ((), "int64")}}, ValueError, "spec: the key 'a\\x00b' cannot be used"),
        ({"spec": {**TINY, 3: ((), "int64")}}, ValueError, "spec: the key 3 cannot be used"),
        ({"spec": {**TINY, "x": 5}}, TypeError, "spec: key 'x' has 5, expected (shape, dtype)"),
        ({"spec": {**TINY, "x": (3, "uint8")}}, TypeError, "spec: key 'x' has (3, 'uint8'), expected (shape, dtype)"),
        ({"spec": {**TINY, "x": ((), "fp8")}}, TypeError, "spec: key 'x' has ((), 'fp8'), expected (shape, dtype)"),
        (
            {"spec": {**TINY, "x": ((), "float64")}},
            ValueError,
            "spec: key 'x' has dtype float64, expected one of uint8",
        ),
        ({"spec": {**TINY, "x": ((0,), "uint8")}}, ValueError, "spec: a side of 'x': got 0, expected 1 or more"),
        ({"capacity": 0}, ValueError, "capacity: got 0, expected 1 or more"),
        ({"capacity": 1e6}, TypeError, "capacity: got 1000000.0 (float), expected an integer"),
        ({"capacity": 2**63}, ValueError, "capacity: got 9223372036854775808, expected 1 or more and below 2**63"),
        ({"capacity": 3}, ValueError, "capacity: got 3, expected at least one step for each of 4 envs"),
        ({"num_envs": True}, TypeError, "num_envs: got True (bool), expected an integer"),
        ({"num_envs": 2**24, "capacity": 2**25}, ValueError, "num_envs: got 16777216, expected at most 8388608"),
        ({"seed": -1}, ValueError, "seed: got -1, expected 0 or more"),
        ({"capacity": 2**50}, ConfigError, "capacity: 1125899906842624 steps need 14636698.8 GB, this machine has"),
        ({"capacity": 2**62}, ConfigError, "capacity: 4611686018427387904 steps need"),
        ({"spec": {**TINY, "x": ((2**40, 2**40), "uint8")}}, ConfigError, "capacity: one step of 'x' has more bytes"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error) as caught:
        Replay(**{"spec": TINY, "capacity": 100, "num_envs": 4, **arguments})
    assert str(caught.value).startswith(message)


def test_bad_sample_arguments():
    replay, numbers = Replay(TINY, 100, 4), np.zeros(4, np.int64)
    with pytest.raises(ValueError, match="no env has 1 steps yet; 0 steps are stored in all, 0 in the longest env"):
        replay.sample(1, 1)
    fill(replay, numbers, 7)
    replay.add(tiny([2], [7]), [2])
    with pytest.raises(
        ValueError, match="length: no env has 9 steps yet; 29 steps are stored in all, 8 in the longest"
    ):
        replay.sample(1, 9)
    with pytest.raises(ValueError, match="batch_size: got 0, expected 1 or more"):
        replay.sample(0, 1)
    with pytest.raises(TypeError, match=r"length: got 2\.5 \(float\), expected an integer"):
        replay.sample(1, 2.5)
    with pytest.raises(ValueError, match="length: got -3"):
        replay.num_sequences(-3)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_taken_as_it_fills():
    page = resource.getpagesize()

    def resident():
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * page

    with open("/proc/meminfo") as meminfo:
        half = int(meminfo.readline().split()[1]) * 1024 // 2
    before = resident()
    replay = Replay({"image": ((3, 64, 64), "uint8"), "is_first": ((), "bool")}, half // 12289, 8)
    assert resident() - before < 2**23
    for number in range(256):
        replay.add({"image": np.full((8, 3, 64, 64), number, np.uint8), "is_first": np.zeros(8, bool)})
    assert 2**24 < resident() - before < 2**26  # 25 MB are stored
    assert replay.sample(3, 256)["image"][:, 0, 0, 0, 0].tolist() == list(range(256))
    filled = resident()
    del replay
    assert filled - resident() > 2**24


# ------------------------------------------------------------------------------------------------------------ snapshots


@pytest.mark.parametrize("steps", [0, 1, 4, 8, 11, 200])
def test_round_trip(tmp_path, steps):
    replay, numbers = Replay(CODED, 23, 3, seed=9), np.zeros(3, np.int64)
    fill(replay, numbers, steps)
    if steps:
        replay.sample(7, 1)
    replay.save(tmp_path / "replay")
    loaded = Replay.load(tmp_path / "replay")
    assert repr(loaded) == repr(replay) and loaded.spec == replay.spec and loaded.total_added == replay.total_added
    for _ in range(30):
        fill(replay, numbers.copy(), 1)
        fill(loaded, numbers, 1)
        a, b = replay.sample(5, 1), loaded.sample(5, 1)
        assert equal(a, b)
    check_pieces(loaded.sample(40, 7))
    assert [path.name for path in tmp_path.iterdir()] == ["replay"]


def test_saving_does_not_change_what_is_sampled(tmp_path):
    a, b = wrapped(), wrapped()
    a.save(tmp_path / "replay")
    assert equal(a.sample(9, 4), b.sample(9, 4))
    a.save(str(tmp_path / "replay"))  # over the old one
    loaded = Replay.load(str(tmp_path / "replay"))
    assert equal(loaded.sample(9, 4), a.sample(9, 4))


def test_only_the_filled_part_is_written(tmp_path):
    replay = Replay(CODED, 100_000, 3)
    fill(replay, np.zeros(3, np.int64), 2)
    replay.save(tmp_path / "replay")
    assert (tmp_path / "replay").stat().st_size < 2000


def test_file_name_that_is_no_utf8(tmp_path):
    replay = wrapped()
    path = bytes(tmp_path) + b"/\xff\xe9"
    replay.save(path)
    assert len(Replay.load(path)) == len(replay)


def xxh64(data):
    """XXH64 with seed 0, from its specification."""
    mask, p1, p2, p3 = 2**64 - 1, 0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9
    p4, p5 = 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5

    def rotate(x, bits):
        x &= mask
        return (x << bits | x >> (64 - bits)) & mask

    def scramble(word):
        return rotate(word * p2, 31) * p1 & mask

    whole = len(data) // 32 * 32
    hash_ = p5
    if whole:
        lanes = [p1 + p2, p2, 0, -p1]
        for i in range(0, whole, 8):
            word = int.from_bytes(data[i : i + 8], "little")
            lanes[i // 8 % 4] = rotate(lanes[i // 8 % 4] + word * p2, 31) * p1 & mask
        hash_ = sum(rotate(lane, bits) for lane, bits in zip(lanes, (1, 7, 12, 18), strict=True))
        for lane in lanes:
            hash_ = (hash_ ^ scramble(lane)) * p1 + p4
    hash_ += len(data)
    tail = data[whole:]
    while len(tail) >= 8:
        hash_ = rotate(hash_ ^ scramble(int.from_bytes(tail[:8], "little")), 27) * p1 + p4
        tail = tail[8:]
    if len(tail) >= 4:
        hash_ = rotate(hash_ ^ int.from_bytes(tail[:4], "little") * p1 & mask, 23) * p2 + p3
        tail = tail[4:]
    for byte in tail:
        hash_ = rotate(hash_ ^ byte * p5, 11) * p1
    hash_ &= mask
    hash_ = (hash_ ^ hash_ >> 33) * p2 & mask
    hash_ = (hash_ ^ hash_ >> 29) * p3 & mask
    return hash_ ^ hash_ >> 32


def test_the_file_is_laid_out_as_documented(tmp_path):
    assert xxh64(b"") == 0xEF46DB3751D8E999 and xxh64(b"abc") == 0x44BC2CF5AD770999  # the specification's own
    replay, numbers = Replay(CODED, 23, 3, seed=2), np.zeros(3, np.int64)
    fill(replay, numbers, 10)
    replay.save(tmp_path / "replay")
    data = (tmp_path / "replay").read_bytes()
    at = 0

    def number():
        nonlocal at
        at += 8
        return struct.unpack_from("<Q", data, at - 8)[0]

    def text(count):
        nonlocal at
        at += count
        return data[at - count : at]

    assert text(8) == b"PHYXRPLY" and number() == 1
    header_bytes = number()
    assert [number(), number()] == [23, 3]
    at += 32
    assert number() == len(CODED)
    for name, (shape, dtype) in CODED.items():
        assert text(number()) == name.encode()
        assert ["uint8", "int32", "int64", "float32", "bool", "float16"][number()] == dtype
        assert tuple(number() for _ in range(number())) == shape
    rings = [(number(), number()) for _ in range(3)]
    assert rings == [(10, 8), (10, 8), (10, 7)] and at == 24 + header_bytes
    assert number() == xxh64(data[: at - 8])
    for env, (end, size) in enumerate(rings):
        for name, value in coded([env] * size, range(end - size, end)).items():
            assert text(value.nbytes) == value.tobytes(), name
            assert number() == xxh64(value.tobytes())
    assert at == len(data)


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory):
    path = tmp_path_factory.mktemp("snapshot") / "replay"
    wrapped(capacity=17, spec=TINY).save(path)
    return path.read_bytes()


def refusal(path, data):
    path.write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        Replay.load(path)
    assert str(caught.value).startswith(f"cannot load the replay from {str(path)!r}: ")
    return str(caught.value).removeprefix(f"cannot load the replay from {str(path)!r}: ")


def test_truncated_anywhere_is_refused(tmp_path, snapshot):
    for size in range(len(snapshot)):
        message = refusal(tmp_path / "replay", snapshot[:size])
        assert "truncated" in message if size else "not a replay snapshot" in message
    assert message == f"truncated: it has {len(snapshot) - 1} bytes, expected {len(snapshot)}"
    assert refusal(tmp_path / "replay", snapshot[:20]) == "truncated: it has 20 bytes, expected 24 or more"


def test_any_flipped_bit_is_refused(tmp_path, snapshot):
    for at in range(len(snapshot)):
        data = bytearray(snapshot)
        data[at] ^= 1 << at % 8
        message = refusal(tmp_path / "replay", data)
        if at < 8:
            assert message == "not a replay snapshot: expected it to begin with 'PHYXRPLY'"
        elif at < 16:
            assert message.startswith("format version ") and message.endswith(", expected 1")
        else:
            assert "corrupted" in message
    data = bytearray(snapshot)
    data[-9] ^= 1
    assert refusal(tmp_path / "replay", data) == "corrupted: 'is_first' of env 2 does not match its checksum"


def test_foreign_files_are_refused(tmp_path, snapshot):
    path = tmp_path / "replay"
    begin = "not a replay snapshot: expected it to begin with 'PHYXRPLY'"
    assert refusal(path, b"") == begin
    assert refusal(path, b"PK\x03\x04" + bytes(5000)) == begin
    assert refusal(path, snapshot + b"\0") == (f"corrupted: it has {len(snapshot) + 1} bytes, expected {len(snapshot)}")
    with pytest.raises(CheckpointError, match="could not open it: No such file or directory"):
        Replay.load(tmp_path / "missing")
    with pytest.raises(CheckpointError, match="not a file"):
        Replay.load(tmp_path)


def signed(snapshot, offset, value):
    """The snapshot with one number of the header changed and the header's checksum made to match."""
    data = bytearray(snapshot)
    struct.pack_into("<Q", data, offset, value)
    end = 24 + struct.unpack_from("<Q", data, 16)[0]
    struct.pack_into("<Q", data, end, xxh64(bytes(data[:end])))
    return bytes(data)


def test_a_header_that_lies_is_refused_or_harmless(tmp_path, snapshot):
    """Numbers written anywhere into the header, under a valid checksum: never a crash, never a runaway allocation."""
    header_end = 24 + struct.unpack_from("<Q", snapshot, 16)[0]
    path, refused = tmp_path / "replay", 0
    for offset in range(24, header_end - 7):
        for value in (0, 1, 3, 18, 1000, 2**40, 2**62, 2**64 - 1):
            path.write_bytes(signed(snapshot, offset, value))
            try:
                Replay.load(path).sample(3, 1)
            except CheckpointError:
                refused += 1
    assert refused > 1000
    assert "header contradicts itself" in refusal(path, signed(snapshot, 32, 0))  # envs
    assert "header contradicts itself" in refusal(path, signed(snapshot, 32, 18))  # more envs than capacity
    still = snapshot[:40] + bytes(32) + snapshot[72:]  # the generator
    assert "header contradicts itself" in refusal(path, signed(still, 32, 3))
    assert "this machine has" in refusal(path, signed(snapshot, 24, 2**60))  # capacity
    assert "'is_first' must be there" in refusal(path, signed(snapshot.replace(b"is_first", b"is_third"), 32, 3))
    twice = signed(snapshot.replace(b"number", b"reward"), 32, 3)
    assert "header contradicts itself" in refusal(path, twice)


def test_saving_where_it_cannot_be(tmp_path):
    replay = wrapped()
    with pytest.raises(
        CheckpointError, match=r"cannot save the replay to '.*no/replay': .*: No such file or directory"
    ):
        replay.save(tmp_path / "no" / "replay")
    (tmp_path / "folder").mkdir()
    with pytest.raises(CheckpointError, match="could not move the new file into place: Is a directory"):
        replay.save(tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    for method in (replay.save, Replay.load):
        with pytest.raises(ValueError, match=r"path: got .*, expected a name without null bytes"):
            method(f"{tmp_path}/a\0b")


DISK_FULL = """
import resource, sys
import numpy as np
from phyxdream.errors import CheckpointError
from phyxdream.replay import Replay

path, room = sys.argv[1], int(sys.argv[2])
replay = Replay({"image": ((1000,), "uint8"), "is_first": ((), "bool")}, 5000, 1)
for number in range(3000):
    replay.add({"image": np.full((1, 1000), number % 251, np.uint8), "is_first": [number == 0]})
resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
try:
    replay.save(path)
except CheckpointError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert len(replay.sample(2, 50)["image"]) == 50
replay.save(path + "2")
"""


def run_apart(script, path, room):
    """Runs `script` in its own process, in the snapshot's folder: the current one may be an uncompiled checkout."""
    command = [sys.executable, "-c", script, path.name, str(room)]
    return subprocess.run(command, cwd=path.parent, capture_output=True, text=True)


@pytest.mark.parametrize("room", [0, 1000, 2_500_000])
def test_a_full_disk_leaves_the_old_file(tmp_path, room):
    path = tmp_path / "replay"
    old = wrapped()
    old.save(path)
    before = path.read_bytes()
    done = run_apart(DISK_FULL, path, room)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "cannot save the replay to 'replay': could not write: File too large"
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["replay", "replay2"]
    assert len(Replay.load(f"{path}2")) == 3000
    assert equal(Replay.load(path).sample(4, 4), old.sample(4, 4))


def test_killed_while_saving_leaves_the_old_file(tmp_path):
    path = tmp_path / "replay"
    wrapped().save(path)
    before = path.read_bytes()
    # The process dies in the middle of the write, by the signal that the Python interpreter usually ignores.
    script = DISK_FULL.replace("try:", "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_DFL)\ntry:")
    done = run_apart(script, path, 2_500_000)
    assert done.returncode < 0
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 2  # the new file, unfinished, beside it


def test_the_example_in_the_docstring():
    assert doctest.testmod(phyxdream.replay).failed == 0
    assert doctest.testmod(phyxdream.replay).attempted > 0
