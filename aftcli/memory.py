"""Keep freed memory for the next pass of the network."""

from __future__ import annotations

import ctypes
import sys

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
