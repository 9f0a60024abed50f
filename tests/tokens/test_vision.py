"""Where pictures stand in a batch and what the tower did with them, against what models do when nobody watches."""

import copy
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    GemmaConfig,
    LlavaForConditionalGeneration,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PreTrainedModel,
    SiglipVisionConfig,
)

from tcw.errors import UsageError
from tcw.tokens.inputs import Sample, vlm_inputs
from tcw.tokens.shape import inner_of, text_model_of, tower_of
from tcw.tokens.vision import Picture, Vision

from .models import IMAGE, VLMS, llava
from .test_inputs import QWEN, batch, picture

KNOWS_OUTPUTS = "mm_encoder_outputs" in inspect.signature(LlavaForConditionalGeneration.forward).parameters
PROJECTED = [name for name in VLMS if name not in QWEN]


class Watched:
    """A model with a `Vision`, and what it says at each call of the text model."""

    def __init__(self, model: PreTrainedModel, layers: set[int] | None = None) -> None:
        self.model, self.notes = model, []
        self.vision = Vision(model, lambda depth: {depth - 1} if layers is None else layers, self.notes.append)
        self.calls: list[tuple[list[Picture], Tensor]] = []
        text_model_of(model).register_forward_pre_hook(self._look, with_kwargs=True)

    def _look(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.calls.append((self.vision.pictures(), kwargs["inputs_embeds"]))

    def __call__(self, **inputs: Any) -> tuple[list[Picture], Tensor]:
        with torch.no_grad():
            self.model(**inputs)
        return self.calls[-1]


def features(model: PreTrainedModel, inputs: dict[str, Tensor]) -> dict[int, list[Tensor]]:
    """What goes in place of image (1) and video (2) placeholders, picture by picture."""
    inner, found = inner_of(model), {}
    for kind, token, pixels in (("image", IMAGE, "pixel_values"), ("video", IMAGE + 1, "pixel_values_videos")):
        if pixels in inputs:
            function = getattr(inner, f"get_{kind}_features")
            taken = inspect.signature(function).parameters
            given = {name: value for name, value in inputs.items() if name in taken and name != "pixel_values"}
            with torch.no_grad():
                # transformers 5.17 calls the pixels of videos `pixel_values` in one family
                found[token] = list(function(inputs[pixels], **{k: v for k, v in given.items() if k != pixels},
                                             return_dict=True).pooler_output)  # fmt: skip
    return found


@pytest.mark.parametrize("family", VLMS)
def test_columns_are_those_that_features_go_to(family):
    model = VLMS[family]()
    inputs = vlm_inputs(model, batch(family))
    expected = []
    for token, entries in features(model, inputs).items():
        if family == "llava_onevision" and token != IMAGE and len(entries[0]) == 36:  # transformers 5.17
            entries = [torch.cat([entry, inner_of(model).image_newline[None]]) for entry in entries]
        places = [(r, c) for r, row in enumerate(inputs["input_ids"].tolist()) for c, n in enumerate(row) if n == token]
        for entry in entries:
            mine, places = places[: len(entry)], places[len(entry) :]
            expected.append((mine[0][0], [c for _, c in mine], token != IMAGE, entry))
        assert not places
    expected.sort(key=lambda one: (one[0], one[1][0]))
    found, embeds = Watched(model)(**inputs)
    assert len(found) == len(expected) == sum(len(s.images) + len(s.videos) for s in batch(family))
    for one, (sample, columns, video, entry) in zip(found, expected, strict=True):
        assert (one.sample, one.video) == (sample, video)
        assert torch.cat([one.columns, one.separators]).sort().values.tolist() == columns
        at = torch.tensor([columns.index(c) for c in one.columns.tolist()])
        assert torch.equal(embeds[sample, one.columns], entry[at])
        assert one.place.shape == (len(one.columns), 3)
        assert len(one.closes) == len(one.patches) == len(one.columns)
        assert (one.place < torch.tensor(one.grid)).all()
    numbers = {r: [one.number for one in found if one.sample == r] for r in range(len(inputs["input_ids"]))}
    assert all(n == list(range(len(n))) for n in numbers.values())
    assert len(numbers[1]) == 2


@pytest.mark.parametrize("family", VLMS)
@pytest.mark.parametrize("options", [{"num_beams": 2}, {"num_return_sequences": 3, "do_sample": True}])
def test_repeated_samples_have_their_own_pictures(family, options):
    model = VLMS[family]()
    # transformers 5.17 repeats image by image, not sample by sample, in this family
    samples = batch(family) if KNOWS_OUTPUTS or family != "llava_next" else batch(family)[::2]
    inputs = vlm_inputs(model, samples)
    first = Watched(model)
    alone, plain = first(**inputs)
    first.vision.detach()
    watched = Watched(model)
    with torch.no_grad():
        watched.model.generate(**inputs, max_new_tokens=3, **options)
    (found, embeds), *later = watched.calls
    times = max(options.values())
    assert [(one.sample, one.number) for one in found] == [
        (row, n) for row in range(len(embeds)) for n in range(len([p for p in alone if p.sample == row // times]))
    ]
    for one in found:
        same = next(p for p in alone if (p.sample, p.number) == (one.sample // times, one.number))
        assert torch.equal(one.columns, same.columns)
        if family in PROJECTED:
            with torch.no_grad():
                tokens = one.tower.arrange(inner_of(model).multi_modal_projector(one.tower.hidden))
            assert torch.equal(tokens, embeds[one.sample, one.columns])
        else:
            torch.testing.assert_close(embeds[one.sample, one.columns], plain[same.sample, same.columns])
            torch.testing.assert_close(one.tower.features(), same.tower.features())
    assert later
    assert all(pictures == [] for pictures, _ in later)


@pytest.mark.parametrize("family", VLMS)
def test_no_pictures_in_text(family):
    model = VLMS[family]()
    watched = Watched(model)
    assert watched(**vlm_inputs(model, [Sample([[4, 5, 6]])]))[0] == []
    assert watched.vision.pictures() == []


@pytest.mark.parametrize("family", VLMS)
def test_placeholders_are_found_by_their_embeddings(family):
    model = VLMS[family]()
    inputs = vlm_inputs(model, batch(family))
    watched = Watched(model)
    by_ids, _ = watched(**inputs)
    embeds = model.get_input_embeddings()(inputs.pop("input_ids")).detach()
    inputs.pop("mm_token_type_ids", None)
    by_embeds, _ = watched(inputs_embeds=embeds, **inputs)
    assert len(by_ids) == len(by_embeds)
    for one, same in zip(by_ids, by_embeds, strict=True):
        assert (one.sample, one.number, one.grid) == (same.sample, same.number, same.grid)
        assert torch.equal(one.columns, same.columns)


needs_outputs = pytest.mark.skipif(not KNOWS_OUTPUTS, reason="needs a newer transformers")


@needs_outputs
@pytest.mark.parametrize("family", VLMS)
def test_features_computed_before_are_known_again(family):
    model = VLMS[family]()
    inputs = vlm_inputs(model, batch(family)[:2])
    watched = Watched(model)
    direct, _ = watched(**inputs)
    inner = inner_of(model)
    taken = {k: v for k, v in inputs.items() if k in inspect.signature(inner.get_image_features).parameters}
    rest = {k: v for k, v in inputs.items() if k not in taken}
    output = inner.get_image_features(**taken, return_dict=True)
    for _ in range(2):
        again, _ = watched(**rest, mm_encoder_outputs={"image": output})
        assert [len(one.columns) for one in again] == [len(one.columns) for one in direct]
        assert torch.equal(again[2].tower.received((-1,)), direct[2].tower.received((-1,)))
    assert watched.notes == []


@needs_outputs
@pytest.mark.parametrize("family", ["llava_next", "qwen3_vl"])
def test_features_from_elsewhere_have_no_tower(family):
    model = VLMS[family]()
    inputs = vlm_inputs(model, batch(family)[:2])
    taken = {k: v for k, v in inputs.items() if k in inspect.signature(inner_of(model).get_image_features).parameters}
    output = inner_of(model).get_image_features(**taken, return_dict=True)
    watched = Watched(model)
    direct, _ = watched(**inputs)
    taken.pop("image_grid_thw", None)
    found, _ = watched(**{k: v for k, v in inputs.items() if k not in taken}, mm_encoder_outputs={"image": output})
    assert all(one.tower is None for one in found)
    assert [len(one.columns) + len(one.separators) for one in direct] == [len(one.columns) for one in found]
    if family == "qwen3_vl":
        assert [one.grid for one in found] == [one.grid for one in direct]
    assert watched.notes == ["features were given from outside: what the tower did is not known"]


@needs_outputs
def test_a_picture_of_no_tokens_is_refused():
    model = llava()
    inputs = vlm_inputs(model, [Sample([[1], picture(20, 20)])])
    output = inner_of(model).get_image_features(inputs.pop("pixel_values"), return_dict=True)
    output.pooler_output = [output.pooler_output[0][:0], *output.pooler_output]
    watched = Watched(model)
    with pytest.raises(UsageError, match="an image of zero tokens"):
        watched(**inputs, mm_encoder_outputs={"image": output})
    assert watched.vision.pictures() == []


def test_a_picture_in_two_rows_is_refused():
    model = llava()
    inputs = vlm_inputs(model, [Sample([[1], picture(20, 20)])])
    ids = torch.full((2, 18), IMAGE)
    with pytest.raises(UsageError, match="stand in two samples"):
        Watched(model)(input_ids=ids, pixel_values=inputs["pixel_values"])


@pytest.mark.parametrize("family", VLMS)
def test_detaching_leaves_the_model_as_it_was(family):
    model = VLMS[family]()
    inner, tower = inner_of(model), tower_of(model)

    def state() -> list[Any]:
        modules = [(set(vars(m)), dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in model.modules()]
        return [modules, tower.config._attn_implementation, vars(inner).get("get_image_features")]

    weights = {name: value.clone() for name, value in model.state_dict().items()}
    signature = inspect.signature(inner.get_image_features)
    inputs = vlm_inputs(model, batch(family))
    with torch.no_grad():
        plain = model(**inputs).logits
        before = state()  # of a model that has run: transformers leaves hooks of its own
        vision = Vision(model, lambda depth: {0})
        assert inspect.signature(inner.get_image_features) == signature
        assert torch.equal(model(**inputs).logits, plain)
        vision.detach()
    assert state() == before
    assert vision.pictures() == []
    assert inner.get_image_features.__func__ is type(inner).get_image_features
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name])


def test_a_function_on_the_instance_comes_back():
    model = llava()
    inner = inner_of(model)
    own = copy.copy(inner.get_image_features)
    inner.get_image_features = own
    Vision(model, lambda depth: set()).detach()
    assert vars(inner)["get_image_features"] is own


def test_a_family_that_we_have_not_seen():
    sides = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = SiglipVisionConfig(**sides, image_size=32, patch_size=8, vision_use_head=False)
    text = GemmaConfig(**sides, num_key_value_heads=2, head_dim=16, vocab_size=128)
    config = PaliGemmaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, projection_dim=32)
    model = PaliGemmaForConditionalGeneration(config).eval()
    ids = torch.tensor([[3, *[IMAGE] * 16, 5], [*[IMAGE] * 16, 6, 7]])
    pixels = torch.stack([picture(32, 32), picture(32, 32, seed=1)])
    found, embeds = Watched(model)(input_ids=ids, pixel_values=pixels, token_type_ids=torch.zeros_like(ids))
    assert [(one.sample, one.columns.tolist(), one.grid) for one in found] == [
        (0, list(range(1, 17)), (1, 1, 16)),
        (1, list(range(16)), (1, 1, 16)),
    ]
    assert all(one.tower is None and one.patches.eq(-1).all() for one in found)
    assert not torch.equal(embeds[0, found[0].columns], embeds[1, found[1].columns])
