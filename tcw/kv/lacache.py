"""LaCache: each layer keeps other tokens, in the shape of a ladder, so that all layers together span a longer text.

With L layers, a span of S layers that share a token and an overlap of O, tokens are taken in blocks:

    b = 1 + ⌈(L - S) / (S - O)⌉   tokens a block,
    a = min(⌈S / (S - O)⌉, b)     of them stay: those at (i mod (b - a + 1)) + {0, ..., a-1} in layer i.

To forget x tokens, ⌈x / (b - a)⌉ blocks are thinned, from a cursor on that stands where the last compaction stopped.
When the cursor would pass the end of the cache, it *starts over* at the sinks, on what is thin already: old tokens get
rarer and rarer. When once more is not enough, a block stands for t rounds: b + (t-1)(b-1) tokens, its picks t apart.
Shi et al., LaCache: Ladder-Shaped KV Caching for Efficient Long-Context Modeling of Large Language Models, ICML 2025,
https://arxiv.org/abs/2507.14204, section 3, and the authors' code. Looks at no attention; as with StreamingLLM,
positions are those in the cache.

Where we differ: exactly as many tokens stay as the budget says, so the last block may be a short one and the cache is
not made (b - a) // 2 larger to make up for a smaller average; picks that are t apart stay within their block, which
those of the code do not for a > 1; there are 4 sinks (128 in parts of the code); a window is kept whole, instead of L
tokens at the end of the cache. `reindex=off` keeps keys where they were in the text. In a padded batch, blocks are
counted over the whole width, padding included. Calibration: none.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tcw.errors import UsageError
from tcw.kv import AttentionCall, Group, LayerShape, Memory, Room, Scorer
from tcw.kv._evict import Evicting
from tcw.methods import option

CURSOR = "cursor"  # candidates before it were thinned since the last start over


@dataclass(frozen=True)
class LaCache(Evicting):
    """Keep other tokens in each layer, in the shape of a ladder; looks at no attention."""

    paper: ClassVar[str] = "arXiv 2507.14204"
    counts_padding: ClassVar[bool] = True

    span: int = option(0, "layers that keep the same token; 0: half of the layers")
    overlap: int = option(0, "layers that two neighbouring rungs share")
    reindex: bool = option(True, "rotate keys to their place in the cache instead of that in the text")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.span < 0 or self.overlap < 0 or (self.span and self.overlap >= self.span):
            raise ValueError(f"`overlap` is less than `span`, not {self.overlap} of {self.span}")

    @property
    def reindexes(self) -> bool:  # type: ignore[override]
        """As the option says."""
        return self.reindex

    @property
    def needs_rope(self) -> bool:  # type: ignore[override]
        """To rotate keys, it does."""
        return self.reindex

    def check(self, layers: tuple[LayerShape, ...]) -> None:
        """Refuse also a ladder that forgets nothing."""
        super().check(layers)
        count, span = layers[0].count, self.span or layers[0].count // 2
        block, picks = ladder(count, span, self.overlap) if self.overlap < span < count else (1, 1)
        if block == picks:
            raise UsageError(
                f"a span of {span} with an overlap of {self.overlap} forgets nothing in {count} layers",
                "give a smaller `span`, or a smaller `overlap`",
            )

    def scorer(self, layer: LayerShape, group: Group, tensors: dict[str, Tensor]) -> Scorer:
        """Score by the layer's place among all."""
        return _Ladder(layer.depth, *ladder(layer.count, self.span or layer.count // 2, self.overlap))


def ladder(layers: int, span: int, overlap: int) -> tuple[int, int]:
    """How many tokens a block has, and how many of them a layer keeps: b and a."""
    step = span - overlap
    block = 1 + -(-(layers - span) // step)
    return block, min(-(-span // step), block)


class _Ladder(Scorer):
    """1 for tokens that stay, 0 for the others. Args: the layer's depth, b and a."""

    def __init__(self, depth: int, block: int, picks: int) -> None:
        self.depth, self.block, self.picks = depth, block, picks

    def score(self, call: AttentionCall, memory: Memory, room: Room) -> Tensor:
        kept, memory.facts[CURSOR] = compact(
            room.end - room.first, room.keep, memory.facts.get(CURSOR, 0), self.depth, self.block, self.picks
        )
        scores = call.keys.new_zeros(call.keys.shape[2], dtype=call.keys.float().dtype)
        scores[[room.first + place for place in kept]] = 1
        return scores.expand(call.keys.shape[:3])


def compact(n: int, keep: int, cursor: int, depth: int, block: int, picks: int) -> tuple[list[int], int]:
    """Choose `keep` of n tokens for the layer `depth`: their numbers, ascending, and the new cursor."""
    excess = n - keep
    if excess <= 0:
        return list(range(n)), cursor
    if keep < picks:
        return list(range(n - keep, n)), 0
    cursor = min(cursor, keep)
    ahead, whole = (keep - cursor) // picks, keep // picks  # blocks until the cursor is at the end; from the start
    forgets = block - picks
    if excess <= ahead * forgets:
        kept, used = _thin(list(range(cursor, n)), excess, 1, depth, block, picks)
        return [*range(cursor), *kept], cursor + used
    kept, _ = _thin(list(range(cursor, n)), ahead * forgets, 1, depth, block, picks)
    excess -= ahead * forgets
    times = -(-excess // (whole * forgets))
    return _thin([*range(cursor), *kept], excess, times, depth, block, picks)


def _thin(tokens: list[int], excess: int, times: int, depth: int, block: int, picks: int) -> tuple[list[int], int]:
    """Forget `excess` tokens from the first on; what is left, and how many of that are in thinned blocks."""
    block += (times - 1) * (block - 1)
    kept: list[int] = []
    start = 0
    while excess:
        size = min(block, picks + excess)
        apart = min(times, (size - 1) // (picks - 1)) if picks > 1 else 1
        first = start + depth % (size - apart * (picks - 1))
        kept += tokens[first : first + apart * picks : apart][:picks]
        start, excess = start + size, excess - (size - picks)
    return kept + tokens[start:], len(kept)
