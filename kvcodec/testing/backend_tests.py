"""What every backend has to do, as a class of tests to subclass.

A backend's own test file needs no more than this::

    from kvcodec.testing import BackendTests

    class TestMyBackend(BackendTests):
        @pytest.fixture(autouse=True)
        def _store(self, tmp_path):
            self.root = tmp_path

        def open_backend(self):
            return MyBackend.from_url(f"my://{self.root}")

A second call of `open_backend` in one test has to reach the same objects, in another test it may
but need not. Every test uses names of its own, so a store that is never emptied will do. A
backend that cannot do all of it says so in the attributes of the class; there is no other way
round a test.
"""

# The name of a test states the behaviour; a docstring says why where that is not plain.
# ruff: noqa: D102

from __future__ import annotations

import array
import os
import time
from collections.abc import Callable
from functools import partial

from kvcodec.backend import check_name
from kvcodec.errors import BackendError, BackendTimeout
from kvcodec.testing._argument_tests import ArgumentTests
from kvcodec.testing._backend_samples import (
    fresh_name,
    fresh_names,
    fresh_namespace,
    is_sealed,
    new_buffers,
    raised,
    run_threads,
    sealed,
    skip,
)
from kvcodec.testing._lending_tests import LendingTests

__all__ = ["BackendTests"]

_CANARY = 0xA5


class BackendTests(ArgumentTests, LendingTests):
    """The contract of `kvcodec.backend.Backend`. Subclass it and give it `open_backend`.

    The other hooks, and what a backend may say it cannot do, are those of `StoreUnderTest`.
    """

    # Round trips

    def test_objects_of_any_size_come_back_as_they_were_put(self) -> None:
        sizes = [1, 2, 63, 64, 65, 4095, 4096, 4097, 65537, 1 << 20, (5 << 20) + 3]
        sizes = [size for size in sizes if size <= self.max_object_bytes]
        objects = {fresh_name(): os.urandom(size) for size in sizes}
        with self.connection() as backend:
            self.put(backend, objects)
            assert self.get(backend, list(objects), max(sizes)) == list(objects.values())
            for name, data in objects.items():
                # A buffer of just the right length is enough.
                assert self.get(backend, [name], len(data)) == [data]

    def test_an_object_of_the_largest_size_comes_back(self) -> None:
        name, data = fresh_name(), os.urandom(self.max_object_bytes)
        with self.connection() as backend:
            self.put(backend, {name: data})
            assert self.get(backend, [name], len(data)) == [data]
            gone = backend.delete([name], timeout_seconds=self.timeout_seconds)
            assert gone == [self.can_delete]

    def test_reading_leaves_the_rest_of_a_buffer_alone(self) -> None:
        name, data = fresh_name(), os.urandom(1000)
        buffer = bytearray([_CANARY]) * 5000
        with self.connection() as backend:
            self.put(backend, {name: data})
            assert self.get_into(backend, [name], [memoryview(buffer)]) == [1000]
        assert buffer[:1000] == data
        assert buffer[1000:] == bytes([_CANARY]) * 4000

    def test_a_put_of_the_same_name_replaces_the_object(self) -> None:
        self.needs(replace=True)
        name = fresh_name()
        with self.connection() as backend:
            for size in (1000, 10, 70000, 1):
                data = os.urandom(size)
                self.put(backend, {name: data})
                assert self.get(backend, [name], 80000) == [data]
                info = backend.stat(name, timeout_seconds=self.timeout_seconds)
                assert info is not None and info.stored_bytes == size
                if self.can_list:
                    assert [info.stored_bytes for info in backend.list(name[:32])] == [size]

    def test_the_last_of_two_equal_names_in_a_batch_wins(self) -> None:
        name = fresh_name()
        with self.connection() as backend:
            assert backend.put(
                [name, name],
                [memoryview(b"first"), memoryview(b"second")],
                timeout_seconds=self.timeout_seconds,
            ) == [None, None]
            assert self.get(backend, [name, name], 10) == [b"second", b"second"]

    def test_the_caller_may_use_its_memory_again_at_once(self) -> None:
        name, source = fresh_name(), bytearray(b"x" * 1000)
        with self.connection() as backend:
            self.put(backend, {name: source})
            source[:] = b"y" * 1000
            assert self.get(backend, [name], 1000) == [b"x" * 1000]

    def test_views_of_other_formats_and_parts_of_memory_are_bytes(self) -> None:
        first, second = fresh_names(2)
        words = array.array("d", [1.5, -2.0, 0.25])
        target = array.array("d", [0.0] * 3)
        with self.connection() as backend:
            self.put(backend, {first: memoryview(words), second: memoryview(b"-middle-")[1:7]})
            assert self.get_into(backend, [first], [memoryview(target)]) == [24]
            assert self.get(backend, [second], 100) == [b"middle"]
        assert target == words

    # Batches

    def test_an_empty_batch_has_an_empty_answer(self) -> None:
        with self.connection() as backend:
            assert backend.put([], [], timeout_seconds=1) == []
            assert backend.get_into([], [], timeout_seconds=1) == []
            assert backend.exists([], timeout_seconds=1) == []
            assert backend.delete([], timeout_seconds=1) == []

    def test_a_missing_object_is_none_and_moves_no_other_result(self) -> None:
        self.needs(delete=True)
        names = fresh_names(8)
        objects = {name: os.urandom(100 + index) for index, name in enumerate(names)}
        with self.connection() as backend:
            self.put(backend, objects)
            for missing in names:
                backend.delete([missing], timeout_seconds=self.timeout_seconds)
                expected = [None if name == missing else objects[name] for name in names]
                assert self.get(backend, names, 200) == expected
                assert self.exists(backend, names) == [name != missing for name in names]
                self.put(backend, {missing: objects[missing]})

    def test_a_batch_may_be_larger_than_the_batch_size(self) -> None:
        objects = {name: os.urandom(500) for name in fresh_names(130)}
        with self.connection() as backend:
            assert backend.batch_size >= 1
            self.put(backend, objects)
            assert self.exists(backend, list(objects)) == [True] * 130
            assert self.get(backend, list(objects), 500) == list(objects.values())

    def test_an_object_larger_than_its_buffer_answers_with_its_length(self) -> None:
        small, large, after = fresh_names(3)
        with self.connection() as backend:
            self.put(backend, {small: b"s" * 10, large: b"l" * 3000, after: b"a" * 20})
            buffers = [bytearray(100), bytearray(2999), bytearray(100)]
            views = [memoryview(buffer) for buffer in buffers]
            assert self.get_into(backend, [small, large, after], views) == [10, 3000, 20]
            assert buffers[0][:10] == b"s" * 10
            assert buffers[2][:20] == b"a" * 20
            assert self.get_into(backend, [large], [memoryview(bytearray(0))]) == [3000]

    # Names

    def test_exists_and_stat_agree(self) -> None:
        there, missing = fresh_names(2)
        with self.connection() as backend:
            self.put(backend, {there: b"data"})
            assert self.exists(backend, [there, missing, there]) == [True, False, True]
            assert backend.stat(missing, timeout_seconds=self.timeout_seconds) is None
            info = backend.stat(there, timeout_seconds=self.timeout_seconds)
            assert info is not None and (info.name, info.stored_bytes) == (there, 4)

    def test_what_a_store_cannot_do_it_says(self) -> None:
        name = fresh_name()
        with self.connection() as backend:
            self.put(backend, {name: b"data"})
            if not self.can_list:
                assert raised(lambda: list(backend.list(name[:32])), BackendError)
            if not self.can_delete:
                assert backend.delete([name], timeout_seconds=self.timeout_seconds) == [False]
            if not self.can_replace:
                self.put(backend, {name: b"data"})
                (other,) = backend.put([name], [memoryview(b"atad")], timeout_seconds=5)
                assert isinstance(other, BackendError)
            assert self.get(backend, [name], 10) == [b"data"]

    def test_exists_delete_list_and_stat_agree(self) -> None:
        self.needs(delete=True, list_=True)
        namespace = fresh_namespace()
        objects = {fresh_name(namespace): os.urandom(10 + index) for index in range(20)}
        names = list(objects)
        with self.connection() as backend:
            assert self.exists(backend, names) == [False] * 20
            assert backend.stat(names[0], timeout_seconds=self.timeout_seconds) is None
            self.put(backend, objects)
            gone = names[::3]
            assert backend.delete(gone, timeout_seconds=self.timeout_seconds) == [True] * len(gone)
            assert backend.delete(gone, timeout_seconds=self.timeout_seconds) == [False] * len(gone)
            left = {name: len(objects[name]) for name in names if name not in gone}
            assert {info.name: info.stored_bytes for info in backend.list(namespace)} == left
            assert self.exists(backend, names) == [name in left for name in names]
            for name in names:
                info = backend.stat(name, timeout_seconds=self.timeout_seconds)
                assert (info and (info.name, info.stored_bytes)) == (
                    (name, left[name]) if name in left else None
                )

    def test_the_leading_run_ends_at_the_first_gap(self) -> None:
        names = fresh_names(9)
        with self.connection() as backend:

            def run(asked: list[str]) -> int:
                return backend.exists_prefix(asked, timeout_seconds=self.timeout_seconds)

            assert run([]) == 0
            assert run(names) == 0
            self.put(backend, dict.fromkeys(names[:4] + names[5:], b"data"))
            assert run(names) == 4
            assert run(names[5:]) == 4
            assert run(names[4:]) == 0
            assert backend.exists_prefix(names, timeout_seconds=0) == 0

    def test_a_list_has_one_namespace_or_all(self) -> None:
        self.needs(list_=True)
        first, second = fresh_namespace(), fresh_namespace()
        names = [fresh_name(namespace) for namespace in (first, first, second)]
        with self.connection() as backend:
            self.put(backend, dict.fromkeys(names, b"data"))
            assert {info.name for info in backend.list(first)} == set(names[:2])
            assert {info.name for info in backend.list(second)} == set(names[2:])
            assert set(names) <= {info.name for info in backend.list()}
            assert list(backend.list(fresh_namespace())) == []
            for prefix in ("..", "/", "*", "nothing"):
                assert list(backend.list(prefix)) == []

    def test_a_list_outlives_the_deletion_of_what_it_lists(self) -> None:
        self.needs(delete=True, list_=True)
        namespace = fresh_namespace()
        names = {fresh_name(namespace) for _ in range(50)}
        with self.connection() as backend:
            self.put(backend, dict.fromkeys(names, b"data"))
            listed = set()
            for info in backend.list(namespace):
                listed.add(info.name)
                backend.delete([info.name], timeout_seconds=self.timeout_seconds)
            assert listed == names
            assert list(backend.list(namespace)) == []

    def test_the_time_of_writing_is_about_now(self) -> None:
        name = fresh_name()
        with self.connection() as backend:
            self.put(backend, {name: b"data"})
            info = backend.stat(name, timeout_seconds=self.timeout_seconds)
            assert info is not None
            assert abs(info.modified_seconds - time.time()) < 600

    def test_foreign_things_in_the_store_are_ignored(self) -> None:
        self.needs(list_=True)
        namespace = fresh_namespace()
        name = fresh_name(namespace)
        with self.connection() as backend:
            self.put(backend, {name: b"data"})
            if not self.plant_foreign_objects(namespace):
                skip("nobody else can write to this store")
            assert [info.name for info in backend.list(namespace)] == [name]
            assert all(check_name(info.name) for info in backend.list())
            assert self.get(backend, [name], 10) == [b"data"]
        with self.connection() as backend:
            assert [info.name for info in backend.list(namespace)] == [name]

    # Threads

    def test_concurrent_writers_of_one_name_never_mix(self) -> None:
        self.needs(replace=True)
        name, size = fresh_name(), min(300_000, self.max_object_bytes)
        with self.connection() as backend:
            self.put(backend, {name: sealed(0, size)})
            stop_at = time.monotonic() + 1.0
            failures: list[str] = []

            def write(writer: int) -> None:
                round_count = 0
                while time.monotonic() < stop_at:
                    # Objects of several lengths: a mixture shows in either.
                    data = sealed(writer * 100_000 + round_count, size - writer * 1000)
                    self.put(backend, {name: data})
                    round_count += 1

            def read() -> None:
                while time.monotonic() < stop_at:
                    (data,) = self.get(backend, [name], size)
                    if data is None and not self.replaces_atomically:
                        continue
                    if data is None or not is_sealed(data):
                        failures.append("nothing" if data is None else f"{len(data)} mixed bytes")

            run_threads([partial(write, writer) for writer in (1, 2, 3)] + [read, read])
            assert failures == []

    def test_threads_do_not_see_each_others_results(self) -> None:
        with self.connection() as backend:

            def work(worker: int) -> None:
                for _ in range(10):
                    objects = {name: sealed(worker, 2000) for name in fresh_names(8)}
                    names = list(objects)
                    self.put(backend, objects)
                    assert self.get(backend, names, 2000) == list(objects.values())
                    if self.can_delete:
                        assert all(backend.delete(names, timeout_seconds=self.timeout_seconds))
                        assert self.get(backend, names, 2000) == [None] * 8

            run_threads([partial(work, worker) for worker in range(6)])

    # Time, and the end

    def test_a_deadline_of_zero_answers_at_once(self) -> None:
        there, new = fresh_names(2)
        with self.connection() as backend:
            self.put(backend, {there: b"data"})
            started = time.monotonic()
            (put,) = backend.put([new], [memoryview(b"data")], timeout_seconds=0)
            results = self.get_into(backend, [there] * 2, new_buffers(2), timeout_seconds=0)
            assert isinstance(put, BackendTimeout)
            assert all(isinstance(result, BackendTimeout) for result in results)
            assert len(results) == 2
            assert backend.exists([there], timeout_seconds=0) == [False]
            assert backend.delete([there], timeout_seconds=0) == [False]
            assert raised(lambda: backend.stat(there, timeout_seconds=0), BackendTimeout)
            assert time.monotonic() - started < 3.0
            # What was late was not done behind the caller's back either.
            assert self.exists(backend, [there, new]) == [True, False]

    def test_a_store_that_hangs_costs_a_call_its_deadline(self) -> None:
        there, new = fresh_names(2)
        with self.connection() as backend:
            self.put(backend, {there: b"data"})
            stalled = self.stalled()
            if stalled is None:
                skip("this store cannot be made to hang")
                return
            calls: list[Callable[[], object]] = [
                partial(backend.put, [new] * 8, [memoryview(b"data")] * 8, timeout_seconds=0.5),
                partial(backend.get_into, [there] * 8, new_buffers(8), timeout_seconds=0.5),
                partial(backend.exists, [there] * 8, timeout_seconds=0.5),
                partial(backend.delete, [there] * 8, timeout_seconds=0.5),
            ]
            with stalled:
                for call in calls:
                    started = time.monotonic()
                    answers = call()
                    assert time.monotonic() - started < 3.0, call
                    assert isinstance(answers, list)
                    for answer in answers:
                        assert answer is False or isinstance(answer, BackendTimeout), call
                assert raised(lambda: backend.stat(there, timeout_seconds=0.5), BackendError)
            # It comes back by itself: no call has to be made for that, only time to pass.
            stop_at = time.monotonic() + self.timeout_seconds
            name, answer = fresh_name(), [BackendError("not asked yet")]
            while answer != [None] and time.monotonic() < stop_at:
                name = fresh_name()
                answer = backend.put([name], [memoryview(b"more")], timeout_seconds=5)
            assert self.get(backend, [name], 10) == [b"more"]

    def test_a_closed_backend_answers_with_errors(self) -> None:
        name = fresh_name()
        backend = self.open_backend()
        self.put(backend, {name: b"data"})
        backend.close()
        backend.close()
        (put,) = backend.put([name], [memoryview(b"data")], timeout_seconds=1)
        (got,) = self.get_into(backend, [name], new_buffers(1))
        assert isinstance(put, BackendError)
        assert isinstance(got, BackendError)
        assert backend.exists([name], timeout_seconds=1) == [False]
        assert backend.delete([name], timeout_seconds=1) == [False]
        assert raised(lambda: backend.stat(name, timeout_seconds=1), BackendError)
        assert raised(lambda: list(backend.list()), BackendError)
        backend.counters()

    def test_a_reopened_store_has_its_objects(self) -> None:
        if not self.keeps_objects:
            skip("objects of this store end with it")
        objects = {name: os.urandom(1000) for name in fresh_names(5)}
        with self.connection() as backend:
            self.put(backend, objects)
        with self.connection() as backend:
            assert self.get(backend, list(objects), 1000) == list(objects.values())

    def test_counters_are_whole_numbers_that_never_fall(self) -> None:
        with self.connection() as backend:
            before = dict(backend.counters())
            name = fresh_name()
            self.put(backend, {name: b"data"})
            self.get(backend, [name, fresh_name()], 10)
            after = dict(backend.counters())
            numbers = [*after.values(), *backend.gauges().values()]
        assert all(type(value) is int and value >= 0 for value in numbers)
        assert all(after[counter] >= value for counter, value in before.items())

    def test_any_sequence_of_calls_agrees_with_a_dict(self) -> None:
        from kvcodec.testing._backend_machine import compare_with_dict

        compare_with_dict(
            self.open_backend,
            keeps_objects=self.keeps_objects,
            can_delete=self.can_delete,
            can_list=self.can_list,
            can_replace=self.can_replace,
            example_count=self.model_examples,
            timeout_seconds=self.timeout_seconds,
        )
