"""TriAttention: rate a key by what the queries to come are expected to make of it.

Before RoPE the queries of a head lie around a centre c, whatever the text. With k̃_f the band f of a cached key as it is
stored, rotated, and P the position of the newest query, the logit expected δ tokens later is a trigonometric series:

    S_trig(δ) = Σ_f Re( c_f · conj(k̃_f) · e^{i(P+δ)ω_f} )         averaged over δ = 1, 2, 4, ..., `offsets`
    S_norm    = Σ_f (a_f - |c_f|) · |k̃_f|                         a_f = mean |q̃_f|: what the centre does not explain
    score     = max over the query heads of a group of  zscore(S_trig + S_norm)

WeianMao et al., TriAttention, 2026, https://arxiv.org/abs/2604.04921; c_f and a_f are its q_mean and q_abs_mean. Only
the phase of the newest query enters, so no key's position is needed, and the mean over δ is one factor a band: scoring
costs one product with the keys.

Where we differ: each layer and head chooses for itself (the paper's code also offers choices shared by heads or
layers); prompt tokens may be forgotten; sinks are kept; equal scores are not broken by noise. Elements of a head that
RoPE passes by enter with their mean query, without a norm term: ours, the paper's models have none. Calibration: one
run over any text; per query head and layer it leaves 1.5·D numbers.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from tcw.kv import AttentionCall, Group, LayerShape, Memory, Room, Scorer
from tcw.kv._evict import Evicting
from tcw.kv.rope import Rope
from tcw.methods import option

if TYPE_CHECKING:
    from tcw.kv.calibrate import Session

_LEAST = 1e-6  # a standard deviation to divide by


@dataclass(frozen=True)
class TriAttention(Evicting):
    """Keep the keys that queries to come are expected to look at, by the centre of each head's queries."""

    paper: ClassVar[str] = "arXiv 2604.04921"
    needs_calibration: ClassVar[bool] = True
    needs_rope: ClassVar[bool] = True

    offsets: int = option(65536, "look so many tokens ahead, at distances 1, 2, 4, ...")
    reduce: str = option("mean", "over the distances", ("mean", "max"))
    norm: bool = option(True, "count what queries do beside their centre")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.offsets < 1:
            raise ValueError(f"`offsets` is 1 or more, not {self.offsets}")

    def scorer(self, layer: LayerShape, group: Group, tensors: dict[str, Tensor]) -> Scorer:
        """Score with the statistics of the group's query heads."""
        assert layer.rope is not None
        shared = layer.heads // layer.kv_heads
        heads = [g * shared + j for g in group.heads for j in range(shared)]
        centre, size = (tensors[f"{layer.index}.{name}"][heads] for name in ("centre", "size"))
        ahead = [1 << i for i in range(self.offsets.bit_length())]
        return _Expected(layer.rope.to(centre.device), centre, size if self.norm else None, ahead, self.reduce)

    def calibrate(self, session: "Session") -> dict[str, Tensor]:
        """Average the queries over the text, as they were before RoPE.

        Returns:
            For each layer `INDEX.centre`, float32 [H, D], the mean query, and `INDEX.size`, float32 [H, d], a_f.
        """
        sums: dict[str, Tensor] = {}
        counts: dict[int, int] = {}

        def look(layer: LayerShape, call: AttentionCall) -> None:
            assert layer.rope is not None
            queries = layer.rope.undo(call.queries, call.positions[:, None])
            counts[layer.index] = counts.get(layer.index, 0) + queries.shape[0] * queries.shape[2]
            for name, values in (("centre", queries), ("size", layer.rope.bands(queries).abs())):
                key = f"{layer.index}.{name}"
                sums[key] = sums.get(key, 0) + values.sum((0, 2)).cpu().double()

        session.watch(look)
        return {key: (total / counts[int(key.partition(".")[0])]).float() for key, total in sums.items()}

    def outline(self, layers: tuple[LayerShape, ...]) -> dict[str, Tensor]:
        """Zeros."""
        found: dict[str, Tensor] = {}
        for layer in layers:
            assert layer.rope is not None
            found[f"{layer.index}.centre"] = torch.zeros(layer.heads, layer.head_dim)
            found[f"{layer.index}.size"] = torch.zeros(layer.heads, layer.rope.rotary_dim // 2)
        return found


class _Expected(Scorer):
    """Args: the rotation; centre [H, D] and size [H, d] or None; distances; how scores at those become one."""

    def __init__(self, rope: Rope, centre: Tensor, size: Tensor | None, ahead: list[int], reduce: str) -> None:
        self.rope = rope
        self.rest = centre[:, rope.rotary_dim :]
        # keys carry the rotation's scaling once already, logits have it twice
        self.centre = rope.bands(centre) * rope.scaling
        self.beside = None if size is None else size * rope.scaling - self.centre.abs()
        turns = _turns(rope, torch.tensor(ahead, device=centre.device))  # [distances, d]
        self.ahead = turns if reduce == "max" else turns.mean(0, keepdim=True)

    def score(self, call: AttentionCall, memory: Memory, room: Room) -> Tensor:
        keys, kv_heads = call.keys.float(), call.keys.shape[1]
        turned, rest = keys[..., : self.rope.rotary_dim], keys[..., self.rope.rotary_dim :]
        phase = _turns(self.rope, _newest(call))[:, None, None] * self.ahead  # [B, 1, distances, d]
        wanted = self.rope.unbands(self.centre[:, None] * phase)  # [B, H, distances, 2d]
        expected = _per_head(wanted, kv_heads) @ turned.transpose(-1, -2)
        expected = expected.unflatten(2, (-1, self.ahead.shape[0])).amax(3)  # [B, G, r, n]
        expected = expected + _per_head(self.rest[None, :, None], kv_heads) @ rest.transpose(-1, -2)
        if self.beside is not None:
            lengths = self.rope.bands(keys).abs()
            expected = expected + _per_head(self.beside[None, :, None], kv_heads) @ lengths.transpose(-1, -2)
        return _standardised(expected, call.real, room).amax(2)


def _turns(rope: Rope, positions: Tensor) -> Tensor:
    """e^{i p ω_f}: complex64 [..., d]."""
    angles = rope.angles(positions)
    return torch.polar(torch.ones_like(angles), angles)


def _per_head(rows: Tensor, kv_heads: int) -> Tensor:
    """[B, H, m, x] -> [B, G, r·m, x]."""
    return rows.unflatten(1, (kv_heads, -1)).flatten(2, 3)


def _newest(call: AttentionCall) -> Tensor:
    """The position of each sequence's newest token, int64 [B]: the greatest one that is not padding's."""
    if call.real is None:
        return call.positions[:, -1]
    own = call.real[:, 0, -call.positions.shape[1] :]
    return torch.where(own, call.positions, 0).amax(-1)


def _standardised(scores: Tensor, real: Tensor | None, room: Room) -> Tensor:
    """Scores [B, G, r, n] less their mean, in standard deviations, both over the real tokens of the room."""
    candidates = scores[..., room.first : room.end]
    if real is None:
        mean, spread = candidates.mean(-1, keepdim=True), candidates.std(-1, correction=0, keepdim=True)
    else:
        there = real[:, :, None, room.first : room.end].to(scores.dtype)
        count = there.sum(-1, keepdim=True).clamp(min=1)
        mean = (candidates * there).sum(-1, keepdim=True) / count
        spread = (((candidates - mean) * there).square().sum(-1, keepdim=True) / count).sqrt()
    return (scores - mean) / spread.clamp(min=_LEAST)
