"""Round trips of kvcodec through SGLang's controller, and what the reference codec expects."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from sglang_harness import HiCacheSession, make_tokens
from sglang_pools import KVRows

from kvcodec.format import EncodedPage
from kvcodec.layout import DType, Role
from kvcodec.reference import decode_section, encode_section
from kvcodec.spec import CodecSpec

PAGES = 8


def url_of(directory: Path) -> str:
    return f"file://{directory / 'store'}"


def name_of(configuration: dict[str, Any]) -> str:
    return "-".join(f"{name}={value}" for name, value in configuration.items())


def round_trip(
    directory: Path,
    options: dict[str, Any],
    session_class: type[HiCacheSession] = HiCacheSession,
    **session_options: Any,
) -> tuple[HiCacheSession, KVRows, KVRows, dict[str, int]]:
    """Back up, forget, prefetch: the session (closed), the rows before and after, the counters."""
    settings = {"backend": "kvcodec", "extra": {"url": url_of(directory), **options}}
    with session_class(**(settings | session_options)) as session:
        # SGLang declines to load back fewer than ten tokens.
        tokens = make_tokens(PAGES * max(session.page_size, 2), seed=1)
        original = session.backup(tokens, seed=1)
        session.evict()
        result = session.prefetch(tokens)
        counters = session.storage.counters()
    assert result.storage_hit_tokens == len(tokens)
    assert result.rows is not None
    return session, original, result.rows, counters


def expected_rows(rows: np.ndarray, role: Role, spec: str, dtype: DType, page_size: int) -> Any:
    """What the reference codec makes of rows [layer, token, head, element] of element bits."""
    codec = CodecSpec.parse(spec)
    result = np.empty_like(rows)
    for layer, start in np.ndindex(rows.shape[0], rows.shape[1] // page_size):
        part = slice(start * page_size, (start + 1) * page_size)
        page = np.ascontiguousarray(rows[layer, part].transpose(1, 0, 2))
        chosen = {
            Role.KEY: codec.key,
            Role.VALUE: codec.value,
            Role.LATENT: codec.key,
            Role.ROPE: codec.rope,
        }[role]
        if chosen is None or not dtype.is_quantizable:
            chosen = CodecSpec().key
        stored, _ = encode_section(page, dtype, chosen)
        result[layer, part] = decode_section(stored, page.shape, dtype, chosen).transpose(1, 0, 2)
    return result


def bits_of(tensor: Any) -> np.ndarray:
    import torch

    kind = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32}[tensor.element_size()]
    return np.asarray(tensor.contiguous().view(kind).numpy())


def page_files(directory: Path) -> list[Path]:
    files = [path for path in directory.rglob("*") if path.is_file()]
    pages = [path for path in files if path.read_bytes()[:4] == b"\x89KVC"]
    return sorted(pages, key=lambda path: EncodedPage.parse(path.read_bytes()).header.key)
