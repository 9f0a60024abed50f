"""The map leads back to the text, and the page shows all of it, escaped, with nothing fetched."""

import hashlib
import html
import re
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tcw.prompt import report
from tcw.prompt.engine import Result, Settings, compress


def made(text: str, rate: float = 0.5, method: str = "random", elide: str | None = None) -> Result:
    how = Settings(protect=("numbers",), elide=elide, markup=False)
    return compress(text, method, rate=rate, tokenizer=lambda t: len(t.split()), settings=how)


TEXT = 'a <b> & "c"\n\nsecond 42 line é 👩 ' + "word " * 40


@pytest.mark.parametrize("elide", [None, "[{n}]"])
def test_the_map_leads_back(elide: str | None) -> None:
    result = made(TEXT, elide=elide)
    found = report.span_map(result)
    assert found["original"] == {"sha256": hashlib.sha256(TEXT.encode()).hexdigest(), "characters": len(TEXT)}
    pieces = [piece if isinstance(piece, str) else TEXT[slice(*piece)] for piece in found["pieces"]]
    assert "".join(pieces) == result.text
    assert found["spans"] == [piece for piece in found["pieces"] if not isinstance(piece, str)]


class Page(HTMLParser):
    """The text of a page: what is left, what is struck out, what is marked as protected."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.open = False, ""
        self.text: dict[str, str] = {"span": "", "del": "", "protected": ""}
        self.all = ""
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self.fetched += [value for key, value in attrs if key in ("src", "href", "action", "data") and value]
        if tag == "div" and named.get("class") == "text":
            self.inside = True
        if tag in ("span", "del"):
            self.open = tag
            self.protected = "p" in (named.get("class") or "").split()

    def handle_endtag(self, tag: str) -> None:
        self.open = ""
        self.inside = self.inside and tag != "div"

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.all += data
            if self.open:
                self.text[self.open] += data
                self.text["protected"] += data if self.protected else ""


def page(result: Result) -> tuple[Page, str]:
    text = report.render(result)
    parsed = Page()
    parsed.feed(text)
    return parsed, text


@settings(max_examples=25)
@given(st.text(st.sampled_from(list("ab <>&\"'9\n{}%é")), min_size=1, max_size=60))
def test_the_page_shows_the_whole_text_once(text: str) -> None:
    text = text.replace("\r", "")
    if not text.strip():
        return
    parsed, _ = page(made(text, rate=1))
    assert parsed.all == text
    assert parsed.text["del"] == ""


def test_the_page_strikes_out_and_marks() -> None:
    result = made(TEXT)
    parsed, text = page(result)
    kept = {unit for unit, stays in zip(result.units, result.kept, strict=True) if stays}
    assert parsed.all == TEXT
    assert parsed.text["span"] == "".join(TEXT[u.start : u.end] for u in result.units if u in kept)
    assert parsed.text["del"] == "".join(TEXT[u.start : u.end] for u in result.units if u not in kept)
    assert parsed.text["protected"].strip() == "42"
    assert html.escape("<b>") in text
    assert (parsed.fetched, re.findall(r"url\(|@import|<script", text)) == ([], [])
    assert f"{result.before} → {result.after} tokens" in text


def test_shades_follow_the_scores() -> None:
    _, text = page(made("a b c d e f g h i j", method="truncate"))
    shades = [
        int(s)
        for s in re.findall(r'<(?:span|del) class="s(\d)">[^<]*</(?:span|del)>', text.split('<div class="text">')[1])
    ]
    assert shades == sorted(shades, reverse=True)
    assert (shades[0], shades[-1]) == (8, 1)


def test_the_drawing_shows_where_text_was_kept() -> None:
    result = made("word " * 600, method="truncate")
    heights = [float(h) for h in re.findall(r'class="kept"[^>]*height="([\d.]+)"', report.render(result))]
    assert len(heights) == 60
    assert heights[:29] == [100.0] * 29
    assert heights[31:] == [0.0] * 29


def test_fidelity_needs_the_whole_of_a_number() -> None:
    text = "12345 and v2 not"
    assert report.fidelity(text, [(0, 3), (9, 16)]) == {
        "extractive": True, "numbers_recall": 0.5, "identifiers_recall": 1.0, "negation_recall": 1.0,
    }  # fmt: skip
    assert report.fidelity("plain", [(0, 5)])["numbers_recall"] is None
