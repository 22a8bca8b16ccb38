"""OpenGL off screen: find the system's libraries, load them where MuJoCo looks, or say what is missing."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import subprocess
import sys

from phyxdream.errors import EnvError, MissingDependency

HELP = (
    "rendering MuJoCo needs a system OpenGL library that was not found; on Debian or Ubuntu: "
    "apt-get install libegl1 libgl1 libgl1-mesa-dri"
)
REHEARSAL = """
from phyxdream.envs import opengl
opengl.preload()
import envpool
options = dict(from_pixels=True, render_width=8, render_height=8, render_camera_id={camera})
envpool.make_gymnasium({id!r}, num_envs=1, **options).reset()
"""
EGL_PLATFORM_DEVICE = 0x313F  # EGL_EXT_platform_device

_envpool_came_first = False


def _load(name: str) -> bool:
    try:
        ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
    except OSError:
        return False
    return True


@functools.cache
def preload() -> bool:
    """Make OpenGL's symbols visible to the whole process; True if a library was there.

    MuJoCo as built into envpool looks for them when it is imported, and ends the process if it finds none when it
    renders. So this must come first.
    """
    global _envpool_came_first
    _envpool_came_first = "envpool" in sys.modules
    if not sys.platform.startswith("linux"):
        return True
    if "DISPLAY" not in os.environ and "WAYLAND_DISPLAY" not in os.environ:
        os.environ.setdefault("EGL_PLATFORM", "surfaceless")
    egl = _load("libEGL.so.1") and _load("libOpenGL.so.0")
    return _load("libGL.so.1") or egl


@functools.cache
def import_triton_first() -> None:
    """Load Triton, where it is installed. Call before a driver is loaded.

    Mesa's software driver and Triton each bring an LLVM. Mesa's finds its own beside Triton's, but Triton, imported
    when Mesa's is there (which torch's optimisers do, late), ends the process.
    """
    with contextlib.suppress(Exception):  # it is optional, and may be broken in many ways
        import triton  # noqa: F401


def has_gpu() -> bool:
    """Whether a GPU's device file is there, so that OpenGL need not be software."""
    return any(os.path.exists(path) for path in ("/dev/nvidiactl", "/dev/dri"))


@functools.cache
def rehearse_envpool(id: str, camera: int) -> None:
    """Render one small picture of an envpool task in a child process, for what fails there ends the process.

    Raises:
        MissingDependency: if no library is there, or none that renders.
        EnvError: if the task has no such camera, or envpool was imported too early to render.
    """
    if not preload():
        raise MissingDependency(HELP)
    import_triton_first()
    if _envpool_came_first:
        raise EnvError(
            "envpool was imported before OpenGL was loaded, and would end the process if it rendered; "
            "import phyxdream.envs before envpool"
        )
    code = [sys.executable, "-c", REHEARSAL.format(id=id, camera=camera)]
    child = subprocess.run(code, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if child.returncode:
        if "camera_id is out of range" in child.stderr:
            raise EnvError(f"envpool:{id} has no camera {camera}; expected a smaller number, or -1 for the free camera")
        said = (child.stderr.strip().splitlines() or ["no message"])[-1]
        raise MissingDependency(f"{HELP}. (The libraries load, but rendering fails: {said})")


@functools.cache
def egl_works() -> bool:
    """True if EGL finds a device that it can start; mujoco looks for one in the same way."""
    if not _load("libEGL.so.1"):
        return False
    import_triton_first()
    egl = ctypes.CDLL("libEGL.so.1")
    egl.eglGetProcAddress.restype = ctypes.c_void_p
    entries = [egl.eglGetProcAddress(name) for name in (b"eglQueryDevicesEXT", b"eglGetPlatformDisplayEXT")]
    if not all(entries):
        return False
    query = ctypes.CFUNCTYPE(ctypes.c_uint, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)(entries[0])
    display_of = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)(entries[1])
    devices, count = (ctypes.c_void_p * 16)(), ctypes.c_int()
    if not query(len(devices), devices, ctypes.byref(count)):
        return False
    egl.eglInitialize.argtypes = [ctypes.c_void_p] * 3
    displays = (display_of(EGL_PLATFORM_DEVICE, device, None) for device in devices[: count.value])
    return any(display and egl.eglInitialize(display, None, None) for display in displays)


def choose_mujoco_gl(required: bool) -> None:
    """Set MUJOCO_GL, unless the user did, to what this machine has: EGL, else OSMesa. Call before importing mujoco.

    Raises:
        MissingDependency: if `required` and there is neither, or the user asks for an EGL that does not work.
    """
    if not sys.platform.startswith("linux"):
        return
    import_triton_first()
    if chosen := os.environ.get("MUJOCO_GL"):
        if chosen == "egl" and not egl_works():  # importing mujoco would fail
            raise MissingDependency(f"the environment variable MUJOCO_GL is 'egl', but {HELP}")
        return
    if egl_works():
        os.environ["MUJOCO_GL"] = "egl"
    elif any(_load(f"libOSMesa.so.{version}") for version in (8, 6)):
        os.environ["MUJOCO_GL"] = "osmesa"
    elif required:
        raise MissingDependency(f"{HELP} (or libosmesa6)")
