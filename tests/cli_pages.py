"""Stored pages, and command lines to look at them with, for the tests of the command line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import xxhash
from fake_backend import FakeBackend

from kvcodec import reference
from kvcodec.backend import Backend, ObjectInfo, open_backend
from kvcodec.cli import main
from kvcodec.format import Extension, pad64
from kvcodec.identity import Identity, Namespace
from kvcodec.layout import DType, PageLayout
from kvcodec.plan import PagePlan
from kvcodec.spec import CodecSpec

HEADS, TOKENS, SIZE = 2, 16, 64


def namespace_of(rank: int = 0, layers: int = 4, model: str = "test/model") -> Namespace:
    layout = PageLayout.mha(
        dtype=DType.BF16,
        token_count=TOKENS,
        layer_count=layers,
        head_count=HEADS,
        head_size=SIZE,
        layer_start=2,
    )
    return Namespace(Identity.of(model=model, rank=rank), layout)


def make_page(
    key: str = "k" * 64,
    spec: str = "key=int8-g64 value=int4-asym-g64",
    namespace: Namespace | None = None,
    scale: float = 1.0,
    extensions: Sequence[Extension] = (),
    nan: bool = False,
) -> bytes:
    """A page by the slow encoder; needs no native library."""
    namespace = namespace or namespace_of()
    layout = namespace.layout
    codecs = CodecSpec.parse(spec).section_codecs(layout)
    plan = PagePlan.build(namespace, codecs, len(key.encode()), extensions)
    rng = np.random.default_rng(7)
    sections = []
    for codec in plan.codecs:
        values = scale * rng.standard_normal((HEADS, TOKENS, SIZE)).astype(np.float32)
        if nan:
            values[0, 0, 0] = np.nan
        bits = reference.from_float32(values, layout.dtype)
        data, _ = reference.encode_section(bits, layout.dtype, codec)
        sections.append(data)
    padded = [data.ljust(pad64(len(data)), b"\0") for data in sections]
    checksums = [xxhash.xxh3_64_intdigest(section) for section in padded]
    header = plan.finished_header(key, checksums, [len(data) for data in sections])
    return header + b"".join(padded)


def flipped(page: bytes, offset: int) -> bytes:
    """The page with one bit turned; negative offsets count from its end."""
    damaged = bytearray(page)
    damaged[offset] ^= 1
    return bytes(damaged)


def put(backend: Backend, name: str, page: bytes) -> str:
    assert backend.put([name], [memoryview(page)], timeout_seconds=5) == [None]
    return name


def fill(url: str, pages: dict[str, bytes]) -> None:
    backend = open_backend(url)
    for name, page in pages.items():
        put(backend, name, page)
    backend.close()


def filled(url: str, keys: str = "abc", ranks: int = 2) -> dict[str, bytes]:
    """Sound pages in a store, by name: one for each key in the namespace of each rank."""
    pages = {
        space.object_name(key): make_page(key=key, namespace=space)
        for space in map(namespace_of, range(ranks))
        for key in keys
    }
    fill(url, pages)
    return pages


def contents(url: str) -> dict[str, bytes]:
    """Everything in a store."""
    backend = open_backend(url)
    found = {}
    for info in list(backend.list()):
        buffer = bytearray(info.stored_bytes)
        assert backend.get_into([info.name], [memoryview(buffer)], timeout_seconds=5) == [
            info.stored_bytes
        ]
        found[info.name] = bytes(buffer)
    backend.close()
    return found


class Dated(FakeBackend):
    """Written in the order of names, the last first."""

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        self._begin("list", [prefix])
        for at, (name, data) in enumerate(sorted(self.objects.items())):
            if name.startswith(prefix):
                yield ObjectInfo(name, len(data), 1000.0 - at)


def run_json(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, Any, str]:
    """Exit code, the document on stdout (which must be all there is), and stderr."""
    code = main([*words, "--json"])
    captured = capsys.readouterr()
    return code, json.loads(captured.out), captured.err


def run_text(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(list(words))
    captured = capsys.readouterr()
    return code, captured.out, captured.err
