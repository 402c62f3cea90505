"""The two small models: what they are made of, and how they start.

Both keep their pages as the models of their families do: head size 128, grouped queries, RoPE. The
first normalizes queries and keys (Qwen3); the second adds biases instead, and those of its keys
start large in a few fast RoPE pairs, as they are in published Qwen2.5 models.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

__all__ = ["CONTEXT", "MODELS", "build", "quick_norms"]

CONTEXT = 512
MODELS = ("qwen3_small", "qwen2_bias_small")
_HEAD = 128
_BIASED_PAIRS = (1, 3, 6, 10)  # of 64, the fastest first
_BIAS_SIGMAS = (10.0, 16.0, 22.0, 30.0)


def build(name: str, vocabulary: int, seed: int) -> nn.Module:
    """A model that knows nothing yet, of about 4.7 million parameters, in float32."""
    torch.manual_seed(seed)
    common: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": 256,
        "intermediate_size": 448,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": _HEAD,
        "max_position_embeddings": CONTEXT,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "attn_implementation": "eager",  # a CPU is slower at flash attention of head size 128
    }
    model: nn.Module
    if name == "qwen3_small":
        model = Qwen3ForCausalLM(Qwen3Config(**common))
    elif name == "qwen2_bias_small":
        model = Qwen2ForCausalLM(Qwen2Config(**common))
    else:
        raise SystemExit(f"no model {name!r}: {', '.join(MODELS)}")
    for path, weight in model.named_parameters():
        if weight.dim() == 2:
            residual = path.endswith(("o_proj.weight", "down_proj.weight"))
            nn.init.normal_(weight, 0.0, 0.02 / (math.sqrt(10) if residual else 1.0))
    if name == "qwen2_bias_small":
        _bias_keys(model)
    return model


@torch.no_grad()
def _bias_keys(model: Any) -> None:
    """Key biases of 10 to 30 times the spread of a key channel, in any direction of their pair."""
    sigma = 0.02 * math.sqrt(model.config.hidden_size)
    for layer in model.model.layers:
        bias = layer.self_attn.k_proj.bias.view(-1, 2, _HEAD // 2)
        for pair, sigmas in zip(_BIASED_PAIRS, _BIAS_SIGMAS, strict=True):
            angle = 2 * math.pi * torch.rand(len(bias))
            bias[:, 0, pair] = sigmas * sigma * angle.cos()
            bias[:, 1, pair] = sigmas * sigma * angle.sin()


def quick_norms() -> None:
    """Let the norms use torch's own kernel, which is several times as fast on a CPU."""
    from transformers.models.qwen2 import modeling_qwen2
    from transformers.models.qwen3 import modeling_qwen3

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.rms_norm(
            x.float(), self.weight.shape, self.weight, self.variance_epsilon
        )

    modeling_qwen2.Qwen2RMSNorm.forward = forward
    modeling_qwen3.Qwen3RMSNorm.forward = forward
