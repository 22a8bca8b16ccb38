"""The buffer against the model of its semantics in plain Python (conftest.py), in any order of calls."""

import tempfile

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from phyxdream.replay import Curious, Prioritized, Recency, Replay, Uniform

KINDS = {
    "uniform": Uniform(),
    "recency": Recency(),
    "prioritized": Prioritized(exponent=0.7),
    "prioritized_from": Prioritized(exponent=0.5, initial=2.0),
    "curious": Curious(c=100.0, beta=0.7, alpha=0.5, epsilon=0.01, initial=500.0),
    "mixture": {Uniform(): 1, Recency(0.5): 2.0, Prioritized(1.0): 0.7},
}
WORDS = {Prioritized: "prioritized", Curious: "curious"}
ENV_SHIFT, MASK = 40, (1 << 40) - 1


class AgainstModel(RuleBasedStateMachine):
    def __init__(self, coded_with, model, same):
        super().__init__()
        self.coded_with, self.model_of, self.same = coded_with, model, same

    @initialize(
        envs=st.integers(1, 4),
        extra=st.integers(0, 36),
        seed=st.integers(0, 2**63 - 1),
        episode=st.sampled_from([1, 2, 4, 9, 1000]),
        salt=st.integers(0, 1000),
        kind=st.sampled_from(sorted(KINDS)),
    )
    def make(self, envs, extra, seed, episode, salt, kind):
        self.coded, self.selector = self.coded_with(episode, salt), KINDS[kind]
        parts = self.selector if isinstance(self.selector, dict) else [self.selector]
        ranked = next((part for part in parts if type(part) in WORDS), None)
        self.model = self.model_of(self.coded, envs + extra, envs, WORDS.get(type(ranked)), ranked)
        self.envs = envs
        self.replay = Replay(
            self.coded.spec, envs + extra, envs, seed, latents=self.coded.latents, selector=self.selector
        )

    # ------------------------------------------------------------------------------------------------ adding

    def add(self, envs, **options):
        self.replay.add(self.coded.step(envs, [self.model.ends[env] for env in envs]), **options)
        self.model.add(envs)

    @rule(times=st.integers(1, 6))
    def add_all(self, times):
        for _ in range(times):
            self.add(range(self.envs))

    @rule(data=st.data(), form=st.sampled_from([list, np.array, lambda e: np.array(e, np.int32), torch.tensor]))
    def add_some(self, data, form):
        envs = data.draw(st.permutations(range(self.envs)))[: data.draw(st.integers(1, self.envs))]
        self.add(envs, env_ids=form(envs))

    @rule(env=st.integers(0, 3), times=st.integers(1, 30))
    def add_many_of_one(self, env, times):
        for _ in range(times):
            self.add([env % self.envs], env_ids=[env % self.envs])

    @rule(data=st.data())
    def refuse_a_bad_step(self, data):
        step = self.coded.step(range(self.envs), self.model.ends)
        name = data.draw(st.sampled_from(sorted(self.coded.spec)))
        if name == "reward":
            step["reward"][data.draw(st.integers(0, self.envs - 1))] = np.nan
        else:
            del step[name]
        with pytest.raises(ValueError, match=name):
            self.replay.add(step)

    # ---------------------------------------------------------------------------------------------- sampling

    def check_latents(self, batch, where=None):
        ids = batch["step_id"].numpy()
        where = np.ones(ids.shape, bool) if where is None else where
        salts = np.array([self.model.latents.get(i, -1) for i in ids.flatten().tolist()]).reshape(ids.shape)
        expected = self.coded.latent(np.where(where, ids, 0), salts)
        for name in self.coded.latents:
            value = torch.as_tensor(expected[name])
            value[torch.from_numpy((salts < 0) | ~where)] = 0
            assert torch.equal(batch[name], value), name

    def check_batch(self, batch, length, windows, forced=False):
        keys = [*self.coded.spec, *self.coded.latents, "step_id"]
        assert list(batch)[: len(keys)] == keys
        env, number = self.coded.check(batch, ends=self.model.ends, forced=forced)
        self.check_latents(batch)
        drawn = list(zip(env[0].tolist(), number[0].tolist(), strict=True))
        assert set(drawn) <= set(windows)
        return drawn

    @rule(batch=st.integers(1, 6), length=st.integers(1, 12), forced=st.booleans())
    def sample(self, batch, length, forced):
        windows = self.model.windows(length)
        if not windows:
            with pytest.raises(ValueError, match="no env has"):
                self.replay.sample(batch, length, force_is_first=forced)
            return
        sequences = self.replay.sample(batch, length, force_is_first=forced)
        self.model.total_sampled += batch * length
        drawn = self.check_batch(sequences, length, windows, forced)
        assert ("probability" in sequences) == (self.selector != Uniform())
        if "probability" in sequences:
            chance = self.model.probabilities(length, self.selector)
            assert sequences["probability"].dtype == torch.float64
            expected = [chance[window] for window in drawn]
            np.testing.assert_allclose(sequences["probability"].numpy(), expected, rtol=1e-9, atol=0)

    @rule(batch=st.integers(1, 6), length=st.integers(1, 9))
    def sample_online(self, batch, length):
        windows = self.model.windows(length)
        if not windows:
            with pytest.raises(ValueError, match="no env has"):
                self.replay.sample(batch, length, online=True)
            return
        drawn = self.check_batch(self.replay.sample(batch, length, online=True), length, windows)
        self.model.total_sampled += batch * length
        for window in drawn:
            fresh = self.model.next_online(length)
            if fresh is None:
                break
            assert window == fresh

    @rule(batch=st.integers(1, 6), length=st.integers(1, 9), forced=st.booleans())
    def sample_within_episodes(self, batch, length, forced):
        windows = self.model.windows(length, cross_episodes=False)
        if not windows:
            with pytest.raises(ValueError):
                self.replay.sample(batch, length, cross_episodes=False, force_is_first=forced)
            return
        sequences = self.replay.sample(batch, length, cross_episodes=False, force_is_first=forced)
        self.model.total_sampled += batch * length
        self.check_batch(sequences, length, windows, forced)
        assert "probability" not in sequences

    @rule(batch=st.integers(1, 6))
    def sample_episodes(self, batch):
        episodes = self.model.episodes()
        if not episodes:
            with pytest.raises(ValueError):
                self.replay.sample_episodes(batch)
            return
        drawn = self.replay.sample_episodes(batch)
        mask = drawn["mask"].numpy()
        lengths = mask.sum(0)
        assert (mask == (np.arange(lengths.max())[:, None] < lengths)).all()
        env, number = self.coded.check(drawn, ends=self.model.ends, where=mask)
        self.check_latents(drawn, mask)
        for b, length in enumerate(lengths):
            assert (env[0, b], number[0, b], number[0, b] + length) in episodes
        self.model.total_sampled += int(mask.sum())

    # ------------------------------------------------------------------------------------------ writing back

    def some_ids(self, data, least=0):
        """Ids stored, evicted, repeated and -1."""
        pool = [-1] + [
            env << ENV_SHIFT | number
            for env in range(self.envs)
            for number in range(max(0, self.model.begin(env) - 3), self.model.ends[env])
        ]
        return data.draw(st.lists(st.sampled_from(pool), min_size=least, max_size=12))

    @rule(data=st.data(), salt=st.integers(0, 60), form=st.sampled_from([np.array, torch.tensor]))
    def write_back(self, data, salt, form):
        ids = self.some_ids(data, 1)
        shape = (len(ids) // 2, 2) if len(ids) % 2 == 0 else (len(ids),)
        ids = np.array(ids).reshape(shape)
        salts = np.arange(ids.size).reshape(shape) % 4 + salt
        written = self.replay.update(form(ids), **self.coded.latent(np.maximum(ids, 0), salts))
        stored = [self.model.stored(i) for i in ids.flatten().tolist()]
        assert written in (sum(stored), len({i for i in ids.flatten().tolist() if self.model.stored(i)}))
        for step_id, value, there in zip(ids.flatten().tolist(), salts.flatten().tolist(), stored, strict=True):
            if there:
                self.model.latents[step_id] = value

    @precondition(lambda self: self.model.kind)
    @rule(data=st.data(), form=st.sampled_from([np.array, torch.tensor]))
    def prioritize(self, data, form):
        ids = self.some_ids(data, 1)
        numbers = st.one_of(st.sampled_from([0.0, 1.0, 0.5, 30.0]), st.floats(0, 100, width=32))
        priorities = data.draw(st.lists(numbers, min_size=len(ids), max_size=len(ids)))
        self.replay.prioritize(form(ids), form(np.array(priorities, np.float32)))
        self.model.prioritize(ids, priorities)

    @precondition(lambda self: self.model.kind and sum(self.model.ends))
    @rule(value=st.sampled_from([np.nan, np.inf, -1.0]), data=st.data())
    def refuse_a_bad_priority(self, value, data):
        ids = self.some_ids(data, 1)
        priorities = np.full(len(ids), 3.0)
        priorities[data.draw(st.integers(0, len(ids) - 1))] = value
        with pytest.raises(ValueError, match="priority"):
            self.replay.prioritize(np.array(ids), priorities)

    # ---------------------------------------------------------------------------------------------- snapshots

    @rule(online=st.booleans(), keep=st.booleans())
    def save_and_load(self, online, keep):
        with tempfile.TemporaryDirectory() as folder:
            self.replay.save(f"{folder}/replay")
            loaded = Replay.load(f"{folder}/replay")
        assert repr(loaded) == repr(self.replay) and loaded.selector == self.replay.selector == self.selector
        assert loaded.latents == self.replay.latents
        if self.model.windows(2):
            for options in ({"online": online}, {}):
                a, b = loaded.sample(3, 2, **options), self.replay.sample(3, 2, **options)
                assert self.same(a, b)
                self.model.total_sampled += 6
            if online:
                for _ in range(3):
                    self.model.next_online(2)
        if self.model.episodes():
            a, b = loaded.sample_episodes(3), self.replay.sample_episodes(3)
            assert self.same(a, b)
            self.model.total_sampled += int(a["mask"].sum())
        if not keep:
            self.replay.close()
            self.replay = loaded

    # --------------------------------------------------------------------------------------------- invariants

    @invariant()
    def counts_agree(self):
        if not hasattr(self, "replay"):
            return
        assert len(self.replay) == sum(self.model.size(env) for env in range(self.envs))
        assert self.replay.total_added == sum(self.model.ends)
        assert self.replay.total_sampled == self.model.total_sampled
        assert self.replay.num_episodes == len(self.model.episodes())
        for length in (1, 3, 9):
            assert self.replay.num_sequences(length) == len(self.model.windows(length))
            assert self.replay.ready(4, length) == bool(self.model.windows(length))


def test_against_the_model(coded_with, model, same):
    run_state_machine_as_test(
        lambda: AgainstModel(coded_with, model, same),
        settings=settings(
            max_examples=60, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )


# ---------------------------------------------------------------------------------------------- some cases, spelled out


def numbers_of(batch):
    """[(env, first number)] of the sequences."""
    return [(i >> ENV_SHIFT, i & MASK) for i in batch["step_id"][0].tolist()]


def test_the_online_queue(coded):
    replay = Replay(coded.small_spec, 60, 3)
    coded.uneven(replay, [7, 2, 10])
    first = numbers_of(replay.sample(3, 3, online=True))
    assert first == [(0, 0), (2, 0), (0, 3)]
    assert numbers_of(replay.sample(2, 3, online=True)) == [(2, 3), (2, 6)]
    replay.add(coded.small([1], [2]), [1])
    assert numbers_of(replay.sample(1, 3, online=True)) == [(1, 0)]
    # What was drawn otherwise is still fresh.
    for number in (7, 8):
        replay.add(coded.small([0], [number]), [0])
    replay.sample(50, 3)
    assert numbers_of(replay.sample(1, 3, online=True)) == [(0, 6)]
    # Evicted steps are skipped: env 2 holds 20 steps.
    for number in range(10, 40):
        replay.add(coded.small([2], [number]), [2])
    assert numbers_of(replay.sample(7, 3, online=True))[:6] == [(2, 20 + 3 * i) for i in range(6)]


def test_the_online_queue_survives_a_restart(coded, tmp_path):
    replay = Replay(coded.small_spec, 60, 3)
    coded.uneven(replay, [9, 9, 9])
    assert numbers_of(replay.sample(4, 3, online=True)) == [(0, 0), (1, 0), (2, 0), (0, 3)]
    replay.save(tmp_path / "replay")
    for buffer in (replay, Replay.load(tmp_path / "replay")):
        assert numbers_of(buffer.sample(2, 3, online=True)) == [(1, 3), (2, 3)]
