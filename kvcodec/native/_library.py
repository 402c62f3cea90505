"""Finds, loads and describes libkvcodec: the declarations of kvcodec.h in ctypes and numpy, and the
functions that need no pool.
"""

from __future__ import annotations

import ctypes
import os
import sys
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kvcodec.errors import NativeError

__all__ = [
    "ABI_VERSION",
    "DONE",
    "NO_MEMORY",
    "PAGE",
    "PENDING",
    "SECTION",
    "STREAM",
    "Library",
    "PlanStructure",
    "address_of",
    "available_isas",
    "checksum",
    "isa",
    "library",
    "section_bytes",
    "set_isa",
]

ABI_VERSION = 2

DONE, PENDING = 0, 1
NO_MEMORY = -2

STREAM = np.dtype(
    [
        ("head_count", "<u4"),
        ("head_size", "<u4"),
        ("group_heads", "<u4"),
        ("is_rotated", "<u4"),
        ("layer_stride", "<i8"),
        ("group_stride", "<i8"),
        ("head_stride", "<i8"),
        ("token_stride", "<i8"),
    ]
)
SECTION = np.dtype(
    [
        ("kind", "u1"),
        ("bits", "u1"),
        ("options", "u1"),
        ("reserved", "u1"),
        ("group_size", "<u4"),
        ("offset", "<u8"),
        ("stored_bytes", "<u8"),
        ("checksum_offset", "<u8"),
        ("size_offset", "<u8"),
    ]
)
PAGE = np.dtype(
    [
        ("encoded", "<u8"),
        ("encoded_bytes", "<u8"),
        ("key", "<u8"),
        ("base", "<u8", (4,)),
        ("status", "<i4"),
        ("section", "<u4"),
        ("nonfinite_groups", "<u8"),
    ]
)
assert (STREAM.itemsize, SECTION.itemsize, PAGE.itemsize) == (48, 40, 72)


class PlanStructure(ctypes.Structure):
    """`kvc_plan`."""

    _fields_ = [
        ("abi_version", ctypes.c_uint32),
        ("dtype", ctypes.c_uint32),
        ("token_count", ctypes.c_uint32),
        ("layer_count", ctypes.c_uint32),
        ("stream_count", ctypes.c_uint32),
        ("section_count", ctypes.c_uint32),
        ("header_bytes", ctypes.c_uint32),
        ("key_offset", ctypes.c_uint32),
        ("key_bytes", ctypes.c_uint32),
        ("size_offset", ctypes.c_uint32),
        ("page_bytes", ctypes.c_uint64),
        ("header", ctypes.c_void_p),
        ("streams", ctypes.c_void_p),
        ("sections", ctypes.c_void_p),
        ("rotary", ctypes.c_void_p),
    ]


class RotaryStructure(ctypes.Structure):
    """`kvc_rotary`."""

    _fields_ = [
        ("size", ctypes.c_uint32),
        ("interleaved", ctypes.c_uint32),
        ("table", ctypes.c_void_p),
    ]


assert (ctypes.sizeof(PlanStructure), ctypes.sizeof(RotaryStructure)) == (80, 16)


class Library:
    """The functions of kvcodec.h with their types.

    A call that may take long gives the GIL up. The others keep it: to take it back beside a busy
    thread costs up to a switch interval, a thousand times what they do.
    """

    def __init__(self, path: str) -> None:
        waiting, quick = ctypes.CDLL(path), ctypes.PyDLL(path)
        u32, u64, size, pointer = ctypes.c_uint32, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p
        self.path = path
        self.abi_version = _declare(quick, "kvc_abi_version", u32)
        if self.abi_version() != ABI_VERSION:
            raise NativeError(
                f"{path} has ABI version {self.abi_version()}, this package needs {ABI_VERSION}: "
                "install the library and the package from the same release"
            )
        self.available_isas = _declare(quick, "kvc_available_isas", ctypes.c_char_p)
        self.current_isa = _declare(quick, "kvc_current_isa", ctypes.c_char_p)
        self.set_isa = _declare(quick, "kvc_set_isa", ctypes.c_int, ctypes.c_char_p)
        self.checksum = _declare(waiting, "kvc_checksum", u64, pointer, size)
        self.section_bytes = _declare(quick, "kvc_section_bytes", u64, *[u32] * 8)
        self.pool_create = _declare(quick, "kvc_pool_create", pointer, u32)
        self.pool_destroy = _declare(waiting, "kvc_pool_destroy", None, pointer)
        plan = ctypes.POINTER(PlanStructure)
        self.submit = _declare(
            quick,
            "kvc_submit",
            ctypes.c_int,
            pointer,
            ctypes.c_int,
            plan,
            pointer,
            size,
            ctypes.POINTER(ctypes.c_void_p),
        )
        self.batch_wait = _declare(waiting, "kvc_batch_wait", ctypes.c_int, pointer, u64)
        self.batch_look = _declare(quick, "kvc_batch_wait", ctypes.c_int, pointer, u64)
        self.batch_cancel = _declare(quick, "kvc_batch_cancel", None, pointer)
        self.batch_free = _declare(waiting, "kvc_batch_free", None, pointer)


def _declare(
    library: ctypes.CDLL, name: str, result: type | None, *arguments: type
) -> ctypes._NamedFuncPointer:
    # Fetched by index, a function is an object of its own, not shared with other declarations.
    function = library[name]
    function.restype = result
    function.argtypes = arguments
    return function


@lru_cache(maxsize=1)
def library() -> Library:
    """The library beside this file, else the one the system's loader finds.

    Raises `NativeError` if there is none or if it has another ABI.
    """
    name = "libkvcodec.dylib" if sys.platform == "darwin" else "libkvcodec.so"
    beside = Path(__file__).with_name(name)
    try:
        return Library(os.fspath(beside) if beside.exists() else name)
    except OSError as error:
        raise NativeError(
            f"{name} cannot be loaded ({error}). Install a kvcodec wheel for this platform, or "
            "build it in a checkout with 'make setup' or 'pip install -e .'"
        ) from error
    except AttributeError as error:
        raise NativeError(f"{name} is not kvcodec's library: {error}") from error


def available_isas() -> tuple[str, ...]:
    """Names of the instruction sets that can be used here, best first."""
    return tuple(_text(library().available_isas()).split(","))


def isa() -> str:
    """The instruction set in use.

    Raises `NativeError` if KVCODEC_FORCE_ISA names one that is not there.
    """
    name = _text(library().current_isa())
    if not name:
        raise NativeError(
            f"KVCODEC_FORCE_ISA is {os.environ.get('KVCODEC_FORCE_ISA')!r}; "
            f"this machine offers {', '.join(available_isas())}"
        )
    return name


def set_isa(name: str) -> None:
    """Use another instruction set from now on; for tests and benchmarks."""
    if library().set_isa(name.encode()) != DONE:
        raise NativeError(
            f"instruction set {name!r}; this machine offers {', '.join(available_isas())}"
        )


def checksum(buffer: bytes | bytearray | memoryview) -> int:
    """XXH3-64 with seed 0 of a contiguous buffer."""
    if memoryview(buffer).nbytes == 0:
        return int(library().checksum(None, 0))
    data = np.frombuffer(buffer, np.uint8)
    return int(library().checksum(address_of(data), len(data)))


def section_bytes(
    *,
    dtype: int,
    head_count: int,
    token_count: int,
    head_size: int,
    kind: int,
    bits: int,
    asymmetric: bool = False,
    channel: bool = False,
    transform: int = 0,
    group_size: int = 0,
) -> int:
    """Exact stored bytes of one section, for a coded one the most it may take, without its padding;
    0 if the combination is not valid.
    """
    options = asymmetric | channel << 1 | transform << 2
    numbers = (dtype, head_count, token_count, head_size, kind, bits, options, group_size)
    if not all(0 <= number < 1 << 32 for number in numbers):
        return 0
    return int(library().section_bytes(*numbers))


def address_of(array: npt.NDArray[np.generic]) -> int:
    """Where the elements of an array lie."""
    return int(array.__array_interface__["data"][0])


def _text(name: bytes) -> str:
    return name.decode("ascii")
