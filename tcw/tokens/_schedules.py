"""A search for how many tokens each block of a tower should drop and merge, at a given cost."""

from collections.abc import Callable, Sequence

Schedule = list[tuple[int, int]]
"""For each block, how many tokens it drops and how many it merges."""

_TILTS = (-0.5, 0.0, 0.5)  # less, as much, and more in the last block than in the first: 1 ± tilt times the mean
_HALVINGS = 40


def even(count: int, patches: int, removed: float, pruned: float) -> Schedule:
    """Remove `removed` of `patches` tokens evenly over `count` blocks, the share `pruned` of them for good."""
    return _rounded([removed / count] * count, [pruned] * count, patches, 1)


def search(
    error: Callable[[Schedule], float],
    cost: Callable[[Schedule], float],
    start: Schedule,
    patches: int,
    step: int = 1,
    rounds: int = 1,
) -> Schedule:
    """Look for a schedule that costs no more than `start` and errs less.

    First the best of a few slopes, each with all tokens dropped, half of them, or none. Then, block by block: twice and
    half as many tokens, and the other two ways to share them out; what lowers the error stays. All blocks are scaled
    together each time, to the cost of `start`.

    Args:
        error: of a schedule; what is minimised.
        cost: of a schedule; falls when tokens are removed.
        start: what is to be beaten, and what is returned if nothing does.
        patches: tokens before any cut.
        step: blocks remove multiples of this many tokens.
        rounds: how often each block is tried.
    """
    count, limit = len(start), cost(start)

    def fitted(weights: Sequence[float], pruned: Sequence[float]) -> Schedule:
        return _fitted(weights, pruned, patches, step, lambda schedule: cost(schedule) <= limit)

    best, least = start, error(start)
    weights, pruned = [1.0] * count, [0.5] * count
    for tilt in _TILTS:
        for share in (0.0, 0.5, 1.0):
            slope = [1 + tilt * (2 * n / max(1, count - 1) - 1) for n in range(count)]
            trial = fitted(slope, [share] * count)
            if (found := error(trial)) < least:
                best, least, weights, pruned = trial, found, slope, [share] * count
    for _ in range(rounds):
        for n in range(count):
            for weight, drop in _around(weights[n], pruned[n]):
                w, p = list(weights), list(pruned)
                w[n], p[n] = weight, drop
                trial = fitted(w, p)
                if trial != best and (found := error(trial)) < least:
                    best, least, weights, pruned = trial, found, w, p
    return best


def _around(weight: float, pruned: float) -> list[tuple[float, float]]:
    """What to try in place of a block's weight and share of drops."""
    return [(2 * weight, pruned), (weight / 2, pruned), *((weight, share) for share in (0.0, 0.5, 1.0))]


def _fitted(
    weights: Sequence[float],
    pruned: Sequence[float],
    patches: int,
    step: int,
    fits: Callable[[Schedule], bool],
) -> Schedule:
    """The fewest removals in proportion to `weights` that fit; at the most all are removed at once, which does."""

    def made(scale: float) -> Schedule:
        return _rounded([scale * weight for weight in weights], pruned, patches, step)

    low, high = 0.0, patches / min(weights)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if fits(made(middle)) else (middle, high)
    return made(high)


def _rounded(removed: Sequence[float], pruned: Sequence[float], patches: int, step: int) -> Schedule:
    """Whole numbers, multiples of `step` in all but the block that runs out of tokens: one is always left."""
    schedule, total, exact = [], 0, 0.0
    for amount, share in zip(removed, pruned, strict=True):
        exact += amount
        here = min(step * round((exact - total) / step), patches - 1 - total)
        here = max(0, here)
        drops = round(here * share)
        schedule.append((drops, here - drops))
        total += here
    return schedule
