"""Presets find what they name, marks are read or refused, bad expressions are named, and nothing takes for ever."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tcw.errors import UsageError
from tcw.prompt import protect
from tcw.prompt.protect import PRESETS


def found(name: str, text: str) -> list[str]:
    return [text[a:b] for a, b in protect.find(text, [name]).spans]


@pytest.mark.parametrize(
    ("name", "text", "spans"),
    [
        ("numbers", "3.5% of $1,200 on 2024-01-02 at 12:30, v2 -4, 35 %",
         ["3.5%", "$1,200", "2024-01-02", "12:30", "2", "-4", "35 %"]),
        ("urls", "see https://a.b/c?d=1 or www.x.org, mail a.b@c.de",
         ["https://a.b/c?d=1", "www.x.org,", "a.b@c.de"]),
        ("paths", r"./a/b.py ~/x src/main.rs C:\Tmp\f and/or /etc/hosts conf.toml e.g. 1/2 <b>x</b>",
         ["./a/b.py", "~/x", "src/main.rs", "C:\\Tmp\\f", "/etc/hosts", "conf.toml"]),
        ("code", "a `b c` d\n```py\nx\n```\ne ``f ` g`` `h\n`", ["`b c`", "```py\nx\n```"]),
        ("code", "a\n~~~\nnever closed\nx", ["~~~\nnever closed\nx"]),
        ("quotes", 'he said "yes, no" and “maybe” «oui» 「は」 5" ', ['"yes, no"', "“maybe”", "«oui»", "「は」"]),
        ("quotes", f'"{"x" * 101}"', []),
        ("negation", "Not a knot; I can't, don’t, cannot nor without",
         ["Not", "can't", "don’t", "cannot", "nor", "without"]),
        ("caps", "NASA and A1B2 的HTTP的 MAX_LEN I Am xAB", ["NASA", "A1B2", "HTTP", "MAX_LEN"]),
    ],
)  # fmt: skip
def test_presets(name: str, text: str, spans: list[str]) -> None:
    assert found(name, text) == spans


def test_inline_code_with_doubled_marks() -> None:
    assert found("code", "x ``a b`` y") == ["``a b``"]


@pytest.mark.parametrize(
    "pattern", ["a", "a.", "a/", "`", '"', "1,", "A_", "A-", "~~~\n", "``a\n", "a@", "-", "a+", "./", "“a"]
)
def test_a_long_run_takes_no_time(pattern: str) -> None:
    text = pattern * 100_000
    started = time.process_time()
    protect.find(text, tuple(PRESETS))
    assert time.process_time() - started < 5


def test_marks() -> None:
    assert protect.read_marks("a <keep>b c</keep> d<keep></keep><keep>e</keep>") == ("a b c de", ((2, 5), (7, 8)))
    assert protect.read_marks("<Keep> <keep/> x") == ("<Keep> <keep/> x", ())


@given(st.lists(st.tuples(st.text(st.sampled_from("ab \n<>"), max_size=4), st.booleans()), max_size=8))
def test_marks_round_trip(parts: list[tuple[str, bool]]) -> None:
    marked = "".join(f"<keep>{text}</keep>" if kept else text for text, kept in parts)
    clean, spans = protect.read_marks(marked)
    assert clean == "".join(text for text, _ in parts)
    assert [clean[a:b] for a, b in spans] == [text for text, kept in parts if kept and text]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\n<keep>b", "line 2: `<keep>` has no `</keep>` after it"),
        ("a</keep>", "line 1: `</keep>` has no `<keep>` before it"),
        ("<keep>a\n\n<keep>b</keep></keep>", "line 3: `<keep>` stands within another"),
    ],
)
def test_malformed_marks(text: str, message: str) -> None:
    with pytest.raises(UsageError) as error:
        protect.read_marks(text)
    assert error.value.message == message
    assert "--no-markup" in error.value.hint


def test_regular_expressions_of_the_user() -> None:
    text = "alpha beta gamma"
    made = protect.find(text, [], [r"b\w+", r"x*", r"gam"])
    assert made.spans == ((6, 10), (11, 14))
    assert set(made.by) == {r"`b\w+`", "`gam`"}
    with pytest.raises(UsageError, match=r"`\(` is no regular expression"):
        protect.find(text, [], ["("])


def test_an_expression_that_takes_for_ever_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protect, "_SECONDS", 0.2)
    started = time.process_time()
    with pytest.raises(UsageError, match=r"`\(a\+\)\+\$` takes more than"):
        protect.find("a" * 5000 + "b", [], ["(a+)+$"])
    assert time.process_time() - started < 5


def test_parts_are_looked_at_alone() -> None:
    text = "```\nopen\n\nplain text"
    assert protect.find(text, ["code"]).spans == ((0, len(text)),)
    assert protect.find(text, ["code"], parts=[(0, 8), (10, len(text))]).spans == ((0, 8),)


def test_spans_that_overlap_are_merged() -> None:
    made = protect.find("12 ab 3", ["numbers"], ["2 a", "b"])
    assert made.spans == ((0, 4), (4, 5), (6, 7))
    assert made.by == {"numbers": ((0, 2), (6, 7)), "`2 a`": ((1, 4),), "`b`": ((4, 5),)}


def test_names() -> None:
    assert protect.parse("none") == ()
    assert protect.parse("all") == tuple(PRESETS) == protect.default("word")
    assert protect.parse("caps, urls,caps") == ("caps", "urls")
    assert protect.default("line") == ("code",)
    for bad in ("", "nmbers", "none,caps"):
        with pytest.raises(UsageError):
            protect.parse(bad)


@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=8),
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 6)), max_size=5),
)
def test_touched(sizes: list[int], spans: list[tuple[int, int]]) -> None:
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    units = list(zip([0, *ends[:-1]], ends, strict=True))
    asked = [(min(start, ends[-1]), min(start + length, ends[-1])) for start, length in spans]
    slow = [i for i, (a, b) in enumerate(units) if any(set(range(a, b)) & set(range(*span)) for span in asked)]
    assert protect.touched(units, asked) == slow
