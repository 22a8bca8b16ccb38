"""Unity ML-Agents (https://github.com/Unity-Technologies/ml-agents): a build for each environment, or the editor.

mlagents_envs wants a protobuf of 2022, so it is never imported here: `unity_worker` runs it, a process for each
environment, in an interpreter of its own if need be. `PHYXDREAM_UNITY_PYTHON` names that interpreter; without it, it is
the one that runs this.

- An environment is an instance of the build with one agent of the behaviour; what other behaviours there are gets
  zeros for actions. Every decision the agent asks for is a step. When it ends its episode, the next one is the one that
  Unity starts by itself; after our own time limit, and at `reset`, the scene is reset.
- An interrupted episode (Unity's "Max Step") is truncated, any other end is a termination. The reward of the agent's
  group, if it has one, is added to its own.
- One vector observation is called "state", one picture "image"; several are called as their sensors are.
- Observations of three dimensions are pictures, whose numbers lie in [0, 1]; very small ones are vectors.
- Actions are continuous, or discrete with one branch. An action that the scene masks is not taken: the first allowed
  one takes its place, and a warning says so once.
- Unity draws random numbers from the seed it gets when it starts, so another seed starts the build anew. Whether the
  same seed and actions give the same observations is up to the scene.
- The editor is one environment at a time, for trying a scene out: training, which evaluates beside its own environments
  and so needs several, is done with a build.
- mlagents_envs listens on every network interface and asks nobody for a password.

Tested: mlagents-envs 1.1.0 (Python 3.11 to 3.13) and 0.28.0 (Python 3.8) with their gRPC protocol, on Linux, against a
client of the tests that plays the build. Not tested: a build made by Unity, the editor, macOS. Windows is refused: what
passes between the processes, and what ends them, is POSIX.
"""

from __future__ import annotations

import collections
import contextlib
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from phyxdream.envs import unity_worker
from phyxdream.envs.spaces import ObservationMap
from phyxdream.errors import EnvError, MissingDependency, suggest

Array = NDArray[Any]

PYTHON = "PHYXDREAM_UNITY_PYTHON"
INSTALL = (
    "python3 -m venv unity && unity/bin/pip install numpy pillow pyyaml grpcio setuptools protobuf==3.20.3 && "
    "unity/bin/pip install --no-deps --ignore-requires-python mlagents-envs==1.1.0 && "
    f"export {PYTHON}=$PWD/unity/bin/python"
)
# The ports of mlagents_envs: of the editor, and the first of those for builds.
EDITOR_PORT, FIRST_PORT = 5004, 5005
# How long the worker's Python may take to import mlagents_envs.
IMPORT_SECONDS = 60.0
# How long builds may take to quit before they are killed.
CLOSE_SECONDS = 10.0
# What an error says when nothing comes in time, by what was expected.
LATE = {
    "hello": "its Python did not start in time",
    "connected": "Unity did not connect in time. A build may need no_graphics=True on a machine without a display; "
    "in the editor, press Play. The agent's Behavior Type must be Default",
    "ready": "Unity connected, but no agent of any behaviour came in time",
    "step": "Unity did not answer in time, or the agent did not ask for a decision",
}
# Lines of what Unity and mlagents_envs print that an error repeats.
OUTPUT_LINES = 8

_ports: set[int] = set()  # those of this process's builds, which may not listen yet
_ports_lock = threading.Lock()


def interpreter() -> str:
    """The Python that is to run mlagents_envs."""
    return os.environ.get(PYTHON) or sys.executable


def version() -> str:
    """The version of mlagents_envs that would be used.

    Raises:
        MissingDependency: if `interpreter()` cannot import it.
    """
    instance = Instance("unity:")
    try:
        return str(instance.receive(time.monotonic() + IMPORT_SECONDS, "hello")[0]["version"])
    finally:
        instance.kill()


class Instance:
    """The process that runs one environment: `unity_worker`, and below it the build.

    Args:
        title: what errors begin with.
    """

    def __init__(self, title: str):
        if os.name != "posix":
            raise EnvError("unity environments run on Linux and macOS only")
        self._title = title
        self._connection, theirs = Pipe()
        environment = dict(os.environ, PYTHONUNBUFFERED="1")
        if interpreter() != sys.executable:  # whose packages shall not be found by another one
            for name in ("PYTHONPATH", "PYTHONHOME"):
                environment.pop(name, None)
        try:
            self._process = subprocess.Popen(
                [interpreter(), unity_worker.__file__, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=[theirs.fileno()],
                env=environment,
                start_new_session=True,  # Ctrl-C is for us; and a group to kill
            )
        except OSError as error:
            self._connection.close()
            raise MissingDependency(
                f"{title}: {PYTHON} is {interpreter()!r}, which cannot be run ({error.strerror}); expected a Python "
                f"with mlagents-envs: {INSTALL}"
            ) from error
        finally:
            theirs.close()
        self._output: collections.deque[str] = collections.deque(maxlen=OUTPUT_LINES)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as stream:
            for line in iter(lambda: stream.readline(4096), b""):
                if text := line.decode(errors="replace").strip():
                    self._output.append(text)

    def send(self, header: dict[str, Any], **arrays: Array) -> None:
        """Ask for something; a worker that is gone is reported by `receive`."""
        with contextlib.suppress(OSError):
            self._connection.send_bytes(unity_worker.pack(header, arrays))

    def receive(self, deadline: float, expected: str) -> tuple[dict[str, Any], dict[str, Array]]:
        """The next message, by `time.monotonic() == deadline`.

        Raises:
            EnvError: if it is another than the expected one, or does not come; what was printed last is told.
            MissingDependency: if mlagents_envs cannot be imported.
        """
        try:
            in_time = self._connection.poll(max(0.0, deadline - time.monotonic()))
            message = self._connection.recv_bytes() if in_time else b""
        except (EOFError, OSError):
            printed = self._printed()
            if "No module named" in printed:
                raise self._missing(printed) from None
            raise EnvError(f"{self._title}: its process ended{printed}") from None
        if not in_time:
            raise EnvError(f"{self._title}: {LATE[expected]}{self._printed()}")
        try:
            header, arrays = unity_worker.unpack(message)
        except ValueError as error:
            raise EnvError(f"{self._title}: {error}") from error
        if header["is"] == "missing":
            raise self._missing(f" ({header['message']})")
        if header["is"] != expected:
            printed = self._printed() if header["is"] == "ended" else ""
            raise EnvError(f"{self._title}: {header.get('message', header['is'])}{printed}")
        return header, arrays

    def _missing(self, why: str) -> MissingDependency:
        return MissingDependency(
            f"unity environments need mlagents-envs, which {interpreter()} cannot import{why}. It needs an old "
            f"protobuf, so give it an environment of its own: {INSTALL}"
        )

    def _printed(self) -> str:
        self.kill()
        self._reader.join(1.0)
        return f"; it printed: {' | '.join(self._output)[-1000:]}" if self._output else ""

    def wait(self, deadline: float) -> None:
        """Until the process has closed its end, or the deadline."""
        with contextlib.suppress(EOFError, OSError):
            while self._connection.poll(max(0.0, deadline - time.monotonic())):
                self._connection.recv_bytes()

    def kill(self) -> None:
        """End what is left of the process and of the build."""
        if self._process.returncode is None:  # not waited for, so the number is still that of our group
            with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS says the latter of zombies
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._connection.close()


class UnityVector:
    """Instances of a build, or the editor, in lockstep.

    Args:
        name: path of the build, or "editor".
        num_envs: how many instances.
        seed: instance i is started with `seed + i`.
        action_repeat: decisions for which an action is taken; stops where an episode ends.
        time_limit: decisions after which an episode is truncated, or None.
        behavior: the behaviour's name, with or without "?team=0"; None if the scene has just one.
        base_port: instance i uses `base_port + i`; None: free ones from 5005 on, and 5004 for the editor.
        time_scale: how many times faster than the clock the scene's time goes; 20, as of `mlagents-learn`, is too much
            for the physics of some scenes.
        no_graphics: run the build without a display; there are no pictures then.
        timeout: seconds that Unity may take to connect, to bring an agent, and for each step.
        args: more arguments for the build.

    Raises:
        EnvError: an argument out of range, no such build, a port in use, a build that ends or does not connect in
            time, or a scene with several agents or actions that cannot be handled. The same from `reset` and `step`,
            after which everything is closed, and `reset` starts it anew.
        MissingDependency: `interpreter()` cannot import mlagents_envs.
    """

    def __init__(
        self,
        name: str,
        num_envs: int,
        seed: int,
        action_repeat: int = 1,
        time_limit: int | None = None,
        *,
        behavior: str | None = None,
        base_port: int | None = None,
        time_scale: float = 20.0,
        no_graphics: bool = False,
        timeout: float = 60.0,
        args: tuple[str, ...] = (),
    ):
        self._id, self.num_envs = f"unity:{name}", num_envs
        self._editor = name == "editor"
        if self._editor and num_envs != 1:
            raise EnvError(f"num_envs is {num_envs}, but there is one Unity editor; expected 1")
        for key, value in (("time_scale", time_scale), ("timeout", timeout)):
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
                raise EnvError(f"{key} is {value!r}; expected a positive number")
        last = 65536 - num_envs
        if base_port is not None and not (isinstance(base_port, int) and 1024 <= base_port <= last):
            raise EnvError(f"base_port is {base_port!r}; expected an integer from 1024 to {last}")
        if isinstance(args, str) or not all(isinstance(arg, str) for arg in args):
            raise EnvError(f"args is {args!r}; expected a list of texts")
        self._base_port = EDITOR_PORT if self._editor and base_port is None else base_port
        self._timeout, self._told = timeout, False
        self._command = None if self._editor else [find_build(name), *(["-nographics", "-batchmode"] * no_graphics)]
        self._args = list(args)
        self._options = {
            "behavior": behavior,
            "time_scale": float(time_scale),
            "timeout": float(timeout),
            "repeat": action_repeat,
            "limit": time_limit,
        }
        self._seed, self._fresh = seed, True
        self._instances: list[Instance] = []
        self._ports: list[int] = []
        ready = self._start()
        try:
            self._keys, self.observation_space = observation_space(ready["observations"])
            self.action_space = action_space(ready["continuous"], ready["branches"])
            leaves = ObservationMap(self.observation_space).leaves
        except BaseException as error:
            self.close()
            if isinstance(error, EnvError):
                raise EnvError(f"{self._id}: {error}") from None
            raise
        self._pictures = {leaf.path[0] for leaf in leaves if leaf.space.dtype == np.uint8}

    def _start(self) -> dict[str, Any]:
        try:
            self._ports = reserve_ports(self.num_envs, self._base_port)
            for i in range(self.num_envs):
                self._instances.append(Instance(f"{self._id}, environment {i}"))
            self._receive("hello", IMPORT_SECONDS)
            for i, (instance, port) in enumerate(zip(self._instances, self._ports, strict=True)):
                command = self._command and [*self._command, "--mlagents-port", str(port), *self._args]
                options = {**self._options, "command": command, "port": port, "seed": self._seed + i}
                instance.send({"do": "start", "options": options})
            if self._editor:
                print(f"{self._id}: press Play in the Unity editor (port {self._ports[0]})", file=sys.stderr)
            self._receive("connected", self._timeout)
            return self._receive("ready", self._timeout)[0][0]
        except BaseException:
            self._stop()
            raise

    def _receive(self, expected: str, seconds: float) -> list[tuple[dict[str, Any], dict[str, Array]]]:
        deadline = time.monotonic() + seconds
        return [instance.receive(deadline, expected) for instance in self._instances]

    def _stop(self) -> None:
        for instance in self._instances:
            instance.kill()
        self._instances = []
        with _ports_lock:
            _ports.difference_update(self._ports)
        self._ports = []

    def reset(self, seed: int | None) -> Any:
        """Reset every scene; another seed than the last one starts the builds anew."""
        if seed is not None and not (self._fresh and seed == self._seed):
            if self._editor:
                raise EnvError(f"{self._id}: the editor takes a seed when it connects; reset(seed=...) cannot give one")
            self.close()
            self._seed = seed
        self._fresh = False
        if not self._instances:
            self._start()
        return self._ask({"do": "reset"}, None)[0]

    def step(self, actions: Array) -> tuple[Any, Array, Array, Array]:
        """One step; see `Backend.step`."""
        return self._ask({"do": "step"}, actions)

    def _ask(self, request: dict[str, Any], actions: Array | None) -> tuple[Any, Array, Array, Array]:
        try:
            for i, instance in enumerate(self._instances):
                instance.send(request, **({} if actions is None else {"action": actions[i]}))
            answers = self._receive("step", self._timeout)
            headers = [header for header, _ in answers]
            observation = {key: np.stack([arrays[str(j)] for _, arrays in answers]) for j, key in enumerate(self._keys)}
            self._check(observation)
        except BaseException:  # an answer that is still on its way would be taken for that to the next request
            self._stop()
            raise
        if not self._told and any(header["masked"] for header in headers):
            self._told = True
            warnings.warn(
                f"{self._id}: an action that the scene masks was asked for; the first allowed one takes its place",
                stacklevel=4,
            )
        reward, terminated, truncated = (
            np.array([header[key] for header in headers], dtype)
            for key, dtype in (("reward", np.float64), ("terminated", bool), ("truncated", bool))
        )
        return observation, reward, terminated, truncated

    def _check(self, observation: dict[str, Array]) -> None:
        for key in self._pictures:
            low, high = observation[key].min(), observation[key].max()
            if low < -0.01 or high > 1.01:
                raise EnvError(
                    f"{self._id}: {key} has numbers from {low:.4g} to {high:.4g}; an observation of three dimensions "
                    "is taken for a picture, with numbers from 0 to 1"
                )

    def close(self) -> None:
        """Have every build quit, and kill those that do not within seconds."""
        for instance in self._instances:
            instance.send({"do": "close"})
        deadline = time.monotonic() + CLOSE_SECONDS
        try:
            for instance in self._instances:
                instance.wait(deadline)
        finally:
            self._stop()


def find_build(name: str) -> str:
    """The executable file of a build, named with or without its ending, or by its macOS bundle.

    Raises:
        EnvError: if there is none, or it may not be run.
    """
    given = Path(name).expanduser()
    for path in (given, *(given.with_name(given.name + ending) for ending in (".x86_64", ".x86", ".app"))):
        if path.suffix == ".app" and path.is_dir():
            inside = sorted((path / "Contents" / "MacOS").glob("*"))
            path = inside[0] if inside else path
        if path.is_file():
            if not os.access(path, os.X_OK):
                raise EnvError(f"unity:{name}: {path} is not executable; chmod +x {path}")
            return str(path.absolute())
    near = [str(path) for path in given.parent.glob("*") if path.is_file() and os.access(path, os.X_OK)]
    raise EnvError(f"unity:{name}: there is no such build; expected an executable file{suggest(str(given), near)}")


def reserve_ports(number: int, base: int | None) -> list[int]:
    """Ports that nothing listens on, kept from this process's other builds: those from `base` on, or any from 5005.

    Raises:
        EnvError: if one of those from `base` on is in use, or all are.
    """
    with _ports_lock:
        if base is None:
            free = []
            for port in range(FIRST_PORT, 65536):
                if len(free) == number:
                    break
                if _is_free(port):
                    free.append(port)
            if len(free) < number:
                raise EnvError(f"no {number} ports from {FIRST_PORT} on are free")
        else:
            free = list(range(base, base + number))
            for port in free:
                if not _is_free(port):
                    raise EnvError(
                        f"port {port} is in use, perhaps by an environment that is still open; close it, or choose "
                        "another base_port"
                    )
        _ports.update(free)
        return free


def _is_free(port: int) -> bool:
    if port in _ports:
        return False
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # not held by connections that ended just now
        try:
            probe.bind(("localhost", port))
        except OSError:
            return False
    return True


def observation_space(specs: list[list[Any]]) -> tuple[list[str], spaces.Dict]:
    """Names of an agent's observations, in their order, and their space.

    Args:
        specs: sensor's name and shape of each.

    Raises:
        EnvError: if there is none.
    """
    if not specs:
        raise EnvError("the agent observes nothing; expected at least one sensor")
    vectors = sum(len(shape) != 3 for _, shape in specs)
    keys: list[str] = []
    boxes = {}
    for sensor, shape in specs:
        picture = len(shape) == 3
        name = re.sub(r"\W", "_", sensor, flags=re.ASCII) or ("image" if picture else "vector")
        if not picture and vectors == 1:
            name = "state"
        key, count = name, 1
        while key in boxes:
            count += 1
            key = f"{name}_{count}"
        keys.append(key)
        low, high = (0.0, 1.0) if picture else (-np.inf, np.inf)
        boxes[key] = spaces.Box(low, high, tuple(shape), np.float32)
    return keys, spaces.Dict(boxes)


def action_space(continuous: int, branches: list[int]) -> spaces.Space:
    """The space of an agent's actions.

    Args:
        continuous: how many numbers in [-1, 1].
        branches: how many choices each discrete branch has.

    Raises:
        EnvError: unless there is just one of the two kinds, and one branch at most.
    """
    if continuous and not branches:
        return spaces.Box(-1.0, 1.0, (continuous,), np.float32)
    if len(branches) == 1 and not continuous:
        return spaces.Discrete(branches[0])
    raise EnvError(
        f"the agent has {continuous} continuous actions and discrete branches of sizes {branches}; expected continuous "
        "actions alone, or one discrete branch alone"
    )


def make(
    name: str,
    num_envs: int,
    seed: int,
    action_repeat: int,
    time_limit: int | None,
    camera: int | str | None,
    options: dict[str, Any],
) -> UnityVector:
    """Environments by the path of a build, or "editor".

    Args:
        camera: must be None: what cameras show is the scene's business.
        options: the keyword arguments of `UnityVector`.

    Raises:
        EnvError, MissingDependency: as `UnityVector`; the former also for an unknown option.
    """
    if camera is not None:
        raise EnvError(f"camera is {camera!r}, but the cameras of a Unity scene are chosen in the scene")
    known = UnityVector.__init__.__kwdefaults__
    for option in options:
        if option not in known:
            raise EnvError(f"unity environments have no option {option!r}{suggest(option, known)}")
    return UnityVector(name, num_envs, seed, action_repeat, time_limit, **options)
