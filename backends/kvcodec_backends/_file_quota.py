"""Keeping a root below its `max_bytes`: who was used last, and which files have to go."""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable

from kvcodec.backend import Deadline
from kvcodec.errors import BackendError, BackendFull
from kvcodec_backends._file_io import object_path, remove_file, scan_objects
from kvcodec_backends._file_ledger import Ledger

__all__ = ["Quota"]

#: How many reads are remembered until the next write puts them in order.
MAX_REMEMBERED_READ_COUNT = 1 << 16
#: A scan of the tree may take this share of the time, and no more.
SCAN_TIME_SHARE = 0.05
#: How long a writer waits for a scan before it answers that the store is full.
SCAN_PATIENCE_SECONDS = 0.25


class Quota:
    """The byte account of one backend, and its order of eviction.

    The order is in memory: at the start the time each object was written, from then on every put
    and get of this process. Usage is that of all processes (see `Ledger`); each evicts what it
    knows, and looks at the tree again only when it knows nothing more to evict.
    """

    def __init__(
        self,
        *,
        ledger: str,
        objects: str,
        temporaries: str,
        max_bytes: int,
        count: Callable[[str, int], None],
        lock_timeout_seconds: float,
    ) -> None:
        """Open the account. `count` adds to a counter.

        Raises OSError if the root cannot be written, BlockingIOError if its ledger stays locked.
        """
        self._objects = objects
        self._temporaries = temporaries
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._stored_bytes: OrderedDict[str, int] = OrderedDict()
        self._read_names: deque[str] = deque(maxlen=MAX_REMEMBERED_READ_COUNT)
        # Bytes of the objects that some thread took out of the order and is about to unlink.
        self._leaving_bytes = 0
        self._scan_thread: threading.Thread | None = None
        self._next_scan_at = 0.0
        self._is_scanned = False
        self._closed = False
        self._count = count
        self._ledger = Ledger(ledger, self._count_bytes, lock_timeout_seconds=lock_timeout_seconds)
        if not self._is_scanned:
            self._stored_bytes = self._scan()

    @property
    def is_lost(self) -> bool:
        """Whether somebody removed the root's ledger: another account has to be opened."""
        return self._ledger.is_lost

    @property
    def used_bytes(self) -> int:
        """Bytes stored or about to be by everybody, as far as this process knows."""
        return self._ledger.total_bytes

    def touch(self, names: Iterable[str]) -> None:
        """Note that objects were read. Takes no lock: a reader never waits for a writer."""
        self._read_names.extend(names)

    def reserve(self, wanted_bytes: int, deadline: Deadline) -> None:
        """Make room for objects about to be written, and count them. Raises `BackendFull` if
        there is none.
        """
        with self._lock:
            self._check_open()
            self._ledger.reserved_bytes += wanted_bytes
        try:
            while True:
                with self._lock:
                    self._check_open()
                    excess = self._ledger.exchange() - self._max_bytes - self._leaving_bytes
                    if excess <= 0:
                        return
                    victims = self._take_oldest(excess)
                if victims:
                    self._unlink(victims, "evicted")
                elif deadline.passed() or not self._scanned_again():
                    raise BackendFull(
                        f"{excess} bytes above max_bytes={self._max_bytes}, nothing known to evict"
                    )
        except BaseException:
            self.settle(wanted_bytes, [])
            raise

    def hold(self, name: str) -> None:
        """Keep an object from being evicted, and counted off twice, while it is replaced."""
        with self._lock:
            self._stored_bytes.pop(name, None)

    def settle(self, reserved_bytes: int, changed: Iterable[tuple[str, int, int]]) -> None:
        """End a reservation. `changed` has name, length now and length before of what was held."""
        with self._lock:
            if self._closed:
                return
            self._ledger.reserved_bytes -= reserved_bytes
            for name, bytes_now, bytes_before in changed:
                self._ledger.stored_bytes += bytes_now - bytes_before
                if bytes_now:
                    self._stored_bytes[name] = bytes_now
                    self._stored_bytes.move_to_end(name)
            self._ledger.publish()

    def make_room(self, wanted_bytes: int) -> bool:
        """Evict although the quota is kept: the disk is full with other things. Whether any byte
        came free.
        """
        with self._lock:
            if self._closed:
                return False
            victims = self._take_oldest(wanted_bytes)
        return self._unlink(victims, "displaced") > 0

    def forget(self, name: str, removed_bytes: int) -> None:
        """Note that an object was removed by somebody's wish."""
        with self._lock:
            if self._closed:
                return
            self._stored_bytes.pop(name, None)
            self._ledger.stored_bytes -= removed_bytes
            self._ledger.publish()

    def close(self) -> None:
        """Leave the account to the others; reservations in progress end without effect."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._ledger.close()

    def _check_open(self) -> None:
        if self._closed:
            raise BackendError("the store was closed meanwhile")

    def _take_oldest(self, wanted_bytes: int) -> list[tuple[str, int]]:
        """Take objects out of the order until they make up `wanted_bytes`; the lock is held."""
        while self._read_names:
            name = self._read_names.popleft()
            if name in self._stored_bytes:
                self._stored_bytes.move_to_end(name)
        victims = []
        while wanted_bytes > 0 and self._stored_bytes:
            name, stored_bytes = self._stored_bytes.popitem(last=False)
            victims.append((name, stored_bytes))
            wanted_bytes -= stored_bytes
            self._leaving_bytes += stored_bytes
        return victims

    def _unlink(self, victims: list[tuple[str, int]], counter: str) -> int:
        """Remove files, without the lock: a file system may take its time over it. How many bytes
        went; `counter` is the first word of who counts them.
        """
        freed_bytes = 0
        removed_count = 0
        for name, stored_bytes in victims:
            try:
                # Of several processes that evict the same file one succeeds, and that one counts
                # it.
                if remove_file(object_path(self._objects, name)):
                    freed_bytes += stored_bytes
                    removed_count += 1
            except OSError:
                # It stays, and the next scan finds it again.
                continue
        with self._lock:
            self._leaving_bytes -= sum(stored_bytes for _, stored_bytes in victims)
            if not self._closed:
                self._ledger.stored_bytes -= freed_bytes
                self._ledger.publish()
        self._count(f"{counter}_objects", removed_count)
        self._count(f"{counter}_bytes", freed_bytes)
        return freed_bytes

    def _scanned_again(self) -> bool:
        """Learn what others wrote, unless the last scan was too short a time ago.

        A large tree takes longer than a writer may wait, so the scan goes on behind its back. True
        if it is done.
        """
        with self._lock:
            wait_seconds = max(0.0, self._next_scan_at - time.monotonic())
            if self._closed or wait_seconds > SCAN_PATIENCE_SECONDS:
                return False
            if self._scan_thread is None or not self._scan_thread.is_alive():
                self._scan_thread = threading.Thread(
                    target=self._scan_again,
                    args=(wait_seconds,),
                    name="kvcodec-file-scan",
                    daemon=True,
                )
                self._scan_thread.start()
            scan = self._scan_thread
        scan.join(SCAN_PATIENCE_SECONDS)
        return not scan.is_alive()

    def _scan_again(self, wait_seconds: float) -> None:
        time.sleep(wait_seconds)
        started = time.monotonic()
        try:
            with self._lock:
                self._check_open()
                stored_before = self._ledger.stored_bytes
                quiet_bytes = None if self._leaving_bytes else self._ledger.quiet_bytes()
            found = self._scan()
            with self._lock:
                self._check_open()
                is_quiet = stored_before == self._ledger.stored_bytes and not self._leaving_bytes
                if quiet_bytes is not None and is_quiet:
                    self._ledger.correct(sum(found.values()), quiet_bytes)
                for name, stored_bytes in self._stored_bytes.items():
                    found[name] = stored_bytes
                    found.move_to_end(name)
                self._stored_bytes = found
        except (BackendError, OSError):
            # The next one may succeed: a vanished mount, or another process that is correcting now.
            pass
        finally:
            ended = time.monotonic()
            self._next_scan_at = ended + (ended - started) / SCAN_TIME_SHARE

    def _count_bytes(self) -> int:
        self._stored_bytes = self._scan()
        return sum(self._stored_bytes.values()) + _temporary_bytes(self._temporaries)

    def _scan(self) -> OrderedDict[str, int]:
        found = []
        for info in scan_objects(self._objects):
            if self._closed:
                break
            found.append(info)
        found.sort(key=lambda info: info.modified_seconds)
        self._is_scanned = True
        self._count("scans", 1)
        return OrderedDict((info.name, info.stored_bytes) for info in found)


def _temporary_bytes(directory: str) -> int:
    total = 0
    with os.scandir(directory) as entries:
        for entry in entries:
            try:
                total += entry.stat(follow_symlinks=False).st_size
            except FileNotFoundError:
                continue
    return total
