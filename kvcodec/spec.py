"""Which encoding each layer's keys and values get: a frozen value with a canonical text form."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kvcodec.errors import ConfigError
from kvcodec.layout import MAX_HEAD_SIZE, PageLayout, Role
from kvcodec.profile import PROFILE_PREFIX, Profile, ProfileReference
from kvcodec.section import RAW, Axis, Kind, SectionCodec, Transform

__all__ = ["PRESETS", "RAW", "SPEC_OPTIONS", "Axis", "CodecSpec", "Kind", "SectionCodec"]


_LAYER_TEXT = re.compile(r"\d{1,10}", re.ASCII)
_BITS_TEXT = re.compile(r"\d{1,2}(\.\d{1,6})?", re.ASCII)

#: Name -> text. `g64`, symmetric and per token are KVTuner's defaults; 2 bits are asymmetric,
#: because a symmetric 2-bit code has three levels; the channel presets are KIVI's: keys per
#: channel, values per token. Hadamard rows have even channels: one group is enough.
PRESETS: Mapping[str, str] = {
    "raw": "key=raw value=raw",
    "fp8": "key=fp8 value=fp8",
    "kv8": "key=int8-g64 value=int8-g64",
    "kv4": "key=int4-g64 value=int4-g64",
    "kv2": "key=int2-asym-g64 value=int2-asym-g64",
    "k8v4": "key=int8-g64 value=int4-g64",
    "k8v2": "key=int8-g64 value=int2-asym-g64",
    "k4v2": "key=int4-g64 value=int2-asym-g64",
    "kv8-asym": "key=int8-asym-g64 value=int8-asym-g64",
    "kv4-asym": "key=int4-asym-g64 value=int4-asym-g64",
    "kv8-channel": "key=int8-channel-asym-g64 value=int8-asym-g64",
    "kv4-channel": "key=int4-channel-asym-g64 value=int4-asym-g64",
    "kv2-channel": "key=int2-channel-asym-g32 value=int2-asym-g32",
    "kv4-derotated": "key=int4-channel-derotated-asym-g64 value=int4-asym-g64",
    "kv2-derotated": "key=int2-channel-derotated-asym-g32 value=int2-asym-g32",
    "kv4-hadamard": "key=int4-hadamard-asym value=int4-hadamard-asym",
    "ecq-4": "key=ecq-4-channel value=ecq-4",
    "ecq-3": "key=ecq-3-channel value=ecq-3",
    "ecq-2.5": "key=ecq-2.5-channel value=ecq-2.5",
    "lossless": "key=lossless-channel value=lossless",
    "lossless-fast": "key=lossless-fast value=lossless-fast",
    "high_performance": "key=raw value=raw",
    "balanced": "key=int8-g64 value=int4-g64",
    "memory_optimized": "key=int4-g64 value=int4-g64",
    "ultra_low_memory": "key=int2-asym-g64 value=int2-asym-g64",
}

#: The options `CodecSpec.from_options` understands; the names from `nbits_key` on are KVTuner's.
SPEC_OPTIONS = frozenset(
    {
        "preset",
        "spec",
        "rope",
        "nbits_key",
        "nbits_value",
        "asym",
        "axis_key",
        "axis_value",
        "q_group_size",
        "per_layer_config",
        "per_layer_config_path",
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class CodecSpec:
    """The encoding of a whole page.

    `layers` overrides keys and values of single layers (absolute index, key, value), ascending. An
    MLA latent takes whichever of the key's and the value's codec has more bits, because it serves
    as both. `rope` is the codec of MLA's RoPE part; None means the key's, but never below 8 bits.
    Element types that cannot be quantized (fp8, bytes) are stored raw. `profile` is where the spec
    comes from, if from a profile; its pages say so.
    """

    key: SectionCodec = RAW
    value: SectionCodec = RAW
    rope: SectionCodec | None = None
    layers: tuple[tuple[int, SectionCodec, SectionCodec], ...] = ()
    profile: ProfileReference | None = None

    def __post_init__(self) -> None:
        indices = [layer for layer, _, _ in self.layers]
        if indices != sorted(set(indices)) or any(index < 0 for index in indices):
            raise ConfigError(f"layer indices {indices} are not ascending numbers from 0 on")
        for codec in [self.value, *(value for _, _, value in self.layers)]:
            if codec.transform is Transform.DEROTATED:
                raise ConfigError(f"values are not rotated: {codec.text} is for keys")

    @classmethod
    def parse(cls, text: str) -> CodecSpec:
        """A preset's name, or the canonical text form (see `text`)."""
        fields: dict[str, str] = {}
        for word in PRESETS.get(text, text).split():
            name, equals, value = word.partition("=")
            if not equals or name in fields:
                raise ConfigError(_unknown_spec(text))
            fields[name] = value
        layers = []
        for name in [name for name in fields if name.startswith("layer.")]:
            key, comma, value = fields.pop(name).partition(",")
            if not comma or not _LAYER_TEXT.fullmatch(name[6:]):
                raise ConfigError(_unknown_spec(text))
            layers.append((int(name[6:]), SectionCodec.parse(key), SectionCodec.parse(value)))
        rope = fields.pop("rope", None)
        if set(fields) != {"key", "value"}:
            raise ConfigError(_unknown_spec(text))
        return cls(
            key=SectionCodec.parse(fields["key"]),
            value=SectionCodec.parse(fields["value"]),
            rope=None if rope is None else SectionCodec.parse(rope),
            layers=tuple(sorted(layers, key=lambda layer: layer[0])),
        )

    @classmethod
    def load(cls, text: str) -> CodecSpec:
        """What a user's own configuration names: a text for `parse`, or ``profile:PATH@BITS``, the
        largest point of a profile that takes at most so many bits per value. Reads that file.
        """
        if not text.startswith(PROFILE_PREFIX):
            return cls.parse(text)
        path, _, bits = text[len(PROFILE_PREFIX) :].rpartition("@")
        if not path or not _BITS_TEXT.fullmatch(bits):
            raise ConfigError(f"codec spec {text!r}; wanted profile:PATH@BITS, such as @3.25")
        profile = Profile.read(Path(path))
        return replace(cls.parse(profile.text(float(bits))), profile=profile.reference)

    @property
    def text(self) -> str:
        """Canonical text: ``key=int4-g64 value=int4-g64 [rope=int8-g64] [layer.3=int8-g64,int4-g64
        ...]``.
        """
        words = [f"key={self.key.text}", f"value={self.value.text}"]
        if self.rope is not None:
            words.append(f"rope={self.rope.text}")
        words += [f"layer.{layer}={key.text},{value.text}" for layer, key, value in self.layers]
        return " ".join(words)

    @classmethod
    def from_options(cls, options: Mapping[str, object]) -> CodecSpec:
        """A spec from user options: `preset` (default ``kv4``) or `spec` (see `load`), then
        KVTuner's names on top: bits for keys and values in general or for single layers, the other
        options for every codec there is.

        Raises `ConfigError` for an unknown name, a value out of range, two options that exclude
        each other, or an option without effect because everything it names is stored raw.
        """
        unknown = sorted(set(options) - SPEC_OPTIONS)
        if unknown:
            raise ConfigError(
                f"unknown codec option {unknown[0]!r}; known are {', '.join(sorted(SPEC_OPTIONS))}"
            )
        if "spec" in options and "preset" in options:
            raise ConfigError("give either 'preset' or 'spec', not both")
        base = cls.load(_text("spec" if "spec" in options else "preset", options, "kv4"))
        if base.profile is not None and len(options) > 1:
            other = min(set(options) - {"preset", "spec"})
            raise ConfigError(f"a profile says how every layer is stored: leave out {other!r}")
        if "rope" in options:
            base = replace(base, rope=SectionCodec.parse(_text("rope", options, "")))
        key = _with_options(base.key, "key", options, options)
        value = _with_options(base.value, "value", options, options)
        layers = {
            layer: (_with_options(k, "key", {}, options), _with_options(v, "value", {}, options))
            for layer, k, v in base.layers
        }
        for layer, entry in _layer_table(options).items():
            bits, where = {**options, **entry}, f"layer {layer}: "
            layers[layer] = (
                _with_options(base.key, "key", bits, options, where),
                _with_options(base.value, "value", bits, options, where),
            )
        _check_effect(
            options,
            keys=[key, *(k for k, _ in layers.values())],
            values=[value, *(v for _, v in layers.values())],
        )
        return replace(
            base,
            key=key,
            value=value,
            layers=tuple((layer, *layers[layer]) for layer in sorted(layers)),
        )

    @property
    def can_derotate(self) -> bool:
        """Whether a codec of keys can make use of how they are rotated."""
        keys = [self.key, *(key for _, key, _ in self.layers)]
        return any(
            codec.transform is Transform.DEROTATED
            or (codec.kind is Kind.ECQ and codec.axis is Axis.CHANNEL)
            for codec in keys
        )

    def section_codecs(self, layout: PageLayout) -> tuple[SectionCodec, ...]:
        """The resolved codec of every section of a page, in canonical order."""
        overrides = {layer: (key, value) for layer, key, value in self.layers}
        end = layout.layer_start + layout.layer_count
        codecs = []
        for layer in range(layout.layer_start, end):
            key, value = overrides.get(layer, (self.key, self.value))
            for stream in layout.streams:
                codec = (
                    self._role_codec(stream.role, key, value)
                    if layout.dtype.is_quantizable
                    else RAW
                )
                codecs.append(codec.resolved(stream.head_size, layout.token_count))
        return tuple(codecs)

    def _role_codec(self, role: Role, key: SectionCodec, value: SectionCodec) -> SectionCodec:
        if role is Role.KEY:
            return key
        if role is Role.VALUE:
            return value
        if role is Role.OPAQUE:
            return RAW
        if role is Role.LATENT:
            better = value if _quality_bits(value) > _quality_bits(key) else key
            if better.transform is Transform.DEROTATED:  # no position turns a latent
                return replace(better, transform=Transform.NONE)
            return better
        if self.rope is not None:
            return self.rope
        if _quality_bits(key) >= 8:
            return key
        return replace(key, bits=8) if key.kind is Kind.INT else SectionCodec.integer(8)


def _quality_bits(codec: SectionCodec) -> float:
    return 16 if codec.nominal_bits is None else codec.nominal_bits


def _unknown_spec(text: str) -> str:
    return (
        f"codec spec {text!r}; wanted a preset ({', '.join(PRESETS)}) or a text such as "
        f"'key=int8-g64 value=int4-g64'"
    )


def _text(name: str, options: Mapping[str, object], default: str) -> str:
    value = options.get(name, default)
    if not isinstance(value, str):
        raise ConfigError(f"{name} is {value!r}, wanted a text")
    return value


def _integer(name: str, value: object, allowed: str, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(f"{name} is {value!r}, allowed is {allowed}")
    return value


def _with_options(
    codec: SectionCodec,
    which: str,
    bits: Mapping[str, object],
    options: Mapping[str, object],
    where: str = "",
) -> SectionCodec:
    """`codec` with the number of bits that `bits` may give, and KVTuner's other options over it.

    Sixteen bits are raw. Two bits turn asymmetric unless `asym` says otherwise.
    """
    name = f"nbits_{which}"
    if name in bits:
        count = bits[name]
        if isinstance(count, bool) or not isinstance(count, int) or count not in (2, 4, 8, 16):
            raise ConfigError(f"{where}{name} is {count!r}, allowed is 2, 4, 8 or 16 (raw)")
        if count == 16:
            codec = RAW
        elif codec.kind is not Kind.INT:
            codec = SectionCodec.integer(count, asymmetric=count == 2, group_size=64)
        else:
            codec = replace(codec, bits=count, asymmetric=codec.asymmetric or count == 2)
    changes: dict[str, Any] = {}
    if "asym" in options:
        if not isinstance(options["asym"], bool):
            raise ConfigError(f"asym is {options['asym']!r}, allowed is true or false")
        changes["asymmetric"] = options["asym"]
    name = f"axis_{which}"
    if name in options:
        allowed = "0 (per token) or 1 (per channel)"
        changes["axis"] = Axis(_integer(name, options[name], allowed, 0, 1))
    if "q_group_size" in options:
        size = options["q_group_size"]
        if isinstance(size, bool) or size != -1:
            size = _integer("q_group_size", size, "-1 (whole row) or 1 and up", 1, MAX_HEAD_SIZE)
        changes["group_size"] = size
    if codec.kind in (Kind.RAW, Kind.BLOCK, Kind.FP8):
        return codec
    if codec.kind.is_coded:
        changes = {name: value for name, value in changes.items() if name == "axis"}
    return replace(codec, **changes)


def _check_effect(
    options: Mapping[str, object], keys: Sequence[SectionCodec], values: Sequence[SectionCodec]
) -> None:
    """Refuse an option that changes nothing because of how what it names is stored."""
    named = {"axis_key": keys, "axis_value": values, "asym": [*keys, *values]}
    named["q_group_size"] = named["asym"]
    for name, codecs in named.items():
        touched = {Kind.INT}
        if name.startswith("axis"):
            touched |= {Kind.ECQ, Kind.LOSSLESS}
        if name in options and not any(codec.kind in touched for codec in codecs):
            what = {"axis_key": "keys are", "axis_value": "values are"}.get(name, "everything is")
            how = " or ".join(sorted({codec.text for codec in codecs}))
            raise ConfigError(f"{name} has no effect: {what} stored {how}")


def _layer_table(options: Mapping[str, object]) -> dict[int, Mapping[str, object]]:
    """KVTuner's layer table: layer index -> {nbits_key, nbits_value}, from the option or from a
    YAML file.
    """
    if "per_layer_config" in options and "per_layer_config_path" in options:
        raise ConfigError("give either 'per_layer_config' or 'per_layer_config_path', not both")
    if "per_layer_config_path" in options:
        # YAML costs a tenth of a run of `kvcodec inspect`, which reads no tables.
        from kvcodec.yaml_table import read_table

        table: object = read_table(Path(_text("per_layer_config_path", options, "")))
    else:
        table = options.get("per_layer_config", {})
    if not isinstance(table, Mapping):
        raise ConfigError(
            f"the layer table is a {type(table).__name__}, wanted "
            f"layer index -> nbits_key, nbits_value"
        )
    layers: dict[int, Mapping[str, object]] = {}
    for layer, entry in table.items():
        is_number = isinstance(layer, str) and _LAYER_TEXT.fullmatch(layer)
        index = int(layer) if is_number else layer
        index = _integer("layer index in the layer table", index, "0 and up", 0, 2**31)
        if (
            not isinstance(entry, Mapping)
            or not set(entry) <= {"nbits_key", "nbits_value"}
            or not entry
        ):
            raise ConfigError(
                f"layer {index} of the layer table is {entry!r}, wanted nbits_key and nbits_value"
            )
        if index in layers:
            raise ConfigError(f"layer {index} appears twice in the layer table")
        layers[index] = entry
    return layers
