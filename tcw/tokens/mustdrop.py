"""MustDrop: merge even areas, drop what no word looks at in the language model, free the caches after it.

    vision    of each 3 x 3 window whose tokens have a mean cosine of at least `alike`, the nine become one
    prefill   a token goes if  Σ_t A_tj < g · Σ_tj A_tj  and  max_t A_tj < `single`,  never a key token
    decode    what was dropped by the last cut leaves the caches of all layers from the first cut on

A_tj is the attention of text token t to visual token j, mean over heads; key tokens are the `key` share of the image
that the class token of the tower's last layer attends to most. Liu et al., Multi-Stage Vision Token Dropping: Towards
Efficient Multimodal Large Language Model, https://arxiv.org/abs/2411.10803.

Where we differ. The paper fixes g and `single` for three budgets; we take for g the value that leaves exactly the share
asked for, which is found by sorting what bisection would find. If tokens over `single` alone are more than that,
`single` gives way, the least attended to first; if key tokens are, the most salient of them stay. Of windows, no more
are merged (the most alike first) than the first budget at prefill leaves room for. Merged tokens stay in the order of
their positions, the window's centre, where the authors' code puts them before all others. Three cuts at 1/4, 1/2 and
3/4 of the depth, each leaving the same share of the one before, are ours. The paper merges inside the tower, after its
first block. So do we in a plain tower; before a language model windows are those of the projected features, as key
tokens are found in the last layer of a tower that has all its tokens. In a plain tower the class token stands for the
text, and key tokens are those of the block of the cut.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from tcw.methods import option
from tcw.tokens import DECODE, INPUT, Shape, Stage, TokenMethod, block
from tcw.tokens._layers import at_layers, pyramid
from tcw.tokens.context import Context
from tcw.tokens.plan import Plan
from tcw.tokens.scores import cls_attention, last, rows_of
from tcw.tokens.selects import ranked

DEPTHS = (0.25, 0.5, 0.75)
SIDE = 3


def windows(place: Tensor, side: int = SIDE) -> Tensor:
    """Whole windows of side x side neighbouring tokens that do not overlap: int64 [W, side²], each ascending.

    `place` is that of a context. Windows with tokens missing, at an edge or after a cut, are left out.
    """
    frame, row, column = place.round().long().unbind(1)
    cell = torch.stack([frame, row // side, column // side], 1)
    number, count = cell.unique(dim=0, return_inverse=True, return_counts=True)[1:]
    order = number.sort(stable=True).indices
    whole = (count == side * side)[number[order]]
    return order[whole].reshape(-1, side * side)


def likeness(x: Tensor, window: Tensor) -> Tensor:
    """Mean cosine between two different tokens of each window: [W]."""
    unit = functional.normalize(x[window], dim=-1)  # [W, m, D]
    m = window.shape[1]
    return (unit.sum(1).square().sum(-1) - m) / (m * (m - 1))


def merged(context: Context, alike: float, most: int) -> Plan:
    """Merge windows at least as alike as `alike` into their centres, at most `most`, the most alike first."""
    window = windows(context.place)
    like = likeness(context.x, window)
    first = ranked(like)[:most]
    window = window[first[like[first] >= alike]]
    representative = torch.arange(context.tokens, device=context.x.device)
    representative[window] = window[:, window.shape[1] // 2, None]
    keep, assign = representative.unique(return_inverse=True)
    return Plan.merging(keep, assign, context.size)


def undropped(attention: Tensor, key: Tensor, single: float, k: int) -> Tensor:
    """The k tokens that stay at prefill: int64, ascending.

    Tokens go in the order in which they come under a rising global threshold: first those that neither are key tokens
    nor get `single` from any text token; then those that do; key tokens last.

    Args:
        attention: [L, N], text to visual tokens, mean over heads.
        key: float32 [N], 0 for a token that is no key token, and higher for a more salient one.
        single: attention of one text token that protects.
        k: how many stay.
    """
    total = attention.sum(0)
    protected = (attention >= single).any(0)
    order = ranked(total)
    order = order[ranked(protected[order])]
    order = order[ranked(key[order])]
    return order[:k].sort().values


@dataclass(frozen=True)
class Mustdrop(TokenMethod):
    """Merge even windows, drop what no word looks at but never the most salient tokens, then free caches."""

    paper: ClassVar[str] = "arXiv 2411.10803"

    keep: float = option(0.11, "share of the visual tokens that is left in the last layers")
    alike: float = option(0.8, "mean cosine from which the nine tokens of a window become one")
    key: float = option(0.08, "share of the visual tokens that is never dropped: the most salient")
    single: float = option(0.001, "attention of a single text token that protects a token")

    def stages(self, shape: Shape, learned: dict[str, Tensor]) -> tuple[Stage, ...]:
        """Merge at the input (in a plain tower: in its first block), drop at three layers, then free the caches."""
        shares = pyramid(self.keep, len(DEPTHS))
        first = Stage(INPUT if shape.layers else block(0), partial(self._merge, shares[0]))
        cuts = list(zip(DEPTHS, shares, strict=True))
        stages = (first, *at_layers(shape, cuts, self._drop, layers=last))
        return (*stages, Stage(DECODE, _all)) if shape.layers else stages

    def _merge(self, share: float, context: Context, k: int | None) -> Plan:
        room = context.tokens - math.floor(share * context.original + 0.5)
        return merged(context, self.alike, max(0, room) // (SIDE * SIDE - 1))

    def _drop(self, context: Context, k: int | None) -> Plan:
        assert k is not None
        keys = key_tokens(cls_attention()(context), math.ceil(self.key * context.original))
        return Plan.dropping(undropped(rows_of(context).text(), keys, self.single, k), context.size)


def key_tokens(salience: Tensor, count: int) -> Tensor:
    """Ranks of the `count` most salient tokens, the first with the highest; 0 for all others: float32 [N]."""
    first = ranked(salience)[:count]
    return torch.zeros_like(salience).index_copy_(
        0, first, torch.arange(len(first), 0, -1, dtype=salience.dtype, device=salience.device)
    )


def _all(context: Context, k: int | None) -> Plan:
    return Plan.everything(context.size)
