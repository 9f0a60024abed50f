"""What must survive: presets, regular expressions, and `<keep>...</keep>` in the text. A unit that touches it stays.

The presets are what users of prompt compression report broken: numbers, names of things in code, and `not`. They are
on by default for words. Larger units are kept or dropped whole, so nothing in them can break, and most sentences hold
a number: there only code is protected by default. Quotes longer than 100 characters are prose and not protected;
`negation` knows English only.
"""

import bisect
import re
from collections.abc import Sequence
from dataclasses import dataclass

from tcw.errors import UnknownName, UsageError
from tcw.prompt.units import Span

# each starts only where no run of its own characters goes on: a long run costs its length, not its square
PRESETS: dict[str, re.Pattern[str]] = {
    "numbers": re.compile(r"(?:[-+\u2212](?=\d))?[$\u20ac\u00a3]?\d+(?:[.,:/\u2013-]\d+)*(?:[ \u00a0]?%)?"),
    "urls": re.compile(r"\b(?:https?|ftp|file)://\S+|\bwww\.\S+|(?<![\w.+-])[\w.+-]+@\w[\w-]*\.[\w.-]*\w"),
    "paths": re.compile(
        r"(?<![\w./\\~@+<-])(?:(?:[A-Za-z]:\\|~/|\.{1,2}/|/)[\w.@+-]+(?:[/\\][\w.@+-]+)*[/\\]?"
        r"|(?:[\w.@+-]+/)*[\w-]{2}[\w.-]*\.[A-Za-z]\w{0,4}(?![\w/]))"
    ),
    "code": re.compile(
        r"(?ms)^[ \t]*(`{3,}|~{3,}).*?(?:^[ \t]*\1[ \t]*$|\Z)|(?<!`)(`{1,2})(?!`)[^`\n]+(?<!`)\2(?!`)"
    ),
    "quotes": re.compile(
        r'"[^"\n]{1,100}"|\u201c[^\u201d\n]{1,100}\u201d|\u00ab[^\u00bb\n]{1,100}\u00bb|\u300c[^\u300d\n]{1,100}\u300d'
    ),
    "negation": re.compile(
        r"(?i)\b(?:not|no|never|none|nor|neither|nothing|nobody|nowhere|cannot|without|unless|except|excluding|hardly)\b"
        r"|\b\w+n['\u2019]t\b"
    ),
    "caps": re.compile(r"(?<![A-Za-z0-9_])[A-Z][A-Z0-9_]*[A-Z][A-Z0-9_]*(?![A-Za-z0-9_])"),
}  # fmt: skip

_MARK = re.compile(r"</?keep>")
_SECONDS = 2.0  # that one regular expression of the user may take on one text


@dataclass(frozen=True)
class Protection:
    """What is protected in a text.

    Attributes:
        spans: characters [start, end), ascending, merged.
        by: the same before merging, by what asked for it: a preset, a regular expression in backticks, or `<keep>`.
    """

    spans: tuple[Span, ...]
    by: dict[str, tuple[Span, ...]]


def default(unit: str) -> tuple[str, ...]:
    """The presets that are on when none are named."""
    return tuple(PRESETS) if unit == "word" else ("code",)


def parse(names: str) -> tuple[str, ...]:
    """Read `numbers,urls` or `none`. Raises UnknownName for a preset that does not exist."""
    asked = [name.strip() for name in names.split(",") if name.strip()]
    if asked == ["none"]:
        return ()
    if asked == ["all"]:
        return tuple(PRESETS)
    check(asked)
    if not asked:
        raise UsageError("no preset is named", f"choose from: {', '.join(PRESETS)}, all, none")
    return tuple(dict.fromkeys(asked))


def check(names: Sequence[str]) -> None:
    """Raise UnknownName for a preset that does not exist."""
    for name in names:
        if name not in PRESETS:
            raise UnknownName("preset to protect", name, [*PRESETS, "all", "none"])


def read_marks(text: str) -> tuple[str, tuple[Span, ...]]:
    """Take `<keep>` and `</keep>` out of a text: what is left, and the spans that stood between them in it.

    Raises UsageError: a mark without its partner, or one within another; the message says in which line.
    """
    clean: list[str] = []
    spans: list[Span] = []
    length = at = 0
    opened: int | None = None
    for mark in _MARK.finditer(text):
        clean.append(text[at : mark.start()])
        length += mark.start() - at
        at = mark.end()
        if (mark[0] == "<keep>") != (opened is None):
            problem = "stands within another" if opened is not None else "has no `<keep>` before it"
            _refuse_mark(text, mark.start(), f"`{mark[0]}` {problem}")
        if opened is None:
            opened, where = length, mark.start()
        else:
            spans.append((opened, length))
            opened = None
    if opened is not None:
        _refuse_mark(text, where, "`<keep>` has no `</keep>` after it")
    return "".join([*clean, text[at:]]), tuple(span for span in spans if span[0] < span[1])


def _refuse_mark(text: str, at: int, problem: str) -> None:
    line = text.count("\n", 0, at) + 1
    raise UsageError(f"line {line}: {problem}", "close each `<keep>` with `</keep>`, or pass `--no-markup`")


def find(
    text: str,
    presets: Sequence[str],
    keep: Sequence[str] = (),
    marked: Sequence[Span] = (),
    parts: Sequence[Span] | None = None,
) -> Protection:
    """Find what is protected.

    Args:
        text: without marks.
        presets: names of PRESETS.
        keep: regular expressions of the user (package `regex`, which is `re` and stops when time is up).
        marked: what `read_marks` found.
        parts: spans of the text that are looked at one by one, as contexts are; None: the whole text is one.

    Raises:
        UsageError: a regular expression that cannot be read, or takes longer than two seconds.
    """
    check(presets)
    parts = [(0, len(text))] if parts is None else parts
    by = {
        name: tuple(match.span() for part in parts for match in PRESETS[name].finditer(text, *part)) for name in presets
    }
    by |= {f"`{pattern}`": _search(pattern, text, parts) for pattern in keep}
    by["<keep>"] = tuple(marked)
    by = {name: spans for name, spans in by.items() if spans}
    return Protection(_merged([span for spans in by.values() for span in spans]), by)


def touched(units: Sequence[Span], spans: Sequence[Span]) -> list[int]:
    """The numbers of the units that overlap one of the spans of the same text, ascending."""
    starts = [start for start, _ in units]
    found: set[int] = set()
    for start, end in (span for span in spans if span[0] < span[1]):
        found.update(range(max(0, bisect.bisect_right(starts, start) - 1), bisect.bisect_left(starts, end)))
    return sorted(found)


def _search(pattern: str, text: str, parts: Sequence[Span]) -> tuple[Span, ...]:
    import regex  # type: ignore[import-untyped]

    try:
        compiled = regex.compile(pattern)
        found = (match.span() for part in parts for match in compiled.finditer(text, *part, timeout=_SECONDS))
        return tuple(span for span in found if span[0] < span[1])
    except regex.error as error:
        raise UsageError(
            f"`{pattern}` is no regular expression: {error}", "`\\` before a character takes it as it is"
        ) from None
    except TimeoutError:
        raise UsageError(
            f"the regular expression `{pattern}` takes more than {_SECONDS:g} s on a text",
            "repeats within repeats, as in `(a+)+`, take for ever: write it without",
        ) from None


def _merged(spans: list[Span]) -> tuple[Span, ...]:
    merged: list[Span] = []
    for start, end in sorted(spans):
        if merged and start < merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return tuple(merged)
