"""The packets on the socket beside a sidecar's, and what a region of shared memory has to be.

The client sends HELLO with the descriptor of its region and gets WELCOME with a token, or REFUSED
with a reason. From then on it may ask, with FENCE, to be told by RELEASED when a call is over: when
the sidecar will not touch that call's ranges again. The sidecar closes its end only when that is
so of every call; so does the kernel, when the sidecar dies.
"""

from __future__ import annotations

import fcntl
import os
import struct

from kvcodec.errors import BackendError

__all__ = [
    "FENCE",
    "HELLO",
    "MAX_PACKET_BYTES",
    "REFUSED",
    "RELEASED",
    "SEALS",
    "TOKEN_METADATA",
    "WELCOME",
    "new_region",
    "pack_call",
    "pack_hello",
    "region_path",
    "unpack_call",
    "unpack_hello",
]

#: Every call over the Unix socket carries the token under this name.
TOKEN_METADATA = "kvcodec-session"

MAX_PACKET_BYTES = 512
#: What a region must be sealed with: it cannot change its size under whoever maps it.
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL

HELLO, WELCOME, REFUSED, FENCE, RELEASED = range(1, 6)

_MAGIC = b"KVCR"
_VERSION = 1
_HELLO = struct.Struct("<4sBBHQ")
_CALL = struct.Struct("<4sBBHQ")


def region_path(socket_path: str) -> str:
    """The socket for regions beside the one for calls."""
    return f"{socket_path}.region"


def pack_hello(region_bytes: int) -> bytes:
    """The first packet, beside which the descriptor travels."""
    return _HELLO.pack(_MAGIC, HELLO, _VERSION, 0, region_bytes)


def unpack_hello(packet: bytes) -> int:
    """The size of the region. Raises `BackendError` for anything but a HELLO of this version."""
    if len(packet) != _HELLO.size:
        raise BackendError("this is no greeting of a kvcodec client")
    magic, kind, version, zero, size = _HELLO.unpack(packet)
    if (magic, kind, zero) != (_MAGIC, HELLO, 0):
        raise BackendError("this is no greeting of a kvcodec client")
    if version != _VERSION:
        raise BackendError(f"region protocol {version}, this sidecar speaks {_VERSION}")
    return int(size)


def pack_call(kind: int, call_id: int) -> bytes:
    """FENCE or RELEASED of one call."""
    return _CALL.pack(_MAGIC, kind, _VERSION, 0, call_id)


def unpack_call(packet: bytes, kind: int) -> int | None:
    """The call, or None where the packet is not of this kind."""
    if len(packet) != _CALL.size:
        return None
    magic, found, version, zero, call_id = _CALL.unpack(packet)
    return int(call_id) if (magic, found, version, zero) == (_MAGIC, kind, _VERSION, 0) else None


def new_region(size: int) -> int:
    """The descriptor of a new sealed region of zeros; it costs memory where it is touched."""
    descriptor = os.memfd_create("kvcodec-region", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, size)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, SEALS)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor
