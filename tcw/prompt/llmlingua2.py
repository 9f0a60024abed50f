"""LLMLingua-2: a token classifier, trained on what a strong model would keep, says of each word whether it stays.

    p_i = softmax(logits_i)[1]          label 1 is "keep"
    score of a word = mean of p over its tokens, or that of its first token

Pan et al., LLMLingua-2: Data Distillation for Efficient and Faithful Task-Agnostic Prompt Compression, Findings of
ACL 2024, https://arxiv.org/abs/2403.12968, section 4. A long text is read in pieces of at most 510 tokens (two are
special) that end behind a full stop or before a new line, and in the middle of a sentence only where a piece has
neither. Checkpoints: microsoft/llmlingua-2-xlm-roberta-large-meetingbank and
microsoft/llmlingua-2-bert-base-multilingual-cased-meetingbank, or any other with two labels. None is downloaded unless
named.

Where we differ: tokens are brought to words by the tokenizer's character offsets, so WordPiece and SentencePiece need
no rules of their own and Chinese and Japanese are cut finer; the budget is one for the whole text, or with
`scope=chunk` shared out as upstream does, the same share of every piece; what must stay (digits, names, quotes) is the
engine's to protect.
"""

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from tcw.device import pick
from tcw.errors import UsageError
from tcw.events import Progress
from tcw.methods import option
from tcw.prompt import Prompt, PromptMethod
from tcw.prompt._lm import ranks
from tcw.prompt.scorer import Tokens, by_unit, tokens_of, units_of
from tcw.runtime.load import load, tokenizer
from tcw.source import open_source

_LONGEST = 512  # tokens of a piece with its two special ones


@dataclass(frozen=True)
class Llmlingua2(PromptMethod):
    """Keep the words that a trained token classifier would keep. Fast; needs a checkpoint."""

    paper: ClassVar[str] = "arXiv 2403.12968"

    model: str = option("", "MODEL with a token-classification head of two labels; 1 keeps")
    word: str = option("mean", "score of a word: the mean of its tokens, or the first", choices=("mean", "first"))
    scope: str = option("global", "one budget for all, or the same share of each piece", choices=("global", "chunk"))
    batch: int = option(50, "pieces that are read at once")

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ValueError(f"`batch` is 1 or more, not {self.batch}")

    def scores(self, prompt: Prompt) -> np.ndarray:
        """Probability to keep of each unit. Raises UsageError: no model is named, or it has not two labels."""
        if not self.model:
            raise UsageError(
                "`llmlingua2` needs a token-classification checkpoint",
                "name one: `llmlingua2:model=microsoft/llmlingua-2-xlm-roberta-large-meetingbank`, or a folder",
            )
        classifier = load_classifier(self.model, prompt.device)
        tokens = tokens_of(classifier.tokenizer, prompt.text)
        pieces = list(chunks(tokens, prompt.text, classifier.longest))
        values = np.zeros(len(tokens))
        for start in range(0, len(pieces), self.batch):
            batch = pieces[start : start + self.batch]
            for (low, high), found in zip(batch, classifier.keep([tokens.ids[a:b] for a, b in batch]), strict=True):
                values[low:high] = found
            prompt.progress(Progress("score", batch[-1][1], len(tokens), "tokens"))
        if self.word == "first":
            values = _first(values, tokens, prompt)
        scores = by_unit(values, tokens, prompt.text, prompt.units)
        return _shared(scores, pieces, tokens, prompt) if self.scope == "chunk" else scores


@dataclass(frozen=True, eq=False)
class Classifier:
    """A token classifier with two labels, and its tokenizer."""

    model: Any
    tokenizer: Any

    def __post_init__(self) -> None:
        if self.model.config.num_labels != 2:
            raise UsageError(
                f"the classifier has {self.model.config.num_labels} labels, LLMLingua-2's have 2",
                "name a checkpoint that was trained to keep or drop tokens",
            )

    @property
    def longest(self) -> int:
        """Tokens of a piece, without the special ones. Models like RoBERTa count positions from behind the padding."""
        places = (m for name, m in self.model.named_modules() if name.endswith("position_embeddings"))
        unused = next((m.padding_idx + 1 for m in places if getattr(m, "padding_idx", None) is not None), 0)
        return min(_LONGEST, self.model.config.max_position_embeddings - unused) - 2

    @torch.inference_mode()
    def keep(self, pieces: list[np.ndarray]) -> list[np.ndarray]:
        """Probability of label 1 for the tokens of each piece (ids without special ones): float64 arrays."""
        special = [self._special("cls", "bos"), self._special("sep", "eos")]
        length = max(map(len, pieces)) + 2
        ids = torch.full((len(pieces), length), self.tokenizer.pad_token_id or 0)
        mask = torch.zeros_like(ids)
        for row, piece in enumerate(pieces):
            whole = torch.tensor([special[0], *piece.tolist(), special[1]])
            ids[row, : len(whole)], mask[row, : len(whole)] = whole, 1
        logits = self.model(input_ids=ids.to(self.model.device), attention_mask=mask.to(self.model.device)).logits
        table = logits.double().softmax(-1)[..., 1].cpu().numpy()
        return [table[row, 1 : len(piece) + 1] for row, piece in enumerate(pieces)]

    def _special(self, *names: str) -> int:
        for name in names:
            if (found := getattr(self.tokenizer, f"{name}_token_id", None)) is not None:
                return int(found)
        raise UsageError("the classifier's tokenizer has no special tokens to open and close a text with")


def chunks(tokens: Tokens, text: str, longest: int) -> Iterator[tuple[int, int]]:
    """Cut tokens into pieces of at most `longest`, [low, high), where sentences or lines end if they do."""
    low = 0
    while len(tokens) - low > longest:
        high = next((end for end in range(low + longest, low, -1) if _ends(tokens, text, end)), low + longest)
        yield low, high
        low = high
    if low < len(tokens):
        yield low, len(tokens)


def _ends(tokens: Tokens, text: str, end: int) -> bool:
    """Whether a piece may end before token `end`: behind a full stop, or where a new line begins."""
    before, after = (text[slice(*tokens.spans[i])] for i in (end - 1, end))
    return before.strip() == "." or "\n" in after[: len(after) - len(after.lstrip())]


def _first(values: np.ndarray, tokens: Tokens, prompt: Prompt) -> np.ndarray:
    """Give all tokens of a unit the value of its first token."""
    number, unit = units_of(tokens, prompt.text, prompt.units)
    first = np.zeros(len(prompt.units), np.int64)
    units, where = np.unique(unit, return_index=True)
    first[units] = number[where]
    own = np.zeros(len(values), np.int64)
    own[number[::-1]] = unit[::-1]
    return values[first[own]]


def _shared(scores: np.ndarray, pieces: list[tuple[int, int]], tokens: Tokens, prompt: Prompt) -> np.ndarray:
    """Ranks of units within the piece where they begin, so that every piece loses the same share."""
    starts = [tokens.spans[low, 0] for low, _ in pieces]
    begins = [unit.start for unit in prompt.units]
    cuts = np.searchsorted(begins, [*starts[1:], len(prompt.text)]).tolist()
    return np.concatenate([ranks(scores[a:b]) for a, b in itertools.pairwise([0, *cuts])])


@functools.lru_cache(maxsize=1)
def load_classifier(model: str, device: str = "auto") -> Classifier:
    """Load a classifier, whatever `tcw` takes as MODEL; the last one stays in memory. On the CPU in float32."""
    source = open_source(model)
    dtype = torch.float32 if pick(device).kind == "cpu" else None
    loaded = load(source, residency="bf16", device=device, dtype=dtype, auto_class="AutoModelForTokenClassification")
    return Classifier(loaded, tokenizer(source))
