"""A language model of transformers whose attention reads the keys and values that we give it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from kvcodec.errors import ConfigError

__all__ = ["Cache", "CachedModel", "Replay", "attend", "load_model", "tokens_of"]

_ATTENTION = "kvcodec_eval"
#: Arguments of attention that change its result and that this one would leave out.
_UNKNOWN = ("softcap", "s_aux", "position_bias")


@dataclass(slots=True)
class Cache:
    """Queries, and keys and values as stored: per layer (heads, tokens, head_size)."""

    queries: list[Tensor] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)
    windows: list[int | None] = field(default_factory=list)


@dataclass(slots=True)
class _Pass:
    """One run of the model: what is recorded, and what is read instead of what is computed."""

    dtype: torch.dtype | None
    record: Cache
    start: int = 0  # position of the first token that runs
    end: int = 0  # keys and values of positions before this one are given
    keys: Sequence[Tensor] = ()
    values: Sequence[Tensor] = ()
    first_layer: int = 0  # the first that runs


_RUNNING: ContextVar[_Pass] = ContextVar("_RUNNING")


def attend(
    query: Tensor, keys: Tensor, scale: float, first: int | Tensor, window: int | None
) -> tuple[Tensor, Tensor]:
    """Masked scores (heads, queries, tokens) in float32, and the mask; `first` is the position of
    the first query, or the positions of all.
    """
    groups = query.shape[0] // keys.shape[0]
    scores = query.float() @ keys.float().repeat_interleave(groups, 0).transpose(1, 2) * scale
    mask = _mask(first, query.shape[1], keys.shape[1], window, keys.device)
    return scores.masked_fill(~mask, -torch.inf), mask


def _mask(
    first: int | Tensor, queries: int, tokens: int, window: int | None, device: torch.device
) -> Tensor:
    rows = first + torch.arange(queries, device=device) if isinstance(first, int) else first
    ages = rows[:, None] - torch.arange(tokens, device=device)
    return ages >= 0 if window is None else (ages >= 0) & (ages < window)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: object,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **more: object,
) -> tuple[Tensor, None]:
    """What transformers calls in place of its own attention."""
    del module, attention_mask  # a mask made from positions that it cannot know
    for name in _UNKNOWN:
        if more.get(name) is not None:
            raise ConfigError(f"attention with {name!r} cannot be measured")
    run = _RUNNING.get()
    layer = run.first_layer + len(run.record.keys)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if run.dtype is not None:
        key, value = key.to(run.dtype), value.to(run.dtype)
    if run.end:
        fresh = run.end - run.start
        key = torch.cat((run.keys[layer][None, :, : run.end].to(key), key[:, :, fresh:]), 2)
        value = torch.cat((run.values[layer][None, :, : run.end].to(value), value[:, :, fresh:]), 2)
    run.record.queries.append(query[0])
    run.record.keys.append(key[0])
    run.record.values.append(value[0])
    run.record.scales.append(scale)
    run.record.windows.append(sliding_window)
    mask = _mask(run.start, query.shape[2], key.shape[2], sliding_window, key.device)
    output = torch.nn.functional.scaled_dot_product_attention(
        query, key.to(query), value.to(query), attn_mask=mask, scale=scale, enable_gqa=True
    )
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register(_ATTENTION, _attention)


class Replay:
    """What the layers of a model gave in one run, to be given again by the first of them in others.

    Where a run differs from another one in the cache of some layer only, everything before that
    layer is the same.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        count = model.config.num_hidden_layers
        lists = (each for each in model.modules() if isinstance(each, nn.ModuleList))
        self._layers = next((each for each in lists if len(each) == count), nn.ModuleList())
        self._outputs: list[object] = []

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Keep what the layers give. Where they are not found, or one is not one attention, nothing
        is kept, and every run is a whole one.
        """
        attentions: list[int] = []

        def keep(_module: nn.Module, _inputs: object, output: object) -> None:
            self._outputs.append(output)
            attentions.append(len(_RUNNING.get().record.keys))

        hooks = [layer.register_forward_hook(keep) for layer in self._layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        if attentions != list(range(1, len(self._layers) + 1)):
            self._outputs = []

    @contextmanager
    def playing(self, layer: int) -> Iterator[int]:
        """Within, the layers before `layer` give what was kept; how many of them do."""
        outputs = self._outputs[:layer]
        played = list(zip(self._layers, outputs, strict=False))
        for module, output in played:
            module.forward = _constant(output)
        try:
            yield len(played)
        finally:
            for module, _ in played:
                del module.forward


def _constant(output: object) -> Callable[..., object]:
    def forward(*_arguments: object, **_more: object) -> object:
        return output

    return forward


class CachedModel:
    """A causal language model, one sequence at a time.

    `cache_dtype` is the element type in which keys and values are kept; None keeps them as they
    were computed, which no engine does.
    """

    def __init__(
        self, model: PreTrainedModel, cache_dtype: torch.dtype | None = torch.bfloat16
    ) -> None:
        if getattr(model.config, "kv_lora_rank", None):
            raise ConfigError(
                "the cache of this model is compressed (MLA): engines store its latent, which "
                "transformers does not, so it cannot be measured"
            )
        model.set_attn_implementation(_ATTENTION)
        self.model = model.eval()
        self.cache_dtype = cache_dtype

    @property
    def limit(self) -> int:
        """The longest context the model was made for, as far as it says."""
        return int(getattr(self.model.config, "max_position_embeddings", 1 << 30))

    def record(self, ids: Tensor) -> Cache:
        """The cache of the tokens `ids` (tokens,) when nothing is coded."""
        run = _Pass(self.cache_dtype, Cache())
        self._run(ids, run, 1)
        if len(run.record.keys) != self.model.config.num_hidden_layers:
            raise ConfigError(
                f"{len(run.record.keys)} of {self.model.config.num_hidden_layers} layers keep keys "
                "and values by transformers' common attention; only models with all can be measured"
            )
        return run.record

    def logits(
        self,
        ids: Tensor,
        count: int,
        start: int = 0,
        end: int = 0,
        keys: Sequence[Tensor] = (),
        values: Sequence[Tensor] = (),
        first_layer: int = 0,
    ) -> Tensor:
        """Log-probabilities (count, vocabulary) for the last `count` tokens of `ids`, float32.

        Tokens from `start` on run; attention reads the given `keys` and `values` (per layer: heads,
        tokens, head_size) for the positions before `end`, and what is computed after it. Layers
        before `first_layer` do not run (see `Replay`).
        """
        run = _Pass(self.cache_dtype, Cache(), start, end, keys, values, first_layer)
        logits = self._run(ids, run, count + 1)
        return torch.log_softmax(logits[:-1].float(), -1)

    def _run(self, ids: Tensor, run: _Pass, count: int) -> Tensor:
        with _running(run), torch.inference_mode():
            positions = torch.arange(run.start, len(ids), device=ids.device)
            found = self.model(
                input_ids=ids[None, run.start :],
                position_ids=positions[None],
                use_cache=False,
                logits_to_keep=count,
            )
        logits: Tensor = found.logits[0]
        return logits


@contextmanager
def _running(run: _Pass) -> Iterator[None]:
    token = _RUNNING.set(run)
    try:
        yield
    finally:
        _RUNNING.reset(token)


def load_model(
    path: str, compute: str, device: str
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and the tokenizer in a folder or of a name, weights from safetensors only."""
    dtype = getattr(torch, compute)
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, use_safetensors=True)
        tokenizer = AutoTokenizer.from_pretrained(path)
        return model.to(torch.device(device)), tokenizer
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(f"the model {path!r} cannot be loaded: {_short(error)}") from error


def _short(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:300]


def tokens_of(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], int | None]:
    """The tokens of a text, and the one to begin every window with if the model has one."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    return list(ids), tokenizer.bos_token_id
