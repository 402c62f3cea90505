"""The objects of a store in little memory, in whatever order a command wants them."""

from __future__ import annotations

import bisect
import enum
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvcodec.backend import Backend, ObjectInfo, check_name
from kvcodec.errors import BackendError, ConfigError

__all__ = ["Listing", "NamespaceTotal", "Sort", "listed", "listed_objects", "totals"]

_NAME_BYTES = 48
_NAMESPACE_BYTES = 16


class Sort(str, enum.Enum):
    """An order of rows: by name, the largest first, or the newest first."""

    NAME = "name"
    SIZE = "size"
    TIME = "time"


class Listing:
    """Names, sizes and times of objects, in 64 bytes each."""

    def __init__(self) -> None:
        self._names = bytearray()
        self._sizes = array("Q")
        self._times = array("d")
        self.stored_bytes = 0

    @classmethod
    def of(cls, objects: Iterable[ObjectInfo]) -> Listing:
        """A listing of these objects."""
        listing = cls()
        for info in objects:
            listing.add(info)
        return listing

    def add(self, info: ObjectInfo) -> None:
        """Note one object; its name has to be an object's name."""
        self._names += bytes.fromhex(info.name.replace("/", ""))
        self._sizes.append(info.stored_bytes)
        self._times.append(info.modified_seconds)
        self.stored_bytes += info.stored_bytes

    def __len__(self) -> int:
        return len(self._sizes)

    def __getitem__(self, index: int) -> ObjectInfo:
        digits = self._name(index).hex()
        return ObjectInfo(f"{digits[:32]}/{digits[32:]}", self._sizes[index], self._times[index])

    def __iter__(self) -> Iterator[ObjectInfo]:
        return (self[index] for index in range(len(self)))

    def sorted(self, by: Sort) -> Listing:
        """The same objects in another order."""
        if by is Sort.NAME:
            words = np.frombuffer(self._names, ">u8").reshape(-1, _NAME_BYTES // 8)
            order = np.lexsort(words.T[::-1])
        else:
            keys = self.sizes().astype(np.float64) if by is Sort.SIZE else self.times()
            order = np.argsort(-keys, kind="stable")
        return self.taken(order)

    def oldest_first(self) -> Listing:
        """The same objects in the order they were written."""
        return self.taken(np.argsort(self.times(), kind="stable"))

    def taken(self, indices: npt.NDArray[np.int64]) -> Listing:
        """The objects at `indices`, in that order."""
        found = Listing()
        names = np.frombuffer(self._names, np.uint8).reshape(-1, _NAME_BYTES)
        found._names = bytearray(names[indices].tobytes())
        sizes = self.sizes()[indices]
        found._sizes.frombytes(sizes.tobytes())
        found._times.frombytes(self.times()[indices].tobytes())
        found.stored_bytes = int(sizes.sum())
        return found

    def place_of(self, name: str) -> int:
        """How many objects of a listing in ascending order of names come before this name."""
        wanted = bytes.fromhex(name.replace("/", ""))
        return bisect.bisect_left(range(len(self)), wanted, key=self._name)

    def sizes(self) -> npt.NDArray[np.uint64]:
        """All sizes, in bytes."""
        return np.array(self._sizes, np.uint64)

    def times(self) -> npt.NDArray[np.float64]:
        """All times of writing, in seconds since the epoch."""
        return np.array(self._times, np.float64)

    def in_namespace(self, digest: str) -> npt.NDArray[np.bool_]:
        """For each object, whether it is of that namespace."""
        names = np.frombuffer(self._names, np.uint8).reshape(-1, _NAME_BYTES)
        wanted = np.frombuffer(bytes.fromhex(digest), np.uint8)
        return np.asarray((names[:, :_NAMESPACE_BYTES] == wanted).all(axis=1))

    def _name(self, index: int) -> bytes:
        return bytes(self._names[index * _NAME_BYTES : (index + 1) * _NAME_BYTES])


@dataclass(slots=True)
class NamespaceTotal:
    """What one namespace holds."""

    namespace: str
    pages: int = 0
    stored_bytes: int = 0
    oldest_seconds: float = float("inf")
    newest_seconds: float = float("-inf")
    #: One of its objects.
    example: ObjectInfo | None = None

    def add(self, info: ObjectInfo) -> None:
        """Count one object."""
        self.pages += 1
        self.stored_bytes += info.stored_bytes
        self.oldest_seconds = min(self.oldest_seconds, info.modified_seconds)
        self.newest_seconds = max(self.newest_seconds, info.modified_seconds)
        self.example = info


def listed_objects(backend: Backend, namespace: str = "") -> Iterator[ObjectInfo]:
    """What the store lists. Raises `BackendError` if it made up a name."""
    for info in backend.list(namespace):
        try:
            check_name(info.name)
        except ConfigError as error:
            raise BackendError(f"the store lists an object it cannot have: {error}") from error
        yield info


def listed(backend: Backend, namespace: str, heard: Callable[[int], None]) -> Listing:
    """The whole listing; `heard` is told how many objects there are so far, now and then."""
    listing = Listing()
    for info in listed_objects(backend, namespace):
        listing.add(info)
        if len(listing) % 1000 == 0:
            heard(len(listing))
    return listing


def totals(objects: Iterator[ObjectInfo]) -> dict[str, NamespaceTotal]:
    """The namespaces of a listing that is read once and not kept."""
    found: dict[str, NamespaceTotal] = {}
    for info in objects:
        digest = info.name[:32]
        total = found.get(digest)
        if total is None:
            total = found[digest] = NamespaceTotal(digest)
        total.add(info)
    return found
