"""Trains the small language models that quality is measured on, from text that Debian ships.

    nice -n 19 .venv/bin/python tools/train_small_lm.py qwen3_small --folder /tmp/lm --minutes 60

The schedule is one of time: a run of 60 minutes ends after 60 minutes of training, however fast the
machine is. It may be stopped at any time and goes on from its last checkpoint when it is started
again. The finished model is written as transformers and safetensors read it, in bf16.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import safe_open
from safetensors.torch import save_file
from train_small_lm_corpus import BOS, HeldOut, prepare
from train_small_lm_models import CONTEXT, MODELS, build, quick_norms
from transformers import PreTrainedTokenizerFast

from kvcodec.eval.memory import keep_memory

RATE = 3e-3
BATCH = 2  # small: what counts in an hour of one thread is the number of steps
WARM_UP_STEPS = 100
CHECKPOINT_SECONDS = 240
#: Packages whose licences let a copy of an excerpt travel with this project.
EXCERPT_OF = ("postgresql-doc-15", "python3.11-doc")
EXCERPT_CHARACTERS = 280_000


def batch_of(tokens: np.ndarray, rng: np.random.Generator, size: int) -> torch.Tensor:
    """Windows (size, CONTEXT) from anywhere in the text, each behind a <bos>."""
    starts = rng.integers(0, len(tokens) - CONTEXT, size)
    windows = [np.concatenate(([0], tokens[i : i + CONTEXT - 1])) for i in starts]
    return torch.from_numpy(np.stack(windows).astype(np.int64))


@torch.no_grad()
def loss_of(model: Any, tokens: np.ndarray, windows: int = 48) -> float:
    """Nats per token on windows evenly spread over `tokens`."""
    model.eval()
    total = 0.0
    for start in np.linspace(0, len(tokens) - CONTEXT, windows).astype(int):
        ids = np.concatenate(([0], tokens[start : start + CONTEXT - 1])).astype(np.int64)
        total += float(model(torch.from_numpy(ids)[None], labels=torch.from_numpy(ids)[None]).loss)
    model.train()
    return total / windows


class Run:
    """A training that can be stopped: weights, optimizer and the time already spent."""

    def __init__(self, name: str, vocabulary: int, folder: Path, seed: int) -> None:
        self.model = build(name, vocabulary, seed)
        self.path = folder / f"{name}.checkpoint.safetensors"
        self.seconds, self.steps, self.tokens = 0.0, 0, 0
        named = dict(self.model.named_parameters())
        self.named = named
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in named.values() if p.dim() > 1], "weight_decay": 0.1},
                {"params": [p for p in named.values() if p.dim() < 2], "weight_decay": 0.0},
            ],
            lr=RATE,
            betas=(0.9, 0.95),
            fused=True,
        )
        if self.path.exists():
            self._load()

    def save(self) -> None:
        """Write the checkpoint whole or not at all."""
        tensors = {f"weight.{name}": p.data for name, p in self.named.items()}
        for name, p in self.named.items():
            state = self.optimizer.state[p]
            tensors[f"mean.{name}"], tensors[f"square.{name}"] = (
                state["exp_avg"],
                state["exp_avg_sq"],
            )
        spent = {name: str(getattr(self, name)) for name in ("seconds", "steps", "tokens")}
        save_file(tensors, self.path.with_suffix(".new"), metadata=spent)
        self.path.with_suffix(".new").replace(self.path)

    def _load(self) -> None:
        with safe_open(self.path, "pt") as file:
            spent = file.metadata()
            self.seconds = float(spent["seconds"])
            self.steps, self.tokens = int(spent["steps"]), int(spent["tokens"])
            for name, p in self.named.items():
                p.data.copy_(file.get_tensor(f"weight.{name}"))
                self.optimizer.state[p] = {
                    "step": torch.tensor(float(self.steps)),
                    "exp_avg": file.get_tensor(f"mean.{name}"),
                    "exp_avg_sq": file.get_tensor(f"square.{name}"),
                }

    def step(self, ids: torch.Tensor, fraction: float) -> float:
        """One update at `fraction` of the schedule; returns the loss before it."""
        rate = RATE * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, fraction))))
        for group in self.optimizer.param_groups:
            group["lr"] = rate * min(1.0, (self.steps + 1) / WARM_UP_STEPS)
        with torch.autocast("cpu", torch.bfloat16):
            loss = self.model(ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        self.tokens += ids.numel()
        return float(loss.detach())

    def train(self, tokens: np.ndarray, held_out: np.ndarray, minutes: float, seed: int) -> None:
        """Train until `minutes` have been spent, in this run and those before it."""
        rng = np.random.default_rng([seed, self.steps])
        total, mean, saved = 60 * minutes, math.nan, self.seconds
        columns = ("{task.description}", BarColumn(), TimeRemainingColumn())
        texts = [TextColumn(c) if isinstance(c, str) else c for c in columns]
        with Progress(*texts, console=Console(stderr=True)) as progress:
            task = progress.add_task("training", total=total, completed=self.seconds)
            while self.seconds < total:
                started = time.monotonic()
                loss = self.step(batch_of(tokens, rng, BATCH), self.seconds / total)
                mean = loss if math.isnan(mean) else 0.98 * mean + 0.02 * loss
                self.seconds += time.monotonic() - started
                pace = self.tokens / self.seconds
                text = f"step {self.steps}  loss {mean:.3f}  {pace:.0f} tokens/s"
                progress.update(task, completed=self.seconds, description=text)
                if self.seconds - saved > CHECKPOINT_SECONDS:
                    saved = self.seconds
                    self.save()
                    line = f"{text}  held out {loss_of(self.model, held_out, 16):.3f}"
                    progress.console.print(line, highlight=False)
        self.save()


def write_model(run: Run, tokenizer: Any, folder: Path, facts: dict[str, object]) -> None:
    """The model in bf16, its tokenizer, and how it was trained."""
    run.model.to(torch.bfloat16)
    run.model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS).save_pretrained(folder)
    (folder / "training.json").write_text(json.dumps(facts, indent=1) + "\n")


def write_excerpt(held_out: HeldOut, path: Path) -> None:
    """Held-out documents of a few packages, in the order of their packages."""
    texts, total = [], 0
    for package in EXCERPT_OF:
        limit = total + EXCERPT_CHARACTERS // len(EXCERPT_OF)
        for name, text in held_out:
            if name == package and total + len(text) <= limit:
                texts.append(text)
                total += len(text)
    path.write_text("\n\n".join(texts) + "\n")


def main() -> None:
    """Prepare, train, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--folder", type=Path, required=True, help="corpus, checkpoints and models")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--megabytes", type=int, default=48, help="text to train on")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_memory()
    quick_norms()
    corpus = options.folder / "corpus"
    tokenizer, tokens, held_out, texts = prepare(corpus, options.megabytes * 1_000_000)
    write_excerpt(texts, corpus / "held_out.txt")
    run = Run(options.model, tokenizer.get_vocab_size(), options.folder, options.seed)
    count = sum(p.numel() for p in run.model.parameters())
    print(f"{count} parameters, {len(tokens)} tokens to train on, {len(held_out)} held out")
    run.train(tokens, held_out, options.minutes, options.seed)
    loss = loss_of(run.model, held_out)
    facts = {
        "parameters": count,
        "steps": run.steps,
        "tokens": run.tokens,
        "minutes": run.seconds / 60,
        "held_out_loss_nats": loss,
        "held_out_perplexity": math.exp(loss),
    }
    print(json.dumps(facts))
    write_model(run, tokenizer, options.folder / options.model, facts)


if __name__ == "__main__":
    main()
