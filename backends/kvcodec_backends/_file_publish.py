"""How a written file gets the name readers look for: by rename, or by a second link.

A local file system replaces a name atomically, and who has the old file open reads it to its end.
A network file system need not: on JuiceFS a replaced file is gone at once, and readers of it, those
of another mount for as long as they remember the name, get nothing, a part, or zeros. There a new
file is linked to its name, which fails where the name is taken. A file in the way is moved aside
first and removed a while later, when nobody remembers it. Pages are named after what they hold, so
this is rare, and whoever looks in between finds nothing or the old file.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
import time
from collections import deque

from kvcodec.errors import ConfigError
from kvcodec_backends._file_io import remove_file
from kvcodec_backends._file_orphans import TemporaryNames

__all__ = ["ASIDE_SECONDS", "PUBLISH_MODES", "Publisher", "file_system_type", "is_on_shared_mount"]

PUBLISH_MODES = ("auto", "rename", "link")

_MOUNTS = "/proc/self/mountinfo"

#: What `auto` links on, and everything in user space ("fuse.juicefs"): several hosts or processes
#: keep caches of their own there.
_SHARED_TYPES = frozenset({"9p", "afs", "beegfs", "ceph", "cifs", "fuse", "gfs2", "glusterfs"}) | {
    *("gpfs", "lustre", "nfs", "nfs4", "ocfs2", "orangefs", "smb3", "smbfs", "virtiofs", "wekafs")
}
#: In user space, and yet of this host alone: the root of a container without privileges.
_LOCAL_TYPES = frozenset({"fuse.fuse-overlayfs"})
#: What link says on a file system that has none.
_NO_LINK_ERRNOS = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK})
#: How long a file that was replaced or removed stays readable. File systems remember names and
#: lengths for a second or a few: JuiceFS 1, CephFS until told otherwise, NFS 3 and more.
ASIDE_SECONDS = 10.0
#: So often a name may be taken by another writer between freeing and linking it.
_MAX_ATTEMPT_COUNT = 100


class Publisher:
    """Gives files their names, and takes names away, on the file system that `observe` saw last.

    Its methods raise OSError and are thread-safe.
    """

    def __init__(self, mode: str, temporaries: str, names: TemporaryNames) -> None:
        """`names` are for files to be put aside in the directory `temporaries`."""
        if mode not in PUBLISH_MODES:
            raise ConfigError(f"publish is {mode!r}, must be one of {', '.join(PUBLISH_MODES)}")
        self._mode = mode
        self._temporaries = temporaries
        self._names = names
        self._aside: deque[tuple[float, str]] = deque()
        self._aside_lock = threading.Lock()
        #: Whether names are given by linking, because readers elsewhere remember old ones.
        self.is_shared = mode == "link"
        #: How many files were renamed because the file system knows no links.
        self.unlinkable_count = 0

    def observe(self) -> None:
        """Look what the directory is on: a mount may come and go below a store."""
        if self._mode == "auto":
            self.is_shared = is_on_shared_mount(self._temporaries)

    def publish(self, temporary: str, target: str) -> None:
        """Make `target` lead to the file, and `temporary` to nothing."""
        if not self.is_shared:
            os.rename(temporary, target)
            return
        try:
            self._link(temporary, target)
        except OSError as error:
            if error.errno not in _NO_LINK_ERRNOS:
                raise
            os.rename(temporary, target)
            self.unlinkable_count += 1
        else:
            os.unlink(temporary)

    def withdraw(self, target: str) -> bool:
        """Remove what `target` leads to; False when there is nothing."""
        if not self.is_shared:
            return remove_file(target)
        self.remove_aside()
        return self._put_aside(target)

    def remove_aside(self) -> None:
        """Remove files that were put aside long enough ago."""
        while True:
            with self._aside_lock:
                if not self._aside or self._aside[0][0] > time.monotonic():
                    return
                _, path = self._aside.popleft()
            try:
                remove_file(path)
            except OSError:
                # It has a temporary file's name: a later process takes it for an orphan.
                pass

    def _link(self, temporary: str, target: str) -> None:
        self.remove_aside()
        for _ in range(_MAX_ATTEMPT_COUNT):
            try:
                os.link(temporary, target, follow_symlinks=False)
                return
            except FileExistsError:
                # An NFS server that was asked twice says so of its own success.
                if _is_same_file(temporary, target):
                    return
                self._put_aside(target)
        raise OSError(errno.EBUSY, f"other writers took the name {_MAX_ATTEMPT_COUNT} times")

    def _put_aside(self, target: str) -> bool:
        path = f"{self._temporaries}/{next(self._names)}"
        try:
            if stat.S_ISDIR(os.lstat(target).st_mode):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            os.rename(target, path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        with self._aside_lock:
            self._aside.append((time.monotonic() + ASIDE_SECONDS, path))
        return True


def is_on_shared_mount(path: str) -> bool:
    """Whether a path is on a file system that other hosts may write to, or one in user space."""
    name = file_system_type(path)
    return name in _SHARED_TYPES or (
        name is not None and name.startswith("fuse.") and name not in _LOCAL_TYPES
    )


def file_system_type(path: str) -> str | None:
    """The type of the file system that a path is on, None where nobody knows it."""
    try:
        device = os.stat(path).st_dev
        wanted = f"{os.major(device)}:{os.minor(device)}"
        with open(_MOUNTS, encoding="utf-8", errors="replace") as mounts:
            for line in mounts:
                # 43 27 0:39 / /mnt/volume rw,relatime [tags ...] - fuse.juicefs JuiceFS:volume rw
                mount, _, file_system = line.partition(" - ")
                if mount.split()[2] == wanted:
                    return file_system.split()[0]
    except (OSError, IndexError):
        pass
    return None


def _is_same_file(first: str, second: str) -> bool:
    try:
        return os.path.samestat(os.lstat(first), os.lstat(second))
    except OSError:
        return False
