"""What kind of model this is."""

import pytest
import torch
from torch import nn
from transformers import CLIPConfig, CLIPModel, LlamaConfig, LlamaForCausalLM, ViTConfig, ViTForImageClassification

from tcw.errors import UsageError
from tcw.tokens import Shape
from tcw.tokens.shape import has_class_token, inner_of, kind_of, shape_of, text_model_of, tower_of

from .models import BLOCKS, LAYERS, TOWERS, VLMS, llava


def llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, vocab_size=64)
    )


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llava", Shape(BLOCKS - 1, LAYERS, has_cls=True, tokens=36)),
        ("llava_next", Shape(BLOCKS - 1, LAYERS, has_cls=True)),
        ("llava_onevision", Shape(BLOCKS, LAYERS, has_cls=False)),
        ("qwen2_vl", Shape(BLOCKS, LAYERS, has_cls=False, merges_inside=False)),
        ("qwen2_5_vl", Shape(BLOCKS, LAYERS, has_cls=False, merges_inside=False)),
        ("qwen3_vl", Shape(BLOCKS, LAYERS, has_cls=False, merges_inside=False, deepstack=3)),
    ],
)
def test_shapes_of_vision_language_models(family, expected):
    model = VLMS[family]()
    assert kind_of(model) == "vlm"
    assert shape_of(model) == expected
    assert inner_of(model) is model.model
    assert inner_of(model.model) is model.model
    assert text_model_of(model) is model.model.language_model
    assert tower_of(model) in (getattr(model.model, "vision_tower", None), getattr(model.model, "visual", None))


@pytest.mark.parametrize(("family", "cls"), [("clip", True), ("siglip", False), ("vit", True), ("dinov2", True)])
def test_shapes_of_towers(family, cls):
    tower = TOWERS[family]()
    assert kind_of(tower) == "tower"
    assert shape_of(tower) == Shape(BLOCKS, 0, has_cls=cls, tokens=36)
    assert has_class_token(tower) == cls
    assert tower_of(tower) is tower
    with pytest.raises(UsageError, match="takes no images"):
        text_model_of(tower)


def test_a_tower_with_a_head_is_a_tower():
    config = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32)
    model = ViTForImageClassification(config)
    assert kind_of(model) == "tower"
    assert shape_of(model) == Shape(2, 0, has_cls=True, tokens=4)


def test_a_tower_that_divides_its_patches_by_itself():
    tower = VLMS["qwen3_vl"]().model.visual
    assert kind_of(tower) == "tower"
    assert shape_of(tower) == Shape(BLOCKS, 0, has_cls=False, merges_inside=False)


def test_a_class_token_among_the_features_is_a_token():
    assert shape_of(llava(vision_feature_select_strategy="full")).tokens == 37


def test_text_models():
    model = llama()
    assert kind_of(model) == "text"
    assert shape_of(model) == Shape(0, 3, has_cls=False)
    assert text_model_of(model) is model.model
    for part_of in (tower_of, inner_of):
        with pytest.raises(UsageError, match="`LlamaForCausalLM` takes no images"):
            part_of(model)


def test_models_without_visual_tokens():
    sides = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = CLIPModel(CLIPConfig(text_config=sides, vision_config={**sides, "image_size": 32, "patch_size": 16}))
    with pytest.raises(UsageError, match="compares pictures with text"):
        shape_of(model)
    assert kind_of(model.vision_model) == "tower"
    with pytest.raises(UsageError, match="no transformer blocks"):
        shape_of(nn.Linear(2, 2))  # type: ignore[arg-type]


def test_parts_in_places_that_we_do_not_know():
    model = llava()
    model.model.other = model.model.vision_tower
    del model.model.vision_tower
    with pytest.raises(UsageError, match="keeps its parts where tcw does not look"):
        tower_of(model)
    assert torch.is_tensor(model.lm_head.weight)
