"""Who may call: on TCP whoever shows the token and the certificate that are asked for.

A Unix socket is guarded by its permissions and by the sessions that `PageServer` demands there.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

import grpc

from kvcodec.errors import ConfigError

__all__ = ["MIN_TOKEN_CHARACTERS", "Gate", "read_tokens", "rewrapped"]

#: A token that can be guessed is none.
MIN_TOKEN_CHARACTERS = 16

# Probes of a load balancer or of Kubernetes cannot send a token, and health tells nobody anything.
_OPEN_TO_ALL = "/grpc.health.v1.Health/"

_Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


def read_tokens(token: str, path: str) -> tuple[bytes, ...]:
    """The tokens that are valid: the one given, or each line of a file; none if neither is set.

    Two lines are for the time of a change. Raises `ConfigError`.
    """
    if path:
        try:
            lines = Path(path).read_text(encoding="utf-8").split()
        except (OSError, ValueError) as error:
            raise ConfigError(f"access.token_file {path!r} cannot be read: {error}") from error
        if not lines:
            raise ConfigError(f"access.token_file {path!r} has no token in it")
    else:
        lines = [token] if token else []
    if any(len(line) < MIN_TOKEN_CHARACTERS for line in lines):
        raise ConfigError(
            f"a token in access.{'token_file' if path else 'token'} is shorter than "
            f"{MIN_TOKEN_CHARACTERS} characters"
        )
    return tuple(line.encode() for line in lines)


class Gate(grpc.ServerInterceptor):
    """Refuses calls over TCP without a valid token, or from a client of a name not allowed.

    `refused` is told why: ``token`` or ``name``.
    """

    def __init__(self, refused: Callable[[str], None]) -> None:
        self._refused = refused
        self._tokens: tuple[bytes, ...] = ()
        self._names: frozenset[str] = frozenset()

    def reload(self, tokens: tuple[bytes, ...], client_names: Iterable[str]) -> None:
        """Calls that come from now on are judged by these; without any, all are let in."""
        self._tokens = tokens
        self._names = frozenset(client_names)

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], _Handler | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _Handler | None:
        """Part of gRPC's interface."""
        handler = continuation(handler_call_details)
        if handler is None or handler_call_details.method.startswith(_OPEN_TO_ALL):
            return handler
        return rewrapped(handler, self._checked)

    def _checked(self, behaviour: Callable[..., Any]) -> Callable[..., Any]:
        def checked(request: object, context: grpc.ServicerContext) -> Any:  # noqa: ANN401
            self._admit(context)
            return behaviour(request, context)

        return checked

    def _admit(self, context: grpc.ServicerContext) -> None:
        if not context.peer().startswith("unix:"):
            if self._tokens and not self._has_token(context):
                self._refuse(context, grpc.StatusCode.UNAUTHENTICATED, "token")
            if self._names and self._names.isdisjoint(_client_names(context)):
                self._refuse(context, grpc.StatusCode.PERMISSION_DENIED, "name")

    def _has_token(self, context: grpc.ServicerContext) -> bool:
        metadata = dict(context.invocation_metadata())
        scheme, _, shown = str(metadata.get("authorization", "")).partition(" ")
        given = shown.strip().encode()
        valid = [hmac.compare_digest(given, token) for token in self._tokens]
        return scheme.lower() == "bearer" and any(valid)

    def _refuse(
        self, context: grpc.ServicerContext, code: grpc.StatusCode, reason: str
    ) -> NoReturn:
        self._refused(reason)
        context.abort(code, f"a call here needs a valid {reason}")
        raise AssertionError("abort raises")


def _client_names(context: grpc.ServicerContext) -> Iterator[str]:
    """The names in the client's certificate, as the TLS library has verified it."""
    found = context.auth_context()
    for field in ("x509_subject_alternative_name", "x509_common_name"):
        names: Iterable[object] = found.get(field, ())
        for name in names:
            yield name.decode(errors="replace") if isinstance(name, bytes) else str(name)


def rewrapped(
    handler: _Handler, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> _Handler:
    """The same handler with what it does, a function of request and context, wrapped."""
    codecs = handler.request_deserializer, handler.response_serializer
    for behaviour, method_handler in (
        (handler.unary_unary, grpc.unary_unary_rpc_method_handler),
        (handler.unary_stream, grpc.unary_stream_rpc_method_handler),
        (handler.stream_unary, grpc.stream_unary_rpc_method_handler),
        (handler.stream_stream, grpc.stream_stream_rpc_method_handler),
    ):
        if behaviour is not None:
            return method_handler(wrap(behaviour), *codecs)
    raise AssertionError("a handler has one behaviour")
