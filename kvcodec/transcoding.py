"""Transcoder: stored pages become smaller ones of the same name, under another spec."""

from __future__ import annotations

import enum
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvcodec.codec import Codec
from kvcodec.derotation import ROTARY_EXTENSION, rotary_of_page, settled_codecs
from kvcodec.errors import ConfigError
from kvcodec.format import MINOR, EncodedPage, Extension, PageHeader, pad64
from kvcodec.identity import CODEC_POOLS, encode_key
from kvcodec.layout import PageLayout, PageViews
from kvcodec.plan import PagePlan, check_spec
from kvcodec.profile import PROFILE_EXTENSION
from kvcodec.rotary import Rotary
from kvcodec.section import RAW, Kind, SectionCodec
from kvcodec.spec import CodecSpec

__all__ = ["MAX_RAW_BYTES", "Outcome", "Transcoder"]

#: No page in use is larger; a bound on what the few bytes of a coded page can make us allocate.
MAX_RAW_BYTES = 1 << 30

_REMEMBERED_TARGETS = 64
#: Codecs that lose nothing, the larger sections first.
_EXACT = (Kind.RAW, Kind.BLOCK, Kind.LOSSLESS)
_ITEMS = {1: np.uint8, 2: np.uint16, 4: np.uint32}

Bytes = npt.NDArray[np.uint8]


class Outcome(str, enum.Enum):
    """What became of a page: it is another one now, or why it stays what it is."""

    SMALLER = "smaller"
    ALREADY = "already"  #: encoded so before
    FEWER_BITS = "fewer_bits"  #: what is lost does not come back with more bits
    STATE = "state"  #: of a pool beside keys and values, whose bytes must not change
    RAW = "raw"  #: kept bit for bit, perhaps on purpose
    OTHER = "other"  #: not encoded as those that are wanted
    NONFINITE = "nonfinite"  #: NaN, infinities: the codec cannot hold it
    NO_GAIN = "no_gain"  #: would be as large
    UNFIT = "unfit"  #: the spec cannot be honoured for it


@dataclass(frozen=True, slots=True)
class _Target:
    """How pages that are alike are encoded anew: `changed` tells which sections."""

    outcome: Outcome
    plan: PagePlan | None = None
    #: As `plan`, but sections that stay are raw, because nobody looks at them.
    work: PagePlan | None = None
    changed: tuple[bool, ...] = ()


class Transcoder:
    """Encodes pages by another spec, where that takes bits away.

    Each section is decided on by itself: one that has lost something gets the new codec only if
    that has fewer bits, one that has not only if the new codec loses something or is smaller.
    Others are taken over byte by byte. So no section ever gets worse without getting smaller, and
    what was encoded once is not encoded again.

    For one thread; several may share a codec.
    """

    def __init__(
        self,
        codec: Codec,
        spec: CodecSpec,
        *,
        only: Sequence[CodecSpec] = (),
        rotary: Rotary | None = None,
    ) -> None:
        """Only pages encoded by one of `only` are touched; by default, all but those that are raw
        as a whole: a store keeps the first tokens of sequences so, and pages do not say why.
        `rotary` is how the keys of pages are rotated that do not tell.
        """
        self._codec = codec
        self._spec = spec
        self._only = tuple(only)
        self._rotary = rotary
        self._targets: OrderedDict[object, _Target] = OrderedDict()
        self._layout: PageLayout | None = None
        self._arrays: list[npt.NDArray[np.generic]] = []
        self._encoded = np.empty(0, np.uint8)
        #: Why the spec cannot be honoured, for pages that are unfit.
        self.reasons: set[str] = set()

    def transcode(self, page: EncodedPage) -> tuple[Outcome, memoryview | None]:
        """The new page, if there is a smaller one. Its memory is used again for the next one.

        Raises `CorruptPage` for a section that does not decode; the checksums of the others are the
        caller's to verify.
        """
        target = self._target(page.header)
        if target.plan is None or target.work is None:
            return target.outcome, None
        key = encode_key(page.header.key)
        views = self._views(page.header.layout)
        data = np.frombuffer(page.data, np.uint8)
        (error,) = self._codec.decode_into(page.header.namespace, target.work, [key], [data], views)
        if error is not None:
            raise error
        if len(self._encoded) < target.work.page_bytes:
            self._encoded = np.empty(target.work.page_bytes, np.uint8)
        encoded = self._codec.encode_into(target.work, [key], views, [self._encoded])
        if encoded.nonfinite_groups[0]:
            return Outcome.NONFINITE, None
        found = self._encoded[: int(encoded.page_bytes[0])].data
        if not all(target.changed):
            found = _merged(page, EncodedPage.parse(found), target)
        if len(found) >= len(page.data):
            return Outcome.NO_GAIN, None
        return Outcome.SMALLER, found

    def _target(self, header: PageHeader) -> _Target:
        key = (header.namespace, header.codecs, len(header.key.encode()), header.extensions)
        target = self._targets.pop(key, None) or self._planned(header)
        self._targets[key] = target
        if len(self._targets) > _REMEMBERED_TARGETS:
            self._targets.popitem(last=False)
        return target

    def _planned(self, header: PageHeader) -> _Target:
        layout = header.layout
        pool = header.identity.as_dict().get("pool", "kv")
        if pool not in CODEC_POOLS:
            return _Target(Outcome.STATE)
        try:
            check_spec(self._spec, layout, 0)
            if layout.raw_bytes > MAX_RAW_BYTES:
                raise ConfigError(f"{layout.raw_bytes} raw bytes; allowed are {MAX_RAW_BYTES}")
            if self._spec.layers and pool != "kv":
                raise ConfigError(f"the layer table is not of the layers of the pool {pool!r}")
            if header.minor > MINOR:
                raise ConfigError(f"a page of version 1.{header.minor}, newer than 1.{MINOR}")
            rotary = rotary_of_page(header.extensions) or self._rotary
            wanted = settled_codecs(self._spec.section_codecs(layout), layout, rotary)
            codecs = tuple(map(_chosen, header.codecs, wanted))
            if codecs == header.codecs:
                same = codecs == wanted
                return _Target(Outcome.ALREADY if same else Outcome.FEWER_BITS)
            if self._only:
                only = (spec.section_codecs(layout) for spec in self._only)
                if header.codecs not in [settled_codecs(c, layout, rotary) for c in only]:
                    return _Target(Outcome.OTHER)
            elif {codec.kind for codec in header.codecs} == {Kind.RAW}:
                return _Target(Outcome.RAW)
            changed = tuple(map(SectionCodec.__ne__, codecs, header.codecs))
            work = [new if is_new else RAW for new, is_new in zip(codecs, changed, strict=True)]
            return _Target(
                Outcome.SMALLER,
                plan=self._plan(header, codecs),
                work=self._plan(header, work),
                changed=changed,
            )
        except ConfigError as error:
            self.reasons.add(str(error))
            return _Target(Outcome.UNFIT)

    def _plan(self, header: PageHeader, codecs: Sequence[SectionCodec]) -> PagePlan:
        """The plan of the new page. It keeps the extensions of the old one, but names the profile
        that it comes from now.
        """
        kept = {extension.type: extension for extension in header.extensions}
        kept.pop(PROFILE_EXTENSION, None)
        if self._spec.profile is not None:
            kept[PROFILE_EXTENSION] = Extension(PROFILE_EXTENSION, self._spec.profile.digest)
        told = kept.pop(ROTARY_EXTENSION, None)
        rotary = rotary_of_page(header.extensions) or self._rotary
        key_bytes = len(header.key.encode())

        def build() -> PagePlan:
            extensions = [kept[number] for number in sorted(kept)]
            return PagePlan.build(header.namespace, codecs, key_bytes, extensions, rotary)

        plan = build()
        if plan.rotary is None and told is not None:
            kept[ROTARY_EXTENSION] = told  # for who encodes it another time
            plan = build()
        return plan

    def _views(self, layout: PageLayout) -> PageViews:
        if layout != self._layout:
            self._arrays = []
            item = _ITEMS[layout.dtype.itemsize]
            for stream in layout.streams:
                shape = (layout.layer_count, stream.head_count, layout.token_count)
                self._arrays.append(np.empty((1, *shape, stream.head_size), item))
            self._layout = layout
        return PageViews.of_arrays(layout, self._arrays)


def _chosen(old: SectionCodec, new: SectionCodec) -> SectionCodec:
    """The codec of a section that has one and is to get another."""
    if old.nominal_bits is not None:
        is_less = new.nominal_bits is not None and new.nominal_bits < old.nominal_bits
    else:
        exact = new.nominal_bits is None
        is_less = not exact or _EXACT.index(new.kind) > _EXACT.index(old.kind)
    return new if is_less else old


def _merged(old: EncodedPage, new: EncodedPage, target: _Target) -> memoryview:
    """The sections of both pages that make up the new one."""
    assert target.plan is not None
    sources = [new if changed else old for changed in target.changed]
    sizes = [source.header.stored_bytes[index] for index, source in enumerate(sources)]
    checksums = [source.header.checksums[index] for index, source in enumerate(sources)]
    parts: list[bytes | memoryview] = [
        target.plan.finished_header(old.header.key, checksums, sizes)
    ]
    for index, source in enumerate(sources):
        start = source.header.section_offsets[index]
        parts.append(source.data[start : start + pad64(sizes[index])])
    return memoryview(b"".join(parts))
