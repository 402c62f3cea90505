"""Tensor parallelism of two: one HiCacheSession per process, joined by gloo on loopback.

    with TwoRanks() as two_ranks:
        written = two_ranks.run({"extra": ...}, phases=["backup"])
        read = two_ranks.run({"extra": ...}, phases=["prefetch"])

Each run has two new processes, which know nothing of earlier ones. They are forked from one that
has imported SGLang and done nothing else: importing takes ten times as long as all that follows.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

RANKS = 2
# From its fork on; it is killed then.
RANK_SECONDS = 240
# What a session imports besides SGLang's plugins, and starts no thread.
IMPORTS = (
    "sglang.srt.arg_groups.pipeline",
    "sglang.srt.managers.cache_controller",
    "sglang.srt.mem_cache.unified_radix_cache",
    "sglang.srt.server_args",
    "sglang_harness",
    "torch.distributed",
)


class TwoRanks:
    """Runs both ranks as often as asked, between enter and exit."""

    def __enter__(self) -> TwoRanks:
        self._log = tempfile.TemporaryFile()
        self._origin = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__],
            env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        # The end of its orders is the end of it, after ranks that still run.
        self._origin.communicate()
        self._log.close()

    def run(
        self,
        options: Mapping[str, object],
        *,
        phases: Sequence[str] = ("backup", "prefetch"),
        token_count: int = 128,
        seed: int = 1,
    ) -> list[dict[str, Any]]:
        """Run the phases with HiCacheSession(**options) on each rank.

        Returns one report per rank: rank, storage_hit_tokens, exact, max_errors, error (None, or
        the text of an exception). Rows differ between the ranks, as heads do, except for kind
        "mla". A test may call it once per phase, and change what lies in storage in between.
        """
        with tempfile.TemporaryDirectory(prefix="two-ranks-") as scratch:
            job = {
                "options": dict(options),
                "phases": list(phases),
                "token_count": token_count,
                "seed": seed,
                "scratch": scratch,
            }
            assert self._origin.stdin is not None and self._origin.stdout is not None
            self._origin.stdin.write(json.dumps(job) + "\n")
            self._origin.stdin.flush()
            self._origin.stdout.readline()
            paths = [_report_path(job, rank) for rank in range(RANKS)]
            for rank, path in enumerate(paths):
                if not path.exists():
                    raise RuntimeError(f"rank {rank} ended without a report:\n{self._said()}")
            return [json.loads(path.read_text()) for path in paths]

    def _said(self) -> str:
        size = os.fstat(self._log.fileno()).st_size
        return os.pread(self._log.fileno(), 4000, max(0, size - 4000)).decode(errors="replace")


def _report_path(job: Mapping[str, Any], rank: int) -> Path:
    return Path(job["scratch"]) / f"report-{rank}.json"


def _run_rank(rank: int, job: dict[str, Any]) -> dict[str, Any]:
    import torch.distributed as distributed
    from sglang_harness import HiCacheSession, make_tokens

    report: dict[str, Any] = {
        "rank": rank,
        "storage_hit_tokens": None,
        "exact": None,
        "max_errors": None,
        "error": None,
    }
    distributed.init_process_group(
        "gloo", init_method=f"file://{job['scratch']}/rendezvous", rank=rank, world_size=RANKS
    )
    options = job["options"]
    is_replicated = options.get("kind") == "mla"
    row_seed = job["seed"] if is_replicated else 1000 * job["seed"] + rank
    with HiCacheSession(
        tp_rank=rank, tp_size=RANKS, tp_group=distributed.group.WORLD, **options
    ) as session:
        tokens = make_tokens(job["token_count"], job["seed"])
        original = session.expected_rows(len(tokens), row_seed)
        if "backup" in job["phases"]:
            session.backup(tokens, row_seed)
        if "prefetch" in job["phases"]:
            session.evict()
            result = session.prefetch(tokens)
            report["storage_hit_tokens"] = result.storage_hit_tokens
            if result.rows is not None:
                expected = original.first(result.rows.token_count)
                report["exact"] = result.rows.equals(expected)
                report["max_errors"] = result.rows.max_errors(expected)
        # No rank may leave while another still waits for it inside a collective call.
        distributed.barrier()
    distributed.destroy_process_group()
    return report


def _rank(rank: int, job: dict[str, Any]) -> None:
    """The whole life of one rank, in a process of its own."""
    signal.alarm(RANK_SECONDS)
    try:
        report = _run_rank(rank, job)
    except Exception as error:  # noqa: BLE001 - whatever it is, the test hears of it
        traceback.print_exc()
        report = {"rank": rank, "error": f"{type(error).__name__}: {error}"}
    _report_path(job, rank).write_text(json.dumps(report))


def main() -> None:
    """Entry point of the process that ranks are forked from: a job per line, an answer to each."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    from sglang_pools import start_sglang

    start_sglang()
    for name in IMPORTS:
        importlib.import_module(name)
    # Ranks need not look at, and so copy, what they inherit.
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        ranks = []
        for number in range(RANKS):
            rank = os.fork()
            if rank == 0:
                _rank(number, json.loads(line))
                sys.exit(0)
            ranks.append(rank)
        for rank in ranks:
            os.waitpid(rank, 0)
        print("done", file=answers, flush=True)


if __name__ == "__main__":
    main()
