"""ZipCache: tokens that draw attention get more bits than the others.

    p̃_j = Σ_{i in P, i >= j} A_ij / |{i in P, i >= j}|

the mean attention that token j gets from those probes that can see it; the plain sum would favour the first tokens,
which all can see. A is summed over the query heads that share j's head. Probes P of a prompt are its last 5 % and
another 5 % drawn at random. The `salient` share of tokens with the highest p̃ is held in `high` bits, the rest in `low`:
keys with a step for each channel, values channel-separable and token-wise: divided by c = sqrt(max |v|) of each
channel, then with a step for each token. He et al., ZipCache: Accurate and Efficient KV Cache Quantization with Salient
Token Identification, NeurIPS 2024, https://arxiv.org/abs/2405.14256, sections 3.2, 4.2 and 4.3.

Where we differ: a head of keys and values has steps of its own; a channel of keys has one for every `group_size` tokens
of a tier (the paper: one for all, made anew every 100 tokens; here nothing is rounded twice); when generating,
every query since the last prompt is a probe (the paper: again 5 % and 5 %). Alone this method forgets nothing. With
one that does, that one's scores choose the tiers too. Calibration: none.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tcw.kv import AttentionCall, Group, KVMethod, LayerShape, Memory, Room, Scorer
from tcw.kv._attention_stats import attended, seen_by
from tcw.kv.stores import Store
from tcw.kv.stores._frames import LARGEST, Frame
from tcw.kv.stores._grids import Grid
from tcw.kv.stores._packing import WIDTHS
from tcw.kv.stores.integers import IntegerStore
from tcw.kv.stores.tiered import TieredStore
from tcw.methods import option

RECENT = RANDOM = 0.05
"""Shares of a prompt's queries that are probes: the last ones, and others drawn."""


class NormalizedAttention(Scorer):
    """p̃. When generating, remembers a sum for each token; a prompt is looked at when it is asked for.

    Args:
        seed: of the drawn probes.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def observe(self, call: AttentionCall, memory: Memory) -> None:
        """Add a single query's attention; forget what was before a prompt."""
        if call.queries.shape[2] > 1:
            memory.tokens.pop("attention", None)
            memory.facts["probes"] = 0
            return
        own = attended(call, torch.zeros(1, dtype=torch.long, device=call.keys.device))
        held = memory.tokens.get("attention")
        memory.tokens["attention"] = (own if held is None else held + own).to(torch.bfloat16)
        memory.facts["probes"] = memory.facts.get("probes", 0) + 1

    def score(self, call: AttentionCall, memory: Memory, room: Room) -> Tensor:
        """P̃ of every token, by the probes since the last prompt, itself included."""
        if call.queries.shape[2] > 1:
            rows = probes(call.queries.shape[2], self.seed).to(call.keys.device)
            return attended(call, rows) / seen_by(call, rows).clamp_min(1)
        tokens = call.keys.shape[2]
        since = torch.arange(tokens, 0, -1, device=call.keys.device)  # queries since each token, its own included
        return memory.tokens["attention"].float() / since.clamp(max=memory.facts["probes"])


def probes(queries: int, seed: int) -> Tensor:
    """Numbers of the probes among a prompt's queries, ascending, at least one of them: int64 [m]."""
    recent = math.ceil(RECENT * queries)
    earlier = queries - recent
    drawn = torch.randperm(earlier, generator=torch.Generator().manual_seed(seed))[: math.ceil(RANDOM * earlier)]
    return torch.cat([drawn.sort().values, torch.arange(earlier, queries)])


@dataclass(frozen=True)
class Zipcache(KVMethod):
    """Hold tokens that draw attention in more bits than the others."""

    paper: ClassVar[str] = "arXiv 2405.14256"

    low: int = option(2, "bits of a number of the other tokens", choices=WIDTHS)
    high: int = option(4, "bits of a number of salient tokens", choices=WIDTHS)
    salient: float = option(0.6, "share of the tokens that is salient")
    group_size: int = option(64, "tokens of a tier that share a key channel's step")
    sinks: int = option(0, "first tokens that stay exact")
    window: int = option(32, "newest tokens that stay exact")
    interval: int = option(100, "when generating, round this many at a time")
    seed: int = option(0, "of the probes that are drawn")

    def __post_init__(self) -> None:
        if not 0 <= self.salient <= 1:
            raise ValueError(f"`salient` is between 0 and 1, not {self.salient}")
        if self.low > self.high:
            raise ValueError(f"`low` is at most `high`, not {self.low} with {self.high}")
        if self.group_size < 1 or self.interval < 1:
            raise ValueError("`group_size` and `interval` are 1 or more")
        if self.sinks < 0 or self.window < 0:
            raise ValueError("`sinks` and `window` are 0 or more")

    def scorer(self, layer: LayerShape, group: Group, tensors: dict[str, Tensor]) -> Scorer:
        """Saliency."""
        return NormalizedAttention(self.seed)

    def store(
        self, layer: LayerShape, group: Group, tensors: dict[str, Tensor], inner: Callable[[], Store]
    ) -> Callable[[], Store]:
        """Two tiers of codes."""

        def tier(bits: int) -> Store:
            keys = Grid(bits, tokens=self.group_size, channels=1)
            return IntegerStore(keys, Grid(bits), value_frame=Frame(scale=LARGEST))

        return lambda: TieredStore(lambda: tier(self.high), lambda: tier(self.low), self.salient)
