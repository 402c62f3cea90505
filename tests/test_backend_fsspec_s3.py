"""FsspecBackend on real S3 servers: Ceph's, and JuiceFS's gateway to a volume."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import server_juicefs
import server_s3
from real_server import RealServer
from server_juicefs import juicefs_volume
from server_s3 import S3Server, s3_server

from kvcodec.backend import Backend, open_backend
from kvcodec.errors import BackendError, ConfigError
from kvcodec.testing import BackendTests
from kvcodec.testing._backend_samples import fresh_name, is_sealed, run_threads, sealed
from kvcodec_backends.fsspec import FsspecBackend


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with s3_server(tmp_path_factory.mktemp("s3")) as server:
        yield server


def url_of(server: S3Server, path: str, secret: str = server_s3.PASSWORD, more: str = "") -> str:
    endpoint = quote(server.endpoint, safe="")
    login = f"key={server_s3.USER}&secret={secret}"
    return f"fsspec+s3://{path}?endpoint_url={endpoint}&{login}{more}"


class TestCeph(BackendTests):
    model_examples = 4

    @pytest.fixture(autouse=True)
    def _store(self, server: S3Server, tmp_path: Path) -> None:
        self.server = server
        self.name = tmp_path.name

    def open_backend(self) -> Backend:
        return open_backend(url_of(self.server, f"pages/{self.name}"))

    def url_with_unknown_option(self) -> tuple[type[Backend], str]:
        return FsspecBackend, url_of(self.server, "pages", more="&max_bytes=1")

    def url_of_missing_store(self) -> tuple[type[Backend], str]:
        return FsspecBackend, url_of(self.server, "typo")

    def stalled(self) -> AbstractContextManager[None]:
        return self.server.gateway.stalled()


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RealServer, str]]:
    """JuiceFS's S3 server, and the URL of its one bucket."""
    with (
        juicefs_volume(tmp_path_factory.mktemp("juicefs")) as volume,
        volume.gateway() as (process, port),
    ):
        endpoint = quote(f"http://127.0.0.1:{port}", safe="")
        login = f"key={server_juicefs.USER}&secret={server_juicefs.PASSWORD}"
        yield process, f"fsspec+s3://{volume.name}/pages?endpoint_url={endpoint}&{login}"


class TestJuiceFSGateway(BackendTests):
    model_examples = 4

    @pytest.fixture(autouse=True)
    def _store(self, gateway: tuple[RealServer, str]) -> None:
        self.process, self.url = gateway

    def open_backend(self) -> Backend:
        return open_backend(self.url)

    def stalled(self) -> AbstractContextManager[None]:
        return self.process.stalled()

    def test_concurrent_writers_of_one_name_never_mix(self) -> None:
        """They do here: this gateway deletes what is replaced under its readers and sends zeros in
        its place, and answers some of the writers with errors. What it keeps is whole, and a page's
        own checksums find out the rest.
        """
        name, size = fresh_name(), 300_000
        with self.connection() as backend:

            def write(writer: int) -> None:
                for number in range(10):
                    data = memoryview(sealed(writer * 100 + number, size - writer * 1000))
                    backend.put([name], [data], timeout_seconds=self.timeout_seconds)

            run_threads([partial(write, writer) for writer in (1, 2, 3)])
            (data,) = self.get(backend, [name], size)
            assert data is not None and is_sealed(data)


NAMES = [f"{'ab' * 16}/{number:064x}" for number in range(20)]


def put(backend: Backend, name: str, data: bytes = b"data") -> Any:
    return backend.put([name], [memoryview(data)], timeout_seconds=10)[0]


def get(backend: Backend, name: str) -> Any:
    buffer = memoryview(bytearray(100))
    (result,) = backend.get_into([name], [buffer], timeout_seconds=10)
    return bytes(buffer[:result]) if isinstance(result, int) else result


def test_wrong_credentials_stop_at_the_door(server: S3Server):
    with pytest.raises(ConfigError, match="SignatureDoesNotMatch") as caught:
        open_backend(url_of(server, "pages", secret="something-else"))
    assert "something-else" not in str(caught.value)


def test_a_missing_bucket_is_made_or_named(server: S3Server):
    url = url_of(server, "another-bucket/pages")
    with pytest.raises(ConfigError, match="no bucket or container 'another-bucket'"):
        open_backend(url, create=False)
    backend = open_backend(url)
    assert put(backend, NAMES[0]) is None
    assert get(open_backend(url, create=False), NAMES[0]) == b"data"


def test_a_bucket_can_be_made_in_a_region(server: S3Server):
    """Ceph knows no such region and says so: that it was asked is what is to be seen."""
    with pytest.raises(ConfigError, match=r"cannot be made: .*InvalidLocationConstraint"):
        open_backend(url_of(server, "regional", more="&region=eu-west-3"))


def test_a_bucket_that_cannot_be_made_is_a_config_error(gateway: tuple[RealServer, str]):
    _, url = gateway
    location, _, options = url.partition("?")
    protocol = location.partition("://")[0]
    with pytest.raises(ConfigError, match="InvalidBucketName; this server has no bucket"):
        open_backend(f"{protocol}://another-bucket/pages?{options}")


def test_a_server_that_is_away_comes_back(server: S3Server):
    backend = open_backend(url_of(server, "pages/away"))
    assert put(backend, NAMES[0]) is None
    server.gateway.kill()
    try:
        opened_meanwhile = open_backend(url_of(server, "pages/away"))
        for each in (backend, opened_meanwhile):
            assert isinstance(put(each, NAMES[1]), BackendError)
            assert isinstance(get(each, NAMES[0]), BackendError)
            assert each.exists([NAMES[0]], timeout_seconds=5) == [False]
            assert each.delete([NAMES[0]], timeout_seconds=5) == [False]
            with pytest.raises(BackendError):
                each.stat(NAMES[0], timeout_seconds=5)
            with pytest.raises(BackendError):
                list(each.list())
            assert each.counters()["failed_requests"] > 3
    finally:
        server.gateway.start()
    for each in (backend, opened_meanwhile):
        assert get(each, NAMES[0]) == b"data"
        assert put(each, NAMES[1]) is None


def test_a_list_reaches_beyond_one_page(server: S3Server):
    """A store lists a thousand keys at a time."""
    backend = open_backend(url_of(server, "pages/many"))
    names = [f"{'cd' * 16}/{number:064x}" for number in range(1100)]
    views = [memoryview(b"data")] * len(names)
    assert backend.put(names, views, timeout_seconds=60) == [None] * len(names)
    assert sorted(info.name for info in backend.list()) == names
    assert sorted(info.name for info in backend.list(names[0][:40])) == names
    assert [info.name for info in backend.list(names[7])] == names[7:8]


def test_foreign_keys_are_not_listed(server: S3Server):
    url = url_of(server, "pages/foreign")
    backend = open_backend(url)
    assert put(backend, NAMES[0]) is None
    # Another store in the same bucket, inside and beside the prefix of this one.
    for path in (f"pages/foreign/{'ab' * 16}", "pages/foreign2", "pages/foreign/deeper"):
        assert put(open_backend(url_of(server, path)), NAMES[1]) is None
    assert [info.name for info in backend.list()] == NAMES[:1]
    assert [info.name for info in backend.list(NAMES[0][:32])] == NAMES[:1]


_FORKS = """
import os, sys, time
from kvcodec.backend import open_backend
from kvcodec.errors import BackendError
name, url, when = "ab" * 16 + "/" + "ef" * 32, sys.argv[1], sys.argv[2]

def put(backend):
    return backend.put([name], [memoryview(b"data")], timeout_seconds=30)[0]

if when == "after":
    backend = open_backend(url)
    assert put(backend) is None
pid = os.fork()
if pid == 0:
    started = time.monotonic()
    if when == "before":
        assert put(open_backend(url)) is None
    else:
        assert isinstance(put(backend), BackendError) and "spawn" in str(put(backend))
        assert isinstance(put(open_backend(url)), BackendError)
    assert time.monotonic() - started < 20
    sys.exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
backend = open_backend(url)
for _ in range(50):
    assert put(backend) is None
"""


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_fork_before_the_first_request_works_and_one_after_it_says_so(
    server: S3Server, when: str
):
    """obstore's threads stay with the parent, and a child that used its sockets would crash it."""
    run = subprocess.run(
        [sys.executable, "-c", _FORKS, url_of(server, "pages/forks"), when],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.returncode == 0, run.stderr


_ENDS = """
import sys, threading, time
from kvcodec.backend import open_backend
backend = open_backend(sys.argv[1])
names = [f"{'ab' * 16}/{number:064x}" for number in range(64)]

def write():
    while True:
        backend.put(names, [memoryview(bytes(1 << 20))] * 64, timeout_seconds=0.1)

for _ in range(2):
    threading.Thread(target=write, daemon=True).start()
time.sleep(0.5)
"""


def test_a_process_may_end_with_requests_under_way(server: S3Server):
    """obstore's threads abort it if they come to speak when there is no interpreter any more."""
    runs = [
        subprocess.Popen([sys.executable, "-c", _ENDS, url_of(server, "pages/ends")])
        for _ in range(2)
    ]
    assert [run.wait(60) for run in runs] == [0] * 2


def test_the_gateway_and_a_mount_are_one_store(tmp_path: Path):
    """What one host writes through the gateway another reads as files, and the other way round."""
    with (
        juicefs_volume(tmp_path) as volume,
        volume.mount() as mount,
        volume.gateway() as (_, port),
    ):
        endpoint = quote(f"http://127.0.0.1:{port}", safe="")
        login = f"key={server_juicefs.USER}&secret={server_juicefs.PASSWORD}"
        files = open_backend(f"file://{mount.path}/store")
        url = f"fsspec+s3://{volume.name}/store/objects?endpoint_url={endpoint}&{login}"
        objects = open_backend(url)
        assert [put(files, NAMES[0], b"file"), put(objects, NAMES[1], b"object")] == [None, None]
        for backend in (files, objects):
            assert get(backend, NAMES[0]) == b"file"
            assert get(backend, NAMES[1]) == b"object"
            assert sorted(info.name for info in backend.list()) == NAMES[:2]
