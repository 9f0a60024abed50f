"""What a tower did with pictures, against its own attention maps and against numbered patches."""

import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tcw.errors import UsageError
from tcw.tokens.inputs import Sample, vlm_inputs
from tcw.tokens.shape import inner_of, tower_of
from tcw.tokens.vision import Vision
from tcw.tokens.watch import blocks_of

from .models import PATCH, VLMS, llava, llava_onevision, qwen2_5_vl
from .test_inputs import QWEN, VIDEOS, batch, picture
from .test_vision import PROJECTED, Watched, features


@pytest.mark.parametrize("family", PROJECTED)
@pytest.mark.parametrize("options", [{}, {"vision_aspect_ratio": "anyres_max_1"}, {"vision_feature_layer": [-3, -2]}])
def test_hidden_states_arranged_are_the_tokens(family, options):
    if "vision_aspect_ratio" in options and family != "llava_onevision":
        pytest.skip("images are never scaled down")
    model = VLMS[family](**options)
    found, embeds = Watched(model)(**vlm_inputs(model, batch(family)))
    for one in found:
        assert one.tower is not None
        with torch.no_grad():
            tokens = one.tower.arrange(inner_of(model).multi_modal_projector(one.tower.hidden))
        assert torch.equal(tokens, embeds[one.sample, one.columns])
        if len(one.separators):
            assert (embeds[one.sample, one.separators] == inner_of(model).image_newline).all()
        assert one.tower.features().shape == (len(one.columns), one.tower.hidden.shape[-1])


def numbering(model: PreTrainedModel) -> PreTrainedModel:
    """Make the tower hand on, as channel 0, the mean of each patch's pixels."""
    tower = tower_of(model)
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.zero_()
        weight = tower.patch_embed.proj.weight
        weight[0] = 1 / weight[0].numel()
    return model


@pytest.mark.parametrize("family", QWEN)
def test_hidden_states_of_numbered_patches_come_back_in_raster_order(family):
    model = numbering(VLMS[family]())
    sizes = [(1, 6, 10), (2, 4, 8), (1, 8, 2)]
    parts = []
    for n, (frames, rows, columns) in enumerate(sizes):
        numbers = 1000.0 * n + torch.arange(frames * rows * columns).reshape(frames, 1, rows, columns)
        pixels = numbers.repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3).expand(-1, 3, -1, -1)
        parts.append(pixels[0] if frames == 1 else pixels.repeat_interleave(2, 0))
    found, _ = Watched(model)(**vlm_inputs(model, [Sample([parts[0], [5], parts[1]]), Sample([[6], parts[2]])]))
    for n, (one, (_, rows, columns)) in enumerate(zip(found, sizes, strict=True)):
        for token, (frame, row, column) in zip(one.tower.features(), one.place.long().tolist(), strict=True):
            four = [
                1000.0 * n + (frame * rows + 2 * row + i) * columns + 2 * column + j for i in (0, 1) for j in (0, 1)
            ]
            assert float(token[0]) == pytest.approx(sum(four) / 4, rel=1e-4)


def attention_maps(model: PreTrainedModel, inputs: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Attention of the tower, [H, S, S], of each sequence of each block in the order of the calls."""
    tower = tower_of(model)
    module = sys.modules[type(next(m for m in tower.modules() if "Attention" in type(m).__name__)).__module__]
    plain, maps = module.eager_attention_forward, []

    def recording(*args: Any, **kwargs: Any) -> Any:
        output, weights = plain(*args, **kwargs)
        maps.extend(weights)
        return output, weights

    before = tower.config._attn_implementation
    tower.config._attn_implementation = "eager"
    with monkeypatch.context() as patch:
        patch.setattr(module, "eager_attention_forward", recording)
        features(model, inputs)
    tower.config._attn_implementation = before
    return maps


@pytest.mark.parametrize("family", VLMS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_is_what_the_tower_computed(family, attention, monkeypatch):
    model = VLMS[family]()
    model.set_attn_implementation(attention)
    images = [sample for sample in batch(family) if not sample.videos]
    inputs = vlm_inputs(model, images)
    maps = attention_maps(model, inputs, monkeypatch)
    found, _ = Watched(model, {1, -2})(**inputs)
    depth = found[0].tower.depth
    blocks = [maps[n * len(maps) // 4 : (n + 1) * len(maps) // 4] for n in range(4)]
    if family == "qwen2_5_vl":  # blocks 0 and 2 see windows, 1 stands in
        windows = len(maps) // 2 - 3
        assert windows > 3
        sequences = dict.fromkeys((1, 2), maps[windows : windows + 3])
    else:
        sequences = {n: blocks[n] for n in {1, depth - 2}}
    for n, expected in sequences.items():
        looked = [one for image in found for one in image.tower.looked[n]]
        assert len(looked) == len(expected)
        for one, weights in zip(looked, expected, strict=True):
            rows = one.rows(torch.arange(weights.shape[-1]))
            torch.testing.assert_close(rows, weights.mean(0), rtol=1e-4, atol=1e-5)
    assert all(set(image.tower.looked) == set(sequences) for image in found)


def test_windows_are_stood_in_for_by_what_sees_all():
    model = qwen2_5_vl()
    watched = Watched(model, {0, 2, 3})
    (image,), _ = watched(**vlm_inputs(model, [Sample([picture(48, 64)])]))
    assert torch.equal(image.tower.received((0,)), image.tower.received((2,)))
    assert not torch.equal(image.tower.received((2,)), image.tower.received((3,)))
    assert len(watched.notes) == 2
    assert "layer 2 of the tower sees windows only: layer 1" in watched.notes[1]


def test_class_token_among_the_tokens_is_a_separator():
    model = llava(vision_feature_select_strategy="full")
    (image,), embeds = Watched(model)(**vlm_inputs(model, [Sample([[1, 5], picture(20, 20), [7]])]))
    assert image.separators.tolist() == [2]
    assert image.columns.tolist() == list(range(3, 39))
    with torch.no_grad():
        tokens = inner_of(model).multi_modal_projector(image.tower.features())
    torch.testing.assert_close(tokens, embeds[0, image.columns])


def test_nothing_of_it_takes_gradients():
    model = llava_onevision()
    watched = Watched(model)
    model(**vlm_inputs(model, batch("llava_onevision")))
    found, embeds = watched.calls[-1]
    assert embeds.requires_grad
    for one in found:
        for made in (one.tower.hidden, one.tower.features(), one.tower.received((-1,)), one.tower.keys()):
            assert not made.requires_grad
            assert made.dtype == torch.float32


def test_layers_that_make_no_features_cannot_be_looked_at():
    with pytest.raises(UsageError, match="layer 3 of the tower is not one of the 3"):
        Vision(llava(), lambda depth: {depth})


def test_a_cut_inside_the_tower_and_a_look_at_its_attention_do_not_go_together():
    model = llava()
    blocks = blocks_of(tower_of(model))
    blocks[0].register_forward_hook(lambda module, args, output: output[:, :-5])
    blocks[1].register_forward_hook(lambda module, args, output: torch.cat([output, output[:, -5:]], 1))
    inputs = vlm_inputs(model, [Sample([picture(20, 20)])])
    for layer in (0, 2):
        before = Watched(model, {layer})
        assert len(before(**inputs)[0][0].tower.looked[layer]) == 1
        before.vision.detach()
    with pytest.raises(UsageError, match="layer 1 of the tower has only 31 of 36 patches left"):
        Watched(model, {1})(**inputs)


def test_attention_that_cannot_be_watched():
    model = llava()
    for block in blocks_of(tower_of(model)):
        block.self_attn.forward = lambda hidden_states, **kwargs: (hidden_states, None)
    watched = Watched(model, {1})
    with pytest.raises(UsageError, match="does not call its attention"):
        watched(**vlm_inputs(model, [Sample([picture(20, 20)])]))


def test_videos_come_with_their_frames():
    for family in VIDEOS:
        model = VLMS[family]()
        (video,), _ = Watched(model)(**vlm_inputs(model, [Sample([[5], picture(48, 48, frames=4), [6]])]))
        assert video.video
        assert video.grid[0] == (4 if family == "llava_onevision" else 2)
        assert len(video.tower.looked[video.tower.depth - 1]) == video.grid[0]
        assert video.tower.received((-1,)).shape == (len(video.columns),)
