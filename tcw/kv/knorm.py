"""KNorm: keep the keys with the smallest norm.

    score_j = -||k_j||₂

Devoto et al., A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression, EMNLP 2024,
https://arxiv.org/abs/2406.11430, section 3: in most layers the keys that draw attention are short ones. Needs neither
attention nor calibration. Where we differ: sinks and a window are kept, and all layers are treated alike (the paper
leaves the first two alone in some experiments).
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tcw.kv import AttentionCall, Group, LayerShape, Memory, Room, Scorer
from tcw.kv._evict import Evicting


class _SmallNorm(Scorer):
    def score(self, call: AttentionCall, memory: Memory, room: Room) -> Tensor:
        return -call.keys.float().norm(dim=-1)


@dataclass(frozen=True)
class Knorm(Evicting):
    """Keep the keys with the smallest norm; looks at no attention."""

    paper: ClassVar[str] = "arXiv 2406.11430"

    def scorer(self, layer: LayerShape, group: Group, tensors: dict[str, Tensor]) -> Scorer:
        """Prefer short keys."""
        return _SmallNorm()
