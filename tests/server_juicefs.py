"""A real JuiceFS volume: Redis for its metadata, a directory for its blocks, mounts and a gateway.

with juicefs_volume(folder) as volume, volume.mount() as first, volume.mount() as second:
    ...                         # two mounts of one volume, as two hosts have them
    first.server.kill()         # what the kernel then says: "Transport endpoint is not connected"
    first.mount_again()
"""

from __future__ import annotations

import itertools
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from real_server import STORES, RealServer, answers_on, free_port, need

USER = "someone"
PASSWORD = "not-a-secret"


class Mount:
    """One mount of a volume, served by a process of its own."""

    def __init__(self, path: Path, server: RealServer) -> None:
        self.path = path
        self.server = server

    def mount_again(self) -> None:
        """After the process was killed: what an operator or a kubelet does."""
        self.detach()
        self.server.start()

    def detach(self) -> None:
        """Take the mount away, whether or not its process still runs."""
        subprocess.run(["umount", "--lazy", self.path], check=False, capture_output=True)


class Volume:
    """A formatted volume."""

    def __init__(self, program: str, metadata: str, name: str, folder: Path) -> None:
        self.name = name
        self._program = program
        self._metadata = metadata
        self._folder = folder
        self._numbers = itertools.count()

    @contextmanager
    def mount(self) -> Iterator[Mount]:
        path = self._folder / f"mount{next(self._numbers)}"
        path.mkdir()
        server = RealServer(
            self._command("mount", path, "--no-syslog", "--metrics", f"127.0.0.1:{free_port()}"),
            ready=lambda: os.path.ismount(path),
        )
        mount = Mount(path, server)
        try:
            with server:
                yield mount
                mount.detach()
        finally:
            mount.detach()

    @contextmanager
    def gateway(self) -> Iterator[tuple[RealServer, int]]:
        """An S3 server of this volume, and its port. Its one bucket has the volume's name."""
        port = free_port()
        with RealServer(
            self._command("gateway", f"127.0.0.1:{port}", "--no-banner"),
            ready=answers_on(port),
            environment={"MINIO_ROOT_USER": USER, "MINIO_ROOT_PASSWORD": PASSWORD},
        ) as server:
            yield server, port

    def _command(self, verb: str, where: str | Path, *options: str) -> list[str]:
        cache = self._folder / f"cache{next(self._numbers)}"
        return [
            # Without its agent, which listens on fixed ports.
            *(self._program, "--no-agent", verb, "--no-usage-report"),
            *("--cache-dir", str(cache), "--cache-size", "0", *options),
            *(self._metadata, str(where)),
        ]


@contextmanager
def juicefs_volume(folder: Path) -> Iterator[Volume]:
    """A new volume below `folder`; the test is skipped where JuiceFS cannot run."""
    program = need(STORES / "juicefs" / "juicefs")
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("there is no /dev/fuse that this user may open")
    port = free_port()
    command = [need("redis-server"), "--bind", "127.0.0.1", "--port", str(port), "--save", ""]
    with RealServer(command, ready=answers_on(port), directory=folder):
        metadata = f"redis://127.0.0.1:{port}/1"
        name = f"volume{port}"
        storage = ["--storage", "file", "--bucket", f"{folder}/blocks/"]
        subprocess.run(
            [program, "--no-agent", "format", *storage, metadata, name],
            check=True,
            capture_output=True,
        )
        yield Volume(program, metadata, name, folder)
