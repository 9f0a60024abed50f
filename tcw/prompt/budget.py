"""An exact budget: units are chosen by score until the joined text has the tokens asked for, no fewer and no more.

Tokens of a text are not the sum of the tokens of its units: a tokenizer may merge across a join, and a gap changes the
white space. So what is counted is always the output itself.

1. The number of units: by interpolation and bisection on the tokens of the best k units, joined. About ten counts.
2. The rest, a few tokens: single units around the cut are put in or taken out, the fewest places in the ranking away
   from it. What each would change is counted with up to 8 kept units on either side of it; which of them together make
   up the rest is a subset-sum problem, solved exactly for the 32 on either side of the cut, then 128, then 512. The
   text is counted again; where neighbours changed each other, another round follows.

If no combination is found the text has fewer tokens, never more. The search is ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tcw.prompt.units import Layout

_AROUND = 8  # kept units on either side that a unit is counted with, at most
_CHARACTERS = 400  # and at least one: fewer where units are long, so that these are about as many characters
_WIDTHS = (32, 128, 512)  # candidates on either side of the cut
_ROUNDS = 12  # corrections with each
_REACH = 2048  # tokens that a sum of changes may wander from nothing


class Counter:
    """Counts tokens as the model that reads the text will: without special tokens.

    Made of a transformers tokenizer, or of a function from a text to its number of tokens.
    """

    def __init__(self, tokenizer: Any, name: str = "") -> None:
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        self._tokenizer = tokenizer
        self.name = name or str(getattr(tokenizer, "name_or_path", "") or getattr(tokenizer, "__name__", "counter"))

    def __call__(self, text: str) -> int:
        """The number of tokens of `text`."""
        if self._backend is not None:
            return len(self._fast().encode(text, add_special_tokens=False).ids)
        if hasattr(self._tokenizer, "encode"):
            return len(self._tokenizer.encode(text, add_special_tokens=False))
        return int(self._tokenizer(text))

    def many(self, texts: Sequence[str]) -> list[int]:
        """The number of tokens of each text."""
        if self._backend is not None:
            return [len(found.ids) for found in self._fast().encode_batch(list(texts), add_special_tokens=False)]
        return [self(text) for text in texts]

    def _fast(self) -> Any:
        """The tokenizer itself, or a copy that neither truncates nor pads: some are stored so, or set so by a call."""
        assert self._backend is not None
        if self._backend.truncation is not None or self._backend.padding is not None:
            self._backend = type(self._backend).from_str(self._backend.to_str())
            self._backend.no_truncation()
            self._backend.no_padding()
        return self._backend


@dataclass(frozen=True)
class Fit:
    """Which units stay (bool [units]), and how many tokens they make when joined."""

    kept: np.ndarray
    tokens: int


def ranking(scores: np.ndarray) -> np.ndarray:
    """The numbers of all units, best first; of equal scores the earlier one is better. int64 [units]."""
    return np.argsort(-scores, kind="stable")


def fit(layout: Layout, order: np.ndarray, protected: np.ndarray, target: int, counter: Counter) -> Fit:
    """Choose units in `order` until the joined text has `target` tokens.

    Args:
        layout: the units of the text.
        order: the units that may go, best first; int64.
        protected: the units that must stay; bool [units]. Alone they have no more than `target` tokens.
        target: tokens of the output.
        counter: counts them.
    """
    search = _Search(layout, order, protected, target, counter)
    taken = search.cut()
    for width in _WIDTHS:
        if search.best.tokens == target or not search.refine(taken, width):
            break
    return search.best


class _Search:
    """The state of one search: the best choice so far, and what has been tried."""

    def __init__(self, layout: Layout, order: np.ndarray, protected: np.ndarray, target: int, counter: Counter) -> None:
        self.layout, self.order, self.protected = layout, order, protected
        self.target, self.counter = target, counter
        self.best = Fit(protected, self.count(protected))
        self._around = max(1, min(_AROUND, _CHARACTERS * len(layout) // max(1, len(layout.text))))
        self._tried: set[bytes] = set()

    def count(self, kept: np.ndarray) -> int:
        """The tokens of the units `kept`, joined."""
        return self.counter(self.layout.join(np.flatnonzero(kept).tolist()))

    def _first(self, k: int) -> np.ndarray:
        kept = self.protected.copy()
        kept[self.order[:k]] = True
        return kept

    def _note(self, kept: np.ndarray, tokens: int) -> None:
        if self.best.tokens < tokens <= self.target:
            self.best = Fit(kept, tokens)

    def cut(self) -> int:
        """The most units in order that fit; bisection with a first guess from the tokens of each unit alone."""
        alone = np.array(self.counter.many([self.layout.text[a:b] for a, b in self.layout.spans]))
        total = np.concatenate([[0], np.cumsum(alone[self.order])]).astype(float)
        low, tokens_low, high, tokens_high = 0, self.best.tokens, len(self.order), None
        for step in range(2 * len(self.order).bit_length() + 2):
            if high - low <= 1 or tokens_low == self.target:
                break
            span = (tokens_high or tokens_low + total[high] - total[low]) - tokens_low
            goal = total[low] + (self.target - tokens_low) * (total[high] - total[low]) / max(1.0, span)
            guess = int(np.searchsorted(total, goal, "right")) - 1
            # every third step halves, so that a bad guess cannot creep
            k = (low + high) // 2 if step % 3 == 2 else min(high - 1, max(low + 1, guess))
            tokens = self.count(self._first(k))
            if tokens <= self.target:
                low, tokens_low = k, tokens
                self._note(self._first(k), tokens)
            else:
                high, tokens_high = k, tokens
        return low

    def refine(self, taken: int, width: int) -> bool:
        """Make up the rest with `width` units on either side of the cut; False: nothing is left to try with more.

        `taken` is where the cut is: the number of units, in order, that fit.
        """
        kept, tokens, banned = self.best.kept.copy(), self.best.tokens, set[int]()
        places = np.arange(max(0, taken - width), min(len(self.order), taken + width))
        for _ in range(_ROUNDS):
            if tokens == self.target:
                break
            self._tried.add(kept.tobytes())
            free = np.array([p for p in places if int(self.order[p]) not in banned], dtype=int)
            changes = self._changes(kept, self.order[free])
            flips = _make_up(changes, _cost(free, taken), self.target - tokens)
            if not len(flips):
                break
            toggled = kept.copy()
            toggled[self.order[free[flips]]] ^= True
            if toggled.tobytes() in self._tried:
                banned.add(int(self.order[free[flips[0]]]))
                continue
            kept, tokens = toggled, self.count(toggled)
            self._note(kept, tokens)
        return len(places) < len(self.order)

    def _changes(self, kept: np.ndarray, units: np.ndarray) -> np.ndarray:
        """By how many tokens the output grows when each of `units` is put in, or taken out if it is in."""
        standing = np.flatnonzero(kept)
        texts: list[str] = []
        for unit in units.tolist():
            at = int(np.searchsorted(standing, unit))
            before = standing[max(0, at - self._around) : at].tolist()
            after = standing[at + int(kept[unit]) :][: self._around].tolist()
            texts += [self.layout.join([*before, *after]), self.layout.join([*before, unit, *after])]
        counts = np.array(self.counter.many(texts)).reshape(-1, 2)
        return (counts[:, 1] - counts[:, 0]) * np.where(kept[units], -1, 1)


def _cost(places: np.ndarray, taken: int) -> np.ndarray:
    """How far in the ranking each change is from the cut."""
    return np.where(places < taken, taken - places, places - taken + 1)


def _make_up(changes: np.ndarray, costs: np.ndarray, rest: int) -> np.ndarray:
    """The cheapest set of changes that adds up to `rest`, or to the most that is below it; numbers, int64.

    A rest below nothing (the text has too many tokens) must be made up wholly. Ties: the earlier change is left out.
    """
    reach = min(_REACH, abs(rest) + 4 * int(np.abs(changes).max(initial=1)))
    none = np.iinfo(np.int64).max // 2
    best = np.full(2 * reach + 1, none, dtype=np.int64)  # cost by sum; the middle is a sum of 0
    best[reach] = 0
    took = np.zeros((len(changes), len(best)), dtype=bool)
    for i, (change, cost) in enumerate(zip(changes.tolist(), costs.tolist(), strict=True)):
        if change == 0 or abs(change) > 2 * reach:
            continue
        shifted = np.full_like(best, none)
        if change > 0:
            shifted[change:] = best[:-change]
        else:
            shifted[:change] = best[-change:]
        took[i] = shifted + cost < best
        best = np.where(took[i], shifted + cost, best)
    lowest = reach + min(0, rest)
    reachable = np.flatnonzero(best[lowest : reach + rest + 1] < none)
    if abs(rest) > reach or not len(reachable):
        return np.zeros(0, dtype=np.int64)
    at = lowest + int(reachable[-1])
    chosen: list[int] = []
    for i in range(len(changes) - 1, -1, -1):
        if took[i, at]:
            chosen.append(i)
            at -= int(changes[i])
    return np.array(chosen[::-1], dtype=np.int64)
