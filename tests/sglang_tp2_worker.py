"""Tensor parallelism of two: one HiCacheSession per process, joined by gloo on loopback.

``run_tp2`` starts both ranks and returns what each reports. A test calls it once per phase, or
once for both, and may change what lies in storage in between.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

TIMEOUT_SECONDS = 180.0


def run_tp2(
    options: Mapping[str, object],
    *,
    phases: Sequence[str] = ("backup", "prefetch"),
    token_count: int = 128,
    seed: int = 1,
    tp_size: int = 2,
) -> list[dict[str, Any]]:
    """Run the phases with HiCacheSession(**options) on each rank, in processes of their own.

    Returns one report per rank: rank, storage_hit_tokens, exact, max_errors, error (None, or the
    text of an exception). Rows differ between the ranks, as heads do, except for kind "mla".
    """
    with tempfile.TemporaryDirectory(prefix="tp2-") as scratch:
        job = {
            "options": dict(options),
            "phases": list(phases),
            "token_count": token_count,
            "seed": seed,
            "tp_size": tp_size,
            "scratch": scratch,
        }
        ranks = [
            subprocess.Popen(
                [sys.executable, "-W", "ignore", __file__, str(rank), json.dumps(job)],
                env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(tp_size)
        ]
        try:
            messages = [rank.communicate(timeout=TIMEOUT_SECONDS)[1] for rank in ranks]
        finally:
            for rank in ranks:
                if rank.poll() is None:
                    rank.kill()
                    rank.wait()
        reports = []
        for number, message in enumerate(messages):
            report = Path(scratch) / f"report-{number}.json"
            if not report.exists():
                raise RuntimeError(f"rank {number} ended without a report:\n{message[-4000:]}")
            reports.append(json.loads(report.read_text()))
        return reports


def _run_rank(rank: int, job: dict[str, Any]) -> dict[str, Any]:
    from sglang_harness import HiCacheSession, make_tokens
    from sglang_pools import start_sglang

    start_sglang()
    import torch.distributed as distributed

    report: dict[str, Any] = {
        "rank": rank,
        "storage_hit_tokens": None,
        "exact": None,
        "max_errors": None,
        "error": None,
    }
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{job['scratch']}/rendezvous",
        rank=rank,
        world_size=job["tp_size"],
    )
    options = job["options"]
    is_replicated = options.get("kind") == "mla"
    row_seed = job["seed"] if is_replicated else 1000 * job["seed"] + rank
    with HiCacheSession(
        tp_rank=rank, tp_size=job["tp_size"], tp_group=distributed.group.WORLD, **options
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


def main() -> None:
    """Entry point of one rank: RANK JOB_JSON."""
    rank, job = int(sys.argv[1]), json.loads(sys.argv[2])
    try:
        report = _run_rank(rank, job)
    except Exception as error:
        report = {"rank": rank, "error": f"{type(error).__name__}: {error}"}
        (Path(job["scratch"]) / f"report-{rank}.json").write_text(json.dumps(report))
        raise
    (Path(job["scratch"]) / f"report-{rank}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main()
