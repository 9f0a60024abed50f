"""Budgets of several images: what is promised holds for all of them, and shares are as loops compute them."""

import math
import random

import pytest
import torch

from tcw.tokens import Allocate, allocates, scores
from tcw.tokens.context import Context

from .contexts import cosines, image

ALLOCATES: dict[str, Allocate] = {
    "equal": allocates.equal(),
    "density": allocates.by_density(0.3),
    "score": allocates.by_score(scores.norm()),
    "max": allocates.by_score(scores.norm(), 2, torch.max),
}


def batch(seed: int) -> list[Context]:
    """Images of several sizes, some of which earlier cuts have thinned out."""
    source, found = random.Random(seed), []
    for n in range(source.randint(1, 5)):
        rows, columns = source.randint(1, 6), source.randint(1, 6)
        alive = source.choice((None, source.randint(1, rows * columns)))
        found.append(image((1, rows, columns), seed=10 * seed + n, alive=alive, scale=source.choice((0.1, 1.0, 5.0))))
    return found


@pytest.mark.parametrize("name", ALLOCATES)
def test_the_total_is_exact(name: str) -> None:
    for seed in range(12):
        contexts = batch(seed)
        original, left = sum(c.original for c in contexts), sum(c.tokens for c in contexts)
        for share in (0.01, 0.1, 0.33, 0.5, 0.9, 1.0):
            counts = ALLOCATES[name](contexts, share)
            assert sum(counts) == min(left, max(len(contexts), math.floor(share * original + 0.5)))
            assert all(1 <= k <= c.tokens for k, c in zip(counts, contexts, strict=True))
            assert counts == ALLOCATES[name](contexts, share)


@pytest.mark.parametrize("name", ALLOCATES)
def test_equal_images_get_the_same(name: str) -> None:
    contexts = [image((1, 4, 5), seed=1) for _ in range(4)]
    assert ALLOCATES[name](contexts, 0.5) == [10] * 4
    assert sorted(ALLOCATES[name](contexts, 0.5125)) == [10, 10, 10, 11]


def test_apportion_in_proportion() -> None:
    assert allocates.apportion([1, 2, 3], 60, [0] * 3, [99] * 3) == [10, 20, 30]
    assert allocates.apportion([1, 1, 1], 4, [0] * 3, [9] * 3) == [2, 1, 1], "of equal remainders the first"
    assert allocates.apportion([5, 3, 2], 11, [0] * 3, [99] * 3) == [6, 3, 2], "5.5, 3.3, 2.2"
    assert allocates.apportion([1, 2, 3], 60, [15, 0, 0], [99, 99, 20]) == [15, 25, 20], "what is left goes to the rest"
    assert allocates.apportion([0, 0], 5, [0, 0], [9, 9]) == [3, 2]
    assert allocates.apportion([0, 1], 8, [0, 0], [9, 5]) == [3, 5], "no weight, but nobody else has room"
    assert allocates.apportion([1, 1], 0, [2, 3], [9, 9]) == [2, 3]
    assert allocates.apportion([1, 1], 99, [0, 0], [2, 3]) == [2, 3]
    assert allocates.apportion([], 0, [], []) == []


def test_apportion_by_largest_remainder() -> None:
    source = random.Random(0)
    for _ in range(200):
        n, total = source.randint(1, 6), source.randint(0, 40)
        weights = [source.random() for _ in range(n)]
        exact = [total * w / sum(weights) for w in weights]
        counts = [int(one) for one in exact]
        for i in sorted(range(n), key=lambda i: counts[i] - exact[i])[: total - sum(counts)]:
            counts[i] += 1
        assert allocates.apportion(weights, total, [0] * n, [total] * n) == counts


def test_apportion_between_bounds() -> None:
    """Exact, inside the bounds, and who weighs more gets no less (a rounding aside)."""
    source = random.Random(0)
    for _ in range(200):
        n = source.randint(1, 6)
        weights = [source.choice((0.0, source.random())) for _ in range(n)]
        low = [source.randint(0, 3) for _ in range(n)]
        high = [b + source.randint(0, 12) for b in low]
        total = source.randint(sum(low), sum(high))
        counts = allocates.apportion(weights, total, low, high)
        assert sum(counts) == total
        assert all(b <= k <= c for b, k, c in zip(low, counts, high, strict=True))
        for i in range(n):
            for j in range(n):
                if weights[i] > weights[j] and counts[i] < high[i] and counts[j] > low[j]:
                    assert counts[i] >= counts[j] - 1


def test_density() -> None:
    for seed in range(5):
        x = image((1, 5, 6), seed=seed).x
        cosine = cosines(x)
        for threshold, counterparts in ((0.2, 3), (0.5, 0), (0.9, 1)):
            alike = [sum(cosine[i][j] > threshold for j in range(30) if j != i) for i in range(30)]
            expected = sum(n <= counterparts for n in alike) / 30
            assert allocates.density(x, threshold, counterparts) == pytest.approx(expected)


def test_what_repeats_itself_gets_less() -> None:
    rich, flat = image((1, 6, 6), seed=1), image((1, 6, 6), seed=1, flat=True)
    assert allocates.by_density()([rich, flat], 0.5) == [35, 1]
    assert allocates.by_density()([flat, flat], 0.5) == [18, 18]


def test_what_matters_gets_more() -> None:
    images = [image((1, 6, 6), seed=1, scale=scale) for scale in (1.0, 2.0, 3.0)]
    assert allocates.by_score(scores.norm(), least=4)(images, 0.25) == [4, 9, 14]
    assert allocates.by_relevance([0.0, 0.5, 1.0], 27, [36] * 3, 4) == [4, 9, 14]
    assert allocates.by_relevance([0.0, 0.5, 1.0], 27, [36, 36, 10], 4) == [4, 13, 10], "more than it has it cannot get"
    assert allocates.by_relevance([0.0, 1.0], 3, [36, 36], 4) == [1, 2], "too few for the least of all"
