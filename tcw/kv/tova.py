"""TOVA: keep the tokens that the newest query looks at.

    score_j = mean over the heads of a layer of A[newest query, j]          the same for all heads

Oren et al., Transformers are Multi-State RNNs, EMNLP 2024, https://arxiv.org/abs/2401.06104, section 3 (Token
Omission Via Attention). Remembers nothing: a token that one query passes over may be gone for the next.

Where we differ: sinks and a window are kept; the paper forgets the worst token at every step, from the first to the
last, we all that are too many after the prompt and then `interval` at a time; the mean is over the heads of a group,
should another method divide a layer's heads into groups. Calibration: none.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tcw.kv import AttentionCall, Group, LayerShape, Memory, Room, Scorer
from tcw.kv._attention_stats import attended, newest
from tcw.kv._evict import Evicting


class _NewestQuery(Scorer):
    def score(self, call: AttentionCall, memory: Memory, room: Room) -> Tensor:
        weights = attended(call, newest(call, 1)) * call.keys.shape[1] / call.queries.shape[1]
        return weights.mean(1, keepdim=True).expand_as(weights)


@dataclass(frozen=True)
class Tova(Evicting):
    """Keep the tokens that the newest query looks at."""

    paper: ClassVar[str] = "arXiv 2401.06104"

    def scorer(self, layer: LayerShape, group: Group, tensors: dict[str, Tensor]) -> Scorer:
        """Needs nothing of the layer."""
        return _NewestQuery()
