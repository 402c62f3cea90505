"""The demo: a real SGLang server on this CPU keeps its KV cache in a kvcodec store.

For each preset, prompts are answered once and their KV pages land in storage. Then the server
forgets what it holds in device and host memory, and answers the same prompts from storage. The
table says how many tokens came back from there, in how many bytes, and whether the answers are the
same. The server stays up throughout; presets are changed by detaching and attaching the storage.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType

import tiny_model
from demo_sidecar import SidecarFailed, sidecar
from rich.console import Console
from rich.table import Table
from rich.text import Text
from sglang_server import Generation, ServerFailed, SGLangServer

ROOT = Path(__file__).resolve().parents[1]
PAGE_SIZE = 32
PAGE_BYTES = PAGE_SIZE * tiny_model.BYTES_PER_TOKEN
OUTPUT_TOKENS = 24

_ENGLISH = (
    "Section {}. The keys and values of a long prompt are kept in device memory, then in host "
    "memory, then in storage, from where they return when the prompt does. "
)
_CHINESE = (
    "第{}节：长提示的键和值先留在显存，再到主机内存，最后写入存储；"
    "同样的开头再次出现时，不必重新计算。"
)
_JSON = '{{"page": {}, "layers": 4, "tokens": 32, "codec": "kv8", "verified": true}}\n'
# A token is a byte. The Chinese prompt has full-width letters only, so that the model, which
# quotes what stood a multiple of three bytes before, begins with a whole character.
PROMPTS = {
    "English": "".join(_ENGLISH.format(number) for number in range(1, 9)),
    "中文": "".join(_CHINESE.format(number) for number in "一二三四五六七八九"),
    "JSON": "".join(_JSON.format(number) for number in range(20)),
}


class DemoFailed(Exception):
    """Something did not come out as it should; the text says what."""


@dataclass(kw_only=True)
class Run:
    """What one preset achieved, in the words of build/demo.json."""

    preset: str
    l3_hit_tokens: int
    raw_bytes: int
    stored_bytes: int
    same_output: bool


@dataclass(kw_only=True)
class Demo:
    """One demonstration with its settings and what it found so far."""

    backend: str
    presets: list[str]
    build: Path
    console: Console
    urls: dict[str, str] = field(default_factory=dict)
    runs: list[Run] = field(default_factory=list)
    drifts: list[float] = field(default_factory=list)
    start: float = field(default_factory=time.monotonic)

    def say(self, text: str) -> None:
        """One line of progress that stays on the screen."""
        seconds = time.monotonic() - self.start
        self.console.print(Text(f"{seconds:5.1f} s  {text}"), soft_wrap=True)

    def directory(self, preset: str) -> Path:
        """Where this preset's pages go."""
        return self.build / "demo" / "l3" / preset

    def _extra_of(self, preset: str) -> dict[str, object]:
        """The storage backend's extra configuration."""
        if self.backend == "file":
            return {"file_storage_path": str(self.directory(preset))}
        return {"preset": preset, "url": self.urls[preset]}

    @property
    def _storage_backend(self) -> str:
        """What SGLang is told; a sidecar is one more store to it."""
        return "kvcodec" if self.backend == "sidecar" else self.backend

    def run(self) -> None:
        """All presets, one after the other, against one server."""
        shutil.rmtree(self.build / "demo" / "l3", ignore_errors=True)
        for preset in self.presets:
            self.directory(preset).mkdir(parents=True)
        with self.console.status("making a tiny model"):
            model = tiny_model.make_checkpoint(self.build / "demo" / "model")
        self.say("model: a tiny Llama, random but for one attention head")
        with contextlib.ExitStack() as stack:
            for preset in self.presets:
                self.urls[preset] = self.directory(preset).as_uri()
                if self.backend == "sidecar":
                    log = self.build / "demo" / f"sidecar-{preset}.log"
                    url = stack.enter_context(sidecar(self.directory(preset).as_uri(), log))
                    self.urls[preset] = url
                    self.say(f"sidecar: kvcodec serve for {preset}, at {url}")
            with self.console.status("starting SGLang, which takes about 20 s"):
                server = stack.enter_context(
                    SGLangServer(
                        model=model,
                        log=self.build / "demo" / "server.log",
                        storage_backend=self._storage_backend,
                        storage_extra=self._extra_of(self.presets[0]),
                        page_size=PAGE_SIZE,
                    )
                )
            self.say(f"server: SGLang with --hicache-storage-backend {server.attached_backend()}")
            for preset in self.presets:
                if preset != self.presets[0]:
                    self._switch_to(server, preset)
                self._run_preset(server, preset)
        self.say("server stopped")

    def _switch_to(self, server: SGLangServer, preset: str) -> None:
        server.detach()
        if server.attached_backend() is not None:
            raise DemoFailed("the storage backend is still attached after detaching it")
        server.attach(self._storage_backend, self._extra_of(preset))
        self.say(f"storage detached, and attached again with preset {preset}")

    def _run_preset(self, server: SGLangServer, preset: str) -> None:
        stored_before = _backed_up_tokens(server)
        with self.console.status(f"{preset}: answering {len(PROMPTS)} prompts, cold"):
            cold = self._answer(server)
        if any(answer.cached_tokens for answer in cold.values()):
            raise DemoFailed(f"{preset}: a cold answer found {cold} in a cache")
        with self.console.status(f"{preset}: waiting for the pages to be stored"):
            self._wait_until_stored(server, preset, stored_before, cold)
        stored_tokens = _backed_up_tokens(server) - stored_before
        stored_bytes = _bytes_in(self.directory(preset))
        self.say(f"{preset}: {stored_tokens} tokens stored in {stored_bytes:,} bytes")
        server.flush()
        with self.console.status(f"{preset}: device and host memory flushed, answering again"):
            warm = self._answer(server)
        server.flush()
        run = Run(
            preset=preset,
            l3_hit_tokens=sum(answer.storage_hit_tokens for answer in warm.values()),
            raw_bytes=stored_tokens // PAGE_SIZE * PAGE_BYTES,
            stored_bytes=stored_bytes,
            same_output=all(cold[name].output_ids == warm[name].output_ids for name in cold),
        )
        self.runs.append(run)
        self.drifts.append(_largest_drift(cold, warm))
        self.say(f"{preset}: {run.l3_hit_tokens} of {stored_tokens} tokens came back from storage")
        for name, answer in warm.items():
            self.say(f"    {name} goes on: {answer.text!r}")
        self._check(run, cold, warm)

    def _answer(self, server: SGLangServer) -> dict[str, Generation]:
        return {name: server.generate(text, OUTPUT_TOKENS) for name, text in PROMPTS.items()}

    def _wait_until_stored(
        self, server: SGLangServer, preset: str, before: int, cold: dict[str, Generation]
    ) -> None:
        at_least = sum(_whole_pages(answer.prompt_tokens) for answer in cold.values())

        def state() -> tuple[int, int]:
            return _backed_up_tokens(server) - before, _bytes_in(self.directory(preset))

        server.wait_for(lambda: state()[0] >= at_least, f"{at_least} tokens to be stored")
        server.wait_for(_is_steady(state), "the store to come to rest")

    def _check(self, run: Run, cold: dict[str, Generation], warm: dict[str, Generation]) -> None:
        for name, answer in warm.items():
            # SGLang computes the last token itself, hence the page before it is the last hit.
            expected = _whole_pages(answer.prompt_tokens - 1)
            if answer.storage_hit_tokens != expected:
                found = answer.storage_hit_tokens
                raise DemoFailed(
                    f"{run.preset}, {name}: {found} tokens from storage, not {expected}"
                )
            if answer.output_ids != cold[name].output_ids:
                raise DemoFailed(f"{run.preset}, {name}: another answer than without storage")
        if not run.stored_bytes:
            raise DemoFailed(f"{run.preset}: nothing lies in {self.directory(run.preset)}")

    def show_table(self) -> None:
        """The result, one line per preset."""
        table = Table(title="the same prompts, answered without a cache and from storage")
        table.add_column("preset")
        for heading in ("L3 hit tokens", "raw bytes", "stored bytes", "ratio"):
            table.add_column(heading, justify="right", no_wrap=True)
        table.add_column("same output", no_wrap=True)
        table.add_column("Δ log p", justify="right")
        for run, drift in zip(self.runs, self.drifts, strict=True):
            table.add_row(
                run.preset,
                f"{run.l3_hit_tokens:,}",
                f"{run.raw_bytes:,}",
                f"{run.stored_bytes:,}",
                f"{run.raw_bytes / run.stored_bytes:.2f}" if run.stored_bytes else "-",
                "yes" if run.same_output else "NO",
                f"{drift:.4f}",
            )
        self.console.print(table)

    def show_page(self) -> None:
        """What ``kvcodec inspect`` says about one of the stored pages."""
        if self.backend == "file":
            return
        preset = self.presets[-1]
        page = max(_files_in(self.directory(preset)), key=lambda path: path.stat().st_size)
        command = Path(sys.executable).with_name("kvcodec")
        shown = page.relative_to(self.build.parent)
        self.console.print(Text(f"$ kvcodec inspect {shown}"), soft_wrap=True)
        inspected = subprocess.run(
            [str(command), "inspect", str(page)], check=False, capture_output=True, text=True
        )
        self.console.print(Text(inspected.stdout + inspected.stderr), soft_wrap=True)
        if inspected.returncode:
            raise DemoFailed(f"kvcodec inspect ended with {inspected.returncode}")


def _console() -> Console:
    """Wide enough for the table where nobody says how wide the paper is (a pipe, CI)."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=100)


def _whole_pages(token_count: int) -> int:
    return token_count // PAGE_SIZE * PAGE_SIZE


def _backed_up_tokens(server: SGLangServer) -> int:
    return int(server.metrics().get("sglang:backuped_tokens_total", 0.0))


def _files_in(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if path.is_file()]


def _bytes_in(directory: Path) -> int:
    return sum(path.stat().st_size for path in _files_in(directory))


def _is_steady(state: Callable[[], object]) -> Callable[[], bool]:
    """A condition: the state was the same at two looks in a row."""
    seen: list[object] = []

    def is_done() -> bool:
        seen.append(state())
        return len(seen) > 1 and seen[-1] == seen[-2]

    return is_done


def _largest_drift(cold: dict[str, Generation], warm: dict[str, Generation]) -> float:
    """How far the log probability of an output token moved, as far as the outputs agree."""
    drift = 0.0
    for name, answer in warm.items():
        before = cold[name]
        for index, token in enumerate(answer.output_ids):
            if token != before.output_ids[index]:
                break
            drift = max(drift, abs(answer.logprobs[index] - before.logprobs[index]))
    return drift


def _stop_in_good_order(signal_number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + signal_number)


def main() -> int:
    """Run the demo; 0 if all came out as it should."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", default="kvcodec", choices=("kvcodec", "sidecar", "file"))
    parser.add_argument("--presets", default="raw,kv8", help="separated by commas")
    parser.add_argument("--build", type=Path, default=ROOT / "build", help="folder for all output")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, _stop_in_good_order)
    demo = Demo(
        backend=options.backend,
        presets=options.presets.split(","),
        build=options.build.resolve(),
        console=_console(),
    )
    problem = None
    try:
        demo.run()
        demo.show_table()
        demo.show_page()
    except (DemoFailed, ServerFailed, SidecarFailed) as error:
        problem = str(error)
    report = {"ok": problem is None, "runs": [asdict(run) for run in demo.runs]}
    demo.build.mkdir(parents=True, exist_ok=True)
    (demo.build / "demo.json").write_text(json.dumps(report, indent=2) + "\n")
    if problem is not None:
        summary, *details = problem.splitlines()
        demo.console.print(Text("\n".join([*details, f"demo: FAILED {summary}"])), soft_wrap=True)
        return 1
    parts = [f"{run.preset} {run.raw_bytes / run.stored_bytes:.2f}x" for run in demo.runs]
    hit_tokens = sum(run.l3_hit_tokens for run in demo.runs)
    demo.console.print(
        Text(f"demo: ok  {hit_tokens} tokens from storage, same output, {', '.join(parts)}"),
        soft_wrap=True,
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
