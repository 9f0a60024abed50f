"""One text read bit by bit, with its KV cache, that can be cut back: to read on from a shortened text."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tcw.errors import UsageError
from tcw.prompt.scorer import ROWS, Scorer, losses

SINKS = 10  # tokens at the start that stay when a text outgrows the window; LLMLingua's number


class Reader:
    """What a model has read so far.

    Where the text outgrows the scorer's window, its first `SINKS` tokens and its newest, half a window, are read again
    as one text from position 0: keys and values of a cache know the positions at which they were made.

    Attributes:
        ids: all tokens read and not taken back, since the last time that the window was full.
        head: how many tokens at the start stay when the window is full.
    """

    def __init__(self, scorer: Scorer, head: Sequence[int] = ()) -> None:
        """Read `head`, ids that begin with BOS where the tokenizer has one."""
        self.scorer = scorer
        self.ids: list[int] = []
        self._cache: Any = None
        self._before: Tensor | None = None
        self.read(head)
        self.head = max(SINKS, len(self.ids))

    def room(self, count: int) -> None:
        """Make sure that `count` tokens fit: forget the middle of the text if they do not."""
        if len(self.ids) + count <= self.scorer.window:
            return
        recent = self.scorer.window // 2 - self.head
        if recent < 1 or self.scorer.window // 2 + count > self.scorer.window:
            raise UsageError(
                f"`{self.scorer.name}` reads {self.scorer.window} tokens at once, too few for {self.head} and {count}",
                "use a model that reads more, a shorter question, or shorter segments",
            )
        ids = [*self.ids[: self.head], *self.ids[max(self.head, len(self.ids) - recent) :]]
        self.ids, self._cache, self._before = [], None, None
        self.read(ids)

    def read(self, ids: Sequence[int]) -> None:
        """Read on."""
        self._run(ids, scores=False)

    def score(self, ids: Sequence[int]) -> np.ndarray:
        """Read on and return the NLL of each token, float32 [n]; NaN for the first token of all."""
        return self._run(ids, scores=True)

    @torch.inference_mode()
    def _run(self, ids: Sequence[int], scores: bool) -> np.ndarray:
        found, model = [np.empty(0, np.float32)], self.scorer.model
        few = {} if scores or not self.scorer.keeps_logits else {"logits_to_keep": 1}
        for start in range(0, len(ids), ROWS):
            part = torch.tensor([list(ids[start : start + ROWS])], device=model.device)
            out = model(input_ids=part, past_key_values=self._cache, use_cache=True, **few)
            if scores:
                found.append(losses(out.logits, part, self._before)[0].cpu().numpy())
            self._before, self._cache = out.logits[:, -1:].clone(), out.past_key_values
        self.ids += ids
        return np.concatenate(found)

    def mark(self) -> tuple[int, Tensor | None]:
        """Remember this place for `back`."""
        return len(self.ids), self._before

    def back(self, mark: tuple[int, Tensor | None]) -> None:
        """Take back what was read since `mark`. A cache that cannot be cut (sliding windows) is made again."""
        length, before = mark
        extra, ids = len(self.ids) - length, self.ids[:length]
        try:
            if length and extra:
                self._cache.crop(-extra)
            self.ids, self._before, self._cache = ids, before, self._cache if length else None
        except (AttributeError, NotImplementedError, RuntimeError, ValueError):
            self.ids, self._before, self._cache = [], None, None
            self.read(ids)

    def greedy(self, count: int, stop: frozenset[int]) -> list[int]:
        """Go on with the likeliest tokens, at most `count`, up to one of `stop` (which is not part of it).

        The first token is none of `stop`: chat models asked without their template like to end at once.
        """
        found: list[int] = []
        while len(found) < count and self._before is not None:
            logits = self._before[0, -1].float()
            if not found:
                logits = logits.index_fill(0, torch.tensor(sorted(stop), device=logits.device).long(), -torch.inf)
            token = int(logits.argmax())
            if token in stop:
                break
            found.append(token)
            self.read([token])
        return found
