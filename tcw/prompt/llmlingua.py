"""LLMLingua: words that a small language model predicts easily can go; the reader will predict them as well.

    score of a word = mean over its tokens of NLL_i = -ln p(x_i | instruction, x_1 .. x_{i-1})

Jiang et al., LLMLingua: Compressing Prompts for Accelerated Inference of Large Language Models, EMNLP 2023,
https://arxiv.org/abs/2310.05736, section 4.3; LongLLMLingua, ACL 2024, https://arxiv.org/abs/2310.06839, section 4.2:
with `contrast`, what the question makes likelier stays:

    score of a token = NLL(x_i | x_<i) - NLL(x_i | question, x_<i)

    onepass    every token is scored after the text as it was; the engine takes the best words of all
    iterative  the paper's: segments of `segment` tokens, each scored after what was LEFT of those before it, so that a
               word that has lost its context counts as surprising; each segment keeps the same share of its tokens

Where we differ: words are whole, never cut (the paper drops tokens); `onepass`, the default, is ours: one forward pass
where `iterative` takes one and `rate` more, and the budget is one for the whole text; in `iterative` the share of a
segment is `rate` everywhere (the paper's may fall with a context's rank), what stays in it is chosen by rank rather
than by a threshold, and the engine then adds or takes words by their rank in their segment until the count is exact.
A text of less than a segment is compressed like any other. Newlines are tokens like any other; protect lines if they
matter. Needs no training; `Prompt.question` only for `contrast` and `rank=question`.

What to expect (benchmarks/prompt_quality.py: SmolLM2-135M scores and reads, half of 320 tokens, nothing protected, 8
windows): a small reader minds text without its little words. Prose goes on no better after words chosen by surprise
than by lot (NLL 0.03 nats higher), and better after the last half of it (0.26 lower). Whole sentences (`unit=sentence`)
do as well as sentences by lot there, and where a question asks for one fact, better than words by lot (2.3 nats), than
the first half (2.3) and perhaps than the last half (0.8, within the noise). `recent` keeps the end of the text whole,
for texts that are to be continued; it closes most of the gap to the last half and does not pass it. For a prompt with a
question, `promptdistill` was better than all of these.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from tcw.errors import UsageError
from tcw.events import Progress
from tcw.methods import option
from tcw.prompt import Prompt
from tcw.prompt._contexts import PPL, QUESTION, context_scores
from tcw.prompt._lm import Asking, ahead, ranks
from tcw.prompt._reader import Reader
from tcw.prompt.scorer import Scorer, Tokens, by_unit, settled, units_of

ONEPASS, ITERATIVE = "onepass", "iterative"


@dataclass(frozen=True)
class Llmlingua(Asking):
    """Keep the words that a small language model finds hardest to predict."""

    paper: ClassVar[str] = "arXiv 2310.05736, 2310.06839"

    mode: str = option(ONEPASS, "score after the whole text, or after what is left of it", choices=(ONEPASS, ITERATIVE))
    contrast: bool = option(False, "score what the question makes likelier, not what is surprising (LongLLMLingua)")
    segment: int = option(200, "tokens of a segment, in mode=iterative")
    recent: float = option(0.0, "share of the budget that goes to the end of the text, kept whole")
    rank: str = option(PPL, "which of several contexts stay: surprising ones, or by the question", (PPL, QUESTION))

    def __post_init__(self) -> None:
        if self.segment < 1:
            raise ValueError(f"`segment` is 1 or more, not {self.segment}")
        if not 0 <= self.recent <= 1:
            raise ValueError(f"`recent` is a share between 0 and 1, not {self.recent:g}")

    def scores(self, prompt: Prompt) -> np.ndarray:
        """Surprise of each unit. Raises UsageError: `contrast` without a question; what the scoring model raises."""
        if self.contrast and not prompt.question:
            raise UsageError("`llmlingua:contrast=on` needs a question", "give the question, or leave `contrast` off")
        scorer = self.scorer(prompt)
        tokens = scorer.tokens(prompt.text)
        if not len(tokens):
            return np.zeros(len(prompt.units))
        found = (
            self._iterative(scorer, tokens, prompt) if self.mode == ITERATIVE else self._onepass(scorer, tokens, prompt)
        )
        return self._with_recent(found, tokens, prompt)

    def _onepass(self, scorer: Scorer, tokens: Tokens, prompt: Prompt) -> np.ndarray:
        heads = self._heads(prompt)
        found = scorer.nll([(head, tokens) for head in heads], prompt.progress)
        return by_unit(found[0] - found[1] if self.contrast else found[0], tokens, prompt.text, prompt.units)

    def _with_recent(self, scores: np.ndarray, tokens: Tokens, prompt: Prompt) -> np.ndarray:
        """The scores, with the units at the end that fill `recent` of the budget above all others."""
        _, unit = units_of(tokens, prompt.text, prompt.units)
        behind = np.bincount(unit, minlength=len(scores))[::-1].cumsum()[::-1]
        return scores + (behind <= self.recent * prompt.rate * len(tokens)) * (np.ptp(scores) + 1)

    def context_scores(self, contexts: Sequence[str], prompt: Prompt) -> np.ndarray:
        """How much each of several contexts is worth: float64 [n], higher stays. Reads the prompt's question only."""
        return context_scores(self.scorer(prompt), contexts, self.rank, prompt.question)

    def _heads(self, prompt: Prompt) -> list[str]:
        """What stands before the text: without and, for `contrast`, with the question."""
        plain = ahead(prompt.instruction)
        return [plain, ahead(prompt.instruction, prompt.question)] if self.contrast else [plain]

    def _iterative(self, scorer: Scorer, tokens: Tokens, prompt: Prompt) -> np.ndarray:
        """1 + rank for units that stay in their segment, rank for those that go."""
        readers = [Reader(scorer, [*scorer.opening, *scorer.tokens(head).ids]) for head in self._heads(prompt)]
        number, unit = units_of(tokens, prompt.text, prompt.units)
        found = np.zeros(len(prompt.units))
        protected = np.array([u.protected for u in prompt.units], bool)
        for low, high in _segments(number, unit, len(tokens), self.segment):
            part = Tokens(tokens.ids[low:high], tokens.spans[low:high])
            for reader in readers:
                reader.room(len(part))
            marks = [reader.mark() for reader in readers]
            nlls = [settled(reader.score(part.ids.tolist())) for reader in readers]
            values = nlls[0] - nlls[1] if self.contrast else nlls[0]
            inside = (number >= low) & (number < high)
            here = np.unique(unit[inside])
            score = by_unit(values, part, prompt.text, prompt.units)[here]
            kept = _best(score, np.bincount(unit[inside], minlength=len(found))[here], protected[here], prompt.rate)
            found[here] = ranks(score) + kept
            stay = np.unique(number[inside & np.isin(unit, here[kept])])
            for reader, mark in zip(readers, marks, strict=True):
                reader.back(mark)
                reader.read(tokens.ids[stay].tolist())
            prompt.progress(Progress("score", high, len(tokens), "tokens"))
        return found


def _segments(number: np.ndarray, unit: np.ndarray, tokens: int, length: int) -> Iterator[tuple[int, int]]:
    """Cut tokens into segments of at least `length` that share no unit: [low, high)."""
    last = np.zeros(tokens, np.int64)
    np.maximum.at(last, number, unit)
    first = np.full(tokens, np.iinfo(np.int64).max)
    np.minimum.at(first, number, unit)
    # a cut before token i is clean when no earlier token has a part in its units
    clean = first[1:] > np.maximum.accumulate(last)[:-1]
    low = 0
    for cut in np.flatnonzero(clean) + 1:
        if cut - low >= length:
            yield low, int(cut)
            low = int(cut)
    if low < tokens:
        yield low, tokens


def _best(score: np.ndarray, sizes: np.ndarray, protected: np.ndarray, rate: float) -> np.ndarray:
    """Which units of a segment stay: the protected ones, then the best while `rate` of the tokens is not passed."""
    room = rate * sizes.sum()
    kept = protected.copy()
    total = sizes[kept].sum()
    for i in np.argsort(-score, kind="stable"):
        if not kept[i] and total + sizes[i] <= room:
            kept[i] = True
            total += sizes[i]
    return kept
