"""A server on the other side of a network of a chosen rate: a namespace and two token buckets.

    with ShapedNetwork("1gbit") as network:
        subprocess.Popen([*network.enter, "redis-server", "--bind", network.server])
        ...                     # and reach it at network.server, shaped both ways

Needs root, iproute2 and a Linux that has network namespaces and the tbf queue.
"""

from __future__ import annotations

import os
import socket
import subprocess
import threading
import time
from types import TracebackType

_PROBE_PORT = 5201
_PROBE_SECONDS = 2.0


class NetworkUnavailable(Exception):
    """This machine cannot shape a network; the message says why."""


class ShapedNetwork:
    """Two ends of one cable, the far one in a namespace of its own, between enter and exit."""

    def __init__(self, rate: str, *, burst: str = "256kb") -> None:
        """`rate` and `burst` as ``tc`` reads them, such as ``1gbit`` and ``256kb``."""
        number = os.getpid() % 250
        self.rate = rate
        self._burst = burst
        self._name = f"kvc{os.getpid()}"
        self.client, self.server = f"10.77.{number}.1", f"10.77.{number}.2"
        #: Put before a command, it runs on the far side.
        self.enter = ["ip", "netns", "exec", self._name]

    def __enter__(self) -> ShapedNetwork:
        near, far = f"{self._name}h", f"{self._name}s"
        inside = ["-n", self._name]
        try:
            _run("ip", "netns", "add", self._name)
            _run("ip", "link", "add", near, "type", "veth", "peer", "name", far)
            _run("ip", "link", "set", far, "netns", self._name)
            _run("ip", "addr", "add", f"{self.client}/24", "dev", near)
            _run("ip", "link", "set", near, "up")
            _run("ip", *inside, "addr", "add", f"{self.server}/24", "dev", far)
            _run("ip", *inside, "link", "set", far, "up")
            _run("ip", *inside, "link", "set", "lo", "up")
            shape = ["root", "tbf", "rate", self.rate, "burst", self._burst, "latency", "50ms"]
            _run("tc", "qdisc", "add", "dev", near, *shape)
            _run("tc", *inside, "qdisc", "add", "dev", far, *shape)
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._remove()

    def _remove(self) -> None:
        # The kernel takes a namespace down when it finds time; the cable goes at once.
        for what in (["link", "del", f"{self._name}h"], ["netns", "del", self._name]):
            subprocess.run(["ip", *what], capture_output=True, check=False)

    def measured_rate(self) -> float:
        """Bytes per second of one bare TCP stream from the far side."""
        program = (
            "import socket, sys\n"
            "listener = socket.create_server((sys.argv[1], int(sys.argv[2])))\n"
            "print(flush=True)\n"
            "connection, _ = listener.accept()\n"
            "block = bytes(1 << 20)\n"
            "try:\n"
            "    while True: connection.sendall(block)\n"
            "except OSError: pass\n"
        )
        command = [*self.enter, "python3", "-c", program, self.server, str(_PROBE_PORT)]
        sender = subprocess.Popen(command, stdout=subprocess.PIPE)
        try:
            assert sender.stdout is not None
            sender.stdout.readline()
            buffer, received = bytearray(1 << 20), 0
            with socket.create_connection((self.server, _PROBE_PORT)) as connection:
                start = time.perf_counter()
                while (seconds := time.perf_counter() - start) < _PROBE_SECONDS:
                    received += connection.recv_into(buffer)
            return received / seconds
        finally:
            # It ends by itself when the connection is gone; the timer is for the case it does not.
            timer = threading.Timer(5.0, sender.kill)
            timer.start()
            sender.wait()
            timer.cancel()


def _run(*command: str) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise NetworkUnavailable(f"{command[0]} is not installed (Debian: iproute2)") from error
    except subprocess.CalledProcessError as error:
        said = error.stderr.strip()
        raise NetworkUnavailable(f"{' '.join(command)}: {said}") from error
