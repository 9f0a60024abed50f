"""H2O: keep the tokens that drew most attention so far, the heavy hitters.

    score_j = Σ_{i ≥ j} A[i, j]          over all queries i, those of the prompt and those generated

Zhang et al., H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models, NeurIPS 2023,
https://arxiv.org/abs/2306.14048, section 4. An early token is in more of these sums than a late one; `zipvl` divides
by their number.

Where we differ: query heads that share a key-value head add up (the paper's models share none); the paper gives half
of the budget to the newest tokens, we a fixed `window` (for `tokens=256` the paper's is `window=128`) and keep sinks;
tokens are forgotten `interval` at a time. The sums are exact and cost as much as the prompt's attention once more.
Calibration: none.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tcw.kv import AttentionCall, Group, LayerShape, Memory, Room, Scorer
from tcw.kv._attention_stats import attended, newest, remembered
from tcw.kv._evict import Evicting


class _Accumulated(Scorer):
    def observe(self, call: AttentionCall, memory: Memory) -> None:
        everyone = newest(call, call.queries.shape[2])
        memory.tokens["attention"] = remembered(memory, "attention", call) + attended(call, everyone)

    def score(self, call: AttentionCall, memory: Memory, room: Room) -> Tensor:
        return memory.tokens["attention"]


@dataclass(frozen=True)
class H2o(Evicting):
    """Keep the tokens that drew most attention since the text began."""

    paper: ClassVar[str] = "arXiv 2306.14048"

    def scorer(self, layer: LayerShape, group: Group, tensors: dict[str, Tensor]) -> Scorer:
        """Needs nothing of the layer."""
        return _Accumulated()
