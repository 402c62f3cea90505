"""One object, one file: where it lies, reading it whole, writing it, finding all of them."""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator

from kvcodec.backend import ObjectInfo
from kvcodec.errors import (
    BackendError,
    BackendFull,
    BackendReadOnly,
    BackendTimeout,
    ConfigError,
)

__all__ = [
    "FULL_ERRNOS",
    "as_backend_error",
    "checked_root",
    "file_bytes",
    "holds_store",
    "make_directory",
    "make_object_directory",
    "make_private_root",
    "object_path",
    "read_file",
    "remove_file",
    "scan_objects",
    "sync_directory",
    "write_file",
]

FULL_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT})
_READ_ONLY_ERRNOS = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})
#: What open, stat and unlink say when the path leads to no regular file: nothing, a file on the
#: way, a symbolic link, a socket.
_ABSENT_ERRNOS = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO})

# O_NONBLOCK: opening a FIFO that somebody put in the way must not wait for its writer.
_READ_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
_WRITE_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC

_NAMESPACE = re.compile(r"[0-9a-f]{32}")
_SHARD = re.compile(r"[0-9a-f]{2}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


def as_backend_error(error: OSError, verb: str, name: str, *, writing: bool) -> BackendError:
    """The one place where an errno becomes a class of the error tree."""
    code = errno.errorcode.get(error.errno or 0, "unknown error")
    message = f"{verb} {name}: {code}: {error.strerror or error}"
    if error.errno in FULL_ERRNOS:
        return BackendFull(message)
    if writing and error.errno in _READ_ONLY_ERRNOS:
        return BackendReadOnly(message)
    if error.errno == errno.ETIMEDOUT:
        return BackendTimeout(message)
    return BackendError(message)


def read_file(path: str, buffer: memoryview) -> int | None:
    """Read a whole object into the start of `buffer`.

    Returns its length, which may be above that of the buffer: then nothing was read. None when
    there is no object: no file, an empty one, or something that is no regular file. OSError for
    everything else, a file that grew or shrank meanwhile among it.
    """
    try:
        fd = os.open(path, _READ_FLAGS)
        try:
            return _read_open_file(fd, buffer)
        finally:
            os.close(fd)
    except OSError as error:
        # Between open and read a network file system may find that the file is gone.
        if error.errno in _ABSENT_ERRNOS or error.errno == errno.ESTALE:
            return None
        raise


def _read_open_file(fd: int, buffer: memoryview) -> int | None:
    status = os.fstat(fd)
    size = status.st_size
    if not stat.S_ISREG(status.st_mode) or size == 0:
        return None
    if size > len(buffer):
        return size
    # One byte more than there should be: finds a file that grew at no further system call.
    beyond = bytearray(1)
    count = os.preadv(fd, [buffer[:size], beyond], 0)
    while count < size:
        more = os.preadv(fd, [buffer[count:size], beyond], count)
        if more == 0:
            break
        count += more
    if count != size:
        raise OSError(
            errno.EIO, f"{size} bytes long when opened, {count} read: somebody writes to it"
        )
    return size


def write_file(path: str, view: memoryview, *, fsync: bool) -> None:
    """Write a new file. The caller renames it, or removes what there is of it when this raises."""
    fd = os.open(path, _WRITE_FLAGS, 0o600)
    try:
        written = os.write(fd, view)
        while written < len(view):
            count = os.write(fd, view[written:])
            if count == 0:
                raise OSError(errno.EIO, f"only {written} of {len(view)} bytes could be written")
            written += count
        if fsync:
            os.fsync(fd)
    finally:
        # Some file systems report a full quota only here, so a failure of close counts.
        os.close(fd)


def sync_directory(path: str) -> None:
    """Make the names in a directory survive a loss of power."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def remove_file(path: str) -> bool:
    """Unlink; False when there was nothing to unlink."""
    try:
        os.unlink(path)
    except OSError as error:
        if error.errno in _ABSENT_ERRNOS:
            return False
        raise
    return True


def file_bytes(path: str) -> tuple[int, float] | None:
    """Length and time of last change of the object at `path`; None when there is none."""
    try:
        status = os.stat(path, follow_symlinks=False)
    except OSError as error:
        if error.errno in _ABSENT_ERRNOS:
            return None
        raise
    if not stat.S_ISREG(status.st_mode) or status.st_size == 0:
        return None
    return status.st_size, status.st_mtime


def make_directory(path: str) -> bool:
    """Create one private directory; False when it was there."""
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        return False
    return True


def holds_store(root: str) -> bool:
    """Whether a store was ever opened in this directory."""
    return os.path.isdir(f"{root}/objects")


def checked_root(root: str) -> str:
    """The path of a store's directory without the slashes at its end; `ConfigError` for one that
    can be none.
    """
    if not root.startswith("/") or root.strip("/") == "" or "\0" in root:
        raise ConfigError(f"store directory {root!r}; wanted is an absolute path below /")
    if ".." in root.split("/"):
        raise ConfigError(f"store directory {root!r} contains '..'; write the path without it")
    return root.rstrip("/")


def make_private_root(root: str) -> None:
    """Create the root if need be, and refuse one that somebody else could write to."""
    try:
        os.makedirs(root, mode=0o700, exist_ok=True)
        status = os.stat(root, follow_symlinks=False)
    except FileExistsError:
        raise ConfigError(
            f"{root!r} is not a directory; name one, it is created if need be"
        ) from None
    except OSError as error:
        raise ConfigError(f"cannot use {root!r} as a store: {error.strerror}") from error
    if stat.S_ISLNK(status.st_mode):
        raise ConfigError(
            f"{root!r} is a symbolic link; name its target, {os.path.realpath(root)!r}"
        )
    if not stat.S_ISDIR(status.st_mode):
        raise ConfigError(f"{root!r} is not a directory; name one, it is created if need be")
    if status.st_mode & 0o022:
        raise ConfigError(
            f"{root!r} is writable by others (mode {stat.S_IMODE(status.st_mode):04o}); "
            f"chmod go-w it, or name a directory in it, such as {root + '/kvcodec'!r}, "
            "which is then created with mode 0700"
        )
    if status.st_uid not in (0, os.geteuid()):
        raise ConfigError(
            f"{root!r} belongs to user {status.st_uid} and this process is user {os.geteuid()}; "
            "chown it, name a directory of this user, or run as its owner"
        )


def object_path(objects: str, name: str) -> str:
    """Where an object lies: its namespace, one of 256 shards, its digest."""
    return f"{objects}/{name[:32]}/{name[33:35]}/{name[33:]}"


def make_object_directory(objects: str, name: str) -> list[str]:
    """Create the directories on the way to an object; the parents of those that were missing."""
    namespace = f"{objects}/{name[:32]}"
    wanted = [objects, namespace, f"{namespace}/{name[33:35]}"]
    return [os.path.dirname(path) for path in wanted if make_directory(path)]


def scan_objects(objects: str, prefix: str = "") -> Iterator[ObjectInfo]:
    """All objects whose name starts with `prefix`. What lies there under any other name is not
    looked at.
    """
    for namespace in _entries(objects, _NAMESPACE, directories=True):
        if not namespace.startswith(prefix[:32]):
            continue
        for shard in _entries(f"{objects}/{namespace}", _SHARD, directories=True):
            if not f"{namespace}/{shard}".startswith(prefix[:35]):
                continue
            for digest in _entries(f"{objects}/{namespace}/{shard}", _DIGEST, directories=False):
                name = f"{namespace}/{digest}"
                if not (digest.startswith(shard) and name.startswith(prefix)):
                    continue
                found = file_bytes(object_path(objects, name))
                if found is not None:
                    yield ObjectInfo(name, *found)


def _entries(directory: str, pattern: re.Pattern[str], *, directories: bool) -> list[str]:
    try:
        with os.scandir(directory) as entries:
            return [
                entry.name
                for entry in entries
                if pattern.fullmatch(entry.name)
                and (not directories or entry.is_dir(follow_symlinks=False))
            ]
    except OSError as error:
        if error.errno in _ABSENT_ERRNOS:
            return []
        raise
