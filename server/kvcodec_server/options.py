"""How much a sidecar may use, and what it allows its callers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

from kvcodec.backend import check_number
from kvcodec.errors import ConfigError

__all__ = ["CHUNK_BYTES", "CLIENT_METADATA", "RELOADABLE", "ServerOptions", "ignore_observation"]

#: Bytes of one message of a stream, half as many more at most: below the 4 MiB that gRPC takes in
#: any language unless told otherwise. An object that is one message is never put together.
CHUNK_BYTES = 2 << 20

#: What a call brings beside its messages: names and values.
Metadata = tuple[tuple[str, str], ...]

#: What a client with several connections calls itself on all of them, 64 characters at most: where
#: places are few, it then counts as one. Who lies about it gains what more connections would give.
CLIENT_METADATA = "kvcodec-client"

#: Called once per call, when it is over: operation ("get", "put", "get_stream" ...), outcome ("ok",
#: or the label of the worst answer: "timeout", "full", "refused" ...), seconds, raw bytes where the
#: sidecar encoded or decoded (0 otherwise), and encoded bytes moved. Must not raise or block.
Observe = Callable[[str, str, float, int, int], None]

#: The options that `PageServer.reconfigure` may change while it runs.
RELOADABLE = frozenset(
    {
        "max_call_seconds",
        "max_object_bytes",
        "max_objects",
        "max_region_bytes",
        "max_sessions",
        "max_streams",
    }
)

# Per option: whether it is a whole number, the least and the greatest value.
_LIMITS = {
    "grpc_threads": (True, 2, 1024),
    "io_threads": (True, 1, 256),
    "codec_threads": (True, 1, 64),
    "staging_bytes": (True, 1 << 20, 1 << 40),
    "max_object_bytes": (True, 1, 1 << 31),
    "max_objects": (True, 1, 65536),
    "max_call_seconds": (False, 0.01, 3600),
    "max_streams": (True, 1, 1024),
    "max_sessions": (True, 1, 65536),
    "max_region_bytes": (True, 1 << 20, 1 << 44),
    "breaker_failures": (True, 0, 1_000_000),
    "breaker_cooldown_seconds": (False, 0.01, 3600),
}


def ignore_observation(
    operation: str, outcome: str, seconds: float, raw_bytes: int, encoded_bytes: int
) -> None:
    """The `Observe` of a server that nobody watches."""
    del operation, outcome, seconds, raw_bytes, encoded_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """The limits of one sidecar.

    A call has one of `grpc_threads` as long as it lasts, even if it waits for its turn at the store
    or for a slow reader; of streams there are `max_streams`. `io_threads` ask the store.
    `staging_bytes` bounds the memory of streams and of pages that are encoded or decoded here. A
    call may name `max_objects`, of `max_object_bytes` each, and ends after `max_call_seconds` if
    not before. `max_sessions` clients may have a region of `max_region_bytes` each; their uid is
    the server's, root's, or one of `allowed_uids`.
    The breakers are those of `kvcodec.pipeline.StoreOptions`.
    """

    grpc_threads: int = 128
    io_threads: int = 8
    codec_threads: int = 2
    staging_bytes: int = 256 << 20
    max_object_bytes: int = 64 << 20
    max_objects: int = 1024
    max_call_seconds: float = 60.0
    max_streams: int = 24
    max_sessions: int = 64
    max_region_bytes: int = 2 << 30
    allowed_uids: frozenset[int] = frozenset()
    breaker_failures: int = 3
    breaker_cooldown_seconds: float = 1.0

    def __post_init__(self) -> None:
        for name, (whole, low, high) in _LIMITS.items():
            check_number(name, getattr(self, name), whole, low, high)
        if self.max_streams >= self.grpc_threads:
            raise ConfigError(
                f"max_streams is {self.max_streams}, of {self.grpc_threads} grpc_threads; streams "
                f"may not have them all: raise grpc_threads or lower max_streams"
            )
        if self.max_object_bytes > self.staging_bytes:
            raise ConfigError(
                f"max_object_bytes is {self.max_object_bytes}, but staging_bytes is "
                f"{self.staging_bytes}: one object has to fit"
            )

    def changed(self, other: ServerOptions) -> list[str]:
        """The names of the options in which the other differs."""
        return [
            field.name
            for field in fields(self)
            if getattr(self, field.name) != getattr(other, field.name)
        ]
