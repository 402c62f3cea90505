"""A real sidecar process for tests, and certificates for it to show."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from real_server import RealServer, free_port, need

from kvcodec_proto.v1 import service_pb2 as pb
from kvcodec_proto.v1 import service_pb2_grpc as pb_grpc

__all__ = ["Authority", "SidecarProcess", "exists", "health_of", "is_open"]

KVCODEC = [sys.executable, "-c", "import sys; from kvcodec.cli import main; sys.exit(main())"]
NAME = f"{'a' * 32}/{'b' * 64}"


class SidecarProcess(RealServer):
    """``kvcodec serve`` on a socket, a port and an HTTP port of its own, in `directory`.

    `settings` are flags; None leaves a default of this class out.
    """

    def __init__(
        self,
        directory: Path,
        settings: Mapping[str, str | None] | None = None,
        *,
        environment: Mapping[str, str] | None = None,
        arguments: tuple[str, ...] = (),
    ) -> None:
        self.socket = directory / "kvcodec.sock"
        self.unix_target = f"unix:{self.socket}"
        self.port, self.http_port = free_port(), free_port()
        self.target = f"127.0.0.1:{self.port}"
        flags = {
            "store.url": "memory://",
            "listen.unix": str(self.socket),
            "listen.tcp": self.target,
            "http.address": f"127.0.0.1:{self.http_port}",
            "limits.drain_seconds": "5",
        } | dict(settings or {})
        command = [*KVCODEC, "serve", *arguments]
        command += [f"--{name}={value}" for name, value in flags.items() if value is not None]
        super().__init__(
            command,
            ready=lambda: self.get("/readyz")[0] == 200,
            environment=environment,
            directory=directory,
            start_seconds=30,
        )

    def get(self, path: str) -> tuple[int, str]:
        """Status and body of a page on the HTTP port; status 0 if nobody answers."""
        url = f"http://127.0.0.1:{self.http_port}{path}"
        try:
            with urllib.request.urlopen(url, timeout=20) as answer:
                return int(answer.status), answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError:
            return 0, ""

    def metric(self, name: str) -> float:
        """The value of one series, 0 if there is none."""
        for line in self.get("/metrics")[1].splitlines():
            if line.startswith(f"{name} "):
                return float(line.rpartition(" ")[2])
        return 0.0

    def lines(self) -> list[dict[str, object]]:
        """The end of the log."""
        return [json.loads(line) for line in self.log().splitlines() if line.startswith("{")]

    def messages(self) -> str:
        """Messages of the log, one per line."""
        return "\n".join(str(line["message"]) for line in self.lines())

    def signal(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def wait(self, seconds: float = 60.0) -> int:
        """The exit code, once it has ended."""
        assert self._process is not None
        return self._process.wait(seconds)


def health_of(channel: grpc.Channel, service: str = "") -> str:
    """What ``grpc.health.v1`` says, or the code of its failure."""
    request = health_pb2.HealthCheckRequest(service=service)
    try:
        answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=5)
    except grpc.RpcError as error:
        return str(error.code().name)
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))


def exists(channel: grpc.Channel, token: str = "") -> str:
    """``OK`` if a call of PageService is answered, else the code of its failure."""
    metadata = (("authorization", f"Bearer {token}"),) if token else ()
    try:
        pb_grpc.PageServiceStub(channel).Exists(
            pb.ExistsRequest(names=[NAME]), timeout=5, metadata=metadata
        )
    except grpc.RpcError as error:
        return str(error.code().name)
    return "OK"


class Authority:
    """A certificate authority in a folder."""

    def __init__(self, directory: Path, name: str = "ca") -> None:
        self.directory = directory
        self.certificate = directory / f"{name}.pem"
        self._key = directory / f"{name}.key"
        self._name = name
        self._openssl(
            *("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"),
            *("-keyout", self._key, "-out", self.certificate, "-days", "2"),
            *("-subj", f"/CN={name}"),
        )

    def sign(self, owner: str, alternative: str = "IP:127.0.0.1", days: int = 2) -> None:
        """Make ``owner.key`` and ``owner.pem``; one of -1 days has expired yesterday."""
        request, names = self.directory / f"{owner}.csr", self.directory / f"{owner}.names"
        names.write_text(f"subjectAltName={alternative}\n")
        self._openssl(
            *("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"),
            *("-keyout", self.directory / f"{owner}.key", "-out", request),
            *("-subj", f"/CN={owner}"),
        )
        database = self.directory / f"{self._name}.database"
        database.mkdir(exist_ok=True)
        for name in ("index.txt", "index.txt.attr"):
            (database / name).write_text("")
        configuration = database / "openssl.cnf"
        configuration.write_text(
            f"[ca]\ndefault_ca = x\n[x]\ndatabase = {database}/index.txt\n"
            f"new_certs_dir = {database}\n"
            "rand_serial = yes\ndefault_md = sha256\npolicy = p\nunique_subject = no\n"
            "[p]\ncommonName = supplied\n"
        )
        now = time.time()
        start, end = (
            time.strftime("%Y%m%d%H%M%SZ", time.gmtime(now + 86400 * shift)) for shift in (-3, days)
        )
        self._openssl(
            *("ca", "-batch", "-notext", "-config", configuration, "-in", request),
            *("-cert", self.certificate, "-keyfile", self._key, "-extfile", names),
            *("-startdate", start, "-enddate", end, "-out", self.directory / f"{owner}.pem"),
        )

    def pem(self, name: str) -> bytes:
        """The content of a file."""
        return (self.directory / name).read_bytes()

    def _openssl(self, *arguments: object) -> None:
        command = [need("openssl"), *map(str, arguments)]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def is_open(port: int) -> bool:
    """Whether somebody listens on a port of this machine."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True
