"""Parts of a stream, written and read without protobuf's copies; on the wire they are protobuf.

A part may begin an object, and carries some of its bytes: a message whose last field is `bytes`.
protobuf would copy them into the message, and again into and out of its wire form.
"""

from __future__ import annotations

from collections.abc import Iterator

from google.protobuf.message import Message

from kvcodec_proto.v1 import service_pb2 as pb
from kvcodec_server.options import CHUNK_BYTES

__all__ = ["GET_TAG", "chunks", "get_part", "parse_put", "put_head", "serialized"]

_NOTHING = memoryview(b"")
#: How the chunk begins: its field number, and wire type 2, a length and so many bytes.
GET_TAG = pb.GetStreamResponse.CHUNK_FIELD_NUMBER << 3 | 2
_PUT_TAG = pb.PutStreamRequest.CHUNK_FIELD_NUMBER << 3 | 2


def chunks(data: memoryview) -> Iterator[memoryview]:
    """Equal parts of an object, each of about `CHUNK_BYTES`: no small one at its end."""
    count = max(1, round(len(data) / CHUNK_BYTES))
    size = -(-len(data) // count)
    return (data[at : at + size] for at in range(0, len(data), size))


def get_part(message: pb.GetStreamResponse | None, chunk: memoryview) -> bytes:
    """A part of a get, as on the wire."""
    return b"".join((_head(message, GET_TAG, len(chunk)), chunk))


def put_head(message: pb.PutStreamRequest | None, chunk_bytes: int) -> bytes:
    """A part of a put, as on the wire, up to its chunk."""
    return _head(message, _PUT_TAG, chunk_bytes)


def serialized(part: bytes | Message) -> bytes:
    """A message as on the wire; one that is already stays as it is."""
    return part if isinstance(part, bytes) else part.SerializeToString()


def parse_put(data: bytes) -> tuple[pb.PutStreamRequest | None, memoryview]:
    """What a part of a put says besides its chunk, None for nothing, and the chunk."""
    at = 0
    while at < len(data):
        start, size = _sized(data, at + 1)
        if data[at] == _PUT_TAG and start + size == len(data):
            head = pb.PutStreamRequest.FromString(data[:at]) if at else None
            return head, memoryview(data)[start:]
        if data[at] & 7 != 2 or not start:
            break  # no writer of ours, but protobuf may be able to read it
        at = start + size
    message = pb.PutStreamRequest.FromString(data)
    chunk = memoryview(message.chunk) if message.chunk else _NOTHING
    message.ClearField("chunk")
    return message, chunk


def _head(message: Message | None, tag: int, size: int) -> bytes:
    head = b"" if message is None else message.SerializeToString()
    digits = bytearray((tag,))
    while size > 0x7F:
        digits.append(size & 0x7F | 0x80)
        size >>= 7
    digits.append(size)
    return head + digits


def _sized(data: bytes, at: int) -> tuple[int, int]:
    """Where the bytes of a field begin, and how many they are; 0 where nobody can tell."""
    size = 0
    for digit in range(5):
        if at + digit >= len(data):
            break
        size |= (data[at + digit] & 0x7F) << 7 * digit
        if data[at + digit] < 0x80:
            return at + digit + 1, size
    return 0, 0
