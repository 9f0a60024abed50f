"""Layouts against loops over the patches of numbered pictures."""

import math

import pytest
import torch
from transformers.vision_utils import get_vision_window_index

from tcw.tokens import pack
from tcw.tokens.shape import inner_of

from .models import PATCH, SIDE, VLMS, llava_next, llava_onevision

G = SIDE // PATCH  # patches along a side of a tile
SIZES = [(1, 500), (50, 70), (48, 96), (96, 96), (40, 40), (30, 200), (133, 41), (1, 1), (500, 333)]


def unpadded(size: tuple[int, int], resolution: tuple[int, int]) -> tuple[range, range]:
    """Rows and columns of patches of all tiles together that show the picture."""
    high, wide = resolution[0] // PATCH, resolution[1] // PATCH
    if size[1] / size[0] > wide / high:
        top = (high - int(round(size[0] * wide / size[1], 7))) // 2
        return range(top, high - top), range(wide)
    left = (wide - int(round(size[1] * high / size[0], 7))) // 2
    return range(high), range(left, wide - left)


def best(size: tuple[int, int]) -> tuple[int, int]:
    """The resolution that shows most of the picture's own pixels, and of those the one with the least left over."""

    def merit(resolution: list[int]) -> tuple[int, int]:
        scale = min(resolution[0] / size[0], resolution[1] / size[1])
        shown = min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])
        return shown, -(resolution[0] * resolution[1] - shown)

    return tuple(max(([48, 96], [96, 48], [96, 96], [48, 144], [144, 48]), key=merit))  # type: ignore[return-value]


@pytest.mark.parametrize("make", [llava_next, llava_onevision])
@pytest.mark.parametrize("size", SIZES)
def test_tiles_against_a_loop(make, size):
    resolution = best(size)
    high, wide = resolution[0] // SIDE, resolution[1] // SIDE
    layout = pack.tiled(inner_of(make()), 1 + high * wide, size)
    expected = [(0, r, c, r * G + c, -1) for r in range(G) for c in range(G)]
    rows, columns = unpadded(size, resolution)
    separators, token = [], G * G
    for r, row in enumerate(rows):
        for c, column in enumerate(columns):
            tile = 1 + (row // G) * wide + column // G
            expected.append((1, r, c, tile * G * G + (row % G) * G + column % G, r))
            token += 1
        separators.append(token)
        token += 1
    got = zip(layout.place.long().tolist(), layout.patches.tolist(), layout.closes.tolist(), strict=True)
    assert [(*place, patch, closes) for place, patch, closes in got] == expected
    assert layout.separators.tolist() == separators
    assert layout.tokens == token
    assert sorted(layout.real.tolist() + separators) == list(range(token))
    tiled = len(rows) * len(columns) > 0
    assert layout.grid == ((2, max(G, len(rows)), max(G, len(columns))) if tiled else (1, G, G))
    x = torch.randn(1 + high * wide, G * G, 3)
    assert torch.equal(layout.arrange(x), x.flatten(0, 1)[[patch for *_, patch, _ in expected]])


def test_one_tile_has_one_newline_for_the_whole_image():
    layout = pack.tiled(inner_of(llava_onevision()), 1, (30, 90))
    assert (layout.tokens, layout.separators.tolist(), layout.grid) == (G * G + 1, [G * G], (1, G, G))
    assert layout.closes.eq(-1).all()
    assert layout.patches.tolist() == list(range(G * G))


def test_scaled_down_tiles_are_no_single_patches():
    inner = inner_of(llava_onevision(vision_aspect_ratio="anyres_max_1"))
    layout = pack.tiled(inner, 5, (96, 96))
    ratio = math.sqrt(4)
    side = int(2 * G // ratio)
    assert layout.grid == (2, side, side)
    assert layout.patches[: G * G].tolist() == list(range(G * G))
    assert layout.patches[G * G :].eq(-1).all()
    x = torch.randn(5, G * G, 3)
    whole = x[1:].reshape(2, 2, G, G, 3).permute(0, 2, 1, 3, 4).reshape(2 * G, 2 * G, 3)
    for token, (frame, row, column) in enumerate(layout.place.long().tolist()):
        if frame:
            four = whole[2 * row : 2 * row + 2, 2 * column : 2 * column + 2].reshape(4, 3)
            torch.testing.assert_close(layout.arrange(x)[token], four.mean(0))


def test_what_the_model_says_goes_before_its_configuration():
    inner = inner_of(llava_onevision())
    one, nine = (pack.tiled(inner, 5, (96, 96), vision_aspect_ratio=f"anyres_max_{n}").tokens for n in (1, 9))
    assert one == G * G + G * (G + 1)
    assert nine == G * G + 2 * G * (2 * G + 1)


def test_pooled_frames_are_means_of_four():
    layout = pack.pooled(inner_of(llava_onevision()), 3)
    x = torch.randn(3, G * G, 2)
    got = layout.arrange(x)
    token = 0
    for frame in range(3):
        for row in range(G // 2):
            for column in range(G // 2):
                four = [x[frame, (2 * row + i) * G + 2 * column + j] for i in (0, 1) for j in (0, 1)]
                torch.testing.assert_close(got[token], sum(four) / 4)
                assert layout.place[token].tolist() == [frame, row, column]
                token += 1
    assert (layout.tokens, layout.separators.tolist()) == (token + 1, [token])
    assert layout.grid == (3, G // 2, G // 2)
    assert layout.patches.eq(-1).all()


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("grid", [(1, 6, 8), (3, 4, 10), (1, 2, 2), (2, 10, 6)])
def test_folded_patches_are_means_of_four_in_raster_order(family, grid):
    vision = inner_of(VLMS[family]()).config.vision_config
    layout = pack.folded(vision, grid)
    frames, rows, columns = grid[0], grid[1] // 2, grid[2] // 2
    windows = get_vision_window_index(torch.tensor([[1, *grid[1:]]]), 2, 32, PATCH)[0].tolist()
    order = windows if family == "qwen2_5_vl" else range(rows * columns)
    x = torch.randn(frames, rows * columns * 4, 3)
    got = layout.arrange(x)
    for frame in range(frames):
        for at, group in enumerate(order):
            token = frame * rows * columns + group
            torch.testing.assert_close(got[token], x[frame, 4 * at : 4 * at + 4].mean(0))
            assert layout.place[token].tolist() == [frame, group // columns, group % columns]
    assert layout.grid == (frames, rows, columns)
    assert layout.patches.eq(-1).all()
    assert layout.tokens == frames * rows * columns


def test_unmerged_patches_are_single():
    vision = inner_of(VLMS["qwen2_5_vl"]()).config.vision_config
    vision.spatial_merge_size, vision.window_size = 1, 2 * PATCH
    layout = pack.folded(vision, (2, 3, 5))
    x = torch.randn(2, 15, 3)
    assert torch.equal(layout.arrange(x), x.flatten(0, 1)[layout.patches])
    assert layout.patches.sort().values.tolist() == list(range(30))


@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (3, 4), (5, 7), (8, 2), (7, 7)])
def test_window_order_is_that_of_the_model(shape):
    vision = inner_of(VLMS["qwen2_5_vl"](vision={"window_size": 48})).config.vision_config
    expected = get_vision_window_index(torch.tensor([[1, shape[0] * 2, shape[1] * 2]]), 2, 48, PATCH)[0]
    assert torch.equal(pack.window_order(vision, *shape), expected)


def test_square_image_and_its_class_token():
    inner = inner_of(VLMS["llava"]())
    plain, full = pack.fixed(inner, G * G), pack.fixed(inner, G * G + 1)
    assert plain.separators.tolist() == []
    assert full.separators.tolist() == [0]
    assert full.real.tolist() == list(range(1, G * G + 1))
    x = torch.randn(1, G * G, 3)
    for layout in (plain, full):
        assert torch.equal(layout.arrange(x), x[0])
        assert layout.patches.tolist() == list(range(G * G))
        assert layout.place[7].tolist() == [0, 1, 1]


def test_unknown_layouts_have_a_grid_only_where_it_fits():
    assert pack.unknown(6).grid == (1, 1, 6)
    assert pack.unknown(6, (1, 2, 3)).grid == (1, 2, 3)
    assert pack.unknown(5, (1, 2, 3)).grid == (1, 1, 5)
    assert pack.unknown(6, (1, 2, 3)).place[4].tolist() == [0, 1, 1]


def test_how_families_make_tokens():
    assert {name: pack.packing_of(inner_of(make())) for name, make in VLMS.items()} == {
        "llava": "fixed", "llava_next": "tiles", "llava_onevision": "tiles",
        "qwen2_vl": "patches", "qwen2_5_vl": "patches", "qwen3_vl": "patches",
    }  # fmt: skip
