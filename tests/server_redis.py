"""A real Redis for tests, on loopback and on a Unix socket, and clients beside the backend's."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

from real_server import RealServer, answers_on, free_port, need

__all__ = ["RedisServer", "certificates"]


class RedisServer(RealServer):
    """redis-server (or a command-compatible one) that keeps nothing on the disk.

    `url` is where it listens with TCP, `unix_url` its socket; `options` are redis-server's own.
    """

    def __init__(self, directory: Path, *options: str, program: str = "redis-server") -> None:
        self.port = free_port()
        self.socket = directory / "redis.sock"
        self.url = f"redis://127.0.0.1:{self.port}"
        self.unix_url = f"redis+unix://{self.socket}"
        command = [need(program), "--port", str(self.port), "--bind", "127.0.0.1"]
        command += ["--unixsocket", str(self.socket), "--save", "", "--appendonly", "no"]
        super().__init__(
            [*command, "--dir", str(directory), *options],
            ready=self.is_ready(answers_on(self.port)),
            start_seconds=20,
        )

    def is_ready(self, on_port: Callable[[], bool]) -> Callable[[], bool]:
        return lambda: self.socket.exists() and ("--port 0" in " ".join(self.command) or on_port())

    def cli(self, *arguments: str) -> bytes:
        """What redis-cli answers, through the Unix socket."""
        return subprocess.run(
            [need("redis-cli"), "-s", str(self.socket), *arguments],
            capture_output=True,
            check=True,
        ).stdout


def certificates(directory: Path) -> None:
    """Keys and certificates: ca.pem, server.pem for 127.0.0.1, client.pem, and other-ca.pem."""

    def openssl(*arguments: str) -> None:
        command = [need("openssl"), *arguments]
        subprocess.run(command, cwd=directory, check=True, capture_output=True)

    for ca in ("ca", "other-ca"):
        openssl(
            *("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"),
            *("-keyout", f"{ca}.key", "-out", f"{ca}.pem", "-days", "2", "-subj", f"/CN={ca}"),
        )
    (directory / "names").write_text("subjectAltName=IP:127.0.0.1\n")
    for owner in ("server", "client"):
        openssl(
            *("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"),
            *("-keyout", f"{owner}.key", "-out", f"{owner}.csr", "-subj", f"/CN={owner}"),
        )
        openssl(
            *("x509", "-req", "-in", f"{owner}.csr", "-CA", "ca.pem", "-CAkey", "ca.key"),
            *("-CAcreateserial", "-days", "2", "-extfile", "names", "-out", f"{owner}.pem"),
        )
