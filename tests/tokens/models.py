"""Tiny random vision models, one of each family, whose weights are scaled so that greedy tokens vary with the picture.

`VLMS["llava"]()` and so on. `vision=` and `text=` override values of the two inner configurations, other keywords those
of the outer one. Ids 3..119 are ordinary text; `IMAGE`, `VIDEO`, `START` and `END` are never generated.
"""

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)

VOCABULARY, IMAGE, VIDEO, START, END = 128, 120, 121, 122, 123
SIDE, PATCH, BLOCKS, LAYERS = 48, 8, 4, 5  # an image of a fixed-size tower is 6 x 6 patches
PINPOINTS = [[48, 96], [96, 48], [96, 96], [48, 144], [144, 48]]
Options = dict[str, Any]

_TOWER = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": BLOCKS, "num_attention_heads": 4,
    "image_size": SIDE, "patch_size": PATCH,
}  # fmt: skip
_TEXT = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048,
    "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_IDS = {"image_token_id": IMAGE, "video_token_id": VIDEO}
_QWEN_IDS = {**_IDS, "vision_start_token_id": START, "vision_end_token_id": END, "tie_word_embeddings": False}
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}


def llava(vision: Options | None = None, text: Options | None = None, **top: Any) -> PreTrainedModel:
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**{**_TOWER, **(vision or {})}),
        text_config=LlamaConfig(**{**_TEXT, **(text or {})}),
        **{"image_token_id": IMAGE, "vision_feature_layer": -2, "vision_feature_select_strategy": "default", **top},
    )
    return _made(LlavaForConditionalGeneration, config)


def llava_next(vision: Options | None = None, text: Options | None = None, **top: Any) -> PreTrainedModel:
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**{**_TOWER, **(vision or {})}),
        text_config=LlamaConfig(**{**_TEXT, **(text or {})}),
        **{"image_token_id": IMAGE, "vision_feature_layer": -2, "image_grid_pinpoints": PINPOINTS, **top},
    )
    return _made(LlavaNextForConditionalGeneration, config)


def llava_onevision(vision: Options | None = None, text: Options | None = None, **top: Any) -> PreTrainedModel:
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**{**_TOWER, "vision_use_head": False, **(vision or {})}),
        text_config=Qwen2Config(**{**_TEXT, **(text or {})}),
        **{**_IDS, "vision_feature_layer": -1, "image_grid_pinpoints": PINPOINTS, **top},
    )
    return _made(LlavaOnevisionForConditionalGeneration, config)


def qwen2_vl(vision: Options | None = None, text: Options | None = None, **top: Any) -> PreTrainedModel:
    config = Qwen2VLConfig(
        vision_config={
            "depth": BLOCKS, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2,
            "patch_size": PATCH, "spatial_merge_size": 2, "temporal_patch_size": 2, **(vision or {}),
        },
        text_config={**_TEXT, "rope_parameters": _MROPE, **(text or {})},
        **{**_QWEN_IDS, **top},
    )  # fmt: skip
    return _made(Qwen2VLForConditionalGeneration, config)


def qwen2_5_vl(vision: Options | None = None, text: Options | None = None, **top: Any) -> PreTrainedModel:
    config = Qwen2_5_VLConfig(
        vision_config={
            "depth": BLOCKS, "hidden_size": 32, "out_hidden_size": 64, "num_heads": 2, "intermediate_size": 64,
            "patch_size": PATCH, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 32,
            "fullatt_block_indexes": [1, 3], **(vision or {}),
        },
        text_config={**_TEXT, "rope_parameters": _MROPE, **(text or {})},
        **{**_QWEN_IDS, **top},
    )  # fmt: skip
    return _made(Qwen2_5_VLForConditionalGeneration, config)


def qwen3_vl(vision: Options | None = None, text: Options | None = None, **top: Any) -> PreTrainedModel:
    config = Qwen3VLConfig(
        vision_config={
            "depth": BLOCKS, "hidden_size": 32, "out_hidden_size": 64, "num_heads": 2, "intermediate_size": 64,
            "patch_size": PATCH, "spatial_merge_size": 2, "temporal_patch_size": 2, "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1, 2], **(vision or {}),
        },
        text_config={**_TEXT, "head_dim": 16, "rope_parameters": {**_MROPE, "mrope_interleaved": True}, **(text or {})},
        **{**_QWEN_IDS, **top},
    )  # fmt: skip
    return _made(Qwen3VLForConditionalGeneration, config)


def clip(**overrides: Any) -> PreTrainedModel:
    return _made(CLIPVisionModel, CLIPVisionConfig(**{**_TOWER, **overrides}))


def siglip(**overrides: Any) -> PreTrainedModel:
    return _made(SiglipVisionModel, SiglipVisionConfig(**{**_TOWER, "vision_use_head": False, **overrides}))


def vit(**overrides: Any) -> PreTrainedModel:
    return _made(ViTModel, ViTConfig(**{**_TOWER, **overrides}))


def dinov2(**overrides: Any) -> PreTrainedModel:
    return _made(Dinov2Model, Dinov2Config(**{**_TOWER, "mlp_ratio": 2, **overrides}))


def _made(cls: type[PreTrainedModel], config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model = cls._from_config(config, attn_implementation="sdpa").float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "norm" not in name and "layer_scale" not in name:
                wanted = 0.2 if "language_model" in name or "lm_head" in name else 0.17
                parameter.mul_(wanted / parameter.std())
        if hasattr(model, "lm_head"):
            model.lm_head.weight[:3].zero_()
            model.lm_head.weight[IMAGE:].zero_()
            model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


VLMS: dict[str, Callable[..., PreTrainedModel]] = {
    "llava": llava, "llava_next": llava_next, "llava_onevision": llava_onevision,
    "qwen2_vl": qwen2_vl, "qwen2_5_vl": qwen2_5_vl, "qwen3_vl": qwen3_vl,
}  # fmt: skip
TOWERS: dict[str, Callable[..., PreTrainedModel]] = {"clip": clip, "siglip": siglip, "vit": vit, "dinov2": dinov2}
