"""Sequences of backend calls, made up and shortened by hypothesis, compared with a dict."""

from __future__ import annotations

import os
from collections.abc import Callable

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from kvcodec.backend import Backend

__all__ = ["BackendMachine", "compare_with_dict"]

BUFFER_BYTES = 5000

# Few names, so that calls meet; several of one batch may be the same.
_digests = st.integers(0, 5).map(lambda number: f"{number:064x}")
_batches = st.lists(_digests, max_size=6)
_objects = st.builds(
    lambda size, seed: bytes((seed + index) & 255 for index in range(size)),
    st.one_of(st.integers(1, 16), st.integers(1, BUFFER_BYTES)),
    st.integers(0, 255),
)


def compare_with_dict(
    open_backend: Callable[[], Backend],
    *,
    keeps_objects: bool,
    can_delete: bool,
    can_list: bool,
    can_replace: bool,
    example_count: int,
    timeout_seconds: float,
) -> None:
    """Run sequences of calls against the store and a dict; AssertionError where they differ."""

    class Machine(BackendMachine):
        """hypothesis makes one without arguments for each sequence."""

        def __init__(self) -> None:
            super().__init__(open_backend, timeout_seconds)

    Machine.keeps_objects = keeps_objects
    Machine.can_delete = can_delete
    Machine.can_list = can_list
    Machine.can_replace = can_replace
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=example_count,
            stateful_step_count=30,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


class BackendMachine(RuleBasedStateMachine):
    """One sequence of calls, of those that the store can do."""

    keeps_objects = True
    can_delete = True
    can_list = True
    can_replace = True

    def __init__(self, open_backend: Callable[[], Backend], timeout_seconds: float) -> None:
        super().__init__()
        self.open_backend = open_backend
        self.timeout_seconds = timeout_seconds
        self.backend = open_backend()
        # A namespace for each sequence: the store need not be emptied in between.
        self.namespace = os.urandom(16).hex()
        self.model: dict[str, bytes] = {}

    def _named(self, digests: list[str]) -> list[str]:
        return [f"{self.namespace}/{digest}" for digest in digests]

    @rule(entries=st.lists(st.tuples(_digests, _objects), max_size=6))
    def put(self, entries: list[tuple[str, bytes]]) -> None:
        """Some names may be there already, or twice."""
        names = self._named([digest for digest, _ in entries])
        views = [memoryview(data) for _, data in entries]
        results = self.backend.put(names, views, timeout_seconds=self.timeout_seconds)
        wanted = {name: bytes(view) for name, view in zip(names, views, strict=True)}
        refused = {
            name
            for name, data in wanted.items()
            if not self.can_replace and self.model.get(name, data) != data
        }
        assert [result is not None for result in results] == [name in refused for name in names]
        self.model.update((name, wanted[name]) for name in wanted.keys() - refused)

    @rule(digests=_batches)
    def get(self, digests: list[str]) -> None:
        """Some may be missing."""
        names = self._named(digests)
        buffers = [memoryview(bytearray(BUFFER_BYTES)) for _ in names]
        results = self.backend.get_into(names, buffers, timeout_seconds=self.timeout_seconds)
        found = [
            result if result is None else bytes(buffer[:result])
            for result, buffer in zip(results, buffers, strict=True)
            if not isinstance(result, Exception)
        ]
        assert found == [self.model.get(name) for name in names], results

    @rule(digests=_batches)
    def exists(self, digests: list[str]) -> None:
        """One answer for each."""
        names = self._named(digests)
        results = self.backend.exists(names, timeout_seconds=self.timeout_seconds)
        assert results == [name in self.model for name in names]

    @precondition(lambda self: self.can_delete)
    @rule(digests=_batches)
    def delete(self, digests: list[str]) -> None:
        """The second of two equal names finds nothing."""
        names = self._named(digests)
        results = self.backend.delete(names, timeout_seconds=self.timeout_seconds)
        assert results == [self.model.pop(name, None) is not None for name in names]

    @rule(digest=_digests)
    def stat(self, digest: str) -> None:
        """None, or the right length."""
        (name,) = self._named([digest])
        info = self.backend.stat(name, timeout_seconds=self.timeout_seconds)
        expected = self.model.get(name)
        assert (info and info.stored_bytes) == (expected and len(expected))

    @precondition(lambda self: self.can_list)
    @rule()
    def list_all(self) -> None:
        """Exactly what is there."""
        listed = [(info.name, info.stored_bytes) for info in self.backend.list(self.namespace)]
        assert sorted(listed) == sorted((name, len(data)) for name, data in self.model.items())

    @precondition(lambda self: self.keeps_objects)
    @rule()
    def reopen(self) -> None:
        """Nothing is lost."""
        self.backend.close()
        self.backend = self.open_backend()

    def teardown(self) -> None:
        """Leave the store as it was."""
        self.backend.delete(list(self.model), timeout_seconds=self.timeout_seconds)
        self.backend.close()
