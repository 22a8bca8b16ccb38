"""Runs one Unity ML-Agents environment in a process of its own, for `phyxdream.envs.unity`, which starts this file.

It runs by itself, in an interpreter that needs mlagents_envs and numpy but neither phyxdream nor torch, and that may be
as old as Python 3.8.

A message, either way, is one byte string: the length of a JSON header in 4 bytes, the header, then the arrays it lists.
Nothing is unpickled.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

# mlagents_envs has a time limit as well; ours, which the parent keeps, shall pass first.
GRACE = 30


def pack(header: dict[str, Any], arrays: dict[str, np.ndarray]) -> bytes:
    """A message of JSON values and arrays."""
    given = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    layout = [[name, array.dtype.str, list(np.shape(arrays[name]))] for name, array in given.items()]
    text = json.dumps({**header, "arrays": layout}).encode()
    return b"".join([struct.pack("<I", len(text)), text, *(array.tobytes() for array in given.values())])


def unpack(message: bytes) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What `pack` was given; the arrays are views of the message, not to be written to.

    Raises:
        ValueError: for bytes that are no such message.
    """
    try:
        (length,) = struct.unpack_from("<I", message)
        header = json.loads(message[4 : 4 + length].decode())
        arrays, start = {}, 4 + length
        for name, kind, shape in header.pop("arrays"):
            dtype, count = np.dtype(kind), int(np.prod(shape, dtype=np.int64))
            arrays[name] = np.frombuffer(message, dtype, count, start).reshape(shape)
            start += count * dtype.itemsize
    except (struct.error, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"a message of {len(message)} bytes cannot be read: {error}") from error
    if start != len(message):
        raise ValueError(f"a message of {len(message)} bytes has {start} according to its header")
    return header, arrays


class SceneError(Exception):
    """Something in the scene that one agent cannot be learned with; the text is for the user."""


class Game:
    """Episodes of the one agent of a behaviour.

    An agent gets a new number for every episode, and asks for decisions when it likes: what happens in between is
    waited for. What ends while no episode is going on is passed over: nobody acted in it.

    Args:
        env: a `UnityEnvironment`, reset.
        action_type: `mlagents_envs.base_env.ActionTuple`.
        behavior: the full name, as in `env.behavior_specs`.
        repeat: decisions for which an action is taken; stops where an episode ends.
        limit: decisions after which an episode is cut, or None.
    """

    def __init__(self, env: Any, action_type: Any, behavior: str, repeat: int, limit: int | None):
        self._env, self._action_type, self._behavior = env, action_type, behavior
        self._repeat, self._limit = repeat, limit
        self._fresh = True  # the scene is as its last reset left it
        self._over = False  # the episode ended, and Unity starts the next one by itself
        self._cut = False  # the episode ended by our limit, and Unity knows nothing of it
        self._decision: Any = None
        self._elapsed = 0

    def reset(self) -> dict[str, Any]:
        """Reset the scene; the first step of an episode."""
        if not self._fresh:
            self._env.reset()
        return self._begin()

    def step(self, action: np.ndarray) -> dict[str, Any]:
        """One action; or the first step of the next episode, if the last one is over."""
        if self._cut:
            self._env.reset()
        if self._cut or self._over:
            return self._begin()
        total, masked, terminated, truncated = 0.0, False, False, False
        for _ in range(self._repeat):
            step, reward, replaced, ended, interrupted = self._advance(action)
            self._elapsed += 1
            total, masked = total + reward, masked or replaced
            if ended:
                self._over, terminated, truncated = True, not interrupted, interrupted
                break
            if self._limit is not None and self._elapsed >= self._limit:
                self._cut = truncated = True
                break
        return _answer(step.obs, total, terminated, truncated, masked)

    def _begin(self) -> dict[str, Any]:
        self._over, self._cut, self._elapsed = False, False, 0
        self._fresh = False
        decisions, _ = self._env.get_steps(self._behavior)
        while not len(decisions):
            self._env.step()
            decisions, _ = self._env.get_steps(self._behavior)
        self._decision = self._only(decisions)
        return _answer(self._decision.obs, 0.0, False, False, False)

    def _advance(self, action: np.ndarray) -> tuple[Any, float, bool, bool, bool]:
        agent = int(self._decision.agent_id)
        masked, sent = self._allowed(action)
        self._env.set_actions(self._behavior, sent)
        while True:
            self._env.step()
            decisions, terminals = self._env.get_steps(self._behavior)
            if agent in terminals:
                step = terminals[agent]
                return step, _reward(step), masked, True, bool(step.interrupted)
            if len(terminals):
                raise self._several([agent, *terminals])
            if len(decisions):
                step = self._only(decisions)
                if int(step.agent_id) != agent:
                    raise self._several([agent, *decisions])
                self._decision = step
                return step, _reward(step), masked, False, False

    def _allowed(self, action: np.ndarray) -> tuple[bool, Any]:
        if action.dtype.kind == "f":
            return False, self._action_type(continuous=action.reshape(1, -1).astype(np.float32))
        chosen, masks = int(action), self._decision.action_mask
        mask = np.asarray(masks[0]).ravel() if masks else np.zeros(0, bool)  # True: not allowed
        replaced = bool(chosen < mask.size and mask[chosen] and not mask.all())
        if replaced:
            chosen = int(mask.argmin())
        return replaced, self._action_type(discrete=np.array([[chosen]], np.int32))

    def _only(self, decisions: Any) -> Any:
        if len(decisions) != 1:
            raise self._several(list(decisions))
        return decisions[next(iter(decisions))]

    def _several(self, agents: list[Any]) -> SceneError:
        numbers = ", ".join(str(int(agent)) for agent in agents)
        return SceneError(
            f"the behaviour {self._behavior!r} has several agents (numbers {numbers}); expected one agent in a scene"
        )


def _reward(step: Any) -> float:
    # Alone in its group, an agent earned what the group did.
    return float(step.reward) + float(step.group_reward)


def _answer(observations: Any, reward: float, terminated: bool, truncated: bool, masked: bool) -> dict[str, Any]:
    header = {"is": "step", "reward": reward, "terminated": terminated, "truncated": truncated, "masked": masked}
    arrays = {str(i): np.asarray(observation, np.float32) for i, observation in enumerate(observations)}
    return {"header": header, "arrays": arrays}


def choose_behavior(names: list[str], wanted: str | None) -> str:
    """The full name of the wanted behaviour, with or without its "?team=0"; the only one if `wanted` is None.

    Raises:
        SceneError: if there is no such behaviour, or several.
    """
    short = [name.partition("?")[0] for name in names]
    if wanted is None:
        if len(names) == 1:
            return names[0]
        raise SceneError(f"the scene has the behaviours {', '.join(map(repr, names))}; name one with behavior=...")
    if wanted in names:
        return wanted
    if short.count(wanted) == 1:
        return names[short.index(wanted)]
    raise SceneError(f"behavior is {wanted!r}; the scene has {', '.join(map(repr, names))}")


class Worker:
    """The process's one object: answers the parent's requests, and watches over Unity and the parent."""

    def __init__(self, connection: Connection):
        self._connection = connection
        self._sending = threading.Lock()
        self._requests: queue.SimpleQueue[tuple[dict[str, Any], dict[str, np.ndarray]]] = queue.SimpleQueue()
        self._closing, self._ended = threading.Event(), threading.Event()
        self._build: subprocess.Popen[bytes] | None = None
        self._env: Any = None
        self._game: Game | None = None

    def run(self) -> None:
        """Serve until told to close."""
        os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")  # it would only complain of the build being started
        try:
            import mlagents_envs.environment  # beside a foreign protobuf, importing fails in many ways
        except Exception as error:
            self._send({"is": "missing", "message": f"{type(error).__name__}: {_line(error)}"})
            return
        self._send({"is": "hello", "version": getattr(mlagents_envs, "__version__", "")})
        threading.Thread(target=self._listen, daemon=True).start()
        while True:
            request, arrays = self._requests.get()
            try:
                if request["do"] == "close":
                    return self._close()
                if request["do"] == "start":
                    answer = self._start(**request["options"])
                elif request["do"] == "reset":
                    answer = self._game.reset()  # type: ignore[union-attr]
                else:
                    answer = self._game.step(arrays["action"])  # type: ignore[union-attr]
                self._send(**answer)
            except Exception as error:
                # A build that ends is the better explanation of what mlagents_envs has to say about it.
                if isinstance(error, SceneError) or self._build is None or not self._ended.wait(0.5):
                    self._send({"is": "error", "message": _explain(error)})

    def _listen(self) -> None:
        try:
            while True:
                self._requests.put(unpack(self._connection.recv_bytes()))
        except (EOFError, OSError, ValueError):
            # The parent is gone: Unity, which is of our process group, shall not outlive it, nor we.
            os.killpg(os.getpgrp(), signal.SIGKILL)

    def _send(self, header: dict[str, Any], arrays: dict[str, np.ndarray] | None = None) -> None:
        with self._sending:
            self._connection.send_bytes(pack(header, arrays or {}))

    def _start(
        self,
        command: list[str] | None,
        port: int,
        seed: int,
        behavior: str | None,
        time_scale: float,
        timeout: float,
        repeat: int,
        limit: int | None,
    ) -> dict[str, Any]:
        from mlagents_envs.base_env import ActionTuple
        from mlagents_envs.environment import UnityEnvironment
        from mlagents_envs.side_channel.engine_configuration_channel import EngineConfigurationChannel

        engine = EngineConfigurationChannel()
        # Frame rates as mlagents-learn sets them: as many as can be, and none for the sake of the clock.
        engine.set_configuration_parameters(time_scale=time_scale, target_frame_rate=-1, capture_frame_rate=60)
        if command is not None:
            threading.Thread(target=self._launch, args=(command, port), daemon=True).start()
        # Without a file name it waits for whoever connects. The build we start ourselves, in our process group:
        # mlagents_envs would put it in one of its own, where it could outlive us.
        self._env = env = UnityEnvironment(
            file_name=None, base_port=port, seed=seed, timeout_wait=int(timeout) + GRACE, side_channels=[engine]
        )
        self._send({"is": "connected"})
        env.reset()
        while not len(env.behavior_specs):
            env.step()
        name = choose_behavior(list(env.behavior_specs), behavior)
        spec = env.behavior_specs[name]
        self._game = Game(env, ActionTuple, name, repeat, limit)
        observations = [[each.name, [int(side) for side in each.shape]] for each in spec.observation_specs]
        actions = spec.action_spec
        branches = [int(size) for size in actions.discrete_branches]
        header = {"is": "ready", "behavior": name, "observations": observations}
        return {"header": {**header, "continuous": int(actions.continuous_size), "branches": branches}}

    def _launch(self, command: list[str], port: int) -> None:
        while not _listens(port):  # Unity tries to connect once
            time.sleep(0.02)
        try:
            self._build = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        except OSError as error:
            self._send({"is": "error", "message": f"the build could not be started: {error}"})
            return
        status = self._build.wait()
        self._ended.set()
        if not self._closing.is_set():
            how = f"by {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
            self._send({"is": "ended", "message": f"the Unity build ended {how}"})

    def _close(self) -> None:
        self._closing.set()
        if self._env is not None:
            self._env.close()
        if self._build is not None:
            self._build.wait()  # the parent's patience ends before ours


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("localhost", port)) == 0


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _explain(error: Exception) -> str:
    kind = type(error).__name__
    if isinstance(error, SceneError):
        return str(error)
    if kind == "UnityWorkerInUseException":
        return "the port was taken by another program"
    if kind == "UnityCommunicatorStoppedException":
        return "Unity ended the connection"
    return f"mlagents_envs says: {_line(error) or kind}"


if __name__ == "__main__":
    # Beside this file lie others called gym.py and the like, which would be found before the packages.
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [place for place in sys.path if os.path.abspath(place) != here]
    Worker(Connection(int(sys.argv[1]))).run()
