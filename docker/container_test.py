"""Runs the image of the sidecar as it is meant to run, and uses it as engines do.

    python docker/container_test.py --tool docker --image kvcodec

One container at a time, without a network, with a read-only root and no capability, and its socket
in a folder of this machine. Pages are put through `sidecar+unix://` and read back here and in
another container; the sidecar is killed while it is read from, and started again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from container_client import KEYS, Client, Pages, decoded_pages

__all__: list[str] = []

HERE = Path(__file__).resolve().parent
UID = 10001
CONTAINED = [
    "--network=none",
    "--read-only",
    "--cap-drop=ALL",
    "--security-opt=no-new-privileges",
    "--pids-limit=256",
    "--memory=1g",
]


class Container:
    """The sidecar, named so that nobody else's is meant."""

    def __init__(self, tool: str, image: str, run: Path, extra: list[str]) -> None:
        self.name = f"kvcodec-test-{uuid.uuid4().hex[:8]}"
        self._tool, self.image, self.run_folder, self.extra = tool, image, run, extra
        self.url = f"sidecar+unix://{run}/kvcodec.sock"

    def start_new(self) -> None:
        """From the image, with pages in a volume."""
        flags = (
            []
            if os.geteuid() == 0
            else [
                "--listen.unix_mode=0666",
                f"--access.uids={os.geteuid()}",
            ]
        )
        self.call(
            "run", "--detach", "--name", self.name, *CONTAINED, *self.extra,
            f"--volume={self.run_folder}:/run/kvcodec",
            f"--volume={self.name}:/var/lib/kvcodec",
            self.image, "serve", "--store.url=file:///var/lib/kvcodec/pages",
            "--store.ram_bytes=64MiB", *flags,
        )  # fmt: skip

    def call(self, *words: str, text: str | None = None, check: bool = True) -> str:
        """One command of docker or podman; what it wrote."""
        done = subprocess.run(  # noqa: S603 - words of this file
            [self._tool, *words], input=text, check=False, capture_output=True, text=True
        )
        if check and done.returncode:
            raise SystemExit(f"{' '.join(words[:2])}: {done.stdout}{done.stderr}")
        return (done.stdout + done.stderr).strip()

    def inside(self, *words: str) -> str:
        """The output of a command in the container, whatever its exit code."""
        return self.call("exec", self.name, *words, check=False)

    def python(self, code: str) -> str:
        """What a line of Python prints in the container."""
        return self.inside("python3", "-c", code)

    def of(self, template: str) -> str:
        """What `inspect` says."""
        return self.call("inspect", "--format", template, self.name)

    def is_well(self) -> bool:
        """What the HEALTHCHECK of the image asks, now."""
        code = "python3 -IS /opt/kvcodec/healthcheck.py && echo well"
        return self.inside("sh", "-c", code).endswith("well")

    def client(self, task: str, user: str) -> str:
        """A client in a container of its own that has the folder of the socket, read-only."""
        return self.call(
            "run", "--rm", "--interactive", "--no-healthcheck", *CONTAINED, *self.extra,
            f"--user={user}", f"--group-add={UID}", f"--volume={self.run_folder}:/run/kvcodec:ro",
            "--entrypoint=python3", self.image, "-", task,
            "sidecar+unix:///run/kvcodec/kvcodec.sock",
            text=(HERE / "container_client.py").read_text(),
        )  # fmt: skip

    def remove(self) -> None:
        """With its volume."""
        self.call("rm", "--force", self.name, check=False)
        self.call("volume", "rm", "--force", self.name, check=False)


def say(text: str) -> None:
    """One line of the report."""
    sys.stdout.write(f"  {text}\n")
    sys.stdout.flush()


def must(holds: bool, what: str) -> None:
    """End the test unless it holds."""
    if not holds:
        raise SystemExit(f"FAILED: {what}")


def until(holds: Callable[[], bool], what: str, seconds: float) -> float:
    """Seconds until it holds; ends the test where that takes too long."""
    started = time.monotonic()
    while not holds():
        must(time.monotonic() - started < seconds, f"{what} not within {seconds:g} s")
        time.sleep(0.02)
    return time.monotonic() - started


def check_image(container: Container) -> None:
    """What the image holds, and what its process may do."""
    must(container.inside("id", "-u") == str(UID), "runs as another user")
    status = container.inside("cat", "/proc/1/status")
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    must(int(fields["CapEff"], 16) == 0, f"has capabilities {fields['CapEff']}")
    must(fields["NoNewPrivs"].strip() == "1", "may gain privileges")
    must("Read-only" in container.inside("touch", "/opt/kvcodec/x"), "can write to its root")
    interfaces = container.python("import os; print(*os.listdir('/sys/class/net'))")
    must(interfaces == "lo", f"has a network: {interfaces}")
    for program in ("gcc", "g++", "cc", "cmake", "git", "pip"):
        must(not container.inside("sh", "-c", f"command -v {program}"), f"the image has {program}")
    present = container.python(
        "from importlib.util import find_spec\n"
        "names = ('torch', 'sglang', 'pytest', 'grpc_tools', 'kvcodec')\n"
        "print([name for name in names if find_spec(name)])"
    )
    must(present == "['kvcodec']", f"the image has {present}")
    say("user 10001, no capability, no network, read-only root, neither torch nor compiler")
    limit = container.inside(
        "sh", "-c",
        "cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/memory/memory.limit_in_bytes 2>/dev/null",
    )  # fmt: skip
    must(limit == str(1 << 30), f"the memory limit is {limit!r}")
    say("memory limited to 1 GiB, as asked")


class Reader(threading.Thread):
    """Reads all the time, and notes what came and the longest wait."""

    def __init__(self, client: Client, wanted: Pages) -> None:
        super().__init__(daemon=True)
        self._client, self._wanted = client, wanted
        self._over = threading.Event()
        self.found = self.missed = self.wrong = 0
        self.longest_seconds = 0.0

    def run(self) -> None:
        """Until `stop`."""
        while not self._over.is_set():
            started = time.monotonic()
            found, pages = self._client.prefetch()
            self.longest_seconds = max(self.longest_seconds, time.monotonic() - started)
            self.found += sum(found)
            self.missed += len(found) - sum(found)
            for page, there in enumerate(found):
                same = all(
                    np.array_equal(got[page], want[page])
                    for got, want in zip(pages, self._wanted, strict=True)
                )
                self.wrong += there and not same
            self._over.wait(0.01)

    def stop(self) -> None:
        """And wait for the end."""
        self._over.set()
        self.join(30)


def check_restart(container: Container, client: Client, wanted: Pages) -> None:
    """Kill the sidecar while it is read from, start it again, and read on with the same client."""
    reader = Reader(client, wanted)
    reader.start()
    until(lambda: reader.found >= 3 * len(KEYS), "a few batches", 20)
    before = container.of("{{.State.Pid}}")
    container.call("kill", "--signal=KILL", container.name)
    until(lambda: reader.missed > 0, "a miss", 10)
    time.sleep(0.5)
    container.call("start", container.name)
    until(container.is_well, "health after the restart", 30)
    found = reader.found
    seconds = until(lambda: reader.found > found, "pages after the restart", 2)
    reader.stop()
    must(before != container.of("{{.State.Pid}}"), "it is the same process")
    must(reader.wrong == 0, f"{reader.wrong} wrong pages")
    must(reader.longest_seconds < 6, f"a call took {reader.longest_seconds:.1f} s")
    say(
        f"kill -9 and start: pages again {1000 * seconds:.0f} ms after the sidecar was well; "
        f"{reader.found} pages read, {reader.missed} misses, 0 wrong, longest call "
        f"{1000 * reader.longest_seconds:.0f} ms"
    )


def check_end(container: Container) -> None:
    """SIGTERM, drain, exit code, log."""
    started = time.monotonic()
    container.call("stop", container.name)
    seconds = time.monotonic() - started
    code = container.of("{{.State.ExitCode}}")
    log = container.call("logs", container.name)
    must(code == "0", f"exit code {code}: {log}")
    must("Traceback" not in log, log)
    messages = [json.loads(line)["message"] for line in log.splitlines()]
    must(messages[-1] == "stopped", f"the last line of the log is {messages[-1]!r}")
    say(f"SIGTERM: drained and gone in {seconds:.1f} s, exit code 0, every line of the log is JSON")


def prepare_folder(container: Container) -> None:
    """As the init container of the DaemonSet does, root with two capabilities; more than once."""
    folder = container.run_folder
    if os.geteuid() != 0:  # then this user would not get in
        folder.chmod(0o1777)
        return
    for _ in range(2):
        container.call(
            "run", "--rm", "--no-healthcheck", *CONTAINED, *container.extra, "--user=0",
            "--cap-add=CHOWN", "--cap-add=FOWNER", f"--volume={folder}:/run/kvcodec",
            "--entrypoint=install", container.image, "-d", "-o", str(UID), "-g", str(UID),
            "-m", "0750", "/run/kvcodec",
        )  # fmt: skip
        found = folder.stat()
        must((found.st_uid, found.st_mode & 0o777) == (UID, 0o750), "the folder is not the user's")


@contextmanager
def running(tool: str, image: str, extra: list[str]) -> Iterator[Container]:
    """A container that is well, until the block is left."""
    folder = Path(tempfile.mkdtemp(prefix="kvcodec-"))
    container = Container(tool, image, folder, extra)
    try:
        prepare_folder(container)
        started = time.monotonic()
        container.start_new()
        until(container.is_well, "health", 60)
        say(f"started and well in {time.monotonic() - started:.1f} s")
        yield container
    except BaseException:
        sys.stderr.write(container.call("logs", container.name, check=False) + "\n")
        raise
    finally:
        container.remove()
        shutil.rmtree(folder, ignore_errors=True)


def main() -> int:
    """Everything in turn; exit code 1 and a line that says what at the first thing that fails."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tool", default="docker", help="docker or podman")
    parser.add_argument("--image", default="kvcodec")
    parser.add_argument("--no-health-timer", action="store_true", help="nothing runs HEALTHCHECK")
    parser.add_argument("extra", nargs="*", help="further options of `run`, after --")
    arguments = parser.parse_args()
    wanted = decoded_pages()
    with running(arguments.tool, arguments.image, arguments.extra) as container:
        check_image(container)
        client = Client(container.url)
        must(client.backup() == len(KEYS), "not every page was stored")
        found, pages = client.prefetch()
        must(all(found), "not every page came back")
        must(all(map(np.array_equal, pages, wanted)), "pages came back changed")
        say(f"{len(KEYS)} pages put and read back through the mounted socket, verified and equal")
        say(f"another container, user 0: {container.client('read', '0')}")
        say(f"another container, user {UID}: {container.client('read', str(UID))}")
        container.client("refused", "20001")
        must("uid 20001 may not" in container.call("logs", container.name), "no refusal is logged")
        say("another container, user 20001: refused")
        check_restart(container, client, wanted)
        client.close()
        if not arguments.no_health_timer:
            state = "{{.State.Health.Status}}"
            seconds = until(lambda: container.of(state) == "healthy", "HEALTHCHECK", 60)
            say(f"HEALTHCHECK says healthy ({seconds:.0f} s more)")
        check_end(container)
    return 0


if __name__ == "__main__":
    sys.exit(main())
