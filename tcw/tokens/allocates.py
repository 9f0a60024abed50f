"""How a share of tokens is divided over a sample's images. Every factory here makes an `Allocate`.

Whatever it prefers, the images together are left with as many tokens as the share says:

    Σ k = max(images, ⌊share · Σ original + ½⌋)          1 <= k_i <= N_i

as far as there are so many left.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tcw.tokens import Allocate, Score
from tcw.tokens._similarity import Cosine, Features, here
from tcw.tokens.context import Context


def total_of(contexts: Sequence[Context], share: float) -> int:
    """How many tokens all images together are left with."""
    total = math.floor(share * sum(context.original for context in contexts) + 0.5)
    return min(max(len(contexts), total), sum(context.tokens for context in contexts))


def apportion(weights: Sequence[float], total: int, low: Sequence[int], high: Sequence[int]) -> list[int]:
    """Divide `total` in proportion to `weights` (0 or more), each between its `low` and `high`.

    The sum is exactly `total`, as far as the bounds allow: parts are clip(λ w_i, low_i, high_i) for the λ that fits,
    made whole numbers by largest remainder (of equal ones the first).
    """
    total = min(max(total, sum(low)), sum(high))
    heaviest = max(weights, default=0.0)
    # who has no weight at all still gets what is left over when all others are full
    w = [max(one / heaviest, 1e-9) if heaviest > 0 else 1.0 for one in weights]

    def parts(scale: float) -> list[float]:
        return [min(max(scale * a, b), c) for a, b, c in zip(w, low, high, strict=True)]

    below, above = 0.0, max((c / a for a, c in zip(w, high, strict=True)), default=0.0)
    for _ in range(200):
        middle = (below + above) / 2
        below, above = (middle, above) if sum(parts(middle)) <= total else (below, middle)
    exact = parts(below)
    counts = [math.floor(one + 1e-6) for one in exact]
    by_rest = sorted(range(len(w)), key=lambda i: (counts[i] - exact[i], i))
    while sum(counts) < total:
        for i in by_rest:
            if counts[i] < high[i] and sum(counts) < total:
                counts[i] += 1
    return counts


def equal() -> Allocate:
    """Each image the same number of tokens, whatever its size (a stage's default: each the same share)."""

    def allocate(contexts: list[Context], share: float) -> list[int]:
        return _between(contexts, share, [1.0] * len(contexts))

    return allocate


def density(features: Tensor, threshold: float, counterparts: int) -> float:
    """The share of tokens that are not redundant, 0..1.

    Token-level Correlation-guided Compression: a token is redundant if more than `counterparts`
    others have a cosine above `threshold` with it. `features`: [N, C].
    """
    alike = torch.cat([(block > threshold).sum(1) for block in Cosine(features).others()])
    return float((alike <= counterparts).float().mean())


def by_density(threshold: float = 0.8, counterparts: float = 0.02, features: Features = here) -> Allocate:
    """In proportion to an image's tokens that are not redundant (`density`).

    `counterparts` is a share of the image's tokens, rounded up. Both defaults are ours: the paper's are not published.
    """

    def weight(context: Context) -> float:
        return density(features(context), threshold, math.ceil(counterparts * context.tokens)) * context.tokens

    def allocate(contexts: list[Context], share: float) -> list[int]:
        return _between(contexts, share, [weight(context) for context in contexts])

    return allocate


def by_score(score: Score, least: int = 4, pool: Callable[[Tensor], Tensor] = torch.mean) -> Allocate:
    """Each image `least` tokens, and the rest in proportion to how much it matters, from the least to the most.

    Tempo (its adaptive token allocation) where the budget binds: k_i = least + rest · r_i / Σ r
    with r the images' scores (tokens pooled with `pool`) brought to 0..1. Where all matter the same, all get the same.
    """

    def allocate(contexts: list[Context], share: float) -> list[int]:
        found = torch.stack([pool(score(context)).float().cpu() for context in contexts])
        return by_relevance(found.tolist(), total_of(contexts, share), [c.tokens for c in contexts], least)

    return allocate


def by_relevance(relevance: Sequence[float], total: int, high: Sequence[int], least: int) -> list[int]:
    """Divide `total`: `least` each (fewer where that is too many), the rest linear in relevance, up to `high` each."""
    spread = max(relevance) - min(relevance)
    weights = [(one - min(relevance)) / spread if spread > 0 else 1.0 for one in relevance]
    floor = max(1, min(least, total // len(high)))
    low = [min(floor, most) for most in high]
    rest = apportion(weights, total - sum(low), [0] * len(high), [c - b for b, c in zip(low, high, strict=True)])
    return [b + more for b, more in zip(low, rest, strict=True)]


def _between(contexts: Sequence[Context], share: float, weights: Sequence[float]) -> list[int]:
    return apportion(weights, total_of(contexts, share), [1] * len(contexts), [context.tokens for context in contexts])
