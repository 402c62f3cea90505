"""What ``kvcodec doctor`` looks at: everything that has to work before an engine relies on it."""

from __future__ import annotations

import os
import platform
import re
import secrets
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import EntryPoint, PackageNotFoundError, entry_points, version

import numpy as np
import numpy.typing as npt
import xxhash

from kvcodec import native, reference
from kvcodec.backend import Backend
from kvcodec.cli.output import Json
from kvcodec.cli.stores import opened
from kvcodec.codec import Codec
from kvcodec.errors import BackendError, KVCodecError, NativeError, PageError
from kvcodec.format import EncodedPage, pad64
from kvcodec.identity import Identity, Namespace
from kvcodec.layout import DType, PageLayout, PageViews
from kvcodec.plan import PagePlan
from kvcodec.spec import CodecSpec

__all__ = ["FAILED", "NOTE", "OK", "WARNING", "Check", "checks"]

OK, NOTE, WARNING, FAILED = "ok", "note", "warning", "failed"

_PACKAGES = ("numpy", "xxhash", "torch", "sglang", "lmcache", "fsspec", "grpcio")
_SPECS = (
    "raw",
    "fp8",
    "kv8",
    "kv4",
    "kv2",
    "kv8-asym",
    "kv4-asym",
    "kv4-channel",
    "kv2-channel",
    "ecq-3",
    "lossless",
    "lossless-fast",
)
_CHECKSUM_SIZES = (0, 1, 3, 8, 16, 64, 128, 129, 240, 241, 1024, 100_000)

Bits = npt.NDArray[np.uint16]


@dataclass(frozen=True, slots=True)
class Check:
    """One thing looked at. Only `FAILED` means that something which must work does not."""

    name: str
    status: str
    message: str

    def as_json(self) -> Json:
        """One row of the document."""
        return {"name": self.name, "status": self.status, "message": self.message}


def checks(url: str | None, timeout_seconds: float) -> Iterator[Check]:
    """Every check in turn; a failing one does not keep the others from running."""
    yield from _versions()
    yield _guarded("native library", _library)
    yield _guarded("checksum", _checksums)
    for isa in _isas():
        yield _guarded(f"codec on {isa}", lambda isa=isa: _codec(isa))  # type: ignore[misc]
    yield _backends()
    yield _plugin()
    if url is not None:
        yield _store(url, timeout_seconds)


def _guarded(name: str, look: Callable[[], str]) -> Check:
    try:
        return Check(name, OK, look())
    except (KVCodecError, OSError) as error:
        return Check(name, FAILED, str(error))


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _versions() -> Iterator[Check]:
    own = _installed("kvcodec")
    if own is None:
        message = "not installed: its backends and its plugin are found only if it is"
        yield Check("kvcodec", FAILED, message)
    else:
        yield Check("kvcodec", OK, own)
    system = f"{platform.system()} {platform.machine()}"
    yield Check("python", OK, f"{platform.python_version()} on {system}")
    for package in _PACKAGES:
        found = _installed(package)
        yield Check(package, NOTE, "not installed" if found is None else found)


def _library() -> str:
    from kvcodec.native._library import library

    loaded = library()
    forced = os.environ.get("KVCODEC_FORCE_ISA")
    note = f", forced by KVCODEC_FORCE_ISA={forced}" if forced else ""
    return (
        f"{loaded.path}, ABI {loaded.abi_version()}, uses {native.isa()}{note}, "
        f"has {', '.join(native.available_isas())}"
    )


def _isas() -> tuple[str, ...]:
    try:
        return native.available_isas()
    except NativeError:
        return ()  # said once, by the check of the library


def _checksums() -> str:
    data = np.random.default_rng(0).bytes(max(_CHECKSUM_SIZES))
    for size in _CHECKSUM_SIZES:
        if native.checksum(data[:size]) != xxhash.xxh3_64_intdigest(data[:size]):
            raise NativeError(f"libkvcodec's XXH3 of {size} bytes differs from the xxhash package")
    return f"XXH3-64 equals the xxhash package for {len(_CHECKSUM_SIZES)} lengths"


def _layout() -> PageLayout:
    return PageLayout.mha(
        dtype=DType.BF16, token_count=16, layer_count=1, head_count=2, head_size=128
    )


def _namespace() -> Namespace:
    # Of this run alone: no engine asks for it, and no other doctor uses it.
    return Namespace(Identity.of(kvcodec="doctor", run=secrets.token_hex(16)), _layout())


def _rows() -> list[Bits]:
    """Keys and values of one page, as bf16 bits of shape (pages, layers, heads, tokens, size)."""
    rng = np.random.default_rng(1)
    numbers = rng.standard_normal((2, 1, 1, 2, 16, 128)).astype(np.float32)
    return [
        np.ascontiguousarray(reference.from_float32(part, DType.BF16), dtype=np.uint16)
        for part in numbers
    ]


def _codec(isa: str) -> str:
    """Encode and decode a page under every preset and compare with the reference, bit by bit."""
    before = native.isa()
    codec = Codec(1)
    try:
        native.set_isa(isa)
        for text in _SPECS:
            _compare(codec, CodecSpec.parse(text), text)
    finally:
        native.set_isa(before)
        codec.close()
    return f"{len(_SPECS)} specs encode and decode as the reference does"


def _compare(codec: Codec, spec: CodecSpec, text: str) -> None:
    namespace, rows, key = _namespace(), _rows(), b"doctor"
    page = _encoded(codec, namespace, spec, rows, key)
    decoded = [np.zeros_like(part) for part in rows]
    plan = PagePlan.build(namespace, spec.section_codecs(namespace.layout), len(key))
    views = PageViews.of_arrays(namespace.layout, decoded)
    (error,) = codec.decode_into(namespace, plan, [key], [page], views)
    if error is not None:
        raise NativeError(f"{text}: a page just encoded does not decode: {error}")
    parsed = EncodedPage.parse(page.data)
    for index, section_codec in enumerate(plan.codecs):
        raw, got = rows[index][0, 0], decoded[index][0, 0]
        stored, _ = reference.encode_section(raw, DType.BF16, section_codec)
        if bytes(parsed.section(index)) != stored.ljust(pad64(len(stored)), b"\0"):
            raise NativeError(f"{text}: section {index} is encoded otherwise than by the reference")
        heads, tokens, size = raw.shape
        wanted = reference.decode_section(stored, (heads, tokens, size), DType.BF16, section_codec)
        if not np.array_equal(got, wanted):
            raise NativeError(f"{text}: section {index} decodes otherwise than by the reference")


def _encoded(
    codec: Codec, namespace: Namespace, spec: CodecSpec, rows: list[Bits], key: bytes
) -> npt.NDArray[np.uint8]:
    plan = PagePlan.build(namespace, spec.section_codecs(namespace.layout), len(key))
    page = np.zeros(plan.page_bytes, np.uint8)
    views = PageViews.of_arrays(namespace.layout, rows)
    encoded = codec.encode_into(plan, [key], views, [page])
    return page[: int(encoded.page_bytes[0])]


def _backends() -> Check:
    names = sorted({entry.name for entry in entry_points(group="kvcodec.backends")})
    if not names:
        return Check("backends", FAILED, "none is registered: install kvcodec with pip")
    return Check("backends", OK, ", ".join(f"{name}://" for name in names))


def _plugin() -> Check:
    """Whether SGLang will find kvcodec, and is a release it was tried with."""
    name = "SGLang plugin"
    found = _installed("sglang")
    own = [e for e in entry_points(group="sglang.srt.plugins") if e.value.startswith("kvcodec.")]
    if not own:
        status = FAILED if found else WARNING
        return Check(name, status, "not registered in sglang.srt.plugins: install kvcodec with pip")
    chosen = os.environ.get("SGLANG_PLUGINS")
    if chosen and own[0].name not in [word.strip() for word in chosen.split(",")]:
        message = f"SGLANG_PLUGINS={chosen!r} leaves it out; add {own[0].name!r}"
        return Check(name, FAILED if found else WARNING, message)
    try:
        tested = _tested_versions(own[0])
    except (ImportError, AttributeError) as error:
        return Check(name, FAILED, f"{own[0].value} cannot be loaded: {error}")
    if found is None:
        return Check(name, NOTE, f"{own[0].value}; sglang is not installed here")
    if tested is None or _is_between(found, *tested):
        return Check(name, OK, f"{own[0].value}, sglang {found}")
    span = f"{tested[0]} to {tested[1]}"
    return Check(name, WARNING, f"{own[0].value}; sglang {found} is not among the tested, {span}")


def _tested_versions(entry: EntryPoint) -> tuple[str, str] | None:
    """The oldest and the newest release that the plugin names; the plugin itself is asked."""
    module = sys.modules[entry.load().__module__]
    tested = getattr(module, "TESTED_VERSIONS", None)
    return None if tested is None else (str(tested[0]), str(tested[1]))


def _is_between(found: str, oldest: str, newest: str) -> bool:
    return _numbers(oldest) <= _numbers(found) <= _numbers(newest)


def _numbers(text: str) -> tuple[int, ...]:
    """``0.5.23.post1`` as (0, 5, 23): what comes after the numbers is not compared."""
    match = re.match(r"\d+(?:\.\d+){0,2}", text)
    return () if match is None else tuple(int(number) for number in match.group().split("."))


def _store(url: str, timeout_seconds: float) -> Check:
    """Write a page, read it, verify it and delete it again."""

    def look() -> str:
        with opened(url, create=True) as backend:
            return _canary(backend, timeout_seconds)

    return _guarded("store", look)


def _canary(backend: Backend, timeout_seconds: float) -> str:
    namespace = _namespace()
    codec = Codec(1)
    try:
        page = _encoded(codec, namespace, CodecSpec.parse("kv4"), _rows(), b"doctor")
    finally:
        codec.close()
    name = namespace.object_name("doctor")
    steps = []
    started = time.monotonic()
    try:
        (failure,) = backend.put([name], [page.data], timeout_seconds=timeout_seconds)
        if failure is not None:
            raise BackendError(f"a page cannot be written: {failure}")
        steps.append(("write", time.monotonic() - started))
        started = time.monotonic()
        _read_back(backend, name, page, timeout_seconds)
        steps.append(("read", time.monotonic() - started))
    finally:
        started = time.monotonic()
        (gone,) = backend.delete([name], timeout_seconds=timeout_seconds)
    steps.append(("delete", time.monotonic() - started))
    if not gone or backend.exists([name], timeout_seconds=timeout_seconds)[0]:
        raise BackendError(f"the page {name} was written and cannot be deleted")
    times = ", ".join(f"{step} {1000 * seconds:.1f} ms" for step, seconds in steps)
    return f"a page of {len(page)} bytes was written, read, verified and deleted: {times}"


def _read_back(
    backend: Backend, name: str, page: npt.NDArray[np.uint8], timeout_seconds: float
) -> None:
    info = backend.stat(name, timeout_seconds=timeout_seconds)
    if info is None or info.stored_bytes != len(page):
        raise BackendError(f"{name} was written and is not there as it was: {info}")
    buffer = np.zeros(len(page), np.uint8)
    (answer,) = backend.get_into([name], [buffer.data], timeout_seconds=timeout_seconds)
    if isinstance(answer, BackendError):
        raise answer
    try:
        EncodedPage.parse(buffer[: answer or 0].data).verify()
    except PageError as error:
        raise BackendError(f"{name} comes back damaged: {error}") from error
    if not np.array_equal(buffer, page):
        raise BackendError(f"{name} comes back as another page")
