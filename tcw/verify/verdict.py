"""The verdict: what was compared, what it came to, and the exit code that follows."""

import math
from collections.abc import Collection, Set
from dataclasses import dataclass, field
from typing import Any

from tcw.recipe import KV_LIMITS, OUTPUT_LIMITS, TOKEN_LIMITS

# a limit -> the section and keys of the measurement it holds; `max_` and `min_` say which side is good
MEASURES: dict[str, tuple[str, ...]] = {
    "max_kl": ("logits", "mean_kl"),
    "min_top1": ("logits", "top1_agreement"),
    "max_ppl_rise": ("perplexity", "rise"),
    "min_greedy": ("generation", "agreement"),
    "max_weight_error": ("weights", "max_error"),
    "max_bits_per_weight": ("weights", "bits_per_weight"),
    "max_kv_bytes": ("kv", "bytes_ratio"),
    "max_key_nll_rise": ("kv", "key_nll", "rise"),
    "max_next_nll_rise": ("kv", "next_nll", "rise"),
    "max_token_flops": ("tokens", "flops_ratio"),
    "max_token_kl": ("tokens", "kl"),
    "min_token_top1": ("tokens", "top1"),
    "max_answer_nll_rise": ("tokens", "answer_nll", "rise"),
    "min_patch_cosine": ("tokens", "patch_cosine"),
}
SIZES = ("max_bits_per_weight", "max_kv_bytes", "max_token_flops")  # limits that say nothing of likeness

SUITE_LIMITS = {"outputs": OUTPUT_LIMITS, "kv": KV_LIMITS, "tokens": TOKEN_LIMITS}

# what a verdict always shows; null is "not measured"
SECTIONS: dict[str, tuple[str, ...]] = {
    "logits": ("bit_identical", "max_abs_diff", "mean_kl", "top1_agreement"),
    "perplexity": ("reference", "artifact", "rise"),
    "generation": ("tokens", "identical_tokens", "agreement"),
    "runtime": ("residency",),
    "weights": ("max_error", "max_error_tensor", "bits_per_weight", "methods"),
}


@dataclass(frozen=True)
class TensorReport:
    """What came of comparing tensors.

    Attributes:
        checked: tensors looked at, those that only one side has included.
        different: names of those that are not identical, in order; `reasons` says why, for each.
        relative_error: ||artifact - reference|| / ||reference||, for those that differ and have the same shape; in a
            rotated artifact against the reference, rotated in the same way.
        unexplained: those that the artifact rewrote in a way that nothing says how to repeat: they have no error.
        files: artifact files whose SHA-256 is not the manifest's.
        damaged: something disagrees with the manifest, so no limit can make up for it.
    """

    checked: int
    different: list[str] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)
    relative_error: dict[str, float] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)
    damaged: bool = False
    unexplained: list[str] = field(default_factory=list)

    @property
    def identical(self) -> int:
        """How many tensors are bit for bit the same."""
        return self.checked - len(self.different)

    def to_json(self) -> dict[str, Any]:
        """Counts, names and reasons."""
        return {
            "checked": self.checked, "identical": self.identical, "different": self.different,
            "reasons": self.reasons, "relative_error": self.relative_error, "files_changed": self.files,
        }  # fmt: skip


@dataclass(frozen=True)
class Limit:
    """A limit and what was measured; `value` is None, and `ok` False, when it was asked for but not measurable."""

    name: str
    value: float | None
    limit: float
    ok: bool


@dataclass(frozen=True)
class Sequence:
    """One input that both models were given: how far apart the outputs are. None where it has no meaning.

    `kl` (nats) and `top1` are means over `positions`; `perplexity` is (reference, artifact), for text windows.
    """

    label: str
    positions: int
    bit_identical: bool
    max_abs_diff: float
    kl: float | None = None
    top1: float | None = None
    perplexity: tuple[float, float] | None = None


@dataclass(frozen=True)
class Verdict:
    """The answer of `tcw verify`: "identical", "equivalent" or "different", and everything it rests on.

    `failed` are checks that no limit can make up for, each with what went wrong. `drawn` are pieces of HTML for the
    page, by section; they are not part of the JSON.
    """

    verdict: str
    artifact: str
    reference: str | None
    tensors: TensorReport
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)
    limits: list[Limit] = field(default_factory=list)
    sequences: list[Sequence] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    failed: dict[str, str] = field(default_factory=dict)
    drawn: dict[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether the answer is yes."""
        return self.verdict != "different"

    @property
    def exit_code(self) -> int:
        """0 for yes, 1 for no."""
        return 0 if self.ok else 1

    def to_json(self) -> dict[str, Any]:
        """The verdict under the keys of docs/cli.md; every key is there, null where nothing was measured."""
        blank: dict[str, dict[str, Any]] = {name: dict.fromkeys(keys) for name, keys in SECTIONS.items()}
        table = {
            "verdict": self.verdict, "artifact": self.artifact, "reference": self.reference,
            "tensors": self.tensors.to_json(),
            **{name: blank.get(name, {}) | self.sections.get(name, {}) for name in {**blank, **self.sections}},
            "limits": [{"name": l.name, "value": l.value, "limit": l.limit, "ok": l.ok} for l in self.limits],
            "failed": self.failed, "skipped": self.skipped, "seconds": self.seconds,
        }  # fmt: skip
        return _finite(table)


def hold(
    recipe: dict[str, float], asked: dict[str, float], sections: dict[str, dict[str, Any]], skipped: dict[str, str]
) -> list[Limit]:
    """Hold the measurements to the limits, in the order of MEASURES.

    A recipe's limit on something that was not measured is noted in `skipped`; one that the caller asked for fails.
    """
    held = []
    for name, (section, *keys) in MEASURES.items():
        if name not in recipe and name not in asked:
            continue
        limit = asked.get(name, recipe.get(name, 0.0))
        value: Any = sections.get(section, {})
        for key in keys:
            value = (value or {}).get(key)
        if value is None and name not in asked:
            if not _explained(name, skipped):
                skipped[name] = f"{'.'.join((section, *keys))} was not measured"
            continue
        # a value that is no number fails: every comparison with it is false
        ok = value is not None and (value <= limit if name.startswith("max_") else value >= limit)
        held.append(Limit(name, value, limit, ok))
    return held


def _explained(limit: str, skipped: dict[str, str]) -> bool:
    """Whether `skipped` says already why this limit has no value: its suite was not run."""
    return any(suite in skipped and limit in names for suite, names in SUITE_LIMITS.items())


def decide(
    tensors: TensorReport,
    same_output: bool,
    limits: list[Limit],
    failed: Collection[str] = (),
    lossy: Set[str] = frozenset(),
) -> str:
    """The verdict. Without a limit that was measured and holds, what differs is "different"; size is no likeness.

    Nothing makes up for a check in `failed`. Each section in `lossy` needs a limit of its own.
    """
    if tensors.damaged or failed or not all(l.ok for l in limits):
        return "different"
    if not tensors.different and same_output:
        return "identical"
    bounded = {MEASURES[l.name][0] for l in limits if l.name not in SIZES}
    return "equivalent" if bounded and lossy <= bounded else "different"


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value
