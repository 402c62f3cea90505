"""Damaged and forged pages: refused, or of a form that a compliant writer could have given them.

The rule. A page whose checksums were not written anew is accepted only if it is, byte for byte, a
page that was written. A page whose checksums were written anew, by somebody who knows the format,
is accepted only if a compliant writer could have written its header: planning a page of the
identity, layout, codecs, key and extensions that the reader found gives that header byte for byte.
Its sections may then hold anything; they decode without a crash, alike on every path, to exactly
the size of the raw page. Whatever else comes is a `PageError`, at a cost bounded by the page.
"""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from mutants import Original, mutants, originals
from pages import CASES, decode_page, empty_rows, raw_bytes
from profiles import MUTANTS

from kvcodec.codec import Codec
from kvcodec.derotation import ROTARY_EXTENSION, rotary_of_page
from kvcodec.errors import CorruptPage, MismatchedPage, PageError
from kvcodec.format import EncodedPage
from kvcodec.layout import PageViews
from kvcodec.plan import PagePlan
from kvcodec.reference_ecq import DamagedSection
from kvcodec.section import Transform

ORIGINALS = originals()
BATCH = 64
LIE_BYTES = 64 << 10


def pages_that_were_written() -> set[bytes]:
    return {original.page for original in ORIGINALS}


def read(original: Original, page: bytes) -> EncodedPage | PageError:
    """What the Python reader makes of it, when asked for the original."""
    try:
        encoded = EncodedPage.parse(page)
        encoded.header.expect(original.case.namespace, original.case.key)
        encoded.verify()
    except PageError as error:
        return error
    return encoded


def raw_page(encoded: EncodedPage) -> bytes | PageError:
    """What the reference makes of sections whose checksums are right."""
    try:
        return decode_page(encoded)
    except DamagedSection as error:
        return CorruptPage("section_stream", str(error))
    except PageError as error:
        return error


def read_raw(original: Original, page: bytes) -> bytes | PageError:
    """Like `read`, but section by section: the first that is bad gives the reason, whether its
    checksum, its padding or its stream is.
    """
    try:
        encoded = EncodedPage.parse(page)
        encoded.header.expect(original.case.namespace, original.case.key)
    except PageError as error:
        return error
    return raw_page(encoded)


def could_have_been_written(encoded: EncodedPage) -> bool:
    """Whether planning the page anew gives its header."""
    header = encoded.header
    derotated = any(codec.transform is Transform.DEROTATED for codec in header.codecs)
    rotary = rotary_of_page(header.extensions) if derotated else None
    plan = PagePlan.build(
        header.namespace,
        header.codecs,
        len(header.key.encode()),
        [e for e in header.extensions if rotary is None or e.type != ROTARY_EXTENSION],
        rotary,
    )
    finished = bytearray(plan.finished_header(header.key, header.checksums, header.stored_bytes))
    written = encoded.data[: header.header_bytes]
    finished[10:12], finished[28:32] = written[10:12], written[28:32]  # minor, optional flags
    return bytes(finished[:-8]) == bytes(written[:-8]) and header.page_bytes == len(encoded.data)


def in_batches(
    stream: Iterator[tuple[Original, bytes]],
) -> Iterator[tuple[Original, list[bytes]]]:
    """Mutants of one original together, as the native codec takes pages."""
    waiting: dict[str, list[bytes]] = {}
    owners = {}
    for original, page in stream:
        name = original.case.name
        owners[name] = original
        waiting.setdefault(name, []).append(page)
        if len(waiting[name]) == BATCH:
            yield original, waiting.pop(name)
    for name, pages in waiting.items():
        yield owners[name], pages


def native_answers(
    codec: Codec, original: Original, pages: Sequence[bytes]
) -> list[bytes | PageError]:
    """Raw pages, or why they are refused, by the native codec under the original's plan."""
    case = original.case
    layout = case.layout
    targets = [np.zeros((len(pages), *rows.shape), rows.dtype) for rows in empty_rows(layout)]
    # Copies: memory of exactly the page's size, so that a sanitizer sees a read beyond it.
    errors = codec.decode_into(
        case.namespace,
        case.plan(),
        [case.key.encode()] * len(pages),
        [np.frombuffer(page, np.uint8).copy() for page in pages],
        PageViews.of_arrays(layout, targets),
    )
    return [
        raw_bytes(layout, [rows[index] for rows in targets]) if error is None else error
        for index, error in enumerate(errors)
    ]


# --- bit rot: nothing but the page itself is accepted


@pytest.mark.parametrize("original", ORIGINALS[:40], ids=lambda original: original.case.name)
def test_every_flipped_bit_is_noticed(original: Original, codec: Codec):
    """Any one bit of a page, be it in the header, a section or the padding, makes it refused."""

    def flipped() -> Iterator[tuple[Original, bytes]]:
        page = bytearray(original.page)
        for bit in range(8 * len(page)):
            page[bit // 8] ^= 1 << bit % 8
            yield original, bytes(page)
            page[bit // 8] ^= 1 << bit % 8

    count = 0
    for _, pages in in_batches(flipped()):
        answers = native_answers(codec, original, pages)
        for page, answer in zip(pages, answers, strict=True):
            error = read(original, page)
            assert isinstance(error, PageError)
            assert isinstance(answer, PageError)
            assert answer.reason == error.reason
            assert error.kind == "corrupt" or error.reason == "unsupported:version"
        count += len(pages)
    assert count == 8 * len(original.page)


def test_damaged_pages_are_refused():
    """Flipped, cut, extended, spliced, swapped, blanked: refused unless it is a page as written."""
    written = pages_that_were_written()
    accepted = 0
    for mutant in mutants(MUTANTS // 2, 1, ORIGINALS, sealed=False):
        if isinstance(read(mutant.original, mutant.page), EncodedPage):
            assert mutant.page in written, mutant
            accepted += 1
        else:
            assert mutant.page != mutant.original.page
    assert accepted < MUTANTS / 10, "the mutator does next to nothing"


def test_forged_pages_are_refused_or_well_formed():
    """With checksums written anew, only a page is accepted that a writer could have written."""
    accepted = 0
    reasons: set[str] = set()
    for mutant in mutants(MUTANTS // 2, 2, ORIGINALS, sealed=True):
        try:
            encoded = EncodedPage.parse(mutant.page)
            encoded.verify()
        except PageError as error:
            reasons.add(error.reason)
            continue
        accepted += 1
        assert could_have_been_written(encoded), mutant
        raw = raw_page(encoded)
        if isinstance(raw, PageError):
            reasons.add(raw.reason)
        else:
            assert len(raw) == encoded.header.layout.raw_bytes
    assert accepted > MUTANTS / 50, "the mutator reaches nothing but the first checks"
    assert len(reasons) >= 15, f"the mutator reaches few checks: {sorted(reasons)}"


@pytest.mark.usefixtures("known_isa")
def test_native_decoder_answers_like_the_reader(codec: Codec):
    """Damaged or forged, a page is refused by the native path for the reason that the Python reader
    gives, and an accepted one has the numbers of the reference.
    """
    stream = ((mutant.original, mutant.page) for mutant in mutants(MUTANTS // 2, 3, ORIGINALS))
    for original, pages in in_batches(stream):
        answers = native_answers(codec, original, pages)
        for page, answer in zip(pages, answers, strict=True):
            expected = read_raw(original, page)
            if isinstance(expected, bytes):
                assert answer == expected
            else:
                assert isinstance(answer, PageError), page
                assert answer.reason == expected.reason


def test_mutants_are_the_same_from_the_same_seed():
    first = [mutant.page for mutant in mutants(200, 7, ORIGINALS)]
    assert first == [mutant.page for mutant in mutants(200, 7, ORIGINALS)]
    assert first != [mutant.page for mutant in mutants(200, 8, ORIGINALS)]


# --- cost


def test_lie_costs_no_memory():
    """Refusing or reading a page takes memory for a few copies of it, whatever its numbers say."""
    tracemalloc.start()
    try:
        for mutant in mutants(max(4000, MUTANTS // 20), 4, ORIGINALS, sealed=True):
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            read(mutant.original, mutant.page)
            peak = tracemalloc.get_traced_memory()[1] - before
            assert peak <= 4 * len(mutant.page) + LIE_BYTES, mutant
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "name", ["header_bytes", "page_bytes", "layers", "tokens", "heads", "size"]
)
def test_single_lie_costs_no_memory(name: str):
    """The largest numbers there can be, each alone and in a sealed header, reserve nothing."""
    original = ORIGINALS[0]
    offset, code = {
        "header_bytes": (12, "<I"),
        "page_bytes": (16, "<Q"),
        "layers": (34, "<H"),
        "tokens": (40, "<I"),
        "heads": (68, "<I"),
        "size": (72, "<I"),
    }[name]
    tracemalloc.start()
    try:
        for bits in range(8 * struct.calcsize(code)):
            page = bytearray(original.page)
            struct.pack_into(code, page, offset, (2 << bits) - 1)
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            read(original, bytes(page))
            assert tracemalloc.get_traced_memory()[1] - before <= LIE_BYTES
    finally:
        tracemalloc.stop()


# --- the right page of somebody else


def test_no_golden_page_is_taken_for_another():
    """Asked for under another page's name, every page is a mismatch with a reason."""
    pages = {name: EncodedPage.parse(case.page()) for name, case in CASES.items()}
    spaces = {name: (case.namespace, case.key) for name, case in CASES.items()}
    for name, encoded in pages.items():
        for other, (namespace, key) in spaces.items():
            if spaces[name] == (namespace, key):
                encoded.header.expect(namespace, key)
                continue
            with pytest.raises(MismatchedPage) as caught:
                encoded.header.expect(namespace, key)
            assert caught.value.reason.startswith("mismatch:"), other
