"""PromptDistill: what the end of a prompt looks for in an early layer is what the rest of the model needs.

    s_j = mean over heads of q_last · k_j · scaling         at layer r, after RoPE, before any softmax
    s   ← mean of s over `pool` neighbours                  zeros beyond the ends
    keep the best tokens; their hidden states go on

Jin et al., PromptDistill: Query-based Selective Token Retention in Intermediate Layers for Efficient LLM Inference,
2025, https://arxiv.org/abs/2503.23274.

Inside a model (`stages`) it is that: layers up to r see the whole prompt, those after it the `keep` of its tokens that
were chosen, at the positions that they had. As a text method it is what GemFilter (Shi et al., 2024, arXiv 2409.17422)
makes of the same scores: what was chosen is text, read anew by any model. The pass stops at layer r, before its block:
a prefill of r of all layers. A sentence or word has the mean score of its tokens, or that of the best.

Where we differ, all of it ours: the authors take r = 13 of 32 for Llama-3.1-8B and let the last token alone ask. In
SmolLM2-135M, with eight rows asking, the sentence that answers a question came first of twenty (the opening one aside)
in ten of ten tries at layers 14 and 18 of 30 and in four of four at 15, but in none of six at layer 12; with one row it
was missed more often. So r is half of the depth by default, and `window` the last 8 rows, each of what it sees; which
layers look things up differs between models: try `layer`. As text, whole sentences are chosen by default: where a
question asked for one fact of a page of prose, half of its sentences answered better than all of it, half of its words
worse (benchmarks/prompt_quality.py). The first four tokens always stay, and in a text without a question its last word
or sentence, which asks. A text longer than the window is scored in parts, each with the instruction before and the
question after it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from tcw.errors import UsageError
from tcw.events import Progress
from tcw.methods import option
from tcw.prompt import Prompt
from tcw.prompt._lm import Asking, ahead
from tcw.prompt.scorer import Scorer, by_unit, units_of
from tcw.tokens import KEEP, Shape, Stage, layer
from tcw.tokens.context import Context
from tcw.tokens.plan import Plan
from tcw.tokens.watch import Call, blocks_of, queries_keys

SINKS = 4
_DEPTH = 0.5


@dataclass(frozen=True)
class Promptdistill(Asking):
    """Keep what the end of the prompt attends to in an early layer: as text, or inside the model."""

    paper: ClassVar[str] = "arXiv 2503.23274"
    unit: ClassVar[str] = "sentence"
    span: ClassVar[str] = "text"
    """Inside a model, the tokens to cut are the prompt's text."""
    positions: ClassVar[str] = KEEP

    layer: int = option(-1, "layer whose attention scores, from 0; -1: half way")
    window: int = option(8, "last tokens of the prompt that ask")
    pool: int = option(5, "neighbours that share a score, an odd number")
    word: str = option("mean", "score of a word or sentence: the mean of its tokens, or the best", ("mean", "max"))
    keep: float = option(0.25, "inside a model: share of the prompt's tokens that go on")

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise ValueError(f"`keep` is a share between 0 and 1, not {self.keep:g}")
        if self.pool < 1 or self.pool % 2 == 0:
            raise ValueError(f"`pool` is an odd number, not {self.pool}")
        if self.window < 1:
            raise ValueError(f"`window` is 1 or more, not {self.window}")

    def scores(self, prompt: Prompt) -> np.ndarray:
        """What the end of the prompt attends to, by unit; units that must stay lie above all others."""
        scorer = self.scorer(prompt)
        tokens = scorer.tokens(prompt.text)
        head = [*scorer.opening, *scorer.tokens(ahead(prompt.instruction)).ids]
        tail = scorer.tokens(f"\n\n{prompt.question}" if prompt.question else "").ids.tolist()
        at = self.index(len(blocks_of(scorer.model)))
        found, ids = np.zeros(len(tokens)), tokens.ids.tolist()
        for low, high in _parts(scorer, len(ids), len(head) + len(tail)):
            call = early(scorer, [*head, *ids[low:high], *tail], at)
            logits = asked(call, self.window)[len(head) : len(head) + high - low]
            found[low:high] = pooled(logits, self.pool).double().cpu().numpy()
            prompt.progress(Progress("score", high, len(ids), "tokens"))
        scores = by_unit(found, tokens, prompt.text, prompt.units, self.word)
        stays = np.zeros(len(found), bool)
        stays[: max(0, SINKS - len(head))] = True
        stays[-1:] |= not tail
        number, unit = units_of(tokens, prompt.text, prompt.units)
        scores[unit[stays[number]]] = scores.max(initial=0) + 1
        return scores

    def index(self, layers: int) -> int:
        """The layer that scores, of `layers`. Raises UsageError: the model has no such layer, or none after it."""
        at = self.layer if self.layer >= 0 else round(_DEPTH * layers)
        if not 0 <= at < max(1, layers - 1):
            raise UsageError(f"layer {at} cannot score: the model has {layers}, and the last never does")
        return at

    def stages(self, shape: Shape, learned: dict[str, Tensor]) -> tuple[Stage, ...]:
        """One cut, before the layer after the one that scores. Raises UsageError: there is no language model."""
        if not shape.layers:
            raise UsageError("`promptdistill` cuts the prompt of a language model, and this model is none")
        return (Stage(layer(self.index(shape.layers) + 1), self._plan, keep=self.keep, probe=-1),)

    def _plan(self, context: Context, k: int | None) -> Plan:
        assert k is not None
        assert context.rows is not None
        scores = pooled(context.rows.logits[:, -self.window :].float().mean((0, 1)), self.pool)
        scores = scores.masked_fill(context.alive < SINKS, torch.inf)
        order = torch.sort(scores, stable=True, descending=True).indices
        return Plan.dropping(order[:k], context.size)


def pooled(logits: Tensor, kernel: int) -> Tensor:
    """Mean over `kernel` neighbours, zeros beyond the ends: float32 [N] -> float32 [N]."""
    return functional.avg_pool1d(logits[None].float(), kernel, 1, kernel // 2)[0]


def asked(call: Call, window: int) -> Tensor:
    """Mean over heads, and over those of the last `window` rows that see a token, of q · k · scaling: float32 [S]."""
    queries, keys, scaling = call
    length = keys.shape[2]
    rows = min(window, length)
    logits = (queries[0, :, -rows:].float() @ keys[0].float().mT * scaling).mean(0)
    seen = torch.ones_like(logits).tril(length - rows)
    return (logits * seen).sum(0) / seen.sum(0)


@torch.inference_mode()
def early(scorer: Scorer, ids: list[int], at: int) -> Call:
    """Queries and keys of layer `at` for one text; the model runs up to that layer and no further."""
    block = blocks_of(scorer.model)[at]
    handle = block.register_forward_pre_hook(_stop, with_kwargs=True)
    found = None
    try:
        scorer.model(input_ids=torch.tensor([ids], device=scorer.model.device), use_cache=False)
    except _Reached as reached:
        found = reached
    finally:
        handle.remove()
    if found is None:
        raise UsageError(f"layer {at} of `{scorer.name}` did not run", "use a plain decoder as the scoring model")
    return queries_keys(block, found.hidden, found.position_embeddings)


class _Reached(Exception):
    def __init__(self, hidden: Tensor, position_embeddings: Any) -> None:
        self.hidden, self.position_embeddings = hidden, position_embeddings


def _stop(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    hidden = args[0] if args else kwargs["hidden_states"]
    raise _Reached(hidden, kwargs.get("position_embeddings"))


def _parts(scorer: Scorer, tokens: int, around: int) -> Iterator[tuple[int, int]]:
    """Cut a text into parts of equal length that fit the window together with `around` tokens: [low, high)."""
    room = scorer.window - around
    if room < min(tokens, scorer.window // 4):
        raise UsageError(
            f"the question and the instruction have {around} tokens, the window of `{scorer.name}` {scorer.window}",
            "shorten them, or score with a model that reads more",
        )
    count = -(-tokens // max(1, room))
    cuts = np.linspace(0, tokens, count + 1).astype(int)
    yield from zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True)
