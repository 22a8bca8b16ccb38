"""gymnasium-robotics (Shadow hand, Fetch ...): dict observations, with a picture beside the state if wanted."""

from __future__ import annotations

import functools
from typing import Any

import gymnasium

from phyxdream.envs import gym, opengl
from phyxdream.envs.dmc import version_trap
from phyxdream.errors import EnvError, MissingDependency, suggest

WORKING = "pip install 'gymnasium-robotics>=1.4' 'mujoco>=3.2,<3.12' (tested: 1.4.2 with mujoco 3.11.0)"


def register() -> None:
    """Have gymnasium know the ids.

    Raises:
        MissingDependency: if gymnasium-robotics is missing.
    """
    opengl.choose_mujoco_gl(required=False)
    try:
        import gymnasium_robotics
    except ImportError as error:
        raise MissingDependency(f"robotics environments need: {WORKING} ({error})") from error
    gymnasium.register_envs(gymnasium_robotics)


def list_ids() -> list[str]:
    """All ids that gymnasium-robotics registers."""
    register()
    return [id for id in gymnasium.registry if gym.is_robotics(id)]


def make(
    id: str,
    num_envs: int,
    action_repeat: int,
    time_limit: int | None,
    image_size: tuple[int, int] | None,
    pixels: bool | None,
    camera: int | str | None,
    options: dict[str, Any],
) -> gym.GymVector:
    """Environments by their id, such as "HandManipulateBlockRotateZDense-v1".

    Args:
        pixels: a picture "image" beside the state.
        camera: number or name of the camera.
        options: "vectorization" ("sync" or "async"); "segmentation": a mask beside the picture; the others go to
            `gymnasium.make`.

    Raises:
        EnvError: unknown id or option.
        MissingDependency: gymnasium-robotics, a mujoco that fits it, or a system library is missing.
    """
    known = list_ids()
    if id not in known:
        raise EnvError(f"gymnasium-robotics has no environment {id!r}{suggest(id, known)}")
    options = dict(options)
    vectorization = options.pop("vectorization", "sync")
    finish, segmentation = None, options.pop("segmentation", False)
    gym.check_pictures(pixels, camera, segmentation)
    if pixels:
        options = gym.rendering("gymnasium_robotics", image_size, camera, options)
        finish = functools.partial(gym.observe_picture, camera, True, segmentation)
    one = functools.partial(gymnasium.make, id, disable_env_checker=True, **options)
    try:
        with gym.sentences(f"robotics:{id}"):
            return gym.GymVector(one, num_envs, action_repeat, time_limit, finish, vectorization)
    except AssertionError as error:  # the bare one of the Shadow hand beside mujoco 3.12
        raise MissingDependency(version_trap("gymnasium-robotics", error, WORKING)) from error
