"""The verdict as one self-contained HTML page: no script, no network, light and dark."""

import math
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from tcw.tokens.pictures import STYLE
from tcw.verify import kv_report, token_report
from tcw.verify.verdict import Limit, Verdict

_TEMPLATE = Path(__file__).with_name("verdict.html.j2")
_MEANING = {
    "identical": "every tensor, and all output that was compared, is the same bit for bit",
    "equivalent": "not the same bits, and every limit holds",
    "different": "not what it should be",
}
_SHOWN = 200  # tensors that differ, in the page
_PERCENT = ("min_top1", "max_ppl_rise", "min_greedy", "max_kv_bytes", "max_token_flops", "min_token_top1")  # shares


def render(verdict: Verdict) -> str:
    """Write the verdict as an HTML page; everything that came from a file is escaped."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": _number, "percent": _percent}
    differing = [
        (n, verdict.tensors.reasons[n], verdict.tensors.relative_error.get(n)) for n in verdict.tensors.different
    ]
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        verdict=verdict,
        meaning=_MEANING[verdict.verdict],
        checks=_checks(verdict),
        differing=differing[:_SHOWN],
        hidden=max(0, len(differing) - _SHOWN),
        kv=_kv(verdict),
        gates=kv_report.gate_rows(verdict.sections["kv"]) if "kv" in verdict.sections else [],
        why_both=kv_report.WHY_BOTH,
        **_tokens(verdict),
        bars=_bars(verdict),
        texts=[s for s in verdict.sequences if s.perplexity],
    )


def _checks(verdict: Verdict) -> list[tuple[str, str, str, str, bool]]:
    """Rows of (check, reference, artifact, limit, holds)."""
    limits = {limit.name: limit for limit in verdict.limits}
    sections = verdict.sections
    tensors = verdict.tensors
    rows = [
        ("files unchanged", "", f"{len(tensors.files)} changed" if tensors.files else "yes", "", not tensors.files),
        ("tensors identical", f"{tensors.checked}", f"{tensors.identical}", "", not tensors.different),
    ]
    if logits := sections.get("logits"):
        same = logits["bit_identical"]
        rows += [
            ("outputs bit for bit", "", "identical" if same else "different", "", same),
            ("largest difference", "", _number(logits["max_abs_diff"]), "", logits["max_abs_diff"] == 0),
            ("mean KL, nats", "", _number(logits["mean_kl"]), *_limit(limits, "max_kl", logits["mean_kl"] == 0)),
            ("top-1 agreement", "", _percent(logits["top1_agreement"]),
             *_limit(limits, "min_top1", logits["top1_agreement"] == 1)),
        ]  # fmt: skip
    if found := sections.get("generation"):
        rows.append(
            ("greedy tokens before the first that differs", f"{found['tokens']}", f"{found['identical_tokens']}",
             *_limit(limits, "min_greedy", found["tokens"] == found["identical_tokens"]))
        )  # fmt: skip
    if found := sections.get("perplexity"):
        shown = f"{_number(found['artifact'])} ({_percent(found['rise'], signed=True)})"
        rows.append(
            ("perplexity", _number(found["reference"]), shown, *_limit(limits, "max_ppl_rise", found["rise"] == 0))
        )
    if found := sections.get("residency"):
        rows.append((f"runs as `{found['name']}`", "", *_residency(found)))
    return rows + _weight_rows(sections.get("weights", {}), limits)


def _residency(found: dict[str, Any]) -> tuple[str, str, bool]:
    """What running with compressed weights gave the bits of."""
    far = f"largest difference to decoded weights {_number(found['plain']['max_abs_diff'])}"
    exact = found["same_kernel"] or found["plain"]
    shown = f"bit-identical to {found['proved']}" if found["proved"] else "not bit-identical"
    return shown if found["plain"]["bit_identical"] else f"{shown}; {far}", "", exact["bit_identical"]


def _weight_rows(found: dict[str, Any], limits: dict[str, Limit]) -> list[tuple[str, str, str, str, bool]]:
    """The largest error of a tensor, and real bits per weight where a limit is set on them."""
    rows = []
    if found.get("max_error") is not None:
        error = found["max_error"]
        rows.append(
            ("largest relative error of a tensor", "", _number(error), *_limit(limits, "max_weight_error", error == 0))
        )
    if "max_bits_per_weight" in limits:
        bits = _number(found.get("bits_per_weight"))
        rows.append(("bits per weight, in the files", "", bits, *_limit(limits, "max_bits_per_weight", True)))
    return rows


def _limit(limits: dict[str, Limit], name: str, exact: bool) -> tuple[str, bool]:
    limit = limits.get(name)
    if limit is None:
        return "", exact
    side = "at most" if name.startswith("max_") else "at least"
    shown = _percent(limit.limit) if name in _PERCENT else _number(limit.limit)
    return f"{side} {shown}", limit.ok


def _kv(verdict: Verdict) -> list[tuple[str, str, str, str, bool]]:
    """Rows of (measurement, reference, artifact, limit, holds)."""
    limits = {limit.name: limit for limit in verdict.limits}
    found = kv_report.rows(verdict.sections["kv"]) if "kv" in verdict.sections else []
    return [(row.name, row.reference, row.artifact, *_limit(limits, row.limit, True)) for row in found]


def _tokens(verdict: Verdict) -> dict[str, Any]:
    """Rows of (measurement, values, limit, holds), their heads, and the gates, of a token policy; {}: there is none."""
    section = verdict.sections.get("tokens")
    if section is None:
        return {}
    limits = {limit.name: limit for limit in verdict.limits}
    rows = [
        (row.name, (row.reference, row.artifact, *row.controls), *_limit(limits, row.limit, True))
        for row in token_report.rows(section)
    ]
    return {
        "tokens": rows, "token_heads": token_report.heads(section), "token_gates": token_report.gate_rows(section),
        "why_controls": token_report.why(section),
        "drawn": Markup(verdict.drawn.get("tokens", "")),  # made, and escaped, by tcw/tokens/pictures.py
        "drawn_style": Markup(STYLE),
    }  # fmt: skip


def _bars(verdict: Verdict) -> list[dict[str, Any]]:
    """KL of each input as a bar, on a scale from zero to the largest."""
    known = [s for s in verdict.sequences if s.kl is not None]
    top = max((s.kl for s in known if s.kl is not None and math.isfinite(s.kl)), default=0.0) or 1.0
    return [
        {"label": " ".join(s.label.split()), "kl": s.kl, "top1": s.top1, "positions": s.positions,
         "width": round(100 * min(1.0, s.kl / top), 1) if s.kl is not None and math.isfinite(s.kl) else 100}
        for s in known
    ]  # fmt: skip


def _number(value: float | None) -> str:
    """Four digits that matter, or a dash."""
    if value is None or not math.isfinite(value):
        return "–" if value is None else str(value)
    return "0" if value == 0 else f"{value:.4g}"


def _percent(value: float | None, signed: bool = False) -> str:
    if value is None or not math.isfinite(value):
        return _number(value)
    return f"{100 * value:{'+' if signed else ''}.2f} %"
