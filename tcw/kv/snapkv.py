"""SnapKV: keep the tokens that the last queries of the prompt look at, and their neighbours.

    votes_j = Σ_{i in the last w queries} A[i, j]          summed over the query heads that share a key-value head
    score   = mean of votes over `kernel` neighbours       within what may be forgotten

Li et al., SnapKV: LLM Knows What You are Looking for Before Generation, NeurIPS 2024,
https://arxiv.org/abs/2404.14469, section 4: w is `observe`, pooling keeps the words around a token that is looked at.
It knows the question only if the question stands at the end of the prompt.

Where we differ: the paper forgets once, after the prompt. We go on when generating, and the last w queries follow:

    votes ← (1 - m / w) · votes + Σ of the m new queries' attention,          m = min(w, queries of this call)

A prompt of w or more queries replaces all votes, as in the paper; a step replaces a w-th of them; a call shorter than
w leaves the rest to what was seen before. Sinks are kept and do not lend their votes to neighbours; neighbours are
those in the cache, of which tokens between may be gone. Calibration: none.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tcw.kv import AttentionCall, Group, LayerShape, Memory, Room, Scorer
from tcw.kv._attention_stats import attended, newest, real_queries, remembered, smoothed
from tcw.kv._evict import Evicting
from tcw.methods import option


class _LastQueries(Scorer):
    """Args: how many queries vote; how many neighbours share a vote."""

    def __init__(self, queries: int, kernel: int) -> None:
        self.queries, self.kernel = queries, kernel

    def observe(self, call: AttentionCall, memory: Memory) -> None:
        rows = newest(call, self.queries)
        real = real_queries(call, rows)
        fresh = len(rows) if real is None else real.sum(-1, keepdim=True)
        votes = remembered(memory, "votes", call) * (1 - fresh / self.queries)
        memory.tokens["votes"] = votes + attended(call, rows)

    def score(self, call: AttentionCall, memory: Memory, room: Room) -> Tensor:
        return smoothed(memory.tokens["votes"], call, room, self.kernel)


@dataclass(frozen=True)
class Snapkv(Evicting):
    """Keep the tokens that the last queries of the prompt look at, with their neighbours."""

    paper: ClassVar[str] = "arXiv 2404.14469"

    observe: int = option(32, "queries that vote, the last ones")
    kernel: int = option(5, "neighbours that share a vote, an odd number")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.observe < 1:
            raise ValueError(f"`observe` is 1 or more, not {self.observe}")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"`kernel` is an odd number, not {self.kernel}")

    def scorer(self, layer: LayerShape, group: Group, tensors: dict[str, Tensor]) -> Scorer:
        """Needs nothing of the layer."""
        return _LastQueries(self.observe, self.kernel)
