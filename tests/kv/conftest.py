"""Tiny random models whose attention is far from even, and the slow way to compute what a policy should say."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

WORDS = 97
SHAPES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {"head_dim": 24},
    "Mistral": {"sliding_window": None},
    "Gemma2": {"head_dim": 16, "sliding_window": 24, "query_pre_attn_scalar": 16},
    "Gemma3Text": {"head_dim": 16, "sliding_window": 24, "num_hidden_layers": 7, "query_pre_attn_scalar": 16},
    "GPTNeoX": {},
    "Cohere": {"logit_scale": 1.0},  # rotates neighbouring elements
}


@functools.cache
def make(name: str) -> Any:
    """A model of an architecture, float32, in eval mode."""
    torch.manual_seed(0)
    settings = {
        "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": WORDS, "max_position_embeddings": 512, "bos_token_id": 1,
        "eos_token_id": None, "pad_token_id": 0,
    }  # fmt: skip
    settings |= SHAPES[name]
    if name == "GPTNeoX":
        del settings["num_key_value_heads"]
    config = getattr(transformers, f"{name}Config")(**settings)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model


@pytest.fixture(params=SHAPES)
def any_model(request: pytest.FixtureRequest) -> Any:
    """Each architecture in turn."""
    return make(request.param)


@pytest.fixture
def llama() -> Any:
    return make("Llama")


@pytest.fixture
def architecture() -> Callable[[str], Any]:
    return make


def text(length: int, seed: int = 0, rows: int = 1) -> Tensor:
    """Tokens [rows, length]."""
    return torch.randint(3, WORDS, (rows, length), generator=torch.Generator().manual_seed(seed))
