"""Which tokens a model makes of a picture's patches, and which is which.

    FIXED    LLaVA: every patch of one square is a token
    TILES    LLaVA-NeXT, LLaVA-OneVision: overview and tiles, padding cut off, perhaps scaled down, a newline a row
    PATCHES  Qwen-VL: each 2 x 2 patches are a token
    OTHER    a model that we have not seen: its tokens are known, how they come from patches is not

Where the model has a function for this, it is asked: quantities go through it as channels of features, so that what
is cut off, scaled and inserted is always what the model does. Geometry goes through in float64.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

FIXED, TILES, PATCHES, OTHER = "fixed", "tiles", "patches", "other"
Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Layout:
    """The tokens of one picture, T in all, N of them visual.

    Attributes:
        tokens: T.
        real: int64 [N], the visual tokens among the T.
        separators: int64 [M], the others: newlines, a class token.
        closes: int64 [N], the separator (0..M-1) that ends the row of each visual token, or -1.
        grid: (frames, rows, columns); (1, 1, N) where there is none.
        place: float32 [N, 3], frame, row and column. The overview of tiles is frame 0, all tiles together are frame 1.
        crops: tiles or frames that the tower sees; 0: not known.
        patches: int64 [N], crop * patches of a crop + patch, or -1 where a token is no single patch.
        arrange: [crops, patches of a crop, c] -> [N, c].
    """

    tokens: int
    real: Tensor
    separators: Tensor
    closes: Tensor
    grid: Grid
    place: Tensor
    crops: int
    patches: Tensor
    arrange: Callable[[Tensor], Tensor]


def packing_of(inner: nn.Module) -> str:
    """Say how the model makes tokens of patches."""
    family = inner.config.model_type
    if family in ("llava_next", "llava_onevision"):
        return TILES
    if family.startswith("qwen") and hasattr(inner.config.vision_config, "spatial_merge_size"):
        return PATCHES
    square = family == "llava" and inner.config.vision_config.model_type != "pixtral"
    return FIXED if square else OTHER


def fixed(inner: Any, tokens: int) -> Layout:
    """Layout of LLaVA's image, one square; a class token among its tokens (strategy "full") counts as a separator."""
    side = side_of(inner)
    extra = tokens - side * side
    real = torch.arange(extra, tokens)
    place = _raster((1, side, side))
    return Layout(
        tokens, real, torch.arange(extra), torch.full_like(real, -1), (1, side, side), place, 1,
        torch.arange(side * side), lambda x: x[0],
    )  # fmt: skip


def tiled(inner: Any, tiles: int, size: Any, **options: Any) -> Layout:
    """Layout of an image of `size` (height, width) in `tiles` tiles, the overview counted (`pack` for `options`)."""
    side = side_of(inner)
    per = side * side
    index = torch.arange(tiles * per, dtype=torch.float64).reshape(tiles, per, 1)
    newline = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
    channels = torch.cat([index, index.square(), torch.zeros_like(index)], -1)
    packed = pack(inner, [channels], [size], newline, **options)[0]
    ends = packed[:, 2] == 1
    real, separators = (~ends).nonzero()[:, 0], ends.nonzero()[:, 0]
    overview = real < per
    rows = (separators[None] < real[:, None]).sum(1)
    starts = torch.cat([torch.tensor([per]), separators[:-1] + 1])[rows.clamp(max=max(len(separators) - 1, 0))]
    base = torch.arange(len(real))
    place = torch.stack([(~overview).long(), rows, real - starts], 1)
    place[overview] = torch.stack([torch.zeros_like(base), base // side, base % side], 1)[overview]
    rest = place[~overview]
    grid = (2, int(rest[:, 1].max()) + 1, int(rest[:, 2].max()) + 1) if len(rest) else (1, side, side)
    return Layout(
        len(packed), real, separators, torch.where(overview, -1, rows),
        (grid[0], max(grid[1], side), max(grid[2], side)), place.float(), tiles, _single(packed[real]),
        lambda x: pack(inner, [x], [size], x.new_zeros(x.shape[-1]), **options)[0][real.to(x.device)],
    )  # fmt: skip


def pooled(inner: Any, frames: int) -> Layout:
    """Layout of LLaVA-OneVision's video: each frame scaled to half its side, one newline at the end."""
    side = side_of(inner)

    def arrange(x: Tensor) -> Tensor:
        with torch.no_grad():
            return inner.apply_pooling(x).flatten(0, 1)

    index = torch.arange(frames * side * side, dtype=torch.float64).reshape(frames, side * side, 1)
    made = arrange(torch.cat([index, index.square()], -1))
    half = math.isqrt(len(made) // frames)
    real = torch.arange(len(made))
    grid = (frames, half, half)
    return Layout(
        len(made) + 1, real, torch.tensor([len(made)]), torch.full_like(real, -1), grid, _raster(grid), frames,
        _single(made), arrange,
    )  # fmt: skip


def folded(vision: Any, grid: Grid) -> Layout:
    """Layout of Qwen-VL's image or video of `grid` patches (frames, rows, columns).

    `arrange` takes patches in the order in which the tower's blocks have them: groups of 2 x 2 by rows, or, in
    Qwen2.5-VL, groups by windows. A token has the mean of its group.
    """
    merge = vision.spatial_merge_size
    frames, rows, columns = grid[0], grid[1] // merge, grid[2] // merge
    order = window_order(vision, rows, columns)
    back = order.argsort()
    real = torch.arange(frames * rows * columns)

    def arrange(x: Tensor) -> Tensor:
        groups = x.reshape(frames, rows * columns, merge**2, -1).mean(2)
        return groups[:, back.to(x.device)].flatten(0, 1)

    tokens = (frames, rows, columns)
    single = order.argsort().repeat(frames) if merge == 1 else torch.full_like(real, -1)
    if merge == 1:
        single = single + torch.arange(frames).repeat_interleave(rows * columns) * (rows * columns)
    return Layout(
        len(real), real, real[:0], torch.full_like(real, -1), tokens, _raster(tokens), frames, single, arrange
    )


def unknown(tokens: int, grid: Grid | None = None) -> Layout:
    """Layout of a picture of which only the number of tokens is known, and perhaps their grid."""
    real = torch.arange(tokens)
    if grid is None or math.prod(grid) != tokens:
        grid = (1, 1, tokens)
    none = torch.full_like(real, -1)
    return Layout(tokens, real, real[:0], none, grid, _raster(grid), 0, none, lambda x: x)


def window_order(vision: Any, rows: int, columns: int) -> Tensor:
    """Order of the groups of a frame inside Qwen2.5-VL's tower: window by window. Elsewhere by rows. int64 [groups]."""
    index = torch.arange(rows * columns)
    if getattr(vision, "fullatt_block_indexes", None) is None:
        return index
    window = vision.window_size // vision.spatial_merge_size // vision.patch_size
    row, column = index // columns, index % columns
    which = (row // window) * columns + column // window
    return which.argsort(stable=True)


def pack(inner: Any, parts: Sequence[Tensor], sizes: Any, newline: Tensor, **options: Any) -> list[Tensor]:
    """Pack `parts` as the model does: for each image [tiles, patches, c] -> [tokens, c].

    Args:
        inner: the model that has `pack_image_features`.
        parts: what its tower and projector made of each image.
        sizes: height and width of each image before it was divided.
        newline: [c], what newline tokens hold.
        options: what the model gave this function beyond that; by default what its configuration says.
    """
    known = inspect.signature(inner.pack_image_features).parameters
    for name in ("vision_feature_select_strategy", "vision_aspect_ratio"):
        if name in known and options.get(name) is None:
            options[name] = getattr(inner.config, name)
    with torch.no_grad():
        packed, _ = inner.pack_image_features(list(parts), sizes, image_newline=newline, **options)
    return list(packed)


def side_of(inner: Any) -> int:
    """Patches along a side of a tower of fixed size."""
    vision = inner.config.vision_config
    return int(vision.image_size // vision.patch_size)


def _raster(grid: Grid) -> Tensor:
    axes = [torch.arange(n, dtype=torch.float32) for n in grid]
    return torch.cartesian_prod(*axes)


def _single(moments: Tensor) -> Tensor:
    """Number of the patch that each token is, of mean and mean square of the numbers that went into it; -1: several."""
    mean, square = moments[:, 0], moments[:, 1]
    alone = (square - mean.square()).abs() < 1e-3
    return torch.where(alone, mean.round(), -1).long()
