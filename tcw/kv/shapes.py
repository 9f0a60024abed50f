"""Which layers of a model a policy can serve, and what they look like."""

from dataclasses import replace
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from tcw.errors import UsageError
from tcw.kv import LayerShape
from tcw.kv.attention import decoder_of
from tcw.kv.rope import FIXED, Rope, read_rope
from tcw.profile.kv import head_size, kv_heads, layer_configs, numbers

_HINT = "compress its weights alone"


def shapes_of_config(config: Any, dtype: torch.dtype = torch.bfloat16) -> tuple[LayerShape, ...]:
    """The full-attention layers of a model with this configuration; RoPE with some frequencies stands for its own.

    Raises UsageError where a policy would make wrong text: latent attention, layers that share keys and values,
    encoder-decoder models; or where there is no such layer.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise UsageError(f"`{config.model_type}` has an encoder and a decoder: KV policies serve decoders alone", _HINT)
    text = config.get_text_config(decoder=True)
    if getattr(text, "kv_lora_rank", None):
        raise UsageError(f"`{config.model_type}` caches latent vectors (MLA), which KV policies do not know", _HINT)
    if getattr(text, "num_kv_shared_layers", 0) or "reuse" in (getattr(text, "kv_sharing_modes", None) or ()):
        raise UsageError(
            f"layers of `{config.model_type}` share keys and values, which KV policies cannot follow", _HINT
        )
    made = DynamicCache(config=config).layers
    configs = layer_configs(text, len(made))
    full = [i for i, layer in enumerate(made) if type(layer) is DynamicLayer]
    if not full:
        raise UsageError(
            f"`{config.model_type}` has no layer with a full KV cache: there is nothing to make smaller", _HINT
        )
    kinds = _kinds(text, len(configs))
    return tuple(_shape(configs[i], kinds[i], i, depth, len(full), dtype) for depth, i in enumerate(full))


def _kinds(text: Any, count: int) -> list[str]:
    return list(getattr(text, "layer_types", None) or ["full_attention"] * count)


def _shape(config: Any, kind: str, index: int, depth: int, count: int, dtype: torch.dtype) -> LayerShape:
    size, heads = head_size(config), numbers(config)["num_attention_heads"]
    values = int(getattr(config, "v_head_dim", None) or size)
    rope = Rope(torch.ones(size // 2)) if _rotates(getattr(config, "rope_parameters", None), kind) else None
    return LayerShape(index, depth, count, heads, kv_heads(config), size, values, dtype, rope)


def _rotates(parameters: Any, kind: str) -> bool:
    """Whether these RoPE parameters, which may differ by kind of layer, turn by one position and fixed frequencies."""
    own = parameters.get(kind, parameters) if isinstance(parameters, dict) else None
    return isinstance(own, dict) and own.get("rope_type", "default") in FIXED and "mrope_section" not in own


def shapes_of(model: Any) -> tuple[LayerShape, ...]:
    """The full-attention layers of a loaded model, with its own RoPE. Raises UsageError as `shapes_of_config` does."""
    decoder = decoder_of(model)
    text = model.config.get_text_config(decoder=True)
    ropes: dict[str, Rope | None] = {}
    shapes = shapes_of_config(model.config, model.dtype)
    found, kinds = [], _kinds(text, max(shape.index for shape in shapes) + 1)
    for shape in shapes:
        kind = kinds[shape.index]
        if kind not in ropes:
            ropes[kind] = _rope(decoder, shape.index, kind) if shape.rope else None
        found.append(replace(shape, rope=ropes[kind]))
    return tuple(found)


def _rope(decoder: Any, index: int, kind: str) -> Rope | None:
    attentions = (m for m in decoder.modules() if getattr(m, "layer_idx", None) == index and hasattr(m, "scaling"))
    attention = next(attentions, None)
    return None if attention is None else read_rope(attention, decoder, kind)
