"""Makes the demo's model: a tiny Llama checkpoint whose output is decided by its KV cache.

Random weights alone will not do: the logits of a random model nearly tie, so that the last bit of
any addition flips its words, with or without a codec. Here all weights are random but those of
one attention head of the first layer, which looks exactly LOOK_BACK tokens back and repeats what it
finds there. So the model quotes its prompt, each word is read from a cached row, and the right
token leads by several nats: rows that come back wrong give wrong words, rounding does not.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

# A multiple of three: most Chinese characters are three bytes, and a byte is a token.
LOOK_BACK = 702
VOCABULARY_SIZE = 320
HIDDEN_SIZE = 256
HEAD_SIZE = 128
LAYER_COUNT = 4
KV_HEAD_COUNT = 2
QUERY_HEAD_COUNT = 4
BYTES_PER_TOKEN = 2 * LAYER_COUNT * KV_HEAD_COUNT * HEAD_SIZE * 2  # K and V, in bfloat16

# Dimensions of the residual stream: a constant, the code of the token, the code of its successor.
_CONSTANT = 0
_CODE_SIZE = (HIDDEN_SIZE - 1) // 2
_CODE = slice(1, 1 + _CODE_SIZE)
_OUTPUT = slice(HIDDEN_SIZE - _CODE_SIZE, HIDDEN_SIZE)

_ROPE_BASE = 10_000.0
# The fast rotations tell neighbours apart; slow ones would only widen the peak.
_ROTATION_COUNT = 24
# Softmax logits per rotation: the next best position gets some e^-11 of the attention.
_SHARPNESS = 6.0
_CODE_LENGTH = 8.0
_NOISE = 0.02


def make_checkpoint(directory: Path) -> Path:
    """Write the checkpoint into the directory, unless this very version lies there already."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    stamp = directory / "made_by"
    version = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    if stamp.is_file() and stamp.read_text() == version:
        return directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = directory.with_name(f"{directory.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    _save_model(partial)
    _save_tokenizer(partial)
    (partial / "made_by").write_text(version)
    shutil.rmtree(directory, ignore_errors=True)
    partial.rename(directory)
    return directory


def _save_model(directory: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=2 * HIDDEN_SIZE,
        num_hidden_layers=LAYER_COUNT,
        num_attention_heads=QUERY_HEAD_COUNT,
        num_key_value_heads=KV_HEAD_COUNT,
        head_dim=HEAD_SIZE,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": _ROPE_BASE},
        initializer_range=_NOISE,
        tie_word_embeddings=False,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=258,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        _build_in_the_looking_head(model)
    model.eval().to(torch.bfloat16).save_pretrained(directory)


def _build_in_the_looking_head(model: LlamaForCausalLM) -> None:
    import torch

    codes = torch.nn.functional.normalize(torch.randn(VOCABULARY_SIZE, _CODE_SIZE), dim=1)
    embeddings = model.model.embed_tokens.weight
    embeddings.zero_()
    embeddings[:, _CONSTANT] = _CODE_LENGTH
    embeddings[:, _CODE] = _CODE_LENGTH * codes
    attention = model.model.layers[0].self_attn
    # All rows have this length: normalised, the constant is 1/sqrt(2) of sqrt(hidden_size).
    constant = math.sqrt(HIDDEN_SIZE / 2)

    # Keys are the same vector everywhere and queries that vector, turned back by the distance;
    # the rotary embedding makes their product peak where the two positions differ by it.
    pairs = torch.arange(_ROTATION_COUNT)
    angles = -(LOOK_BACK - 1) * _ROPE_BASE ** (-2 * pairs / HEAD_SIZE)
    length = math.sqrt(_SHARPNESS * math.sqrt(HEAD_SIZE))
    for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
        projection.weight[:HEAD_SIZE] = 0
    attention.k_proj.weight[pairs, _CONSTANT] = length / constant
    attention.q_proj.weight[pairs, _CONSTANT] = length / constant * torch.cos(angles)
    attention.q_proj.weight[pairs + HEAD_SIZE // 2, _CONSTANT] = (
        length / constant * torch.sin(angles)
    )
    # Its values are token codes, and what it finds is written where the output layer reads.
    rows = torch.arange(_CODE_SIZE)
    attention.v_proj.weight[rows, _CODE.start + rows] = 1.0
    attention.o_proj.weight[:, :HEAD_SIZE] = 0
    attention.o_proj.weight[_OUTPUT.start + rows, rows] = 1.0
    model.lm_head.weight[:, _OUTPUT] += codes


def _save_tokenizer(directory: Path) -> None:
    """One token per byte of UTF-8, and three special ones."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary |= {"<s>": 256, "</s>": 257, "<pad>": 258}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(directory)
