"""S3, Google Cloud Storage and Azure through obstore, whose requests are made outside Python.

It replaces s3fs, gcsfs and adlfs behind the same URLs: per object it takes a third of their
processor time, and what it takes does not hold the interpreter (see the decision note).
"""

from __future__ import annotations

import asyncio
import ctypes
import functools
import os
import re
import ssl
import time
import urllib.error
import urllib.request
import weakref
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

from kvcodec.errors import (
    BackendError,
    BackendFull,
    BackendReadOnly,
    BackendTimeout,
    ConfigError,
)
from kvcodec_backends._fsspec_client import Address, Client, StoredObject, flag

__all__ = ["PROTOCOLS", "ObstoreClient", "known_options", "make_client", "settle"]

#: fsspec's names of the protocols, and ours for the kind of store.
PROTOCOLS = (
    dict.fromkeys(("s3", "s3a"), "s3")
    | dict.fromkeys(("gs", "gcs"), "gs")
    | dict.fromkeys(("az", "abfs", "abfss"), "az")
)
# The options of each kind under the names that users of fsspec know, and obstore's.
_OPTIONS = {
    "s3": {
        "endpoint_url": "endpoint",
        "key": "access_key_id",
        "secret": "secret_access_key",
        "token": "session_token",
        "region": "region",
    },
    "gs": {"endpoint_url": "base_url", "token": "service_account"},
    "az": {
        "endpoint_url": "endpoint",
        "account_name": "account_name",
        "account_key": "account_key",
        "sas_token": "sas_key",
    },
}
_FLAGS = {
    "s3": {"anon": "skip_signature", "requester_pays": "request_payer"},
    "gs": {"anon": "skip_signature"},
    "az": {"anon": "skip_signature"},
}

_CONNECT_SECONDS = 3
_REQUEST_SECONDS = 60
# A connection that was kept and is dead by now costs the second request; the deadline of the call
# is for everything else.
_RETRY: dict[str, Any] = {
    "max_retries": 2,
    "backoff": {"init_backoff": timedelta(milliseconds=20), "max_backoff": timedelta(seconds=1)},
    "retry_timeout": timedelta(seconds=10),
}

_BODY_ATTEMPT_COUNT = 3

_STATUS = re.compile(r"status code: ((\d{3}) [A-Za-z ]+)")
_CODE = re.compile(r"<Code>([A-Za-z0-9]{1,60})</Code>|\"(?:reason|code)\":\s*\"([A-Za-z]{1,60})\"")
#: Codes that say who asks is not who he says, in contrast to what he may do.
_WRONG_CREDENTIALS = frozenset(
    {"SignatureDoesNotMatch", "InvalidAccessKeyId", "InvalidToken", "ExpiredToken"}
    | {"AuthenticationFailed", "InvalidAuthenticationInfo", "InvalidSecurity"}
)
_FULL_CODES = frozenset({"QuotaExceeded", "XMinioStorageFull", "InsufficientCapacity"})

#: How long the end of a process may wait for what was cancelled.
_SETTLE_SECONDS = 5.0

#: The process that has used obstore.
_user_pid = 0
#: Futures that obstore's threads still hold, done and cancelled ones for a moment among them.
_pending: weakref.WeakSet[asyncio.Future[Any]] = weakref.WeakSet()


def known_options(protocol: str, shown: str) -> Sequence[str]:  # noqa: ARG001 - as for fsspec
    """What may be in the query of a URL of this protocol."""
    kind = PROTOCOLS[protocol]
    more = ("addressing_style", "ca_file") if kind == "s3" else ("ca_file",)
    return (*_OPTIONS[kind], *_FLAGS[kind], *more)


def settle() -> None:
    """Before the interpreter ends: wait for obstore to let go of requests that were cancelled. Its
    threads abort the process if they come to speak after that.
    """
    if _user_pid != os.getpid():
        return
    from obstore.store import MemoryStore

    give_up_at = time.monotonic() + _SETTLE_SECONDS
    while _pending and time.monotonic() < give_up_at:
        # What its threads have let go of is collected when somebody calls anything of obstore.
        MemoryStore()
        time.sleep(0.002)


def make_client(address: Address, options: Mapping[str, str]) -> ObstoreClient:
    """A client that connects with its first request."""
    kind = PROTOCOLS[address.protocol]
    bucket, _, account = address.location.partition("@")
    if not bucket:
        raise ConfigError(f"{address.shown}: wanted is fsspec+{address.protocol}://BUCKET/PREFIX")
    configuration: dict[str, Any] = {
        ours: options[name] for name, ours in _OPTIONS[kind].items() if name in options
    }
    configuration |= {
        ours: "true" for name, ours in _FLAGS[kind].items() if flag(options, name, address.shown)
    }
    if kind == "s3":
        style = options.get("addressing_style", "path")
        if style not in ("path", "virtual"):
            raise ConfigError(
                f"{address.shown}: addressing_style is {style!r}, must be path or virtual"
            )
        configuration["virtual_hosted_style_request"] = style == "virtual"
        # One request for many is not understood by every server, and we ask for each one anyway.
        configuration["disable_bulk_delete"] = True
    elif account:
        configuration.setdefault("account_name", account.partition(".")[0])
    endpoint = options.get("endpoint_url", "")
    transport: dict[str, Any] = {
        "connect_timeout": timedelta(seconds=_CONNECT_SECONDS),
        "timeout": timedelta(seconds=_REQUEST_SECONDS),
    }
    if endpoint.startswith("http://"):
        transport["allow_http"] = True
    elif endpoint and not endpoint.startswith("https://"):
        raise ConfigError(f"{address.shown}: endpoint_url is {endpoint!r}, wanted http(s)://HOST")
    certificates = options.get("ca_file")
    if certificates is not None:
        transport["root_certificate"] = _read_certificates(certificates, address.shown)
    return ObstoreClient(address, kind, bucket, configuration, transport, certificates)


class ObstoreClient(Client):
    """One bucket or container."""

    def __init__(
        self,
        address: Address,
        kind: str,
        bucket: str,
        configuration: dict[str, Any],
        transport: dict[str, Any],
        certificates: str | None,
    ) -> None:
        try:
            import obstore
            from obstore.store import AzureStore, GCSStore, S3Store
        except ImportError as error:
            raise ConfigError(
                f"{address.shown}: {error}; pip install 'kvcodec[s3]' brings what S3, Google Cloud "
                "Storage and Azure need"
            ) from error
        self._obstore: Any = obstore
        self._address = address
        self._kind = kind
        self._bucket = bucket
        self._region = configuration.get("region")
        self._certificates = certificates
        make: Callable[..., Any] = {"s3": S3Store, "gs": GCSStore, "az": AzureStore}[kind]
        self._make_store = functools.partial(
            make, bucket, config=configuration, client_options=transport, retry_config=_RETRY
        )
        try:
            self._store = self._make_store(prefix=address.path or None)
        except (obstore.exceptions.BaseError, ValueError) as error:
            raise ConfigError(f"{address.shown}: {_first_line(error)}") from error

    async def open(self, *, create: bool) -> None:
        """List one page: the question that a missing bucket and wrong credentials answer to."""
        try:
            async for _ in self.list(""):
                return
        except Exception as error:
            status, code = _status(error)
            if code in _WRONG_CREDENTIALS:
                raise ConfigError(f"{self._address.shown}: {code}; see the credentials") from error
            if code == "InvalidBucketName" or "configured region" in str(error):
                raise ConfigError(
                    f"{self._address.shown}: {code or 'another region'}; this server has no bucket "
                    f"{self._bucket!r} in region {self._region or 'us-east-1'}"
                ) from error
            if status.startswith("404"):
                if not create:
                    raise ConfigError(
                        f"{self._address.shown}: there is no bucket or container {self._bucket!r}"
                    ) from error
                await self._make_bucket()

    async def put(self, key: str, data: bytes) -> None:
        """One PUT request of the whole object: a store shows it whole or not at all."""
        await self._ask(self._obstore.put_async, key, data, use_multipart=False)

    async def get(self, key: str, limit_bytes: int) -> memoryview | int:
        """One GET request; a body that is too long is not read, one that is cut off asked for
        again: some servers do that to readers of an object that is replaced.
        """
        for attempts_left in range(_BODY_ATTEMPT_COUNT - 1, -1, -1):
            answer = await self._ask(self._obstore.get_async, key)
            size = int(answer.meta["size"])
            if size > limit_bytes:
                return size
            try:
                data = memoryview(await _awaited(answer.bytes_async()))
            except self._obstore.exceptions.GenericError:
                if not attempts_left:
                    raise
            else:
                if len(data) == size:
                    return data
        raise BackendError(f"get {key}: the answer has another length than it says")

    async def stat(self, key: str) -> StoredObject:
        """One HEAD request."""
        return _described(await self._ask(self._obstore.head_async, key))

    async def delete(self, key: str) -> None:
        """One DELETE request."""
        await self._ask(self._obstore.delete_async, key)

    async def list(self, directory: str) -> AsyncIterator[list[StoredObject]]:
        """A listing of a thousand objects at a time."""
        self._check_process()
        pages = self._obstore.list(self._store, directory or None, chunk_size=1000)
        while True:
            try:
                page = await _awaited(anext(pages))
            except StopAsyncIteration:
                return
            yield [_described(entry) for entry in page]

    def as_backend_error(self, error: BaseException, verb: str, name: str) -> BackendError:
        """By the status and the code of the answer: obstore's own classes tell less."""
        status, code = _status(error)
        text = ", ".join(filter(None, (status, code))) or _first_line(error)
        message = f"{verb} {name}: {text}"
        if code in _FULL_CODES or status.startswith("507"):
            return BackendFull(message)
        if verb == "put" and status.startswith("403") and code not in _WRONG_CREDENTIALS:
            return BackendReadOnly(message)
        if "timed out" in text:
            return BackendTimeout(message)
        return BackendError(message)

    def close(self) -> None:
        """Nothing to do: connections end with the store."""

    def after_fork(self) -> None:
        """Keep the store for ever: its end would end the parent's connections."""
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._store))

    async def _ask(
        self,
        request: Callable[..., asyncio.Future[Any]],
        *arguments: object,
        **options: object,
    ) -> Any:  # noqa: ANN401 - whatever obstore answers
        self._check_process()
        return await _awaited(request(self._store, *arguments, **options))

    def _check_process(self) -> None:
        """Threads of obstore are not there after a fork, and its sockets are still the parent's."""
        global _user_pid
        if _user_pid == 0:
            _user_pid = os.getpid()
        if _user_pid != os.getpid():
            raise BackendError(
                f"{self._address.shown}: this process was forked from one that uses such a store "
                "already; start it with spawn, or open the first one after the fork"
            )

    async def _make_bucket(self) -> None:
        if self._kind != "s3":
            raise ConfigError(
                f"{self._address.shown}: there is no {self._bucket!r}; make it with the provider's "
                "own tools"
            )
        # obstore has no request for it, but signs the URL of one.
        try:
            url = await self._obstore.sign_async(
                self._make_store(), "PUT", "", timedelta(minutes=5)
            )
            await asyncio.to_thread(self._request_bucket, url)
        except (self._obstore.exceptions.BaseError, urllib.error.HTTPError) as error:
            answer = _first_line(error)
            if isinstance(error, urllib.error.HTTPError):
                answer += " " + _code(error.read(4096).decode("utf-8", "replace"))
            raise ConfigError(
                f"{self._address.shown}: there is no bucket {self._bucket!r}, and it cannot be "
                f"made: {answer.strip()}"
            ) from error

    def _request_bucket(self, url: str) -> None:
        body = b""
        if self._region not in (None, "us-east-1"):
            constraint = f"<LocationConstraint>{self._region}</LocationConstraint>"
            body = f"<CreateBucketConfiguration>{constraint}</CreateBucketConfiguration>".encode()
        context = ssl.create_default_context(cafile=self._certificates)
        request = urllib.request.Request(url, data=body, method="PUT")  # noqa: S310 - http(s)
        urllib.request.urlopen(request, timeout=_CONNECT_SECONDS, context=context).close()  # noqa: S310


async def _awaited(future: asyncio.Future[Any]) -> Any:  # noqa: ANN401 - as above
    _pending.add(future)
    try:
        return await future
    finally:
        # The traceback of an exception it holds leads here: without this it would hold itself.
        del future


def _described(entry: Mapping[str, Any]) -> StoredObject:
    return StoredObject(entry["path"], int(entry["size"]), entry["last_modified"].timestamp())


def _status(error: BaseException) -> tuple[str, str]:
    """What the server answered: its status, and its own code for it. Empty if there was none."""
    text = str(error).partition("Debug source:")[0]
    match = _STATUS.search(text)
    return (match[1].strip() if match else ""), _code(text)


def _code(text: str) -> str:
    match = _CODE.search(text)
    return (match[1] or match[2]) if match else ""


def _first_line(error: BaseException) -> str:
    # Without addresses: they may hold a signature.
    line = str(error).strip().partition("\n")[0]
    return re.sub(r"\S+://\S+", "(URL)", line)[:300] or type(error).__name__


def _read_certificates(path: str, shown: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise ConfigError(f"{shown}: cannot read ca_file {path!r}: {error.strerror}") from error
