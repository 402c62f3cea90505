"""A real SGLang server on the CPU of this machine: started, asked, administered, stopped.

It listens on loopback only, runs in a process group of its own, and is ended with all it spawned.
"""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from sglang_cpu_bridge import server_environment

START_SECONDS = 600.0
REQUEST_SECONDS = 120.0
STOP_SECONDS = 15.0
_PR_SET_PDEATHSIG = 1


class ServerFailed(Exception):
    """The server did not start, went away, or refused a request."""


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One greedy completion: its token ids, text, log probabilities, and where the prompt was."""

    output_ids: tuple[int, ...]
    text: str
    logprobs: tuple[float, ...]
    margins: tuple[float, ...]
    prompt_tokens: int
    cached_tokens: int
    storage_hit_tokens: int


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _end_with_parent() -> None:
    """In the child, before exec: a server must not outlive a killed demo."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


@dataclass(kw_only=True)
class SGLangServer:
    """``python -m sglang.launch_server`` with a hierarchical cache, between enter and exit.

    storage_backend and storage_extra go to ``--hicache-storage-backend`` and its extra
    configuration; None starts without storage, to be attached later.
    """

    model: Path
    log: Path
    storage_backend: str | None = None
    storage_extra: Mapping[str, object] = field(default_factory=dict)
    page_size: int = 32
    max_total_tokens: int = 8192
    tp_size: int = 1
    environment: Mapping[str, str] = field(default_factory=dict)
    flags: Sequence[str] = ()

    def __enter__(self) -> SGLangServer:
        self.port = _free_port()
        self._admin_key = secrets.token_hex(16)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                self._command(),
                env=server_environment(tp_size=self.tp_size) | dict(self.environment),
                cwd=self.log.parent,  # `-m` puts it on the path: no checkout may lie there
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_end_with_parent,  # noqa: PLW1509 - no other thread runs here yet
            )
        try:
            self._wait_until_healthy()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def _command(self) -> list[str]:
        command = [
            *(sys.executable, "-W", "ignore", "-m", "sglang.launch_server"),
            *("--model-path", str(self.model), "--served-model-name", "tiny-llama"),
            *("--host", "127.0.0.1", "--port", str(self.port)),
            *("--admin-api-key", self._admin_key),
            *("--device", "cpu", "--attention-backend", "torch_native"),
            *("--sampling-backend", "pytorch", "--dtype", "bfloat16"),
            *("--tp-size", str(self.tp_size)),
            *("--max-total-tokens", str(self.max_total_tokens), "--mem-fraction-static", "0.5"),
            *("--disable-overlap-schedule", "--skip-server-warmup"),
            *("--page-size", str(self.page_size)),
            *("--enable-hierarchical-cache", "--hicache-ratio", "2"),
            *("--hicache-write-policy", "write_through"),
            *("--hicache-storage-prefetch-policy", "wait_complete"),
            *("--enable-cache-report", "--enable-metrics"),
            *self.flags,
        ]
        if self.storage_backend is not None:
            command += [
                *("--hicache-storage-backend", self.storage_backend),
                *("--hicache-storage-backend-extra-config", self._extra_json(self.storage_extra)),
            ]
        return command

    def _extra_json(self, extra: Mapping[str, object]) -> str:
        return json.dumps({"prefetch_threshold": self.page_size, **extra})

    def _wait_until_healthy(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise ServerFailed(f"the server ended while starting\n{self.log_tail()}")
            with contextlib.suppress(ServerFailed):
                if self.request("GET", "/health")[0] == http.client.OK:
                    return
            time.sleep(0.2)
        raise ServerFailed(f"the server was not healthy after {START_SECONDS:.0f} s")

    def stop(self) -> None:
        """End the server and everything it spawned; only processes of its own group."""
        # The leader ends its children in good order; ended all at once, it would take each of
        # them for crashed and spend seconds on a diagnosis.
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process.pid, signal.SIGTERM)
        deadline = time.monotonic() + STOP_SECONDS
        while time.monotonic() < deadline and self._group_is_alive():
            time.sleep(0.05)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _group_is_alive(self) -> bool:
        self._process.poll()  # collects the leader's exit status
        try:
            os.killpg(self._process.pid, 0)
        except ProcessLookupError:
            return False
        return True

    def log_tail(self, line_count: int = 12) -> str:
        """The end of the server's log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-line_count:])

    def request(
        self, method: str, path: str, body: Mapping[str, object] | None = None
    ) -> tuple[int, str]:
        """One HTTP request with the admin key; returns status and text, raises only if cut off."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={
                "Content-Type": "application/json",
                "Authorization": f"Bearer {self._admin_key}",
            },
        )
        try:
            with urllib.request.urlopen(request, timeout=REQUEST_SECONDS) as answer:  # noqa: S310
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode(errors="replace")
        except (OSError, http.client.HTTPException) as error:
            raise ServerFailed(f"{method} {path}: {error}\n{self.log_tail()}") from error

    def _expect_ok(self, method: str, path: str, body: Mapping[str, object] | None = None) -> str:
        status, text = self.request(method, path, body)
        if status != http.client.OK:
            raise ServerFailed(f"{method} {path} answered {status}: {text[:500]}")
        return text

    def generate(self, prompt: str, token_count: int) -> Generation:
        """A greedy completion of exactly so many tokens."""
        answer = json.loads(
            self._expect_ok(
                "POST",
                "/generate",
                {
                    "text": prompt,
                    "sampling_params": {
                        "temperature": 0,
                        "max_new_tokens": token_count,
                        "ignore_eos": True,
                    },
                    "return_logprob": True,
                    "top_logprobs_num": 2,
                },
            )
        )
        about = answer["meta_info"]
        details = about.get("cached_tokens_details") or {}
        return Generation(
            output_ids=tuple(answer["output_ids"]),
            text=answer["text"],
            logprobs=tuple(entry[0] for entry in about["output_token_logprobs"]),
            margins=tuple(top[0][0] - top[1][0] for top in about["output_top_logprobs"]),
            prompt_tokens=about["prompt_tokens"],
            cached_tokens=about["cached_tokens"],
            storage_hit_tokens=details.get("storage", 0),
        )

    def flush(self) -> None:
        """Empty device and host memory; the server declines while a request is still settling."""

        def is_flushed() -> bool:
            return self.request("POST", "/flush_cache", {})[0] == http.client.OK

        self.wait_for(is_flushed, "the cache to be flushed")

    def wait_for(self, is_done: Callable[[], bool], what: str, seconds: float = 60.0) -> None:
        """Ask again and again until it is so."""
        deadline = time.monotonic() + seconds
        while not is_done():
            if time.monotonic() > deadline:
                raise ServerFailed(f"waited {seconds:.0f} s for {what}")
            time.sleep(0.2)

    def attach(self, backend: str, extra: Mapping[str, object]) -> None:
        """Attach a storage backend at run time."""
        self._expect_ok(
            "PUT",
            "/hicache/storage-backend",
            {
                "hicache_storage_backend": backend,
                "hicache_storage_backend_extra_config_json": self._extra_json(extra),
                "hicache_storage_prefetch_policy": "wait_complete",
            },
        )

    def detach(self) -> None:
        """Detach the storage backend at run time."""
        self._expect_ok("DELETE", "/hicache/storage-backend")

    def attached_backend(self) -> str | None:
        """The name of the attached storage backend."""
        answer = json.loads(self._expect_ok("GET", "/hicache/storage-backend"))
        name = answer["hicache_storage_backend"]
        return None if name is None else str(name)

    def metrics(self) -> dict[str, float]:
        """The server's counters and gauges by name, summed over their labels."""
        totals: dict[str, float] = {}
        for line in self._expect_ok("GET", "/metrics").splitlines():
            matched = re.match(r"(sglang:\w+)(?:\{.*\})? (\S+)$", line)
            if matched:
                totals[matched[1]] = totals.get(matched[1], 0.0) + float(matched[2])
        return totals
