"""The harness of real servers: none is left behind, whatever ends the tests."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from real_server import RealServer
from waiting import wait_until

STARTS_ONE = """
import time
from real_server import RealServer
with RealServer(["sleep", "60"], ready=lambda: True) as server:
    print(server.pid, flush=True)
    time.sleep(60)
"""


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_a_server_ends_with_a_killed_test():
    with subprocess.Popen(
        [sys.executable, "-c", STARTS_ONE],
        cwd=Path(__file__).parent,
        stdout=subprocess.PIPE,
        text=True,
    ) as starter:
        assert starter.stdout is not None
        pid = int(starter.stdout.readline())
        wait_until(lambda: Path(f"/proc/{pid}/comm").read_text() == "sleep\n")
        starter.kill()
        wait_until(lambda: is_gone(pid))


def test_a_server_that_ends_at_once_says_why():
    server = RealServer(["sh", "-c", "echo no room; exit 3"], ready=lambda: False)
    with pytest.raises(RuntimeError, match="no room"):
        server.start()


def test_a_program_that_is_not_there_is_named():
    server = RealServer(["no-such-program"], ready=lambda: False)
    with pytest.raises(RuntimeError, match="no-such-program"):
        server.start()
