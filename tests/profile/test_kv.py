"""What the configuration says of the cache, against the tensors that a real model leaves in its cache."""

import types
from collections import Counter

import pytest
import torch
import transformers
from transformers.cache_utils import DynamicLayer

from tcw.errors import SourceError
from tcw.profile.kv import generates, kv_cache, read_config

SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LATENT = {
    **SMALL, "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12, "v_head_dim": 10, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
    "topk_group": 1, "moe_intermediate_size": 16, "first_k_dense_replace": 1,
}  # fmt: skip
DECODERS = {
    "llama": SMALL,
    "llama-heads": {**SMALL, "num_key_value_heads": 4},
    "llama-head-dim": {**SMALL, "head_dim": 20},
    "mixtral": {**SMALL, "num_local_experts": 4},
    "mistral": {**SMALL, "sliding_window": 6},
    "gemma2": {**SMALL, "sliding_window": 6, "head_dim": 8, "query_pre_attn_scalar": 8},
    "gemma3_text": {**SMALL, "sliding_window": 6, "head_dim": 8, "sliding_window_pattern": 2},
    "gpt_oss": {**SMALL, "sliding_window": 6, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3": {**SMALL, "head_dim": 12},
    "deepseek_v3": LATENT,
    "gpt2": {"vocab_size": 64, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64},
    "gpt_bigcode": {"vocab_size": 64, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "multi_query": True},
    "bloom": {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "opt": {"vocab_size": 64, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
            "word_embed_proj_dim": 32, "max_position_embeddings": 64},
    "falcon": {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    "falcon-new": {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
                   "num_kv_heads": 2, "new_decoder_architecture": True},
    "mpt": {"vocab_size": 64, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
    "jamba": {**SMALL, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "num_experts": 2,
              "num_experts_per_tok": 1, "mamba_d_state": 4, "use_mamba_kernels": False},
    "mamba": {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
}  # fmt: skip


def _cached_bytes(cache: object) -> int:
    """Bytes of all keys and values in a DynamicCache, element by element of what its layers hold."""
    total = 0
    for layer in getattr(cache, "layers", ()):
        for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None)):
            if isinstance(tensor, torch.Tensor):
                total += tensor.numel() * tensor.element_size()
    return total


def _config(name: str) -> object:
    return read_config({"model_type": name.partition("-")[0], "architectures": ["ThingForCausalLM"], **DECODERS[name]})


@pytest.mark.parametrize("tokens", [1, 5, 11])
@pytest.mark.parametrize("name", DECODERS)
def test_bytes_are_those_of_a_real_cache(name: str, tokens: int) -> None:
    config = _config(name)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    ids = torch.arange(2 * tokens).reshape(2, tokens) % 60
    with torch.no_grad():
        out = model(ids, use_cache=True)
    cache = out.get("past_key_values")
    found = kv_cache(config, element_bytes=4)
    assert found.bytes_at(tokens, batch=2) == _cached_bytes(cache)
    if name not in ("mamba",):
        assert found.bytes_per_token > 0


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_encoder_decoder(name: str) -> None:
    shape = {
        "t5": {"d_kv": 6, "d_ff": 48, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 4},
        "bart": {
            "encoder_layers": 3, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 4,
            "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64,
        },
    }[name] | {"vocab_size": 64, "d_model": 32}  # fmt: skip
    config = read_config({"model_type": name, "architectures": ["ThingForConditionalGeneration"], **shape})
    model = transformers.AutoModelForSeq2SeqLM.from_config(config).eval()
    with torch.no_grad():
        out = model(input_ids=torch.arange(7)[None], decoder_input_ids=torch.arange(3)[None], use_cache=True)
    found = kv_cache(config, element_bytes=4)
    assert found.bytes_at(3) == _cached_bytes(out.past_key_values.self_attention_cache)
    assert 7 * found.cross_elements * 4 == _cached_bytes(out.past_key_values.cross_attention_cache)
    assert any("source" in note for note in found.notes)


@pytest.mark.parametrize("kind", [
    "gemma3n_text", "gemma4_text", "llama4", "qwen3_next", "zamba2", "nemotron_h", "falcon_h1", "recurrent_gemma",
    "exaone4", "deepseek_v32", "bamba",
])  # fmt: skip
def test_layers_are_of_the_kinds_that_transformers_makes(kind: str) -> None:
    """Full, sliding (with its window) and cache-less layers, counted in the cache made from the same configuration."""
    config = transformers.AutoConfig.for_model(kind)
    config.architectures = ["ThingForCausalLM"]
    made: Counter = Counter()
    for layer in transformers.DynamicCache(config=config).layers:
        if isinstance(layer, DynamicLayer):
            made[getattr(layer, "sliding_window", None)] += 1
    read: Counter = Counter()
    for group in kv_cache(config).groups:
        read[group.window] += group.layers
    assert read == made


def test_window_limits_what_is_kept() -> None:
    found = kv_cache(_config("gemma2"))
    full, per_token = found.bytes_per_token_beyond_window, found.bytes_per_token
    assert per_token == 2 * full == 2 * 2 * (2 * 2 * 8) * 2
    assert found.bytes_at(100) == 100 * full + 5 * full


def test_linear_layers_are_named_and_not_counted() -> None:
    found = kv_cache(_config("jamba"))
    assert found.bytes_per_token == 2 * (2 * 2 * 8) * 2
    assert "2 of 4 layers keep a state" in found.notes[0]


def test_text_config_of_a_multimodal_model() -> None:
    raw = {
        "model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"],
        "text_config": {**SMALL, "model_type": "gemma3_text", "head_dim": 8, "sliding_window": 6},
    }  # fmt: skip
    assert kv_cache(read_config(raw)).bytes_per_token == 4 * (2 * 2 * 8) * 2


def test_encoders_cache_nothing() -> None:
    config = read_config({"model_type": "bert", "architectures": ["BertModel"], "num_hidden_layers": 2})
    assert not generates(config)
    assert kv_cache(config).bytes_per_token == kv_cache(config).bytes_at(100, 8) == 0


def test_a_model_type_unknown_to_transformers_is_read_by_attribute_names() -> None:
    config = read_config({"model_type": "brand-new", "architectures": ["NewForCausalLM"], **SMALL})
    assert isinstance(config, types.SimpleNamespace)
    found = kv_cache(config)
    assert found.read_by == "config"
    assert found.bytes_per_token == 4 * 2 * 2 * 8 * 2


def test_optimum_reads_the_architectures_it_lists() -> None:
    assert kv_cache(_config("llama")).read_by == "optimum"
    assert kv_cache(_config("gpt2")).read_by == "optimum"


def test_a_configuration_that_makes_no_sense_is_one_clear_error() -> None:
    with pytest.raises(SourceError, match=r"config\.json"):
        read_config({"model_type": "llama", "hidden_size": "big", "num_attention_heads": [1]})
