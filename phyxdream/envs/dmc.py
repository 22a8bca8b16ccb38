"""dm_control's suite (https://github.com/google-deepmind/dm_control), from its state or from pictures."""

from __future__ import annotations

import functools
import importlib.metadata
import warnings
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from phyxdream.envs import opengl
from phyxdream.envs.gym import GymVector, check_pictures
from phyxdream.envs.segmentation import Objects
from phyxdream.envs.spaces import SEGMENTATION
from phyxdream.errors import EnvError, MissingDependency, suggest

Array = NDArray[Any]

WORKING = "pip install 'dm_control>=1.0.30,<1.0.50' 'mujoco>=3.2,<3.12' (tested: dm_control 1.0.44 with mujoco 3.11.0)"
# As DreamerV3 looks at the suite: the first camera, but the third for the quadruped.
CAMERA, QUADRUPED_CAMERA = 0, 2


def import_suite() -> Any:
    """`dm_control.suite`, with OpenGL chosen before it.

    Raises:
        MissingDependency: if dm_control is missing, or its mujoco is one it does not work with.
    """
    opengl.choose_mujoco_gl(required=False)
    try:
        from dm_control import suite
    except Exception as error:  # beside a foreign mujoco, importing fails in many ways
        raise MissingDependency(
            f"dmc environments need dm_control and a mujoco that fits: {WORKING} ({error})"
        ) from error
    return suite


def list_ids() -> list[str]:
    """All "<domain>_<task>" of the suite."""
    return [f"{domain}_{task}" for domain, task in import_suite().ALL_TASKS]


class DMControl(gymnasium.Env):
    """One task of the suite as a gymnasium environment.

    A simulation that diverges ends its episode: truncated, reward 0, the last sound observation once more, a warning.

    Args:
        domain: such as "walker".
        task: such as "walk".
        picture: (height, width, camera) to observe only that picture; None to observe the state.
        options: for `suite.load`: `task_kwargs`, `environment_kwargs`.
        segmentation: observe a dict of that picture, `image`, and of the mask of its objects.
    """

    def __init__(
        self,
        domain: str,
        task: str,
        picture: tuple[int, int, int | str] | None,
        options: dict[str, Any],
        segmentation: bool = False,
    ):
        suite = import_suite()
        self._picture, self._segmentation = picture, segmentation
        self._env = suite.load(domain, task, **options)
        self._last: Any = None
        spec = self._env.action_spec()
        self.action_space = spaces.Box(
            np.broadcast_to(spec.minimum, spec.shape).astype(spec.dtype),
            np.broadcast_to(spec.maximum, spec.shape).astype(spec.dtype),
            dtype=spec.dtype.type,
        )
        if picture:
            try:
                self._observe({})  # a camera or driver that fails shall do so now
            except BaseException:
                self.close()
                raise
            self.observation_space: spaces.Space = spaces.Box(0, 255, (*picture[:2], 3), np.uint8)
            if segmentation:
                most = len(Objects(self._env.physics.model).names)
                mask = spaces.Box(0, most, picture[:2], np.int32)
                self.observation_space = spaces.Dict({"image": self.observation_space, SEGMENTATION: mask})
        else:
            self.observation_space = spaces.Dict(
                {k: spaces.Box(-np.inf, np.inf, v.shape, np.float64) for k, v in self._env.observation_spec().items()}
            )

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Start an episode; a seed replaces the task's random numbers."""
        super().reset(seed=seed)
        if seed is not None:
            self._env.task._random = np.random.RandomState(seed)
        self._last = self._observe(self._env.reset().observation)
        return self._last, {}

    def step(self, action: Array) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """One control step; an end with discount 0 is a termination, any other a truncation."""
        from dm_control.rl.control import PhysicsError

        try:
            step = self._env.step(action)
        except PhysicsError as error:
            warnings.warn(f"dm_control: the simulation diverged ({error}); the episode ends here", stacklevel=2)
            return self._last, 0.0, False, True, {}
        self._last = self._observe(step.observation)
        ended = step.last()
        terminated = ended and step.discount == 0
        return self._last, float(step.reward or 0.0), terminated, ended and not terminated, {}

    def _observe(self, state: dict[str, Array]) -> Any:
        if self._picture is None:
            return {key: np.asarray(value, np.float64) for key, value in state.items()}
        height, width, camera = self._picture
        physics = self._env.physics
        image = physics.render(height=height, width=width, camera_id=camera)
        if not self._segmentation:
            return image
        drawn = physics.render(height=height, width=width, camera_id=camera, segmentation=True)  # (H, W, 2)
        # Some tasks build a new model for every episode.
        return {"image": image, SEGMENTATION: Objects(physics.model)(drawn[..., 0], drawn[..., 1])}

    def close(self) -> None:
        """Free the renderer, now: dm_control would leave it to the garbage collector, which may then free what has the
        same numbers in the OpenGL context of another environment."""
        self._env.physics.free()


def make(
    id: str,
    num_envs: int,
    action_repeat: int,
    time_limit: int | None,
    image_size: tuple[int, int] | None,
    pixels: bool | None,
    camera: int | str | None,
    options: dict[str, Any],
) -> GymVector:
    """Environments by "<domain>_<task>", such as "walker_walk".

    Args:
        pixels: pictures instead of the state.
        camera: number or name of the camera.
        options: "vectorization" ("sync" or "async"); "segmentation": a mask beside the picture; the others go to
            `dm_control.suite.load`.

    Raises:
        EnvError: unknown task.
        MissingDependency: dm_control, a mujoco that fits it, or a system library is missing.
    """
    if pixels:
        opengl.choose_mujoco_gl(required=True)
    tasks = {f"{domain}_{task}": (domain, task) for domain, task in import_suite().ALL_TASKS}
    if id not in tasks:
        raise EnvError(f"dm_control's suite has no task {id!r}{suggest(id, tasks)}")
    options = dict(options)
    vectorization, segmentation = options.pop("vectorization", "sync"), options.pop("segmentation", False)
    check_pictures(pixels, camera, segmentation)
    domain, task = tasks[id]
    if camera is None:
        camera = QUADRUPED_CAMERA if domain == "quadruped" else CAMERA
    picture = (*(image_size or (64, 64)), camera) if pixels else None
    one = functools.partial(DMControl, domain, task, picture, options, segmentation)
    try:
        return GymVector(one, num_envs, action_repeat, time_limit, None, vectorization)
    except AttributeError as error:
        raise MissingDependency(version_trap("dm_control", error, WORKING)) from error
    except (TypeError, ValueError) as error:
        raise EnvError(f"dmc:{id} could not be made: {error}") from error


def version_trap(package: str, error: Exception, working: str) -> str:
    """The sentence for a `package` that fails beside the installed mujoco, with the versions that are `working`."""
    versions = {name: importlib.metadata.version(name) for name in (package, "mujoco")}
    return (
        f"{package} {versions[package]} does not work with mujoco {versions['mujoco']} ({error!r}); versions that "
        f"work together: {working}"
    )
