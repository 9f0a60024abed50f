"""Inputs of a vision-language model or of a tower, without a processor: for checks and measurements.

Pictures are float32 [3, height, width], normalised as the tower expects them; a video is [frames, 3, height, width].
What a model's own processor would add beyond that (prompts, special words) is left out: text is token ids.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.image_processing_utils import select_best_resolution

from tcw.errors import UsageError
from tcw.tokens.pack import FIXED, PATCHES, TILES, packing_of, pooled, tiled
from tcw.tokens.shape import has_class_token, inner_of, tower_of

MOST_TOKENS = 1280  # of one image, where the model does not say: the limit of Qwen-VL's processors


@dataclass(frozen=True)
class Sample:
    """One row of a batch.

    Attributes:
        parts: in reading order: lists of token ids, images [3, H, W] and videos [F, 3, H, W].
    """

    parts: Sequence[Sequence[int] | Tensor]

    @property
    def images(self) -> list[Tensor]:
        """The images among the parts."""
        return [p for p in self.parts if isinstance(p, Tensor) and p.dim() == 3]

    @property
    def videos(self) -> list[Tensor]:
        """The videos among the parts."""
        return [p for p in self.parts if isinstance(p, Tensor) and p.dim() == 4]


@dataclass
class _Row:
    """Token ids of one sample and their kinds (0 text, 1 image, 2 video)."""

    ids: list[int] = field(default_factory=list)
    kinds: list[int] = field(default_factory=list)

    def add(self, ids: Sequence[int], kind: int = 0) -> None:
        self.ids += ids
        self.kinds += [kind] * len(ids)


def vlm_inputs(model: PreTrainedModel, samples: Sequence[Sample]) -> dict[str, Tensor]:
    """What `model(**inputs)` and `model.generate(**inputs)` take for a batch of samples, padded on the left.

    Pictures are resized to what the model's configuration wants (bilinear, antialiased). Rows are padded with the
    model's padding id, or 0. Of Qwen3-VL's time stamps, one text token stands before each frame of a video.

    Raises UsageError where the model takes no images or videos, and for pictures of no size.
    """
    inner = inner_of(model)
    for sample in samples:
        for part in sample.parts:
            if isinstance(part, Tensor):
                _check(part)
    makers = {FIXED: _Fixed, TILES: _Tiles, PATCHES: _Patches}
    packing = packing_of(inner)
    if packing not in makers:
        raise UsageError(
            f"tcw does not know how `{type(model).__name__}` is fed pictures", "prepare the inputs with its processor"
        )
    return makers[packing](inner, model).batch(samples)


def tower_inputs(model: PreTrainedModel, pictures: Sequence[Tensor]) -> Tensor:
    """Pictures (each [3, H, W]) as `pixel_values` [B, 3, side, side] of a plain tower with this configuration."""
    config = getattr(model.config, "vision_config", model.config)
    for picture in pictures:
        _check(picture)
    stacked = torch.stack([resized(picture, _sides(config)) for picture in pictures])
    return stacked.to(model.device, model.dtype)


def resized(picture: Tensor, size: tuple[int, int]) -> Tensor:
    """A picture [3, H, W], or frames [F, 3, H, W], resized to (height, width)."""
    if tuple(picture.shape[-2:]) == size:
        return picture.float()
    frames = picture.float().reshape(-1, *picture.shape[-3:])
    scaled = functional.interpolate(frames, size=size, mode="bilinear", antialias=True)
    return scaled.reshape(*picture.shape[:-2], *size)


def tiles(picture: Tensor, side: int, resolutions: list[list[int]]) -> Tensor:
    """A picture as overview and tiles: [1 + tiles, 3, side, side], as LLaVA-NeXT divides it.

    The picture is scaled into the best of the `resolutions` (each (height, width)), its proportions kept, and centred
    on zeros, the mean colour. transformers' processor pads before it normalises, that is, with black.
    """
    height, width = select_best_resolution(tuple(picture.shape[-2:]), resolutions)
    scale = min(height / picture.shape[-2], width / picture.shape[-1])
    inside = min(height, math.ceil(picture.shape[-2] * scale)), min(width, math.ceil(picture.shape[-1] * scale))
    canvas = picture.new_zeros(3, height, width, dtype=torch.float32)
    top, left = (height - inside[0]) // 2, (width - inside[1]) // 2
    canvas[:, top : top + inside[0], left : left + inside[1]] = resized(picture, inside)
    parts = canvas.reshape(3, height // side, side, width // side, side).permute(1, 3, 0, 2, 4)
    return torch.cat([resized(picture, (side, side))[None], parts.reshape(-1, 3, side, side)])


def _check(picture: Tensor) -> None:
    if picture.dim() not in (3, 4) or picture.shape[-3] != 3:
        shape = "x".join(map(str, picture.shape))
        raise UsageError(f"a picture of shape {shape} is no image", "give [3, height, width], or frames of that")
    if not picture.numel():
        raise UsageError("a picture of zero size has no tokens", "leave it out")


def _sides(config: Any) -> tuple[int, int]:
    size = getattr(config, "image_size", None)
    if size is None:
        raise UsageError(f"`{type(config).__name__}` names no image size", "prepare the inputs with a processor")
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


class _Maker:
    """Turns samples into a batch; subclasses know one way of feeding pictures."""

    def __init__(self, inner: PreTrainedModel, model: PreTrainedModel) -> None:
        self.inner, self.model, self.config = inner, model, inner.config

    def image(self, row: _Row, picture: Tensor, sample: Sample) -> None:
        """Add an image's tokens to its row, and keep its pixels."""
        raise NotImplementedError

    def video(self, row: _Row, frames: Tensor) -> None:
        """Add a video's tokens to its row, and keep its pixels."""
        raise UsageError(f"`{type(self.model).__name__}` takes no videos", "give it images")

    def pixels(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """The pictures of the batch."""
        raise NotImplementedError

    def batch(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """The whole batch."""
        rows = []
        for sample in samples:
            rows.append(row := _Row())
            for part in sample.parts:
                if not isinstance(part, Tensor):
                    row.add(part)
                elif part.dim() == 3:
                    self.image(row, part, sample)
                else:
                    self.video(row, part)
        inputs = {**self._padded(rows), **self.pixels(samples)}
        return {
            name: value.to(self.model.device, self.model.dtype if value.is_floating_point() else None)
            for name, value in inputs.items()
        }

    def _padded(self, rows: list[_Row]) -> dict[str, Tensor]:
        longest = max(len(row.ids) for row in rows)
        pad = self.config.get_text_config().pad_token_id or 0
        room = [longest - len(row.ids) for row in rows]
        ids = torch.tensor([[pad] * n + row.ids for n, row in zip(room, rows, strict=True)])
        mask = torch.tensor([[0] * n + [1] * (longest - n) for n in room])
        return {"input_ids": ids, "attention_mask": mask}


class _Fixed(_Maker):
    """LLaVA: every image is one square."""

    def __init__(self, inner: PreTrainedModel, model: PreTrainedModel) -> None:
        super().__init__(inner, model)
        self._images: list[Tensor] = []

    def image(self, row: _Row, picture: Tensor, sample: Sample) -> None:
        vision = self.config.vision_config
        self._images.append(resized(picture, _sides(vision)))
        high, wide = (side // vision.patch_size for side in _sides(vision))
        with_class = self.config.vision_feature_select_strategy == "full" and has_class_token(tower_of(self.model))
        row.add([self.config.image_token_id] * (high * wide + with_class), 1)

    def pixels(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        return {"pixel_values": torch.stack(self._images)} if self._images else {}


class _Tiles(_Maker):
    """LLaVA-NeXT and LLaVA-OneVision: an overview and tiles; a video as frames of one tile each."""

    def __init__(self, inner: PreTrainedModel, model: PreTrainedModel) -> None:
        super().__init__(inner, model)
        self._images: list[Tensor] = []
        self._sizes: list[tuple[int, int]] = []
        self._videos: list[Tensor] = []
        self._side = _sides(self.config.vision_config)[0]
        self._one_tile = hasattr(inner, "get_video_features")  # OneVision: of several images, each is one tile

    def image(self, row: _Row, picture: Tensor, sample: Sample) -> None:
        size = (int(picture.shape[-2]), int(picture.shape[-1]))
        if self._one_tile and len(sample.images) > 1:
            parts = resized(picture, (self._side, self._side))[None]
        else:
            parts = tiles(picture, self._side, self.config.image_grid_pinpoints)
        self._images.append(parts)
        self._sizes.append(size)
        row.add([self.config.image_token_id] * tiled(self.inner, len(parts), size).tokens, 1)

    def video(self, row: _Row, frames: Tensor) -> None:
        if not self._one_tile:
            super().video(row, frames)
        if self._videos and len(self._videos[0]) != len(frames):
            raise UsageError("videos of one batch must have the same number of frames", "give one at a time")
        self._videos.append(resized(frames, (self._side, self._side)))
        row.add([self.config.video_token_id] * pooled(self.inner, len(frames)).tokens, 2)

    def pixels(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        made: dict[str, Tensor] = {}
        if self._images:
            most = max(len(parts) for parts in self._images)
            padded = [functional.pad(parts, (0, 0) * 3 + (0, most - len(parts))) for parts in self._images]
            made = {"pixel_values": torch.stack(padded), "image_sizes": torch.tensor(self._sizes)}
            if self._one_tile:
                made["batch_num_images"] = torch.tensor([len(sample.images) for sample in samples])
        if self._videos:
            made["pixel_values_videos"] = torch.stack(self._videos)
        return made


class _Patches(_Maker):
    """Qwen-VL: patches of images of any size, in 2 x 2 groups."""

    def __init__(self, inner: PreTrainedModel, model: PreTrainedModel) -> None:
        super().__init__(inner, model)
        self._patches: dict[int, list[Tensor]] = {1: [], 2: []}
        self._grids: dict[int, list[tuple[int, int, int]]] = {1: [], 2: []}
        self._kinds: list[list[int]] = []

    def image(self, row: _Row, picture: Tensor, sample: Sample) -> None:
        tokens = self._take(picture[None], 1)
        row.add([self.config.vision_start_token_id])
        row.add([self.config.image_token_id] * tokens, 1)
        row.add([self.config.vision_end_token_id])

    def video(self, row: _Row, frames: Tensor) -> None:
        tokens = self._take(frames, 2)
        timed = self.config.model_type.startswith("qwen3")
        parts = self._grids[2][-1][0] if timed else 1
        for part in range(parts):
            # Qwen3-VL says the time before each frame; which words that takes depends on a tokenizer.
            row.add([3 + part % 10] if timed else [])
            row.add([self.config.vision_start_token_id])
            row.add([self.config.video_token_id] * (tokens // parts), 2)
            row.add([self.config.vision_end_token_id])

    def _take(self, frames: Tensor, kind: int) -> int:
        """Keep the patches of frames [F, 3, H, W]; the number of tokens that they make."""
        vision = self.config.vision_config
        merge, patch, times = vision.spatial_merge_size, vision.patch_size, vision.temporal_patch_size
        frames = resized(frames, _rounded((int(frames.shape[-2]), int(frames.shape[-1])), patch * merge))
        frames = torch.cat([frames, frames[-1:].expand(-len(frames) % times, -1, -1, -1)])
        grid = (len(frames) // times, frames.shape[-2] // patch, frames.shape[-1] // patch)
        cut = frames.reshape(
            grid[0], times, 3, grid[1] // merge, merge, patch, grid[2] // merge, merge, patch
        )  # (t, T, C, h, mh, ph, w, mw, pw)
        cut = cut.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
        self._patches[kind].append(cut.reshape(grid[0] * grid[1] * grid[2], -1))
        self._grids[kind].append(grid)
        return grid[0] * grid[1] * grid[2] // merge**2

    def pixels(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        made: dict[str, Tensor] = {}
        for kind, pixels, grid in ((1, "pixel_values", "image_grid_thw"), (2, "pixel_values_videos", "video_grid_thw")):
            if self._patches[kind]:
                made[pixels] = torch.cat(self._patches[kind])
                made[grid] = torch.tensor(self._grids[kind])
        return made

    def _padded(self, rows: list[_Row]) -> dict[str, Tensor]:
        made = super()._padded(rows)
        longest = made["input_ids"].shape[1]
        kinds = [[0] * (longest - len(row.kinds)) + row.kinds for row in rows]
        return {**made, "mm_token_type_ids": torch.tensor(kinds, dtype=torch.int32)}


def _rounded(size: tuple[int, int], factor: int) -> tuple[int, int]:
    """The size nearest to `size` that is a multiple of `factor`, with no more than `MOST_TOKENS` tokens."""
    high, wide = (max(1, round(side / factor)) for side in size)
    if high * wide > MOST_TOKENS:
        shrink = (size[0] * size[1] / (MOST_TOKENS * factor**2)) ** 0.5
        high, wide = (max(1, int(side / shrink / factor)) for side in size)
    return high * factor, wide * factor
