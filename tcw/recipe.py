"""Recipes: what to do to a model, in order. From profiles/*.toml, or from SPEC strings on the command line.

A SPEC is `name` or `name:key=value,key=value`. A recipe is a TOML file:

    summary = "what the user gets"

    [[method]]                      # methods run in this order; a tensor goes to the first that wants it
    use  = "dfloat11"
    skip = ["lm_head", "*.embed*"]  # shell patterns over tensor names (optional; `only` likewise)

    [verify]                        # `tcw verify` fails past these
    max_kl = 0.0

A recipe never names a model, a path or a device. The limits of SPEC strings are those that their methods state.
"""

import fnmatch
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tcw import methods
from tcw.errors import FormatError, UnknownName, UsageError
from tcw.folders import folder

OUTPUT_LIMITS = ("max_kl", "min_top1", "max_ppl_rise", "min_greedy")  # on what a model says
KV_LIMITS = ("max_kv_bytes", "max_key_nll_rise", "max_next_nll_rise")  # on a KV-cache policy
TOKEN_LIMITS = ("max_token_flops", "max_token_kl", "min_token_top1", "max_answer_nll_rise", "min_patch_cosine")
# the last two: tensors and files
LIMITS = (*OUTPUT_LIMITS, *KV_LIMITS, *TOKEN_LIMITS, "max_weight_error", "max_bits_per_weight")


@dataclass(frozen=True)
class Step:
    """One method with every option filled in, and the tensors it may touch."""

    method: str
    options: dict[str, Any]
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()

    def build(self) -> methods.Method:
        """Make the method."""
        return methods.build(self.method, self.options)

    def covers(self, tensor: str) -> bool:
        """Say whether `only` and `skip` leave the tensor to this step."""
        if self.only and not _matches(tensor, self.only):
            return False
        return not _matches(tensor, self.skip)

    def spec(self) -> str:
        """The step as a SPEC string with the options that differ from the defaults."""
        defaults = methods.build(self.method, {}).options()
        changed = [f"{k}={_spell(v)}" for k, v in self.options.items() if v != defaults.get(k)]
        return ":".join([self.method, ",".join(changed)] if changed else [self.method])


@dataclass(frozen=True)
class Recipe:
    """An ordered list of steps and the limits that `tcw verify` holds the result to."""

    name: str
    steps: tuple[Step, ...]
    summary: str = ""
    limits: dict[str, float] = field(default_factory=dict)

    @property
    def lossless(self) -> bool:
        """Whether every step keeps the model bit for bit."""
        return all(methods.get(step.method).lossless for step in self.steps)

    def to_json(self) -> dict[str, Any]:
        """The recipe as stored in an artifact, every default filled in."""
        steps = [
            {"use": s.method, "options": s.options, "only": list(s.only), "skip": list(s.skip)} for s in self.steps
        ]
        return {"name": self.name, "summary": self.summary, "method": steps, "verify": self.limits}


def parse_spec(text: str) -> Step:
    """Read a SPEC string. Raises UnknownName or UsageError."""
    name, _, rest = text.partition(":")
    options: dict[str, Any] = {}
    for item in filter(None, rest.split(",")):
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise UsageError(f"cannot read `{item}` in `{text}`", "write `name:key=value,key=value`")
        if key in options:
            raise UsageError(f"`{key}` is given twice in `{text}`")
        options[key] = value
    return make_step(name, options)


def make_step(name: str, options: dict[str, Any]) -> Step:
    """Check a method and its options; the step has every default filled in."""
    return Step(methods.canonical(name), methods.build(name, options).options())


def from_specs(specs: list[str]) -> Recipe:
    """Make a recipe of SPEC strings, in order, with the limits that the methods state."""
    steps = tuple(parse_spec(s) for s in specs)
    return Recipe(name="+".join(s.method for s in steps), steps=steps, limits=stated_limits(steps))


def stated_limits(steps: tuple[Step, ...]) -> dict[str, float]:
    """The limits that the methods of a recipe state together.

    A method states them as `limits`, a dict or, where options count, a property. Of methods of one family the loosest
    holds, and only where no lossy one is silent about it. Bits per weight are the first step's own.
    """
    built = [step.build() for step in steps]
    merged: dict[str, float] = {}
    for family, names in (
        ("weights", (*OUTPUT_LIMITS, "max_weight_error")), ("kv", KV_LIMITS), ("tokens", TOKEN_LIMITS),
        ("prompt", TOKEN_LIMITS),
    ):  # fmt: skip
        lossy = [dict(getattr(m, "limits", {})) for m in built if m.family == family and not m.lossless]
        for name in names:
            values = [limits[name] for limits in lossy if name in limits]
            if values and len(values) == len(lossy):
                merged[name] = float(max(values) if name.startswith("max_") else min(values))
    first = getattr(built[0], "limits", {}) if built else {}
    if "max_bits_per_weight" in first:
        merged["max_bits_per_weight"] = float(first["max_bits_per_weight"])
    return merged


def names() -> list[str]:
    """Names of the recipes that come with tcw."""
    return sorted(p.stem for p in folder("profiles").glob("*.toml"))


def load(name_or_path: str) -> Recipe:
    """Load a recipe by its name or from a TOML file. Raises UnknownName, FormatError, UsageError."""
    path = Path(name_or_path)
    if path.suffix != ".toml":
        if name_or_path not in names():
            raise UnknownName("recipe", name_or_path, names(), "tcw recipes")
        path = folder("profiles") / f"{name_or_path}.toml"
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read the recipe `{path}`: {error.strerror}", "`tcw recipes` lists recipes") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise FormatError(
            f"`{path.name}` is not valid TOML: {error}", "docs/methods.md and profiles/ have recipes to start from"
        ) from None
    return from_table(path.stem, table)


def from_table(name: str, table: dict[str, Any]) -> Recipe:
    """Make a recipe of a parsed TOML table; unknown keys are errors with the nearest valid one."""
    for key in table:
        if key not in ("summary", "method", "verify"):
            raise UnknownName(f"key of recipe `{name}`", key, ("summary", "method", "verify"))
    entries = table.get("method", [])
    if not isinstance(entries, list) or not entries or not all(isinstance(e, dict) for e in entries):
        raise UsageError(f"recipe `{name}` has no [[method]] table")
    limits = table.get("verify", {})
    for key, value in limits.items():
        if key not in LIMITS:
            raise UnknownName(f"limit in recipe `{name}`", key, LIMITS)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UsageError(f"recipe `{name}`: limit `{key}` takes a number, got `{value}`")
    steps = tuple(_table_step(name, dict(e)) for e in entries)
    return Recipe(name, steps, str(table.get("summary", "")), {k: float(v) for k, v in limits.items()})


def _table_step(recipe: str, entry: dict[str, Any]) -> Step:
    use = entry.pop("use", None)
    if not isinstance(use, str):
        raise UsageError(f"a [[method]] of recipe `{recipe}` does not say which method to `use`")
    only, skip = (_patterns(recipe, key, entry.pop(key, [])) for key in ("only", "skip"))
    step = make_step(use, entry)
    return Step(step.method, step.options, only, skip)


def _patterns(recipe: str, key: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise UsageError(f"recipe `{recipe}`: `{key}` takes a list of patterns, got `{value}`")
    return tuple(value)


def _matches(tensor: str, patterns: tuple[str, ...]) -> bool:
    """A pattern names a tensor, a module (`lm_head`), or either with shell wildcards."""
    module = tensor.rpartition(".")[0]
    return any(fnmatch.fnmatchcase(tensor, p) or fnmatch.fnmatchcase(module, p) for p in patterns)


def _spell(value: Any) -> str:
    return {True: "on", False: "off"}.get(value, str(value)) if isinstance(value, bool) else str(value)
