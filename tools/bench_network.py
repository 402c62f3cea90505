"""Tokens per second from a store at the end of a network of a known rate, encoded and not.

    make bench-network                   needs root, redis-server and iproute2

A real Redis behind two token buckets; SGLang's real HiCacheController before it. Presets take turns
in one run, every round with an empty server; the reference is the same store with raw pages. Timed
is what SGLang's storage threads do, from the queue to the acknowledgement.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import redis
from controller_timing import GEOMETRIES, fill_host_pool, time_backup, time_prefetch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from sglang_controller import ControllerSession
from sglang_harness import make_tokens
from shaped_network import NetworkUnavailable, ShapedNetwork

_PORT = 6400
_START_SECONDS = 10.0
_CALL_SECONDS = 120.0


@contextmanager
def redis_server(network: ShapedNetwork) -> Iterator[redis.Redis]:
    """A Redis on the far side that keeps everything in memory and nothing on disk."""
    command = [
        *network.enter,
        *("redis-server", "--bind", network.server, "--port", str(_PORT)),
        *("--protected-mode", "no", "--save", "", "--appendonly", "no"),
    ]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        client = redis.Redis(host=network.server, port=_PORT)
        try:
            _wait(client)
            yield client
        finally:
            client.close()
            process.terminate()


def _wait(client: redis.Redis) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while True:
        try:
            client.ping()
            return
        except redis.ConnectionError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def measure(network: ShapedNetwork, preset: str, options: argparse.Namespace) -> dict[str, float]:
    """One backup and one prefetch of the same tokens; seconds, and tokens that came back."""
    extra = {
        "url": f"redis://{network.server}:{_PORT}/0",
        "preset": preset,
        "exists_timeout_seconds": _CALL_SECONDS,
        "prefetch_timeout_seconds": _CALL_SECONDS,
        "backup_timeout_seconds": _CALL_SECONDS,
    }
    tokens = make_tokens(options.tokens, seed=1)
    gc.collect()  # the pools of the session before are in cycles, and large
    with ControllerSession(
        layout=options.layout,
        page_size=64,
        backend="kvcodec",
        extra=extra,
        capacity_tokens=options.tokens,
        **GEOMETRIES[options.geometry],
    ) as session:
        fill_host_pool(session)
        backup = time_backup(session, tokens)
        prefetch = time_prefetch(session, tokens)
        stored = session.storage.counters()["backup.encoded_bytes"]
    if (backup.tokens, prefetch.tokens) != (options.tokens, options.tokens):
        raise SystemExit(f"{preset}: {backup.tokens} stored, {prefetch.tokens} came back")
    return {"backup": backup.seconds, "prefetch": prefetch.seconds, "stored_bytes": stored}


def run(rate: str, options: argparse.Namespace, progress: Progress) -> list[dict[str, object]]:
    """All rounds at one rate, the order turned each time; one row per preset."""
    presets: list[str] = options.presets.split(",")
    rounds: dict[str, list[dict[str, float]]] = {preset: [] for preset in presets}
    task = progress.add_task(rate, total=(options.rounds + 1) * len(presets))
    with ShapedNetwork(rate) as network:
        link = network.measured_rate()
        with redis_server(network) as server:
            for number in range(options.rounds + 1):
                for offset in range(len(presets)):
                    preset = presets[(number + offset) % len(presets)]
                    server.flushall()
                    timing = measure(network, preset, options)
                    if number:  # the first round only warms caches and allocators
                        rounds[preset].append(timing)
                    progress.advance(task)
    return [
        _row(rate, link, preset, rounds[preset], rounds[presets[0]], options.tokens)
        for preset in presets
    ]


def _row(
    rate: str,
    link: float,
    preset: str,
    mine: list[dict[str, float]],
    reference: list[dict[str, float]],
    tokens: int,
) -> dict[str, object]:
    row: dict[str, object] = {
        "rate": rate,
        "link_bytes_per_s": link,
        "preset": preset,
        "stored_bytes": mine[0]["stored_bytes"],
    }
    for name in ("backup", "prefetch"):
        ratios = [r[name] / m[name] for m, r in zip(mine, reference, strict=True)]
        row[f"{name}_tokens_per_s"] = tokens / statistics.median(m[name] for m in mine)
        row[f"{name}_ratio"] = statistics.median(ratios)
        row[f"{name}_ratio_min"], row[f"{name}_ratio_max"] = min(ratios), max(ratios)
    return row


def draw(rows: list[dict[str, object]], picture: Path) -> None:
    """Tokens per second of every preset, one panel per rate."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rates = list(dict.fromkeys(str(row["rate"]) for row in rows))
    figure, panels = pyplot.subplots(1, len(rates), figsize=(4.5 * len(rates), 3.6), squeeze=False)
    for panel, rate in zip(panels[0], rates, strict=True):
        mine = [row for row in rows if row["rate"] == rate]
        for number, name in enumerate(("prefetch", "backup")):
            heights = [float(str(row[f"{name}_tokens_per_s"])) for row in mine]
            places = [index + number * 0.4 for index in range(len(mine))]
            bars = panel.bar(places, heights, 0.38, label=name)
            labels = [f"{float(str(row[f'{name}_ratio'])):.2f}x" for row in mine]
            panel.bar_label(bars, labels, fontsize=8)
        panel.set_title(f"Redis at {rate}/s, both ways")
        panel.set_xticks([index + 0.2 for index in range(len(mine))])
        panel.set_xticklabels([str(row["preset"]) for row in mine])
        panel.margins(y=0.12)
        panel.grid(True, axis="y", alpha=0.25)
    panels[0][0].set_ylabel("tokens per second")
    panels[0][0].legend()
    figure.tight_layout()
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture)


def main() -> None:
    """Measure, print a table, write JSON and a picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rates", default="1gbit,8gbit", help="as tc reads them")
    parser.add_argument("--presets", default="raw,kv8,kv4,kv2", help="the first is the reference")
    parser.add_argument("--geometry", choices=sorted(GEOMETRIES), default="qwen2.5-7b")
    parser.add_argument("--layout", default="page_first")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    rows: list[dict[str, object]] = []
    try:
        with Progress(console=Console(stderr=True)) as progress:
            for rate in options.rates.split(","):
                rows += run(rate, options, progress)
    except NetworkUnavailable as error:
        raise SystemExit(f"the network cannot be shaped: {error}") from error
    table = Table("rate", "link", "preset", "stored", "backup tok/s", "x", "prefetch tok/s", "x")
    for row in rows:
        cells = [str(row["rate"]), f"{float(str(row['link_bytes_per_s'])) / 1e6:.0f} MB/s"]
        cells += [str(row["preset"]), f"{float(str(row['stored_bytes'])) / 1e6:.0f} MB"]
        for name in ("backup", "prefetch"):
            ratio, low, high = (row[f"{name}_ratio{part}"] for part in ("", "_min", "_max"))
            cells += [f"{row[f'{name}_tokens_per_s']:,.0f}", f"{ratio:.2f} ({low:.2f}-{high:.2f})"]
        table.add_row(*cells)
    Console().print(table)
    settings = {name: getattr(options, name) for name in ("geometry", "layout", "tokens", "rounds")}
    if options.json:
        options.json.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n")
    if options.plot:
        draw(rows, options.plot)


if __name__ == "__main__":
    main()
