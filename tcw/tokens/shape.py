"""What kind of model this is, and where its parts are."""

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from tcw.errors import UsageError
from tcw.tokens import Shape
from tcw.tokens.watch import blocks_of

VLM, TOWER, TEXT = "vlm", "tower", "text"
_TOWERS = ("vision_tower", "visual", "vision_model")
_DECODERS = ("language_model", "text_model")
_CLASS_TOKENS = ("class_embedding", "cls_token")


def kind_of(model: PreTrainedModel) -> str:
    """Say "vlm" (pictures become tokens of a language model), "tower" (pictures only) or "text" (no pictures).

    Raises UsageError for what is none of these.
    """
    if _inner(model) is not None:
        return VLM
    blocks_of(model)
    if hasattr(model, "get_image_features"):
        raise UsageError(
            f"`{type(model).__name__}` compares pictures with text: it has no visual tokens to cut",
            "give its vision tower alone",
        )
    if model.main_input_name == "pixel_values" or _divides_by_itself(model):
        return TOWER
    return TEXT


def shape_of(model: PreTrainedModel) -> Shape:
    """What a method may want to know of `model`: a vision-language model, a tower, or a decoder (no blocks).

    `tokens` is 0 where it depends on the picture. Raises UsageError where there are no transformer blocks.
    """
    of = kind_of(model)
    if of == TEXT:
        return Shape(blocks=0, layers=len(blocks_of(model)), has_cls=False)
    tower = tower_of(model)
    text = None if of == TOWER else text_model_of(model)
    vision = getattr(model.config, "vision_config", model.config)
    stacked = getattr(vision, "deepstack_visual_indexes", None)
    blocks = len(blocks_of(tower))
    return Shape(
        blocks=blocks if text is None else depth_of(inner_of(model), blocks),
        layers=0 if text is None else len(blocks_of(text)),
        has_cls=has_class_token(tower),
        tokens=_tokens(model, of, vision),
        merges_inside=not _divides_by_itself(tower),
        deepstack=len(stacked or ()) if text is not None else 0,
    )


def inner_of(model: PreTrainedModel) -> PreTrainedModel:
    """The part of a vision-language model that puts picture features among text embeddings.

    Raises UsageError where there is none.
    """
    inner = _inner(model)
    if inner is None:
        raise UsageError(
            f"`{type(model).__name__}` takes no images: policies for visual tokens have nothing to cut",
            "`tcw methods` lists policies for text models, under `kv` and `prompt`",
        )
    return inner


def tower_of(model: PreTrainedModel) -> PreTrainedModel:
    """The vision tower: of a vision-language model, or the model itself. Raises UsageError for a text model."""
    inner = _inner(model)
    if inner is None and kind_of(model) == TOWER:
        return model
    return _part(inner_of(model), _TOWERS)


def text_model_of(model: PreTrainedModel) -> PreTrainedModel:
    """The decoder: of a vision-language model, or the base of a text model. Raises UsageError for a tower."""
    inner = _inner(model)
    if inner is None and kind_of(model) == TEXT:
        return model.base_model
    return _part(inner_of(model), _DECODERS)


def depth_of(inner: PreTrainedModel, blocks: int) -> int:
    """Layers of the tower whose output is the features."""
    layers = getattr(inner.config, "vision_feature_layer", -1)
    chosen = [layers] if isinstance(layers, int) else list(layers)
    return max(1, max(n % (blocks + 1) for n in chosen))


def has_class_token(tower: nn.Module) -> bool:
    """Whether the tower's sequences begin with a class token."""
    return any(name.rpartition(".")[2] in _CLASS_TOKENS for name, _ in tower.named_parameters())


def _inner(model: Any) -> PreTrainedModel | None:
    part: Any
    for part in (getattr(model, "model", None), model):
        has_text = any(isinstance(getattr(part, name, None), nn.Module) for name in _DECODERS)
        if hasattr(part, "get_image_features") and has_text and hasattr(part.config, "image_token_id"):
            return part
    return None


def _part(inner: PreTrainedModel, names: tuple[str, ...]) -> PreTrainedModel:
    found = next((part for name in names if (part := getattr(inner, name, None)) is not None), None)
    if found is None:
        raise UsageError(
            f"`{type(inner).__name__}` keeps its parts where tcw does not look",
            f"it needs one of {', '.join(f'`{name}`' for name in names)}",
        )
    return found


def _divides_by_itself(tower: nn.Module) -> bool:
    """Qwen-VL's towers take the patches of all pictures as one sequence and group them by position."""
    return hasattr(getattr(tower, "config", None), "spatial_merge_size")


def _tokens(model: PreTrainedModel, of: str, vision: Any) -> int:
    """Visual tokens of an image where it is always the same number; else 0."""
    size, patch = getattr(vision, "image_size", None), getattr(vision, "patch_size", None)
    if not isinstance(size, int) or not isinstance(patch, int) or hasattr(vision, "spatial_merge_size"):
        return 0
    if of == VLM and hasattr(inner_of(model), "pack_image_features"):  # tiles
        return 0
    full = of == VLM and getattr(model.config, "vision_feature_select_strategy", "") == "full"
    return (size // patch) ** 2 + int(full and has_class_token(tower_of(model)))
