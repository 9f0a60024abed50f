import base64
import io
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tcw.errors import UsageError
from tcw.tokens.pictures import STYLE, fragment, outlines, page, write_overlay
from tcw.tokens.pictures import Cell as PictureCell
from tcw.tokens.plan import Plan
from tcw.tokens.trace import Trace

pillow = pytest.importorskip("PIL.Image")


class Panel(HTMLParser):
    """The panels of a page: the classes of their cells, their sizes, words and pictures."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.panels: list[dict[str, Any]] = []
        self.tags: Counter[str] = Counter()
        self.links: list[str] = []
        self.ids: list[str] = []
        self.images: dict[str, str] = {}
        self._inside = False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.tags[tag] += 1
        self.links += [values[name] for name in ("href", "src") if name in values]
        self.ids += [values["id"]] if "id" in values else []
        kinds = values.get("class", "").split()
        if tag == "svg":
            self._inside = values.get("role") == "img"
            if self._inside:
                box, words = values["viewbox"], values["aria-label"]
                self.panels.append({"box": box, "words": words, "cells": Counter(), "at": set(), "text": ""})
        elif tag == "image":
            self.images[values["id"]] = values["href"]
        elif self._inside and tag == "use":
            self.panels[-1]["picture"] = values["href"]
        elif self._inside and "cell" in kinds:
            self.panels[-1]["cells"][kinds[1]] += 1
            self.panels[-1]["at"].add(values["d"])
        elif self._inside and tag in ("circle", "text"):
            self.panels[-1]["cells"][tag] += 1

    handle_startendtag = handle_starttag


def trace(*plans: Plan, grid: tuple[int, int, int] = (1, 3, 4), names: tuple[str, ...] = ("input", "layer 2")) -> Trace:
    place = torch.stack(torch.meshgrid(*map(torch.arange, grid), indexing="ij"), -1).reshape(-1, 3).float()
    return Trace(0, 0, grid, place, list(zip(names, plans, strict=False)))


def picture(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)


def mixed() -> Plan:
    """Of 12 tokens 2 and 7 take in others, 4 stays alone and 5 are dropped."""
    assign = torch.tensor([-1, 0, 0, 0, 1, -1, 2, 2, -1, -1, -1, 2])
    return Plan.merging(torch.tensor([2, 4, 7]), assign, torch.ones(12))


def test_cells_are_what_the_plan_says() -> None:
    found = Panel(page([picture(30, 40)], [trace(Plan.dropping(torch.tensor([1, 5]), torch.ones(12)), mixed())]))
    plain, first, second = found.panels
    assert not plain["cells"]
    assert first["cells"] == {"kept": 2, "dropped": 10}
    assert second["cells"] == {"kept": 1, "head": 2, "merged": 4, "dropped": 5, "circle": 2, "text": 6}
    assert len(first["at"]) == len(second["at"]) == 12
    assert {one["box"] for one in found.panels} == {"0 0 4 3"}
    assert "1 stay as they are, 2 stay and take in others, 4 are merged into those, 5 are dropped" in second["words"]


def test_numbers_below_a_picture() -> None:
    text = page([picture(30, 40)], [trace(mixed())])
    assert "3 of 12 tokens left (25.0 %): 1 as they were, 2 that took in 4 others, 5 dropped" in text


def test_nothing_is_fetched_and_nothing_runs() -> None:
    text = page([picture(30, 40)] * 2, [trace(mixed())] * 2)
    found = Panel(text)
    assert all(link.startswith(("#", "data:image/jpeg;base64,")) for link in found.links)
    assert {link[1:] for link in found.links if link.startswith("#")} <= set(found.ids)
    assert len(set(found.ids)) == len(found.ids)
    assert not {"script", "link", "iframe"} & set(found.tags)
    assert "http" not in text.replace("http://www.w3.org", "")
    assert "url(" not in STYLE


def test_the_picture_is_the_image() -> None:
    pixels = picture(12, 16) // 64 * 64
    pixels[:] = pixels[:1, :1]
    (data,) = Panel(page([pixels], [trace(mixed())])).images.values()
    with pillow.open(io.BytesIO(base64.b64decode(data.partition(",")[2]))) as shown:
        assert shown.size == (16, 12)
        assert np.abs(np.asarray(shown).astype(int) - pixels).max() < 8


def test_frames_of_a_video_have_their_own_pictures_and_cells() -> None:
    plan = Plan.dropping(torch.tensor([0, 3, 12, 13, 14]), torch.ones(24))
    found = Panel(page([picture(4, 30, 40)], [trace(plan, grid=(2, 3, 4))]))
    assert [one["cells"] for one in found.panels[2:]] == [{"kept": 2, "dropped": 10}, {"kept": 3, "dropped": 9}]
    assert len(set(found.images.values())) == 2
    assert found.panels[2]["picture"] != found.panels[3]["picture"]
    assert "frame 2 of 2" in found.panels[3]["words"]


def test_crops_have_rows_and_columns_of_their_own() -> None:
    overview = [(0, r, c) for r in range(2) for c in range(2)]
    crops = [(1, r, c) for r in range(3) for c in range(6)]
    cut = ("input", Plan.everything(torch.ones(22)))
    one = Trace(0, 0, (2, 3, 6), torch.tensor(overview + crops).float(), [cut])
    found = Panel(page([picture(30, 60)], [one]))
    assert [panel["box"] for panel in found.panels] == ["0 0 2 2", "0 0 6 3"] * 2
    assert [sum(panel["cells"].values()) for panel in found.panels] == [0, 0, 4, 18]


def test_an_image_without_a_grid_has_cells_and_no_picture() -> None:
    plan = Plan.dropping(torch.arange(10), torch.ones(70))
    found = Panel(page([picture(30, 40)], [trace(plan, grid=(1, 1, 70))]))
    assert found.panels[1]["box"] == "0 0 32 3"
    assert found.panels[1]["cells"] == {"kept": 10, "dropped": 60}
    assert "picture" not in found.panels[1]


def test_outlines_go_around_groups() -> None:
    cells = [PictureCell(0, 0, "head", 1), PictureCell(0, 1, "merged", 1), PictureCell(1, 0, "kept", 0)]
    sides = set(outlines(cells)[1].replace("M", " M").split(" M")[1:])
    assert sides == {"0 0h1", "0 1h1", "0 0v1", "1 0h1", "1 1h1", "2 0v1"}


def test_many_columns_have_no_numbers_but_discs() -> None:
    keep, assign = torch.tensor([0]), torch.zeros(60, dtype=torch.int64)
    found = Panel(page([picture(20, 300)], [trace(Plan.merging(keep, assign, torch.ones(60)), grid=(1, 2, 30))]))
    assert found.panels[1]["cells"] == {"head": 1, "merged": 59, "circle": 1}


def test_everything_is_escaped(tmp_path: Path) -> None:
    bad = "<script>&\"'"
    one = trace(mixed(), names=(bad,))
    write_overlay(tmp_path / "page.html", [torch.from_numpy(picture(30, 40))], [one], bad, [bad], [bad])
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert bad not in text
    assert text.count("&lt;script&gt;&amp;") >= 5
    assert not Panel(text).tags["script"]


def test_two_fragments_in_one_page_share_no_ids() -> None:
    both = [fragment([picture(30, 40)], [trace(mixed())], prefix=prefix) for prefix in ("a", "b")]
    first, second = (set(Panel(text).ids) for text in both)
    assert first
    assert not first & second


@pytest.mark.parametrize(
    "image", [picture(30, 40).astype(np.float32), picture(30, 40)[..., 0], np.zeros((0, 4, 3), np.uint8)]
)
def test_what_is_no_picture(image: np.ndarray) -> None:
    with pytest.raises(ValueError, match="uint8"):
        page([image], [trace(mixed())])


def test_as_many_images_as_traces() -> None:
    with pytest.raises(ValueError, match="1 traces"):
        page([], [trace(mixed())])


def test_without_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(UsageError, match="Pillow"):
        page([picture(30, 40)], [trace(mixed())])
