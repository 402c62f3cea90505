"""Write the golden pages of format 1: tests/golden/v1/accepted and tests/golden/v1/rejected.

    python tools/make_golden.py            add what is missing; refuse to change what is there
    python tools/make_golden.py --replace  write everything anew

A page that was ever released is read for ever, and its bytes are what every encoder has to
reproduce: --replace is for work on an unreleased format. The tests never write here.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tools")]

from bad_pages import bad_pages  # noqa: E402 - the path comes first
from pages import CASES, Case, decode_page, outside_groups, raw_bytes  # noqa: E402

from kvcodec.format import EncodedPage  # noqa: E402

GOLDEN = ROOT / "tests" / "golden" / "v1"


def accepted(case: Case) -> tuple[dict[str, bytes], dict[str, Any]]:
    """The files of one page, and its entry in the manifest."""
    page = case.page()
    raw = raw_bytes(case.layout, case.rows())
    encoded = EncodedPage.parse(page)
    encoded.header.expect(case.namespace, case.key)
    decoded = decode_page(encoded)
    files = {f"{case.name}.page": page, f"{case.name}.raw": raw}
    if decoded != raw:
        files[f"{case.name}.decoded"] = decoded
    layout = case.layout
    entry = {
        "spec": case.spec,
        "dtype": layout.dtype.text,
        "token_count": layout.token_count,
        "layer_start": layout.layer_start,
        "layer_count": layout.layer_count,
        "streams": [[s.role.text, s.head_count, s.head_size, s.head_start] for s in layout.streams],
        "identity": dict(case.identity.fields),
        "key": case.key,
        "minor": case.minor,
        "optional_flags": case.optional_flags,
        "extensions": [[e.type, e.data.hex()] for e in case.extensions],
        "lossless": decoded == raw,
        "outside_groups": outside_groups(case.plan(), case.rows()),
    }
    if case.rotary is not None:
        entry["rotary"] = case.rotary.record.hex()
    return files, entry


def write(folder: Path, files: dict[str, bytes], manifest: dict[str, Any], replace: bool) -> int:
    """Write what is missing or, if told so, everything; how many files were written."""
    for name, data in files.items():
        manifest["sha256"][name] = hashlib.sha256(data).hexdigest()
    text = json.dumps(manifest, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
    files = files | {"manifest.json": text.encode()}
    folder.mkdir(parents=True, exist_ok=True)
    if replace:
        for old in folder.iterdir():
            if old.name not in files:
                old.unlink()
    written = 0
    for name, data in sorted(files.items()):
        path = folder / name
        if path.exists() and path.read_bytes() == data:
            continue
        if path.exists() and not replace and name != "manifest.json":
            sys.exit(f"{path.relative_to(ROOT)} would change; --replace if that is meant")
        path.write_bytes(data)
        written += 1
    return written


def main() -> None:
    """Make all pages."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--replace", action="store_true", help="change files that are there")
    replace = parser.parse_args().replace

    files: dict[str, bytes] = {}
    pages: dict[str, Any] = {}
    for case in CASES.values():
        made, pages[case.name] = accepted(case)
        files |= made
    count = write(GOLDEN / "accepted", files, {"pages": pages, "sha256": {}}, replace)
    print(f"accepted: {len(pages)} pages, {count} files written")

    bad = bad_pages()
    causes = {page.name: {"error": page.error, "reason": page.reason} for page in bad}
    files = {f"{page.name}.page": page.page for page in bad}
    count = write(GOLDEN / "rejected", files, {"pages": causes, "sha256": {}}, replace)
    print(f"rejected: {len(bad)} pages, {count} files written")


if __name__ == "__main__":
    main()
