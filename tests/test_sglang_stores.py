"""SGLang's real controller in front of every real store: what was backed up comes back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from faulty_proxy import FaultyProxy
from real_stores import STORES, real_store
from server_redis import RedisServer
from sglang_harness import HAS_SGLANG, HiCacheSession, make_tokens
from sglang_round_trip import bits_of, expected_rows, round_trip

from kvcodec.layout import DType, Role

pytestmark = pytest.mark.skipif(not HAS_SGLANG, reason="SGLang is not installed: make sglang")

ROLES = {"k": Role.KEY, "v": Role.VALUE}
#: Long enough for any store on a busy machine; what a deadline does is tested elsewhere.
PATIENT = {
    "exists_timeout_seconds": 20,
    "prefetch_timeout_seconds": 20,
    "backup_timeout_seconds": 20,
}


def is_asked_again(counters: dict[str, int]) -> bool:
    """Whether both breakers are closed."""
    return all(
        counters.get(f"{name}_breaker.opened") == counters.get(f"{name}_breaker.closed")
        for name in ("read", "write")
    )


@pytest.mark.parametrize("name", STORES)
def test_pages_come_back_from_every_real_store(name: str, tmp_path: Path):
    """Raw bit for bit, kv4 exactly as the reference codec has it, hence within its bound."""
    with real_store(name, tmp_path) as url:
        for preset in ("raw", "kv4"):
            # Same keys, another tenant: the second preset must not find the pages of the first.
            extra = {"url": url, "preset": preset, "salt": preset, **PATIENT}
            _, original, rows, counters = round_trip(tmp_path, {}, extra=extra)
            for role, before in original.rows.items():
                expected = bits_of(before)
                if preset != "raw":
                    expected = expected_rows(expected, ROLES[role], preset, DType.BF16, 16)
                assert np.array_equal(bits_of(rows.rows[role]), expected)
            assert counters["backup.stored"] == counters["prefetch.hit"] == 8
            assert not [name for name in counters if name.startswith("sglang.")]


@pytest.mark.parametrize("rate", [0, 10_000])
def test_a_network_that_fails_costs_hits_and_not_the_engine(rate: int, tmp_path: Path):
    """A black hole and 10 KB/s, each between backup and prefetch and back again."""
    with RedisServer(tmp_path) as server, FaultyProxy("127.0.0.1", server.port) as proxy:
        extra = {
            "url": f"redis://127.0.0.1:{proxy.port}",
            "preset": "raw",
            "exists_timeout_seconds": 0.3,
            "prefetch_timeout_seconds": 0.5,
            "backup_timeout_seconds": 0.5,
            "breaker_cooldown_seconds": 0.1,
        }
        with HiCacheSession(backend="kvcodec", extra=extra, page_size=64) as session:
            tokens = make_tokens(1024, seed=3)
            original = session.backup(tokens, seed=3)
            session.evict()
            proxy.rate = rate
            result = session.prefetch(tokens)
            assert result.storage_hit_tokens < 1024
            if result.rows is not None:
                assert result.rows.equals(original.first(result.rows.token_count))
            session.evict()
            session.backup(make_tokens(1024, seed=4), seed=4)
            proxy.rate = None
            session.evict()
            session.pump(lambda: is_asked_again(session.storage.counters()), "recovery")
            result = session.prefetch(tokens)
            assert result.storage_hit_tokens == 1024
            assert result.rows is not None
            assert result.rows.equals(original)
