"""A text in units, and what is left of it put together again.

A unit is a span of characters. The units of a text are in order, have no gaps and are the whole text. White space
before a word belongs to it; white space at the very end belongs to the last unit. Words are what white space parts,
except in scripts that write none: a Han or Hiragana character is a unit, with the punctuation that clings to it, and a
run of Katakana is one. Letters and digits right before such a character stay with it: without that, `3章5节` could
lose its `章` and become 35. No word is ever split: sentences, lines and paragraphs are made of whole ones.

Putting together: neighbours that both stay stand as they stood. Across a gap the next unit keeps its own white space,
unless what was left out held a stronger break (a blank line is stronger than a line end, a line end than a space):
then that break stands there, so that two lines do not become one sentence that nobody wrote. A line end that only
wraps prose (40 characters or more before it, a lower-case letter right behind it) counts as a space. At the start of
the output white space goes, but for the indentation of a line. All pieces are spans of the text. This way of joining
is ours.
"""

import bisect
import re
from collections.abc import Callable, Sequence
from itertools import pairwise

UNITS = ("word", "sentence", "line", "paragraph")

Span = tuple[int, int]
Piece = Span | str
"""Characters [start, end) of the text, or a mark that stands for what was left out."""

# one character, one word: Han with its repetition marks and zero, and Hiragana
_SINGLE = (
    "\u2e80-\u2fdf\u3005-\u3007\u3021-\u3029\u3041-\u309f\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003fffd"
)
_KATAKANA = "\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\uff66-\uff9f"
_OPENS = "\u3008\u300a\u300c\u300e\u3010\u3014\u3016\u3018\u301a\uff08\uff3b\uff5b"
# closing punctuation, middle dots, variation selectors and sound marks cling to the character before
_CLINGS = (
    "\u3001\u3002\u3009\u300b\u300d\u300f\u3011\u3015\u3017\u3019\u301b\u3099\u309a\u30fb\uff01\uff09\uff0c\uff0e"
    "\uff1a\uff1b\uff1f\uff3d\uff5d\uff5e\u2019\u201d\u2026\ufe00-\ufe0f\U000e0100-\U000e01ef"
)
_ASIAN = rf"(?:[{_SINGLE}]|[{_KATAKANA}]+)[{_CLINGS}]*"
_WORD = re.compile(
    rf"\s*(?:[\u2018\u201c{_OPENS}]*{_ASIAN}"
    rf"|[^\s{_SINGLE}{_KATAKANA}][^\s{_SINGLE}{_KATAKANA}{_OPENS}]*(?:{_ASIAN})?)"
)
_LINE = re.compile(r"\s*\S(?:[^\r\n]*\S)?")
_BREAK = re.compile(r"\r\n|\n|\r")

_ENDS = re.compile(r"[.!?\u2026][\"'\u2019\u201d\u00bb)\]]*$")
_ENDS_ASIAN = re.compile(r"[\u3002\uff01\uff1f][\u2019\u201d\u300d\u300f\uff09]*$")
_ITEM = re.compile(r"(?:[-*+\u2022>]|#+|\d{1,3}[.)])$")
_INITIAL = re.compile(r"(?:[^\W\d_]\.)+$")
_SHORT = re.compile(
    r"(?:mr|mrs|ms|dr|prof|st|sr|jr|vs|e\.g|i\.e|cf|al|inc|ltd|co|corp|dept|approx|gen|col|capt)\.$", re.IGNORECASE
)
_SHORT_BEFORE_NUMBERS = re.compile(r"(?:nos?|figs?|eqs?|sec|ch|vol|pp?|art|ver|v)\.$", re.IGNORECASE)

_WRAPPED = 40  # characters before a line end that may only wrap prose


def cut(text: str, unit: str = "word") -> list[Span]:
    """Cut a text into units: [start, end) in characters, in order, without gaps; [] for an empty text.

    Args:
        text: any text; a text of white space only is one unit.
        unit: "word", "sentence", "line" or "paragraph" (which blank lines part).
    """
    if unit == "word":
        return _matches(_WORD, text)
    if unit == "sentence":
        return _grouped(_matches(_WORD, text), lambda a, b: _sentence_ends(text, a, b))
    lines = _matches(_LINE, text)
    return lines if unit == "line" else _grouped(lines, lambda _, b: strength(text[b[0] : body(text, *b)]) > 1)


def body(text: str, start: int, end: int) -> int:
    """Where a unit's own characters start, after the white space before them; `end` for white space only."""
    while start < end and text[start].isspace():
        start += 1
    return start


def strength(space: str) -> int:
    """How strongly white space parts what is on its sides: 0 on one line, 1 a line end, 2 a blank line or more."""
    return min(2, len(_BREAK.findall(space)))


def contained(inner: Sequence[Span], outer: Sequence[Span]) -> list[bool]:
    """Whether each span of `inner` lies in one of `outer`, which are ascending and apart."""
    starts = [start for start, _ in outer]
    places = [bisect.bisect_right(starts, start) - 1 for start, _ in inner]
    return [at >= 0 and end <= outer[at][1] for at, (_, end) in zip(places, inner, strict=True)]


def _matches(pattern: re.Pattern[str], text: str) -> list[Span]:
    spans = [match.span() for match in pattern.finditer(text)]
    if not text:
        return []
    last = spans.pop()[0] if spans else 0
    return [*spans, (last, len(text))]


def _grouped(spans: list[Span], parts: Callable[[Span, Span], bool]) -> list[Span]:
    """Join neighbours between which `parts` is false."""
    if not spans:
        return []
    starts = [spans[0][0], *(b[0] for a, b in pairwise(spans) if parts(a, b)), spans[-1][1]]
    return list(pairwise(starts))


def _sentence_ends(text: str, word: Span, following: Span) -> bool:
    """Whether a sentence ends between two neighbouring words."""
    begins = body(text, *following)
    space, after = text[following[0] : begins], text[begins : following[1]]
    before = text[body(text, *word) : word[1]]
    if strength(space) > 1 or (strength(space) and _ITEM.match(after)):
        return True
    if _ENDS_ASIAN.search(before):
        return True
    if not space or not _ENDS.search(before) or after[:1].islower():
        return False
    plain = before.lstrip("\"'([\u2018\u201c")
    if _SHORT.match(plain) or _INITIAL.match(plain):
        return False
    return not (_SHORT_BEFORE_NUMBERS.match(plain) and after[:1].isdigit())


class Layout:
    """The units of a text, laid out so that any choice of them can be joined."""

    def __init__(self, text: str, spans: Sequence[Span], holds: Sequence[Span] = (), elide: str | None = None) -> None:
        """Lay out.

        Args:
            text: the text.
            spans: its units, as `cut` gives them.
            holds: spans of characters that must not lose white space either, ascending; units that touch one stay.
            elide: what stands for left-out units, with `{n}` for their number; None: nothing.
        """
        self.text, self.spans, self.elide = text, list(spans), elide
        self.bodies = [body(text, *span) for span in spans]
        self._strengths = [self._strength(i) for i in range(len(spans))]
        for start, end in holds:
            i = bisect.bisect_right(self.spans, (start, len(text))) - 1
            while i < len(self.spans) and self.spans[i][0] < end:
                self.bodies[i] = min(self.bodies[i], max(start, self.spans[i][0]))
                i += 1
        self._breaks = {s: [i for i, found in enumerate(self._strengths) if found == s] for s in (1, 2)}

    def __len__(self) -> int:
        return len(self.spans)

    def pieces(self, kept: Sequence[int]) -> list[Piece]:
        """What is left when the units `kept` (ascending numbers) stay."""
        found: list[Piece] = []
        last = -1
        for i in kept:
            start, end = self.spans[i]
            if i == last + 1:
                found.append((start, end))
            else:
                self._bridge(found, last, i)
            last = i
        if self.elide is not None and last < len(self) - 1:
            found.append((self._white(last + 1) if kept else "") + self._mark(len(self) - 1 - last))
        return _joined(found)

    def join(self, kept: Sequence[int]) -> str:
        """The text of what is left."""
        return "".join(
            piece if isinstance(piece, str) else self.text[piece[0] : piece[1]] for piece in self.pieces(kept)
        )

    def _strength(self, i: int) -> int:
        """The strength of the white space before unit i, where a line end that only wraps prose counts as a space."""
        start, begins = self.spans[i][0], self.bodies[i]
        found = strength(self.text[start:begins])
        if found == 1 and i and self.text[begins - 1] in "\r\n" and self.text[begins : begins + 1].islower():
            line = max(self.text.rfind("\n", 0, start), self.text.rfind("\r", 0, start)) + 1
            return int(start - line < _WRAPPED)
        return found

    def _bridge(self, found: list[Piece], last: int, i: int) -> None:
        """Append unit i, which follows unit `last` (-1: the start of the output) across a gap."""
        (start, end), begins = self.spans[i], self.bodies[i]
        if last < 0:
            if self.elide is not None:
                found += [self._mark(i), (start, end)]
                return
            white = self.text[start:begins]
            breaks = list(_BREAK.finditer(white))
            found.append((start + breaks[-1].end() if breaks else begins, end))
            return
        space = self._strongest(last + 1, i)
        if self.elide is not None:
            found.append(self.text[slice(*space)] + self._mark(i - last - 1))
        found += [space, (begins, end)]

    def _strongest(self, first: int, i: int) -> Span:
        """The white space for unit i after a gap that begins at unit `first`: its own, or a stronger one of the gap."""
        for wanted in range(2, self._strengths[i], -1):
            where = self._breaks[wanted]
            at = bisect.bisect_left(where, i) - 1
            if at >= 0 and where[at] >= first:
                return self._space(where[at])
        return self._space(i)

    def _space(self, i: int) -> Span:
        return self.spans[i][0], self.bodies[i]

    def _white(self, i: int) -> str:
        return self.text[slice(*self._space(i))]

    def _mark(self, count: int) -> str:
        return (self.elide or "").replace("{n}", str(count))


def _joined(pieces: list[Piece]) -> list[Piece]:
    """Drop empty spans and merge those that touch."""
    merged: list[Piece] = []
    for piece in pieces:
        if not isinstance(piece, str):
            if piece[0] == piece[1]:
                continue
            if merged and not isinstance(merged[-1], str) and merged[-1][1] == piece[0]:
                merged[-1] = (merged[-1][0], piece[1])
                continue
        merged.append(piece)
    return merged
