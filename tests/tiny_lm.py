"""A language model that nobody trained, of a size for tests, in a folder as transformers has it."""

from __future__ import annotations

from pathlib import Path

import tokenizers
import torch
import transformers


def write_tiny_lm(folder: Path, layers: int = 2) -> None:
    """Qwen3 with one key/value head of 64, 256 tokens, and a tokenizer of bytes."""
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=257,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=256,
        initializer_range=0.2,
    )
    transformers.Qwen3ForCausalLM(config).bfloat16().save_pretrained(folder)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    words = {"<bos>": 0} | {letter: 1 + index for index, letter in enumerate(alphabet)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=words, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>")
    fast.save_pretrained(folder)
