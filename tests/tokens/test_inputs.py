"""Inputs made without a processor: what models take, and what transformers' processors make of the same pictures."""

import pytest
import torch

from tcw.errors import UsageError
from tcw.tokens.inputs import MOST_TOKENS, Sample, resized, tiles, tower_inputs, vlm_inputs
from tcw.tokens.shape import inner_of

from .models import END, IMAGE, PATCH, PINPOINTS, SIDE, START, TOWERS, VIDEO, VLMS, llava, llava_next, qwen3_vl

VIDEOS = ["llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
QWEN = VIDEOS[1:]


def picture(high: int, wide: int, frames: int | None = None, seed: int = 0) -> torch.Tensor:
    shape = (3, high, wide) if frames is None else (frames, 3, high, wide)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def batch(family: str) -> list[Sample]:
    samples = [
        Sample([[1, 5, 7], picture(50, 70), [8, 9]]),
        Sample([[1], picture(40, 40, seed=1), picture(90, 40, seed=2), [11, 12, 13, 14]]),
        Sample([[4, 5, 6]]),
    ]
    if family in VIDEOS:
        samples.append(Sample([[1, 3], picture(60, 60, 4), [19], picture(30, 30, seed=3), [5]]))
    return samples


@pytest.mark.parametrize("family", VLMS)
def test_a_batch_is_its_samples(family):
    model = VLMS[family]()
    samples = batch(family)
    together = vlm_inputs(model, samples)
    with torch.no_grad():
        logits = model(**together).logits
        for row, sample in enumerate(samples):
            alone = vlm_inputs(model, [sample])
            n = alone["input_ids"].shape[1]
            assert alone["attention_mask"].all()
            assert torch.equal(together["input_ids"][row, -n:], alone["input_ids"][0])
            assert together["attention_mask"][row].tolist() == [0] * (len(together["input_ids"][row]) - n) + [1] * n
            if sample.images or sample.videos:  # positions of text alone follow another path in Qwen-VL
                torch.testing.assert_close(logits[row, -n:], model(**alone).logits[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", VLMS)
def test_text_stands_around_the_pictures(family):
    sample = batch(family)[0]
    ids = vlm_inputs(VLMS[family](), [sample])["input_ids"][0].tolist()
    text = [n for n in ids if n not in (IMAGE, VIDEO, START, END)]
    assert text == [1, 5, 7, 8, 9]
    assert ids.index(IMAGE) > ids.index(7)
    assert len(ids) - 1 - ids[::-1].index(IMAGE) < ids.index(8)


@pytest.mark.parametrize("family", VLMS)
def test_text_alone(family):
    inputs = vlm_inputs(VLMS[family](), [Sample([[4, 5]]), Sample([[6], [7, 8]])])
    assert inputs["input_ids"].tolist() == [[0, 4, 5], [6, 7, 8]]
    assert not {"pixel_values", "pixel_values_videos"} & set(inputs)


@pytest.mark.parametrize("family", QWEN)
def test_patches_of_images_are_those_of_the_processor(family):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil(patch_size=PATCH, merge_size=2, temporal_patch_size=2)
    images = [torch.randint(0, 255, (3, high, wide)).float() for high, wide in ((48, 80), (32, 16))]
    theirs = processor(
        images,
        do_resize=False,
        do_rescale=False,
        do_normalize=False,
        return_tensors="pt",
        input_data_format="channels_first",
    )
    ours = vlm_inputs(VLMS[family](), [Sample([images[0], [5]]), Sample([[6], images[1]])])
    assert torch.equal(ours["pixel_values"], theirs["pixel_values"])
    assert torch.equal(ours["image_grid_thw"], theirs["image_grid_thw"])


@pytest.mark.parametrize("family", QWEN)
def test_patches_of_videos_against_a_loop(family):
    video = picture(32, 48, frames=3)
    ours = vlm_inputs(VLMS[family](), [Sample([video])])
    frames = torch.cat([video, video[-1:]])
    assert ours["video_grid_thw"].tolist() == [[2, 4, 6]]
    rows = iter(ours["pixel_values_videos"])
    for t in range(2):
        for high in range(0, 4, 2):
            for wide in range(0, 6, 2):
                for r, c in ((high, wide), (high, wide + 1), (high + 1, wide), (high + 1, wide + 1)):
                    pixels = frames[2 * t : 2 * t + 2, :, r * 8 : r * 8 + 8, c * 8 : c * 8 + 8]
                    assert torch.equal(next(rows), pixels.permute(1, 0, 2, 3).reshape(-1))


def test_qwen3_has_a_time_stamp_and_borders_for_each_frame():
    ids = vlm_inputs(qwen3_vl(), [Sample([[1], picture(32, 32, frames=4), [9]])])["input_ids"][0].tolist()
    assert ids == [1, 3, START, *[VIDEO] * 4, END, 4, START, *[VIDEO] * 4, END, 9]


@pytest.mark.parametrize("size", [(96, 96), (48, 96), (50, 70), (133, 41), (30, 100)])
def test_tiles_are_those_of_the_processor(size):
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    image = torch.randint(0, 255, (3, *size), generator=torch.Generator().manual_seed(0)).float()
    processor = LlavaNextImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, crop_size={"height": SIDE, "width": SIDE}, do_center_crop=False,
        image_grid_pinpoints=PINPOINTS, resample=2,
    )  # fmt: skip
    theirs = processor(
        image.to(torch.uint8),
        do_rescale=False,
        do_normalize=False,
        return_tensors="pt",
        input_data_format="channels_first",
    )
    ours = vlm_inputs(llava_next(), [Sample([[1], image])])
    assert torch.equal(ours["image_sizes"], theirs["image_sizes"])
    assert ours["pixel_values"].shape == theirs["pixel_values"].shape
    # Pillow rounds to whole numbers, twice.
    assert (ours["pixel_values"] - theirs["pixel_values"].float()).abs().max() <= 1.01


def test_tiles_of_a_picture_that_fits_are_its_pixels():
    image = picture(96, 96)
    overview, *parts = tiles(image, SIDE, PINPOINTS)
    assert torch.equal(overview, resized(image, (SIDE, SIDE)))
    for n, part in enumerate(parts):
        top, left = n // 2 * SIDE, n % 2 * SIDE
        assert torch.equal(part, image[:, top : top + SIDE, left : left + SIDE])


def test_resizing_keeps_what_fits_and_frames_apart():
    frames = picture(20, 30, frames=3)
    assert torch.equal(resized(frames, (20, 30)), frames)
    small = resized(frames, (10, 10))
    for frame, one in zip(frames, small, strict=True):
        torch.testing.assert_close(resized(frame, (10, 10)), one)
    torch.testing.assert_close(resized(torch.full((3, 9, 9), 2.0), (5, 7)), torch.full((3, 5, 7), 2.0))


def test_large_pictures_are_limited():
    ours = vlm_inputs(VLMS["qwen2_vl"](), [Sample([picture(16 * 50, 16 * 40), [5]])])
    _, high, wide = ours["image_grid_thw"][0].tolist()
    assert MOST_TOKENS * 0.9 < high * wide // 4 <= MOST_TOKENS
    assert high / wide == pytest.approx(50 / 40, rel=0.05)


@pytest.mark.parametrize("strategy", ["default", "full"])
def test_class_token_among_the_features(strategy):
    model = llava(vision_feature_select_strategy=strategy)
    inputs = vlm_inputs(model, [Sample([picture(20, 20), [5]])])
    assert inputs["input_ids"].eq(IMAGE).sum() == 36 + (strategy == "full")
    assert model(**inputs).logits.isfinite().all()


@pytest.mark.parametrize("family", TOWERS)
def test_pictures_for_a_tower(family):
    model = TOWERS[family]()
    pixels = tower_inputs(model, [picture(20, 30), picture(SIDE, SIDE)])
    assert pixels.shape == (2, 3, SIDE, SIDE)
    assert torch.equal(pixels[1], picture(SIDE, SIDE))
    assert model(pixels).last_hidden_state.shape[1] in (36, 37)


def test_bf16_models_get_bf16_pixels():
    model = llava().to(torch.bfloat16)
    assert vlm_inputs(model, [Sample([picture(9, 9)])])["pixel_values"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("make", "part", "words"),
    [
        (llava, picture(0, 20), "zero size"),
        (llava, picture(20, 20)[:1], "no image"),
        (llava, torch.zeros(20, 20), "no image"),
        (llava, picture(20, 20, frames=2), "takes no videos"),
        (llava_next, picture(20, 20, frames=2), "takes no videos"),
        (TOWERS["clip"], picture(20, 20), "takes no images"),
    ],
)
def test_what_cannot_be_fed(make, part, words):
    with pytest.raises(UsageError, match=words):
        vlm_inputs(make(), [Sample([[1], part])])


def test_videos_of_one_batch_are_equally_long():
    samples = [Sample([picture(20, 20, frames=n)]) for n in (2, 3)]
    with pytest.raises(UsageError, match="same number of frames"):
        vlm_inputs(VLMS["llava_onevision"](), samples)


def test_a_model_that_we_do_not_know():
    model = llava()
    inner_of(model).config.model_type = "other"
    with pytest.raises(UsageError, match="does not know how"):
        vlm_inputs(model, [Sample([picture(20, 20)])])


def test_a_tower_takes_pictures_of_some_size():
    with pytest.raises(UsageError, match="zero size"):
        tower_inputs(TOWERS["vit"](), [picture(0, 3)])
    with pytest.raises(UsageError, match="names no image size"):
        tower_inputs(VLMS["qwen2_vl"](), [picture(8, 8)])
