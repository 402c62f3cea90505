"""Who is writing which temporary file, and which were left by writers that are gone."""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
import re
import time
from dataclasses import dataclass

from kvcodec_backends._file_io import remove_file

__all__ = ["ORPHAN_GRACE_SECONDS", "TemporaryNames", "Writer", "sweep_orphans"]

#: A temporary file of another host, container or boot is an orphan when nobody wrote to it for so
#: long.
ORPHAN_GRACE_SECONDS = 3600.0

_WRITER = re.compile(r"([0-9a-f]{8})-([0-9]{1,10})-([0-9]{1,20})")
_TEMPORARY = re.compile(r"(" + _WRITER.pattern + r")\.[0-9a-f]{16}\.[0-9a-f]{1,16}")


@dataclass(frozen=True, slots=True)
class Writer:
    """A process, named so that any other process can tell whether it still runs.

    `host` is a digest of the boot and the PID namespace: only within the same one does a PID mean
    something. `started` is the start time of the process in clock ticks, which tells it from a
    later one of the same PID.
    """

    host: str
    pid: int
    started: int

    def __str__(self) -> str:
        return f"{self.host}-{self.pid}-{self.started}"

    @classmethod
    def current(cls) -> Writer:
        """This process, the child after a fork too."""
        return _writer_of(os.getpid())

    @classmethod
    def parse(cls, text: str) -> Writer | None:
        """The writer whose text this is, None if it is nobody's."""
        match = _WRITER.fullmatch(text)
        return cls(match[1], int(match[2]), int(match[3])) if match else None

    def is_dead(self, idle_seconds: float) -> bool:
        """Whether the process is gone; that of another host is, after `ORPHAN_GRACE_SECONDS`
        without a sign.
        """
        if self.host != Writer.current().host:
            return idle_seconds > ORPHAN_GRACE_SECONDS
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass
        started = _start_ticks(self.pid)
        return started is not None and started != self.started


@functools.lru_cache(maxsize=1)
def _writer_of(pid: int) -> Writer:
    return Writer(_host_digest(), pid, _start_ticks(pid) or 0)


def _host_digest() -> str:
    parts = []
    for read in (_boot_id, _pid_namespace):
        try:
            parts.append(read())
        except OSError:
            # Without /proc every other process is a stranger, and only the grace period speaks.
            parts.append(os.urandom(16).hex())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:8]


def _boot_id() -> str:
    with open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip()


def _pid_namespace() -> str:
    return os.readlink("/proc/self/ns/pid")


def _start_ticks(pid: int) -> int | None:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # The second field is the program's name in parentheses and may hold anything.
            return int(file.read().rpartition(b")")[2].split()[19])
    except (OSError, IndexError, ValueError):
        return None


class TemporaryNames:
    """Names that no other writer uses, on this host or another, and that say whose they are."""

    def __init__(self) -> None:
        self._token = os.urandom(8).hex()
        self._numbers = itertools.count()

    def __next__(self) -> str:
        return f"{Writer.current()}.{self._token}.{next(self._numbers):x}"


def sweep_orphans(directory: str) -> int:
    """Remove the temporary files of writers that are gone; how many there were.

    Files of another name are somebody else's and stay. A writer that still runs keeps its own.
    """
    swept = 0
    with os.scandir(directory) as entries:
        for entry in entries:
            match = _TEMPORARY.fullmatch(entry.name)
            writer = Writer.parse(match[1]) if match else None
            if writer is None:
                continue
            try:
                idle_seconds = time.time() - entry.stat(follow_symlinks=False).st_mtime
                if writer.is_dead(idle_seconds):
                    swept += remove_file(entry.path)
            except FileNotFoundError:
                continue
    return swept
