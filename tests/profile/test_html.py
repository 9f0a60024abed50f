"""The page is well-formed, self-contained, shows the profile's numbers, and escapes what comes from a model."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tcw.profile import Profile, profile
from tcw.profile.html import WIDTH, _ticks, render
from tcw.source import open_source
from tcw.units import show_bytes

VOID = {"meta", "br", "link", "img", "rect", "line", "polyline"}


class _Page(HTMLParser):
    """Checks that tags close in order, and gathers tags with their attributes and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID or tag == self.open[-1]:
            assert self.open.pop() == tag
        elif self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def tiny(tiny_llama: Path) -> Profile:
    return profile(open_source(tiny_llama), device="cpu", latency=False, context=100)


def test_page_is_well_formed_and_shows_the_numbers(tiny: Profile) -> None:
    page = _Page(render(tiny))
    facts = tiny.to_json()
    for text in (facts["model"], show_bytes(facts["weights"]["bytes"]), "dfloat11", "Not measured: not asked for"):
        assert text in page.text
    for row in facts["methods"]:
        assert show_bytes(row["bytes"]) in page.text


def test_nothing_is_fetched_and_nothing_is_run(tiny: Profile) -> None:
    text = render(tiny)
    page = _Page(text)
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in page.tags}
    assert not any({"src", "href"} & set(attributes) for _, attributes in page.tags)
    assert "http" not in text
    assert "@import" not in text
    assert "url(" not in text


def test_both_colour_schemes_define_the_same_colours(tiny: Profile) -> None:
    text = render(tiny)
    light, dark = re.findall(r":root \{(.*?)\}", text, re.DOTALL)
    assert "prefers-color-scheme: dark" in text
    assert set(re.findall(r"--\w+(?=:)", light)) == set(re.findall(r"--\w+(?=:)", dark))
    assert set(re.findall(r"var\((--\w+)\)", text)) <= set(re.findall(r"--\w+(?=:)", light))


def test_what_a_model_says_is_escaped(tiny: Profile) -> None:
    text = render(replace(tiny, model="<script>alert(1)</script>", architecture='"><img src=x>'))
    assert "<script" not in text
    assert "<img" not in text
    assert "&lt;script&gt;" in text


def test_drawings_stay_in_their_boxes(tiny: Profile) -> None:
    for tag, attributes in _Page(render(tiny)).tags:
        if tag == "rect":
            x, width, y, height = (float(attributes[k]) for k in ("x", "width", "y", "height"))
            assert -0.5 <= x <= x + width <= WIDTH + 0.5
            assert 0 <= y <= y + height <= 260
        if tag == "polyline":
            points = [tuple(map(float, p.split(","))) for p in attributes["points"].split()]
            assert all(0 <= x <= WIDTH + 0.5 and 0 <= y <= 260 for x, y in points)


def test_free_memory_is_drawn_where_it_is_in_sight(tiny: Profile) -> None:
    assert "All of it lies below" in render(tiny)
    need = tiny.rows[0].budget.need(300)
    tight = replace(tiny, device=replace(tiny.device, free_bytes=need))
    page = _Page(render(tight))
    assert "The red line" in page.text


@pytest.mark.parametrize("top", [1e-9, 0.003, 0.28, 1.0, 7, 4096, 3.2e11])
def test_ticks_are_few_round_and_inside(top: float) -> None:
    values = [t["value"] for t in _ticks(top)]
    assert 2 <= len(values) <= 6
    assert values[0] == 0
    assert values[-1] <= top
