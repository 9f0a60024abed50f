"""A profile as one HTML page: no script, no font, nothing fetched; drawn for light and dark.

The geometry of the drawings is worked out here, in the user units of their SVG viewBox; profile.html.j2 draws.
"""

import math
from pathlib import Path
from typing import Any

from tcw import __version__
from tcw.profile import Profile
from tcw.profile.entropy import EXPONENTS
from tcw.units import show_bytes, show_count

WIDTH = 720  # of every drawing
_HEIGHT, _LEFT, _BOTTOM, _TOP = 240, 64, 28, 14
_POINTS = 64


def render(profile: Profile) -> str:
    """Return the page as text."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"bytes": show_bytes, "count": show_count, "tokens": _tokens}
    facts = profile.to_json()
    views = {
        "parts": _parts(facts["weights"]), "methods": _methods(facts), "exponents": _exponents(profile),
        "memory": _memory(profile),
    }  # fmt: skip
    return environment.get_template("profile.html.j2").render(p=facts, version=__version__, width=WIDTH, **views)


def _tokens(count: int) -> str:
    return f"{count:,}"


def _parts(weights: dict[str, Any]) -> list[dict[str, Any]]:
    """One bar cut into parts: x and width of each."""
    total, x, drawn = max(1, weights["bytes"]), 0.0, []
    for name, part in weights["by_part"].items():
        share = part["bytes"] / total
        drawn.append({"name": name, "x": x, "width": share * WIDTH, "share": share, **part})
        x += share * WIDTH
    return drawn


def _methods(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """A bar for the model as it is and one for each method, to one scale."""
    rows = [facts["original"], *facts["methods"]]
    widest = max([1, *(row["bytes"] for row in rows)])
    return [{**row, "width": row["bytes"] / widest} for row in rows]


def _exponents(profile: Profile) -> dict[str, Any] | None:
    """Columns of the exponent histogram, from the smallest to the largest exponent of a share that can be seen."""
    found = profile.scan.exponents()
    if found is None or not found[1].sum():
        return None
    dtype, counts = found
    bias = (1 << EXPONENTS[dtype][1] - 1) - 1
    share = counts / counts.sum()
    seen = (share >= 1e-5).nonzero()[0]
    first, last = int(seen[0]), int(seen[-1])
    # a lone column of exact zeros (exponent 0) far to the left would squeeze all the others
    if first == 0 and len(seen) > 1 and seen[1] > 8:
        first = int(seen[1])
    top = float(share[first : last + 1].max())
    step = (WIDTH - _LEFT) / max(last - first + 1, 12)
    columns = []
    for e in range(first, last + 1):
        height = float(share[e] / top * _plot())
        x, y = _LEFT + (e - first) * step + 1, _TOP + _plot() - height
        columns.append(
            {"x": x, "y": y, "width": max(1.0, step - 2), "height": height, "share": float(share[e]), "power": e - bias}
        )
    rest = 1.0 - sum(c["share"] for c in columns)
    every = max(1, math.ceil(len(columns) / 14))
    return {
        "dtype": dtype, "columns": columns, "labels": columns[::every], "ticks": _ticks(top), "height": _HEIGHT,
        "base": _TOP + _plot(), "left": _LEFT, "rest": rest, "distinct": int((counts > 0).sum()),
    }  # fmt: skip


def _plot() -> int:
    return _HEIGHT - _BOTTOM - _TOP


def _ticks(top: float) -> list[dict[str, float]]:
    """Round values on the vertical axis up to `top`, about four of them, with their y."""
    step = 10 ** math.floor(math.log10(max(top, 1e-12) / 4))
    step *= next(m for m in (1, 2, 2.5, 5, 10) if top / (step * m) <= 5)
    return [{"value": i * step, "y": _TOP + (1 - i * step / top) * _plot()} for i in range(math.floor(top / step) + 1)]


def _memory(profile: Profile) -> dict[str, Any]:
    """Lines of memory needed over the context, the context planned for, and the free memory where it is in sight."""
    last = max(profile.context, profile.model_context or 0)
    xs = [round(i * last / (_POINTS - 1)) for i in range(_POINTS)]
    top = 1.08 * max(row.budget.need(last) for row in profile.rows)
    free = profile.device.free_bytes

    def place(tokens: int, size: float) -> str:
        x, y = _LEFT + tokens / max(1, last) * (WIDTH - _LEFT), _TOP + (1 - size / top) * _plot()
        return f"{x:.1f},{y:.1f}"

    lines = [
        {"name": row.name, "points": " ".join(place(t, row.budget.need(t)) for t in xs), "at": row.budget.need(last)}
        for row in profile.rows
    ]
    return {
        "lines": lines, "ticks": _ticks(top), "height": _HEIGHT, "base": _TOP + _plot(), "left": _LEFT, "last": last,
        "context_x": _LEFT + profile.context / max(1, last) * (WIDTH - _LEFT),
        "free_y": _TOP + (1 - free / top) * _plot() if free <= top else None,
        "labels": [{"x": _LEFT + i / 4 * (WIDTH - _LEFT), "tokens": round(i / 4 * last)} for i in range(5)],
    }  # fmt: skip
