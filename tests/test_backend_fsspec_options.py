"""FsspecBackend's URLs: what each option does, what is refused, what a message never holds."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote, unquote

import fsspec
import pytest
from fsspec import AbstractFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from object_server import ObjectServer, object_server
from real_server import need

from kvcodec.backend import open_backend
from kvcodec.errors import BackendError, BackendTimeout, ConfigError
from kvcodec_backends.fsspec import FsspecBackend

NAME = "ab" * 16 + "/" + "cd" * 32
KEY = "ab" * 16 + "/cd/" + "cd" * 32


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectServer]:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    with object_server() as server:
        yield server


def url_of(server: ObjectServer, protocol: str, options: str, path: str = "bucket/some/prefix"):
    endpoint = quote(f"http://127.0.0.1:{server.port}", safe="")
    return f"fsspec+{protocol}://{path}?endpoint_url={endpoint}&{options}"


def put(url: str) -> object:
    backend = open_backend(url)
    (result,) = backend.put([NAME], [memoryview(b"data")], timeout_seconds=10)
    backend.close()
    return result


def get(backend: FsspecBackend, buffer_bytes: int = 100, timeout_seconds: float = 10) -> object:
    buffer = memoryview(bytearray(buffer_bytes))
    (result,) = backend.get_into([NAME], [buffer], timeout_seconds=timeout_seconds)
    return bytes(buffer[:result]) if isinstance(result, int) and result <= buffer_bytes else result


# --- what options do


@pytest.mark.parametrize("protocol", ["s3", "s3a"])
def test_key_and_region_sign_the_request(server: ObjectServer, protocol: str):
    assert put(url_of(server, protocol, "key=someone&secret=x&region=eu-west-3")) is None
    assert server.requests[-1][:2] == ("PUT", f"/bucket/some/prefix/{KEY}")
    credential = server.headers()["authorization"].partition("Credential=")[2].partition(",")[0]
    name, _, region, *_ = credential.split("/")
    assert (name, region) == ("someone", "eu-west-3")
    assert "x-amz-security-token" not in server.headers()
    assert "x-amz-request-payer" not in server.headers()


def test_credentials_come_from_the_environment_too(
    server: ObjectServer, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "from-environment")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    assert put(url_of(server, "s3", "")) is None
    assert "Credential=from-environment/" in server.headers()["authorization"]


def test_a_session_token_is_sent(server: ObjectServer):
    assert put(url_of(server, "s3", "key=someone&secret=x&token=temporary")) is None
    assert server.headers()["x-amz-security-token"] == "temporary"


def test_requester_pays_is_sent(server: ObjectServer):
    assert put(url_of(server, "s3", "key=someone&secret=x&requester_pays=1")) is None
    assert server.headers()["x-amz-request-payer"] == "requester"


@pytest.mark.parametrize("protocol", ["s3", "gs", "abfs"])
def test_anonymous_requests_are_not_signed(server: ObjectServer, protocol: str):
    account = "&account_name=account" if protocol == "abfs" else ""
    backend = open_backend(url_of(server, protocol, "anon=1" + account))
    get(backend)
    assert server.requests
    assert not any("authorization" in headers for _, _, headers in server.requests)


def test_the_bucket_is_in_the_path_unless_the_host_has_it(server: ObjectServer):
    assert put(url_of(server, "s3", "key=someone&secret=x&addressing_style=virtual")) is None
    assert server.path() == f"/some/prefix/{KEY}"


def test_a_certificate_authority_can_be_given(tmp_path: Path):
    certificate = tmp_path / "server.pem"
    subprocess.run(
        [
            *(need("openssl"), "req", "-x509", "-newkey", "ec", "-nodes", "-days", "2"),
            *("-pkeyopt", "ec_paramgen_curve:prime256v1", "-subj", "/CN=localhost"),
            *("-addext", "subjectAltName=DNS:localhost", "-addext", "basicConstraints=CA:FALSE"),
            *("-keyout", str(certificate), "-out", str(tmp_path / "ca.pem")),
        ],
        check=True,
        capture_output=True,
    )
    certificate.write_bytes(certificate.read_bytes() + (tmp_path / "ca.pem").read_bytes())
    with object_server(certificate) as server:
        endpoint = quote(f"https://localhost:{server.port}", safe="")
        url = f"fsspec+s3://bucket?endpoint_url={endpoint}&key=someone&secret=x"
        assert put(f"{url}&ca_file={tmp_path}/ca.pem") is None
        assert isinstance(put(url), BackendError)


def test_google_credentials_come_from_a_file(server: ObjectServer, tmp_path: Path):
    account = {
        "gcs_base_url": f"http://127.0.0.1:{server.port}",
        "disable_oauth": True,
        "client_email": "",
        "private_key": "",
        "private_key_id": "",
    }
    (tmp_path / "account.json").write_text(json.dumps(account))
    put(url_of(server, "gs", f"token={tmp_path}/account.json"))
    assert unquote(server.path()) == f"/bucket/some/prefix/{KEY}"
    with pytest.raises(ConfigError):
        open_backend(f"fsspec+gs://bucket?token={tmp_path}/missing.json")


def test_azure_accounts_sign_with_their_key(server: ObjectServer):
    key = quote("c29tZSBieXRlcw==", safe="")
    put(url_of(server, "abfs", f"account_name=account&account_key={key}"))
    assert server.headers()["authorization"].startswith("SharedKey account:")
    put(url_of(server, "az", f"account_key={key}", "bucket@another.dfs.core.windows.net/prefix"))
    assert server.headers()["authorization"].startswith("SharedKey another:")
    put(url_of(server, "abfss", "account_name=account&sas_token=sv%3D1%26sig%3Dsigned"))
    assert "sig=signed" in server.path()


def test_concurrency_bounds_the_requests_under_way(server: ObjectServer):
    names = [f"{'ab' * 16}/{number:064x}" for number in range(12)]
    for concurrency in (2, 6):
        backend = open_backend(
            url_of(server, "s3", f"key=someone&secret=x&concurrency={concurrency}")
        )
        server.delay_seconds, server.most_running = 0.05, 0
        backend.exists(names, timeout_seconds=10)
        assert server.most_running == concurrency
        backend.close()


# --- requests


def test_reading_is_one_request_and_deleting_two(server: ObjectServer):
    backend = open_backend(url_of(server, "s3", "key=someone&secret=x"))
    server.requests.clear()
    assert get(backend) == b"data"
    assert server.methods() == ["GET"]
    backend.delete([NAME], timeout_seconds=10)
    assert server.methods() == ["GET", "HEAD", "DELETE"]


def test_an_object_that_is_too_long_is_not_downloaded(server: ObjectServer):
    backend = open_backend(url_of(server, "s3", "key=someone&secret=x"))
    server.body, server.body_bytes = b"", 1 << 40
    assert get(backend) == 1 << 40


def test_a_cut_answer_is_an_error_and_never_an_object(server: ObjectServer):
    backend = open_backend(url_of(server, "s3", "key=someone&secret=x"))
    server.body_bytes = 50
    answer = get(backend, timeout_seconds=1)
    assert isinstance(answer, BackendError)


def test_a_call_ends_at_its_deadline(server: ObjectServer):
    backend = open_backend(url_of(server, "s3", "key=someone&secret=x"))
    server.delay_seconds = 5
    started = time.monotonic()
    answers = [
        *backend.put([NAME], [memoryview(b"data")], timeout_seconds=0.3),
        get(backend, timeout_seconds=0.3),
    ]
    assert 0.6 <= time.monotonic() - started < 5
    assert all(isinstance(answer, BackendTimeout) for answer in answers)
    assert backend.counters()["late_requests"] == 2


# --- what is refused


@pytest.mark.parametrize(
    "url",
    [
        "fsspec://bucket",
        "fsspec+s3://",
        "fsspec+s3:///prefix",
        "fsspec+s3://bucket/../other",
        "fsspec+s3://bucket#part",
        "fsspec+s3://bucket?concurrency=0",
        "fsspec+s3://bucket?concurrency=many",
        "fsspec+s3://bucket?concurrency=100000",
        "fsspec+s3://bucket?anon=yes",
        "fsspec+s3://bucket?requester_pays=yes",
        "fsspec+s3://bucket?addressing_style=dns",
        "fsspec+s3://bucket?endpoint_url=localhost:9000",
        "fsspec+s3://bucket?ca_file=/nowhere/ca.pem",
        "fsspec+s3://bucket?use_listings_cache=1",
        "fsspec+abfs://container",
        "fsspec+memory://name?use_listings_cache=1",
        "fsspec+nosuchprotocol://name",
    ],
)
def test_a_url_that_cannot_be_honoured_is_a_config_error(url: str):
    with pytest.raises(ConfigError):
        open_backend(url)


@pytest.mark.parametrize("protocol", ["file", "local"])
def test_a_directory_is_for_the_file_backend(tmp_path: Path, protocol: str):
    with pytest.raises(ConfigError, match="file:///path"):
        open_backend(f"fsspec+{protocol}://{tmp_path}")


def test_a_file_system_that_shows_half_an_object_is_refused():
    class Copying(AbstractFileSystem):
        protocol = "copying"

    fsspec.register_implementation("copying", Copying, clobber=True)
    with pytest.raises(ConfigError, match="half"):
        open_backend("fsspec+copying://name")


def test_options_of_a_file_system_have_the_type_of_its_defaults():
    seen: list[dict[str, object]] = []
    made: list[MemoryFileSystem] = []

    class Typed(MemoryFileSystem):
        protocol = "typed"

        def __init__(self, on=False, count=1, ratio=0.5, text="", none=None, **options):
            seen.append(
                {"on": on, "count": count, "ratio": ratio, "text": text, "none": none} | options
            )
            super().__init__(**options)
            made.append(self)

        def mv(self, path1, path2, **kwargs):
            super().mv(path1, path2, **kwargs)

    fsspec.register_implementation("typed", Typed, clobber=True)
    open_backend("fsspec+typed://name?on=1&count=7&ratio=0.25&text=1&none=1").close()
    # Nothing but what was asked for: some hand all their options on to another library.
    assert seen[-1] == {"on": True, "count": 7, "ratio": 0.25, "text": "1", "none": "1"}
    assert not made[-1].dircache.use_listings_cache
    instance_count = len(seen)
    open_backend("fsspec+typed://name?on=1&count=7&ratio=0.25&text=1&none=1").close()
    assert len(seen) > instance_count, "an instance with somebody else's state was taken again"
    for wrong in ("on=maybe", "count=x", "ratio=x"):
        with pytest.raises(ConfigError):
            open_backend(f"fsspec+typed://name?{wrong}")


@pytest.mark.parametrize(
    "url",
    [
        "fsspec+s3://bucket?secret=hush-hush&typo=1",
        "fsspec+s3://bucket?secret=hush-hush&secret=hush-hush",
        "fsspec+s3://bucket?secret=hush-hush&anon=2",
        "fsspec+abfs://container?account_key=hush-hush&account_name=account",
        "fsspec+sftp://user:hush-hush@host/path?typo=1",
    ],
)
def test_no_message_holds_a_secret(url: str):
    with pytest.raises(ConfigError) as caught:
        open_backend(url)
    assert "hush-hush" not in str(caught.value)
