"""Memory that messages come and go in."""

from __future__ import annotations

import ctypes

__all__ = ["keep_freed_memory"]

# Of malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -2, -3, -8


def keep_freed_memory() -> bool:
    """Let this process keep freed memory for its next message; whether the C library can do that.

    glibc maps a message of 1 MiB anew and gives it back afterwards: the kernel then zeroes every
    page of every message, which costs a stream more than half of its speed. For a process that
    does nothing but serve; call it before other threads start.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return False
    return all(
        mallopt(option, value)
        for option, value in (
            (_MMAP_THRESHOLD, 32 << 20),
            (_TRIM_THRESHOLD, 256 << 20),
            (_TOP_PAD, 16 << 20),
            (_ARENA_MAX, 1),
        )
    )
