"""ASAP: of a chain of thought, drop the steps whose first word comes as no surprise.

    surprise of paragraph j = -ln p(its first token | question, everything before it)

Zeng et al., ASAP: Pruning the Unsurprising (Efficient Code Reasoning via First-Token Surprisal), 2025,
https://arxiv.org/abs/2508.05988, second stage: a step that begins as expected follows from what stands there already.
One forward pass; paragraphs go in increasing order of surprise. The first token is the first one that holds a character
other than white space, found by the offsets of one tokenisation.

Where we differ: the paper first lets a strong model cut what is off the path, and trains on the result; both are out of
scope here. The paper may drop any paragraph; here the first and the last (the task and the answer), and all
paragraphs of a code fence that spans several of them, go after all others: their scores lie above. Words that open a
thought by habit ("So", "Wait") are expected, so steps that begin with them go first: `notes` says how many did.
"""

from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from tcw.prompt import Prompt
from tcw.prompt._lm import Asking, ahead
from tcw.prompt.scorer import Tokens

_FENCE = ("```", "~~~")
_NAMED = 8  # openers in the report


@dataclass(frozen=True)
class Asap(Asking):
    """Drop the steps of a chain of thought whose first word comes as no surprise."""

    paper: ClassVar[str] = "arXiv 2508.05988"
    unit: ClassVar[str] = "paragraph"

    def scores(self, prompt: Prompt) -> np.ndarray:
        """Surprise of the first token of each unit; anchored units lie above all others."""
        scorer = self.scorer(prompt)
        tokens = scorer.tokens(prompt.text)
        nll = scorer.nll([(ahead(prompt.instruction, prompt.question), tokens)], prompt.progress)[0]
        first = first_tokens(tokens, prompt)
        found = np.where(first < 0, 0.0, nll[first] if len(nll) else 0.0).astype(np.float64)
        return found + anchored(prompt) * (found.max(initial=0) + 1)

    def notes(self, prompt: Prompt, kept: np.ndarray) -> list[str]:
        """The words that most of the steps that were cut begin with."""
        cut = (prompt.text[u.start : u.end].split() for u, stays in zip(prompt.units, kept, strict=True) if not stays)
        first = Counter(words[0].strip(".,:;!?") for words in cut if words)
        named = ", ".join(f"{word} {count}" for word, count in first.most_common(_NAMED))
        return [f"{first.total()} units cut; they begin with: {named}"] if first else []


def first_tokens(tokens: Tokens, prompt: Prompt) -> np.ndarray:
    """The first token of each unit that holds a character of it other than white space: int64 [units], -1 for none."""
    found = np.full(len(prompt.units), -1, np.int64)
    for i, unit in enumerate(prompt.units):
        own = prompt.text[unit.start : unit.end]
        begins = unit.start + len(own) - len(own.lstrip())
        if begins < unit.end:
            # ends never fall, so the first token that ends behind a character holds it
            found[i] = np.searchsorted(tokens.spans[:, 1], begins, side="right")
    return np.where(found < len(tokens), found, -1)


def anchored(prompt: Prompt) -> np.ndarray:
    """Units that go last: the first, the last, and those of code fences that span several. bool [units]."""
    found = np.zeros(len(prompt.units), bool)
    found[:1] = found[-1:] = True
    opened: int | None = None
    for i, unit in enumerate(prompt.units):
        for line in prompt.text[unit.start : unit.end].splitlines():
            if line.lstrip().startswith(_FENCE):
                if opened is not None and opened < i:
                    found[opened : i + 1] = True
                opened = i if opened is None else None
    if opened is not None:
        found[opened:] = True
    return found
