"""The part of the conformance suite about arguments: names, buffers, options."""

# The name of a test states the behaviour; a docstring says why where that is not plain.

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from kvcodec.errors import ConfigError
from kvcodec.testing._backend_samples import WRONG_NAMES, fresh_name, fresh_names, raised, skip
from kvcodec.testing._store_under_test import StoreUnderTest

__all__ = ["ArgumentTests"]


class ArgumentTests(StoreUnderTest):
    """A broken batch is refused whole, before anything is done; so is a broken URL."""

    def test_a_wrong_name_is_a_config_error_everywhere(self) -> None:
        buffer = memoryview(bytearray(4))
        with self.connection() as backend:
            for wrong in WRONG_NAMES:
                names = [fresh_name(), wrong]
                pairs = [buffer] * 2
                calls: list[Callable[[], object]] = [
                    partial(backend.put, names, pairs, timeout_seconds=1),
                    partial(backend.get_into, names, pairs, timeout_seconds=1),
                    partial(backend.exists, names, timeout_seconds=1),
                    partial(backend.delete, names, timeout_seconds=1),
                    partial(backend.stat, wrong, timeout_seconds=1),
                ]
                for call in calls:
                    assert raised(call, ConfigError), f"{wrong!r} was accepted"
                # A broken batch is refused as a whole, before anything is done.
                assert self.exists(backend, names[:1]) == [False]

    def test_batches_of_unequal_length_are_refused(self) -> None:
        names, view = fresh_names(2), memoryview(bytearray(b"data"))
        with self.connection() as backend:
            assert raised(lambda: backend.put(names, [view], timeout_seconds=1), ValueError)
            assert raised(lambda: backend.get_into(names, [view], timeout_seconds=1), ValueError)
            assert self.exists(backend, names) == [False, False]

    def test_an_empty_object_is_refused(self) -> None:
        """A page is never empty, while an empty file is what a crash leaves behind."""
        name = fresh_name()
        with self.connection() as backend:
            assert raised(
                lambda: backend.put([name], [memoryview(b"")], timeout_seconds=1), ConfigError
            )
            assert self.exists(backend, [name]) == [False]

    def test_a_buffer_that_cannot_be_written_is_refused(self) -> None:
        name = fresh_name()
        with self.connection() as backend:
            self.put(backend, {name: b"data"})
            view = memoryview(b"1234")
            assert raised(
                lambda: backend.get_into([name], [view], timeout_seconds=1), (ValueError, TypeError)
            )

    def test_an_unknown_option_is_a_config_error(self) -> None:
        case = self.url_with_unknown_option()
        if case is None:
            skip("url_with_unknown_option() names no URL")
            return
        backend_class, url = case
        assert raised(lambda: backend_class.from_url(url), ConfigError)

    def test_a_store_that_must_exist_is_not_made(self) -> None:
        case = self.url_of_missing_store()
        if case is None:
            skip("url_of_missing_store() names no URL")
            return
        backend_class, url = case
        # Twice: the first attempt must not have made what the second then finds.
        for _ in range(2):
            assert raised(lambda: backend_class.from_url(url, create=False), ConfigError)
        backend_class.from_url(url).close()
