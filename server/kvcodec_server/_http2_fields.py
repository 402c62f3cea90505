"""Blocks of fields of HTTP/2, which arrive in one frame or several."""

from __future__ import annotations

from typing import NamedTuple

import hpack

__all__ = ["MAX_FIELD_BYTES", "Block", "FieldBlocks", "Http2Error"]

#: Of one block, on the wire and decoded.
MAX_FIELD_BYTES = 64 << 10

_END_STREAM, _END_HEADERS, _PADDED, _PRIORITY = 0x1, 0x4, 0x8, 0x20


class Http2Error(ConnectionError):
    """The server does not speak HTTP/2 as it should. The connection is of no further use."""


class Block(NamedTuple):
    """A whole block: whose it is, whether it is the last thing there, and what it says."""

    stream: int
    ends: bool
    fields: dict[str, str]


class FieldBlocks:
    """The blocks of one connection, all of which are decoded, whose ever they are."""

    def __init__(self) -> None:
        self._decoder = hpack.Decoder(max_header_list_size=MAX_FIELD_BYTES)
        self._open: bytearray | None = None
        self._stream = 0
        self._ends = False

    def check_next(self, stream: int | None) -> None:
        """Before any frame: `stream` for one that continues a block, None for all others.

        Raises `Http2Error` where a block has to go on and does not, or the other way round.
        """
        if stream != (None if self._open is None else self._stream):
            raise Http2Error("fields that do not go on, or have not begun")

    def begin(self, flags: int, stream: int, payload: bytes) -> Block | None:
        """A HEADERS frame; the block, if that is all of it."""
        self._open = bytearray()
        self._stream, self._ends = stream, bool(flags & _END_STREAM)
        padding = payload[0] if flags & _PADDED and payload else 0
        before = bool(flags & _PADDED) + (5 if flags & _PRIORITY else 0)
        if before + padding > len(payload):
            raise Http2Error("more padding than there is in the frame")
        return self.go_on(flags, payload[before : len(payload) - padding])

    def go_on(self, flags: int, part: bytes) -> Block | None:
        """More of a block; the block, if it ends with that."""
        assert self._open is not None
        self._open += part
        if len(self._open) > MAX_FIELD_BYTES:
            raise Http2Error(f"more than {MAX_FIELD_BYTES} bytes of fields")
        if not flags & _END_HEADERS:
            return None
        block, self._open = bytes(self._open), None
        try:
            pairs = self._decoder.decode(block, raw=True)
        except hpack.HPACKError as error:
            raise Http2Error(f"fields that cannot be read: {error}") from error
        fields = {_text(name): _text(value) for name, value in pairs}
        return Block(self._stream, self._ends, fields)


def _text(part: str | bytes) -> str:
    """A field's name or value, whatever is in it."""
    return part if isinstance(part, str) else part.decode("latin-1")
