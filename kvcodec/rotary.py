"""Rotary position embedding of keys: what a page says of it, and its table of rotations.

A page stores rotated keys. A codec that turns them back by the index of the token *within* the page
lines up each channel over time; the unknown angle of the page's first token is a constant that goes
into the channel's mean. FORMAT.md 3.7.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvcodec.errors import ConfigError

__all__ = [
    "CONFIG_FILE",
    "INTERLEAVED",
    "LARGEST_FREQUENCY",
    "SPLIT",
    "Rotary",
    "read_rotary",
    "rotary_of_config",
]

#: The file in which a model's folder says how it rotates its keys.
CONFIG_FILE = "config.json"

SPLIT = 0  #: channel i pairs with i + size / 2, as in Llama and Qwen
INTERLEAVED = 1  #: channel 2i pairs with 2i + 1, as in GPT-J and DeepSeek
#: Radians per token; a larger one is no position any more.
LARGEST_FREQUENCY = 8.0

# Models that SGLang serves with pairs of neighbours. In ecq the wrong style costs bits, never
# quality: what does not get narrower is stored as it is. In int sections it does cost quality.
_INTERLEAVED_MODELS = frozenset(
    {
        "chatglm",
        "cohere",
        "cohere2",
        "deepseek_v2",
        "deepseek_v3",
        "glm",
        "glm4",
        "gptj",
        "kimi_k2",
        "llama4",
    }
)

_HEAD = struct.Struct("<HBBI")

# Constants of FORMAT.md 3.7.1: 2/pi, and pi/2 in two parts of 33 bits.
_QUARTERS = float.fromhex("0x1.45f306dc9c883p-1")
_QUARTER_HIGH = float.fromhex("0x1.921fb54400000p+0")
_QUARTER_LOW = float.fromhex("0x1.0b4611a600000p-34")
_SIN = tuple((-1) ** n / math.factorial(2 * n + 1) for n in range(8))
_COS = tuple((-1) ** n / math.factorial(2 * n) for n in range(9))


def _polynomial(x: npt.NDArray[np.float64], factors: tuple[float, ...]) -> npt.NDArray[np.float64]:
    value = np.full(x.shape, factors[-1])
    for factor in reversed(factors[:-1]):
        value = value * x + factor
    return value


@dataclass(frozen=True, slots=True)
class Rotary:
    """The first `size` channels of a head are rotated in `size / 2` pairs.

    `frequencies`: radians per token of each pair, exact binary32 numbers in 0 ... 8.
    """

    size: int
    style: int
    frequencies: tuple[float, ...]

    def __post_init__(self) -> None:
        if self.size % 2 or not 2 <= self.size <= 65534:
            raise ConfigError(f"{self.size} rotated channels; allowed is an even number from 2")
        if self.style not in (SPLIT, INTERLEAVED):
            raise ConfigError(f"rotary style {self.style}; allowed are 0 (split), 1 (interleaved)")
        if len(self.frequencies) != self.size // 2:
            raise ConfigError(
                f"{len(self.frequencies)} frequencies for {self.size} rotated channels; "
                f"{self.size // 2} are needed"
            )
        for frequency in self.frequencies:
            if not 0 <= frequency <= LARGEST_FREQUENCY:
                raise ConfigError(f"rotary frequency {frequency}; allowed is 0 to 8")
            if float(np.float32(frequency)) != frequency:
                raise ConfigError(f"rotary frequency {frequency!r} is not a number of binary32")

    @property
    def record(self) -> bytes:
        """Data of the page's header extension 2."""
        head = _HEAD.pack(self.size, self.style, 0, 0)
        return head + np.array(self.frequencies, "<f4").tobytes()

    @classmethod
    def from_record(cls, data: bytes) -> Rotary:
        """Inverse of `record`. ConfigError if the data is none."""
        if len(data) < _HEAD.size:
            raise ConfigError(f"rotary parameters of {len(data)} bytes; at least 12 are needed")
        size, style, *reserved = _HEAD.unpack_from(data)
        if any(reserved):
            raise ConfigError("rotary parameters with a reserved byte that is not zero")
        if size % 2 or len(data) != _HEAD.size + 2 * size:
            raise ConfigError(
                f"rotary parameters of {len(data)} bytes for {size} channels; "
                f"{_HEAD.size + 2 * size} are needed"
            )
        frequencies = struct.unpack_from(f"<{size // 2}f", data, _HEAD.size)
        return cls(size, style, frequencies)

    @property
    def pairs(self) -> npt.NDArray[np.int64]:
        """(size / 2, 2) channels of each pair."""
        first = np.arange(self.size // 2)
        if self.style == SPLIT:
            return np.stack([first, first + self.size // 2], axis=1)
        return np.stack([2 * first, 2 * first + 1], axis=1)

    def table(self, tokens: int) -> npt.NDArray[np.float32]:
        """(tokens, size / 2, 2): cosine and sine of each pair's angle at tokens 0, 1 ...

        The same bits on every machine: products, sums and roundings of binary64 alone.
        """
        token = np.arange(tokens, dtype=np.float64)[:, None]
        angle = np.array(self.frequencies, np.float64) * token  # exact
        quarter = np.rint(angle * _QUARTERS)
        rest = (angle - quarter * _QUARTER_HIGH) - quarter * _QUARTER_LOW
        square = rest * rest
        sin = rest * _polynomial(square, _SIN)
        cos = _polynomial(square, _COS)
        turn = quarter.astype(np.int64) & 3
        swap = (turn & 1).astype(bool)
        cosine = np.where(swap, sin, cos)
        sine = np.where(swap, cos, sin)
        cosine = np.where((turn == 1) | (turn == 2), -cosine, cosine)
        sine = np.where(turn >= 2, -sine, sine)
        return np.stack([cosine, sine], axis=-1).astype(np.float32)


def read_rotary(path: Path) -> tuple[Rotary | None, str]:
    """As `rotary_of_config`, from a file or the folder of a model. Raises `ConfigError` for a path
    that is none.
    """
    path = path / CONFIG_FILE if path.is_dir() else path
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"rotary: {path} is no model's config ({error}); name a {CONFIG_FILE}"
        ) from error
    if not isinstance(config, dict):
        raise ConfigError(f"rotary: {path} holds a {type(config).__name__}, wanted an object")
    return rotary_of_config(config)


def rotary_of_config(
    config: Mapping[str, Any], *, style: int | None = None
) -> tuple[Rotary | None, str]:
    """The rotation of a model's keys from the fields of its Hugging Face `config.json`.

    Without one that holds for every token and layer, None and the reason: the keys are then stored
    as they are. `style` overrides what the model's type suggests.
    """
    if isinstance(config.get("text_config"), Mapping):
        config = config["text_config"]
    parameters = _parameters(config)
    if any(isinstance(value, Mapping) for value in parameters.values()):
        return None, "the layers rotate their keys in different ways"
    if parameters.get("mrope_section"):
        return None, "mrope turns a token by more than one position"
    kind = str(parameters.get("rope_type") or parameters.get("type") or "default")
    if kind not in _SCALINGS:
        return None, f"rope type {kind!r} does not turn by a fixed angle for each token"
    try:
        size = _rotated_channels(config, parameters)
        theta = float(_wanted({"rope_theta": 10000, **parameters}, "rope_theta"))
        frequencies = _SCALINGS[kind](theta ** (-np.arange(0, size, 2) / size), theta, parameters)
        if style is None:
            style = int(config.get("model_type") in _INTERLEAVED_MODELS)
        exact = frequencies.astype(np.float32).astype(float)
        return Rotary(size, style, tuple(exact.tolist())), ""
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        return None, f"rope parameters that make no sense: {error}"


_Frequencies = npt.NDArray[np.float64]


def _wanted(fields: Mapping[str, Any], name: str) -> float:
    value = fields.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ValueError(f"{name} is {value!r}; a number above 0 is needed")
    return value


def _parameters(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """`rope_parameters`, or what older files say in its place."""
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    defaults = {
        name: config[name]
        for name in ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
        if config.get(name) is not None
    }
    if "original_max_position_embeddings" not in found:
        defaults.setdefault(
            "original_max_position_embeddings", config.get("max_position_embeddings")
        )
    return {**defaults, **{name: value for name, value in found.items() if value is not None}}


def _rotated_channels(config: Mapping[str, Any], parameters: Mapping[str, Any]) -> int:
    """Channels that are rotated in each row of keys (or of an MLA model's rope part)."""
    for name in ("qk_rope_head_dim", "rotary_dim"):
        if config.get(name) is not None:
            return int(_wanted(config, name))
    head = config.get("head_dim")
    if head is None:
        head = _wanted(config, "hidden_size") // _wanted(config, "num_attention_heads")
    share = parameters.get("partial_rotary_factor", config.get("rotary_pct"))
    return int(head * (1 if share is None else share))


def _unscaled(plain: _Frequencies, _theta: float, _fields: Mapping[str, Any]) -> _Frequencies:
    return plain


def _linear(plain: _Frequencies, _theta: float, fields: Mapping[str, Any]) -> _Frequencies:
    return plain / _wanted(fields, "factor")


def _llama3(plain: _Frequencies, _theta: float, fields: Mapping[str, Any]) -> _Frequencies:
    """Slow pairs divided by the factor, fast ones kept, a ramp in turns of the old context."""
    low, high = (_wanted(fields, f"{name}_freq_factor") for name in ("low", "high"))
    turns = _wanted(fields, "original_max_position_embeddings") * plain / (2 * math.pi)
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return plain * (kept + (1 - kept) / _wanted(fields, "factor"))


def _yarn(plain: _Frequencies, theta: float, fields: Mapping[str, Any]) -> _Frequencies:
    """As llama3, but the ramp is in indices of pairs."""
    size, old = 2 * len(plain), _wanted(fields, "original_max_position_embeddings")

    def place(turns: float) -> float:
        return size * math.log(old / (turns * 2 * math.pi)) / (2 * math.log(theta))

    fast, slow = place(fields.get("beta_fast") or 32), place(fields.get("beta_slow") or 1)
    if fields.get("truncate", True):
        fast, slow = math.floor(fast), math.ceil(slow)
    fast, slow = max(fast, 0), min(slow, size - 1)
    slow += 0.001 if fast == slow else 0
    scaled = np.clip((np.arange(len(plain)) - fast) / (slow - fast), 0, 1)
    share: _Frequencies = 1 - scaled + scaled / _wanted(fields, "factor")
    return plain * share


_SCALINGS: dict[str, Callable[[_Frequencies, float, Mapping[str, Any]], _Frequencies]] = {
    "default": _unscaled,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
}
