"""Share out bits over tensors so that the damage in all is least: any real number of bits, or a choice of sizes.

Both take damage curves (tcw.weights.Curve: bits per weight -> nats of KL, taken to add up) and an average of bits per
weight over all their weights.

`spend` is for methods with a dial. Between the sizes that were measured, the logarithm of damage is interpolated
linearly, on its lower convex hull; so damage is convex, and the best shares are those where one more bit would save
the same damage in every tensor that is not at a bound (a Lagrangian, found by bisection).

`choose` is for methods with a menu: a dynamic program over what has been spent so far, exact but for the rounding of
sizes to thousandths of a bit per weight over all tensors.
"""

from collections.abc import Sequence

import numpy as np

from tcw.weights import Curve

_LEAST_DAMAGE = 1e-30  # nats; logarithms need something above 0
_UNITS = 1000  # of `choose`: in a bit per weight


def spend(curves: Sequence[Curve], bits: float, *, least: float, most: float) -> dict[str, float]:
    """Choose real numbers of bits.

    Args:
        curves: of the tensors; groups are of no concern here.
        bits: average per weight, met exactly where it lies in the bounds.
        least: bound of each tensor.
        most: the same.

    Returns:
        Bits per weight of each tensor, by name.
    """
    if not curves:
        return {}
    weights = np.array([c.numel for c in curves], np.float64)
    share = weights / weights.sum()
    hulls = [_hull(c, least, most) for c in curves]

    def at(price: float) -> np.ndarray:
        return np.array([_best(*hull, price + np.log(w)) for hull, w in zip(hulls, share, strict=True)])

    low, high = -200.0, 200.0  # logarithm of what a bit per weight may cost: the higher, the fewer bits
    for _ in range(100):
        price = 0.5 * (low + high)
        low, high = (price, high) if float(at(price) @ share) > bits else (low, price)
    found, other = at(high), at(low)
    short = float(bits - found @ share)
    room = float((other - found) @ share)
    if room > 0:  # several tensors change at this price: all go the same part of their way
        found += (other - found) * min(1.0, max(0.0, short / room))
    return {c.name: float(b) for c, b in zip(curves, found, strict=True)}


def _hull(curve: Curve, least: float, most: float) -> tuple[np.ndarray, np.ndarray]:
    """Corners (bits, ln damage) of a convex falling curve over least..most: the lower hull, gone on at both ends."""
    bits = np.array(sorted(curve.damage))
    logs = np.log(np.maximum([curve.damage[b] for b in bits], _LEAST_DAMAGE))
    corners: list[tuple[float, float]] = []
    for x, y in zip(bits, logs, strict=True):
        while len(corners) > 1 and _slope(corners[-2], (x, y)) <= _slope(corners[-2], corners[-1]):
            corners.pop()
        if not corners or y < corners[-1][1]:
            corners.append((x, y))
    if len(corners) == 1:
        corners.append((corners[0][0] + 1.0, corners[0][1] - 2 * np.log(2)))  # a bit halves the error
    ends = [(x, _on_line(corners[k], corners[k + 1], x)) for x, k in ((least, 0), (most, len(corners) - 2))]
    inner = [c for c in corners if least < c[0] < most]
    points = np.array([ends[0] if least < corners[0][0] else (least, _between(corners, least)), *inner,
                       ends[1] if most > corners[-1][0] else (most, _between(corners, most))])  # fmt: skip
    return points[:, 0], points[:, 1]


def _slope(a: tuple[float, float], b: tuple[float, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])


def _on_line(a: tuple[float, float], b: tuple[float, float], x: float) -> float:
    return a[1] + _slope(a, b) * (x - a[0])


def _between(corners: list[tuple[float, float]], x: float) -> float:
    return float(np.interp(x, [c[0] for c in corners], [c[1] for c in corners]))


def _best(bits: np.ndarray, logs: np.ndarray, price: float) -> float:
    """Where damage + e^price * bits is least: its derivative, -k damage on a piece of slope -k, rises with bits."""
    k = -np.diff(logs) / np.diff(bits)
    stop = bits[:-1] + (logs[:-1] + np.log(k) - price) / k
    return float(np.maximum(bits[0], np.minimum(stop, bits[1:])).max())


def choose(curves: Sequence[Curve], bits: float) -> dict[str, float]:
    """Choose among the sizes that curves have; tensors of a group get the same one.

    Args:
        curves: of the tensors. A group may choose what all its tensors have.
        bits: most bits per weight on average, kept but for a thousandth. Where nothing is so small: the smallest sizes.

    Returns:
        Bits per weight of each tensor, by name.
    """
    if not curves:
        return {}
    groups: dict[str, list[Curve]] = {}
    for curve in curves:
        groups.setdefault(curve.group or f"={curve.name}", []).append(curve)
    options = [sorted(set.intersection(*(set(c.damage) for c in group))) for group in groups.values()]
    unit = sum(c.numel for c in curves) / (_UNITS * len(groups))
    sizes = [sum(c.numel for c in group) for group in groups.values()]
    costs = [
        np.rint((np.array(own) - own[0]) * size / unit).astype(int)
        for own, size in zip(options, sizes, strict=True)
    ]  # fmt: skip
    spare = bits * sum(sizes) - sum(own[0] * size for own, size in zip(options, sizes, strict=True))
    room = max(0, int(np.rint(spare / unit)))
    damage = np.zeros(room + 1)  # least damage with at most so much spent on top of the smallest sizes
    taken = []
    for group, own, cost in zip(groups.values(), options, costs, strict=True):
        ways = np.full((len(own), room + 1), np.inf)
        for way, option, spent in zip(ways, own, cost, strict=True):
            if spent <= room:
                way[spent:] = damage[: room + 1 - spent] + sum(c.damage[option] for c in group)
        taken.append(ways.argmin(axis=0))
        damage = ways.min(axis=0)
    found: dict[str, float] = {}
    for group, own, cost, way in reversed(list(zip(groups.values(), options, costs, taken, strict=True))):
        pick = int(way[room])
        room -= int(cost[pick])
        found |= {c.name: own[pick] for c in group}
    return found
