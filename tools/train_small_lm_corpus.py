"""The text that the small language models are trained on: documentation that Debian ships.

Packages are downloaded with apt-get and unpacked with dpkg, neither of which needs to be root. A
document is one file, or one block of a dictionary. Which documents are held out, and the order of
all, follow from the hash of their text, so that they are the same wherever this runs.
"""

from __future__ import annotations

import gzip
import hashlib
import html
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from rich.progress import track
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

__all__ = ["BOS", "PACKAGES", "HeldOut", "prepare"]

#: Package of Debian 12, and the files of it that are text for people to read.
PACKAGES = {
    "debian-handbook": r"/html/en-US/[^/]+\.html$",
    "debian-policy": r"/policy\.html/[^/]+\.html$|\.txt\.gz$",
    "debian-reference-en": r"\.en\.html$|\.en\.txt\.gz$",
    "developers-reference": r"/developers-reference/[^/]+\.html$",
    "dict-gcide": r"\.dict\.dz$",
    "git-doc": r"\.txt$",
    "linux-doc-6.1": r"/html/_sources/(?!translations/).*\.rst\.txt$",
    "manpages": r"/man/man\d/.*\.gz$",
    "manpages-dev": r"/man/man\d/.*\.gz$",
    "perl-doc": r"\.pod$",
    "postgresql-doc-15": r"/html/.*\.html$",
    "python3.11-doc": r"/html/_sources/.*\.rst\.txt$",
}
BOS = "<bos>"
VOCABULARY = 4096
_BLOCK = 16_000  # characters of one document of a dictionary
_HELD_OUT_OF = 64

HeldOut = list[tuple[str, str]]


def _of_html(text: str) -> str:
    text = re.sub(r"(?is)<(script|style|head|nav).*?</\1>", " ", text)
    text = re.sub(r"(?i)</(p|div|li|h\d|tr|pre|dt|dd)>|<br[^>]*>", "\n", text)
    text = html.unescape(re.sub(r"(?s)<!--.*?-->|<[^>]+>", "", text))
    return re.sub(r"\n\s*\n\s*", "\n\n", re.sub(r"[ \t]+", " ", text))


def _of_man(text: str) -> str:
    lines = []
    for line in text.split("\n"):
        if line.startswith(('.\\"', "'\\\"")):
            continue
        words = line
        if line.startswith("."):
            words = re.sub(r"^\.\S+\s*", "", line).replace('"', "")
        lines.append(re.sub(r"\\f[BIRP]|\\&|\\/|\\,", "", words).replace("\\-", "-"))
    return "\n".join(lines)


def _read(path: Path) -> str:
    data = path.read_bytes()
    if data[:2] == b"\x1f\x8b":
        data = gzip.decompress(data)
    text = data.decode(errors="ignore")
    if ".html" in path.name:
        return _of_html(text)
    return _of_man(text) if "/man/man" in str(path) else text


def _documents(folder: Path) -> Iterator[tuple[str, str]]:
    """Package and text of every document, each text once."""
    seen = set()
    for package, pattern in PACKAGES.items():
        for path in sorted((folder / package).rglob("*")):
            if not path.is_file() or not re.search(pattern, str(path)):
                continue
            text = _read(path).strip()
            whole = range(0, len(text), _BLOCK if path.suffix == ".dz" else max(len(text), 1))
            for start in whole:
                part = text[start : start + whole.step]
                digest = hashlib.sha256(part.encode()).digest()
                if len(part) >= 800 and digest not in seen:
                    seen.add(digest)
                    yield package, part


def _unpack(folder: Path) -> None:
    debs = folder / "debs"
    debs.mkdir(parents=True, exist_ok=True)
    missing = [name for name in PACKAGES if not list(debs.glob(f"{name}_*.deb"))]
    if missing:
        subprocess.run(["apt-get", "download", *missing], cwd=debs, check=True)
    for name in track(PACKAGES, "unpacking"):
        if not (folder / "files" / name).exists():
            (deb,) = debs.glob(f"{name}_*.deb")
            subprocess.run(["dpkg", "-x", deb, folder / "files" / name], check=True)


def _tokenizer(texts: list[str], path: Path) -> Tokenizer:
    if not path.exists():
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=[BOS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )
        tokenizer.train_from_iterator(texts[::4], trainer)
        tokenizer.save(str(path))
    return Tokenizer.from_file(str(path))


def prepare(folder: Path, characters: int) -> tuple[Tokenizer, np.ndarray, np.ndarray, HeldOut]:
    """The tokenizer, the tokens to train on (of about `characters`), those held out, and the texts
    held out with their packages. What is there already in `folder` is used again.
    """
    _unpack(folder)
    held_out: HeldOut = []
    training: list[tuple[bytes, str]] = []
    for package, text in track(_documents(folder / "files"), "reading"):
        digest = hashlib.sha256(text.encode()).digest()
        if digest[0] % _HELD_OUT_OF == 0:
            held_out.append((package, text))
        else:
            training.append((digest, text))
    training.sort()
    texts, total = [], 0
    for _, text in training:
        if total < characters:
            texts.append(text)
            total += len(text)
    tokenizer = _tokenizer(texts, folder / "tokenizer.json")
    arrays = []
    for name, parts in (("training", texts), ("held_out", [text for _, text in held_out])):
        path = folder / f"{name}.npy"
        if not path.exists():
            ids: list[int] = []
            for part in track(parts, f"tokenizing {name}"):
                ids += [0, *tokenizer.encode(part).ids]
            np.save(path, np.array(ids, np.uint16))
        arrays.append(np.load(path))
    return tokenizer, arrays[0], arrays[1], held_out
