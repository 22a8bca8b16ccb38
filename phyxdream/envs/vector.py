"""The one vectorised environment that training meets, whatever the backend."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from gymnasium import spaces, vector
from numpy.typing import NDArray

from phyxdream.envs.spaces import SEGMENTATION, ActionMap, ObservationMap
from phyxdream.errors import EnvError

Array = NDArray[Any]


class Backend(Protocol):
    """What a backend brings: N environments in lockstep that start a new episode one step after the last ended.

    `step` returns the final observation with the `terminated` or `truncated` flag; the following `step` ignores that
    environment's action and returns the first observation of its next episode.
    """

    num_envs: int
    observation_space: spaces.Space
    action_space: spaces.Space

    def reset(self, seed: int | None) -> Any:
        """Start all episodes; `seed=None` goes on with the random numbers as they stand."""

    def step(self, actions: Array) -> tuple[Any, Array, Array, Array]:
        """Observations, rewards, terminated and truncated, each batched over environments."""

    def close(self) -> None:
        """Let go of threads, processes and windows."""


class VectorEnv(vector.VectorEnv):
    """N environments as a `gymnasium.vector.VectorEnv` with dict observations, ready for the replay buffer.

    - Observations are dicts of uint8 pictures (N, C, H, W) and float32 vectors (N, size), new arrays every time.
    - Actions are (N,) integers, or (N, A) floats in [-1, 1] (clipped, then rescaled to the backend's bounds).
    - Autoreset is NEXT_STEP: the final observation comes with the flags; the next step ignores that environment's
      action and brings the first frame of its next episode, with reward 0.
    - `info` of `reset` and `step` holds bool arrays (N,): `is_first` (a first frame), `is_last` (the episode ended,
      by termination or by a time limit) and `is_terminal` (it ended because the task says so, not the clock). With
      `segmentation` also that: int32 (N, H, W), which object every pixel of the picture shows.

    Args:
        backend: the environments.
        id: the full name, for messages.
        seed: seeds the first `reset` that is not given another seed.
        image_size: (height, width) that pictures are resized to, or None.
        segmentation: the backend's observation is a dict with an entry of that name, integers (H, W), that belongs
            into `info`.

    Raises:
        EnvError: when a space cannot be handled; from `step` also on wrong actions, and when an environment brings a
            reward or an observation that is not finite (after which it must be reset).
    """

    metadata: dict[str, Any] = {}  # noqa: RUF012  (gymnasium's own name and type)

    def __init__(
        self,
        backend: Backend,
        id: str,
        seed: int,
        image_size: tuple[int, int] | None = None,
        segmentation: bool = False,
    ):
        self.id = id
        self.num_envs = backend.num_envs
        self.metadata = {"autoreset_mode": _next_step_mode()}
        self._backend = backend
        self._seed: int | None = seed
        self._steps = 0
        self._last: Array | None = None  # which environments ended at the previous step; None: reset first
        space = backend.observation_space
        if segmentation:
            space = spaces.Dict({key: value for key, value in space.items() if key != SEGMENTATION})
        try:
            self._observe = ObservationMap(space, image_size)
            self._act = ActionMap(backend.action_space)
        except EnvError as error:
            raise EnvError(f"{id}: {error}") from None
        self.has_picture = self._observe.has_picture
        self.single_observation_space = self._observe.space
        self.single_action_space = self._act.space
        pictures = [space.shape[1:] for space in self.single_observation_space.values() if len(space.shape) == 3]
        self._mask_size = pictures[0] if segmentation else None
        self.observation_space = vector.utils.batch_space(self.single_observation_space, self.num_envs)
        self.action_space = vector.utils.batch_space(self.single_action_space, self.num_envs)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Array], dict[str, Any]]:
        """Start a new episode everywhere.

        Args:
            seed: reseeds all environments; None takes the constructor's seed the first time, and afterwards goes on
                with the random numbers as they stand.
            options: not supported by the backends alike, so must be empty.
        """
        self._check_open()
        if options:
            raise EnvError(f"{self.id}: reset options {options!r} are not supported; expected None")
        if seed is not None:
            check_seed(seed)
        seed, self._seed = (self._seed if seed is None else seed), None
        self._last = None
        self._steps = 0
        raw = self._backend.reset(seed)
        observation = self._observe(raw)
        self._check_finite(observation, np.zeros(self.num_envs, np.float32))
        self._last = np.zeros(self.num_envs, bool)
        none = np.zeros(self.num_envs, bool)
        info = {"is_first": ~none, "is_last": none, "is_terminal": none.copy(), **self._masks(raw)}
        return observation, info

    def step(self, actions: Any) -> tuple[dict[str, Array], Array, Array, Array, dict[str, Any]]:
        """Advance every environment by one step (of `action_repeat` steps of its own).

        Args:
            actions: (N,) integers or (N, A) floats.

        Returns:
            Observation dict, reward (N,) float32, terminated (N,) bool, truncated (N,) bool, info.
        """
        self._check_open()
        if self._last is None:
            raise EnvError(f"{self.id}: reset() must come before step()")
        try:
            actions = self._act(actions, self.num_envs)
        except EnvError as error:
            raise EnvError(f"{self.id}: {error}") from None
        is_first, self._last = self._last, None
        self._steps += 1
        raw, reward, terminated, truncated = self._backend.step(actions)
        observation = self._observe(raw)
        with np.errstate(over="ignore"):  # what overflows float32 is reported as non-finite
            reward = np.array(reward, np.float32)
        self._check_finite(observation, reward)
        terminated, truncated = np.array(terminated, bool), np.array(truncated, bool) & ~np.asarray(terminated, bool)
        self._last = terminated | truncated
        info = {"is_first": is_first, "is_last": self._last.copy(), "is_terminal": terminated.copy()}
        info |= self._masks(raw)
        return observation, reward, terminated, truncated, info

    def close_extras(self, **kwargs: Any) -> None:
        """Close the backend; `close` calls this once."""
        self._backend.close()

    def _masks(self, raw: Any) -> dict[str, Array]:
        if self._mask_size is None:
            return {}
        mask = np.array(raw[SEGMENTATION], np.int32)
        if mask.shape[1:] != self._mask_size:  # where the picture was resized: numbers cannot be averaged
            sizes = zip(mask.shape[1:], self._mask_size, strict=True)
            row, column = ((2 * np.arange(new) + 1) * old // (2 * new) for old, new in sizes)
            mask = mask[:, row[:, None], column]
        return {SEGMENTATION: mask}

    def _check_open(self) -> None:
        if self.closed:
            raise EnvError(f"{self.id} is closed")

    def _check_finite(self, observation: dict[str, Array], reward: Array) -> None:
        for key, value in (*observation.items(), ("reward", reward)):
            if value.dtype != np.uint8 and not np.isfinite(value).all():
                flat = value.reshape(self.num_envs, -1)
                env = int(np.isfinite(flat).all(1).argmin())
                bad = flat[env][~np.isfinite(flat[env])][0]
                raise EnvError(f"{self.id}: {key} of env {env} is {bad} at step {self._steps} since the reset")

    def __repr__(self) -> str:
        return f"<VectorEnv {self.id} num_envs={self.num_envs}>"


def check_seed(seed: Any) -> None:
    """Raise `EnvError` unless `seed` is an integer that every backend takes."""
    if not isinstance(seed, (int, np.integer)) or isinstance(seed, bool) or not 0 <= seed < 2**31 - 2**16:
        raise EnvError(f"seed is {seed!r}; expected an integer from 0 to {2**31 - 2**16 - 1}")


def _next_step_mode() -> Any:
    mode = getattr(vector, "AutoresetMode", None)  # since gymnasium 1.1
    return mode.NEXT_STEP if mode else "next_step"
