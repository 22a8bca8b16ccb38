import os
import subprocess
import sys

import numpy as np
import pytest

from phyxdream import envs
from phyxdream.errors import EnvError, MissingDependency

pytest.importorskip("envpool")


def first(id, **kwargs):
    env = envs.make(id, num_envs=2, **kwargs)
    observation, _ = env.reset()
    env.step(env.action_space.sample())
    env.close()
    return env, observation


@pytest.mark.parametrize(
    ("id", "steps"),
    [("Catch-v0", 60), ("CartpoleBalance-v1", 60), ("CartPole-v1", 100), ("Pong-v5", 40), ("Pendulum-v1", 30)],
)
def test_same_seed_same_observations(rollout, assert_same, id, steps):
    def play(**kwargs):
        return rollout(envs.make(f"envpool:{id}", num_envs=3, seed=3, **kwargs), steps)

    one = play()
    assert_same(one, play(num_threads=1))  # nor does the number of threads matter
    assert_same(play(time_limit=7, action_repeat=2), play(time_limit=7, action_repeat=2))


def test_reset_with_a_seed_is_a_fresh_start(rollout, assert_same):
    used = envs.make("envpool:CartPole-v1", num_envs=2, seed=3)
    used.reset()
    used.step(np.zeros(2, int))
    observation, _ = used.reset(seed=3)
    fresh = envs.make("envpool:CartPole-v1", num_envs=2, seed=3)
    np.testing.assert_array_equal(observation["state"], fresh.reset()[0]["state"])
    np.testing.assert_array_equal(used.step(np.ones(2, int))[0]["state"], fresh.step(np.ones(2, int))[0]["state"])
    again, _ = used.reset()
    assert not np.array_equal(again["state"], observation["state"])


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="threads are counted in /proc")
def test_close_and_reseeding_leave_no_threads():
    before = len(os.listdir("/proc/self/task"))
    for seed in range(3):
        env = envs.make("envpool:Catch-v0", num_envs=4, seed=seed, num_threads=2)
        env.reset()
        env.reset(seed=seed + 50)
        env.step(np.zeros(4, int))
        env.close()
    assert len(os.listdir("/proc/self/task")) == before


def test_catch_is_a_picture_whose_episodes_terminate():
    env = envs.make("envpool:Catch-v0", num_envs=2)
    observation, info = env.reset()
    assert observation["image"].shape == (2, 1, 10, 5) and set(np.unique(observation["image"])) == {0, 255}
    assert env.single_action_space.n == 3
    for step in range(1, 11):
        _, reward, terminated, _, info = env.step(np.ones(2, int))
        assert (terminated == (step == 9)).all() and (info["is_first"] == (step == 10)).all()
        assert (np.abs(reward) == (step == 9)).all()


def test_a_time_limit_truncates_and_never_hides_a_termination():
    for limit, terminal in ((4, False), (9, True), (30, True)):
        env = envs.make("envpool:Catch-v0", num_envs=2, time_limit=limit)
        env.reset()
        end = min(limit, 9)
        for step in range(1, 3 * (end + 1)):
            observation, _, terminated, truncated, info = env.step(np.ones(2, int))
            phase = step % (end + 1)
            assert (info["is_last"] == (phase == end)).all() and (info["is_first"] == (phase == 0)).all()
            assert (terminated == (phase == end and terminal)).all()
            assert (truncated == (phase == end and not terminal)).all()
            if phase == 0:
                assert (observation["image"][:, 0, 0].max(1) == 255).all()  # the ball is at the top
        env.close()


def test_action_repeat_is_the_sum_of_single_steps_up_to_the_end():
    repeated = envs.make("envpool:CartPole-v1", num_envs=1, seed=2, action_repeat=4)
    single = envs.make("envpool:CartPole-v1", num_envs=1, seed=2)
    repeated.reset(), single.reset()
    ends = 0
    for action in np.random.default_rng(0).integers(0, 2, 40):
        observation, reward, terminated, _, info = repeated.step(np.array([action]))
        total = 0.0
        for _ in range(4):
            part, part_reward, part_terminated, _, part_info = single.step(np.array([action]))
            total += part_reward[0]
            if part_terminated[0] or part_info["is_first"][0]:
                break
        np.testing.assert_array_equal(observation["state"], part["state"])
        assert reward[0] == total and terminated[0] == part_terminated[0]
        assert info["is_first"][0] == part_info["is_first"][0]
        ends += int(terminated[0])
    assert ends >= 2


def test_repeats_and_limits_leave_other_environments_alone():
    env = envs.make("envpool:CartPole-v1", num_envs=3, seed=5, action_repeat=2, time_limit=31)
    env.reset()
    elapsed = np.zeros(3, int)
    rng = np.random.default_rng(1)
    for _ in range(120):
        _, reward, terminated, truncated, info = env.step(rng.integers(0, 2, 3))
        # CartPole pays 1 for each single step
        elapsed = np.where(info["is_first"], 0, elapsed + reward.astype(int))
        assert (reward[info["is_first"]] == 0).all()
        assert (elapsed <= 31).all() and (truncated <= (elapsed == 31)).all()
        running = ~(terminated | truncated | info["is_first"])
        assert (reward[running] == 2).all() and (elapsed[running] < 31).all()


def test_dm_control_tasks_are_float32():
    env, observation = first("envpool:FishUpright-v1")
    assert {v.dtype.name for v in observation.values()} == {"float32"}
    assert observation["upright"].shape == (2, 1) and observation["velocity"].shape == (2, 13)
    assert env.single_action_space.shape == (5,) and env.single_action_space.dtype == np.float32


def test_atari_defaults():
    env = envs.make("envpool:Pong-v5", num_envs=2)
    assert env.single_observation_space["image"].shape == (3, 64, 64)
    assert env.single_action_space.n == 6
    observation, _ = env.reset()
    assert not np.array_equal(observation["image"][:, 0], observation["image"][:, 2])  # colours
    env.close()
    env, _ = first("envpool:Pong-v5", image_size=(48, 80), gray_scale=True, full_action_space=True)
    assert env.single_observation_space["image"].shape == (1, 48, 80) and env.single_action_space.n == 18


def test_minigrid_is_symbols_as_a_picture_without_the_sentence():
    _, observation = first("envpool:MiniGrid-DoorKey-5x5-v0")
    assert {k: v.shape for k, v in observation.items()} == {"direction": (2, 4), "image": (2, 3, 7, 7)}
    assert (observation["image"] % np.array([25, 51, 85])[:, None, None] == 0).all()
    assert len(np.unique(observation["image"][:, 0])) > 2
    np.testing.assert_array_equal(observation["direction"].sum(1), 1)


def test_shadow_hand_state():
    env, observation = first("envpool:HandManipulateBlockRotateZDense-v1")
    assert {k: v.shape[1:] for k, v in observation.items()} == {
        "observation": (61,),
        "achieved_goal": (7,),
        "desired_goal": (7,),
    }
    assert env.single_action_space.shape == (20,)


def test_procgen(qt, rollout, assert_same):
    def play():
        return rollout(envs.make("envpool:CoinrunEasy-v0", num_envs=2, seed=1), 10)

    one = play()
    assert one[0][0]["image"].shape == (2, 3, 64, 64)
    assert_same(one, play())


@pytest.mark.parametrize("id", ["WalkerWalk-v1", "HandManipulateBlockRotateZDense-v1"])
def test_pictures_of_mujoco(gl, id):
    _, observation = first(f"envpool:{id}", pixels=True)
    assert {k: (v.shape, v.dtype.name) for k, v in observation.items()} == {"image": ((2, 3, 64, 64), "uint8")}
    assert np.ptp(observation["image"]) > 50


@pytest.mark.slow
@pytest.mark.parametrize(
    ("id", "box"),
    [("HandManipulateBlockRotateZDense-v1", np.s_[21:32, 55:64]), ("LeapCubeReorient-v1", np.s_[8:36, 42:60])],
)
def test_the_goal_of_the_hand_is_in_the_picture(gl, id, box):
    env = envs.make(f"envpool:{id}", num_envs=1, seed=0, pixels=True)
    starts = [env.reset()[0]["image"][0] for _ in range(3)]
    later = env.step(env.action_space.sample())[0]["image"][0]
    env.close()
    # To the right of the hand: still within an episode, another one in every episode.
    rows, columns = box
    goals = [image[:, rows, columns].astype(int) for image in (*starts, later)]
    assert np.abs(goals[3] - goals[2]).mean() < 2
    assert min(np.abs(goals[i] - goals[j]).mean() for i, j in ((0, 1), (1, 2), (0, 2))) > 4


def test_a_camera_that_is_not_there_is_an_error_not_an_abort(gl):
    with pytest.raises(EnvError, match="has no camera 99"):
        envs.make("envpool:CartpoleBalance-v1", pixels=True, camera=99)
    with pytest.raises(EnvError, match="by their number"):
        envs.make("envpool:CartpoleBalance-v1", pixels=True, camera="side")


def test_only_rendered_pictures_have_a_camera():
    for arguments in ({"id": "envpool:CartpoleBalance-v1"}, {"id": "envpool:Pong-v5", "pixels": True}):
        with pytest.raises(EnvError, match="camera is 0, but only pictures"):
            envs.make(**arguments, camera=0)


def test_bad_names_and_options():
    with pytest.raises(EnvError, match="did you mean 'Catch-v0'"):
        envs.make("envpool:Cach-v0")
    with pytest.raises(EnvError, match="no option 'hight'; did you mean 'height'"):
        envs.make("envpool:Catch-v0", hight=3)
    for taken in ("from_pixels", "batch_size"):
        with pytest.raises(EnvError, match=f"no option '{taken}'"):
            envs.make("envpool:CartpoleBalance-v1", **{taken: 1})
    with pytest.raises(EnvError, match="could not be made"):
        envs.make("envpool:VizdoomCustom-v1")
    with pytest.raises(EnvError, match="several players"):
        envs.make("envpool:Chess-v1")
    with pytest.raises(EnvError, match="int32"):
        envs.make("envpool:MMST-v0")


def run(code, **variables):
    environment = {k: v for k, v in os.environ.items() if k != "MUJOCO_GL"} | variables
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment)


@pytest.mark.parametrize("variables", [{}, {"MUJOCO_GL": "egl"}], ids=["unset", "egl"])
def test_without_opengl_there_is_a_sentence_and_no_abort(variables):
    code = """
import ctypes
whole = ctypes.CDLL.__init__
def missing(self, name, *args, **kwargs):
    if name and str(name).startswith(("libGL", "libEGL", "libOpenGL", "libOSMesa")):
        raise OSError(f"{name}: cannot open shared object file")
    whole(self, name, *args, **kwargs)
ctypes.CDLL.__init__ = missing
from phyxdream import envs
from phyxdream.errors import MissingDependency
state = envs.make("envpool:CartpoleBalance-v1", num_envs=1)
state.reset()
for id in ("envpool:CartpoleBalance-v1", "dmc:cartpole_balance"):
    try:
        envs.make(id, num_envs=1, pixels=True)
    except MissingDependency as error:
        print(error)
"""
    child = run(code, **variables)
    assert child.returncode == 0, child.stderr
    assert child.stdout.count("apt-get install libegl1 libgl1 libgl1-mesa-dri") == 2


def test_a_renderer_that_dies_is_a_sentence_and_no_abort(monkeypatch):
    from phyxdream.envs import opengl

    opengl.rehearse_envpool.cache_clear()
    monkeypatch.setattr(opengl, "preload", lambda: True)
    monkeypatch.setattr(opengl, "_envpool_came_first", False)
    monkeypatch.setattr(opengl, "REHEARSAL", "import os, sys; print('no driver', file=sys.stderr); os.abort()")
    with pytest.raises(MissingDependency, match="rendering fails: no driver"):
        envs.make("envpool:CartpoleBalance-v1", pixels=True)


def test_envpool_imported_too_early_is_an_error_not_an_abort(gl):
    child = run("""
import envpool
from phyxdream import envs
try:
    envs.make("envpool:CartpoleBalance-v1", num_envs=1, pixels=True)
except envs.EnvError as error:
    print(error)
""")
    assert child.returncode == 0, child.stderr
    assert "import phyxdream.envs before envpool" in child.stdout


def test_missing_qt_is_named(monkeypatch):
    import envpool

    def make_gymnasium(*args, **kwargs):
        raise ImportError("EnvPool Procgen requires the system Qt 5 runtime on Linux.")

    monkeypatch.setattr(envpool, "make_spec", make_gymnasium)
    with pytest.raises(MissingDependency, match="apt-get install libqt5core5a libqt5gui5"):
        envs.make("envpool:CoinrunEasy-v0")
