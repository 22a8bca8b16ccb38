"""envpool: C++ environments stepped by a thread pool (https://github.com/sail-sg/envpool)."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from phyxdream.envs import opengl
from phyxdream.envs.spaces import flatten
from phyxdream.errors import EnvError, MissingDependency, suggest

Array = NDArray[Any]

# Atari as in DreamerV3's Atari-100k configuration (its configs.yaml): RGB at 64x64, frames skipped 4 at a time, up to
# 30 random no-ops at the start, no sticky actions, only the actions that the game uses, no automatic FIRE, and lives
# do not end the episode. The 200M-frame setting is repeat_action_probability=0.25, full_action_space=True.
ATARI = {
    "img_height": 64,
    "img_width": 64,
    "gray_scale": False,
    "stack_num": 1,
    "frame_skip": 4,
    "noop_max": 30,
    "repeat_action_probability": 0.0,
    "full_action_space": False,
    "use_fire_reset": False,
    "episodic_life": False,
    "reward_clip": False,
}
# MiniGrid's picture holds numbers of objects (0-10), colours (0-5) and states (0-3), spread over the range of a byte.
MINIGRID_SCALE = np.array([25, 51, 85], np.uint8)
# Cameras for dm_control tasks as in DreamerV3's environment file; other tasks are seen by their free camera.
DMC_CAMERA, QUADRUPED_CAMERA = 0, 2


def import_envpool() -> Any:
    """The envpool module, with OpenGL in place before it.

    Raises:
        MissingDependency: if it is not installed (there is no wheel for Python 3.10).
    """
    opengl.preload()
    try:
        import envpool
    except ImportError as error:
        raise MissingDependency(
            f"envpool environments need the package envpool, for Python 3.11 or later on Linux x86-64: "
            f"pip install envpool ({error})"
        ) from error
    return envpool


def list_ids() -> list[str]:
    """All task ids of the installed envpool."""
    return list(import_envpool().list_all_envs())


def family(id: str) -> str:
    """Which family of envpool tasks an id belongs to: "atari", "procgen", "minigrid", "mujoco.dmc" ..."""
    from envpool.registration import registry

    return str(registry.specs[id][0]).removeprefix("envpool.")


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class EnvPool:
    """envpool in lockstep (batch_size = num_envs), so that a seed and the actions determine every observation.

    Args:
        id: task id without a prefix.
        num_envs: how many environments.
        seed: environment i is seeded from it and i.
        action_repeat: every action is applied that many times; stops where an episode ends.
        time_limit: steps of the environment after which an episode is truncated, or None.
        image_size: (height, width) to draw at, where the task can; or None.
        pixels: pictures instead of the state, for MuJoCo tasks.
        camera: number of the camera for `pixels`.
        options: envpool's own options of this task.

    Raises:
        EnvError: unknown id, option or camera, or several players.
        MissingDependency: envpool or a system library is missing.
    """

    def __init__(
        self,
        id: str,
        num_envs: int,
        seed: int,
        action_repeat: int,
        time_limit: int | None,
        image_size: tuple[int, int] | None,
        pixels: bool | None,
        camera: int | str | None,
        options: dict[str, Any],
    ):
        self._envpool = import_envpool()
        if id not in (known := list_ids()):
            raise EnvError(f"envpool has no task {id!r}{suggest(id, known)}")
        self._id, self.num_envs = id, num_envs
        self._family = family(id)
        self._repeat, self._limit = action_repeat, time_limit
        with self._sentences():
            self._check_options(options)
        # More threads than processors only take them from the learner.
        defaults: dict[str, Any] = {"num_threads": min(num_envs, _processors())}
        if self._family == "atari":
            defaults |= ATARI
            if image_size:
                defaults |= {"img_height": image_size[0], "img_width": image_size[1]}
        rendered = bool(pixels) and self._family.startswith("mujoco.")
        if camera is not None and not rendered:
            raise EnvError(f"camera is {camera!r}, but only pictures of MuJoCo tasks (pixels=True) have a camera")
        if rendered:
            defaults |= self._pixel_options(image_size or (64, 64), camera)
            if not opengl.has_gpu():  # Mesa's software renderer was seen to crash with contexts in several threads
                defaults["num_threads"] = 1
        self._options = {**defaults, **options, "num_envs": num_envs, "batch_size": num_envs}
        self._over = np.zeros(num_envs, bool)  # ended, and restarts by itself at the next step
        self._cut = np.zeros(num_envs, bool)  # ended by our time limit, and must be restarted
        self._elapsed = np.zeros(num_envs, np.int64)
        self._pool: Any = self._make(seed)
        self._fresh: int | None = seed
        space = self._pool.observation_space
        if self._family == "minigrid":  # the mission is a sentence; we have no eyes for it
            space = spaces.Dict({k: v for k, v in space.spaces.items() if k != "mission"})
        self.observation_space = space
        self.action_space = self._pool.action_space

    def _pixel_options(self, size: tuple[int, int], camera: int | str | None) -> dict[str, Any]:
        if camera is not None and not isinstance(camera, int):
            raise EnvError(f"camera is {camera!r}; envpool knows cameras by their number only")
        if camera is None and self._family == "mujoco.dmc":
            camera = QUADRUPED_CAMERA if self._id.startswith("Quadruped") else DMC_CAMERA
        camera = -1 if camera is None else camera
        opengl.rehearse_envpool(self._id, camera)
        return {
            "from_pixels": True,
            "render_height": size[0],
            "render_width": size[1],
            "render_camera_id": camera,
        }

    def _make(self, seed: int) -> Any:
        with self._sentences():
            pool = self._envpool.make_gymnasium(self._id, seed=seed, **self._options)
            pool.observation_space, pool.action_space  # noqa: B018  (made on first use, with the same warnings)
        if pool.config["max_num_players"] > 1:
            raise EnvError(f"envpool:{self._id} is a game of several players; expected one")
        return pool

    @contextlib.contextmanager
    def _sentences(self) -> Iterator[None]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # bounds that lose precision; they are not used
            try:
                yield
            except ImportError as error:
                if "Qt" not in str(error):
                    raise
                raise MissingDependency(
                    f"envpool:{self._id} (Procgen) needs the system's Qt 5 libraries, which were not found; "
                    "on Debian or Ubuntu: apt-get install libqt5core5a libqt5gui5"
                ) from error
            except EnvError:
                raise
            except (RuntimeError, ValueError, TypeError, AssertionError) as error:
                raise EnvError(f"envpool:{self._id} could not be made: {error}") from error

    def _check_options(self, options: dict[str, Any]) -> None:
        # Rendering is asked for by `pixels`, which sees to it that it works.
        known = set(self._envpool.make_spec(self._id).config._fields) - {"num_envs", "batch_size"}
        for name in options:
            if name not in known:
                raise EnvError(f"envpool:{self._id} has no option {name!r}{suggest(name, known)}")

    def reset(self, seed: int | None) -> Any:
        """Start all episodes. envpool is seeded when made, so a new seed makes it anew."""
        if seed is not None and seed != self._fresh:
            self._pool = None  # its threads end before the new ones start
            self._pool = self._make(seed)
        self._fresh = None
        self._over[:] = self._cut[:] = False
        self._elapsed[:] = 0
        return self._observation(self._pool.reset()[0])

    def step(self, actions: Array) -> tuple[Any, Array, Array, Array]:
        """One step; see `Backend.step`."""
        starting = self._over | self._cut
        if self._repeat == 1 and self._limit is None:
            raw, reward, terminated, truncated, _ = self._pool.step(actions)
            self._over = terminated | truncated
            return self._observation(raw), np.where(starting, 0.0, reward), terminated, truncated

        out: dict[tuple[str, ...], Array] = {}
        reward = np.zeros(self.num_envs)
        terminated, truncated = np.zeros(self.num_envs, bool), np.zeros(self.num_envs, bool)
        if self._cut.any():
            ids = np.flatnonzero(self._cut)
            self._store(out, ids, self._pool.reset(ids)[0])
        # Those that ended by themselves are restarted by this first step.
        alive = ~self._cut
        for _ in range(self._repeat):
            ids = np.flatnonzero(alive)
            if not len(ids):
                break
            raw, part_reward, part_terminated, part_truncated, _ = self._pool.step(actions[ids], ids)
            self._store(out, ids, raw)
            reward[ids] += part_reward
            terminated[ids], truncated[ids] = part_terminated, part_truncated
            alive &= ~(starting | terminated | truncated)
            self._elapsed[ids] += 1
            if self._limit is not None:
                alive &= self._elapsed < self._limit
        reward[starting] = 0.0
        self._elapsed[starting] = 0
        self._over = terminated | truncated
        self._cut = np.zeros(self.num_envs, bool)
        if self._limit is not None:
            self._cut = ~self._over & (self._elapsed >= self._limit)
        return self._nested(out), reward, terminated, truncated | self._cut

    def close(self) -> None:
        """Stop the threads, which end with the last reference to the pool."""
        self._pool = None

    def _observation(self, raw: Any) -> Any:
        if self._family == "minigrid":
            return {**raw, "image": raw["image"] * MINIGRID_SCALE}
        return raw

    def _store(self, out: dict[tuple[str, ...], Array], ids: Array, raw: Any) -> None:
        for path, value in flatten(self._observation(raw)):
            if path not in out:
                out[path] = np.empty((self.num_envs, *value.shape[1:]), value.dtype)
            out[path][ids] = value

    @staticmethod
    def _nested(flat: dict[tuple[str, ...], Array]) -> Any:
        if () in flat:
            return flat[()]
        tree: dict[str, Any] = {}
        for path, value in flat.items():
            node = tree
            for key in path[:-1]:
                node = node.setdefault(key, {})
            node[path[-1]] = value
        return tree
