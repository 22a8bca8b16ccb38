"""Which object every pixel of a MuJoCo picture shows, from MuJoCo's own segmentation rendering."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from phyxdream.envs.spaces import SEGMENTATION

Array = NDArray[Any]


class Objects:
    """Numbers the objects of a MuJoCo model: its kinematic trees, in the model's order, from 1.

    A hand is one object with all its fingers, what it holds another. The background, 0, is what belongs to the world
    itself, planes, and the sky. What is drawn transparent, such as the goal of the Shadow hand, hides what is behind
    it all the same.

    Args:
        model: mujoco's `MjModel`, or dm_control's wrapper of it.

    Attributes:
        names: of the trees' first bodies, so that `names[i - 1]` is object i.
    """

    def __init__(self, model: Any):
        import mujoco

        root = np.asarray(model.body_rootid)
        geom_body, site_body = np.asarray(model.geom_bodyid), np.asarray(model.site_bodyid)
        is_plane = np.asarray(model.geom_type) == mujoco.mjtGeom.mjGEOM_PLANE
        trees = np.setdiff1d(root[np.concatenate([geom_body[~is_plane], site_body])], [0])
        number = np.zeros(len(root), np.int32)
        number[trees] = np.arange(len(trees)) + 1
        self._of = {
            int(mujoco.mjtObj.mjOBJ_GEOM): np.where(is_plane, 0, number[root[geom_body]]),
            int(mujoco.mjtObj.mjOBJ_SITE): number[root[site_body]],
        }
        self.names = [_name(model, int(tree)) for tree in trees]

    def __call__(self, ids: Array, types: Array) -> Array:
        """Numbers (H, W) int32 of MuJoCo's object ids and types (H, W), -1 where nothing is."""
        mask = np.zeros(ids.shape, np.int32)
        for kind, numbers in self._of.items():
            here = types == kind
            mask[here] = numbers[ids[here]]
        return mask


def _name(model: Any, body: int) -> str:
    start = int(np.asarray(model.name_bodyadr)[body])
    names: bytes = model.names
    return names[start : names.index(b"\0", start)].decode()


class ObserveSegmentation(gymnasium.Wrapper):
    """Adds the mask of the last picture to the observation of a gymnasium MuJoCo task that observes one.

    Args:
        env: observes a picture, which becomes `image`, or a dict with one.
    """

    def __init__(self, env: gymnasium.Env):
        super().__init__(env)
        self._objects = Objects(env.unwrapped.model)  # type: ignore[attr-defined]
        inner = env.observation_space
        entries = dict(inner.spaces) if isinstance(inner, spaces.Dict) else {"image": inner}
        size = entries["image"].shape[:2]  # type: ignore[index]
        mask = spaces.Box(0, len(self._objects.names), size, np.int32)
        self.observation_space = spaces.Dict({**entries, SEGMENTATION: mask})

    def reset(self, **arguments: Any) -> tuple[Any, dict[str, Any]]:
        """As `gymnasium.Env.reset`."""
        observation, info = self.env.reset(**arguments)
        return self._with_mask(observation), info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """As `gymnasium.Env.step`."""
        observation, *rest = self.env.step(action)
        return self._with_mask(observation), *rest

    def _with_mask(self, observation: Any) -> Any:
        entries = observation if isinstance(observation, dict) else {"image": observation}
        return {**entries, SEGMENTATION: self._mask()}

    def _mask(self) -> Array:
        import mujoco

        # The scene is still that of the picture. (The viewer's own segmentation overflows beside NumPy 2.)
        viewer = self.env.unwrapped.mujoco_renderer.viewer  # type: ignore[attr-defined]
        scene, view = viewer.scn, viewer.viewport
        flags = (mujoco.mjtRndFlag.mjRND_SEGMENT, mujoco.mjtRndFlag.mjRND_IDCOLOR)
        for flag in flags:
            scene.flags[flag] = 1
        mujoco.mjr_render(view, scene, viewer.con)
        for flag in flags:
            scene.flags[flag] = 0
        pixels = np.empty((view.height, view.width, 3), np.uint8)
        mujoco.mjr_readPixels(pixels, None, view, viewer.con)
        index = pixels[::-1].astype(np.int64) @ (1, 2**8, 2**16)
        drawn = np.full((2, scene.ngeom + 1), -1)
        for geom in scene.geoms[: scene.ngeom]:
            if geom.segid >= 0:
                drawn[:, geom.segid + 1] = geom.objid, geom.objtype
        return self._objects(*drawn[:, np.where(index <= scene.ngeom, index, 0)])
