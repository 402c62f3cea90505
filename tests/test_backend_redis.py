"""RedisBackend on a real Redis: the conformance suite, URLs, and how objects lie in the server."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing
from pathlib import Path

import pytest
from real_server import free_port
from server_redis import RedisServer, certificates
from sglang_harness import HAS_SGLANG
from sglang_round_trip import PAGES, round_trip

from kvcodec.backend import Backend, open_backend
from kvcodec.errors import BackendError, BackendTimeout, ConfigError
from kvcodec.testing import BackendTests
from kvcodec_backends.redis import RedisBackend

NAMES = [f"{7:032x}/{number:064x}" for number in range(4)]
KEYS = [f"kvcodec:{name}" for name in NAMES]


def opened(url: str) -> closing[RedisBackend]:
    return closing(RedisBackend.from_url(url))


def put(backend: Backend, name: str, data: bytes = b"data") -> None:
    assert backend.put([name], [memoryview(data)], timeout_seconds=10) == [None]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("redis")) as started:
        yield started


class RedisConformance(BackendTests):
    model_examples = 10

    @pytest.fixture(autouse=True)
    def _store(self, server: RedisServer) -> None:
        self.server = server
        self.url = server.url

    def open_backend(self) -> Backend:
        return RedisBackend.from_url(self.url)

    def plant_foreign_objects(self, namespace: str) -> bool:
        name = f"kvcodec:{namespace}/{'0' * 63}"
        self.server.cli("SET", f"{name}1", "short")
        self.server.cli("HSET", f"{name}2", "field", "value")
        self.server.cli("SET", f"{name}3:more", "not a name of ours")
        self.server.cli("SET", f"other:{namespace}/{'0' * 64}", "of another prefix, long enough")
        return True

    def url_with_unknown_option(self) -> tuple[type[Backend], str]:
        return RedisBackend, f"{self.url}?prefetch=1"

    def stalled(self) -> AbstractContextManager[None]:
        return self.server.stalled()


class TestConformance(RedisConformance):
    pass


class TestConformanceOnASocket(RedisConformance):
    model_examples = 2

    def stalled(self) -> None:
        """It is the same server."""

    def open_backend(self) -> Backend:
        return RedisBackend.from_url(self.server.unix_url)


# --- URLs


@pytest.mark.parametrize(
    "url",
    [
        "redis://",
        "redis:///0",
        "redis://127.0.0.1:99999/",
        "redis://127.0.0.1/one",
        "redis://127.0.0.1/-1",
        "redis://127.0.0.1/0/1",
        "redis://127.0.0.1?db=1",
        "redis://127.0.0.1?ssl_ca_certs=/etc/hosts",
        "redis://127.0.0.1?max_connections=0",
        "redis://127.0.0.1?max_connections=many",
        "redis://127.0.0.1?ttl_seconds=-1",
        "redis://127.0.0.1?ttl_seconds=1.5",
        "redis://127.0.0.1?prefix=a&prefix=b",
        "redis://127.0.0.1#part",
        "redis+tcp://127.0.0.1",
        "redis+unix://run/redis.sock",
        "redis+unix:///run/redis.sock?db=one",
        "rediss://127.0.0.1?ssl_ca_certs=/no/such/file",
        "rediss://127.0.0.1?ssl_certfile=/etc/hosts",
        "rediss://127.0.0.1?ssl_check_hostname=no",
    ],
)
def test_a_url_that_cannot_be_honoured_is_a_config_error(url: str):
    with pytest.raises(ConfigError):
        RedisBackend.from_url(url)


def test_the_schemes_are_registered(server: RedisServer):
    for url in (server.url, server.unix_url):
        open_backend(url).close()
    with pytest.raises(ConfigError, match="no such file"):
        open_backend("rediss://127.0.0.1?ssl_ca_certs=/no/such/file")


def test_a_database_is_chosen_by_number(server: RedisServer):
    for number, url in ((3, f"{server.url}/3"), (4, f"{server.unix_url}?db=4")):
        with opened(url) as backend:
            put(backend, NAMES[0])
        assert server.cli("-n", str(number), "STRLEN", KEYS[0]) == b"12\n"
        assert server.cli("STRLEN", KEYS[0]) == b"0\n"
    with pytest.raises(ConfigError, match="DB index"):
        RedisBackend.from_url(f"{server.url}/99")


def test_prefixes_keep_stores_apart(server: RedisServer):
    with opened(f"{server.url}?prefix=a%5B*:") as one, opened(f"{server.url}?prefix=a%5Bb:") as two:
        put(one, NAMES[0])
        put(two, NAMES[1])
        assert server.cli("EXISTS", f"a[*:{NAMES[0]}") == b"1\n"
        assert [info.name for info in one.list()] == [NAMES[0]]
        assert [info.name for info in two.list()] == [NAMES[1]]
        assert one.exists(NAMES[:2], timeout_seconds=5) == [True, False]


def test_objects_end_after_their_time_to_live(server: RedisServer):
    with opened(f"{server.url}?ttl_seconds=100") as backend:
        put(backend, NAMES[0])
        assert 90 <= int(server.cli("TTL", KEYS[0])) <= 100
    with opened(server.url) as backend:
        put(backend, NAMES[0])
        assert int(server.cli("TTL", KEYS[0])) == -1


def test_a_value_is_the_object_and_when_it_was_written(server: RedisServer):
    with opened(server.url) as backend:
        put(backend, NAMES[0])
    value = server.cli("GET", KEYS[0])[:-1]
    assert value[:4] == b"data"
    assert abs(int.from_bytes(value[4:], "little") / 1000 - time.time()) < 60


def test_no_more_connections_than_allowed(server: RedisServer):
    with opened(f"{server.url}?max_connections=1") as backend:
        put(backend, NAMES[0])
        with server.stalled():
            waits = threading.Thread(target=lambda: backend.exists(NAMES[:1], timeout_seconds=2.0))
            waits.start()
            while backend._channels._idle:  # until the other thread has the connection
                time.sleep(0.01)
            (answer,) = backend.put(NAMES[:1], [memoryview(b"data")], timeout_seconds=0.3)
            waits.join()
        assert isinstance(answer, BackendTimeout)
        assert "max_connections" in str(answer)
        assert backend.counters()["opened_connections"] == 1


def test_an_oversized_object_is_not_sent(server: RedisServer):
    def sent_bytes() -> int:
        (line,) = [
            line
            for line in server.cli("INFO", "stats").splitlines()
            if line.startswith(b"total_net_output_bytes:")
        ]
        return int(line.partition(b":")[2])

    with opened(server.url) as backend:
        put(backend, NAMES[0], bytes(10_000_000))
        before = sent_bytes()
        buffer = memoryview(bytearray(1000))
        assert backend.get_into(NAMES[:1], [buffer], timeout_seconds=5) == [10_000_000]
        assert sent_bytes() - before < 100_000


# --- TLS


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    directory = tmp_path_factory.mktemp("tls")
    certificates(directory)
    port = free_port()
    files = [f"--tls-cert-file {directory}/server.pem", f"--tls-key-file {directory}/server.key"]
    options = f"--port 0 --tls-port {port} --tls-ca-cert-file {directory}/ca.pem {' '.join(files)}"
    with RedisServer(directory, *options.split()) as started:
        started.directory = directory
        started.tls_url = f"rediss://127.0.0.1:{port}"
        yield started


def client_options(directory: Path) -> str:
    return f"ssl_certfile={directory}/client.pem&ssl_keyfile={directory}/client.key"


class TestConformanceWithTLS(RedisConformance):
    model_examples = 3

    @pytest.fixture(autouse=True)
    def _store(self, tls: RedisServer) -> None:
        self.server = tls
        files = f"ssl_ca_certs={tls.directory}/ca.pem&{client_options(tls.directory)}"
        self.url = f"{tls.tls_url}?{files}"

    def url_with_unknown_option(self) -> tuple[type[Backend], str]:
        return RedisBackend, f"{self.url}&ssl=1"


def test_a_server_of_another_ca_or_name_is_refused(tls: RedisServer):
    client = client_options(tls.directory)
    for options in ("", f"&ssl_ca_certs={tls.directory}/other-ca.pem"):
        with pytest.raises(ConfigError, match="certificate verify failed"):
            RedisBackend.from_url(f"{tls.tls_url}?{client}{options}")
    named = tls.tls_url.replace("127.0.0.1", "localhost")
    trusted = f"{client}&ssl_ca_certs={tls.directory}/ca.pem"
    with pytest.raises(ConfigError, match="localhost"):
        RedisBackend.from_url(f"{named}?{trusted}")
    with opened(f"{named}?{trusted}&ssl_check_hostname=0") as backend:
        put(backend, NAMES[0])


def test_a_client_without_a_certificate_is_refused_by_the_server(tls: RedisServer):
    with opened(f"{tls.tls_url}?ssl_ca_certs={tls.directory}/ca.pem") as backend:
        (answer,) = backend.put(NAMES[:1], [memoryview(b"data")], timeout_seconds=5)
    assert isinstance(answer, BackendError)
    # The server's reason is lost where it hangs up while the request is still being sent.
    said = str(answer).lower().replace("_", " ")
    assert any(why in said for why in ("certificate required", "eof occurred", "reset", "pipe"))


# --- Pages


@pytest.mark.skipif(not HAS_SGLANG, reason="SGLang is not installed; make sglang")
@pytest.mark.parametrize("preset", ["raw", "kv4"])
def test_pages_pass_through_sglangs_controller(server: RedisServer, tmp_path: Path, preset: str):
    """Device, host, Redis, host, device: bit for bit, or in a quarter of the bytes."""
    options = {"url": f"{server.url}/5?prefix={preset}:", "preset": preset}
    _, original, rows, counters = round_trip(tmp_path, options, kind="mha", layout="page_first")
    assert rows.equals(original) == (preset == "raw")
    assert counters["prefetch.hit"] == PAGES
    with opened(options["url"]) as backend:
        stored_bytes = sum(info.stored_bytes for info in backend.list())
    raw_bytes = sum(each.nbytes for each in original.rows.values())
    assert stored_bytes < (1.5 if preset == "raw" else 0.5) * raw_bytes
