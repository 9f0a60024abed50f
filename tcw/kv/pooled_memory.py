"""Pooled memory: distant tokens are averaged, some neighbours to a slot, and attended to as one.

    k̄ = mean over a chunk of its keys, moved to its middle;   v̄ = mean of its values       (tcw/kv/stores/pooled.py)

A training-free slice of EverMind, MSA: Memory Sparse Attention for Efficient End-to-End Memory Model Scaling to 100M
Tokens, 2026, https://arxiv.org/abs/2603.23516, which pools the keys and values of documents over chunks of 64.

This is not MSA. MSA is a model trained for it, with a router of its own that finds documents and a loss that teaches it
to; here a model that never saw a mean in its cache is given one. What stays is a little of the gist of distant text.
A single fact does not survive its chunk: on SmolLM2-135M, of five passkeys in 1000 tokens none was found with chunks of
4, 16 or 64, four with the whole cache; `top` did not help. Without the slots' weight (`count_bias=off`) text goes on
worse, by 0.03 to 0.04 nats a token. Chunks of 4 leave 301 tokens to look at; 196 exact ones, sinks and a longer window,
let it go on better, by 0.03 nats.

Where we differ besides: chunks of 16; sinks and a window stay exact; a slot weighs as much as its tokens do, where MSA
counts it once; positions go on counting, where MSA starts each document at 0. Calibration: none.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tcw.kv import Group, KVMethod, LayerShape
from tcw.kv.stores import Store
from tcw.kv.stores.pooled import Pooled
from tcw.methods import option


@dataclass(frozen=True)
class PooledMemory(KVMethod):
    """Average distant tokens, 16 to a slot: no fact survives that; an experiment."""

    paper: ClassVar[str] = "arXiv 2603.23516"
    needs_rope: ClassVar[bool] = True
    wraps: ClassVar[bool] = True

    chunk: int = option(16, "tokens that become one slot; MSA takes 64")
    count_bias: bool = option(True, "let a slot weigh as much as the tokens it stands for")
    top: int = option(0, "slots that a query sees, those it matches best; 0: all")
    sinks: int = option(4, "first tokens that stay exact")
    window: int = option(128, "newest tokens that stay exact")
    interval: int = option(32, "when generating, pool this many at a time, or a chunk if that is more")

    def __post_init__(self) -> None:
        if self.chunk < 2:
            raise ValueError(f"`chunk` is 2 or more, not {self.chunk}")
        if min(self.top, self.sinks) < 0 or min(self.window, self.interval) < 1:
            raise ValueError("`top` and `sinks` are 0 or more, `window` and `interval` 1 or more")

    def store(
        self, layer: LayerShape, group: Group, tensors: dict[str, Tensor], inner: Callable[[], Store]
    ) -> Callable[[], Store]:
        """Pool, and let the format of other methods hold the slots."""
        rope = layer.rope
        assert rope is not None
        return lambda: Pooled(self.chunk, rope, inner(), self.count_bias, self.top)
