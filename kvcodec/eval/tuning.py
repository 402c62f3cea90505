"""One call of ``kvcodec tune``: sensitivities, allocations, what they are worth, a profile."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedModel

from kvcodec.codec import Codec
from kvcodec.errors import ConfigError
from kvcodec.eval.comparison import bits_saved
from kvcodec.eval.families import ECQ, LADDERS, Allocation, Family
from kvcodec.eval.journal import Journal
from kvcodec.eval.metrics import Estimate
from kvcodec.eval.model import Cache, CachedModel, load_model, tokens_of
from kvcodec.eval.opening import Opening, imprinted, progress_bar, text_of, versions
from kvcodec.eval.probing import Measured, Probed, Runs, WindowSet, split_windows
from kvcodec.eval.runner import Options, check_context
from kvcodec.profile import PROFILE_VERSION, ProfileReference
from kvcodec.rotary import Rotary, rotary_of_config
from kvcodec.spec import CodecSpec

__all__ = ["Tuning", "run_tuning"]

#: Bits per value that a profile may hold a point for.
_FEWEST_BITS, _MOST_BITS = 1.5, 6.0
#: What is compared is measured a little beyond the tuned losses, which then lie within its curve.
_BEYOND, _BEYOND_BITS = 2.0, 0.5
_SAMPLED = 256  # elements of each weight in the fingerprint


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning(Opening):
    """The options of the command; see there. `bits` ascending."""

    texts: tuple[Path, ...]
    output: Path
    bits: tuple[float, ...]
    windows: int = 8
    held_out: int = 16
    seed: int = 0
    ladder: bool = True

    def options(self) -> Options:
        """How windows are cut. Raises `ConfigError` for a value out of range, here or there."""
        for bits in self.bits:
            if not _FEWEST_BITS <= bits <= _MOST_BITS:
                limits = f"{_FEWEST_BITS:g} to {_MOST_BITS:g}"
                raise ConfigError(f"--bits has {bits:g}, allowed is {limits}")
        if not self.bits or list(self.bits) != sorted(set(self.bits)):
            raise ConfigError(f"--bits is {self.bits}, wanted are rising numbers")
        for name, value, low in (
            ("windows", self.windows, 1),
            ("held-out", self.held_out, 1),
            ("seed", self.seed, 0),
        ):
            if not low <= value < 1 << 31:
                raise ConfigError(f"--{name} is {value}, allowed is a number from {low}")
        return self.cutting()

    @property
    def state_path(self) -> Path:
        """Where results are kept until all are there."""
        return self.output.with_name(self.output.name + ".state")


@dataclass(frozen=True, slots=True)
class _Row:
    """A spec to be measured. `bits` is the size asked for, None for one chosen by its loss."""

    family: str
    bits: float | None
    spec: CodecSpec
    predicted: float


def run_tuning(tuning: Tuning) -> dict[str, Any]:
    """Measure, write the profile to `tuning.output`, and return what it says."""
    options = tuning.options()
    compute, cache_dtype = tuning.types()
    what = tuning.outliers()
    texts = [text_of(path) for path in tuning.texts]
    raw, tokenizer = load_model(tuning.model, tuning.compute, tuning.device)
    tokens, bos = tokens_of(tokenizer, "\n".join(texts))
    counts = (tuning.windows, tuning.held_out)
    model = CachedModel(raw, cache_dtype)
    check_context(model, options)
    probed, held_out = split_windows(tokens, bos, options, counts, tuning.seed)
    rotary, _ = rotary_of_config(raw.config.to_dict())
    some = next(iter(probed.values()))
    described = _describe(tuning, raw, rotary, model.record(some.to(raw.device)))
    if what is not None:
        imprinted(raw, what, some, compute)
    inputs = {"model": described, "asked": _asked(tuning), "texts": _texts(tuning, texts)}
    inputs["versions"] = versions()
    codec = Codec()
    try:
        with Journal(tuning.state_path, inputs) as journal:
            runs = Runs(model, codec, rotary, options, journal)
            document = _tune(tuning, runs, described, probed, held_out)
            document = {"kvcodec_profile": PROFILE_VERSION} | inputs | document
            _write(tuning.output, document)
            journal.remove()
    finally:
        codec.close()
    return document


def _asked(tuning: Tuning) -> dict[str, Any]:
    """The options without the paths, which belong to one machine."""
    asked = asdict(tuning)
    for name in ("model", "texts", "output"):
        del asked[name]
    return asked | {"bits": list(tuning.bits)}


def _texts(tuning: Tuning, texts: Sequence[str]) -> list[dict[str, str]]:
    return [
        {"name": path.name, "sha256": hashlib.sha256(text.encode()).hexdigest()}
        for path, text in zip(tuning.texts, texts, strict=True)
    ]


def _describe(
    tuning: Tuning, raw: PreTrainedModel, rotary: Rotary | None, cache: Cache
) -> dict[str, Any]:
    """Whose profile it is: the geometry that a reader checks, and digests of config and weights."""
    config = AutoConfig.from_pretrained(tuning.model).to_dict()
    known = {k: v for k, v in config.items() if k != "transformers_version" and k[0] != "_"}
    weights = hashlib.sha256()
    for name, weight in raw.named_parameters():
        sample = weight.detach().flatten()[:_SAMPLED].float().cpu().numpy()
        weights.update(f"{name} {tuple(weight.shape)}".encode() + sample.tobytes())
    is_folder = Path(tuning.model).is_dir()
    return {
        "name": Path(tuning.model).resolve().name if is_folder else tuning.model,
        "model_type": config.get("model_type"),
        "layers": len(cache.keys),
        "kv_heads": int(cache.keys[0].shape[0]),
        "key_head_size": int(cache.keys[0].shape[2]),
        "value_head_size": int(cache.values[0].shape[2]),
        "rotary_sha256": None if rotary is None else hashlib.sha256(rotary.record).hexdigest(),
        "config_sha256": hashlib.sha256(
            json.dumps(known, sort_keys=True, default=str).encode()
        ).hexdigest(),
        "weights_sample_sha256": weights.hexdigest(),
    }


def _tune(
    tuning: Tuning,
    runs: Runs,
    described: dict[str, Any],
    probed: WindowSet,
    held_out: WindowSet,
) -> dict[str, Any]:
    names = ("layers", "kv_heads", "key_head_size", "value_head_size")
    geometry = {name: described[name] for name in names}
    # The digest is not known before the file is written; its place in the header counts.
    reference = ProfileReference(digest=bytes(32), **geometry)
    families = (ECQ, *(LADDERS if tuning.ladder else ()))
    sections = 2 * described["layers"]
    specs = [spec for family in families for spec in _named(family, reference)]
    with progress_bar(len(probed) * len(specs) * sections) as step:
        found = runs.probe(probed, specs, sections, lambda _: step("probing sections"))
    rest = iter(found)
    costs = {family.name: [next(rest) for _ in family.probed] for family in families}
    rows = _rows(tuning, families, costs, reference)
    with progress_bar(len(held_out) * len(rows)) as step:
        results = runs.measure(
            held_out, [row.spec for row in rows], lambda _: step("measuring specs")
        )
    measured = list(zip(rows, results, strict=True))
    exact = runs.exact_loss(held_out)
    return {
        "probed_windows": list(probed),
        "held_out_windows": list(held_out),
        "exact": {"loss": exact.mean, "tokens": len(held_out) * tuning.options().scored_tokens},
        "sections": _sections(families, costs),
        "points": _points(measured),
        "others": [
            {"family": row.family, "spec": row.spec.text} | _figures(row, result)
            for row, result in measured
            if row.family != "tuned"
        ],
    }


def _named(family: Family, reference: ProfileReference) -> list[CodecSpec]:
    if family is not ECQ:
        return family.specs
    return [replace(spec, profile=reference) for spec in family.specs]


def _rows(
    tuning: Tuning,
    families: Sequence[Family],
    costs: dict[str, list[Probed]],
    reference: ProfileReference,
) -> list[_Row]:
    """What to measure: tuned specs of each size, the uniform ones nearest to them, and on each
    ladder what promises the same losses.
    """
    largest = tuning.bits[-1]
    ecq = Allocation(ECQ, costs[ECQ.name], largest)
    rows = []
    for bits in tuning.bits:
        spec, loss = ecq.of_size(bits)
        rows.append(_Row("tuned", bits, replace(spec, profile=reference), loss))
    tuned = [row.predicted for row in rows]
    for bits in (*tuning.bits, largest + _BEYOND_BITS):
        rows.append(_Row("uniform ecq", bits, *ecq.uniform_of_size(bits)))
    for family in families[1:]:
        ladder = Allocation(family, costs[family.name], 16.0)
        for loss in (tuned[0] * _BEYOND, *tuned, tuned[-1] / _BEYOND):
            found = ladder.of_loss(loss)
            if found is not None and found[0] not in [row.spec for row in rows]:
                rows.append(_Row(family.name, None, *found))
    return rows


def _figures(row: _Row, result: Measured) -> dict[str, Any]:
    return {"predicted_kl": row.predicted} | result.as_json()


def _points(measured: Sequence[tuple[_Row, Measured]]) -> list[dict[str, Any]]:
    """The tuned rows, each with the bits it saves against the other families."""
    uniform = [result for row, result in measured if row.family == "uniform ecq"]
    ladders = [result for row, result in measured if row.family not in ("tuned", "uniform ecq")]
    points = []
    for row, result in measured:
        if row.family == "tuned":
            point: dict[str, Any] = {"bits": row.bits, "spec": row.spec.text}
            point |= _figures(row, result)
            for name, others in (("uniform", uniform), ("ladder", ladders)):
                saved = bits_saved(result, others)
                point[f"saved_against_{name}"] = None if saved is None else _estimate(saved)
            points.append(point)
    return points


def _estimate(estimate: Estimate) -> dict[str, float | None]:
    return {"bits": estimate.mean, "se": estimate.error}


def _sections(families: Sequence[Family], costs: dict[str, list[Probed]]) -> list[dict[str, Any]]:
    """What each section alone costs in each codec that was probed."""
    count = len(costs[ECQ.name][0].losses)
    rows = []
    for section in range(count):
        found = {}
        for family in families:
            codecs = [family.of_section(section)[index] for index in family.probed]
            for codec, probed in zip(codecs, costs[family.name], strict=True):
                size = probed.sizes[section] * count
                found[codec.text] = {"kl": probed.losses[section], "bits": size}
        stream = "value" if section % 2 else "key"
        rows.append({"layer": section // 2, "stream": stream, "codecs": found})
    return rows


def _write(path: Path, document: dict[str, Any]) -> None:
    """Whole or not at all. Raises `ConfigError`."""
    data = (json.dumps(document, indent=1, allow_nan=False) + "\n").encode()
    try:
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=path.name + ".")
        try:
            with os.fdopen(descriptor, "wb") as file:
                os.fchmod(file.fileno(), 0o644)
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise
    except OSError as error:
        raise ConfigError(f"the profile {str(path)!r} cannot be written: {error}") from error
