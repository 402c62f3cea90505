"""Pages for the tests: made and read by the reference codec or by the native one, and damaged."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import xxhash

from kvcodec.codec import Codec
from kvcodec.derotation import ROTARY_EXTENSION, ROTATED_ROLES
from kvcodec.errors import PageError
from kvcodec.format import CHECKSUM_BYTES, FIXED, SECTION, STREAM, EncodedPage, Extension, pad64
from kvcodec.identity import Identity, Namespace
from kvcodec.layout import DType, PageLayout, PageViews, Role, Stream
from kvcodec.plan import PagePlan
from kvcodec.profile import PROFILE_EXTENSION
from kvcodec.reference import decode_section, encode_section
from kvcodec.rotary import Rotary
from kvcodec.spec import CodecSpec, SectionCodec

ELEMENT_BITS = {DType.BF16: np.uint16, DType.FP16: np.uint16, DType.FP32: np.uint32}

IDENTITY = Identity.of(model="example/tiny", revision="0123abcd", pool="kv", tp_rank=0, tp_size=1)
KEY = "9f86d081884c7d659a2feaa0c55ad015"

# Groups of eight elements that encoders get wrong: NaNs, infinities, the ends of the domain, zeros
# of both signs, denormals, one outlier. The last of fp32 has a range that binary32 cannot hold.
SPECIAL = {
    DType.BF16: [
        [0x3F80] * 7 + [last] for last in (0x7FC1, 0xFFFF, 0x7F80, 0xFF80, 0x7F00, 0xFF00, 0x7EFF)
    ]
    + [[0x8000] * 8, [0, 0x8000] * 4, [1, 0x8001] * 4, [0x0080] * 8, [0xFEFF, 0x7EFF] * 4],
    DType.FP16: [[0x3C00] * 7 + [last] for last in (0x7E01, 0xFFFF, 0x7C00, 0xFC00, 0x7BFF)]
    + [[0x8000] * 8, [0, 0x8000] * 4, [1, 0x8001] * 4, [0x0400] * 8, [0xFBFF, 0x7BFF] * 4],
    DType.FP32: [
        [0x3F800000] * 7 + [last]
        for last in (0x7FC00001, 0xFFFFFFFF, 0x7F800000, 0xFF800000, 0x7F000000, 0x7EFFFFFF)
    ]
    + [[0x80000000] * 8, [0, 0x80000000] * 4, [1, 0x80000001] * 4, [0xFEFFFFFF, 0x7EFFFFFF] * 4],
}

Rows = npt.NDArray[np.unsignedinteger]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A page to be made: its name, shape and codecs, and what its header says beyond that."""

    name: str
    layout: PageLayout
    spec: str
    minor: int = 0
    optional_flags: int = 0
    extensions: tuple[Extension, ...] = ()
    rotary: Rotary | None = None
    identity: Identity = IDENTITY
    key: str = KEY
    special: bool = False
    codecs: tuple[SectionCodec, ...] = field(init=False)

    def __post_init__(self) -> None:
        codecs = CodecSpec.parse(self.spec).section_codecs(self.layout)
        object.__setattr__(self, "codecs", codecs)

    @property
    def namespace(self) -> Namespace:
        return Namespace(self.identity, self.layout)

    @property
    def extensions_in_page(self) -> tuple[Extension, ...]:
        """All that the header has, the rotary parameters among them."""
        extra = [] if self.rotary is None else [Extension(ROTARY_EXTENSION, self.rotary.record)]
        return tuple(sorted([*self.extensions, *extra], key=lambda extension: extension.type))

    def rows(self) -> list[Rows]:
        """The raw page: per stream the element bits (layers, heads, tokens, head_size)."""
        rows = make_rows(self.layout, seed=xxhash.xxh3_64_intdigest(self.name.encode()) % 2**32)
        if self.special:
            for array in rows:
                special = [bits for group in SPECIAL[self.layout.dtype] for bits in group]
                array.reshape(-1)[: len(special)] = special
        return rows

    def plan(self) -> PagePlan:
        plan = PagePlan.build(
            self.namespace,
            self.codecs,
            len(self.key.encode()),
            extensions=self.extensions,
            rotary=self.rotary,
        )
        header = bytearray(plan.header)
        struct.pack_into("<H", header, 10, self.minor)
        struct.pack_into("<I", header, 28, self.optional_flags)
        return replace(plan, header=bytes(header))

    def page(self) -> bytes:
        return bytes(encode_page(self.plan(), self.key, self.rows()))


def make_rows(layout: PageLayout, seed: int) -> list[Rows]:
    """Element bits like those of a KV cache, with outliers, zeros and both signs.

    Made of integer operations alone: another numpy makes the same page.
    """
    rows = []
    for index, stream in enumerate(layout.streams):
        shape = (layout.layer_count, stream.head_count, layout.token_count, stream.head_size)
        noise = _noise(int(np.prod(shape)), seed + 7919 * index).reshape(shape)
        rows.append(_element_bits(noise, layout.dtype))
    return rows


def _noise(count: int, seed: int) -> npt.NDArray[np.uint64]:
    """SplitMix64."""
    with np.errstate(over="ignore"):
        state = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        state += np.uint64(seed) * np.uint64(0xD1342543DE82EF95)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def _element_bits(noise: npt.NDArray[np.uint64], dtype: DType) -> Rows:
    if not dtype.is_quantizable:
        return (noise >> np.uint64(56)).astype(np.uint8)
    exponent_bits, mantissa_bits = {
        DType.BF16: (8, 7),
        DType.FP16: (5, 10),
        DType.FP32: (8, 23),
    }[dtype]
    width = np.uint64(mantissa_bits)
    bias = (1 << (exponent_bits - 1)) - 1
    sign = noise >> np.uint64(63)
    # Most elements lie between 1/8 and 4; one in 64 is an outlier of up to 64, one in 64 is zero.
    exponent = np.uint64(bias - 3) + (noise >> np.uint64(50)) % np.uint64(5)
    kind = (noise >> np.uint64(40)) % np.uint64(64)
    exponent = np.where(kind == 1, np.uint64(bias + 5), exponent)
    mantissa = noise & np.uint64((1 << mantissa_bits) - 1)
    bits = (sign << np.uint64(exponent_bits + mantissa_bits)) | (exponent << width) | mantissa
    return np.where(kind == 0, np.uint64(0), bits).astype(ELEMENT_BITS[dtype])


def sections_of(layout: PageLayout) -> Iterator[tuple[int, int, Stream]]:
    """(layer, stream index, stream) of every section, in canonical order."""
    for layer in range(layout.layer_count):
        for index, stream in enumerate(layout.streams):
            yield layer, index, stream


def raw_bytes(layout: PageLayout, rows: Sequence[Rows]) -> bytes:
    """The raw page in canonical order: layer, stream, head, token, element."""
    return b"".join(rows[index][layer].tobytes() for layer, index, _ in sections_of(layout))


def rows_of_raw(layout: PageLayout, raw: bytes) -> list[Rows]:
    """The inverse of `raw_bytes`."""
    rows = empty_rows(layout)
    at = 0
    for layer, index, stream in sections_of(layout):
        size = layout.section_raw_bytes(stream)
        part = np.frombuffer(raw[at : at + size], rows[index].dtype)
        rows[index][layer] = part.reshape(rows[index].shape[1:])
        at += size
    assert at == len(raw)
    return rows


def encode_page(plan: PagePlan, key: str, rows: Sequence[Rows]) -> bytearray:
    """A whole page, by the reference codec."""
    sections, sizes = [], []
    for number, (layer, index, stream) in enumerate(sections_of(plan.layout)):
        codec, rotary = plan.codecs[number], _rotary(plan, stream)
        stored, _ = encode_section(rows[index][layer], plan.layout.dtype, codec, rotary)
        assert codec.kind.is_coded or len(stored) == plan.stored_bytes[number]
        assert len(stored) <= plan.stored_bytes[number]
        sections.append(stored.ljust(pad64(len(stored)), b"\0"))
        sizes.append(len(stored))
    checksums = [xxhash.xxh3_64_intdigest(section) for section in sections]
    page = bytearray(plan.finished_header(key, checksums, sizes)) + b"".join(sections)
    assert not plan.is_fixed or len(page) == plan.page_bytes
    return page


def _rotary(plan: PagePlan, stream: Stream) -> Rotary | None:
    """The rotation of a stream's rows."""
    return plan.rotary if stream.role in ROTATED_ROLES else None


def decode_page(page: EncodedPage) -> bytes:
    """The raw page in canonical order, every section verified first."""
    layout = page.header.layout
    plan = PagePlan.of_page(page.header, memoryview(page.data))
    parts = []
    for number, (_, _, stream) in enumerate(sections_of(layout)):
        stored = bytes(page.section(number))[: page.header.stored_bytes[number]]
        shape = (stream.head_count, layout.token_count, stream.head_size)
        codec, rotary = page.header.codecs[number], _rotary(plan, stream)
        parts.append(decode_section(stored, shape, layout.dtype, codec, rotary).tobytes())
    return b"".join(parts)


def outside_groups(plan: PagePlan, rows: Sequence[Rows]) -> int:
    """How many groups of a page lie outside the domain, by the reference codec."""
    return sum(
        encode_section(
            rows[index][layer], plan.layout.dtype, plan.codecs[number], _rotary(plan, stream)
        )[1]
        for number, (layer, index, stream) in enumerate(sections_of(plan.layout))
    )


def native_encode(
    codec: Codec, plan: PagePlan, key: str, rows: Sequence[Rows]
) -> tuple[bytes, int]:
    """A whole page by the native codec, and how many of its groups lie outside the domain."""
    target = np.full(plan.page_bytes, 0xA5, np.uint8)
    views = PageViews.of_arrays(plan.layout, [array[None] for array in rows])
    encoded = codec.encode_into(plan, [key.encode()], views, [target])
    page_bytes = int(encoded.page_bytes[0])
    return target[:page_bytes].tobytes(), int(encoded.nonfinite_groups[0])


def native_decode(
    codec: Codec, namespace: Namespace, plan: PagePlan, key: str, page: bytes
) -> bytes | PageError:
    """The raw page in canonical order by the native codec, or why it is refused."""
    layout = namespace.layout
    rows = [np.full_like(array, 0x5A) for array in empty_rows(layout)]
    views = PageViews.of_arrays(layout, [array[None] for array in rows])
    data = np.frombuffer(page, np.uint8)
    [error] = codec.decode_into(namespace, plan, [key.encode()], [data], views)
    return raw_bytes(layout, rows) if error is None else error


def empty_rows(layout: PageLayout) -> list[Rows]:
    """Zeros in the shape of a raw page."""
    item = ELEMENT_BITS.get(layout.dtype, np.uint8)
    return [
        np.zeros((layout.layer_count, s.head_count, layout.token_count, s.head_size), item)
        for s in layout.streams
    ]


def reseal(page: bytearray, *, sections: bool = True) -> bytearray:
    """Write the checksums that a liar would write: of whatever stands where the header points to.

    Where the sizes lead out of the page, what can be sealed is sealed.
    """
    if len(page) < FIXED.size:
        return page
    fixed = FIXED.unpack_from(page)
    header_bytes, section_count = fixed[3], fixed[8]
    stream_count = page[33]
    table = FIXED.size + stream_count * STREAM.size
    offset = header_bytes
    for index in range(section_count if sections else 0):
        row = table + index * SECTION.itemsize
        if row + SECTION.itemsize > min(len(page), header_bytes):
            break
        (stored,) = struct.unpack_from("<I", page, row + 8)
        if offset + pad64(stored) > len(page):
            break
        checksum = xxhash.xxh3_64_intdigest(page[offset : offset + pad64(stored)])
        struct.pack_into("<Q", page, row + 16, checksum)
        offset += pad64(stored)
    if FIXED.size + CHECKSUM_BYTES <= header_bytes <= len(page):
        end = header_bytes - CHECKSUM_BYTES
        struct.pack_into("<Q", page, end, xxhash.xxh3_64_intdigest(page[:end]))
    return page


def mha(
    *,
    dtype: DType = DType.BF16,
    tokens: int = 5,
    layers: int = 1,
    heads: int = 2,
    size: int = 96,
    value_size: int | None = None,
    layer_start: int = 0,
) -> PageLayout:
    """Keys and values, small."""
    return PageLayout.mha(
        dtype=dtype,
        token_count=tokens,
        layer_count=layers,
        head_count=heads,
        head_size=size,
        value_head_size=value_size,
        layer_start=layer_start,
    )


def mla(
    *,
    dtype: DType = DType.BF16,
    tokens: int = 3,
    layers: int = 1,
    latent: int = 512,
    rope: int = 64,
) -> PageLayout:
    """A latent and its RoPE part, small."""
    return PageLayout.mla(
        dtype=dtype, token_count=tokens, layer_count=layers, latent_size=latent, rope_size=rope
    )


def _int_cases() -> Iterator[Case]:
    """Every bit width, symmetry, axis and quantizable element type, on shapes with tails."""
    shapes = {
        2: {"tokens": 5, "heads": 2, "size": 80},
        4: {"tokens": 7, "heads": 1, "size": 96, "value_size": 128},
        8: {"tokens": 3, "heads": 3, "size": 72, "value_size": 40},
    }
    for dtype in (DType.BF16, DType.FP16, DType.FP32):
        for bits, shape in shapes.items():
            for axis in ("", "-channel"):
                for symmetry in ("", "-asym"):
                    group = {"": 32 if bits == 2 else 64, "-channel": 4 if bits == 4 else 2}[axis]
                    codec = f"int{bits}{axis}{symmetry}"
                    yield Case(
                        name=f"{codec}-{dtype.text}",
                        layout=mha(dtype=dtype, **shape),
                        spec=f"key={codec}-g{group} value={codec}",
                    )


def _other_cases() -> Iterator[Case]:
    yield Case(name="raw-bf16-mha128", layout=mha(size=128), spec="raw")
    yield Case(name="raw-fp16", layout=mha(dtype=DType.FP16, size=33), spec="raw")
    yield Case(name="raw-fp32", layout=mha(dtype=DType.FP32, size=20), spec="raw")
    yield Case(name="raw-fp8-e4m3", layout=mha(dtype=DType.FP8_E4M3, size=128), spec="kv4")
    yield Case(name="raw-fp8-e5m2", layout=mha(dtype=DType.FP8_E5M2, size=64), spec="kv4")
    yield Case(name="opaque-u8", layout=PageLayout.opaque(page_bytes=1001), spec="kv4")
    yield Case(
        name="opaque-bf16", layout=PageLayout.opaque(page_bytes=500, dtype=DType.BF16), spec="kv4"
    )
    yield Case(name="mla-512-64-kv4", layout=mla(), spec="kv4")
    yield Case(
        name="mla-512-64-k8v4-rope-raw", layout=mla(), spec="key=int8-g64 value=int4-g64 rope=raw"
    )
    yield Case(name="mla-latent-alone", layout=mla(latent=576, rope=0), spec="kv2")
    yield Case(
        name="layers-mixed",
        layout=mha(layers=3, layer_start=14, size=64, heads=1),
        spec="key=int4-g64 value=int4-g64 layer.14=raw,int8-g32 "
        "layer.16=int2-asym-g16,int4-channel",
    )
    yield Case(
        name="head-range",
        layout=PageLayout(
            dtype=DType.BF16,
            token_count=4,
            layer_count=1,
            streams=(Stream(Role.KEY, 2, 64, 6), Stream(Role.VALUE, 2, 64, 6)),
        ),
        spec="kv8-asym",
    )
    yield Case(name="one-element", layout=mha(tokens=1, heads=1, size=1), spec="kv4-asym")
    yield Case(name="group-of-one", layout=mha(size=17), spec="key=int8-g1 value=int8-asym-g1")
    yield Case(name="group-of-three", layout=mha(size=65), spec="key=int4-g3 value=int2-asym-g7")
    yield Case(name="minor-65535", layout=mha(size=32), spec="kv4", minor=65535)
    yield Case(name="optional-flags", layout=mha(size=32), spec="kv4", optional_flags=0xFFFFFFFF)
    yield Case(
        name="extensions",
        layout=mha(size=32),
        spec="kv4",
        extensions=(
            Extension(7, b""),
            Extension(1000, b"twelve bytes"),
            Extension(65535, b"8 bytes."),
        ),
    )
    yield Case(
        name="identity-none-key-one",
        layout=mha(size=32),
        spec="kv4",
        identity=Identity(),
        key="k",
    )
    yield Case(
        name="identity-unicode",
        layout=mha(size=32),
        spec="kv4",
        identity=Identity.of(model="模型/é", z="", long="x" * 300),
        key="ключ" * 8,
    )


def _special_cases() -> Iterator[Case]:
    for dtype in SPECIAL:
        for codec in ("int8-g8", "int8-asym-g8", "int2-g8", "int2-asym-g8"):
            yield Case(
                name=f"special-{codec}-{dtype.text}",
                layout=mha(dtype=dtype, tokens=3, heads=1, size=64, value_size=40),
                spec=f"key={codec} value={codec.replace('-g8', '')}",
                special=True,
            )


def _fp8_cases() -> Iterator[Case]:
    for dtype in SPECIAL:
        yield Case(
            name=f"fp8-{dtype.text}",
            layout=mha(dtype=dtype, tokens=3, size=40, value_size=33),
            spec="fp8",
        )
        yield Case(
            name=f"special-fp8-{dtype.text}",
            layout=mha(dtype=dtype, tokens=3, heads=1, size=64, value_size=40),
            spec="key=fp8 value=int8-g8",
            special=True,
        )
    yield Case(name="fp8-mla", layout=mla(), spec="key=fp8 value=int4-g64")


ROTARY = Rotary(48, 0, tuple(float(np.float32(10000.0 ** (-i / 24))) for i in range(24)))


def _coded_cases() -> Iterator[Case]:
    for spec, dtypes in {
        "ecq-3": (DType.BF16, DType.FP16, DType.FP32),
        "lossless": (DType.BF16, DType.FP16),
        "lossless-fast": (DType.BF16, DType.FP16),
    }.items():
        for dtype in dtypes:
            yield Case(
                name=f"{spec}-{dtype.text}",
                layout=mha(dtype=dtype, tokens=19, heads=2, size=40, value_size=33),
                spec=spec,
            )
    yield Case(
        name="ecq-rotary",
        layout=mha(tokens=70, heads=1, size=56),
        spec="key=ecq-4.25-channel value=int8",
        extensions=(Extension(1000, b"twelve bytes"),),
        rotary=ROTARY,
    )
    yield Case(
        name="profile",
        layout=mha(tokens=16, layers=2, heads=1, size=64),
        spec="key=ecq-3.25-channel value=ecq-2.75 layer.1=ecq-4.0625-channel,ecq-2",
        extensions=(Extension(PROFILE_EXTENSION, hashlib.sha256(b"a profile").digest()),),
        rotary=ROTARY,
    )
    yield Case(name="ecq-mla", layout=mla(), spec="key=ecq-2.5-channel value=ecq-2 rope=lossless")
    yield Case(
        name="coded-as-raw",
        layout=mha(tokens=16, heads=1, size=64),
        spec="key=ecq-2-channel value=lossless",
        special=True,
    )


def _transformed_cases() -> Iterator[Case]:
    for dtype in SPECIAL:
        yield Case(
            name=f"derotated-{dtype.text}",
            layout=mha(dtype=dtype, tokens=19, size=56),
            spec="key=int4-channel-derotated-asym-g8 value=int8",
            rotary=ROTARY,
        )
        yield Case(
            name=f"hadamard-{dtype.text}",
            layout=mha(dtype=dtype, tokens=3, size=64, value_size=128),
            spec="key=int4-hadamard-asym-g32 value=int2-hadamard",
        )
        yield Case(
            name=f"special-derotated-{dtype.text}",
            layout=mha(dtype=dtype, tokens=4, heads=1, size=64),
            spec="key=int8-channel-derotated-g3 value=int8-hadamard-asym",
            rotary=ROTARY,
            special=True,
        )
    yield Case(
        name="derotated-interleaved",
        layout=mha(tokens=70, layers=2, heads=1, size=32),
        spec="key=int2-channel-derotated-asym-g32 value=int4-asym-g64 layer.1=int8,raw",
        extensions=(Extension(1000, b"twelve bytes"),),
        rotary=Rotary(32, 1, ROTARY.frequencies[:16]),
    )
    yield Case(
        name="derotated-mla",
        layout=mla(),
        spec="key=int4-hadamard-asym value=raw rope=int8-channel-derotated",
        rotary=ROTARY,
    )


CASES: dict[str, Case] = {
    case.name: case
    for cases in (
        _int_cases,
        _other_cases,
        _special_cases,
        _coded_cases,
        _fp8_cases,
        _transformed_cases,
    )
    for case in cases()
}

#: One small page per codec and element type, for tests that try every bit of it.
TINY_CASES: dict[str, Case] = {
    case.name: case
    for case in [
        Case(name="raw-bf16", layout=mha(tokens=1, heads=1, size=5), spec="raw", key="k"),
        Case(
            name="raw-fp8",
            layout=mha(dtype=DType.FP8_E4M3, tokens=2, heads=1, size=33),
            spec="raw",
            key="k",
        ),
        Case(name="fp8-bf16", layout=mha(tokens=2, heads=1, size=17), spec="fp8", key="k"),
        Case(
            name="transformed-bf16",
            layout=mha(tokens=3, heads=1, size=16),
            spec="key=int4-channel-derotated-asym-g2 value=int4-hadamard",
            rotary=Rotary(6, 1, ROTARY.frequencies[:3]),
            key="k",
        ),
        *(
            Case(
                name=f"int{bits}{axis}{symmetry}-{dtype.text}",
                layout=mha(dtype=dtype, tokens=3, heads=1, size=17),
                spec=f"key=int{bits}{axis}{symmetry}-g8 value=int{bits}{axis}{symmetry}-g2",
                key="k",
            )
            for dtype in (DType.BF16, DType.FP16, DType.FP32)
            for bits in (2, 4, 8)
            for axis in ("", "-channel")
            for symmetry in ("", "-asym")
        ),
    ]
}
