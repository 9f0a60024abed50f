"""The measurements of a token policy as a table, for the terminal and the page."""

from typing import Any, NamedTuple

_WHY = "Beside {} at equal {}: a rule that does no better is not worth its own work."
_NAMES = {"random": "at random", "grid": "even grid", "truncate": "end of the text"}


class Row(NamedTuple):
    """A measurement: without the policy, with it, under each control, and the name of the limit on it, or ""."""

    name: str
    reference: str
    artifact: str
    controls: tuple[str, ...]
    limit: str = ""


def heads(tokens: dict[str, Any]) -> tuple[str, ...]:
    """What the columns of `rows` are, after the name."""
    return ("without", "with the policy", *(_NAMES[name] for name in tokens["controls"]))


def why(tokens: dict[str, Any]) -> str:
    """A sentence about the controls."""
    if tokens["kind"] == "text":
        return _WHY.format("the end of the text", "tokens")
    return _WHY.format("choosing at random and an even grid", "FLOPs")


def rows(tokens: dict[str, Any]) -> list[Row]:
    """The section `tokens` of a verdict as rows; what was not measured has none."""
    what = {"images": "visual tokens", "tower": "patches", "text": "tokens of the text"}[tokens["kind"]]
    controls = list(tokens["controls"].values())

    def row(name: str, key: str, reference: float | None, percent: bool, limit: str = "") -> Row | None:
        if tokens[key] is None:
            return None
        show = _percent if percent else _number
        return Row(name, show(reference), show(tokens[key]), tuple(show(c[key]) for c in controls), limit)

    nll = tokens["answer_nll"]
    found = [
        row(f"{what} kept, of {_number(tokens['visual'])}", "kept", 1.0, True),
        row("FLOPs of the prefill", "flops_ratio", 1.0, True, "max_token_flops"),
        row("KV cache after it", "kv_ratio", 1.0, True),
        row("KL of the answer's logits, nats", "kl", 0.0, False, "max_token_kl"),
        row("top-1 agreement", "top1", 1.0, True, "min_token_top1"),
        row("patches, cosine", "patch_cosine", 1.0, False, "min_patch_cosine"),
    ]
    if nll["rise"] is not None:
        others = tuple(_number(control["answer_nll"]["artifact"]) for control in controls)
        shown = _number(nll["reference"]), _number(nll["artifact"])
        found.append(Row("the answer, nats a token", *shown, others, "max_answer_nll_rise"))
    return [each for each in found if each is not None]


def gate_rows(tokens: dict[str, Any]) -> list[tuple[str, str]]:
    """Which checks hold, which do not and by how much, why others did not apply, and notes: (heading, text)."""
    from tcw.verify.kv_report import gate_rows as written

    return [*written(tokens, "token exactness"), *(("note", words) for words in tokens["notes"])]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"
