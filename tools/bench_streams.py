"""A sidecar's streams beside bare gRPC streams: speed, processor time, and who else waits.

Part of `make bench-sidecar`. How often Python copies a message while it arrives is luck of a
process' heap, so it is done in several processes.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import grpc

from kvcodec.backend import open_backend
from kvcodec_server._frames import chunks

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from server_sidecar import Sidecar
from sidecar_process import Authority, SidecarProcess

# A store of one copy each way: what a tier does besides is no matter of the stream.
REMOTE_STORE = "memory://?max_bytes=2GiB"
# Of the streams, in processes of their own.
RUNS = 5
VERBS = ("put", "get")

BARE_SERVER = """
import os, sys, time
from concurrent import futures
import grpc
from kvcodec.backend import open_backend
from kvcodec_server.malloc import keep_freed_memory
keep_freed_memory()
page_count, size, chunk_bytes = map(int, sys.argv[1:4])
store = open_backend(sys.argv[4])
names = [f"{0:032x}/{index:064x}" for index in range(page_count)]
chunks = [os.urandom(chunk_bytes) for _ in range(page_count * -(-size // chunk_bytes))]
page = memoryview(bytearray(size))
def get(request, context):
    return iter(chunks)
def put(requests, context):
    for index, request in enumerate(requests):
        chunks[index] = request
    return b""
def put_dropped(requests, context):
    return b"%d" % sum(map(len, requests))
def get_stored(request, context):
    for name in names:
        store.get_into([name], [page], timeout_seconds=60)
        for at in range(0, size, chunk_bytes):
            yield bytes(page[at:at + chunk_bytes])
def put_stored(requests, context):
    for name in names:
        parts = [next(requests) for _ in range(0, size, chunk_bytes)]
        data = parts[0] if len(parts) == 1 else b"".join(parts)
        store.put([name], [memoryview(data)], timeout_seconds=60)
    return b""
generic = grpc.method_handlers_generic_handler("bare", {
    **{call.__name__: grpc.unary_stream_rpc_method_handler(call) for call in (get, get_stored)},
    **{call.__name__: grpc.stream_unary_rpc_method_handler(call)
       for call in (put, put_dropped, put_stored)}})
server = grpc.server(futures.ThreadPoolExecutor(4), options=[
    ("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)])
server.add_generic_rpc_handlers((generic,))
if len(sys.argv) == 5:
    port = server.add_insecure_port("127.0.0.1:0")
else:
    certificate, key = (open(path, "rb").read() for path in sys.argv[5:7])
    port = server.add_secure_port(
        "127.0.0.1:0", grpc.ssl_server_credentials([(key, certificate)]))
print(port, flush=True)
server.start()
time.sleep(3600)
"""


def processor_seconds(pid: int) -> float:
    """Of all threads that this process has had."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class BareServer:
    """gRPC streams of messages of one size, and nothing else, in a process of its own."""

    def __init__(
        self, pages: list[memoryview], *more: object, authorities: bytes | None = None
    ) -> None:
        size = len(pages[0])
        self._pages = pages
        self._chunk_bytes = len(next(chunks(pages[0])))
        arguments = (len(pages), size, self._chunk_bytes, REMOTE_STORE, *more)
        self._process = subprocess.Popen(
            [sys.executable, "-c", BARE_SERVER, *map(str, arguments)],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        self.pid = self._process.pid
        target = f"127.0.0.1:{self._process.stdout.readline().strip()}"
        unlimited = [(f"grpc.max_{verb}_message_length", -1) for verb in ("receive", "send")]
        if authorities is None:
            self.channel = grpc.insecure_channel(target, options=unlimited)
        else:
            credentials = grpc.ssl_channel_credentials(authorities)
            self.channel = grpc.secure_channel(target, credentials, options=unlimited)

    def get(self, method: str) -> None:
        """Copy the messages of its answer into the pages."""
        size = len(self._pages[0])
        per_page = -(-size // self._chunk_bytes)
        parts = self.channel.unary_stream(f"/bare/{method}")(b"", timeout=60)
        for index, chunk in enumerate(parts):
            page, at = self._pages[index // per_page], index % per_page * self._chunk_bytes
            page[at : at + len(chunk)] = chunk[: size - at]

    def put(self, method: str) -> None:
        """Send the pages as messages."""
        parts = (
            bytes(page[at : at + self._chunk_bytes])
            for page in self._pages
            for at in range(0, len(page), self._chunk_bytes)
        )
        self.channel.stream_unary(f"/bare/{method}")(parts, timeout=60)

    def close(self) -> None:
        """End it."""
        self.channel.close()
        self._process.terminate()
        self._process.wait()


class Metronome(threading.Thread):
    """A thread that wants the GIL every millisecond, as an engine's does, and how late it gets it:
    ours and gRPC's threads work in the same process.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._late: list[float] = []
        self._closing = False

    def run(self) -> None:
        """Note lateness until the end."""
        while not self._closing:
            wanted = time.perf_counter() + 0.001
            time.sleep(0.001)
            self._late.append(time.perf_counter() - wanted)

    def latest(self) -> float:
        """The mean since the last call, in seconds."""
        late, self._late = self._late, []
        return statistics.fmean(late or [0.0])

    def close(self) -> None:
        """End it."""
        self._closing = True
        self.join()


def own_calls(url: str, kind: str, pages: list[memoryview]) -> dict[str, Callable[[], object]]:
    """Puts and gets of the pages through a sidecar's streams."""
    backend = open_backend(url)
    names = [f"{0:032x}/{index:064x}" for index in range(len(pages))]
    return {
        f"put{kind}": partial(backend.put, names, pages, timeout_seconds=60),
        f"get{kind}": partial(backend.get_into, names, pages, timeout_seconds=60),
    }


def bare_calls(server: BareServer, kind: str) -> dict[str, Callable[[], object]]:
    """The same through a bare server's, as it is for this kind."""
    if kind == " dropped":
        return {f"bare put{kind}": partial(server.put, "put_dropped")}
    suffix = "_stored" if kind == " with store" else ""
    return {f"bare {verb}{kind}": partial(getattr(server, verb), verb + suffix) for verb in VERBS}


def one_run(page_count: int, size: int, rounds: int) -> dict[str, object]:
    """Encoded pages of `size` bytes through streams, and bare streams of as many such chunks.

    The client of all of them is this process, which copies what it gets into the same buffers. Of
    the bare servers, each in a process of its own, one has its messages ready and keeps what it is
    sent in their place, one drops it, one reads and writes such a store as the sidecar has, and one
    is the first with TLS.
    """
    pages = [memoryview(bytearray(os.urandom(size))) for _ in range(page_count)]
    calls: dict[str, tuple[int, Callable[[], object]]] = {}
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        authority = Authority(directory)
        authority.sign("server")
        files = str(directory / "server.pem"), str(directory / "server.key")
        bare = {kind: BareServer(pages) for kind in ("", " dropped", " with store")}
        authorities = authority.certificate.read_bytes()
        bare[" over TLS"] = BareServer(pages, *files, authorities=authorities)
        for kind, server in bare.items():
            stack.callback(server.close)
            calls |= {name: (server.pid, call) for name, call in bare_calls(server, kind).items()}
        settings = dict(zip(("tls.certificate", "tls.key"), files, strict=True))
        settings["store.url"] = REMOTE_STORE
        plain = stack.enter_context(Sidecar(directory, REMOTE_STORE))
        private = stack.enter_context(SidecarProcess(directory, settings))
        tls = f"sidecar://{private.target}?tls=1&ca_file={authority.certificate}"
        for kind, sidecar, url in (("", plain, plain.url), (" over TLS", private, tls)):
            own = own_calls(url, kind, pages)
            calls |= {name: (sidecar.pid, call) for name, call in own.items()}
        return timed(calls, rounds, ([None] * page_count, [size] * page_count))


def timed(
    calls: dict[str, tuple[int, Callable[[], object]]], rounds: int, right: tuple[object, object]
) -> dict[str, object]:
    """Seconds of each call in turns, of the processors and of another thread, and whether the
    answers are `right`.
    """
    seconds: dict[str, list[float]] = {}
    late: dict[str, list[float]] = {}
    processor: Counter[str] = Counter()
    metronome = Metronome()
    metronome.start()
    order = sorted(calls, key=lambda name: "get" in name)  # what is got was put
    for index in range(rounds + 1):  # the first fills the stores, and does not count
        for name in reversed(order) if index % 2 else order:
            server, call = calls[name]
            before = processor_seconds(os.getpid()) + processor_seconds(server)
            metronome.latest()
            started = time.perf_counter()
            answers = call()
            if index:
                seconds.setdefault(name, []).append(time.perf_counter() - started)
                late.setdefault(name, []).append(metronome.latest())
                used = processor_seconds(os.getpid()) + processor_seconds(server) - before
                processor[name] += used
            assert answers is None or answers in right, answers
    metronome.close()
    return {
        "processor_seconds": {name: used / rounds for name, used in processor.items()},
        "seconds": seconds,
        "late_seconds": late,
    }


def bench_streams(page_count: int, size: int, rounds: int) -> dict[str, object]:
    """Several runs of `one_run`, each with new processes on both sides."""
    runs = []
    for _run in range(RUNS):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            runs.append(pool.apply(one_run, (page_count, size, -(-rounds // RUNS))))
    ratio: dict[str, list[float]] = {}
    for run in runs:
        for bare in run["seconds"]:
            kind = bare.removeprefix("bare ")
            if kind != bare:
                own = run["seconds"][kind if kind in run["seconds"] else kind[:3]]
                ratio.setdefault(kind, []).extend(
                    theirs / ours for theirs, ours in zip(run["seconds"][bare], own, strict=True)
                )
    return {
        "store": REMOTE_STORE.partition("?")[0],
        "pages": page_count,
        "moved": "encoded pages",
        "bytes_per_page": size,
        "chunk_bytes": len(next(chunks(memoryview(bytes(size))))),
        "processor_seconds": {
            name: statistics.mean(run["processor_seconds"][name] for run in runs)
            for name in runs[0]["processor_seconds"]
        },
        **{
            numbers: {
                name: [value for run in runs for value in run[numbers][name]]
                for name in runs[0][numbers]
            }
            for numbers in ("seconds", "late_seconds")
        },
        "ratio": dict(sorted(ratio.items())),
    }
