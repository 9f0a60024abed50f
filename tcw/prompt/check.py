"""Whether a shorter prompt does what the original does: one model answers both, and controls of equal length.

From strict to loose, always greedy and one prompt at a time:

    NLL      of the ORIGINAL's answer, teacher-forced after each prompt: mean over its tokens, and the worst token
    same     share of the original's greedy answer that each prompt's greedy answer begins with
    f1       of the words of the two answers

The answer that is scored is a given one (the right one, or the text that really follows), or else the greedy answer to
the original, a token or more. A method is worth nothing unless it beats the controls (`truncate`, `random`) at the
same number of tokens; the summary says so when it does not. A text pass is never "lossless": answers are equal on so
many of so many prompts.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from tcw.errors import UsageError
from tcw.events import Progress, Report, silent
from tcw.prompt._reader import Reader
from tcw.prompt.scorer import DEFAULT, Scorer, load_scorer

ORIGINAL, COMPRESSED = "original", "compressed"
_DRAWS = 2000  # of the bootstrap


@dataclass(frozen=True)
class Case:
    """A prompt before and after.

    Attributes:
        original, compressed: the text, whole and compressed.
        question, instruction: what stands after and before it; "" for none.
        answer: what is scored, as it stands (it brings its own white space); None: the greedy answer to the original.
        controls: the text shortened by simpler means to as many tokens, by name.
    """

    original: str
    compressed: str
    question: str = ""
    instruction: str = ""
    answer: str | None = None
    controls: Mapping[str, str] = field(default_factory=dict)

    def prompt(self, text: str) -> str:
        """What a model is given for a text."""
        return "\n\n".join(part for part in (self.instruction, text, self.question) if part)


@dataclass(frozen=True)
class Reading:
    """What a model makes of one prompt.

    Attributes:
        tokens: of the whole prompt.
        nll, worst: of the original's answer after this prompt, mean and largest, nats a token.
        answer: the greedy answer to this prompt.
        same: share of the greedy answer to the original, in tokens, up to the first difference; of the same length too
            if 1.
        f1: of the words of the two greedy answers.
    """

    tokens: int
    nll: float
    worst: float
    answer: str
    same: float
    f1: float


@dataclass(frozen=True)
class Checked:
    """One case.

    Attributes:
        model: who answered.
        scored: where the scored answer is from: "given" or "generated".
        answer_tokens: how many of its tokens were scored.
        original, compressed, controls: what became of each prompt.
    """

    model: str
    scored: str
    answer_tokens: int
    original: Reading
    compressed: Reading
    controls: dict[str, Reading]

    @property
    def rise(self) -> float:
        """By how much the compressed prompt makes the answer less likely, nats a token."""
        return self.compressed.nll - self.original.nll

    @property
    def better_than(self) -> dict[str, bool]:
        """Whether the answer is likelier than under each control."""
        return {name: self.compressed.nll < reading.nll for name, reading in self.controls.items()}

    def to_json(self) -> dict[str, Any]:
        """All of it, with `rise` and `better_than`."""
        return {**asdict(self), "rise": self.rise, "better_than": self.better_than}

    def readings(self) -> dict[str, Reading]:
        """Every prompt's, by name."""
        return {ORIGINAL: self.original, COMPRESSED: self.compressed, **self.controls}


def check(
    case: Case, model: str | Scorer = DEFAULT, *, device: str = "auto", tokens: int = 64, chat: bool = False
) -> Checked:
    """Compare a compressed prompt with the original and with controls.

    Args:
        case: the prompts.
        model: what tcw takes as MODEL, or a loaded one.
        device: as typed.
        tokens: that are generated, at most; as many of a given answer are scored.
        chat: put the prompt into the model's chat template, as the user's turn.

    Raises:
        UsageError: prompt and answer are longer than the model can read; there is no text or no answer; there is no
            chat template.
    """
    scorer = load_scorer(model, device) if isinstance(model, str) else model
    if not case.original.strip():
        raise UsageError("there is no prompt to check")
    texts = {ORIGINAL: case.original, COMPRESSED: case.compressed, **case.controls}
    prompts = {name: _ids(scorer, case.prompt(text), chat) for name, text in texts.items()}
    given = None if case.answer is None else scorer.tokens(case.answer).ids[:tokens].tolist()
    if not all(prompts.values()):
        raise UsageError("nothing is left of a prompt, so nothing can be checked", "ask for more tokens")
    _must_fit(scorer, max(map(len, prompts.values())) + tokens)
    reference = scored = _after(scorer, prompts[ORIGINAL], tokens, None)[0]
    if given is not None:
        scored = given
    if not scored:
        raise UsageError("there is no answer to score: the given one is empty")
    readings = {name: _reading(scorer, ids, scored, reference, tokens) for name, ids in prompts.items()}
    original, compressed = readings.pop(ORIGINAL), readings.pop(COMPRESSED)
    return Checked(scorer.name, "generated" if given is None else "given", len(scored), original, compressed, readings)


def check_all(
    cases: Sequence[Case], model: str | Scorer = DEFAULT, *, device: str = "auto", tokens: int = 64,
    chat: bool = False, progress: Report = silent,
) -> list[Checked]:  # fmt: skip
    """`check` for each case."""
    found = []
    for done, case in enumerate(cases, 1):
        found.append(check(case, model, device=device, tokens=tokens, chat=chat))
        progress(Progress("check", done, len(cases), "prompts"))
    return found


def summary(results: Sequence[Checked], seed: int = 0) -> dict[str, Any]:
    """Means over cases with 95 % bootstrap intervals of the rise, and a verdict in words.

    Returns:
        cases, model, answer_tokens; `variants`: by name, of those that all cases have, the mean `tokens`, `nll`,
        `rise`, `rise_interval`, `equal` (share of greedy answers that are the original's), `same`, `f1`; `margins`: by
        control, how much lower the compressed prompt's NLL is, mean and interval; `verdict`: a sentence.

    Raises ValueError where there is no result.
    """
    if not results:
        raise ValueError("nothing was checked")
    names = [name for name in results[0].readings() if all(name in result.readings() for result in results)]
    nll = {name: np.array([result.readings()[name].nll for result in results]) for name in names}
    variants = {}
    for name in names:
        readings = [result.readings()[name] for result in results]
        rises = nll[name] - nll[ORIGINAL]
        variants[name] = {
            "tokens": _mean([r.tokens for r in readings]), "nll": float(nll[name].mean()),
            "rise": float(rises.mean()), "rise_interval": interval(rises, seed),
            "equal": _mean([r.same == 1 for r in readings]), "same": _mean([r.same for r in readings]),
            "f1": _mean([r.f1 for r in readings]),
        }  # fmt: skip
    gains = {name: nll[name] - nll[COMPRESSED] for name in names if name not in (ORIGINAL, COMPRESSED)}
    margins = {name: {"mean": float(gain.mean()), "interval": interval(gain, seed)} for name, gain in gains.items()}
    return {
        "cases": len(results), "model": results[0].model, "answer_tokens": sum(r.answer_tokens for r in results),
        "variants": variants, "margins": margins, "verdict": _verdict(margins, len(results)),
    }  # fmt: skip


def interval(values: np.ndarray, seed: int = 0) -> list[float]:
    """95 % bootstrap interval of the mean of `values` [n]: [low, high]; of one value, that value twice."""
    draws = np.random.default_rng(seed).integers(len(values), size=(_DRAWS, len(values)))
    return [float(x) for x in np.percentile(values[draws].mean(1), [2.5, 97.5])]


def word_f1(one: str, other: str) -> float:
    """F1 of the words of two texts, as bags; 1 for two empty ones."""
    a, b = Counter(one.split()), Counter(other.split())
    shared = (a & b).total()
    return 2 * shared / (a.total() + b.total()) if a or b else 1.0


def _verdict(margins: dict[str, dict[str, Any]], cases: int) -> str:
    if not margins:
        return "no control was run"
    beaten = [name for name, margin in margins.items() if margin["interval"][0] > 0]
    rest = [name for name in margins if name not in beaten]
    parts = [
        f"{words} {' and '.join(found)}"
        for words, found in (("no better than", rest), ("better than", beaten))
        if found
    ]
    return f"{', '.join(parts)}, on {cases} prompt{'s' * (cases != 1)}"


def _reading(scorer: Scorer, ids: list[int], scored: list[int], reference: list[int], tokens: int) -> Reading:
    answer, nll = _after(scorer, ids, tokens, scored)
    agree = next((i for i, (a, b) in enumerate(zip(answer, reference, strict=False)) if a != b), None)
    if agree is None:
        agree = min(len(answer), len(reference))
    longest = max(len(answer), len(reference))
    said = [scorer.tokenizer.decode(part, skip_special_tokens=True) for part in (answer, reference)]
    return Reading(
        len(ids), float(np.mean(nll, dtype=np.float64)), float(np.max(nll)), said[0],
        agree / longest if longest else 1.0, word_f1(*said),
    )  # fmt: skip


def _after(scorer: Scorer, ids: list[int], tokens: int, scored: list[int] | None) -> tuple[list[int], np.ndarray]:
    """The greedy answer after a prompt, and the NLL of the tokens `scored` after it."""
    reader = Reader(scorer)
    reader.read(ids)
    nll = np.empty(0, np.float32)
    if scored:
        place = reader.mark()
        nll = reader.score(scored)
        reader.back(place)
    return reader.greedy(tokens, _ends(scorer)), nll


def _ids(scorer: Scorer, prompt: str, chat: bool) -> list[int]:
    """A whole prompt's ids, with what the tokenizer opens a text with."""
    if not chat:
        return [*scorer.opening, *scorer.tokens(prompt).ids.tolist()]
    if not getattr(scorer.tokenizer, "chat_template", None):
        raise UsageError(f"`{scorer.name}` has no chat template", "check without `chat`")
    said = scorer.tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    return list(scorer.tokenizer(said, add_special_tokens=False, verbose=False)["input_ids"])


def _ends(scorer: Scorer) -> frozenset[int]:
    ends = getattr(scorer.model.generation_config, "eos_token_id", None)
    return frozenset(ends if isinstance(ends, list) else [] if ends is None else [ends])


def _must_fit(scorer: Scorer, tokens: int) -> None:
    if tokens > scorer.context:
        raise UsageError(
            f"prompt and answer have {tokens} tokens, `{scorer.name}` reads {scorer.context}",
            "check a shorter prompt, or with a model that reads more",
        )


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
