"""file:// with engine=segments: the conformance suite, its options, what it writes and where."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvcodec.backend import Backend
from kvcodec.testing import BackendTests
from kvcodec_backends.file import FileBackend


def plant_foreign_things(root: Path) -> None:
    segments = root / "segments"
    number = f"{1:016x}"
    (segments / "notes.txt").write_text("hello")
    (segments / f"{number}.segment").mkdir()
    (segments / f"{2:016x}.segment").symlink_to(__file__)
    os.mkfifo(segments / f"{3:016x}.segment")
    (segments / f"{4:016x}.segment").write_bytes(os.urandom(10_000))
    (segments / f"{4:016x}.index").write_bytes(os.urandom(10_000))
    (segments / f"{5:016x}.segment").touch()
    os.mkfifo(segments / f"{5:016x}.index")
    (segments / f"{6:016x}.index").write_text("without a segment")
    (segments / f"{7:016x}.SEGMENT").write_text("hello")
    (root / "LOCK").write_text("hello")


class SegmentConformance(BackendTests):
    options = ""
    max_object_bytes = 1 << 20

    @pytest.fixture(autouse=True)
    def _store(self, tmp_path: Path) -> None:
        self.root = tmp_path / "store"

    def open_backend(self) -> Backend:
        return FileBackend.from_url(f"file://{self.root}?engine=segments{self.options}")

    def plant_foreign_objects(self, namespace: str) -> bool:
        plant_foreign_things(self.root)
        return True

    def url_with_unknown_option(self) -> tuple[type[Backend], str]:
        return FileBackend, f"file://{self.root}?engine=segments&direct=1"

    def url_of_missing_store(self) -> tuple[type[Backend], str]:
        return FileBackend, f"file://{self.root}/typo?engine=segments"


class TestConformance(SegmentConformance):
    options = "&segment_bytes=2MiB"


class TestConformanceWithQuota(SegmentConformance):
    """Segments come and go under the suite, yet nothing of one test is evicted."""

    options = "&max_bytes=64MiB&segment_bytes=1056KiB"


class TestConformanceWithSync(SegmentConformance):
    options = "&fsync=1&segment_bytes=8MiB&ttl_seconds=3600"
    model_examples = 5
