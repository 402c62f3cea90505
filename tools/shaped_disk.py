"""A file system on a disk of a chosen rate: a file in memory, a loop device, a throttle.

    with ShapedDisk(1e9, size=4 << 30) as disk:
        ...                     # write to disk.directory
        disk.forget()           # what is read from now on comes from the disk
        ...

The kernel's block throttle holds the device to so many bytes per second in each direction. Needs
root, Debian's mount and e2fsprogs, and control groups with a blkio controller (version 1).
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType

__all__ = ["DiskUnavailable", "ShapedDisk"]

_CONTROL = Path("/sys/fs/cgroup/blkio")
_MEMORY = Path("/dev/shm")


class DiskUnavailable(Exception):
    """This machine cannot shape a disk; the message says why."""


class ShapedDisk:
    """An ext4 of `size` bytes behind a device of `rate` bytes per second, between enter and
    exit.
    """

    def __init__(self, rate: float, *, size: int) -> None:
        self.rate = int(rate)
        self._size = size
        self._device = ""
        self._image = _MEMORY / f"kvcodec-disk-{os.getpid()}"
        self.directory = Path(tempfile.mkdtemp(prefix="shaped-disk-"))

    def __enter__(self) -> ShapedDisk:
        if not (_CONTROL / "blkio.throttle.read_bps_device").exists():
            raise DiskUnavailable(f"there is no throttle for block devices in {_CONTROL}")
        try:
            with self._image.open("wb") as image:
                image.truncate(self._size)
            self._device = _run("losetup", "--find", "--show", str(self._image)).strip()
            _run("mkfs.ext4", "-q", "-O", "^has_journal", "-m", "0", self._device)
            _run("mount", self._device, str(self.directory))
            self._throttle(self.rate)
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._remove()

    def forget(self) -> None:
        """Write every file out, and take it out of the page cache."""
        for path in self.directory.rglob("*"):
            if path.is_file():
                handle = os.open(path, os.O_RDONLY)
                try:
                    os.fsync(handle)
                    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
                finally:
                    os.close(handle)

    def _throttle(self, rate: int) -> None:
        device = os.stat(self._device).st_rdev
        line = f"{os.major(device)}:{os.minor(device)} {rate}"
        for name in ("read", "write"):
            (_CONTROL / f"blkio.throttle.{name}_bps_device").write_text(line)

    def _remove(self) -> None:
        if self._device:
            self._throttle(0)
            for command in (["umount", str(self.directory)], ["losetup", "-d", self._device]):
                subprocess.run(command, capture_output=True, check=False)
            self._device = ""
        self._image.unlink(missing_ok=True)
        if self.directory.exists():
            self.directory.rmdir()


def _run(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, check=True, text=True).stdout
    except FileNotFoundError as error:
        raise DiskUnavailable(f"{command[0]} is not installed") from error
    except subprocess.CalledProcessError as error:
        raise DiskUnavailable(f"{' '.join(command)}: {error.stderr.strip()}") from error
