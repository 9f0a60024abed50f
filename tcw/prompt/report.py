"""What a compression did: as JSON, as a map back to the original, and as one self-contained HTML page."""

import hashlib
import re
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tcw import __version__
from tcw.prompt.protect import PRESETS
from tcw.prompt.units import Span, contained

if TYPE_CHECKING:
    from tcw.prompt.engine import Result

# snake_case, camelCase, NASA, v2, 3x: what a reader of code or a log looks for
_IDENTIFIER = re.compile(
    r"(?<![A-Za-z0-9_])(?:[A-Za-z0-9]*_[A-Za-z0-9_]+|[a-z]+[A-Z][A-Za-z0-9]*|[A-Z][a-z]+[A-Z][A-Za-z0-9]*"
    r"|[A-Z]{2,}[A-Za-z0-9]*|[A-Za-z]+[0-9][A-Za-z0-9]*|[0-9]+[A-Za-z][A-Za-z0-9]*)(?![A-Za-z0-9_])"
)
_RECALLED = {"numbers": PRESETS["numbers"], "identifiers": _IDENTIFIER, "negation": PRESETS["negation"]}
_SHADES = 8
_COLUMNS = 60  # of the drawing that shows where in the text units were kept


def fidelity(original: str, spans: Sequence[Span]) -> dict[str, Any]:
    """What survived of a text.

    Returns:
        extractive: True (the engine refuses to give anything else); numbers_recall, identifiers_recall,
        negation_recall: the share of those in `original` that stand whole in one span; None where it has none.
    """
    found: dict[str, Any] = {"extractive": True}
    for name, pattern in _RECALLED.items():
        whole = contained([match.span() for match in pattern.finditer(original)], spans)
        found[f"{name}_recall"] = sum(whole) / len(whole) if whole else None
    return found


def facts(result: "Result") -> dict[str, Any]:
    """The report as JSON-ready values, under the keys of docs/prompt.md."""
    saved = result.before - result.after
    return {
        "text": result.text,
        "tokens": {
            "before": result.before, "after": result.after, "target": result.target, "saved": saved,
            "protected": result.protected, "counter": result.counter,
        },
        "rate": result.rate,
        "seconds": result.seconds,
        "score_seconds": result.score_seconds,
        # a reader that takes in tokens faster than this loses more time than it wins
        "break_even_tokens_per_second": saved / result.seconds if result.seconds else None,
        "method": result.method,
        "options": result.options,
        "unit": result.unit,
        "units": {"before": len(result.units), "after": int(result.kept.sum())},
        "protection": result.protection,
        "fidelity": result.fidelity,
        "notes": list(result.notes),
        "tcw": __version__,
    }  # fmt: skip


def span_map(result: "Result") -> dict[str, Any]:
    """The way back: which characters of the original the output is made of.

    `spans` are [start, end) in characters (not bytes) of the original without `<keep>` marks, whose SHA-256 in UTF-8
    is given; `pieces` are the same with the elision marks between them, as strings.
    """
    digest = hashlib.sha256(result.original.encode()).hexdigest()
    return {
        "original": {"sha256": digest, "characters": len(result.original)},
        "spans": [list(span) for span in result.spans],
        "pieces": [piece if isinstance(piece, str) else list(piece) for piece in result.pieces],
    }


def render(result: "Result") -> str:
    """Write the result as an HTML page; the text is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"percent": lambda share: "none in the text" if share is None else f"{100 * share:.1f} %"}
    return environment.get_template("report.html.j2").render(
        r=facts(result), runs=list(_runs(result)), columns=_columns(result), shades=range(1, _SHADES + 1)
    )


def _runs(result: "Result") -> list[dict[str, Any]]:
    """Neighbouring units that look the same, as one piece of text each."""
    shades = _shades(result)
    looks = [
        (bool(kept), unit.protected, int(shade))
        for kept, unit, shade in zip(result.kept, result.units, shades, strict=True)
    ]
    runs = []
    for (kept, protected, shade), group in groupby(zip(looks, result.units, strict=True), key=lambda pair: pair[0]):
        units = [unit for _, unit in group]
        text = result.original[units[0].start : units[-1].end]
        runs.append({"text": text, "kept": kept, "protected": protected, "shade": shade})
    return runs


def _shades(result: "Result") -> np.ndarray:
    """A shade for each unit by the rank of its score, 1 (lowest) to 8; 0 without scores. int64 [units]."""
    if result.scores is None or not len(result.scores):
        return np.zeros(len(result.units), dtype=np.int64)
    # equal scores look the same
    _, place = np.unique(result.scores, return_inverse=True)
    return 1 + place * _SHADES // (place.max() + 1)


def _columns(result: "Result") -> list[float]:
    """The kept share of the characters in each part of the text, from its start to its end."""
    kept = np.zeros(max(1, len(result.original)))
    for start, end in result.spans:
        kept[start:end] = 1
    return [float(part.mean()) for part in np.array_split(kept, min(_COLUMNS, len(kept)))]
