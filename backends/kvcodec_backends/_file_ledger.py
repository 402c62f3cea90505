"""How many bytes all processes together keep under one root: a small file with one slot per user.

Every user of a quota owns a slot of 64 bytes, which only it writes: how many bytes it has added
on balance, and how many it is about to add. The sum over all slots is the usage of the root. So
each process sees what the others write at the cost of one small write and one small read per
batch, with no lock that a stopped process could hold, no scan, and no shared mapping (a store
into one kills the process when the disk is full).

A slot outlives its owner, for the owner's files do too: the next one to open the ledger takes it
over. Whoever opens it while nobody else lives counts the files and starts afresh, which mends
what a `kill -9` left uncounted.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from kvcodec_backends._file_orphans import Writer

__all__ = ["Ledger"]

MAX_SLOT_COUNT = 1024
CHECK_INTERVAL_SECONDS = 10.0

# owner, bytes added on balance, bytes about to be added, time of the last sign of life
_SLOT = struct.Struct("<40sqqd")
_AMOUNTS = struct.Struct("<qqd")
_AMOUNTS_OFFSET = _SLOT.size - _AMOUNTS.size


class Ledger:
    """One user's slot in the ledger, and the sum of all. The caller serialises the calls."""

    def __init__(
        self, path: str, count_bytes: Callable[[], int], *, lock_timeout_seconds: float
    ) -> None:
        """Take a slot. `count_bytes` counts what is under the root, if nobody else uses it now."""
        self.stored_bytes = 0
        self.reserved_bytes = 0
        #: Somebody removed the ledger or took the slot: this object is of no more use.
        self.is_lost = False
        self._others_bytes = 0
        self._slot_offset = 0
        self._checked_seconds = time.time()
        self._owner = str(Writer.current()).encode()
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        self._fd = os.open(path, flags, 0o600)
        try:
            with self._locked(lock_timeout_seconds):
                self._take_slot(count_bytes)
            self.exchange()
        except BaseException:
            os.close(self._fd)
            raise

    def publish(self) -> None:
        """Tell the others. A full disk may refuse even this; the next call says it again."""
        if abs(time.time() - self._checked_seconds) > CHECK_INTERVAL_SECONDS:
            self._check_slot()
        if self.is_lost:
            return
        try:
            os.pwrite(self._fd, self._amounts(), self._slot_offset + _AMOUNTS_OFFSET)
        except OSError:
            pass

    def exchange(self) -> int:
        """Tell the others, then ask: bytes stored or about to be, by everybody.

        Everyone tells before asking, so of two that write at the same time at least one knows of
        both.
        """
        self.publish()
        try:
            slots = self._read_slots()
        except OSError:
            return self.total_bytes
        own = self._slot_offset // _SLOT.size
        self._others_bytes = sum(
            slot[1] + slot[2] for index, slot in enumerate(slots) if index != own
        )
        return self.total_bytes

    @property
    def total_bytes(self) -> int:
        """The sum as far as it is known without asking."""
        return self._others_bytes + self.stored_bytes + self.reserved_bytes

    def quiet_bytes(self) -> int | None:
        """What the others have stored, if none of them is just adding or evicting anything."""
        own = self._slot_offset // _SLOT.size
        others = [slot for index, slot in enumerate(self._read_slots()) if index != own]
        if any(slot[2] and _is_taken(slot) for slot in others):
            return None
        return sum(slot[1] for slot in others)

    def correct(self, counted_bytes: int, quiet_bytes: int) -> None:
        """Make the sum what the files say, after somebody removed files without telling.

        `quiet_bytes` is what `quiet_bytes()` said before the files were counted. Whatever happened
        since would be counted twice or not at all, so then nothing is corrected. Raises
        BlockingIOError while another user opens or corrects the ledger.
        """
        with self._locked(0.0):
            if self.quiet_bytes() == quiet_bytes:
                self.stored_bytes = counted_bytes - quiet_bytes
                self.publish()

    def close(self) -> None:
        """Leave the slot, and what it counts, to the next user."""
        self._check_slot()
        if not self.is_lost:
            try:
                os.pwrite(self._fd, bytes(_AMOUNTS_OFFSET), self._slot_offset)
            except OSError:
                pass
        os.close(self._fd)

    def _take_slot(self, count_bytes: Callable[[], int]) -> None:
        slots = self._read_slots()
        free = [index for index, slot in enumerate(slots) if not _is_taken(slot)]
        if len(free) == len(slots):
            counted = count_bytes()
            os.ftruncate(self._fd, 0)
            self._write_slot(0, counted)
        elif free:
            # What its owner was about to add when it died may or may not be there: too much is
            # the safe side.
            _, stored_bytes, reserved_bytes, _ = slots[free[0]]
            self._write_slot(free[0], stored_bytes + reserved_bytes)
        else:
            self._write_slot(len(slots), 0)

    def _write_slot(self, index: int, stored_bytes: int) -> None:
        if index >= MAX_SLOT_COUNT:
            raise OSError(errno.EUSERS, f"{MAX_SLOT_COUNT} users have this store open already")
        self.stored_bytes = stored_bytes
        self._slot_offset = index * _SLOT.size
        slot = self._owner.ljust(_AMOUNTS_OFFSET, b"\0") + self._amounts()
        os.pwrite(self._fd, slot, self._slot_offset)

    def _read_slots(self) -> list[tuple[bytes, int, int, float]]:
        data = os.pread(self._fd, MAX_SLOT_COUNT * _SLOT.size, 0)
        whole = len(data) - len(data) % _SLOT.size
        return list(_SLOT.iter_unpack(data[:whole]))

    def _amounts(self) -> bytes:
        return _AMOUNTS.pack(self.stored_bytes, self.reserved_bytes, time.time())

    def _check_slot(self) -> None:
        """Whether the ledger is still the one under the root, and this slot still this user's.

        Somebody may have removed the whole root, and after a long silence another host may have
        taken this user for dead.
        """
        self._checked_seconds = time.time()
        try:
            own = os.pread(self._fd, len(self._owner), self._slot_offset)
            self.is_lost = own != self._owner or os.fstat(self._fd).st_nlink == 0
        except OSError:
            pass

    @contextmanager
    def _locked(self, timeout_seconds: float) -> Iterator[None]:
        give_up_at = time.monotonic() + timeout_seconds
        while True:
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= give_up_at:
                    raise
                time.sleep(0.01)
        try:
            yield
        finally:
            fcntl.flock(self._fd, fcntl.LOCK_UN)


def _is_taken(slot: tuple[bytes, int, int, float]) -> bool:
    writer = Writer.parse(slot[0].rstrip(b"\0").decode("ascii", "replace"))
    return writer is not None and not writer.is_dead(time.time() - slot[3])
