"""The part of the conformance suite about objects that are read where they lie in memory."""

# The name of a test states the behaviour; a docstring says why where that is not plain.

from __future__ import annotations

import os

from kvcodec.testing._backend_samples import fresh_name, skip
from kvcodec.testing._store_under_test import StoreUnderTest

__all__ = ["LendingTests"]


class LendingTests(StoreUnderTest):
    """`Backend.lend`, which may always answer None."""

    def test_what_is_lent_is_what_was_put_whatever_happens_meanwhile(self) -> None:
        name, data, other = fresh_name(), os.urandom(5000), os.urandom(4000)
        with self.connection() as backend:
            self.put(backend, {name: data})
            lent = backend.lend(name)
            if lent is None:
                skip("this store lends nothing")
                return
            with lent as view:
                assert view.readonly
                assert view == data
                if self.can_replace:
                    self.put(backend, {name: other})
                if self.can_delete:
                    assert backend.delete([name], timeout_seconds=self.timeout_seconds) == [True]
                for _ in range(20):  # whose memory might be that
                    self.put(backend, {fresh_name(): os.urandom(5000)})
                assert view == data

    def test_nothing_is_lent_that_is_not_there(self) -> None:
        name = fresh_name()
        backend = self.open_backend()
        assert backend.lend(name) is None
        self.put(backend, {name: b"data"})
        if self.can_delete:
            backend.delete([name], timeout_seconds=self.timeout_seconds)
            assert backend.lend(name) is None
            self.put(backend, {name: b"data"})
        backend.close()
        assert backend.lend(name) is None
