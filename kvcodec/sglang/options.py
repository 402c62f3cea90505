"""The options of ``--hicache-storage-backend-extra-config``, read once, strictly.

Every option that is not SGLang's own must be known here, and what cannot be honoured is a
`ConfigError` at start-up.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

from kvcodec.errors import ConfigError
from kvcodec.spec import SPEC_OPTIONS, CodecSpec
from kvcodec.store import StoreOptions

__all__ = ["KNOWN_OPTIONS", "SGLANG_OPTIONS", "AdapterOptions"]

_PASS_PREFIX_KEYS = "hicache_storage_pass_prefix_keys"

#: What SGLang reads from the same dictionary. It takes most of these out before a backend sees
#: them, but not in every version and not on every path.
SGLANG_OPTIONS = frozenset(
    {
        "backend_name",
        "class_name",
        "file_storage_path",
        _PASS_PREFIX_KEYS,
        "interface_v1",
        "module_path",
        "prefetch_threshold",
        "prefetch_timeout_base",
        "prefetch_timeout_per_ki_token",
        "tp_lcm_size",
    }
)

_STORE_OPTIONS = frozenset(field.name for field in fields(StoreOptions))

_OWN_OPTIONS = frozenset(
    {
        "url",
        "namespace",
        "revision",
        "salt",
        "residual_length",
        "sink_tokens",
        "protected_preset",
        "rotary",
        "auto_candidates",
    }
)

#: What `preset` says where speeds are to choose, and among which specs, the preferred one first:
#: none of them loses more than `kv4` does.
_AUTO = "auto"
_AUTO_CANDIDATES = ("kv8-channel", "ecq-4", "kv4-channel", "ecq-3")

KNOWN_OPTIONS = _OWN_OPTIONS | SPEC_OPTIONS | _STORE_OPTIONS

_MAX_PROTECTED_TOKENS = 1 << 24


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterOptions:
    """What the user asked for.

    With `alternatives`, speeds choose between `spec` and them (`kvcodec.auto`).
    `residual_tokens` at the end of every backup call, and `sink_tokens` at the start of every
    sequence, are stored with `protected_spec`. `passes_prefix_keys` says whether SGLang tells where
    in its sequence a page stands; None where that cannot be known beforehand. `salt_digest` stands
    for the salt, which is kept nowhere. `rotary` is ``auto``, ``off``, or the path of a model's
    config.
    """

    url: str
    spec: CodecSpec
    protected_spec: CodecSpec
    store: StoreOptions
    alternatives: tuple[CodecSpec, ...] = ()
    namespace: str = ""
    revision: str = ""
    salt_digest: str = ""
    residual_tokens: int = 0
    sink_tokens: int = 0
    passes_prefix_keys: bool | None = None
    rotary: str = "auto"

    @classmethod
    def parse(cls, extra: Mapping[str, object] | None) -> AdapterOptions:
        """Options from SGLang's extra configuration. Raises `ConfigError`."""
        extra = dict(extra or {})
        for name in extra:
            if name not in KNOWN_OPTIONS and name not in SGLANG_OPTIONS:
                raise ConfigError(_unknown(name))
        passes = extra.get(_PASS_PREFIX_KEYS)
        spec, *alternatives = _specs(extra)
        options = cls(
            url=_url(extra),
            spec=spec,
            alternatives=tuple(alternatives),
            protected_spec=CodecSpec.parse(_text("protected_preset", extra, "raw")),
            store=StoreOptions.parse(_subset(extra, _STORE_OPTIONS)),
            namespace=_text("namespace", extra, ""),
            revision=_text("revision", extra, ""),
            salt_digest=_digest(_text("salt", extra, "")),
            residual_tokens=_tokens("residual_length", extra),
            sink_tokens=_tokens("sink_tokens", extra),
            passes_prefix_keys=passes if isinstance(passes, bool) else None,
            rotary=_text("rotary", extra, "auto"),
        )
        options._check(extra)
        return options

    def _check(self, extra: Mapping[str, object]) -> None:
        if self.sink_tokens and self.passes_prefix_keys is False:
            raise ConfigError(
                f"sink_tokens is {self.sink_tokens}, but SGLang does not say where a page stands "
                f'in its sequence: set "{_PASS_PREFIX_KEYS}": true as well'
            )
        if "rotary" in extra and not self.can_derotate:
            raise ConfigError(
                "rotary has no effect: no keys are derotated, or stored as ecq per channel"
            )
        if "protected_preset" in extra and not self.protects:
            raise ConfigError(
                "protected_preset has no effect without residual_length or sink_tokens"
            )

    @property
    def specs(self) -> tuple[CodecSpec, ...]:
        """Every spec that pages which are not protected may have, the preferred one first."""
        return (self.spec, *self.alternatives)

    @property
    def can_derotate(self) -> bool:
        """Whether it matters how the model rotates its keys."""
        return any(spec.can_derotate for spec in self.specs)

    @property
    def has_layers(self) -> bool:
        """Whether single layers have codecs of their own."""
        return any(spec.layers for spec in self.specs)

    @property
    def protects(self) -> bool:
        """Whether any page is stored with `protected_spec`."""
        return bool(self.sink_tokens or self.residual_tokens)

    def without_layers(self) -> AdapterOptions:
        """The same options for a pool whose layers are not the model's own, such as a draft's."""
        spec, *others = (replace(spec, layers=(), profile=None) for spec in self.specs)
        return replace(
            self,
            spec=spec,
            alternatives=tuple(others),
            protected_spec=replace(self.protected_spec, layers=()),
        )

    def as_raw(self) -> AdapterOptions:
        """The same options for a pool whose bytes must not change."""
        return replace(self, spec=CodecSpec(), alternatives=(), protected_spec=CodecSpec())


def _specs(extra: Mapping[str, object]) -> list[CodecSpec]:
    """The spec that the options name; with the preset ``auto`` its candidates."""
    if extra.get("preset") != _AUTO:
        if "auto_candidates" in extra:
            raise ConfigError('auto_candidates has no effect without "preset": "auto"')
        return [CodecSpec.from_options(_subset(extra, SPEC_OPTIONS))]
    others = sorted((SPEC_OPTIONS - {"preset"}) & set(extra))
    if others:
        raise ConfigError(
            f'{others[0]} says how pages are encoded, and "preset": "auto" leaves that to speeds: '
            "give what may be chosen in auto_candidates, or another preset"
        )
    names = extra.get("auto_candidates", list(_AUTO_CANDIDATES))
    if not isinstance(names, Sequence) or isinstance(names, str) or len(names) < 2:
        raise ConfigError(
            f"auto_candidates is {names!r}, wanted a list of two presets or specs at least"
        )
    return [CodecSpec.from_options({"spec": name}) for name in names]


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name, sorted(KNOWN_OPTIONS | SGLANG_OPTIONS), n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known are {_listing()}"
    return f"unknown option {name!r} in --hicache-storage-backend-extra-config: {hint}"


def _listing() -> str:
    return ", ".join(sorted(KNOWN_OPTIONS))


def _subset(extra: Mapping[str, object], names: frozenset[str]) -> dict[str, object]:
    return {name: value for name, value in extra.items() if name in names}


def _text(name: str, extra: Mapping[str, object], default: str) -> str:
    value = extra.get(name, default)
    if not isinstance(value, str):
        raise ConfigError(f"{name} is {value!r}, wanted a text")
    return value


def _url(extra: Mapping[str, object]) -> str:
    url = _text("url", extra, "")
    if not url:
        raise ConfigError(
            "kvcodec needs to know where to keep pages: give 'url' in "
            "--hicache-storage-backend-extra-config, such as "
            '\'{"url": "file:///var/cache/kv"}\''
        )
    return url


def _tokens(name: str, extra: Mapping[str, object]) -> int:
    value = extra.get(name, 0)
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or not 0 <= value <= _MAX_PROTECTED_TOKENS:  # type: ignore[operator]
        raise ConfigError(f"{name} is {value!r}, allowed is 0 to {_MAX_PROTECTED_TOKENS} tokens")
    assert isinstance(value, int)
    return value


def _digest(salt: str) -> str:
    if not salt:
        return ""
    return hashlib.sha256(b"kvcodec salt 1\0" + salt.encode()).hexdigest()[:32]
