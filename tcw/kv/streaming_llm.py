"""StreamingLLM: attention sinks and a recent window, nothing else; positions are those in the cache.

    kept = the first s tokens and the last n - s;   key i of the n kept is rotated to position P - n + 1 + i,

P the position of the newest query. Xiao et al., Efficient Streaming Language Models with Attention Sinks, ICLR 2024,
https://arxiv.org/abs/2309.17453, section 3.2. Models put much attention on their first tokens whatever those say;
dropping them breaks the softmax, keeping four mends it.

Where we differ: tokens are forgotten `interval` at a time when generating; with `reindex=off` keys keep their place in
the text. Calibration: none.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tcw.kv import AttentionCall, Group, LayerShape, Memory, Room, Scorer
from tcw.kv._evict import Evicting
from tcw.methods import option


class Recency(Scorer):
    """The newer, the better."""

    def score(self, call: AttentionCall, memory: Memory, room: Room) -> Tensor:
        """All equal: of equal scores the later token stays."""
        return call.keys.new_zeros(call.keys.shape[:3], dtype=call.keys.float().dtype)


@dataclass(frozen=True)
class StreamingLlm(Evicting):
    """Keep the first tokens and the newest; forget the middle of the text."""

    paper: ClassVar[str] = "arXiv 2309.17453"

    reindex: bool = option(True, "rotate keys to their place in the cache instead of that in the text")

    @property
    def reindexes(self) -> bool:  # type: ignore[override]
        """Whether keys are rotated to their place in the cache."""
        return self.reindex

    @property
    def needs_rope(self) -> bool:  # type: ignore[override]
        """Only to rotate."""
        return self.reindex

    def scorer(self, layer: LayerShape, group: Group, tensors: dict[str, Tensor]) -> Scorer:
        """Prefer the newest."""
        return Recency()
