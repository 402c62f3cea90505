"""What the codec is measured against: the same bytes moved without looking at them.

The functions of ``kvcodec/native/benchmark.h``, which are no part of the library's ABI.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from kvcodec.errors import NativeError
from kvcodec.native import _library

__all__ = ["MEMCPY", "RANGE", "STREAM", "Sample", "run_traffic", "stream_isa"]

MEMCPY, STREAM = 0, 1

#: `kvc_bench_range`: addresses and sizes of one page's traffic.
RANGE = np.dtype(
    [("source", "<u8"), ("read_bytes", "<u8"), ("target", "<u8"), ("write_bytes", "<u8")]
)


@dataclass(frozen=True, slots=True)
class Sample:
    """How long something took: by the clock, and in CPU time of all its threads together."""

    wall_seconds: float
    cpu_seconds: float


class _Time(ctypes.Structure):
    _fields_ = [("wall_ns", ctypes.c_uint64), ("cpu_ns", ctypes.c_uint64)]


@lru_cache(maxsize=1)
def _functions() -> tuple[ctypes._NamedFuncPointer, ctypes._NamedFuncPointer]:
    path = _library.library().path
    try:
        loaded = ctypes.CDLL(path)
        run, isa = loaded["kvc_bench_run"], loaded["kvc_bench_stream_isa"]
    except AttributeError as error:
        raise NativeError(
            f"{path} was built without its benchmark functions: build it again with 'make setup'"
        ) from error
    run.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_uint32,
        ctypes.POINTER(_Time),
    ]
    isa.restype = ctypes.c_char_p
    return run, isa


def stream_isa() -> str:
    """The instruction set of the synthetic stream."""
    name: bytes = _functions()[1]()
    return name.decode("ascii")


def run_traffic(kind: int, ranges: npt.NDArray[np.void], threads: int) -> Sample:
    """Copy (MEMCPY) or stream (STREAM) every range, `threads` at a time."""
    assert ranges.dtype == RANGE and ranges.flags.c_contiguous
    time = _Time()
    address = ranges.__array_interface__["data"][0]
    result = _functions()[0](kind, address, len(ranges), threads, ctypes.byref(time))
    if result != _library.DONE:
        raise NativeError(f"the benchmark refused its ranges or found no threads: {result}")
    return Sample(time.wall_ns / 1e9, time.cpu_ns / 1e9)
