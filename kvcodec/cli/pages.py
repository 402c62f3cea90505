"""The bytes of stored pages, and as much of a damaged one as can be read."""

from __future__ import annotations

import io
import os
import stat
from dataclasses import dataclass, field

import numpy as np
import xxhash

from kvcodec.errors import ConfigError, CorruptPage, PageError, UnsupportedPage
from kvcodec.format import CHECKSUM_BYTES, FIXED, MAGIC, MAX_HEADER_BYTES, EncodedPage

__all__ = [
    "MAX_PAGE_BYTES",
    "ReadPage",
    "StoredBytes",
    "expected_name_error",
    "fault_of",
    "read_file",
    "read_page",
]

#: More than any page in use; a bound on what a file or a store can make a command allocate.
MAX_PAGE_BYTES = 1 << 32
#: A file that does not start like a page is read whole up to here: its first bytes may be damaged.
_FOREIGN_BYTES = 1 << 28
_READ_BYTES = 1 << 26


@dataclass(frozen=True, slots=True)
class StoredBytes:
    """What lies in a file or under a name, and how much there is of it."""

    source: str
    data: memoryview
    name: str | None = None
    modified_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class ReadPage:
    """As much of a page as can be read. `problems` is empty for a sound header.

    A page with damage in its header may still have one that reads well if the damage is mended; its
    fields are then what they most likely were, and are not to be relied on.
    """

    page: EncodedPage | None
    available_bytes: int
    problems: list[PageError] = field(default_factory=list)
    header_is_sound: bool = True


def read_file(path: str) -> StoredBytes:
    """The bytes of one file. Raises `ConfigError` for what is not a readable regular file."""
    try:
        # Non-blocking: opening a FIFO nobody writes to would wait for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"{path!r} cannot be read: {why}") from error
    try:
        status = os.fstat(descriptor)
        _check_regular(path, status)
        # The descriptor is closed here, in every case.
        with open(descriptor, "rb", buffering=0, closefd=False) as file:
            data = _read_start(path, file, status.st_size)
    except OSError as error:
        raise ConfigError(f"{path!r} cannot be read: {error.strerror}") from error
    finally:
        os.close(descriptor)
    return StoredBytes(path, memoryview(data), modified_seconds=status.st_mtime)


def _check_regular(path: str, status: os.stat_result) -> None:
    if stat.S_ISDIR(status.st_mode):
        url = "file://" + os.path.abspath(path)
        raise ConfigError(
            f"{path!r} is a directory, wanted the file of one page; a store is named by its URL "
            f"and a KEY, as in: kvcodec inspect {url} KEY"
        )
    if not stat.S_ISREG(status.st_mode):
        raise ConfigError(f"{path!r} is not a regular file, wanted the file of one page")


def _read_start(path: str, file: io.FileIO, size: int) -> bytes:
    """The whole file if it may be a page."""
    start = file.read(FIXED.size)
    whole = start.startswith(MAGIC) or size <= _FOREIGN_BYTES
    wanted = size if whole else MAX_HEADER_BYTES
    if wanted > MAX_PAGE_BYTES:
        raise ConfigError(
            f"{path!r} has {wanted} bytes, more than the {MAX_PAGE_BYTES} of the largest page this "
            "command reads"
        )
    parts = [start]
    while part := file.read(min(wanted, _READ_BYTES)):
        parts.append(part)
        wanted -= len(part)
    return b"".join(parts)


def expected_name_error(page: EncodedPage, name: str) -> PageError | None:
    """Why a page does not belong under this object name, None if it does."""
    own = page.header.namespace.object_name(page.header.key)
    if own == name:
        return None
    return CorruptPage("name", f"a page that belongs under {own}")


def fault_of(name: str, data: memoryview) -> PageError | None:
    """Why these bytes are not the page of that object name; None if every byte of it is sound."""
    try:
        page = EncodedPage.parse(data)
        page.verify()
    except PageError as error:
        return error
    return expected_name_error(page, name)


def read_page(data: memoryview) -> ReadPage:
    """Read a page's header; where it is damaged, as much of it as can be made out."""
    try:
        return ReadPage(EncodedPage.parse(data), len(data))
    except UnsupportedPage as error:
        return ReadPage(None, len(data), [error], header_is_sound=False)
    except CorruptPage as error:
        problems: list[PageError] = [error]
    for page_bytes in _claimed_sizes(data):
        try:
            mended, sound = _mended(data, page_bytes)
            page = EncodedPage.parse(mended)
        except PageError:
            continue
        if not sound and problems[0].reason != "corrupt:header_checksum":
            problems.append(CorruptPage("header_checksum", "the header does not have its checksum"))
        return ReadPage(page, len(data), problems, header_is_sound=sound)
    return ReadPage(None, len(data), problems, header_is_sound=False)


def _claimed_sizes(data: memoryview) -> list[int]:
    """How long the page may have been: what it says itself, and what there is."""
    if len(data) < FIXED.size:
        return []
    page_bytes = FIXED.unpack_from(data)[4]
    return [
        size for size in dict.fromkeys((page_bytes, len(data))) if 128 <= size <= MAX_PAGE_BYTES
    ]


def _mended(data: memoryview, page_bytes: int) -> tuple[memoryview, bool]:
    """The page at that length, its header given a right magic, size and checksum; and whether it
    had them.

    Missing bytes are zero. They are never touched, so they cost no memory.
    """
    mended = np.zeros(page_bytes, np.uint8)
    shared = min(page_bytes, len(data))
    mended[:shared] = np.frombuffer(data[:shared], np.uint8)
    view = mended.data
    fixed = list(FIXED.unpack_from(view))
    fixed[0], fixed[4] = MAGIC, page_bytes
    header_bytes = fixed[3]
    if not FIXED.size < header_bytes <= min(MAX_HEADER_BYTES, shared):
        raise CorruptPage("header_bytes", f"a header of {header_bytes} bytes in {shared}")
    before = bytes(view[:header_bytes])
    FIXED.pack_into(view, 0, *fixed)
    end = header_bytes - CHECKSUM_BYTES
    checksum = xxhash.xxh3_64_intdigest(view[:end]).to_bytes(CHECKSUM_BYTES, "little")
    view[end:header_bytes] = checksum
    return view, bytes(view[:header_bytes]) == before
