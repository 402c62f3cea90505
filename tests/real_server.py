"""Real servers for tests: started on loopback, stopped by pid, gone with the test process.

    with RealServer(["redis-server", "--port", str(port)], ready=answers_on(port)) as server:
        ...
        with server.stalled():      # SIGSTOP: takes connections, answers nothing
            ...
        server.kill()               # SIGKILL, as the out-of-memory killer does

What `make stores` installed lies in `STORES`; `need` skips a test, with the reason, where it could
not be installed.
"""

from __future__ import annotations

import itertools
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

STORES = Path(sys.prefix) / "stores"
START_SECONDS = 60.0
STOP_SECONDS = 10.0
# No server outlives a killed test. A program sees to it, for a function to call in the child would
# make Python fork in a way that gRPC notices: its threads start there, and may end it before exec.
_END_WITH_PARENT = ("setpriv", "--pdeathsig", "TERM")


def need(program: str | Path) -> str:
    """The path of an installed program; skips the test where there is none."""
    found = shutil.which(str(program))
    if found is None:
        pytest.skip(f"{Path(program).name} is not installed; `make stores` does it where it can")
    return found


# Below the ports that the kernel gives to connections, which would take one before its server does.
# Another test process has the odd ones or the even ones.
_ODD = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 2
_PORTS = [port + _ODD for port in range(20_000, 32_000, 2)]
_places = itertools.count(random.SystemRandom().randrange(len(_PORTS)))


def free_port() -> int:
    """A port of the loopback interface for a server that will start soon; each time another one."""
    while True:
        port = _PORTS[next(_places) % len(_PORTS)]
        with socket.socket() as listener:
            try:
                listener.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port


def answers_on(port: int) -> Callable[[], bool]:
    """Whether somebody takes connections on a port of the loopback interface."""

    def ready() -> bool:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1.0).close()
        except OSError:
            return False
        return True

    return ready


def _is_stopped(pid: int) -> bool:
    """Whether every thread of a process stands still."""
    threads = Path(f"/proc/{pid}/task").glob("*/stat")
    try:
        return all(path.read_text().rpartition(")")[2].split()[0] in "TtZX" for path in threads)
    except (FileNotFoundError, ProcessLookupError):
        return False  # a thread ended meanwhile


class RealServer:
    """One server process, from enter to exit. It may be killed and started again in between."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        ready: Callable[[], bool],
        environment: Mapping[str, str] | None = None,
        directory: Path | None = None,
        start_seconds: float = START_SECONDS,
    ) -> None:
        self.command = list(command)
        self._ready = ready
        self._environment = os.environ | dict(environment or {})
        self._directory = directory
        self._start_seconds = start_seconds
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - open from enter to exit
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> RealServer:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._log.close()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def log(self) -> str:
        """The end of what the server has said."""
        size = os.fstat(self._log.fileno()).st_size
        return os.pread(self._log.fileno(), 4000, max(0, size - 4000)).decode(errors="replace")

    def start(self) -> None:
        """Start the process and wait until it is ready."""
        assert not self.is_running, "it is running"
        self._process = subprocess.Popen(
            [*_END_WITH_PARENT, *self.command],
            env=self._environment,
            cwd=self._directory,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        deadline = time.monotonic() + self._start_seconds
        while not self._ready():
            if self._process.poll() is not None:
                raise RuntimeError(f"{self.command[0]} ended at once:\n{self.log()}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.command[0]} is not ready:\n{self.log()}")
            time.sleep(0.05)

    def kill(self) -> None:
        """End it without giving it a chance to tidy up."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def stop(self) -> None:
        """Ask it to end; insist after a while."""
        if self._process is None or not self.is_running:
            return
        self._process.send_signal(signal.SIGCONT)
        self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()

    @contextmanager
    def stalled(self) -> Iterator[None]:
        """While entered the process stands still: the kernel takes connections, nobody answers."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        # A thread that runs just now may do so for a moment, and answer.
        while not _is_stopped(self._process.pid):
            time.sleep(0.001)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)
