"""KeyDiff: keep the keys that are least like the others.

    score_j = -cos(k_j, a),   a = mean_i k_i / ||k_i||

over all tokens i that are held. Park et al., KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM
Inference in Resource-Constrained Environments, NeurIPS 2025, https://arxiv.org/abs/2504.15364: keys that stand apart
draw attention, and they belong to what a text says only once. Needs neither attention nor calibration. Where we differ:
the paper forgets after each block of the prompt, we once the prompt was read; sinks and a window are kept.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional

from tcw.kv import AttentionCall, Group, LayerShape, Memory, Room, Scorer
from tcw.kv._evict import Evicting


class _Unlike(Scorer):
    def score(self, call: AttentionCall, memory: Memory, room: Room) -> Tensor:
        directions = functional.normalize(call.keys.float(), dim=-1)
        if call.real is not None:
            directions = directions * call.real[..., None]
        # the length of the mean, and how many tokens it is of, change no cosine
        anchor = functional.normalize(directions.sum(2, keepdim=True), dim=-1)
        return -(directions * anchor).sum(-1)


@dataclass(frozen=True)
class Keydiff(Evicting):
    """Keep the keys that are least like the others: single facts stay. Looks at no attention."""

    paper: ClassVar[str] = "arXiv 2504.15364"

    def scorer(self, layer: LayerShape, group: Group, tensors: dict[str, Tensor]) -> Scorer:
        """Prefer keys that stand apart."""
        return _Unlike()
