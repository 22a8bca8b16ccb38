from dataclasses import replace

import numpy as np
import pytest

from phyxdream.errors import EnvError
from phyxdream.train.driver import Driver, make_env


@pytest.fixture
def driver(tiny):
    driver = Driver(make_env(tiny), budget=60.0)
    yield driver
    driver.env.close()


def test_options_of_the_environment_go_to_it(tiny, monkeypatch):
    """And those that were left at None do not: another environment may not know them."""
    seen = []
    monkeypatch.setattr("phyxdream.train.driver.envs.make", lambda *args, **options: seen.append(options))
    make_env(tiny)
    make_env(replace(tiny, camera=1, env_options=("repeat_action_probability=0.25", "name=a=b")))
    assert "camera" not in seen[0] and seen[1].keys() - seen[0].keys() == {
        "camera",
        "repeat_action_probability",
        "name",
    }
    assert (seen[1]["camera"], seen[1]["repeat_action_probability"], seen[1]["name"]) == (1, 0.25, "a=b")


def test_options_that_an_environment_does_not_know(tiny):
    """As of a preset with another environment: the message says where they come from, and how to leave them out."""
    with pytest.raises(EnvError, match=r"no_option.*\(env_options: no_option=1; `--env-options` alone"):
        make_env(replace(tiny, env_options=("no_option=1",)))
    with pytest.raises(EnvError, match="NoSuchTask") as error:
        make_env(replace(tiny, env="gym:NoSuchTask-v0"))
    assert "env_options" not in str(error.value)


def walk(driver, steps, seed=0):
    rng = np.random.default_rng(seed)
    rows, episodes, acted = [driver.row], [], 0
    for _ in range(steps):
        n, finished = driver.step(rng.integers(0, 2, driver.env.num_envs))
        acted += n
        episodes += finished
        rows.append(driver.row)
    return rows, episodes, acted


def test_rows_start_with_a_reset_and_zero_action(driver):
    assert driver.row["is_first"].all()
    assert (driver.row["action"] == 0).all() and (driver.row["reward"] == 0).all()


def test_action_in_a_row_led_to_it_and_is_zero_at_is_first(driver):
    rng = np.random.default_rng(0)
    for _ in range(200):
        action = rng.integers(0, 2, 2)
        driver.step(action)
        expected = np.where(driver.row["is_first"], 0, action)
        np.testing.assert_array_equal(driver.row["action"], expected)


def test_episode_returns_and_lengths_are_sums_between_resets(driver):
    rows, episodes, _ = walk(driver, 300)
    expected = []
    for i in range(2):
        total, length = 0.0, 0
        for row in rows:
            if row["is_first"][i]:
                total, length = 0.0, 0
            else:
                total, length = total + float(row["reward"][i]), length + 1
            if row["is_last"][i]:
                expected.append((total, length))
    assert sorted((e.episode_return, e.length) for e in episodes) == sorted(expected)
    assert len(episodes) > 4


def test_reset_frames_do_not_count_as_actions(driver):
    rows, _, acted = walk(driver, 100)
    assert acted == sum(int((~row["is_first"]).sum()) for row in rows)


def test_replayed_actions_bring_the_environments_back(driver, tiny):
    walk(driver, 137)
    twin = Driver(make_env(tiny), budget=60.0)
    twin.replay_actions(driver.actions)
    for key, value in driver.row.items():
        np.testing.assert_array_equal(value, twin.row[key], err_msg=key)
    (row, _, _), (twin_row, _, _) = walk(driver, 20, seed=1), walk(twin, 20, seed=1)
    np.testing.assert_array_equal(row[-1]["state"], twin_row[-1]["state"])
    twin.env.close()


def test_recording_ends_when_replaying_would_take_too_long(tiny):
    driver = Driver(make_env(tiny), budget=0.0)
    walk(driver, 3)
    assert driver.actions is None
    driver.env.close()
