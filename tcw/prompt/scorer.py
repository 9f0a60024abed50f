"""A language model that scores text: how surprising each token is, given what stands before it.

    NLL_i = -ln p(x_i | prefix, x_1 .. x_{i-1})           nats

A text is tokenised once and tokens are tied to characters by the tokenizer's offsets; no prefix is ever tokenised to
find out where a token begins. A text longer than the window is read in windows that overlap by half, so that every
token but the first ones is scored with at least half a window before it. The prefix stands at the head of each window.

Where a tokenizer opens a text with BOS, so do we; where it does not, nothing predicts the first token of a text without
a prefix, and it gets the mean of the others.
"""

import functools
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tcw.device import pick
from tcw.errors import MissingDependency, UsageError
from tcw.events import Progress, Report, silent
from tcw.prompt import Unit
from tcw.runtime.load import load, tokenizer
from tcw.source import open_source

DEFAULT = "demo:smollm2"
WINDOW = 4096  # tokens, at most: attention over more costs much and changes little
ROWS = 512  # tokens whose logits are in memory at once: 0.4 GB in float32 for a vocabulary of 200,000
_BATCH = 4096  # tokens of a batch


@dataclass(frozen=True)
class Tokens:
    """A text under a tokenizer: `ids` int64 [n], `spans` int64 [n, 2], the characters that each token stands for.

    Spans of neighbours may overlap where a character takes several tokens. White space that a tokenizer leaves out of
    its offsets is part of the token that follows it, so spans cover the text.
    """

    ids: np.ndarray
    spans: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)


def tokens_of(tokenizer: Any, text: str) -> Tokens:
    """Tokenise a text, without special tokens. Raises UsageError: the tokenizer cannot say which characters it took."""
    if not getattr(tokenizer, "is_fast", False):
        raise UsageError(
            "the scoring model's tokenizer gives no character offsets", "use a model with a tokenizer.json"
        )
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    spans = np.asarray(found["offset_mapping"], np.int64).reshape(-1, 2)
    if len(spans):
        before = np.concatenate([[0], np.maximum.accumulate(spans[:, 1])[:-1]])
        spans[:, 0] = np.minimum(spans[:, 0], before)
        spans[-1, 1] = len(text)
    return Tokens(np.asarray(found["input_ids"], np.int64), spans)


def units_of(tokens: Tokens, text: str, units: Sequence[Unit]) -> tuple[np.ndarray, np.ndarray]:
    """Which units each token has a part in: token numbers and unit numbers, both int64 [m], in order.

    A token is in every unit of which it holds a character; white space counts only in a token that is nothing else.
    """
    solid = np.fromiter((not c.isspace() for c in text), bool, len(text))
    where = np.flatnonzero(solid)
    first, last = np.searchsorted(where, tokens.spans[:, 0]), np.searchsorted(where, tokens.spans[:, 1])
    start, end = tokens.spans[:, 0].copy(), tokens.spans[:, 1].copy()
    some = last > first
    start[some], end[some] = where[first[some]], where[last[some] - 1] + 1
    begins = np.array([unit.start for unit in units], np.int64)
    low = np.searchsorted(begins, start, side="right") - 1
    high = np.maximum(low, np.searchsorted(begins, end, side="left") - 1)
    counts = high - low + 1
    number = np.repeat(np.arange(len(low)), counts)
    offset = np.arange(len(number)) - np.repeat(np.cumsum(counts) - counts, counts)
    return number, low[number] + offset


def by_unit(
    values: np.ndarray, tokens: Tokens, prompt_text: str, units: Sequence[Unit], how: str = "mean"
) -> np.ndarray:
    """Bring values of tokens [n] to units: the mean or the maximum over a unit's tokens, float64 [units].

    A unit without a token (a normaliser took it away) gets the lowest value: a model does not read it.
    """
    number, unit = units_of(tokens, prompt_text, units)
    taken = values[number].astype(np.float64)
    lowest = float(taken.min()) if len(taken) else 0.0
    count = np.bincount(unit, minlength=len(units))
    if how == "max":
        found = np.full(len(units), -np.inf)
        np.maximum.at(found, unit, taken)
    else:
        found = np.bincount(unit, taken, len(units)) / np.maximum(count, 1)
    return np.where(count > 0, found, lowest)


@dataclass(frozen=True)
class _Piece:
    """A window: its tokens, from which on they are scored, and where the scores go."""

    ids: np.ndarray
    first: int
    job: int
    at: int


@dataclass(frozen=True, eq=False)
class Scorer:
    """A causal language model and its tokenizer.

    Attributes:
        model: in eval mode.
        tokenizer: of transformers, a fast one.
        name: to show.
        window: tokens of a window; by default what the model can read, at most `WINDOW`.
        opening: ids that open every text: BOS, where the tokenizer puts one.
    """

    model: Any
    tokenizer: Any
    name: str = ""
    window: int = 0
    opening: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        marked = self.tokenizer("a", verbose=False)["input_ids"]
        opens = bool(marked) and marked[0] == self.tokenizer.bos_token_id is not None
        object.__setattr__(self, "opening", (marked[0],) if opens else ())
        object.__setattr__(self, "window", self.window or min(self.context, WINDOW))

    @property
    def context(self) -> int:
        """Tokens that the model can read."""
        return int(getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or WINDOW)

    @property
    def keeps_logits(self) -> bool:
        """Whether the model can leave out logits that nobody asks for."""
        return "logits_to_keep" in inspect.signature(self.model.forward).parameters

    def tokens(self, text: str) -> Tokens:
        """Tokenise a text, without special tokens."""
        return tokens_of(self.tokenizer, text)

    def nll(self, jobs: Sequence[tuple[str, Tokens]], progress: Report = silent) -> list[np.ndarray]:
        """Score texts, each after its own prefix (a string that is not scored): a list of float32 [n].

        Texts are read in batches of similar length. Raises UsageError: a prefix leaves no room in the window.
        """
        pieces = [piece for i, (prefix, tokens) in enumerate(jobs) for piece in self._pieces(i, prefix, tokens.ids)]
        found = [np.full(len(tokens), np.nan, np.float32) for _, tokens in jobs]
        total, done = sum(len(piece.ids) for piece in pieces), 0
        for batch in _batches(pieces):
            for piece, values in zip(batch, self._run(batch), strict=True):
                found[piece.job][piece.at : piece.at + len(values)] = values
            done += sum(len(piece.ids) for piece in batch)
            progress(Progress("score", done, total, "tokens"))
        return [settled(values) for values in found]

    def _pieces(self, job: int, prefix: str, ids: np.ndarray) -> Iterator[_Piece]:
        head = np.array([*self.opening, *self.tokens(prefix).ids], np.int64)
        room = self.window - len(head)
        if room < self.window // 4 and len(ids) > room:
            raise UsageError(
                f"the question and the instruction have {len(head)} tokens, the window of `{self.name}` {self.window}",
                "shorten them, or score with a model that reads more",
            )
        start = scored = 0
        while scored < len(ids):
            part = ids[start : start + room]
            # nothing predicts the first token of all where there is no head
            first = max(1, len(head) + scored - start)
            yield _Piece(np.concatenate([head, part]), first, job, start + first - len(head))
            scored = start + len(part)
            start = scored - room // 2

    @torch.inference_mode()
    def _run(self, batch: Sequence[_Piece]) -> list[np.ndarray]:
        """Scores of a batch. Padding stands after the tokens, which never see it: no mask is needed."""
        length = max(len(piece.ids) for piece in batch)
        ids = torch.zeros(len(batch), length, dtype=torch.int64)
        for row, piece in enumerate(batch):
            ids[row, : len(piece.ids)] = torch.from_numpy(piece.ids)
        ids, cache, before, columns = ids.to(self.model.device), None, None, []
        step = max(1, ROWS // len(batch))
        for start in range(0, length, step):
            out = self.model(input_ids=ids[:, start : start + step], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            columns.append(losses(out.logits, ids[:, start : start + step], before))
            before = out.logits[:, -1:].clone()
        table = torch.cat(columns, 1).cpu().numpy()
        return [table[row, piece.first : len(piece.ids)] for row, piece in enumerate(batch)]


def losses(logits: Tensor, ids: Tensor, before: Tensor | None) -> Tensor:
    """NLL of tokens that were just read.

    Args:
        logits: [B, n, vocabulary], of those tokens.
        ids: int64 [B, n].
        before: [B, 1, vocabulary], the logits of the token before them; None: there was none.

    Returns:
        float32 [B, n], NaN where nothing predicts the first token.
    """
    values = torch.full(ids.shape, torch.nan, dtype=torch.float32, device=ids.device)
    if before is not None:
        values[:, :1] = _loss(before, ids[:, :1])
    if ids.shape[1] > 1:
        values[:, 1:] = _loss(logits[:, :-1], ids[:, 1:])
    return values


def _loss(logits: Tensor, ids: Tensor) -> Tensor:
    rows = logits.float()
    return rows.logsumexp(-1) - rows.gather(-1, ids[..., None])[..., 0]


def settled(values: np.ndarray) -> np.ndarray:
    """Give tokens that nothing predicts the mean of the others (0 if there are none)."""
    known = np.isfinite(values)
    return np.where(known, values, values[known].mean() if known.any() else 0).astype(np.float32)


def _batches(pieces: Sequence[_Piece]) -> Iterator[list[_Piece]]:
    """Pieces of similar length together, long ones first; a batch has `_BATCH` tokens or one piece."""
    batch: list[_Piece] = []
    for piece in sorted(pieces, key=lambda piece: -len(piece.ids)):
        if batch and (len(batch) + 1) * len(batch[0].ids) > _BATCH:
            yield batch
            batch = []
        batch.append(piece)
    if batch:
        yield batch


@functools.lru_cache(maxsize=2)
def load_scorer(model: str = DEFAULT, device: str = "auto") -> Scorer:
    """Load a scoring model, whatever `tcw` takes as MODEL; the last two stay in memory. On the CPU in float32.

    Raises SourceError, FormatError, MissingDependency: it cannot be read, or is no causal language model.
    """
    try:
        source = open_source(model)
    except MissingDependency as error:
        error.hint += "; or name another scoring model with `model=`"
        raise
    dtype = torch.float32 if pick(device).kind == "cpu" else None
    loaded = load(source, residency="bf16", device=device, dtype=dtype, auto_class="AutoModelForCausalLM")
    return Scorer(loaded, tokenizer(source), source.id)
