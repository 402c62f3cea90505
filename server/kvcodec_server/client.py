"""The sidecar as a store: ``sidecar+unix://`` on its node, ``sidecar://`` from anywhere."""

from __future__ import annotations

import os
import re
import ssl
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar
from urllib.parse import unquote

import grpc

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
    parse_byte_count,
    parse_options,
)
from kvcodec.errors import BackendError, BackendTimeout, ConfigError
from kvcodec_proto.v1 import service_pb2 as pb
from kvcodec_server._client_link import CHANNEL_OPTIONS
from kvcodec_server._client_local import LocalDoor
from kvcodec_server._client_remote import Address, RemoteDoor
from kvcodec_server.options import Metadata
from kvcodec_server.status import as_backend_error, error_of_call

__all__ = ["DEFAULT_REGION_BYTES", "SidecarBackend"]

#: Room for the staging buffers of a pipeline with its usual 256 MiB, and for objects elsewhere.
DEFAULT_REGION_BYTES = 512 << 20

_NAMES_PER_CALL = 1000
_LIST_SECONDS = 3600.0
_MAX_SOCKET_PATH = 107 - len(".region")
_TARGET = re.compile(r"(?:\[[0-9a-fA-F:.]+\]|[^\s:/\[\]@]+):\d{1,5}")
_TLS_OPTIONS = ("ca_file", "certificate_file", "key_file", "server_name")

T = TypeVar("T")

# Doors of before a fork: their connections belong to the parent, and closing them here would
# disturb it.
_abandoned: list[object] = []


class SidecarBackend(Backend):
    """``sidecar+unix:///run/kvcodec.sock?region_bytes=512MiB``: a sidecar of this node. Objects
    move through a region of shared memory of that size, which costs what is used of it.

    ``sidecar://host:port?tls=1&ca_file=...``: a sidecar anywhere. With `tls` the connection is
    encrypted; `ca_file` says who may vouch for the server (else OpenSSL's and gRPC's own lists do),
    `certificate_file` and `key_file` say who this client is, `server_name` is the name to expect in
    the server's certificate where it is not the host's. The first line of `token_file` is sent with
    every call.

    It connects at the first call, and again by itself when the sidecar was away.
    """

    batch_size = 8

    def __init__(
        self, url: str, open_door: Callable[[SidecarBackend], LocalDoor | RemoteDoor]
    ) -> None:
        self._url = display_url(url)
        self._open_door = open_door
        self._lock = threading.Lock()
        self._door: LocalDoor | RemoteDoor | None = None
        self._pid = os.getpid()
        self._closed = False
        self._counts: Counter[str] = Counter(sessions=0, calls_in_doubt=0)

    @classmethod
    def from_url(cls, url: str, *, create: bool = True) -> SidecarBackend:
        """A client of the sidecar a URL names, which need not be there yet."""
        del create  # a store is made by its sidecar
        scheme = url.partition("://")[0].lower()
        if scheme not in ("sidecar", "sidecar+unix"):
            raise ConfigError(f"{display_url(url)!r}: known are sidecar:// and sidecar+unix://")
        return cls._of_unix(url) if scheme == "sidecar+unix" else cls._of_target(url)

    @classmethod
    def _of_unix(cls, url: str) -> SidecarBackend:
        parts, options = parse_options(url, ["region_bytes"])
        path = unquote(parts.path)
        if parts.netloc or parts.fragment or not path.startswith("/") or "\0" in path:
            raise ConfigError(
                f"{url!r}: wanted the path of a socket, as sidecar+unix:///run/k.sock"
            )
        if len(os.fsencode(path)) > _MAX_SOCKET_PATH:
            raise ConfigError(f"{url!r}: the path has more than {_MAX_SOCKET_PATH} bytes")
        region_bytes = DEFAULT_REGION_BYTES
        if "region_bytes" in options:
            region_bytes = parse_byte_count("region_bytes", options["region_bytes"])
        if not 1 << 20 <= region_bytes <= 1 << 40 or region_bytes % 4096:
            raise ConfigError(
                f"{url!r}: region_bytes is {region_bytes}, allowed are multiples of 4096 from 1MiB "
                f"to 1TiB"
            )
        return cls(url, lambda self: LocalDoor(path, region_bytes, self._count))

    @classmethod
    def _of_target(cls, url: str) -> SidecarBackend:
        parts, options = parse_options(url, ["tls", "token_file", *_TLS_OPTIONS])
        shown = display_url(url)
        if not _TARGET.fullmatch(parts.netloc) or parts.path not in ("", "/") or parts.fragment:
            raise ConfigError(f"{shown!r}: wanted sidecar://host:port, or sidecar+unix:///path")
        host, _, port = parts.netloc.rpartition(":")
        if not 0 < int(port) < 1 << 16:
            raise ConfigError(f"{shown!r}: the port is {port}, allowed are 1 to 65535")
        tls = options.pop("tls", "0")
        if tls not in ("0", "1"):
            raise ConfigError(f"{shown!r}: tls is {tls!r}, allowed is 0 or 1")
        in_vain = sorted(set(options) & set(_TLS_OPTIONS))
        if tls == "0" and in_vain:
            raise ConfigError(f"{shown!r}: {in_vain[0]} has no effect without tls=1")
        if ("certificate_file" in options) != ("key_file" in options):
            raise ConfigError(f"{shown!r}: certificate_file and key_file need each other")
        files = {
            name: _content(shown, name, path)
            for name, path in options.items()
            if name.endswith("_file")
        }
        context = credentials = None
        if tls == "1":
            context = _tls_context(shown, options)
            credentials = grpc.ssl_channel_credentials(
                files.get("ca_file"), files.get("key_file"), files.get("certificate_file")
            )
        channel_options: list[tuple[str, str | int]] = [*CHANNEL_OPTIONS]
        if "server_name" in options:
            channel_options.append(("grpc.ssl_target_name_override", options["server_name"]))

        def open_channel() -> grpc.Channel:
            if credentials is None:
                return grpc.insecure_channel(parts.netloc, options=channel_options)
            return grpc.secure_channel(parts.netloc, credentials, options=channel_options)

        metadata: Metadata = ()
        if "token_file" in files:
            metadata = (("authorization", f"Bearer {_token(shown, files['token_file'])}"),)
        address = Address(host.strip("[]"), int(port), context, options.get("server_name", ""))
        return cls(url, lambda _: RemoteDoor(address, open_channel, metadata))

    def put(
        self, names: Sequence[str], objects: Sequence[memoryview], *, timeout_seconds: float
    ) -> list[PutResult]:
        """Let the sidecar store objects."""
        pairs = checked_objects(names, objects)
        deadline = Deadline(timeout_seconds)
        if deadline.passed():
            return [deadline.error("put", name) for name, _ in pairs]
        try:
            return self._opened().put(pairs, deadline) if pairs else []
        except BackendError as error:
            return [error] * len(pairs)

    def get_into(
        self, names: Sequence[str], buffers: Sequence[memoryview], *, timeout_seconds: float
    ) -> list[GetResult]:
        """Let the sidecar read objects; buffers of `staging_memory` it fills itself."""
        pairs = checked_buffers(names, buffers)
        deadline = Deadline(timeout_seconds)
        if deadline.passed():
            return [deadline.error("get", name) for name, _ in pairs]
        try:
            return self._opened().get(pairs, deadline) if pairs else []
        except BackendError as error:
            return [error] * len(pairs)

    def exists(self, names: Sequence[str], *, timeout_seconds: float) -> list[bool]:
        """Whether the sidecar has each object."""
        checked, deadline = checked_names(names), Deadline(timeout_seconds)
        found: list[bool] = []
        for part in _parts_of(checked):
            answer = self._ask("Exists", pb.ExistsRequest(names=part), deadline)
            there = answer.exists if isinstance(answer, pb.ExistsResponse) else []
            found += there if len(there) == len(part) else [False] * len(part)
        return found

    def exists_prefix(self, names: Sequence[str], *, timeout_seconds: float) -> int:
        """How many objects from the first on the sidecar has without a gap."""
        checked, deadline = checked_names(names), Deadline(timeout_seconds)
        count = 0
        for part in _parts_of(checked):
            answer = self._ask("ExistsPrefix", pb.ExistsPrefixRequest(names=part), deadline)
            there = answer.count if isinstance(answer, pb.ExistsPrefixResponse) else 0
            count += min(there, len(part))
            if there < len(part):
                break
        return count

    def delete(self, names: Sequence[str], *, timeout_seconds: float) -> list[bool]:
        """Let the sidecar remove objects."""
        checked, deadline = checked_names(names), Deadline(timeout_seconds)
        gone: list[bool] = []
        for part in _parts_of(checked):
            answer = self._ask("Delete", pb.DeleteRequest(names=part), deadline)
            deleted = answer.deleted if isinstance(answer, pb.DeleteResponse) else []
            gone += deleted if len(deleted) == len(part) else [False] * len(part)
        return gone

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """All objects of the sidecar's store, as they come."""
        stub, metadata = self._opened().stub(Deadline(_LIST_SECONDS))
        request = pb.ListRequest(prefix=prefix)
        return _listed(stub.List(request, timeout=_LIST_SECONDS, metadata=metadata))

    def stat(self, name: str, *, timeout_seconds: float) -> ObjectInfo | None:
        """One object's description."""
        request = pb.StatRequest(name=check_name(name))
        answer = self._ask("Stat", request, Deadline(timeout_seconds))
        if isinstance(answer, BackendError):
            raise answer
        assert isinstance(answer, pb.StatResponse)
        return _info(answer.object) if answer.HasField("object") else None

    def staging_memory(self, size: int) -> memoryview | None:
        """Memory of the region, where there is one with room."""
        try:
            door = self._opened()
        except BackendError:
            return None
        return door.region.lend(size) if isinstance(door, LocalDoor) else None

    def is_idle(self, memory: memoryview) -> bool:
        """Whether no call that was given up may still touch this memory."""
        door = self._door
        return not isinstance(door, LocalDoor) or door.region.is_idle(memory)

    def close(self) -> None:
        """End the session and the connection."""
        with self._lock:
            self._closed = True
            door, self._door = self._door, None
        if door is not None and self._pid == os.getpid():
            door.close()

    def counters(self) -> Mapping[str, int]:
        """Sessions that were opened, and calls that were given up while under way."""
        return dict(self._counts)

    def _opened(self) -> LocalDoor | RemoteDoor:
        """The connection of this process. Raises `BackendError` if this backend is closed."""
        door = self._door
        if door is not None and self._pid == os.getpid():
            return door
        if self._pid != os.getpid():
            self._lock = threading.Lock()  # another thread may have held it when this forked
            _abandoned.append(self._door)
            self._door, self._pid = None, os.getpid()
        with self._lock:
            if self._closed:
                raise closed_error(self._url)
            if self._door is None:
                self._door = self._open_door(self)
            return self._door

    def _ask(self, verb: str, request: object, deadline: Deadline) -> object:
        """The answer of one call, or the `BackendError` it ended with."""
        if deadline.passed():
            return BackendTimeout("no time was left to ask the sidecar")
        try:
            door = self._opened()
            stub, metadata = door.stub(deadline)
        except BackendError as error:
            return error
        try:
            left = deadline.remaining_seconds()
            return getattr(stub, verb)(request, timeout=left, metadata=metadata)
        except grpc.RpcError as error:
            found = as_backend_error(error_of_call(error))
            door.suspect(stub, error)
            return found
        except ValueError as error:  # the channel was closed meanwhile
            return BackendError(str(error))

    def _count(self, name: str) -> None:
        with self._lock:
            self._counts[name] += 1


def _content(url: str, name: str, path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{url!r}: {name} cannot be read: {error}") from error


def _token(url: str, content: bytes) -> str:
    """The first line of a file, without the token in the error."""
    token = content.strip().partition(b"\n")[0].strip()
    if not re.fullmatch(rb"[!-~]+", token):
        raise ConfigError(f"{url!r}: the first line of token_file is no token of visible ASCII")
    return token.decode("ascii")


def _tls_context(url: str, options: Mapping[str, str]) -> ssl.SSLContext:
    """How connections for streams are made; gRPC's own have the same files."""
    # Not the one that ssl has ready: it trusts everybody known where a file has nobody in it, and
    # its newest refuses authorities that gRPC accepts.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.set_alpn_protocols(["h2"])
    try:
        if "ca_file" in options:
            context.load_verify_locations(options["ca_file"])
        else:
            context.load_default_certs()
        if "certificate_file" in options:
            # No password: an encrypted key would otherwise be asked for on the terminal.
            context.load_cert_chain(
                options["certificate_file"], options["key_file"], password=lambda: ""
            )
    except OSError as error:
        raise ConfigError(f"{url!r}: its certificates cannot be used: {error}") from error
    return context


def _parts_of(names: Sequence[str]) -> Iterator[Sequence[str]]:
    return (names[at : at + _NAMES_PER_CALL] for at in range(0, len(names), _NAMES_PER_CALL))


def _listed(responses: Iterator[pb.ListResponse]) -> Iterator[ObjectInfo]:
    try:
        for response in responses:
            yield from map(_info, response.objects)
    except grpc.RpcError as error:
        raise as_backend_error(error_of_call(error)) from error


def _info(stored: pb.StoredObject) -> ObjectInfo:
    return ObjectInfo(stored.name, stored.stored_bytes, stored.modified_seconds)
