"""Gymnasium environments, one object each, stepped by gymnasium's own vectorisation; also carries dmc and robotics."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
from gymnasium import vector
from gymnasium.wrappers import AddRenderObservation, TimeLimit
from numpy.typing import NDArray

from phyxdream.envs import opengl, sprites
from phyxdream.envs.segmentation import ObserveSegmentation
from phyxdream.errors import EnvError, MissingDependency, suggest

Array = NDArray[Any]
Size = tuple[int, int]

sprites.register()


def list_ids() -> list[str]:
    """Ids registered with gymnasium, those of gymnasium-robotics left out."""
    return [id for id in gymnasium.registry if not is_robotics(id)]


def is_robotics(id: str) -> bool:
    """True if gymnasium-robotics registered this id."""
    return str(gymnasium.registry[id].entry_point).startswith("gymnasium_robotics")


class ActionRepeat(gymnasium.Wrapper):
    """Apply every action `times` times, summing rewards; stops where the episode ends."""

    def __init__(self, env: gymnasium.Env, times: int):
        super().__init__(env)
        self._times = times

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """As `gymnasium.Env.step`, with the last observation and info and the sum of the rewards."""
        total = 0.0
        for _ in range(self._times):
            observation, reward, terminated, truncated, info = self.env.step(action)
            total += float(reward)
            if terminated or truncated:
                break
        return observation, total, terminated, truncated, info


class OwnContext(gymnasium.Wrapper):
    """Render a MuJoCo task in its own OpenGL context, and free there what was drawn with.

    The viewer takes its context for current whoever rendered last, and leaves the freeing to the garbage collector,
    which then frees what has the same numbers in the context of another environment: pictures turn black as soon as an
    evaluation is over.
    """

    _freed = False

    def render(self) -> Any:
        """As `gymnasium.Env.render`."""
        if (viewer := self._viewer) is not None:  # None: it is made now, with its context
            viewer.make_context_current()
        return self.env.render()

    def close(self) -> None:
        """As `gymnasium.Env.close`."""
        if (viewer := self._viewer) is not None and not self._freed:
            self._freed = True
            viewer.make_context_current()
            viewer.con.free()
        self.env.close()

    @property
    def _viewer(self) -> Any:
        return self.env.unwrapped.mujoco_renderer.viewer  # type: ignore[attr-defined]


class GymVector:
    """Environments of the gymnasium kind behind `SyncVectorEnv` or `AsyncVectorEnv`.

    Args:
        make: makes one environment; called `num_envs` times (in the workers, for "async").
        num_envs: how many environments.
        action_repeat: every action is applied that many times; stops where an episode ends.
        time_limit: steps of the environment after which an episode is truncated, or None.
        finish: wraps each environment last, after action repeat and time limit: a place for what is slow.
        vectorization: "sync" (one after the other) or "async" (a process each).
    """

    def __init__(
        self,
        make: Callable[[], gymnasium.Env],
        num_envs: int,
        action_repeat: int = 1,
        time_limit: int | None = None,
        finish: Callable[[gymnasium.Env], gymnasium.Env] | None = None,
        vectorization: str = "sync",
    ):
        if vectorization not in ("sync", "async"):
            raise EnvError(f"vectorization is {vectorization!r}; expected 'sync' or 'async'")
        one = functools.partial(_assemble, make, action_repeat, time_limit, finish)
        # gymnasium 1.0 knows NEXT_STEP only, and has no such argument.
        mode = {"autoreset_mode": vector.AutoresetMode.NEXT_STEP} if hasattr(vector, "AutoresetMode") else {}
        if vectorization == "sync":
            self._envs: vector.VectorEnv = vector.SyncVectorEnv([one] * num_envs, **mode)
        else:
            # A fork of a process that runs torch's threads can hang.
            self._envs = vector.AsyncVectorEnv([one] * num_envs, context="forkserver", **mode)
        self.num_envs = num_envs
        self.observation_space = self._envs.single_observation_space
        self.action_space = self._envs.single_action_space
        self._starting = np.zeros(num_envs, bool)

    def reset(self, seed: int | None) -> Any:
        """Start all episodes; environment i is seeded with `seed + i`."""
        self._starting = np.zeros(self.num_envs, bool)
        return self._envs.reset(seed=seed)[0]

    def step(self, actions: Array) -> tuple[Any, Array, Array, Array]:
        """One step; see `Backend.step`."""
        observation, reward, terminated, truncated, _ = self._envs.step(actions)
        reward = np.where(self._starting, 0.0, reward)
        self._starting = terminated | truncated
        return observation, reward, terminated, truncated

    def close(self) -> None:
        """Close every environment."""
        self._envs.close()


def _assemble(
    make: Callable[[], gymnasium.Env],
    action_repeat: int,
    time_limit: int | None,
    finish: Callable[[gymnasium.Env], gymnasium.Env] | None,
) -> gymnasium.Env:
    env = make()
    if time_limit is not None:
        env = TimeLimit(env, time_limit)
    if action_repeat > 1:
        env = ActionRepeat(env, action_repeat)
    return finish(env) if finish else env


def make(
    id: str,
    num_envs: int,
    action_repeat: int,
    time_limit: int | None,
    image_size: Size | None,
    pixels: bool | None,
    camera: int | str | None,
    options: dict[str, Any],
) -> GymVector:
    """Environments by their gymnasium id ("Pendulum-v1", or "module:Id-v0" to import a module first).

    Args:
        pixels: rendered pictures instead of the state. An environment that observes pictures anyway is left alone.
        camera: number or name of the camera of a MuJoCo task.
        options: "vectorization" ("sync" or "async"); "segmentation": a mask beside the picture; the others go to
            `gymnasium.make`.

    Raises:
        EnvError: unknown id or option.
        MissingDependency: a package or system library the environment needs is missing.
    """
    options = dict(options)
    vectorization = options.pop("vectorization", "sync")
    module, _, name = id.rpartition(":")
    try:
        if module:
            importlib.import_module(module)
        spec = gymnasium.spec(name)
    except (gymnasium.error.Error, ImportError) as error:
        raise EnvError(f"gymnasium has no environment {id!r}{suggest(id, list_ids())} ({error})") from None
    finish = None
    ours = str(spec.entry_point).startswith("phyxdream.")
    if ours and image_size and image_size[0] == image_size[1]:
        options = {"size": image_size[0], **options}  # drawn as asked for, instead of resized
    segmentation = not ours and options.pop("segmentation", False)
    if segmentation and not (pixels and "mujoco" in str(spec.entry_point)):
        raise EnvError(f"segmentation is {segmentation!r}, but gym:{id} draws no picture with MuJoCo (pixels=True)")
    if pixels and not ours:
        options = rendering(str(spec.entry_point), image_size, camera, options)
        finish = functools.partial(observe_picture, camera, False, segmentation)
    elif camera is not None:
        raise EnvError(f"camera is {camera!r}, but only pictures (pixels=True) have a camera")
    one = functools.partial(gymnasium.make, id, disable_env_checker=True, **options)
    with sentences(f"gym:{id}"):
        return GymVector(one, num_envs, action_repeat, time_limit, finish, vectorization)


def rendering(entry_point: str, image_size: Size | None, camera: int | str | None, options: dict[str, Any]) -> Any:
    """The `gymnasium.make` options for off-screen pictures, with OpenGL chosen for MuJoCo tasks."""
    options = {"render_mode": "rgb_array", **options}
    if "mujoco" in entry_point or entry_point.startswith("gymnasium_robotics"):
        opengl.choose_mujoco_gl(required=True)
        height, width = image_size or (64, 64)
        options = {"width": width, "height": height, **options}
    elif camera is not None:
        raise EnvError(f"camera is {camera!r}, but only MuJoCo tasks have cameras")
    return options


def check_pictures(pixels: bool | None, camera: int | str | None, segmentation: bool) -> None:
    """Raise EnvError for what only pictures have, where none are asked for."""
    for name, value, what in (("camera", camera, "camera"), ("segmentation", segmentation or None, "mask")):
        if value is not None and not pixels:
            raise EnvError(f"{name} is {value!r}, but only pictures (pixels=True) have a {what}")


def observe_picture(
    camera: int | str | None, keep_state: bool, segmentation: bool, env: gymnasium.Env
) -> gymnasium.Env:
    """Observe what is rendered, alone or beside the state, and for MuJoCo also with the mask of the objects; an
    environment that observes pictures is left alone.

    Raises:
        EnvError: if the MuJoCo model has no such camera (rendering through it would end the process).
    """
    model = getattr(env.unwrapped, "model", None)
    if hasattr(env.unwrapped, "mujoco_renderer"):
        env = OwnContext(env)
    if hasattr(model, "ncam"):
        import mujoco

        names = [mujoco.mj_id2name(model, mujoco.mjtObj.mjOBJ_CAMERA, i) for i in range(model.ncam)]
        if camera is None and "track" in names:  # the free camera loses sight of what runs away
            camera = "track"
        if camera not in (None, *names, *range(-1, model.ncam)):
            raise EnvError(f"camera is {camera!r}; expected a number from -1 to {model.ncam - 1} or a name of {names}")
        if camera is not None:
            number = names.index(camera) if isinstance(camera, str) else camera
            env.unwrapped.mujoco_renderer.camera_id = number  # type: ignore[attr-defined]
    space = env.observation_space
    if isinstance(space, gymnasium.spaces.Box) and space.dtype == np.uint8 and len(space.shape) == 3:
        return env
    env = AddRenderObservation(env, render_only=not keep_state, render_key="image")
    return ObserveSegmentation(env) if segmentation else env


class sentences:
    """Context manager: what stops an environment from being made becomes one sentence that begins with its name."""

    def __init__(self, name: str):
        self._name = name

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, (gymnasium.error.DependencyNotInstalled, ImportError)):
            if not isinstance(error, MissingDependency):
                raise MissingDependency(f"{self._name}: {error}") from error
        elif isinstance(error, (gymnasium.error.Error, TypeError)):
            raise EnvError(f"{self._name} could not be made: {error}") from error
