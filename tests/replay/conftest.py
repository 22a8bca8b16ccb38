"""Counter-coded steps, and the buffer's semantics in plain Python."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from phyxdream.replay import Replay

ENV_SHIFT = 40  # step_id = env << 40 | number
SPEC = {
    "image": ((3, 5), "uint8"),
    "tiny": ((), "int8"),
    "short": ((2,), "int16"),
    "pair": ((2,), "int32"),
    "number": ((), "int64"),
    "half": ((), "float16"),
    "brain": ((3,), "bfloat16"),
    "reward": ((), "float32"),
    "feature": ((2, 2), "float32"),
    "is_first": ((), "bool"),
    "is_last": ((), "bool"),
    "is_terminal": ((), "bool"),
}
SMALL_SPEC = {name: SPEC[name] for name in ("number", "reward", "is_first")}
LATENTS = {"deter": ((3,), "float32"), "stoch": ((2, 2), "bfloat16")}


def mix(x):
    """SplitMix64's finaliser: a fixed random-looking number for every number."""
    with np.errstate(over="ignore"):
        x = np.asarray(x).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


class Coded:
    """Steps of which every value follows from the env and the step's number in it.

    Episodes have random lengths around `episode`; one in three ends without `is_last` (abandoned).
    """

    spec, latents, small_spec, step_bytes = SPEC, LATENTS, SMALL_SPEC, 15 + 1 + 4 + 8 + 8 + 2 + 6 + 4 + 16 + 3

    def __init__(self, episode=5, salt=0):
        self.episode, self.salt = episode, salt

    def is_first(self, env, number):
        random = mix(np.asarray(env) * 1_000_003 + np.asarray(number) * 7 + self.salt * 1_000_000_007)
        return (random % np.uint64(self.episode) == 0) | (np.asarray(number) == 0)

    def is_last(self, env, number):
        """As written: an abandoned episode has none."""
        return self.is_first(env, np.asarray(number) + 1) & (mix(np.asarray(env) * 77 + number) % np.uint64(3) != 0)

    def step(self, envs, numbers):
        """The values of step `numbers[i]` of env `envs[i]`, any shape."""
        env, number = np.asarray(envs, np.int64), np.asarray(numbers, np.int64)
        code = env * 1_000_000 + number
        last = self.is_last(env, number)
        return {
            "image": ((code[..., None] * 7 + np.arange(15)) % 251).astype(np.uint8).reshape(*code.shape, 3, 5),
            "tiny": (code % 201 - 100).astype(np.int8),
            "short": np.stack([number % 30_000, -(code % 997)], -1).astype(np.int16),
            "pair": np.stack([env, number], -1).astype(np.int32),
            "number": code,
            "half": (number % 100).astype(np.float16),
            "brain": torch.from_numpy(code[..., None] % 100 * np.array([1.0, -0.5, 2.0])).bfloat16(),
            "reward": (number % 17 - 5).astype(np.float32),
            "feature": (code[..., None, None] * np.array([[1, 0.5], [-1, 0.25]])).astype(np.float32),
            "is_first": self.is_first(env, number),
            "is_last": last,
            "is_terminal": last & (number % 2 == 0),
        }

    def small(self, envs, numbers):
        step = self.step(envs, numbers)
        return {name: step[name] for name in SMALL_SPEC}

    def latent(self, step_id, salt):
        """Latents that tell their step and the write (`salt` below 64)."""
        ids = np.asarray(step_id, np.int64)
        env, number = ids >> ENV_SHIFT, ids & (1 << ENV_SHIFT) - 1
        deter = np.stack([env, number, np.full_like(env, salt)], -1).astype(np.float32)
        stoch = np.stack([number % 64, env % 64, np.full_like(env, salt), salt - number % 32], -1)
        return {"deter": deter, "stoch": torch.from_numpy(stoch.reshape(*ids.shape, 2, 2)).bfloat16()}

    def fill(self, replay, numbers, steps, rng=None):
        """Adds `steps` vector steps, with `rng` of a random set of envs each; `numbers`: the envs' next numbers."""
        make = self.step if "image" in replay.spec else self.small
        for _ in range(steps):
            count = len(numbers)
            envs = np.arange(count) if rng is None else rng.permutation(count)[: rng.integers(count + 1)]
            replay.add(make(envs, numbers[envs]), None if rng is None else envs)
            numbers[envs] += 1

    def uneven(self, replay, steps):
        """Adds `steps[env]` steps to every env."""
        make = self.step if "image" in replay.spec else self.small
        for env, count in enumerate(steps):
            for number in range(count):
                replay.add(make([env], [number]), [env])

    def check(self, batch, *, ends=None, forced=False, where=None):
        """Every sequence is consecutive steps of one env, all keys of every step as written; (env, number) of each.

        `ends`: number of steps each env has had, for `is_last` of the last steps (unchecked there without).
        `where`: the mask of the steps that count; the others must be zeros.
        """
        ids = batch["step_id"].numpy()
        where = np.ones(ids.shape, bool) if where is None else where
        env, number = ids >> ENV_SHIFT, ids & (1 << ENV_SHIFT) - 1
        assert (ids[~where] == -1).all()
        inside = where[1:]
        assert (np.diff(ids, axis=0)[inside] == 1).all()
        env, number = np.where(where, env, 0), np.where(where, number, 0)
        expected = {name: value for name, value in self.step(env, number).items() if name in batch}
        if forced:
            expected["is_first"][0] = True
        if "is_last" in expected:
            next_first = self.is_first(env, number + 1)
            if ends is None:
                next_first[-1] &= batch["is_last"].numpy()[-1]
            else:
                next_first &= number + 1 < np.asarray(ends)[env]
            expected["is_last"] |= next_first
        for name, value in expected.items():
            got = batch[name]
            assert str(got.dtype) == f"torch.{self.spec[name][1]}" and tuple(got.shape) == tuple(value.shape), name
            # bfloat16 is compared by its bits.
            a, b = (torch.as_tensor(x) for x in (got, value))
            if a.dtype == torch.bfloat16:
                a, b = a.contiguous().view(torch.int16), b.contiguous().view(torch.int16)
            a, b = a.numpy(), b.numpy()
            np.testing.assert_array_equal(a[where], b[where], err_msg=name)
            assert not a[~where].any(), name
        return env, number


class Model:
    """What the buffer promises, as slow and plain as possible. A window is (env, number of its first step)."""

    def __init__(self, coded, capacity, num_envs, kind=None, selector=None):
        self.coded, self.num_envs = coded, num_envs
        self.rooms = [capacity // num_envs + (env < capacity % num_envs) for env in range(num_envs)]
        self.ends = [0] * num_envs  # steps the env has had
        self.cursors, self.turn = [0] * num_envs, 0  # of the online queue
        self.latents = {}  # step id: salt of the last write
        self.kind, self.selector = kind, selector  # of the prioritised one
        self.mass, self.counts, self.largest = {}, {}, 1.0
        self.total_sampled = 0

    def begin(self, env):
        return max(0, self.ends[env] - self.rooms[env])

    def size(self, env):
        return self.ends[env] - self.begin(env)

    def stored(self, step_id):
        env, number = step_id >> ENV_SHIFT, step_id & (1 << ENV_SHIFT) - 1
        return step_id >= 0 and env < self.num_envs and self.begin(env) <= number < self.ends[env]

    def add(self, envs):
        for env in envs:
            step_id = env << ENV_SHIFT | self.ends[env]
            self.ends[env] += 1
            if self.kind == "prioritized":
                initial = self.selector.initial
                self.mass[step_id] = (self.largest if initial is None else initial) ** self.selector.exponent
            elif self.kind == "curious":
                self.mass[step_id], self.counts[step_id] = self.selector.initial, 0

    def prioritize(self, step_ids, priorities):
        for step_id, priority in zip(step_ids, priorities, strict=True):
            if not self.stored(step_id):
                continue
            if self.kind == "prioritized":
                self.largest = max(self.largest, priority)
                self.mass[step_id] = priority**self.selector.exponent
            else:
                s = self.selector
                self.counts[step_id] += 1
                self.mass[step_id] = s.c * s.beta ** self.counts[step_id] + (priority + s.epsilon) ** s.alpha

    def windows(self, length, cross_episodes=True):
        found = [
            (env, start)
            for env in range(self.num_envs)
            for start in range(self.begin(env), self.ends[env] - length + 1)
        ]
        if cross_episodes:
            return found
        return [
            (env, start)
            for env, start in found
            if not self.coded.is_first(env, np.arange(start + 1, start + length)).any()
        ]

    def probabilities(self, length, selector):
        """{window: chance in one draw of `selector`}, from the definitions, step by step."""
        windows = self.windows(length)
        if isinstance(selector, dict):
            whole, total = sum(selector.values()), dict.fromkeys(windows, 0.0)
            for part, share in selector.items():
                for window, chance in self.probabilities(length, part).items():
                    total[window] += share / whole * chance
            return total
        name = type(selector).__name__
        if name == "Uniform":
            weight = dict.fromkeys(windows, 1.0)
        elif name == "Recency":
            weight = {
                (env, start): float(self.ends[env] - length - start + 1) ** -selector.exponent for env, start in windows
            }
        else:
            weight, members = dict.fromkeys(windows, 0.0), {}
            for env, start in windows:
                for number in range(start, start + length):
                    members.setdefault((env, number), []).append((env, start))
            for (env, number), holders in members.items():
                for window in holders:
                    weight[window] += self.mass[env << ENV_SHIFT | number] / len(holders)
            if not any(weight.values()):
                weight = dict.fromkeys(windows, 1.0)
        mass = float(np.sum(list(weight.values()), dtype=np.longdouble))
        return {window: value / mass for window, value in weight.items()}

    def next_online(self, length):
        """The next sequence of the online queue, or None when there is no fresh one."""
        for env in (*range(self.turn, self.num_envs), *range(self.turn)):
            start = max(self.cursors[env], self.begin(env))
            if start + length <= self.ends[env]:
                self.cursors[env] = start + length
                self.turn = (env + 1) % self.num_envs
                return env, start
        return None

    def episodes(self):
        """(env, first, past the last) of every complete episode."""
        found = []
        for env in range(self.num_envs):
            numbers = np.arange(self.begin(env), self.ends[env])
            firsts = numbers[self.coded.is_first(env, numbers)].tolist()
            found += [(env, first, after) for first, after in itertools.pairwise(firsts)]
            if firsts and self.coded.is_last(env, self.ends[env] - 1):
                found.append((env, firsts[-1], self.ends[env]))
        return found


def equal(a, b):
    """Two batches, bit for bit."""
    return a.keys() == b.keys() and all(
        torch.equal(a[name].nan_to_num(), b[name].nan_to_num()) if torch.is_tensor(a[name]) else a[name] == b[name]
        for name in a
    )


@pytest.fixture(scope="session")
def coded():
    return Coded()


@pytest.fixture(scope="session")
def coded_with():
    return Coded


@pytest.fixture(scope="session")
def model():
    return Model


@pytest.fixture(scope="session")
def same():
    return equal


@pytest.fixture(scope="session")
def wrapped(coded):
    """A buffer whose rings have different sizes and have wrapped, and the envs' numbers of steps."""

    def make(capacity=23, envs=3, seed=5, spec=coded.spec, **options):
        replay, numbers = Replay(spec, capacity, envs, seed, **options), np.zeros(envs, np.int64)
        coded.fill(replay, numbers, 5 * capacity // envs, np.random.default_rng(seed))
        assert numbers.sum() > 1.5 * capacity
        return replay, numbers

    return make
