"""ZipVL: each layer keeps as many tokens as it takes to hold a share τ of its attention.

    a_j   = Σ_i A[i, j]                                                  over probe queries i, and the heads of a group
    p     = min{ p : Σ of the p largest a_j ≥ τ · Σ a_j }                how many tokens stay
    score = a_j / (number of probe queries that may look at j)           which ones: the normalised attention

He et al., ZipVL: Efficient Large Vision-Language Models with Dynamic Token Sparsification, 2024,
https://arxiv.org/abs/2410.08584. An easy text or layer gets few tokens, a hard one many. Without a budget nothing
bounds p from above. The score of ZipCache (https://arxiv.org/abs/2405.14256) takes from early tokens the advantage
that they are in more sums.

Where we differ: all tokens are treated alike, not those of an image alone. Sinks and window stay in any case: their
attention counts, and p is what the others must add. p is the largest that a head or a sequence of the batch asks for.
The probes are the newest `probes` queries and older ones at distances that grow by 2^⅛ (the paper draws those at
random). As in the paper p is set by prompts; tokens that are generated are forgotten only if a budget says so, by the
same score, in which every step is a probe. The prompt is computed with all its tokens: the paper's sparse prefill,
which computes attention among the p alone, saves time, not memory, and is left out. Calibration: none.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tcw.kv import AttentionCall, Group, LayerShape, Memory, Room, Scorer
from tcw.kv._attention_stats import attended, candidates, remembered, seen_by
from tcw.kv._evict import Evicting
from tcw.methods import option

_DOUBLING = 8  # older probes until their distance has doubled


def _probes(call: AttentionCall, newest: int) -> Tensor:
    """Numbers of the queries that are asked, ascending: int64 [m]. Counted from the newest, so padding changes none."""
    queries = call.queries.shape[2]
    back = list(range(min(newest, queries)))
    for i in range(1, 64 * _DOUBLING):
        distance = round(newest * 2 ** (i / _DOUBLING))
        if distance >= queries:
            break
        if distance > back[-1]:
            back.append(distance)
    return torch.tensor([queries - 1 - distance for distance in reversed(back)], device=call.queries.device)


class _NormalisedAttention(Scorer):
    """Args: how many of the newest queries are probes."""

    def __init__(self, probes: int) -> None:
        self.probes = probes

    def observe(self, call: AttentionCall, memory: Memory) -> None:
        rows = _probes(call, self.probes)
        memory.tokens["attention"] = remembered(memory, "attention", call) + attended(call, rows)
        memory.tokens["probes"] = remembered(memory, "probes", call) + seen_by(call, rows)

    def score(self, call: AttentionCall, memory: Memory, room: Room) -> Tensor:
        return memory.tokens["attention"] / memory.tokens["probes"].clamp(min=1)


@dataclass(frozen=True)
class Zipvl(Evicting):
    """Keep as many tokens as it takes to hold a share of the attention, layer by layer."""

    paper: ClassVar[str] = "arXiv 2410.08584"
    counts_padding: ClassVar[bool] = True

    ratio: float = option(0.0, "share of the tokens seen to keep at most; no bound where no budget is given")
    tau: float = option(0.975, "share of the attention to hold")
    probes: int = option(64, "newest queries whose attention is asked for; older ones are asked here and there")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.tau <= 1:
            raise ValueError(f"`tau` is above 0 and at most 1, not {self.tau}")
        if self.probes < 1:
            raise ValueError(f"`probes` is 1 or more, not {self.probes}")

    def scorer(self, layer: LayerShape, group: Group, tensors: dict[str, Tensor]) -> Scorer:
        """Needs nothing of the layer."""
        return _NormalisedAttention(self.probes)

    def groups(self, layer: LayerShape, tensors: dict[str, Tensor]) -> tuple[Group, ...] | None:
        """All heads in one group; without a budget it has no limit."""
        if self.ratio or self.tokens or self.bytes:
            return super().groups(layer, tensors)
        return (Group(tuple(range(layer.kv_heads))),)

    def count(self, call: AttentionCall, memory: Memory, room: Room) -> int:
        """The fewest tokens of the room that, with those outside it, hold the share `tau` of this call's attention.

        For a single query, and for tensors without contents: as many as the budget allows.
        """
        if call.queries.shape[2] == 1 or call.keys.is_meta:
            return room.keep
        mass = attended(call, _probes(call, self.probes))
        inside = candidates(call, room)
        elsewhere = (mass * ~inside).sum(-1, keepdim=True)
        missing = self.tau * mass.sum(-1, keepdim=True) - elsewhere
        held = (mass * inside).sort(dim=-1, descending=True).values.cumsum(-1)
        wanted = (held < missing).sum(-1, keepdim=True) + (missing > 0)
        return min(room.keep, int(wanted.max()))
