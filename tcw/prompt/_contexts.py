"""Several contexts: which of them are worth a place at all, before words are looked at.

LLMLingua (section 4.1) takes the contexts with the highest perplexity: surprising ones tell something. LongLLMLingua
(section 4.1) asks how likely the question becomes after a context: a context that answers it makes it likelier, and a
sentence after the question, which says that it can be answered, makes the difference plainer.
"""

from collections.abc import Sequence

import numpy as np

from tcw.errors import UsageError
from tcw.prompt._lm import ahead
from tcw.prompt.scorer import Scorer

PPL, QUESTION = "ppl", "question"
SLACK = 100  # tokens beyond the budget that the context filter lets pass; upstream's default
_CLAIM = " The documents above answer this question."


def context_scores(scorer: Scorer, contexts: Sequence[str], how: str, question: str) -> np.ndarray:
    """How much each context is worth, float64 [n], higher stays.

    Args:
        scorer: reads all contexts in batches.
        contexts: texts, not empty.
        how: "ppl": mean NLL of the context by itself; "question": minus the mean NLL of the question after it.
        question: for "question".

    Raises:
        UsageError: there is no question to ask.
    """
    if how == QUESTION:
        if not question:
            raise UsageError("contexts cannot be ranked by a question that is not there", "give it, or `rank=ppl`")
        asked = scorer.tokens(question + _CLAIM)
        return -np.array([_mean(nll) for nll in scorer.nll([(ahead(text), asked) for text in contexts])])
    return np.array([_mean(nll) for nll in scorer.nll([("", scorer.tokens(text)) for text in contexts])])


def fill(scores: np.ndarray, sizes: Sequence[int], budget: int, slack: int = SLACK) -> list[int]:
    """Choose contexts, best first, until their tokens are more than `budget + slack`: ascending numbers, at least one.

    Equal scores: the earlier one. The context that passes the limit is taken.
    """
    taken, total = [], 0
    for number in np.argsort(-scores, kind="stable"):
        taken.append(int(number))
        total += sizes[number]
        if total > budget + slack:
            break
    return sorted(taken)


def _mean(nll: np.ndarray) -> float:
    return float(nll.mean(dtype=np.float64)) if len(nll) else 0.0
