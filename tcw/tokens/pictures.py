"""What became of an image's tokens, drawn over the image: one self-contained HTML page, no script, nothing fetched.

Of each image and stage there is a panel: tokens that were dropped are dark and hatched, tokens that were merged are
tinted and outlined by group, and the one that stands for a group has a disc with the group's number. What stays as it
was is clear. A video is a strip of frames. Geometry is worked out here, one unit a token; pictures.html.j2 draws.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import jinja2
import numpy as np
import torch
from markupsafe import Markup
from numpy.typing import NDArray
from torch import Tensor

from tcw.errors import UsageError
from tcw.tokens.plan import Plan
from tcw.tokens.trace import Trace

Pixels: TypeAlias = "NDArray[np.uint8] | Tensor"
"""A picture [height, width, 3] or a video [frames, height, width, 3], uint8."""
_TEMPLATE = Path(__file__).with_name("pictures.html.j2")
_WIDE = 448  # pixels that a picture keeps at its longer side
_WRAP = 32  # tokens in a row, of an image that has no grid
_NUMBERED = 24  # columns up to which every merged token says its group
_GOLDEN = 137.508  # degrees between the hues of neighbouring groups


@dataclass(frozen=True)
class Cell:
    """One token of one panel: where it is and what became of it.

    Attributes:
        row, column: in its frame.
        fate: "kept" as it was, "head" of a group, "merged" into one, or "dropped".
        group: number of its group, from 1; 0: it is in none.
    """

    row: int
    column: int
    fate: str
    group: int


@dataclass(frozen=True)
class Place:
    """Rows and columns of the frames of one image: int64 [N] each, and what a frame measures."""

    frame: list[int]
    row: list[int]
    column: list[int]
    size: dict[int, tuple[int, int]]
    shown: bool

    @classmethod
    def of(cls, trace: Trace) -> "Place":
        """Where tokens are. Without a grid they are drawn in rows, with no picture behind them."""
        frame, row, column = (trace.place[:, i].floor().long().tolist() for i in range(3))
        shown = trace.grid[1] > 1 or trace.grid[2] <= _WRAP
        if not shown:
            row, column = [c // _WRAP for c in column], [c % _WRAP for c in column]
        size: dict[int, tuple[int, int]] = {}
        for f, r, c in zip(frame, row, column, strict=True):
            rows, columns = size.get(f, (1, 1))
            size[f] = max(rows, r + 1), max(columns, c + 1)
        return cls(frame, row, column, dict(sorted(size.items())), shown)


def fates(plan: Plan) -> list[tuple[str, int]]:
    """What becomes of each token under a plan, and the number of its group: N of (fate, group), as in `Cell`."""
    counts = torch.bincount(plan.assign[plan.assign >= 0], minlength=plan.kept).tolist()
    number = {k: i for i, k in enumerate((k for k, count in enumerate(counts) if count > 1), 1)}
    heads = set(plan.keep.tolist())
    found = []
    for token, k in enumerate(plan.assign.tolist()):
        if k < 0:
            found.append(("dropped", 0))
        elif k not in number:
            found.append(("kept", 0))
        else:
            found.append(("head" if token in heads else "merged", number[k]))
    return found


def page(
    images: Sequence[Pixels],
    traces: Sequence[Trace],
    title: str = "Visual tokens",
    notes: Sequence[str] = (),
    names: Sequence[str] = (),
) -> str:
    """A whole HTML page.

    Args:
        images: one for each trace: uint8 [height, width, 3], of a video [frames, height, width, 3].
        traces: what became of them (`Attached.traces`).
        title: the page's heading.
        notes: sentences below it (`Attached.notes`).
        names: what to call the images; else their sample and number.

    Raises:
        UsageError: Pillow is not installed.
        ValueError: images do not fit the traces, or are no uint8 pictures.
    """
    body = fragment(images, traces, names=names)
    return str(_template().page(title, notes, Markup(body)))


def write_overlay(
    path: str | Path,
    images: Sequence[Pixels],
    traces: Sequence[Trace],
    title: str = "Visual tokens",
    notes: Sequence[str] = (),
    names: Sequence[str] = (),
) -> None:
    """Write `page` to a file."""
    Path(path).write_text(page(images, traces, title, notes, names), encoding="utf-8")


def fragment(images: Sequence[Pixels], traces: Sequence[Trace], prefix: str = "t", names: Sequence[str] = ()) -> str:
    """The images for another page, which needs `STYLE` too: a section for each; ids start with `prefix`."""
    if len(images) != len(traces) or (names and len(names) != len(traces)):
        raise ValueError(f"{len(traces)} traces need as many images and names, got {len(images)} and {len(names)}")
    shown = [
        _section(image, trace, f"{prefix}{i}", names[i] if names else "")
        for i, (image, trace) in enumerate(zip(images, traces, strict=True))
    ]
    return str(_template().fragment(shown, prefix))


def _template() -> Any:
    """The macros of pictures.html.j2."""
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["hue"] = lambda group: f"{group * _GOLDEN % 360:.0f}"
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).module


def _section(image: Pixels, trace: Trace, prefix: str, name: str) -> dict[str, Any]:
    """All that is drawn of one image."""
    place = Place.of(trace)
    frames = _frames(image, len(place.size))
    count = len(place.size)
    size = " + ".join(f"{rows} × {columns}" for rows, columns in dict.fromkeys(place.size.values()))
    name = name or f"Sample {trace.sample + 1}, {'video' if _is_video(image) else 'image'} {trace.number + 1}"
    return {
        "name": name,
        "size": f"{trace.original} tokens" + (f", {size}" if place.shown else "") + (f", {count} frames" * (count > 1)),
        "pictures": [{"id": f"{prefix}p{i}", "data": data} for i, (data, _) in enumerate(frames)],
        "plain": _panels(place, None, frames, prefix, f"{name}, as it was"),
        "stages": [
            {
                "name": stage,
                "panels": _panels(place, plan, frames, prefix, f"{name} after {stage}"),
                "words": numbers(plan),
            }
            for stage, plan in trace.cuts
        ],
    }


def numbers(plan: Plan) -> str:
    """How many tokens of one image are left, took in others, went into those and are gone, in words."""
    found = [fate for fate, _ in fates(plan)]
    kept, head, merged, dropped = (found.count(fate) for fate in ("kept", "head", "merged", "dropped"))
    parts = [f"{kept} as they were"] * (kept > 0)
    parts += [f"{head} that took in {merged} others"] * (head > 0) + [f"{dropped} dropped"] * (dropped > 0)
    share = 100 * plan.kept / max(1, len(found))
    return f"{plan.kept} of {len(found)} tokens left ({share:.1f} %): {', '.join(parts)}"


def _panels(
    place: Place, plan: Plan | None, frames: list[tuple[str, float]], prefix: str, words: str
) -> list[dict[str, Any]]:
    """One panel a frame: what its picture is, its size, and the cells on it."""
    became = fates(plan) if plan is not None else []
    panels = []
    for i, (f, (rows, columns)) in enumerate(place.size.items()):
        cells = [Cell(place.row[t], place.column[t], *became[t]) for t in range(len(became)) if place.frame[t] == f]
        panels.append(
            {
                "picture": f"{prefix}p{i}" if place.shown else "", "rows": rows, "columns": columns, "cells": cells,
                "ratio": frames[i][1] if place.shown else columns / rows, "numbered": columns <= _NUMBERED,
                "edges": outlines(cells), "alt": words + _alt(cells, i, len(place.size)),
            }
        )  # fmt: skip
    return panels


def _alt(cells: list[Cell], frame: int, frames: int) -> str:
    """The panel in words."""
    where = f", frame {frame + 1} of {frames}" if frames > 1 else ""
    if not cells:
        return where
    fate = [cell.fate for cell in cells]
    return (
        f"{where}: of {len(cells)} tokens {fate.count('kept')} stay as they are, {fate.count('head')} stay and take in "
        f"others, {fate.count('merged')} are merged into those, {fate.count('dropped')} are dropped"
    )


def outlines(cells: list[Cell]) -> dict[int, str]:
    """For each group the borders of its cells to what is not in it, as an SVG path."""
    group = {(cell.row, cell.column): cell.group for cell in cells}
    paths: dict[int, list[str]] = {}
    for cell in cells:
        if not cell.group:
            continue
        r, c = cell.row, cell.column
        sides = (
            ((r - 1, c), f"M{c} {r}h1"), ((r + 1, c), f"M{c} {r + 1}h1"),
            ((r, c - 1), f"M{c} {r}v1"), ((r, c + 1), f"M{c + 1} {r}v1"),
        )  # fmt: skip
        paths.setdefault(cell.group, []).extend(path for at, path in sides if group.get(at) != cell.group)
    return {number: "".join(sides) for number, sides in sorted(paths.items())}


def _is_video(image: Pixels) -> bool:
    return image.ndim == 4


def _frames(image: Pixels, count: int) -> list[tuple[str, float]]:
    """A picture for each of `count` frames as a data URL, and its width over its height.

    Of a video that has more frames than its tokens have, the first that a token covers; a single image serves all.
    """
    pixels = image.cpu().numpy() if isinstance(image, Tensor) else np.asarray(image)
    if pixels.dtype != np.uint8 or pixels.ndim not in (3, 4) or pixels.shape[-1] != 3 or 0 in pixels.shape:
        raise ValueError(f"a picture is uint8 [height, width, 3], got {pixels.dtype} {list(pixels.shape)}")
    if pixels.ndim == 3:
        return [(_jpeg(pixels), pixels.shape[1] / pixels.shape[0])] * count
    ratio = pixels.shape[2] / pixels.shape[1]
    return [(_jpeg(pixels[i * len(pixels) // count]), ratio) for i in range(count)]


def _jpeg(pixels: NDArray[np.uint8]) -> str:
    try:
        from PIL import Image
    except ImportError:
        raise UsageError("pictures of tokens need Pillow, and it is not installed", "pip install pillow") from None
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    picture.thumbnail((_WIDE, _WIDE))
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()


STYLE = str(_template().style())
