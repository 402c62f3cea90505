"""One call of ``kvcodec eval``: what was asked for, made into a model, windows and codecs."""

from __future__ import annotations

import importlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kvcodec.codec import Codec
from kvcodec.errors import ConfigError
from kvcodec.eval.model import CachedModel, load_model, tokens_of
from kvcodec.eval.opening import Opening, imprinted, progress_bar, text_of, versions
from kvcodec.eval.pages import SpecCodec
from kvcodec.eval.protocol import AnyCodec, CacheCodec, PageCodec
from kvcodec.eval.report import Row
from kvcodec.eval.runner import Result, measure, windows_of
from kvcodec.rotary import Rotary, rotary_of_config

__all__ = ["Session", "codecs_of", "peers_of", "run_session"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Session(Opening):
    """The options of the command; see there. The names of models and peers come from the user's
    own command line, and importing a peer runs its code.
    """

    specs: tuple[str, ...]
    text: Path
    windows: int = 0
    peers: tuple[str, ...] = ()


def codecs_of(session: Session, codec: Codec, rotary: Rotary | None) -> list[AnyCodec]:
    """The specs and the peers, in this order; `rotary` is how the model rotates its keys."""
    found: list[AnyCodec] = [SpecCodec(text, codec, rotary=rotary) for text in session.specs]
    for peer in session.peers:
        found += peers_of(peer)
    return found


def peers_of(text: str) -> list[AnyCodec]:
    """What ``module:name`` names: a codec, several, or a function that gives either."""
    module, colon, name = text.partition(":")
    if not colon:
        raise ConfigError(f"--peer is {text!r}, wanted MODULE:NAME")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"--peer {text!r} cannot be imported: {error}") from error
    try:
        if isinstance(found, type) or (not _is_codec(found) and callable(found)):
            found = found()
        codecs = [found] if _is_codec(found) else list(found)
    except TypeError as error:
        raise ConfigError(f"--peer {text!r} gives no codecs: {error}") from error
    for each in codecs:
        if not _is_codec(each):
            raise ConfigError(f"--peer {text!r} gives {type(each).__name__}, which is no codec")
    return codecs


def _is_codec(value: object) -> bool:
    return isinstance(value, CacheCodec | PageCodec)


def run_session(session: Session) -> dict[str, Any]:
    """The document of ``--json``: what was asked for, the variants of the model, and the rows."""
    options = session.cutting(session.windows)
    compute, cache = session.types()
    what = session.outliers()
    codec = Codec()
    try:
        text = text_of(session.text)
        raw, tokenizer = load_model(session.model, session.compute, session.device)
        codecs = codecs_of(session, codec, rotary_of_config(raw.config.to_dict())[0])
        windows = windows_of(*tokens_of(tokenizer, text), options)
        model = CachedModel(raw, cache)
        total = len(windows) * (1 + len(codecs)) * (1 if what is None else 2)
        variants: list[dict[str, Any]] = []
        rows: list[Row] = []
        with progress_bar(total) as step:
            _add(variants, rows, "natural", measure(model, windows, codecs, options, step))
            if what is not None:
                change = imprinted(raw, what, windows.ids[0], compute)
                found = measure(model, windows, codecs, options, step)
                _add(variants, rows, "imprinted", found)
                variants[-1]["largest_change_without_cache"] = change
    finally:
        codec.close()
    asked = asdict(session) | {"text": session.text.name, "scored_tokens": options.scored_tokens}
    asked |= {"coded_tokens": options.coded_tokens, "window_count": len(windows)}
    return {"asked": asked, "versions": versions(), "variants": variants, "rows": rows}


def _add(variants: list[dict[str, Any]], rows: list[Row], name: str, result: Result) -> None:
    variants.append(
        {
            "name": name,
            "loss": result.loss,
            "perplexity": result.perplexity,
            "tokens": result.tokens,
        }
    )
    for codec, tally in result.rows.items():
        row = tally.as_json()
        bits = tally.stored_bits / tally.values
        rows.append({"variant": name, "codec": codec, "ratio": 16 / bits} | row)
