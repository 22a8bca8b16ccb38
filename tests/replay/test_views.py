import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phyxdream.replay import Recency, n_step


def reference(reward, is_first, is_last, is_terminal, n, discount):
    """One step after the other: sum of the rewards from t + 1 on, up to n of them, none beyond the episode's end."""
    steps, batch = reward.shape
    total, factor, taken = (np.zeros((steps - n, batch), kind) for kind in (np.float64, np.float64, np.int64))
    for t in range(steps - n):
        for b in range(batch):
            m, value = 0, 0.0
            ended = is_last[t, b] or is_terminal[t, b]
            while m < n and not ended and not is_first[t + m + 1, b]:
                m += 1
                value += discount ** (m - 1) * reward[t + m, b]
                ended = is_last[t + m, b] or is_terminal[t + m, b]
            total[t, b], taken[t, b] = value, m
            factor[t, b] = discount**m * (not is_terminal[t + m, b])
    return total, factor, taken


def batch_of(rng, steps, batch, chance, ends=True):
    """Random episodes, some of them abandoned, some terminal."""
    first = rng.random((steps, batch)) < chance
    after = np.concatenate([first[1:], rng.random((1, batch)) < chance])
    last = after & (rng.random((steps, batch)) < 0.7)
    terminal = last & (rng.random((steps, batch)) < 0.6)
    made = {
        "reward": rng.standard_normal((steps, batch)).astype(np.float32),
        "is_first": first,
        **({"is_last": last, "is_terminal": terminal} if ends else {}),
        "image": rng.integers(0, 256, (steps, batch, 2, 2)).astype(np.uint8),
    }
    return {name: torch.from_numpy(value) for name, value in made.items()}


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(1, 6),
    more=st.integers(1, 9),
    batch=st.integers(1, 4),
    chance=st.sampled_from([0.0, 0.1, 0.3, 0.7, 1.0]),
    discount=st.sampled_from([0.0, 0.5, 0.99, 1.0]),
    ends=st.booleans(),
)
def test_against_the_loop(seed, n, more, batch, chance, discount, ends):
    data = batch_of(np.random.default_rng(seed), n + more, batch, chance, ends)
    none = np.zeros(data["is_first"].shape, bool)
    given = [data[name].numpy() if name in data else none for name in ("reward", "is_first", "is_last", "is_terminal")]
    reward, factor, taken = reference(*given, n, discount)
    views = n_step(data, n, discount)
    assert views["reward"].shape == views["discount"].shape == views["steps"].shape == (more, batch)
    np.testing.assert_array_equal(views["steps"].numpy(), taken)
    np.testing.assert_allclose(views["reward"].numpy(), reward, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(views["discount"].numpy(), factor, rtol=1e-5, atol=1e-6)
    for name, value in data.items():
        assert torch.equal(views["first"][name], value[:more])
        reached = value[torch.arange(more)[:, None] + torch.from_numpy(taken), torch.arange(batch)]
        assert torch.equal(views["last"][name], reached)


def test_first_and_last_are_views_where_no_episode_ends():
    data = batch_of(np.random.default_rng(0), 7, 2, 0.0)
    views = n_step(data, 3)
    for name, value in data.items():
        assert views["first"][name].data_ptr() == value.data_ptr()
        assert views["last"][name].data_ptr() == value[3].data_ptr()


def test_by_hand():
    flags = {name: torch.zeros(5, 1, dtype=torch.bool) for name in ("is_first", "is_last", "is_terminal")}
    reward = torch.tensor([[1.0], [2.0], [4.0], [8.0], [16.0]])
    views = n_step({"reward": reward, **flags}, 2, discount=0.5)
    assert views["reward"].flatten().tolist() == [4.0, 8.0, 16.0]
    assert views["discount"].flatten().tolist() == [0.25] * 3
    flags["is_last"][2] = flags["is_terminal"][2] = flags["is_first"][3] = True
    views = n_step({"reward": reward, **flags}, 2, discount=0.5)
    assert views["reward"].flatten().tolist() == [4.0, 4.0, 0.0]
    assert views["discount"].flatten().tolist() == [0.0, 0.0, 0.0]
    assert views["steps"].flatten().tolist() == [2, 1, 0]


@pytest.mark.parametrize("n", [0, -1, 7, 2.5, True])
def test_bad_n(n):
    with pytest.raises((ValueError, TypeError), match="n: "):
        n_step(batch_of(np.random.default_rng(0), 7, 2, 0.2), n)


@pytest.mark.parametrize("discount", [-0.1, 1.1, float("nan")])
def test_bad_discount(discount):
    with pytest.raises(ValueError, match="discount: "):
        n_step(batch_of(np.random.default_rng(0), 7, 2, 0.2), 2, discount)


def test_what_a_buffer_gives(wrapped, coded):
    """What has no time in it (probability, the chunk's number) is passed on whole or not at all, never cut."""
    replay, _ = wrapped(capacity=90, selector=Recency(), latents=coded.latents)
    # As many sequences as steps too: sizes do not tell what has time in it.
    for batch in (replay.sample(5, 6), replay.sample(6, 6), next(replay.loader(6, 6, consecutive=2))):
        views = n_step(batch, 2)
        reached = torch.arange(4)[:, None] + views["steps"]
        for part in ("first", "last"):
            assert set(batch) - {"probability", "consecutive"} <= set(views[part]) <= set(batch)
            for name, value in views[part].items():
                if name in ("probability", "consecutive"):
                    assert value is batch[name]
                else:
                    expected = batch[name][:4] if part == "first" else batch[name][reached, torch.arange(len(value[0]))]
                    assert torch.equal(value, expected), name


def test_a_batch_without_rewards():
    with pytest.raises(ValueError, match="reward"):
        n_step({"is_first": torch.zeros(5, 2, dtype=torch.bool)}, 2)
