"""Unity ML-Agents against `unity/build.py`, which plays the build: through mlagents_envs and its gRPC protocol where
PHYXDREAM_UNITY_PYTHON names an interpreter that has them, and through a stub of mlagents_envs everywhere."""

import ast
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from gymnasium import spaces

from phyxdream import envs
from phyxdream.envs import unity, unity_worker
from phyxdream.errors import EnvError, MissingDependency

HERE = Path(__file__).parent / "unity"
REAL = os.environ.get(unity.PYTHON)


def script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture(scope="session")
def real_python():
    if not REAL:
        pytest.skip(f"{unity.PYTHON} names no interpreter with mlagents-envs")
    check = subprocess.run([REAL, "-c", "import mlagents_envs.environment"], capture_output=True, text=True)
    if check.returncode:
        pytest.skip(f"{REAL} cannot import mlagents_envs: {check.stderr.strip().splitlines()[-1]}")
    return REAL


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """The id of a build that is played over the stub."""
    python = script(tmp_path / "python", f'PYTHONPATH="{HERE}/stub" exec "{sys.executable}" "$@"')
    monkeypatch.setenv(unity.PYTHON, python)
    return "unity:" + script(tmp_path / "Walk.x86_64", f'exec "{sys.executable}" "{HERE}/build.py" plain "$@"')


@pytest.fixture(params=["stub", "mlagents"])
def build(request, tmp_path, monkeypatch):
    """The id of a build, once over the stub and once over the real protocol."""
    if request.param == "stub":
        return request.getfixturevalue("stub")
    python = request.getfixturevalue("real_python")
    monkeypatch.setenv(unity.PYTHON, python)
    return "unity:" + script(tmp_path / "Walk.x86_64", f'exec "{python}" "{HERE}/build.py" grpc "$@"')


@pytest.fixture
def pids(tmp_path):
    """Arguments that have builds write their process ids, and a function that waits until all are gone."""
    path = tmp_path / "pids"

    def alive():
        found = [int(line) for line in path.read_text().split()]
        return [pid for pid in found if Path(f"/proc/{pid}").exists() and state(pid) != "Z"]

    def state(pid):
        try:
            return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:
            return "Z"

    def gone(seconds=10.0):
        deadline = time.monotonic() + seconds
        while alive() and time.monotonic() < deadline:
            time.sleep(0.02)
        return path.exists() and not alive()

    gone.alive = alive
    return ("--pid-file", str(path)), gone


def still(env):
    return np.zeros((env.num_envs, 1), np.float32)


def walk(env, steps, seed=3):
    rng = np.random.default_rng(seed)
    observation, info = env.reset()
    out = [(observation, np.zeros(env.num_envs), info)]
    for _ in range(steps):
        if env.single_action_space.shape:
            action = rng.uniform(-1, 1, (env.num_envs, 1)).astype(np.float32)
        else:
            action = rng.integers(0, 3, env.num_envs)
        observation, reward, _, _, info = env.step(action)
        out.append((observation, reward, info))
    return out


def same(one, other):
    return all(
        np.array_equal(a[0]["state"], b[0]["state"]) and np.array_equal(a[1], b[1])
        for a, b in zip(one, other, strict=True)
    )


# -- What an environment is -------------------------------------------------------------------------------------------


def test_two_instances_side_by_side(build):
    env = envs.make(build, num_envs=2, seed=5, timeout=30)
    assert env.single_action_space == spaces.Box(-1, 1, (1,), np.float32)
    assert {k: (s.shape, s.dtype) for k, s in env.single_observation_space.items()} == {
        "state": ((3,), np.float32),
        "image": ((3, 6, 8), np.uint8),
    }
    observation, info = env.reset()
    assert observation in env.observation_space and info["is_first"].all()
    place = observation["state"][:, 0]
    for step in range(1, 4):
        action = np.array([[0.25], [-0.25]], np.float32)
        observation, reward, terminated, truncated, info = env.step(action)
        np.testing.assert_allclose(observation["state"][:, 0], place + step * action[:, 0])
        np.testing.assert_array_equal(observation["state"][:, 1], step)
        np.testing.assert_allclose(reward, observation["state"][:, 0] + 0.25)  # the group's is in it
        assert not (terminated | truncated | info["is_first"]).any()
    column = observation["state"][:, 0].astype(int) + 3
    for i in range(2):
        np.testing.assert_array_equal(observation["image"][i, :, 0, column[i]], np.rint([102, 153, 204]))
        assert (observation["image"][i] > 0).sum() == 3 * 6
    np.testing.assert_array_equal(observation["state"][:, 2], 20)  # the time scale came through
    env.close()


@pytest.mark.parametrize("flags", [(), ("--gap", "2"), ("--at-once",), ("--gap", "1", "--at-once")])
def test_episodes_end_and_start_whenever_the_agent_asks(build, flags):
    env = envs.make(build, num_envs=1, seed=0, args=flags, timeout=30)
    env.reset()
    log = [env.step(still(env)) for _ in range(6)]
    assert [bool(e[3][0]) for e in log] == [False] * 4 + [True, False]  # interrupted after five steps
    assert not any(e[2][0] for e in log)
    assert [bool(e[4]["is_first"][0]) for e in log] == [False] * 5 + [True]
    assert [float(e[0]["state"][0, 1]) for e in log] == [1, 2, 3, 4, 5, 0]
    assert log[-1][1][0] == 0.0  # though Unity sent something
    outwards = np.sign(log[-1][0]["state"][0, 0]) or 1.0
    for _ in range(5):
        observation, reward, terminated, truncated, info = env.step(still(env) + outwards)
        if terminated[0]:
            break
    assert abs(observation["state"][0, 0]) > 3 and not truncated[0]  # the last observation, not the next first one
    assert info["is_terminal"][0] and info["is_last"][0]
    assert reward[0] == observation["state"][0, 0] + 0.25
    assert env.step(still(env))[4]["is_first"][0]
    env.close()


def test_the_same_seed_plays_the_same(build):
    def play(seed):
        env = envs.make(build, num_envs=2, seed=seed, timeout=30)
        out = walk(env, 25)
        env.close()
        return out

    one = play(11)
    assert same(one, play(11)) and not same(one, play(12))


def test_another_seed_starts_the_builds_anew(build, pids):
    flags, gone = pids
    env = envs.make(build, num_envs=1, seed=1, args=flags, timeout=30)
    first = env.reset()[0]["state"]
    assert len(gone.alive()) == 1
    other = [env.reset()[0]["state"] for _ in range(4)]  # no seed: on with the random numbers
    assert len({float(s[0, 0]) for s in [first, *other]}) > 1
    before = gone.alive()
    np.testing.assert_array_equal(env.reset(seed=1)[0]["state"], first)
    assert len(gone.alive()) == 1 and gone.alive() != before
    env.close()


def test_discrete_actions(build):
    env = envs.make(build, num_envs=1, args=("--branches", "3"), timeout=30)
    assert env.single_action_space == spaces.Discrete(3)
    place = env.reset()[0]["state"][0, 0]
    for action, move in ((1, 0), (0, -1), (2, 0)):
        np.testing.assert_array_equal(env.step(np.array([action]))[0]["state"][0, 0], place + move)
    env.close()


def test_masked_actions_are_replaced_and_told_once(build):
    env = envs.make(build, num_envs=1, args=("--branches", "3", "--mask", "0", "2"), timeout=30)
    place = env.reset()[0]["state"][0, 0]
    with pytest.warns(UserWarning, match="masks"):
        observation = env.step(np.array([2]))[0]
    assert observation["state"][0, 0] == place
    assert env.step(np.array([0]))[0]["state"][0, 0] == place
    env.close()


def test_action_repeat_and_time_limit(build):
    env = envs.make(build, num_envs=1, action_repeat=2, time_limit=3, timeout=30)
    place = env.reset()[0]["state"][0, 0]
    observation, reward, _, truncated, _ = env.step(still(env))
    assert observation["state"][0, 1] == 2 and reward[0] == 2 * (place + 0.25) and not truncated[0]
    observation, reward, terminated, truncated, _ = env.step(still(env))
    assert observation["state"][0, 1] == 3 and reward[0] == place + 0.25
    assert truncated[0] and not terminated[0]
    observation, reward, _, _, info = env.step(still(env))
    assert observation["state"][0, 1] == 0 and info["is_first"][0] and reward[0] == 0  # the scene was reset
    env.close()


@pytest.mark.parametrize("flags", [("--png",), ("--channels-last",), ("--channels-last", "--png")])
def test_pictures_of_older_and_newer_packages(build, request, flags):
    if "--png" in flags and "mlagents" in request.node.callspec.params["build"]:
        newer = unity.version().startswith("1.")
        if newer == ("--channels-last" in flags):  # 0.28 wants compressed pictures to have them last, 1.1 first
            with pytest.raises(EnvError, match=r"mlagents_envs says: .*expected"):
                envs.make(build, num_envs=1, args=flags, timeout=30)
            return
    env = envs.make(build, num_envs=1, image_size=(12, 16), args=flags, timeout=30)
    observation, _ = env.reset()
    assert observation["image"].shape == (1, 3, 12, 16)
    column = 2 * (int(observation["state"][0, 0]) + 3)
    np.testing.assert_array_equal(observation["image"][0, :, 0, column], [102, 153, 204])
    env.close()


def test_behaviours_are_chosen_by_name(build):
    flags = ("--behaviors", "Walker?team=0", "Runner?team=1")
    with pytest.raises(EnvError, match=r"behaviours 'Walker\?team=0', 'Runner\?team=1'; name one with behavior="):
        envs.make(build, num_envs=1, args=flags, timeout=30)
    with pytest.raises(EnvError, match=r"behavior is 'Sleeper'; the scene has 'Walker"):
        envs.make(build, num_envs=1, args=flags, behavior="Sleeper", timeout=30)
    env = envs.make(build, num_envs=1, args=flags, behavior="Walker", timeout=30)
    place = env.reset()[0]["state"][0, 0]
    assert env.step(still(env) + 0.5)[0]["state"][0, 0] == place + 0.5
    env.close()


def test_agents_that_come_late_are_waited_for(build):
    env = envs.make(build, num_envs=1, args=("--late", "3"), timeout=30)
    assert env.reset()[1]["is_first"].all()
    env.close()


# -- What goes wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--branches", "3", "2"), r"discrete branches of sizes \[3, 2\]; expected continuous actions alone, or one"),
        (("--continuous", "2", "--branches", "3"), "2 continuous actions and discrete"),
    ],
)
def test_actions_that_cannot_be_handled(build, pids, flags, message):
    write, gone = pids
    with pytest.raises(EnvError, match=message):
        envs.make(build, num_envs=1, args=(*flags, *write), timeout=30)
    assert gone()


def test_several_agents_are_refused(build, pids):
    flags, gone = pids
    env = envs.make(build, num_envs=1, args=("--agents", "2", *flags), timeout=30)
    with pytest.raises(EnvError, match=r"environment 0: the behaviour 'Walker\?team=0' has several agents .*one agent"):
        env.reset()
    assert gone()
    env.close()


def test_an_agent_that_asks_in_between_is_refused(build):
    env = envs.make(build, num_envs=1, args=("--stranger-at", "3"), timeout=30)
    env.reset()
    with pytest.raises(EnvError, match=r"several agents .*77"):
        for _ in range(3):
            env.step(still(env))
    env.close()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--crash-at", "4"), "environment 0: the Unity build ended by SIGSEGV; it printed: the walker stumbles"),
        (("--exit-at", "4"), "the Unity build ended with status 3"),
        (("--nan-at", "4"), "NaN"),
        (("--quit-at", "4"), "the Unity build ended with status 0"),
    ],
)
def test_an_end_amid_an_episode_is_told_at_once_and_reset_starts_anew(build, pids, flags, message):
    write, gone = pids
    env = envs.make(build, num_envs=2, seed=2, args=(*flags, *write), timeout=30)
    first = env.reset()[0]["state"]
    start = time.monotonic()
    with pytest.raises(EnvError, match=message):
        for _ in range(5):
            env.step(still(env))
    assert time.monotonic() - start < 5 and gone()
    with pytest.raises(EnvError, match="reset"):
        env.step(still(env))
    np.testing.assert_array_equal(env.reset()[0]["state"], first)
    env.close()
    assert gone()


def test_a_build_that_hangs_is_given_up(build, pids):
    write, gone = pids
    env = envs.make(build, num_envs=1, args=("--hang-at", "3", *write), timeout=4)
    env.reset()
    start = time.monotonic()
    with pytest.raises(EnvError, match=r"0: Unity did not answer in time.*it printed: the walker stumbles"):
        for _ in range(4):
            env.step(still(env))
    assert time.monotonic() - start < 8 and gone()
    env.close()


def test_a_build_that_does_not_connect_is_given_up(build, pids):
    write, gone = pids
    with pytest.raises(EnvError, match="did not connect in time"):
        envs.make(build, num_envs=1, args=("--never", *write), timeout=2)
    assert gone()


def test_a_build_that_ends_before_it_connects(build, tmp_path):
    broken = script(tmp_path / "Broken", "echo no such library >&2; exit 127")
    with pytest.raises(EnvError, match="ended with status 127; it printed: no such library"):
        envs.make(f"unity:{broken}", num_envs=1, timeout=30)
    garbage = tmp_path / "Garbage"
    garbage.write_bytes(b"\x7fELF, or so it says")
    garbage.chmod(0o755)
    with pytest.raises(EnvError, match="the build could not be started"):
        envs.make(f"unity:{garbage}", num_envs=1, timeout=30)


@pytest.mark.parametrize("address", ["0.0.0.0", "localhost"])
def test_a_port_in_use(build, address):
    with socket.socket() as taken:
        taken.bind((address, 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(EnvError, match=f"port {port} is in use.*base_port"):
            envs.make(build, num_envs=1, base_port=port, timeout=30)
    env = envs.make(build, num_envs=1, base_port=port, timeout=30)
    with pytest.raises(EnvError, match=f"port {port} is in use"):  # by a build of our own
        envs.make(build, num_envs=1, base_port=port, timeout=30)
    other = envs.make(build, num_envs=1, timeout=30)  # others find ports
    other.reset()
    other.close()
    env.close()


# -- How it ends ------------------------------------------------------------------------------------------------------


def test_close_has_builds_quit(build, pids):
    write, gone = pids
    env = envs.make(build, num_envs=2, args=write, timeout=30)
    env.reset()
    assert len(gone.alive()) == 2
    start = time.monotonic()
    env.close()
    assert gone(0.5) and time.monotonic() - start < 8  # they quit by themselves
    with pytest.raises(EnvError, match="closed"):
        env.reset()


def test_close_kills_a_build_that_stays(stub, pids, monkeypatch):
    monkeypatch.setattr(unity, "CLOSE_SECONDS", 1.0)
    write, gone = pids
    env = envs.make(stub, num_envs=1, args=("--stay", *write), timeout=30)
    env.close()
    assert gone(0.5)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_outlives_a_process_that_is_ended(build, pids, number):
    write, gone = pids
    code = (  # a shell that runs tests in the background has SIGINT ignored
        "import signal, sys, time; from phyxdream import envs; "
        "signal.signal(signal.SIGINT, signal.default_int_handler); "
        f"env = envs.make({build!r}, num_envs=2, args={write!r}, timeout=30); env.reset(); print('up', flush=True); "
        "time.sleep(600)"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert child.stdout.readline() == "up\n"
    assert len(gone.alive()) == 2
    child.send_signal(number)
    child.wait(30)
    child.stdout.close()
    assert gone()


def test_an_interrupt_while_waiting_leaves_nothing_behind(stub, pids, monkeypatch):
    write, gone = pids
    env = envs.make(stub, num_envs=1, args=("--hang-at", "2", *write), timeout=30)
    env.reset()
    main = threading.main_thread().ident
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Timer(0.5, signal.pthread_kill, [main, signal.SIGINT]).start()
        with pytest.raises(KeyboardInterrupt):
            for _ in range(3):
                env.step(still(env))
    finally:
        signal.signal(signal.SIGINT, handler)
    assert gone()
    env.close()


# -- Training ---------------------------------------------------------------------------------------------------------


def test_an_agent_acts_and_learns(build, tmp_path):
    from phyxdream.agents import DreamerAgent, preset

    config = preset(
        "dreamer_v3", env_backend="unity_mlagents", env=build.partition(":")[2], num_envs=2, size="1m", deter_size=16,
        hidden_size=8, stoch_size=4, classes=4, units=8, depth=2, batch_size=4, batch_length=8, train_ratio=8.0,
        prefill=32, total_steps=80, replay_capacity=1_000, imagine_horizon=3, log_every=40, eval_episodes=2,
        learning_rate=1e-3, device="cpu", logdir=str(tmp_path / "run"),
    )  # fmt: skip
    result = DreamerAgent(config).train(quiet=True)
    assert result.steps >= 80 and len(result.evaluation.returns) == 2


# -- The editor -------------------------------------------------------------------------------------------------------


def test_the_editor_connects_by_itself(build, capfd):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    path = build.partition(":")[2]

    def press_play():  # once we listen
        while not unity_worker._listens(port):
            time.sleep(0.05)
        players.append(subprocess.Popen([path, "--mlagents-port", str(port)], stderr=subprocess.DEVNULL))

    players = []
    human = threading.Thread(target=press_play)
    human.start()
    env = envs.make("unity:editor", num_envs=1, base_port=port, timeout=30)
    human.join()
    assert f"press Play in the Unity editor (port {port})" in capfd.readouterr().err
    env.reset()
    env.step(still(env))
    with pytest.raises(EnvError, match="editor takes a seed when it connects"):
        env.reset(seed=4)
    env.close()
    assert players[0].wait(10) == 0
    with pytest.raises(EnvError, match="there is one Unity editor"):
        envs.make("unity:editor", num_envs=2)


# -- Without Unity ----------------------------------------------------------------------------------------------------


def test_messages_hold_numbers_and_arrays():
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3)[:, ::2], "b": np.array(3), "c": np.zeros((0, 2), bool)}
    header, back = unity_worker.unpack(unity_worker.pack({"is": "step", "reward": 0.1}, arrays))
    assert header == {"is": "step", "reward": 0.1}
    assert back.keys() == arrays.keys()
    for key, value in arrays.items():
        assert back[key].dtype == value.dtype
        np.testing.assert_array_equal(back[key], value)


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"\xff\xff\xff\xff{}",
        b"\x02\x00\x00\x00{}",
        b"\x02\x00\x00\x00[]",
        unity_worker.pack({}, {"a": np.zeros(3)})[:-1],
        unity_worker.pack({}, {"a": np.zeros(3)}) + b"x",
        unity_worker.pack({}, {"a": np.zeros(1)}).replace(b"<f8", b"|O8"),
    ],
)
def test_broken_messages_are_refused(message):
    with pytest.raises(ValueError, match=f"a message of {len(message)} bytes"):
        unity_worker.unpack(message)


def test_the_worker_needs_nothing_of_ours_and_no_new_python():
    tree = ast.parse(Path(unity_worker.__file__).read_text(), feature_version=(3, 8))
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    modules |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    foreign = {name.partition(".")[0] for name in modules} - set(sys.stdlib_module_names)
    assert foreign == {"numpy", "mlagents_envs"}


def test_mlagents_envs_and_protobuf_stay_out_of_our_process(stub):
    code = f"""
import sys
from phyxdream import envs
before = set(sys.modules)
env = envs.make({stub!r}, num_envs=1, timeout=30)
env.reset()
env.close()
print(sorted(m for m in set(sys.modules) - before if m.startswith(("mlagents", "google", "grpc"))))
"""
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert child.stdout == "[]\n", child.stderr


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (("--no-picture",), {"state": (3,)}),
        (("--twice",), {"Place": (3,), "Camera": (3, 6, 8), "Place_2": (3,), "Camera_2": (3, 6, 8)}),
        (("--names", "reward", "My camera"), {"state": (3,), "image": (3, 6, 8)}),
        (("--names", "", "", "--twice"), {"vector": (3,), "image": (3, 6, 8), "vector_2": (3,), "image_2": (3, 6, 8)}),
    ],
)
def test_names_of_observations(stub, flags, names):
    env = envs.make(stub, num_envs=1, args=flags, timeout=30)
    assert {key: space.shape for key, space in env.single_observation_space.items()} == names
    assert env.reset()[0] in env.observation_space
    env.close()


def test_small_pictures_are_vectors_and_reserved_names_are_changed():
    keys, space = unity.observation_space([["reward", [2]], ["grid", [3, 4, 4]], ["rays", [9]]])
    assert keys == ["reward", "grid", "rays"]
    mapped = envs.vector.ObservationMap(space)
    assert {k: s.shape for k, s in mapped.space.items()} == {"obs_reward": (2,), "grid": (48,), "rays": (9,)}
    with pytest.raises(EnvError, match="observes nothing"):
        unity.observation_space([])


def test_pictures_out_of_range_are_refused(stub):
    env = envs.make(stub, num_envs=1, args=("--scale", "10"), timeout=30)
    with pytest.raises(EnvError, match=r"Camera has numbers from 0 to 8; .*picture, with numbers from 0 to 1"):
        env.reset()
    env.close()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"behaviour": "Walker"}, "no option 'behaviour'; did you mean 'behavior'"),
        ({"time_scale": 0}, "time_scale is 0; expected a positive number"),
        ({"timeout": float("inf")}, "timeout is inf"),
        ({"base_port": 80}, "base_port is 80; expected an integer from 1024 to 65535"),
        ({"base_port": 65536}, "base_port is 65536"),
        ({"args": "-logFile -"}, "args is '-logFile -'; expected a list of texts"),
        ({"camera": 1}, "camera is 1, but the cameras of a Unity scene are chosen in the scene"),
        ({"segmentation": True}, "unity environments cannot tell objects apart"),
        ({"pixels": False}, "pixels is False, but .* observes"),
    ],
)
def test_arguments_are_checked(stub, arguments, message):
    with pytest.raises(EnvError, match=message):
        envs.make(stub, num_envs=1, **arguments)


def test_which_file_is_the_build(stub, tmp_path, monkeypatch):
    path = stub.partition(":")[2]
    assert unity.find_build(path) == unity.find_build(path.removesuffix(".x86_64")) == path
    monkeypatch.chdir(tmp_path)
    assert unity.find_build("Walk") == path  # subprocesses look relative names up elsewhere
    bundle = tmp_path / "Mac.app" / "Contents" / "MacOS"
    bundle.mkdir(parents=True)
    inside = script(bundle / "Walk", "exit")
    assert unity.find_build(str(tmp_path / "Mac")) == unity.find_build(str(tmp_path / "Mac.app")) == inside
    with pytest.raises(EnvError, match=r"unity:.*Wolk: there is no such build.*did you mean '.*Walk\.x86_64'"):
        envs.make(f"unity:{tmp_path}/Wolk", num_envs=1)
    with pytest.raises(EnvError, match="no such build"):
        envs.make(f"unity:{tmp_path}/nowhere/Walk", num_envs=1)
    os.chmod(path, 0o644)
    with pytest.raises(EnvError, match=r"is not executable; chmod \+x"):
        envs.make(stub, num_envs=1)


def test_no_graphics_and_args_reach_the_build(stub, tmp_path):
    told = tmp_path / "told"
    echo = script(tmp_path / "Echo", f'echo "$@" > "{told}"; exit 1')
    with pytest.raises(EnvError, match="ended with status 1"):
        envs.make(f"unity:{echo}", num_envs=1, base_port=5077, no_graphics=True, args=["-logFile", "x"], timeout=30)
    assert told.read_text() == "-nographics -batchmode --mlagents-port 5077 -logFile x\n"


def test_what_to_install_is_told(stub, tmp_path, monkeypatch):
    monkeypatch.setenv(unity.PYTHON, str(tmp_path / "none"))
    with pytest.raises(MissingDependency, match=r"PHYXDREAM_UNITY_PYTHON is .*none'.*No such file.*--no-deps"):
        envs.make(stub, num_envs=1)
    bare = script(tmp_path / "bare", f'exec "{sys.executable}" -S "$@"')  # no numpy
    monkeypatch.setenv(unity.PYTHON, bare)
    with pytest.raises(MissingDependency, match=r"cannot import.*No module named 'numpy'.*mlagents-envs==1\.1\.0"):
        envs.make(stub, num_envs=1)
    (tmp_path / "broken" / "mlagents_envs").mkdir(parents=True)
    (tmp_path / "broken" / "mlagents_envs" / "__init__.py").write_text("raise TypeError('Descriptors\\n cannot')")
    broken = script(tmp_path / "old", f'PYTHONPATH="{tmp_path}/broken" exec "{sys.executable}" "$@"')
    monkeypatch.setenv(unity.PYTHON, broken)
    with pytest.raises(MissingDependency, match=r"cannot import \(TypeError: Descriptors cannot\).*protobuf==3\.20\.3"):
        unity.version()


def test_our_own_interpreter_is_the_default(monkeypatch):
    monkeypatch.delenv(unity.PYTHON, raising=False)
    assert unity.interpreter() == sys.executable


def test_a_worker_that_speaks_gibberish(stub, tmp_path, monkeypatch):
    code = "import os, sys; os.write(int(sys.argv[2]), bytes([0, 0, 0, 2]) + b'hi')"
    monkeypatch.setenv(unity.PYTHON, script(tmp_path / "mad", f'exec "{sys.executable}" -c "{code}" "$@"'))
    with pytest.raises(EnvError, match="a message of 2 bytes cannot be read"):
        envs.make(stub, num_envs=1)
    monkeypatch.setenv(unity.PYTHON, script(tmp_path / "dead", "echo I am no Python; exit 1"))
    with pytest.raises(EnvError, match="its process ended; it printed: I am no Python"):
        envs.make(stub, num_envs=1)
