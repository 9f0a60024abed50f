"""Compress a text: cut it, protect, have a method score it, keep what fits the budget exactly, and prove what is left.

What is left is the concatenation of spans of the text, in order (tcw/prompt/units.py says how they join), and has
exactly the tokens asked for, counted on the output with the tokenizer of the model that will read it. A text that fits
already, and rate 1, come back bit for bit.
"""

import bisect
import dataclasses
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tcw import methods, recipe
from tcw.errors import TcwError, UnknownName, UsageError
from tcw.events import Report, silent
from tcw.prompt import Prompt, PromptMethod, Unit, protect, report
from tcw.prompt.budget import Counter, Fit, fit, ranking
from tcw.prompt.units import UNITS, Layout, Piece, Span, contained, cut

FAMILY = "prompt"
CONTROLS = ("truncate", "random")
JOINT = "\n\n"  # between contexts


@dataclass(frozen=True)
class Settings:
    """How a text is cut and what is protected.

    Attributes:
        unit: "word", "sentence", "line" or "paragraph"; None: the method's own.
        protect: presets of tcw/prompt/protect.py; None: those that are on for the unit; () for none.
        keep: regular expressions; what they match stays.
        elide: what is put where units were left out, with `{n}` for their number; its tokens count. None: nothing.
        markup: take `<keep>...</keep>` in the text for marks.
        device: where a model that scores runs, as typed.
        seed: for a method that draws and is named by a SPEC; None: the SPEC's own.
    """

    unit: str | None = None
    protect: tuple[str, ...] | None = None
    keep: tuple[str, ...] = ()
    elide: str | None = None
    markup: bool = True
    device: str = "auto"
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.unit is not None and self.unit not in UNITS:
            raise UnknownName("unit", self.unit, UNITS)
        if self.elide == "":
            raise UsageError("the mark for what is left out is empty", "write for example `[...]`, or leave it away")
        protect.check(self.protect or ())


@dataclass(frozen=True)
class Result:
    """A compressed text and how it came about.

    Attributes:
        text: what is left.
        original: what there was, without marks; contexts are joined by blank lines.
        pieces: `text` in order: spans of `original`, ascending, and elision marks as strings.
        units, kept, scores: the units, which stay (bool [units]) and their scores (float64 [units]; None where the
            text came back whole; -inf for a context that was left out as a whole).
        before, after, target: tokens of the original, of what is left, and asked for.
        protected: tokens of what must stay.
        counter: whose tokens these are.
        seconds, score_seconds: all of it, and the method alone.
        method, options, unit: what was done.
        protection: how many spans each preset, regular expression and `<keep>` protects.
        notes: what the user should know.
        fidelity: what survived; see tcw/prompt/report.py.
    """

    text: str
    original: str
    pieces: tuple[Piece, ...]
    units: tuple[Unit, ...] = field(repr=False)
    kept: np.ndarray = field(repr=False)
    scores: np.ndarray | None = field(repr=False)
    before: int
    after: int
    target: int
    protected: int
    counter: str
    seconds: float
    score_seconds: float
    method: str
    options: dict[str, Any]
    unit: str
    protection: dict[str, int]
    notes: tuple[str, ...]
    fidelity: dict[str, Any]

    @property
    def spans(self) -> tuple[Span, ...]:
        """The kept characters, [start, end) of `original`."""
        return tuple(piece for piece in self.pieces if not isinstance(piece, str))

    @property
    def rate(self) -> float:
        """Tokens after over tokens before; 1 for an empty text."""
        return self.after / self.before if self.before else 1.0

    def to_json(self) -> dict[str, Any]:
        """The report; numbers are numbers."""
        return report.facts(self)


def method_of(spec: str, seed: int | None = None) -> PromptMethod:
    """Make the prompt method that a SPEC names; `random` is the one of this family.

    Raises UnknownName, or UsageError for a method that compresses something else.
    """
    name, colon, rest = spec.partition(":")
    name = methods.canonical(name).removeprefix(f"{FAMILY}.")
    known = [each.removeprefix(f"{FAMILY}.") for each in methods.names(FAMILY)]
    if name not in known:
        if name in methods.names():
            of = {"weights": "weights", "kv": "the KV cache", "tokens": "visual tokens"}[methods.family_of(name)]
            raise UsageError(f"`{name}` compresses {of}, not prompts", f"choose from: {', '.join(known)}")
        raise UnknownName("prompt method", name, known, "tcw methods")
    step = recipe.parse_spec(methods.qualified(name, FAMILY) + colon + rest)
    drawn = {"seed": seed} if seed is not None and "seed" in step.options else {}
    built = methods.build(step.method, step.options | drawn)
    assert isinstance(built, PromptMethod)
    return built


def compress(  # noqa: PLR0913  what is asked for, of what, and for whom
    text: str | Sequence[str],
    method: str | PromptMethod,
    *,
    rate: float | None = None,
    target_tokens: int | None = None,
    tokenizer: Any,
    question: str = "",
    instruction: str = "",
    settings: Settings | None = None,
    progress: Report = silent,
) -> Result:
    """Compress a text to an exact number of tokens.

    Args:
        text: the text, or several contexts, which are joined by blank lines. It may hold `<keep>...</keep>`.
        method: a SPEC or a method.
        rate: the share of the text's tokens that is left, 0 < rate <= 1, rounded down, at least one token; or
        target_tokens: the tokens that are left. Exactly one of the two.
        tokenizer: of the model that will read the output; also a function from a text to its number of tokens, or a
            Counter.
        question: what will stand after the text; not compressed and not counted.
        instruction: what will stand before it; as the question.
        settings: how the text is cut and what is protected.
        progress: is told on long work.

    Raises:
        UsageError: rate, target or settings make no sense; what is protected alone is too long; no unit fits.
    """
    started = time.perf_counter()
    settings = settings or Settings()
    method = method_of(method, settings.seed) if isinstance(method, str) else method
    counter = tokenizer if isinstance(tokenizer, Counter) else Counter(tokenizer)
    source = _Source.read([text] if isinstance(text, str) else text, settings.markup)
    before = counter(source.text)
    target = _target(rate, target_tokens, before)
    run = _Run(source, method, settings, counter, target, progress)
    draft = Prompt(
        source.text, run.units, question, instruction, target / max(1, before), counter, settings.device, progress
    )
    if target >= before:
        choice = run.unchanged(before)
        notes = [] if rate == 1 else [f"the text fits already: {before} tokens, {target} asked for"]
    else:
        choice = run.choose(draft)
        notes = run.notes(draft, choice)
    return run.result(choice, notes, before, started)


def controls(result: Result, counter: Counter) -> dict[str, str]:
    """What the simplest methods leave of the same text in as many tokens, word by word and nothing protected."""
    plain = Settings(protect=(), markup=False)
    return {
        name: compress(result.original, name, target_tokens=result.after, tokenizer=counter, settings=plain).text
        for name in CONTROLS
    }


def _target(rate: float | None, tokens: int | None, before: int) -> int:
    """The tokens asked for. Raises UsageError."""
    if (rate is None) == (tokens is None):
        raise UsageError("say either a rate or a number of tokens", "`--rate 0.5` or `--target-tokens 500`")
    if tokens is not None:
        if tokens < 1:
            raise UsageError(f"cannot compress to {tokens} tokens", "ask for 1 or more")
        return tokens
    if not 0 < rate <= 1:  # type: ignore[operator]
        raise UsageError(f"the rate cannot be {rate:g}", "it is the share that is left: more than 0, at most 1")
    # 0.29 * 100 is a little less than 29
    return max(min(1, before), int(rate * before + 1e-9))  # type: ignore[operator]


@dataclass(frozen=True)
class _Source:
    """The contexts joined: their text, where each is in it, and what was marked."""

    text: str
    contexts: tuple[Span, ...]
    marked: tuple[Span, ...]

    @classmethod
    def read(cls, contexts: Sequence[str], markup: bool) -> "_Source":
        parts, places, marked, at = [], [], [], 0
        for context in contexts:
            _check_characters(context)
            clean, spans = protect.read_marks(context) if markup else (context, ())
            parts.append(clean)
            places.append((at, at + len(clean)))
            marked += [(at + start, at + end) for start, end in spans]
            at += len(clean) + len(JOINT)
        return cls(JOINT.join(parts), tuple(places), tuple(marked))


class _Run:
    """One text on its way."""

    def __init__(
        self, source: _Source, method: PromptMethod, settings: Settings, counter: Counter, target: int, progress: Report
    ) -> None:
        self.source, self.method, self.settings = source, method, settings
        self.counter, self.target, self.progress = counter, target, progress
        self.unit = settings.unit or method.unit
        presets = protect.default(self.unit) if settings.protect is None else settings.protect
        self.protection = protect.find(source.text, presets, settings.keep, source.marked, source.contexts)
        spans = cut(source.text, self.unit)
        self.stays = np.zeros(len(spans), dtype=bool)
        self.stays[protect.touched(spans, self.protection.spans)] = True
        self.units = tuple(Unit(*span, bool(stays)) for span, stays in zip(spans, self.stays, strict=True))
        self.layout = Layout(source.text, spans, self.protection.spans, settings.elide)
        starts = [start for start, _ in source.contexts]
        self.context_of = np.array(
            [bisect.bisect_right(starts, begins) - 1 for begins in self.layout.bodies], dtype=int
        )
        self.score_seconds = 0.0
        self.scores: np.ndarray | None = None

    def unchanged(self, before: int) -> Fit:
        """Everything stays."""
        return Fit(np.ones(len(self.units), dtype=bool), before)

    def choose(self, prompt: Prompt) -> Fit:
        """Score the units and keep those that fit. Raises UsageError: even the least is too much."""
        least = self._tokens(self.stays)
        if least > self.target:
            self._refuse(least)
        started = time.perf_counter()
        self.scores = self._scores(prompt)
        self.score_seconds = time.perf_counter() - started
        order = ranking(
            np.where(np.isneginf(self.scores), self.scores[np.isfinite(self.scores)].min() - 1, self.scores)
        )
        found = fit(self.layout, order[~self.stays[order]], self.stays, self.target, self.counter)
        if not found.kept.any():
            raise UsageError(f"no {self.unit} fits into {self.target} tokens", _smaller(self.unit))
        return found

    def notes(self, prompt: Prompt, choice: Fit) -> list[str]:
        """What the user should know of a choice."""
        notes = list(self.method.notes(prompt, choice.kept))
        if choice.tokens < self.target:
            notes.append(
                f"{choice.tokens} tokens, {self.target} asked for: no choice of {self.unit}s makes them exactly"
            )
        if self.unit != "line" and _is_json(prompt.text):
            notes.append("the text is JSON, and what is left is not: `unit=line` or another tool keeps records whole")
        assert self.scores is not None
        left_out = len(set(self.context_of[np.isneginf(self.scores)].tolist()))
        if left_out:
            notes.append(f"{left_out} of {len(self.source.contexts)} contexts left out as a whole")
        return notes

    def result(self, choice: Fit, notes: list[str], before: int, started: float) -> Result:
        """Join what stays and check what is promised of it. Raises TcwError where it does not hold."""
        pieces = tuple(self.layout.pieces(np.flatnonzero(choice.kept).tolist()))
        text = "".join(p if isinstance(p, str) else self.source.text[slice(*p)] for p in pieces)
        spans = [piece for piece in pieces if not isinstance(piece, str)]
        ends = [0, *(end for span in spans for end in span)]
        holds = ends == sorted(ends) and all(contained(self.protection.spans, spans))
        if not holds or self.counter(text) != choice.tokens:
            raise TcwError(
                "the compressed text is not what was chosen", "this is a bug in tcw: report it with the text"
            )
        protection = {name: len(found) for name, found in self.protection.by.items()}
        return Result(
            text, self.source.text, pieces, self.units, choice.kept, self.scores, before, choice.tokens, self.target,
            self._tokens(self.stays) if self.stays.any() else 0, self.counter.name,
            time.perf_counter() - started, self.score_seconds,
            methods.canonical(type(self.method).__module__.rpartition(".")[2]), self.method.options(), self.unit,
            protection, tuple(notes), report.fidelity(self.source.text, spans),
        )  # fmt: skip

    def _tokens(self, kept: np.ndarray) -> int:
        return self.counter(self.layout.join(np.flatnonzero(kept).tolist()))

    def _refuse(self, least: int) -> None:
        if not self.stays.any():
            raise UsageError(
                f"the elision mark alone has {least} tokens, {self.target} are asked for", "take a shorter one"
            )
        parts = {}
        for name, spans in self.protection.by.items():
            mask = np.zeros_like(self.stays)
            mask[protect.touched(self.layout.spans, spans)] = True
            parts[name] = self._tokens(mask)
        shares = ", ".join(f"{name} {tokens}" for name, tokens in sorted(parts.items(), key=lambda p: -p[1]))
        raise UsageError(
            f"what is protected alone has {least} tokens{' with its elision marks' if self.settings.elide else ''}, "
            f"{self.target} are asked for ({shares})",
            f"ask for {least} tokens or more, or protect less: `--protect none` leaves only `--keep` and `<keep>`",
        )

    def _scores(self, prompt: Prompt) -> np.ndarray:
        """The method's scores of all units; -inf in contexts that it leaves out as a whole."""
        left = self._contexts(prompt)
        if left is None:
            return self._asked(prompt)
        numbers = np.flatnonzero(np.isin(self.context_of, left))
        text = JOINT.join(self.source.text[slice(*self.source.contexts[i])] for i in left)
        spans = cut(text, self.unit)
        if len(spans) != len(numbers):
            raise TcwError("contexts do not part at units", "this is a bug in tcw: report it with the contexts")
        units = tuple(Unit(*span, bool(self.stays[n])) for span, n in zip(spans, numbers, strict=True))
        rate = min(1.0, self.target / max(1, self.counter(text)))
        scores = np.full(len(self.units), -np.inf)
        scores[numbers] = self._asked(dataclasses.replace(prompt, text=text, units=units, rate=rate))
        return scores

    def _contexts(self, prompt: Prompt) -> list[int] | None:
        """The numbers of the contexts that the method does not leave out as a whole; None: it looks at all."""
        texts = {
            i: self.source.text[a:b] for i, (a, b) in enumerate(self.source.contexts) if self.source.text[a:b].strip()
        }
        if len(texts) < 2:
            return None
        scores = self.method.context_scores(list(texts.values()), prompt)
        if scores is None:
            return None
        from tcw.prompt._contexts import fill

        taken = fill(scores, self.counter.many(list(texts.values())), self.target)
        return [list(texts)[i] for i in taken] if len(taken) < len(texts) else None

    def _asked(self, prompt: Prompt) -> np.ndarray:
        scores = np.asarray(self.method.scores(prompt), dtype=np.float64)
        if scores.shape != (len(prompt.units),) or not np.isfinite(scores).all():
            raise TcwError(
                f"the method gave {scores.shape} scores for {len(prompt.units)} units, or some are not finite",
                "this is a bug of the method: report it with the text",
            )
        return scores


def _check_characters(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"character {error.start} of the text is half a character (a lone surrogate)", "take it out, or decode anew"
        ) from None


def _smaller(unit: str) -> str:
    smaller = UNITS[: UNITS.index(unit)]
    return f"ask for more tokens, or cut smaller: `--unit {smaller[-1]}`" if smaller else "ask for more tokens"


def _is_json(text: str) -> bool:
    if text.lstrip()[:1] not in ("{", "["):
        return False
    try:
        json.loads(text)
    except ValueError:
        return False
    return True
