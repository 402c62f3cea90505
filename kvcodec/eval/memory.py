"""Memory that a process keeps: what makes a model on a CPU several times as fast."""

from __future__ import annotations

import ctypes

__all__ = ["keep_memory"]

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # glibc, malloc.h


def keep_memory() -> bool:
    """Let malloc keep what is freed; False where it is not glibc's.

    Every operation of torch takes memory for its result. glibc gives large pieces back to the
    system when they are freed, and touching new ones costs more than the arithmetic: 1.6 ms and
    0.1 ms for a sum of 2 MB on one virtual machine. For programs, not for libraries: it changes
    the whole process.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    wanted = ((_MMAP_THRESHOLD, 1 << 30), (_TRIM_THRESHOLD, (1 << 31) - 1), (_TOP_PAD, 1 << 26))
    return all(bool(mallopt(name, value)) for name, value in wanted)
