"""Writing objects: each under a name of its own first, then published where readers look."""

from __future__ import annotations

import os
from collections import deque

from kvcodec_backends._file_io import (
    make_directory,
    make_object_directory,
    object_path,
    remove_file,
    sync_directory,
    write_file,
)
from kvcodec_backends._file_orphans import TemporaryNames
from kvcodec_backends._file_publish import Publisher

__all__ = ["ObjectWriter"]


class ObjectWriter:
    """Writes objects below one root. Its methods raise OSError, and may be called from any
    thread.
    """

    def __init__(self, root: str, *, fsync: bool, publish: str) -> None:
        self.objects = f"{root}/objects"
        self.temporaries = f"{root}/tmp"
        self._root = root
        self._fsync = fsync
        self._names = TemporaryNames()
        self.publisher = Publisher(publish, self.temporaries, self._names)
        # What could not even be removed: a full copy-on-write file system refuses that too.
        self._leftovers: deque[str] = deque()

    def make_directories(self) -> None:
        """Create what is missing of the tree, the root itself among it."""
        # The parent of the root is not made: a mount point that lost its mount must not be filled.
        for path in (self._root, self.objects, self.temporaries):
            make_directory(path)
        self.publisher.observe()

    def write(self, name: str, view: memoryview) -> None:
        """Make `view` the object `name`: whole, or not at all and with nothing left behind."""
        temporary = f"{self.temporaries}/{next(self._names)}"
        target = object_path(self.objects, name)
        try:
            try:
                write_file(temporary, view, fsync=self._fsync)
            except FileNotFoundError:
                self.make_directories()
                write_file(temporary, view, fsync=self._fsync)
            try:
                self.publisher.publish(temporary, target)
            except FileNotFoundError:
                for parent in make_object_directory(self.objects, name):
                    if self._fsync:
                        sync_directory(parent)
                self.publisher.publish(temporary, target)
        except BaseException:
            self._discard(temporary)
            raise
        if self._fsync:
            sync_directory(os.path.dirname(target))

    def remove_leftovers(self) -> None:
        """Try again to remove what could not be removed after a failure."""
        for _ in range(len(self._leftovers)):
            try:
                self._discard(self._leftovers.popleft())
            except IndexError:
                # Another thread was quicker.
                return

    def _discard(self, temporary: str) -> None:
        try:
            remove_file(temporary)
        except OSError:
            self._leftovers.append(temporary)
