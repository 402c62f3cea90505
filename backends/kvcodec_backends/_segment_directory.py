"""The directory of the segments, its lock, and the little that processes tell each other there.

::

    <root>/segments/            mode 0700
        lock                    flock while segments are made or dropped; holds the stamp
        <number>.segment        preallocated; flock by the process that appends to it
        <number>.index          headers of its records, appended by whoever changes one; flock,
                                shared by those who mark records dead, by who reuses the segment
        <number>.new            a segment being made

The stamp is eight random bytes, changed with every segment that comes or goes and with every
record that dies: a process that finds it unchanged has nothing to look for but new records in
segments that somebody still appends to.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from kvcodec.backend import Deadline
from kvcodec.errors import BackendTimeout
from kvcodec_backends._file_io import make_directory, remove_file

__all__ = [
    "SegmentDirectory",
    "append_to",
    "is_locked",
    "lock_segment",
    "open_index",
    "try_lock",
    "unlock",
]

_FILE = re.compile(r"([0-9a-f]{16})\.(segment|index|new)")
_POLL_SECONDS = 0.005
_STAMP_BYTES = 8
_NO_WAY_ERRNOS = frozenset({errno.ENOENT, errno.ENOTDIR})


class SegmentDirectory:
    """Paths below one root. Its methods raise OSError."""

    def __init__(self, root: str) -> None:
        self._root = root
        self.path = f"{root}/segments"
        self._lock_path = f"{self.path}/lock"

    def make(self) -> None:
        """Create what is missing, but for the parent of the root: a mount point that lost its mount
        must not be filled.
        """
        make_directory(self._root)
        make_directory(self.path)

    def stamp(self) -> bytes | None:
        """What changes whenever there is something to look for; None without a store."""
        try:
            fd = os.open(self._lock_path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            if error.errno in _NO_WAY_ERRNOS:
                return None
            raise
        try:
            return os.pread(fd, _STAMP_BYTES, 0)
        finally:
            os.close(fd)

    def change_stamp(self) -> None:
        """Let the other processes look again. A full disk may refuse it: then they find out when
        they read.
        """
        try:
            fd = os.open(self._lock_path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                os.pwrite(fd, os.urandom(_STAMP_BYTES), 0)
            finally:
                os.close(fd)
        except OSError:
            pass

    @contextmanager
    def locked(self, deadline: Deadline) -> Iterator[None]:
        """Alone among processes and threads to make and drop segments. Raises `BackendTimeout`."""
        fd = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            while True:
                if try_lock(fd):
                    break
                if deadline.passed():
                    raise BackendTimeout(f"{self._lock_path} stays locked by another process")
                time.sleep(_POLL_SECONDS)
            if os.fstat(fd).st_nlink == 0:
                raise OSError(errno.ESTALE, "somebody removed the store meanwhile")
            yield
        finally:
            unlock(fd)

    def numbers(self) -> set[int]:
        """All segments, of whatever state."""
        return {int(match[1], 16) for match, _ in self._files() if match[2] == "segment"}

    def used_bytes(self) -> int:
        """What all files take on the disk."""
        return sum(max(status.st_blocks * 512, status.st_size) for _, status in self._files())

    def remove_strays(self) -> None:
        """Remove indexes whose segment is gone, and segments never finished; the lock is held."""
        numbers = self.numbers()
        for match, _ in self._files():
            if match[2] != "segment" and int(match[1], 16) not in numbers:
                remove_file(f"{self.path}/{match[0]}")

    def _files(self) -> Iterator[tuple[re.Match[str], os.stat_result]]:
        try:
            with os.scandir(self.path) as entries:
                names = [entry.name for entry in entries]
        except OSError as error:
            if error.errno in _NO_WAY_ERRNOS:
                return
            raise
        for name in names:
            match = _FILE.fullmatch(name)
            if match is None:
                continue
            try:
                status = os.stat(f"{self.path}/{name}", follow_symlinks=False)
            except FileNotFoundError:
                continue
            if stat.S_ISREG(status.st_mode):
                yield match, status


def lock_segment(fd: int) -> bool:
    """Whether a segment is now ours alone: nobody appends to it, and it is still there."""
    return try_lock(fd) and os.fstat(fd).st_nlink > 0


def is_locked(fd: int) -> bool:
    """Whether somebody appends to a segment."""
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    fcntl.flock(fd, fcntl.LOCK_UN)
    return False


def try_lock(fd: int, *, shared: bool = False) -> bool:
    """Lock a file for as long as `unlock` is not called; False where others do not let us."""
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    _locked_fds.add(fd)
    return True


def unlock(fd: int) -> None:
    """Give a lock back and close its descriptor. A child that was forked meanwhile has it too, and
    would keep the lock. Nothing that fails here matters any more.
    """
    _locked_fds.discard(fd)
    try:
        fcntl.flock(fd, fcntl.LOCK_UN)
        os.close(fd)
    except OSError:
        pass


# So that a forked child can let go of its parent's locks, which else outlive the parent.
_locked_fds: set[int] = set()


def _close_in_child() -> None:
    for fd in _locked_fds:
        os.close(fd)
    _locked_fds.clear()


os.register_at_fork(after_in_child=_close_in_child)


def open_index(path: str) -> int:
    """A descriptor to append to an index, which is made if need be."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.open(path, flags, 0o600)


def append_to(path: str, data: bytes, count: Callable[[str, int], None]) -> None:
    """Append to an index. What fails is only counted: whoever opens the store next looks for the
    records themselves where the index has a gap.
    """
    try:
        fd = open_index(path)
        try:
            complete = os.write(fd, data) == len(data)
        finally:
            os.close(fd)
    except OSError:
        complete = False
    if not complete:
        count("index_failures", 1)
