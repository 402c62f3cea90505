"""Plays the engine before a real LMCache server; run by the Python that has LMCache.

    lmcache_engine.py tcp://127.0.0.1:PORT

Reads a command per line, a JSON object, and answers each with a line. ``{"do": "store", "model":
"m", "seed": 1, "chunks": 4}`` hands chunks of KV made from the seed to the server; ``retrieve``
with the same says how many chunks the server has, and for each the relative error against what was
stored and the largest error of an element, in steps of int4.
"""

from __future__ import annotations

import json
import os
import sys
import uuid
from types import SimpleNamespace

import torch
from lmcache.v1.distributed.api import MemoryLayoutDesc
from lmcache.v1.multiprocess.custom_types import (
    IPCCacheServerKey,
    RegisterEngineDrivenContextPayload,
)
from lmcache.v1.multiprocess.transfer_context.base import EngineDrivenContextMetadata
from lmcache.v1.multiprocess.transfer_context.pickle import EngineDrivenContextPickle
from lmcache.v1.multiprocess.transport.factory import RequestClientFactory

SECONDS = 30.0
LAYERS, HEADS, HEAD_SIZE = 4, 2, 64


class Engine:
    """One worker of one model, whose chunks are [2, layers, tokens, heads * head size]."""

    def __init__(self, client: object, model: str) -> None:
        self.client = client
        self.model = model
        self.tokens = client.get_chunk_size().result(timeout=SECONDS)
        self.instance = uuid.uuid4().int & ((1 << 63) - 1)
        self.shape = torch.Size([2, LAYERS, self.tokens, HEADS * HEAD_SIZE])
        client.register_kv_cache_engine_driven_context(
            RegisterEngineDrivenContextPayload(
                instance_id=self.instance,
                model_name=model,
                world_size=1,
                block_size=self.tokens,
                num_layers=LAYERS,
                hidden_dim_size=HEADS * HEAD_SIZE,
                dtype_str="bfloat16",
                use_mla=False,
                num_physical_slots=self.tokens,
            )
        ).result(timeout=SECONDS)
        layout = MemoryLayoutDesc(shapes=[self.shape], dtypes=[torch.bfloat16])
        metadata = EngineDrivenContextMetadata(
            layout_desc=layout, block_size=self.tokens, use_mla=False
        )
        self.context = EngineDrivenContextPickle(metadata, client, SECONDS)

    def make(self, seed: int, chunks: int) -> tuple[tuple[int, ...], list[torch.Tensor]]:
        """Tokens, and KV with channels of unlike size."""
        random = torch.Generator().manual_seed(seed)
        tokens = torch.randint(0, 150_000, (self.tokens * chunks,), generator=random)
        scale = torch.exp(0.6 * torch.randn(1, 1, 1, HEADS * HEAD_SIZE, generator=random))
        pages = [
            (torch.randn(self.shape, generator=random) * scale).to(torch.bfloat16)
            for _ in range(chunks)
        ]
        return tuple(tokens.tolist()), pages

    def key(self, tokens: tuple[int, ...], request: str, worker: int | None = 0) -> object:
        return IPCCacheServerKey(
            model_name=self.model,
            world_size=1,
            worker_id=worker,
            token_ids=tokens,
            start=0,
            end=len(tokens),
            request_id=request,
            num_kv_readers=1,
        )

    def store(self, seed: int, chunks: int) -> dict:
        tokens, pages = self.make(seed, chunks)
        request = uuid.uuid4().hex
        self.context.prepare_store(self.key(tokens, request), self.instance)
        stored = self.context.commit_store(self.key(tokens, request), self.instance, pages)
        self.client.end_session(request).result(timeout=SECONDS)
        return {"stored": bool(stored), "raw_bytes": sum(page.nbytes for page in pages)}

    def retrieve(self, seed: int, chunks: int) -> dict:
        tokens, pages = self.make(seed, chunks)
        request = uuid.uuid4().hex
        self.client.lookup(self.key(tokens, request, None), 1).result(timeout=SECONDS)
        hits = self.client.wait_prefetch_status(request, SECONDS).result(timeout=2 * SECONDS)
        found: list[torch.Tensor] = []
        if hits:
            covered = tokens[: hits * self.tokens]
            found = self.context.prepare_retrieve(self.key(covered, request), self.instance) or []
            # Fewer chunks than hits is for the caller to see.
            errors = [relative_error(got, page) for got, page in zip(found, pages, strict=False)]
            worst = [worst_step(got, page) for got, page in zip(found, pages, strict=False)]
            self.context.commit_retrieve(self.key(covered, request), self.instance)
        else:
            errors, worst = [], []
        self.client.end_session(request).result(timeout=SECONDS)
        return {"hits": hits, "errors": errors, "worst_steps": worst}


def relative_error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    difference = (got.float() - wanted.float()).square().sum()
    return float((difference / wanted.float().square().sum()).sqrt())


def worst_step(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest error of an element, in int4 steps of its group of 64; 0 if they are the same."""
    grouped, reference = (tensor.float().reshape(-1, HEAD_SIZE) for tensor in (got, wanted))
    steps = reference.abs().amax(1, keepdim=True) / 7
    return float(((grouped - reference).abs() / steps).max())


def main() -> None:
    client = RequestClientFactory.create(sys.argv[1])
    engines: dict[str, Engine] = {}
    for line in sys.stdin:
        command = SimpleNamespace(**json.loads(line))
        engine = engines.get(command.model) or Engine(client, command.model)
        engines[command.model] = engine
        do = engine.store if command.do == "store" else engine.retrieve
        sys.stdout.write(json.dumps(do(command.seed, command.chunks)) + "\n")
        sys.stdout.flush()
    # Its client's threads would keep the process.
    os._exit(0)


if __name__ == "__main__":
    main()
