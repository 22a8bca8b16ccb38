"""Vectorised environments of several backends behind one face.

>>> from phyxdream import envs
>>> env = envs.make("gym:Pendulum-v1", num_envs=2, seed=0)
>>> observation, info = env.reset()
>>> {key: value.shape for key, value in observation.items()}
{'state': (2, 3)}
>>> observation, reward, terminated, truncated, info = env.step(env.action_space.sample())
>>> sorted(info)
['is_first', 'is_last', 'is_terminal']
>>> env.close()
"""

from __future__ import annotations

from typing import Any

import numpy as np

from phyxdream.envs import opengl
from phyxdream.envs.vector import VectorEnv, check_seed
from phyxdream.errors import EnvError, MissingDependency, suggest

__all__ = ["PREFIXES", "VectorEnv", "backend_id", "list_ids", "make"]

# Here, so that whoever imports envpool after us can render with it.
opengl.preload()

# id prefix -> the configuration's name of the backend
PREFIXES = {"envpool": "envpool", "gym": "gym", "dmc": "dmc", "robotics": "robotics", "unity": "unity_mlagents"}


def make(
    id: str,
    num_envs: int = 8,
    seed: int = 0,
    *,
    action_repeat: int = 1,
    time_limit: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    pixels: bool | None = None,
    camera: int | str | None = None,
    segmentation: bool = False,
    **backend_kwargs: Any,
) -> VectorEnv:
    """Make `num_envs` environments of one kind.

    Args:
        id: `envpool:<id>`, `gym:<id>`, `dmc:<domain>_<task>`, `robotics:<id>`, `unity:<path of a build>` or
            `unity:editor`.
        num_envs: how many run in lockstep.
        seed: the same seed and the same actions give the same observations.
        action_repeat: every action is applied that many times and the rewards are summed, up to the episode's end.
            Atari of envpool already skips 4 frames by itself (option `frame_skip`).
        time_limit: truncate an episode after that many steps of the environment itself, repeats counted one by one,
            so that it means the same at any `action_repeat`. A limit of the environment's own stays.
        image_size: side, or (height, width), of every picture.
        pixels: True: observe rendered pictures (64x64 if `image_size` is None) instead of the state (`robotics`:
            beside the state). False: insist on no pictures. None: what the environment does by itself.
        camera: which camera `pixels` looks through.
        segmentation: also tell which object every pixel shows, for `phyxdream/Sprites-v0` and for MuJoCo tasks of
            `gym`, `dmc` and `robotics` with `pixels`: `info["segmentation"]`, int32 (N, H, W), 0 for the background.
            It is no observation: whoever compares a model's slots with it asks for it, and agents never see it.
        backend_kwargs: options of the backend: for `envpool` those of the task and `num_threads`; for `unity`
            `behavior`, `base_port`, `time_scale`, `no_graphics`, `timeout` and `args` (see `envs.unity.UnityVector`);
            for the others `vectorization` ("sync", or "async" for a process each) and what the environment's
            constructor takes.

    Returns:
        A `VectorEnv`, not yet reset.

    Raises:
        EnvError: unknown id (with the nearest known ones), an argument out of range, or spaces that cannot be handled.
        MissingDependency: a package or a system library that is missing; the message says how to get it.
    """
    prefix, name = _split(id)
    num_envs = _positive("num_envs", num_envs)
    action_repeat = _positive("action_repeat", action_repeat)
    time_limit = None if time_limit is None else _positive("time_limit", time_limit)
    check_seed(seed)
    size = _size(image_size)
    arguments = (action_repeat, time_limit, size, pixels, camera, backend_kwargs)
    if segmentation and prefix not in ("gym", "dmc", "robotics"):
        raise EnvError(f"segmentation is {segmentation!r}, but {prefix} environments cannot tell objects apart")
    if segmentation:
        backend_kwargs["segmentation"] = True
    # Backends are imported where they are asked for, so that a missing one bothers nobody else.
    if prefix == "envpool":
        from phyxdream.envs.envpool import EnvPool

        backend: Any = EnvPool(name, num_envs, seed, *arguments)
    elif prefix == "gym":
        from phyxdream.envs import gym

        backend = gym.make(name, num_envs, *arguments)
    elif prefix == "dmc":
        from phyxdream.envs import dmc

        backend = dmc.make(name, num_envs, *arguments)
    elif prefix == "robotics":
        from phyxdream.envs import robotics

        backend = robotics.make(name, num_envs, *arguments)
    else:
        from phyxdream.envs import unity

        backend = unity.make(name, num_envs, seed, action_repeat, time_limit, camera, backend_kwargs)
    try:
        env = VectorEnv(backend, id, seed, size, segmentation)
        if pixels is not None and pixels != env.has_picture:
            keys = {key: space.shape for key, space in env.single_observation_space.items()}
            raise EnvError(f"pixels is {pixels}, but {id} observes {keys}")
    except BaseException:
        backend.close()
        raise
    return env


def backend_id(env_backend: str, env: str) -> str:
    """The full id for a backend's name and an environment's: `("gym", "Pendulum-v1")` -> `"gym:Pendulum-v1"`.

    An `env` that has the right prefix already is returned as it is.

    Args:
        env_backend: "envpool", "gym", "dmc", "robotics" or "unity_mlagents".
        env: the environment's name in that backend.

    Raises:
        EnvError: for an unknown backend, or an `env` with the prefix of another one.
    """
    prefixes = {backend: prefix for prefix, backend in PREFIXES.items()}
    if env_backend not in prefixes:
        raise EnvError(
            f"env_backend is {env_backend!r}; expected one of {', '.join(prefixes)}{suggest(env_backend, prefixes)}"
        )
    given, colon, _ = env.partition(":")
    if colon and given in PREFIXES:
        if PREFIXES[given] != env_backend:
            raise EnvError(f"env is {env!r}, but env_backend is {env_backend!r}; expected them to agree")
        return env
    return f"{prefixes[env_backend]}:{env}"


def list_ids(backend: str) -> list[str]:
    """Full ids that `make` takes, of one backend ("envpool", "gym", "dmc" or "robotics").

    Raises:
        EnvError: for an unknown backend, and for Unity ML-Agents, whose environments are files.
        MissingDependency: if the backend is not installed.
    """
    if backend == "envpool":
        from phyxdream.envs.envpool import list_ids as names
    elif backend == "gym":
        from phyxdream.envs.gym import list_ids as names
    elif backend == "dmc":
        from phyxdream.envs.dmc import list_ids as names
    elif backend == "robotics":
        from phyxdream.envs.robotics import list_ids as names
    else:
        raise EnvError(f"backend is {backend!r}; expected 'envpool', 'gym', 'dmc' or 'robotics'")
    return [f"{backend}:{name}" for name in names()]


def _split(id: Any) -> tuple[str, str]:
    if not isinstance(id, str):
        raise EnvError(f"id is {id!r}; expected text such as 'envpool:Catch-v0'")
    prefix, _, name = id.partition(":")
    if prefix in PREFIXES and name:
        return prefix, name
    known: list[str] = []
    for backend in ("envpool", "gym"):
        try:
            known += list_ids(backend)
        except MissingDependency:
            continue
    bare = name or prefix
    near = [full for full in known if full.partition(":")[2].lower() == bare.lower()]
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else suggest(id, known)
    raise EnvError(
        f"the environment id {id!r} has no known prefix; expected {', '.join(p + ':' for p in PREFIXES)}{hint}"
    )


def _positive(name: str, value: Any) -> int:
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < 1:
        raise EnvError(f"{name} is {value!r}; expected an integer of at least 1")
    return int(value)


def _size(value: Any) -> tuple[int, int] | None:
    if value is None:
        return None
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2:
        raise EnvError(f"image_size is {value!r}; expected one integer or (height, width)")
    return _positive("image_size", pair[0]), _positive("image_size", pair[1])
