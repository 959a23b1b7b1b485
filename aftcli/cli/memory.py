"""Memory of a whole process: keep what is freed, and leave what stays alone."""

from __future__ import annotations

import atexit
import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# glibc's names in malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Let malloc keep large blocks instead of giving each back to the system.

    By default glibc maps every large tensor anew and the system fills it with zeros page by
    page, in every layer of every pass: on a CPU that can cost as much as the convolutions. The
    setting is the whole process's, so commands make it, functions of the library do not.

    Returns:
        Whether it took effect: it does on Linux with glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))


@contextmanager
def kept_from_collector() -> Iterator[None]:
    """Keep what is made here out of the search for reference cycles, then and later.

    Imports make hundreds of thousands of objects that stay, and Python walks over them again and
    again. The setting is the whole process's, so commands make it.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
        # Else libraries take what is left at the end for a leak, and say so.
        atexit.register(gc.unfreeze)
