"""What the selectors draw, against the exact distribution from the definitions (conftest.Model)."""

import numpy as np
import pytest
import torch

from phyxdream.replay import Curious, Prioritized, Recency, Replay, Uniform

ENV_SHIFT, MASK = 40, (1 << 40) - 1
STEPS = [23, 0, 3, 57, 4, 12]  # env 3 wraps, env 1 is empty
CAPACITY = 150  # 25 steps each

SELECTORS = {
    "uniform": Uniform(),
    "recency": Recency(),
    "recency_steep": Recency(exponent=2.5),
    "recency_flat": Recency(exponent=0.0),
    "recency_half": Recency(exponent=0.5),
    "prioritized": Prioritized(),
    "prioritized_linear": Prioritized(exponent=1.0, initial=0.25),
    "prioritized_flat": Prioritized(exponent=0.0),
    "curious": Curious(),
    "curious_mild": Curious(c=10.0, beta=0.5, alpha=1.0, epsilon=0.1, initial=20.0),
    "mixture": {Uniform(): 1.0, Recency(): 3.0},
    "mixture_of_all": {Uniform(): 0.2, Recency(exponent=1.5): 0.3, Prioritized(exponent=0.6): 0.5},
    "mixture_curious": {Curious(c=10.0, initial=10.0): 0.7, Uniform(): 0.1},
}


def kind(selector):
    """The word of the model for it, and its part that has priorities."""
    for part in selector if isinstance(selector, dict) else [selector]:
        if isinstance(part, Prioritized):
            return "prioritized", part
        if isinstance(part, Curious):
            return "curious", part
    return None, None


def make(coded, model, selector, prioritize=True, seed=3, whole=False):
    """A wrapped buffer of uneven envs, some of its steps ranked, and its model."""
    step = coded.step if whole else coded.small
    replay = Replay(coded.spec if whole else coded.small_spec, CAPACITY, len(STEPS), seed, selector=selector)
    twin = model(coded, CAPACITY, len(STEPS), *kind(selector))
    rng = np.random.default_rng(seed)
    for env, steps in enumerate(STEPS):
        for number in range(steps):
            replay.add(step([env], [number]), [env])
            twin.add([env])
            if prioritize and twin.kind and number % 6 == 5:
                ids = env << ENV_SHIFT | rng.integers(max(0, number - 20), number + 1, 8)
                priority = rng.exponential(3.0, 8).astype(np.float32) * rng.integers(0, 2, 8)
                replay.prioritize(ids, priority)
                twin.prioritize(ids.tolist(), priority.tolist())
    return replay, twin


def windows_of(batch):
    return list(zip(*(x.tolist() for x in (batch["step_id"][0] >> ENV_SHIFT, batch["step_id"][0] & MASK)), strict=True))


def chi_square(drawn, chance):
    """The draws follow `chance` ({window: probability}): not too far from it, and not suspiciously near."""
    draws, windows = len(drawn), list(chance)
    assert set(drawn) <= {window for window in windows if chance[window] > 0}
    index = {window: i for i, window in enumerate(windows)}
    counts = np.bincount([index[window] for window in drawn], minlength=len(windows))
    expected = np.array([chance[window] for window in windows]) * draws
    rare = expected < 10  # these are counted together
    counts, expected = np.append(counts[~rare], counts[rare].sum()), np.append(expected[~rare], expected[rare].sum())
    counts, expected = counts[expected > 0], expected[expected > 0]
    statistic, freedom = ((counts - expected) ** 2 / expected).sum(), len(counts) - 1
    assert abs(statistic - freedom) < 4.5 * np.sqrt(2 * freedom), (statistic, freedom)


@pytest.mark.parametrize("length", [1, 4, 12])
@pytest.mark.parametrize("name", SELECTORS)
def test_draws_follow_the_definition(coded, model, name, length):
    selector = SELECTORS[name]
    replay, twin = make(coded, model, selector)
    chance = twin.probabilities(length, selector)
    assert replay.num_sequences(length) == len(chance)
    batch = replay.sample(200 * len(chance), length)
    drawn = windows_of(batch)
    chi_square(drawn, chance)
    if name == "uniform":
        assert "probability" not in batch
    else:
        expected = [chance[window] for window in drawn]
        np.testing.assert_allclose(batch["probability"].numpy(), expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("length", [2, 5])
def test_uniform_within_episodes(coded, model, length):
    replay, twin = make(coded, model, Uniform())
    windows = twin.windows(length, cross_episodes=False)
    assert 5 < len(windows) < 0.9 * len(twin.windows(length))
    drawn = windows_of(replay.sample(300 * len(windows), length, cross_episodes=False))
    chi_square(drawn, dict.fromkeys(windows, 1 / len(windows)))


@pytest.mark.parametrize("name", ["recency", "prioritized", "curious_mild", "mixture_of_all"])
def test_other_selectors_stay_within_episodes(coded, model, name):
    replay, twin = make(coded, model, SELECTORS[name])
    windows = twin.windows(4, cross_episodes=False)
    batch = replay.sample(2000, 4, cross_episodes=False)
    drawn = windows_of(batch)
    assert set(drawn) <= set(windows) and len(set(drawn)) > 0.5 * len(windows)
    assert "probability" not in batch


def test_every_complete_episode_is_equally_likely(coded, model):
    replay, twin = make(coded, model, Uniform(), whole=True)
    episodes = twin.episodes()
    assert replay.num_episodes == len(episodes) > 8
    batch = replay.sample_episodes(300 * len(episodes))
    starts = windows_of(batch)
    lengths = batch["mask"].sum(0).tolist()
    drawn = [(env, first, first + length) for (env, first), length in zip(starts, lengths, strict=True)]
    chi_square(drawn, dict.fromkeys(episodes, 1 / len(episodes)))


def test_an_online_draw_tells_the_selectors_probability(coded, model):
    selector = SELECTORS["recency"]
    replay, twin = make(coded, model, selector)
    chance = twin.probabilities(4, selector)
    batch = replay.sample(60, 4, online=True)
    expected = [chance[window] for window in windows_of(batch)]
    np.testing.assert_allclose(batch["probability"].numpy(), expected, rtol=1e-9, atol=0)


# ----------------------------------------------------------------------------------------------------- priorities


@pytest.mark.parametrize("selector", [Prioritized(), Prioritized(exponent=1.0, initial=3.0)])
def test_no_mass_at_all_is_uniform(coded, model, selector):
    replay, twin = make(coded, model, selector, prioritize=False)
    ids = np.array([env << ENV_SHIFT | n for env, steps in enumerate(STEPS) for n in range(steps)])
    replay.prioritize(ids, np.zeros(len(ids)))
    windows = twin.windows(5)
    batch = replay.sample(200 * len(windows), 5)
    chi_square(windows_of(batch), dict.fromkeys(windows, 1 / len(windows)))
    np.testing.assert_allclose(batch["probability"].numpy(), 1 / len(windows), rtol=1e-9)


def test_one_step_takes_all(coded, model):
    replay, _ = make(coded, model, Prioritized(), prioritize=False)
    ids = np.array([env << ENV_SHIFT | n for env, steps in enumerate(STEPS) for n in range(steps)])
    replay.prioritize(ids, (ids == 40).astype(np.float32))  # long evicted or not stored: no env 0 step 40
    chosen = 3 << ENV_SHIFT | 45
    replay.prioritize([chosen], [0.01])
    batch = replay.sample(3000, 5)
    chi_square(windows_of(batch), {(3, start): 0.2 for start in range(41, 46)})
    assert (batch["step_id"] == chosen).any(0).all()
    # Steps of an env that is too short for the sequence do not count.
    replay.prioritize([2 << ENV_SHIFT], [1e6])
    assert (replay.sample(500, 5)["step_id"] == chosen).any(0).all()
    assert (replay.sample(500, 3)["step_id"][0] >> ENV_SHIFT == 2).float().mean() > 0.9


@pytest.mark.parametrize("first", [0.5, 4.0])
def test_new_steps_get_the_largest_priority_so_far(coded, model, first):
    selector = Prioritized(exponent=0.5)
    replay = Replay(coded.small_spec, 40, 2, selector=selector)
    twin = model(coded, 40, 2, "prioritized", selector)
    for number in range(30):
        replay.add(coded.small([0, 1], [number] * 2))
        twin.add([0, 1])
        if number in (3, 20):
            ids, priority = [number, 1 << ENV_SHIFT | number - 1], [first * number, first]
            replay.prioritize(ids, priority)
            twin.prioritize(ids, priority)
        chance = twin.probabilities(1, selector)
        batch = replay.sample(20, 1)
        expected = [chance[window] for window in windows_of(batch)]
        np.testing.assert_allclose(batch["probability"].numpy(), expected, rtol=1e-9, atol=0)


def test_priorities_of_evicted_steps_are_ignored(coded, model):
    replay, twin = make(coded, model, Prioritized(exponent=1.0), prioritize=False)
    evicted = [-1, 3 << ENV_SHIFT, 3 << ENV_SHIFT | 31]  # env 3 has 32 to 56; 0 and 31 would be rows of stored steps
    replay.prioritize(evicted, [1e9] * 3)
    chance = twin.probabilities(2, twin.selector)
    batch = replay.sample(500, 2)
    expected = [chance[window] for window in windows_of(batch)]
    np.testing.assert_allclose(batch["probability"].numpy(), expected, rtol=1e-9)
    replay.add(coded.small([3], [57]), [3])  # the largest so far is still 1
    twin.add([3])
    chance = twin.probabilities(2, twin.selector)
    batch = replay.sample(500, 2)
    np.testing.assert_allclose(batch["probability"].numpy(), [chance[w] for w in windows_of(batch)], rtol=1e-9)


@pytest.mark.parametrize("selector", [Prioritized(), Curious()])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -1e-9])
def test_bad_priorities_are_refused_whole(coded, same, selector, value):
    replay, other = (Replay(coded.small_spec, 30, 1, selector=selector) for _ in range(2))
    for buffer in (replay, other):
        coded.uneven(buffer, [30])
    with pytest.raises(ValueError, match="priority"):
        replay.prioritize(np.arange(3), np.array([5.0, value, 1.0]))
    assert same(replay.sample(50, 3), other.sample(50, 3))


def test_priorities_where_there_are_none(coded):
    replay = Replay(coded.small_spec, 30, 1, selector={Uniform(): 1, Recency(): 1})
    coded.uneven(replay, [3])
    with pytest.raises(ValueError, match="Prioritized"):
        replay.prioritize([0], [1.0])


@pytest.mark.parametrize("shape", [(), (6,), (2, 3), (3, 1, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_priorities_of_any_shape_and_float_type(coded, model, shape, dtype):
    selector = Prioritized(exponent=1.0)
    replay, twin = make(coded, model, selector, prioritize=False)
    ids = torch.arange(int(np.prod(shape))).reshape(shape)
    priority = (ids + 2).to(dtype)
    replay.prioritize(ids, priority.requires_grad_())
    twin.prioritize(ids.flatten().tolist(), priority.flatten().tolist())
    chance = twin.probabilities(1, selector)
    batch = replay.sample(100, 1)
    np.testing.assert_allclose(batch["probability"].numpy(), [chance[w] for w in windows_of(batch)], rtol=1e-9)


def test_priorities_of_another_shape_are_refused(coded):
    replay = Replay(coded.small_spec, 30, 1, selector=Prioritized())
    coded.uneven(replay, [9])
    with pytest.raises(ValueError, match="priority"):
        replay.prioritize(np.arange(6), np.ones(5))


def test_a_million_changes_do_not_wear_the_sums_out(coded, model):
    """Priorities over 16 orders of magnitude come and go: what is left has its exact share."""
    selector = Prioritized(exponent=1.0)
    replay, twin = make(coded, model, selector, prioritize=False)
    ids = np.array([env << ENV_SHIFT | n for env in (0, 3, 5) for n in range(twin.begin(env), twin.ends[env])])
    rng = np.random.default_rng(0)
    for _ in range(100):
        chosen = rng.choice(ids, 10_000)
        priority = 10.0 ** rng.uniform(-8, 8, 10_000)
        replay.prioritize(chosen, priority)
    final = rng.uniform(1e-6, 2e-6, len(ids))
    replay.prioritize(ids, final)
    twin.prioritize(ids.tolist(), final.tolist())
    for step in [2 << ENV_SHIFT | n for n in range(3)] + [4 << ENV_SHIFT | n for n in range(4)]:
        replay.prioritize([step], [0.0])
        twin.prioritize([step], [0.0])
    chance = twin.probabilities(1, selector)
    batch = replay.sample(200 * len(chance), 1)
    chi_square(windows_of(batch), chance)
    np.testing.assert_allclose(batch["probability"].numpy(), [chance[w] for w in windows_of(batch)], rtol=1e-9)


def test_equal_seeds_draw_equally_with_every_selector(coded, model, same):
    for selector in SELECTORS.values():
        (a, _), (b, _), (c, _) = (make(coded, model, selector, seed=seed) for seed in (3, 3, 4))
        for _ in range(3):
            first = a.sample(8, 4)
            assert same(first, b.sample(8, 4))
        assert not same(first, c.sample(8, 4))


# ------------------------------------------------------------------------------------------------------ bad selectors


@pytest.mark.parametrize(
    "make, name",
    [
        (lambda: Recency(exponent=-1.0), "exponent"),
        (lambda: Recency(exponent=np.nan), "exponent"),
        (lambda: Prioritized(exponent=-0.1), "exponent"),
        (lambda: Prioritized(initial=-1.0), "initial"),
        (lambda: Prioritized(initial=np.inf), "initial"),
        (lambda: Curious(c=-1.0), "c"),
        (lambda: Curious(beta=np.nan), "beta"),
        (lambda: Curious(alpha=-1.0), "alpha"),
        (lambda: Curious(epsilon=-1.0), "epsilon"),
        (lambda: Curious(initial=-1.0), "initial"),
        (dict, "selector"),
        (lambda: {Uniform(): 0.0}, "selector"),
        (lambda: {Uniform(): -1.0, Recency(): 2.0}, "selector"),
        (lambda: {Uniform(): np.nan}, "selector"),
        (lambda: {Prioritized(): 1.0, Curious(): 1.0}, "selector"),
        (lambda: {Prioritized(): 1.0, Prioritized(exponent=0.1): 1.0}, "selector"),
    ],
)
def test_bad_selectors(coded, make, name):
    with pytest.raises((ValueError, TypeError), match=name):
        Replay(coded.small_spec, 30, 1, selector=make())


def test_selectors_are_values():
    assert Recency() == Recency(1.0) and hash(Recency()) == hash(Recency(1.0)) and Recency() != Recency(2.0)
    with pytest.raises(AttributeError):
        Uniform().x = 3
    with pytest.raises(AttributeError):
        Prioritized().exponent = 3
