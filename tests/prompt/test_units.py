"""Units cover a text without gaps and never split a word; what is left joins without fusing lines."""

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tcw.prompt.units import UNITS, Layout, body, contained, cut, strength

TEXTS = st.text(st.sampled_from(list("ab.Z9!?,-\"' \t\n\r\u3000章の。カナー“”（）é\u200d👩")), max_size=80)


def shown(text: str, unit: str = "word") -> list[str]:
    return [text[a:b] for a, b in cut(text, unit)]


@given(st.one_of(TEXTS, st.text(max_size=60)), st.sampled_from(UNITS))
def test_units_cover_the_text(text: str, unit: str) -> None:
    spans = cut(text, unit)
    assert "".join(text[a:b] for a, b in spans) == text
    assert all(a < b for a, b in spans)
    assert all(text[a:b].strip() for a, b in spans) or not text.strip()


@given(st.one_of(TEXTS, st.text(max_size=60)))
def test_every_unit_is_made_of_whole_words(text: str) -> None:
    words = {start for start, _ in cut(text)}
    for unit in UNITS:
        assert {start for start, _ in cut(text, unit)} <= words


@given(st.text(st.characters(codec="utf-8", exclude_categories=["Lo", "Cs"]), max_size=60))
def test_without_asian_scripts_words_are_what_white_space_parts(text: str) -> None:
    text = re.sub("[\u2e80-\u30ff\uf900-\uffef\U00020000-\U0003ffff]", " ", text)
    assert [part.strip() for part in shown(text) if part.strip()] == text.split()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Hello  world,\n\nnew. \n", ["Hello", "  world,", "\n\nnew. \n"]),
        ("他说“你好”。（走）", ["他", "说", "“你", "好”。", "（走）"]),
        ("コンピュータはpython3です", ["コンピュータ", "は", "python3で", "す"]),
        ("第3章5节", ["第", "3章", "5节"]),
        ("don't e-mail a_b", ["don't", " e-mail", " a_b"]),
        ("한국어 문장", ["한국어", " 문장"]),
        ("👨\u200d👩\u200d👧 x", ["👨\u200d👩\u200d👧", " x"]),
        (" \n ", [" \n "]),
        ("", []),
    ],
)
def test_words(text: str, words: list[str]) -> None:
    assert shown(text) == words


def test_sentences() -> None:
    text = (
        'Dr. Smith met J. Doe, e.g. at No. 5. "Really?" she asked.  It was 3.5 m... and more. '
        "Wrapped\nline here\n- an item\n- another\n\nA heading\n\nLast"
    )
    assert shown(text, "sentence") == [
        "Dr. Smith met J. Doe, e.g. at No. 5.", ' "Really?" she asked.', "  It was 3.5 m... and more.",
        " Wrapped\nline here", "\n- an item", "\n- another", "\n\nA heading", "\n\nLast",
    ]  # fmt: skip
    assert shown("我来。你去！「好？」他", "sentence") == ["我来。", "你去！", "「好？」", "他"]


def test_lines_and_paragraphs() -> None:
    text = "a b\n  c\r\n\r\nd \n \t\ne f\n"
    assert shown(text, "line") == ["a b", "\n  c", "\r\n\r\nd", " \n \t\ne f\n"]
    assert shown(text, "paragraph") == ["a b\n  c", "\r\n\r\nd", " \n \t\ne f\n"]


def test_body_and_strength() -> None:
    assert body(" \n x", 0, 4) == 3
    assert body("  ", 0, 2) == 2
    assert [strength(s) for s in ("", " \t", "\n", "\r\n", "\r", "\n \n", "\n\n\n")] == [0, 0, 1, 1, 1, 2, 2]


# ---- joining


def joined(text: str, kept: list[int], **options: str) -> str:
    return Layout(text, cut(text), **options).join(kept)


@given(st.one_of(TEXTS, st.text(max_size=60)), st.sampled_from(UNITS), st.integers(0, 2**30))
def test_what_is_left_is_spans_in_order(text: str, unit: str, choice: int) -> None:
    spans = cut(text, unit)
    kept = [i for i in range(len(spans)) if choice >> (i % 30) & 1]
    layout = Layout(text, spans)
    pieces = layout.pieces(kept)
    found = [piece for piece in pieces if not isinstance(piece, str)]
    assert found == pieces
    assert all(0 <= a < b <= len(text) for a, b in found)
    assert all(b < c for (_, b), (c, _) in itertools.pairwise(found))
    # slow and obvious: the words of the output are the words of the units that stay
    assert "".join("".join(text[a:b] for a, b in found).split()) == "".join(
        "".join(text[slice(*spans[i])].split()) for i in kept
    )
    assert layout.join(range(len(spans))) == text


def test_a_gap_keeps_its_strongest_break() -> None:
    text = "one two three\n\nfour five\nSix seven"
    assert joined(text, [0, 4]) == "one\n\nfive"
    assert joined(text, [3, 6]) == "four\nseven"
    assert joined(text, [3, 5]) == "four\nSix"
    assert joined(text, [0, 2]) == "one three"
    assert joined(text, [1, 3, 6]) == "two\n\nfour\nseven"
    assert joined("a\n\nb c\n\n\n\nd e", [0, 2, 4]) == "a\n\nc\n\n\n\ne"


def test_two_lines_never_become_one() -> None:
    log = "ERROR disk full\nINFO disk fine\n  detail two"
    for size in (2, 3, 4):
        for kept in itertools.combinations(range(8), size):
            lines = [{0: 0, 1: 0, 2: 0, 3: 1, 4: 1, 5: 1, 6: 2, 7: 2}[i] for i in kept]
            assert len(joined(log, list(kept)).splitlines()) == len(set(lines))


def test_a_line_end_that_wraps_prose_is_a_space() -> None:
    first = "It was the best of times, it was the worst of"
    assert joined(f"{first}\ntimes, it was", [0, 13]) == "It was"
    assert joined(f"{first}\nTimes, it was", [0, 12]) == "It\nit"
    assert joined("short\nline it was", [0, 3]) == "short\nwas"


def test_start_loses_white_space_but_not_indentation() -> None:
    assert joined("a b", [1]) == "b"
    assert joined("a\n\n    b", [1]) == "    b"
    assert joined("  a b", [0]) == "  a"
    assert joined("def f():\n    return 1", [2, 3]) == "    return 1"


def test_held_white_space_stays() -> None:
    text = "a  b  c"
    assert Layout(text, cut(text), [(1, 4)]).join([1]) == "  b"
    assert Layout(text, cut(text), [(2, 4)]).join([1, 2]) == " b  c"


@pytest.mark.parametrize(
    ("kept", "found"),
    [
        ([0, 1, 2, 3, 4], "a b\nC d\n\ne"),
        ([0, 4], "a\n\n[3]\n\ne"),
        ([1, 2], "[1] b\nC [2]"),
        ([], "[5]"),
        ([0], "a [4]"),
    ],
)
def test_elision_marks_count_what_is_gone(kept: list[int], found: str) -> None:
    assert joined("a b\nC d\n\ne", kept, elide="[{n}]") == found


def test_numbers_never_fuse() -> None:
    text = "第3章第5节GPT模型BERT模型"
    spans = cut(text)
    for size in range(len(spans) + 1):
        for kept in itertools.combinations(range(len(spans)), size):
            left = Layout(text, spans).join(kept)
            assert set(re.findall(r"[A-Z]+|\d+", left)) <= {"3", "5", "GPT", "BERT"}


@given(st.lists(st.integers(0, 30), max_size=8, unique=True), st.tuples(st.integers(0, 30), st.integers(1, 8)))
def test_contained(marks: list[int], inner: tuple[int, int]) -> None:
    edges = sorted(marks)[: len(marks) // 2 * 2]
    outer = list(zip(edges[::2], edges[1::2], strict=True))
    span = (inner[0], inner[0] + inner[1])
    assert contained([span], outer) == [any(a <= span[0] and span[1] <= b for a, b in outer)]
