"""Random: keep any tokens. The control that every other way of choosing has to beat.

    score = hash(seed, layer, head, position) / 2²⁴

Nothing is drawn in sequence: a token's score is a hash of where it stands, drawn when it arrives and remembered. So
it does not depend on the other sequences of a batch, on padding, on the device, or on how the text was cut into
calls. The hash is lowbias32 (C. Wellons and TheIronBorn, Hash Prospector, 2018,
https://github.com/skeeto/hash-prospector); of its 32 bits the upper 24 are kept, which float32 holds exactly.
Calibration: none.
"""

from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from tcw.kv import AttentionCall, Group, LayerShape, Memory, Room, Scorer
from tcw.kv._attention_stats import remembered
from tcw.kv._evict import Evicting
from tcw.methods import option

_Bits = TypeVar("_Bits", int, Tensor)
_32 = 0xFFFFFFFF


def _hash(x: _Bits) -> _Bits:
    """Mix the lower 32 bits. The factors are below 2³¹, so that no product leaves int64."""
    x = x & _32
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & _32
    x = ((x ^ (x >> 15)) * 0x735A2D97) & _32
    return x ^ (x >> 15)


class _Drawn(Scorer):
    """Args: a number for each head."""

    def __init__(self, keys: list[int]) -> None:
        self.keys = keys

    def observe(self, call: AttentionCall, memory: Memory) -> None:
        keys = torch.tensor(self.keys, device=call.keys.device)[None, :, None]
        drawn = (_hash(_hash(call.positions[:, None]) ^ keys) >> 8).float() / (1 << 24)
        drawn = drawn.expand(call.keys.shape[0], -1, -1)
        known = remembered(memory, "drawn", call)
        memory.tokens["drawn"] = torch.cat([known[..., : known.shape[-1] - drawn.shape[-1]], drawn], -1)

    def score(self, call: AttentionCall, memory: Memory, room: Room) -> Tensor:
        return memory.tokens["drawn"]


@dataclass(frozen=True)
class Random(Evicting):
    """Keep any tokens: the control that other methods have to beat."""

    paper: ClassVar[str] = "none: a control"

    seed: int = option(0, "another seed keeps other tokens")

    def scorer(self, layer: LayerShape, group: Group, tensors: dict[str, Tensor]) -> Scorer:
        """Heads and layers choose independently."""
        return _Drawn([_hash(_hash(_hash(self.seed) ^ layer.index) ^ head) for head in group.heads])
