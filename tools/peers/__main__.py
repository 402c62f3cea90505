"""The table of docs/quality.md and docs/peers.md: every preset and every peer, by one code.

    make peers

Measures the quality on the two small models, natural and imprinted, and the speed on one thread;
writes the JSON document, the pictures, and the marked blocks of the pages. What is finished is kept
in a folder, so that a run that was broken off goes on from there; a change of the code or of the
options begins anew.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable, Sequence
from datetime import date
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MODELS = ("qwen3_small", "qwen2_bias_small")
IMPRINT = "keys=8,pairs=3,values=0.5"
#: Points of the curve of ecq beside its presets.
RATES = ("2", "3.5", "5", "6")
#: Rates of keys and of values: the errors of both add up in the output, those of keys count less.
VALUES_ABOVE = (("2.625", "3"), ("3.125", "3.5"), ("3.375", "3.75"), ("3.625", "4"))


def specs() -> dict[str, str]:
    """Name -> spec: every preset that is no alias of an earlier one, and points of ecq."""
    from kvcodec.spec import PRESETS, CodecSpec

    found: dict[str, str] = {}
    for name in PRESETS:
        text = CodecSpec.parse(name).text
        if text not in found.values():
            found[name] = text
    for rate in RATES:
        found.setdefault(f"ecq-{rate}", f"key=ecq-{rate}-channel value=ecq-{rate}")
    for key, value in VALUES_ABOVE:
        found[f"ecq-{key}/{value}"] = f"key=ecq-{key}-channel value=ecq-{value}"
    return found


class Parts:
    """Finished parts of a run, a file each, of this very code and these options."""

    def __init__(self, folder: Path, digest: str) -> None:
        self.folder = folder / digest

    def get(self, name: str, make: Callable[[], Any]) -> Any:
        """The part, made now if it was not before."""
        path = self.folder / f"{sha256(name.encode()).hexdigest()[:16]}.json"
        if path.exists():
            return json.loads(path.read_text())
        found = make()
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".new")
        temporary.write_text(json.dumps(found))
        temporary.replace(path)
        return found

    def clear(self) -> None:
        """Forget them: the next run measures again."""
        shutil.rmtree(self.folder, ignore_errors=True)


def digest_of(options: argparse.Namespace) -> str:
    """Of the code that is measured and measures, and of what was asked for."""
    found = sha256(repr((options.windows, options.seconds)).encode())
    paths = [*ROOT.glob("kvcodec/**/*.py"), *ROOT.glob("kvcodec/native/*.so")]
    for path in sorted([*paths, *ROOT.glob("tools/peers/*.py"), ROOT / "tools/synthetic_kv.py"]):
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


def quality(model: str, windows: int) -> dict[str, Any]:
    """The document of ``kvcodec eval``, layers left out."""
    from kvcodec.eval.session import Session, run_session

    named = specs()
    session = Session(
        model=str(ROOT / "tests" / "models" / model),
        specs=tuple(named.values()),
        text=ROOT / "tests" / "models" / "held_out.txt",
        windows=windows,
        imprint=IMPRINT,
        peers=("peers.registry:codecs",),
    )
    found = run_session(session)
    names = {text: name for name, text in named.items()}
    for row in found["rows"]:
        row["codec"] = names.get(row["codec"], row["codec"])
        del row["layers"]
    found["asked"]["model"] = model
    return found


def speeds(parts: Parts, peers: Sequence[Any], seconds: float) -> dict[str, Any]:
    """Name -> speed, in one round of all."""
    from rich.console import Console
    from rich.progress import track

    from peers import speed

    cases: dict[str, Callable[[], Any]] = {}
    for name, text in specs().items():
        cases[name] = lambda text=text: speed.of_spec(text, seconds).as_json()
    for peer in peers:
        if not peer.untimed:
            cases[peer.name] = lambda peer=peer: speed.of_peer(peer, seconds).as_json()
    console = Console(stderr=True)
    return {
        name: parts.get(f"speed {name}", case)
        for name, case in track(cases.items(), "speed", console=console)
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The whole document."""
    import torch

    from kvcodec import native
    from kvcodec.eval.memory import keep_memory
    from peers.registry import FAMILIES, LEFT_OUT, available
    from peers.statement import statement
    from peers.tables import caches_of

    torch.set_num_threads(1)
    keep_memory()
    parts = Parts(options.parts, digest_of(options))
    peers, missing = available()
    family_of = {
        peer.name: family
        for family, make in FAMILIES.items()
        if family not in missing
        for peer in make()
    }
    quality_of = {
        model: parts.get(f"quality {model}", lambda model=model: quality(model, options.windows))
        for model in MODELS
    }
    document: dict[str, Any] = {
        "date": date.today().isoformat(),
        "processor": _processor(),
        "isa": native.isa(),
        "versions": {name: version(name) for name in ("kvcodec", "torch", "transformers")},
        "asked": quality_of[MODELS[0]]["asked"] | {"windows": options.windows},
        "quality": quality_of,
        "speed": speeds(parts, peers, options.seconds),
        "peers": {
            peer.name: {
                "family": family_of[peer.name],
                "package": peer.origin.package,
                "source": peer.origin.source,
                "remark": peer.origin.remark,
                "untimed": peer.untimed,
                "is_lossless": peer.is_lossless,
                "packed_bits": peer.packed_bits,
                "pages": peer.pages,
            }
            for peer in peers
        },
        "left_out": LEFT_OUT,
        "missing": missing,
    }
    _check_lossless(document)
    document["statement"] = statement(caches_of(document))
    parts.clear()
    return document


def _check_lossless(document: dict[str, Any]) -> None:
    """No figure of a codec that is not what it says."""
    for model, quality_of in document["quality"].items():
        for row in quality_of["rows"]:
            peer = document["peers"].get(row["codec"])
            if peer and peer["is_lossless"] and (row["key_mse"] or row["value_mse"]):
                raise SystemExit(f"{row['codec']} changed the cache of {model}")


def show(count: int = 2) -> None:
    """Code a few random pages with every peer: its name, bits, and whether they came back."""
    import torch

    from peers.registry import available

    pages = torch.randn(2, count, 3, 2, 64, 128, generator=torch.Generator().manual_seed(1))
    keys, values = pages.bfloat16()
    peers, missing = available()
    for peer in peers:
        found = peer.roundtrip_pages(keys, values)
        is_exact = torch.equal(found.keys, keys) and torch.equal(found.values, values)
        if is_exact != peer.is_lossless:
            raise SystemExit(f"{peer.name} is {'' if is_exact else 'not '}exact")
        bits = found.stored_bits / (2 * keys.numel())
        print(f"{peer.name:28} {bits:7.3f} bits  {peer.origin.package or 're-implemented'}")
    for family, reason in missing.items():
        print(f"{family:28} left out: {reason}")


def _rounded(value: Any) -> Any:
    """`value` with floats of six digits, all the way down."""
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(each) for each in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def main() -> None:
    """Measure, or read what was measured; write what was asked for."""
    parser = argparse.ArgumentParser(
        prog="python -m peers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path, help="the document")
    parser.add_argument("--list", action="store_true", help="try every peer once, and end")
    parser.add_argument("--read", action="store_true", help="read the document, measure nothing")
    parser.add_argument("--pictures", type=Path, help="folder of the pictures")
    parser.add_argument("--page", type=Path, action="append", default=[], help="with marked blocks")
    parser.add_argument("--packages", type=Path, help="folder in which the peers are installed")
    parser.add_argument("--parts", type=Path, default=ROOT / "build" / "peers")
    parser.add_argument("--windows", type=int, default=16, help="of the text, for every cache")
    parser.add_argument("--seconds", type=float, default=2.0, help="to time a codec")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # of libraries that are loaded from here on
    if options.packages:
        sys.path.append(str(options.packages.resolve()))
    # Quanto asks for Ninja whenever it is loaded, and finds the one of this environment so.
    os.environ["PATH"] = os.pathsep.join((sys.exec_prefix + "/bin", os.environ.get("PATH", "")))
    sys.path.insert(0, str(ROOT))
    from peers import pictures, tables

    if options.list:
        show()
        return
    if options.json is None:
        parser.error("--json names the document")
    if options.read:
        document = json.loads(options.json.read_text())
    else:
        document = _rounded(measure(options))
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    if options.pictures:
        pictures.draw(document, options.pictures)
    for page in options.page:
        tables.write(page, document)
    print(tables.main_table(document))
    print(tables.statement_text(document))


if __name__ == "__main__":
    main()
