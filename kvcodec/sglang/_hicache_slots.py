"""Memory between a page store and one of SGLang's storage backends, in slots of one object each.

SGLang's backends move pages of a host pool. `SlotPool` is such a pool to them, with one slot where
they expect a page: as pages of MLA are, one flat run of bytes, so that there is one key per object
and no head or layer to take apart.

A slot holds a frame of 32 bytes and the object behind it. The frame says how long the object is,
which backends that move pages of one size do not know, and has a checksum, for none of them
promises that what is removed is not still being read.
"""

from __future__ import annotations

import mmap
import struct
import time
from dataclasses import dataclass

import torch
import xxhash

__all__ = ["FRAME_BYTES", "FrameInfo", "SlotPool"]

# Magic with a version; the object's length; milliseconds since the epoch; XXH3 of the object.
_FRAME = struct.Struct("<8sQQQ")
_MAGIC = b"kvchic\x00\x01"
FRAME_BYTES = _FRAME.size


@dataclass(frozen=True)
class FrameInfo:
    """What a sound frame says: the object's length, when it was written, its checksum."""

    object_bytes: int
    modified_seconds: float
    checksum: int


class SlotPool:
    """A host pool of `slot_count` pages of `slot_bytes` bytes, each of them a slot.

    What is public and not described is what SGLang's backends ask of a pool.
    """

    page_size = 1
    layout = "page_first"
    dtype = torch.uint8
    device = "cpu"
    pin_memory = False
    stores_page_envelope = False
    layer_num = 1
    head_num = 1
    start_layer = 0
    end_layer = 0

    def __init__(self, slot_count: int, slot_bytes: int, *, exact: bool) -> None:
        """With `exact` a backend is shown the bytes in use of a slot that it writes, not all."""
        self._memory = mmap.mmap(-1, slot_count * slot_bytes)
        self._slot_bytes = slot_bytes
        self._exact = exact
        self._used_bytes = [slot_bytes] * slot_count
        self.kv_buffer = torch.frombuffer(self._memory, dtype=torch.uint8).view(
            slot_count, slot_bytes
        )
        self.size = self.page_num = self.logical_size = slot_count
        self.head_dim = self.size_per_token = slot_bytes

    # What the wrapper asks

    @property
    def max_object_bytes(self) -> int:
        """The largest object that a slot can hold."""
        return self._slot_bytes - FRAME_BYTES

    def fill(self, slot: int, view: memoryview) -> None:
        """Lay an object and its frame into a slot."""
        end = FRAME_BYTES + len(view)
        now = int(time.time() * 1000)
        target = self._view(slot)
        _FRAME.pack_into(target, 0, _MAGIC, len(view), now, xxhash.xxh3_64_intdigest(view))
        target[FRAME_BYTES:end] = view
        self._used_bytes[slot] = end if self._exact else self._slot_bytes

    def empty(self, slot: int) -> None:
        """Make a slot ready to be read into: what was in it must not be taken for an answer."""
        self._view(slot)[:FRAME_BYTES] = bytes(FRAME_BYTES)
        self._used_bytes[slot] = self._slot_bytes

    def frame(self, slot: int) -> FrameInfo | None:
        """What the frame in a slot says; None if the slot holds no object, or a damaged one."""
        view = self._view(slot)
        magic, size, milliseconds, checksum = _FRAME.unpack_from(view)
        if magic != _MAGIC or not 0 < size <= self._slot_bytes - FRAME_BYTES:
            return None
        if xxhash.xxh3_64_intdigest(view[FRAME_BYTES : FRAME_BYTES + size]) != checksum:
            return None
        return FrameInfo(size, milliseconds / 1000, checksum)

    def copy_object(self, slot: int, target: memoryview) -> None:
        """The object in a slot, into memory of exactly its length."""
        target[:] = self._view(slot)[FRAME_BYTES : FRAME_BYTES + len(target)]

    def _view(self, slot: int) -> memoryview:
        start = slot * self._slot_bytes
        return memoryview(self._memory)[start : start + self._slot_bytes]

    # What SGLang's backends ask

    def get_page_buffer_meta(self, indices: torch.Tensor) -> tuple[list[int], list[int]]:
        slots = [int(index) for index in indices]
        base = int(self.kv_buffer.data_ptr())
        pointers = [base + slot * self._slot_bytes for slot in slots]
        return pointers, [self._used_bytes[slot] for slot in slots]

    def get_page_buffer_element_size(self) -> int:
        return self._slot_bytes

    def get_data_page(self, index: int, flat: bool = True) -> torch.Tensor:  # noqa: ARG002
        return self.kv_buffer[int(index)]

    def get_dummy_flat_data_page(self) -> torch.Tensor:
        return torch.zeros(self._slot_bytes, dtype=torch.uint8)

    def set_from_flat_data_page(self, index: int, data_page: torch.Tensor) -> None:
        page = self.kv_buffer[int(index)]
        if data_page.data_ptr() != page.data_ptr():
            page.copy_(data_page.view(torch.uint8).reshape(-1))

    def get_ksize_per_token(self) -> int:
        return self._slot_bytes

    def get_size_per_token(self) -> int:
        return self._slot_bytes

    def is_stride_page_aligned(self, alignment: int) -> bool:
        return self._slot_bytes % alignment == 0
