"""Encoded pages in memory, in front of any store."""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager

from kvcodec.backend import (
    Backend,
    Deadline,
    GetResult,
    ObjectInfo,
    PutResult,
    check_name,
    checked_buffers,
    checked_names,
    checked_objects,
    closed_error,
    display_url,
    open_backend,
    parse_options,
)
from kvcodec.errors import ConfigError
from kvcodec_backends._tier_shared import Tier, TierOptions

__all__ = ["TierBackend"]


class TierBackend(Backend):
    """``tier+ram://?bytes=4GiB&store=file:///var/cache/kvcodec``: pages in memory, then in a store.

    `store` is the URL of the store behind; in it ``%``, ``&`` and ``#`` are written as ``%25``,
    ``%26`` and ``%23``. `bytes` bounds the memory, with what is kept about each page. Reads that
    find a page in memory do not reach the store; others are kept on their way.

    With `mode` ``write_through``, the default, a put answers what the store answers, and memory
    holds what the store took. With ``write_back`` a put answers once the page is in memory, and a
    thread stores it afterwards: a crash loses what was not stored, at most `dirty_bytes` (a
    quarter of the memory unless given), and so does a store that is away for longer than
    `flush_timeout_seconds` (10) while the last backend of the URL closes.

    Backends of one URL in one process share their memory. What other processes replace or delete
    in the store is not noticed while the page is in memory.
    """

    def __init__(self, url: str, options: TierOptions, store_url: str, *, create: bool) -> None:
        self._url = display_url(url)
        self._is_closed = False
        with _tiers_lock:
            tier = _tiers.get(url)
            if tier is None:
                tier = Tier(open_backend(store_url, create=create), options, url)
                _tiers[url] = tier
            tier.users += 1
        self._tier = tier
        self.batch_size = tier.store.backend.batch_size

    @classmethod
    def from_url(cls, url: str, *, create: bool = True) -> TierBackend:
        """Open the tier of a URL, and the store behind it."""
        allowed = ["bytes", "mode", "dirty_bytes", "flush_timeout_seconds", "store"]
        parts, options = parse_options(url, allowed)
        if parts.scheme != "tier+ram" or parts.netloc or parts.path or parts.fragment:
            raise ConfigError(
                f"{display_url(url)}: wanted is tier+ram://?bytes=...&store=..., with &, # and % "
                "in the store's URL written as %26, %23 and %25"
            )
        store_url = options.get("store", "")
        if "://" not in store_url:
            raise ConfigError(
                f"{display_url(url)}: store has to be the URL of a store, as in "
                "store=file:///var/cache/kvcodec"
            )
        return cls(url, TierOptions.parsed(url, options), store_url, create=create)

    @property
    def dirty_bytes(self) -> int:
        """Bytes of memory whose pages are not in the store yet."""
        return self._tier.writer.dirty_bytes

    @property
    def used_bytes(self) -> int:
        """Bytes of memory in use, by pages and by what is kept about them."""
        return self._tier.memory.used_bytes

    def put(
        self, names: Sequence[str], objects: Sequence[memoryview], *, timeout_seconds: float
    ) -> list[PutResult]:
        """Store objects, or take copies of them to store them later."""
        pairs = checked_objects(names, objects)
        deadline = Deadline(timeout_seconds)
        if self._is_closed:
            return [closed_error(self._url) for _ in pairs]
        if deadline.passed():
            return [deadline.error("put", name) for name, _ in pairs]
        if not self._tier.options.write_back:
            return self._tier.put_through(pairs, deadline)
        results: list[PutResult] = []
        for name, view in pairs:
            if deadline.passed():
                results.append(deadline.error("put", name))
            elif self._tier.writer.takes(len(view)):
                results.append(self._tier.writer.put(name, view, deadline))
            else:
                results += self._tier.put_through([(name, view)], deadline)
        return results

    def get_into(
        self, names: Sequence[str], buffers: Sequence[memoryview], *, timeout_seconds: float
    ) -> list[GetResult]:
        """Copy objects out of memory, and read the others from the store in one batch."""
        pairs = checked_buffers(names, buffers)
        deadline = Deadline(timeout_seconds)
        if self._is_closed:
            return [closed_error(self._url) for _ in pairs]
        results: list[GetResult] = []
        missing: list[int] = []
        for index, (name, buffer) in enumerate(pairs):
            if deadline.passed():
                results.append(deadline.error("get", name))
                continue
            found = self._tier.read(name, buffer)
            results.append(found)
            if found is None:
                missing.append(index)
        answers = self._tier.fill([pairs[index] for index in missing], deadline)
        for index, answer in zip(missing, answers, strict=True):
            results[index] = answer
        return results

    def lend(self, name: str) -> AbstractContextManager[memoryview] | None:
        """An object of the memory, pinned meanwhile."""
        return None if self._is_closed else self._tier.lend(check_name(name))

    def exists(self, names: Sequence[str], *, timeout_seconds: float) -> list[bool]:
        """Whether each object is in memory or in the store."""
        checked = checked_names(names)
        deadline = Deadline(timeout_seconds)
        if self._is_closed or deadline.passed():
            return [False] * len(checked)
        found = self._tier.holds(checked)
        missing = [name for name, there in zip(checked, found, strict=True) if not there]
        answers = iter(self._tier.store.exists(missing, deadline.remaining_seconds()))
        return [there or next(answers) for there in found]

    def exists_prefix(self, names: Sequence[str], *, timeout_seconds: float) -> int:
        """The store is asked for what is not in memory, and may stop at its first gap."""
        checked = checked_names(names)
        deadline = Deadline(timeout_seconds)
        if self._is_closed or deadline.passed():
            return 0
        found = self._tier.holds(checked)
        places = [index for index, there in enumerate(found) if not there]
        missing = [checked[index] for index in places]
        count = self._tier.store.exists_prefix(missing, deadline.remaining_seconds())
        return places[count] if count < len(places) else len(checked)

    def delete(self, names: Sequence[str], *, timeout_seconds: float) -> list[bool]:
        """Remove objects from memory and from the store."""
        checked = checked_names(names)
        deadline = Deadline(timeout_seconds)
        if self._is_closed or deadline.passed():
            return [False] * len(checked)
        return self._tier.delete(checked, deadline)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """What the store lists, and what it has not been given yet."""
        if self._is_closed:
            raise closed_error(self._url)
        return self._tier.objects(prefix)

    def stat(self, name: str, *, timeout_seconds: float) -> ObjectInfo | None:
        """One object's description: the store's, unless it has not been given it yet."""
        check_name(name)
        deadline = Deadline(timeout_seconds)
        if self._is_closed:
            raise closed_error(self._url)
        if deadline.passed():
            raise deadline.error("stat", name)
        pending = self._tier.pending_info(name)
        return pending or self._tier.store.stat(name, deadline.remaining_seconds())

    @property
    def origin(self) -> Backend:
        """The store behind."""
        return self._tier.store.backend.origin

    def close(self) -> None:
        """The last backend of the URL stores what is left, and frees the memory."""
        with _tiers_lock:
            if self._is_closed:
                return
            self._is_closed = True
            self._tier.users -= 1
            if not self._tier.users:
                # Under the lock: who opens this URL next finds everything in the store.
                _tiers.pop(self._tier.url, None)
                self._tier.close()

    def counters(self) -> Mapping[str, int]:
        """What happened since the first backend of the URL was opened; the store's own counters
        begin with ``store.``.
        """
        own = dict(self._tier.counts)
        behind = self._tier.store.backend.counters()
        return own | {f"store.{name}": count for name, count in behind.items()}

    def gauges(self) -> Mapping[str, int]:
        """Bytes of memory in use, and how many there may be; the store's own begin with
        ``store.``.
        """
        own = {"stored_bytes": self.used_bytes, "limit_bytes": self._tier.options.limit_bytes}
        behind = self._tier.store.backend.gauges()
        return own | {f"store.{name}": number for name, number in behind.items()}


_tiers: dict[str, Tier] = {}
# Reentrant: the store behind a tier may be a tier.
_tiers_lock = threading.RLock()


def _after_fork() -> None:
    """In a child: locks may be held by threads that are not there, and pages are the parent's."""
    global _tiers_lock
    _tiers_lock = threading.RLock()
    for tier in _tiers.values():
        tier.reset()


def _at_exit() -> None:
    """A process that ends without closing its backends still stores what it was given.

    The last first: a tier is noted after the tier that may be its store.
    """
    for tier in reversed(list(_tiers.values())):
        tier.writer.close(tier.options.flush_timeout_seconds)


os.register_at_fork(after_in_child=_after_fork)
atexit.register(_at_exit)
