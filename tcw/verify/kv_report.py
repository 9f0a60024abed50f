"""The measurements of a KV policy as a table, for the terminal and the page."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from tcw.units import show_bytes

WHY_BOTH = "Retrieval and perplexity, because neither says enough alone: prose goes on well without what was forgotten."


class Row(NamedTuple):
    """A measurement under a full cache (`reference`) and under the policy, and the name of the limit on it, or ""."""

    name: str
    reference: str
    artifact: str
    limit: str = ""


def rows(kv: dict[str, Any]) -> list[Row]:
    """The section `kv` of a verdict as rows: bytes, retrieval, perplexity, speed."""
    held = kv["bytes"]["bfloat16"]

    def row(name: str, key: str, show: Callable[[float], str], limit: str = "") -> Row:
        return Row(name, show(kv[key]["reference"]), show(kv[key]["artifact"]), limit)

    return [
        Row(f"bytes after {kv['context']:,} tokens (BF16)", show_bytes(held["full"]), show_bytes(held["policy"])),
        Row("share of a full cache", _percent(1.0), _percent(kv["bytes_ratio"]), "max_kv_bytes"),
        row("passkeys found", "exact", _percent),
        row("passkey, nats a token", "key_nll", _number, "max_key_nll_rise"),
        row("passage copied, tokens right", "span_copy", _percent),
        row("following text, nats a token", "next_nll", _number, "max_next_nll_rise"),
        row("following text, perplexity", "next_nll", _perplexity),
        row("tokens a second, here", "tokens_per_second", _number),
    ]


def gate_rows(section: dict[str, Any], heading: str = "KV exactness") -> list[tuple[str, str]]:
    """Which checks hold, which do not and by how much, and why others did not apply: (heading, text)."""
    gates = section["gates"]
    held = [name for name, gate in gates.items() if gate["ok"]]
    found = [(heading, f"{', '.join(held)}: hold" if held else "nothing holds")]
    for name, gate in gates.items():
        if gate["ok"] is False:
            error = f"an error of {_number(gate['error'])}, at most {_number(gate['bound'])}"
            found.append(("  FAIL", f"{name}: {error} ({gate['note']})"))
    return found + [("  no check", f"{name}: {gate['note']}") for name, gate in gates.items() if gate["ok"] is None]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _perplexity(nats: float | None) -> str:
    return _number(None if nats is None else math.exp(min(nats, 700)))
