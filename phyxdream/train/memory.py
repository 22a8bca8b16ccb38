"""Keep freed memory in the process: a training step frees and allocates the same large tensors again and again."""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h


def keep_freed_memory() -> bool:
    """Tell glibc not to give large freed blocks back to the system; True where that is possible.

    By default every large tensor is mapped anew, and its pages are faulted in one by one: on virtual machines that
    can take longer than computing it. The price is that the process stays as large as it ever was. Process-wide, so
    the training loop calls it and the library does not.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # musl has no mallopt
        return False
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
