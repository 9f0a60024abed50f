"""Orthogonal matrices with all entries ±1/√n, and quick products with them.

A Hadamard matrix of order n has entries ±1 and orthogonal rows. Sylvester's doubling makes one of order 2n out of one
of order n, so all sizes 2^k·m follow from a few odd cases, and those come from squares modulo a prime q (Paley 1933):

    Paley I    m = q + 1,      q ≡ 3 (mod 4):  12, 20, 24, 44, 60, 84 ...
    Paley II   m = 2·(q + 1),  q ≡ 1 (mod 4):  12, 28, 36, 60, 76 ...

The smallest such m is taken: 576 = 2^4·36, 896 = 2^5·28, 1536 = 2^7·12, 5120 = 2^8·20, 5376 = 2^6·84, 6656 = 2^6·104.
Where none is known here (n odd, twice an odd number, or a rare one such as 92), two overlapping matrices of the largest
smaller size take turns: still orthogonal, still mixing all coordinates, though not evenly.

All factors are ±1, so sums of weights of few bits are exact in float64 and the result does not hang on the order in
which a machine adds.
"""

import functools
import hashlib
import math

import numpy as np

_MAX_DENSE = 1024  # the largest Paley matrix that is worth holding


class Rotation:
    """A random Hadamard matrix R = diag(±1)·H/√n: orthogonal, and the same for the same size and key everywhere.

    Attributes:
        size: n.
        spans: (first coordinate, size) of each Hadamard matrix; one, (0, n), where there is one of order n.
    """

    def __init__(self, size: int, key: str) -> None:
        """Draw the signs from the hash of `key`. `size` is at least 1."""
        self.size = size
        self.spans = _spans(size)
        drawn = np.frombuffer(hashlib.shake_256(f"{key} {size}".encode()).digest((size + 7) // 8), np.uint8)
        self._signs = 1.0 - 2.0 * np.unpackbits(drawn)[:size]

    def turn(self, rows: np.ndarray) -> np.ndarray:
        """rows·R, float64 [..., n]. A new array."""
        turned = rows * self._signs
        for start, size in self.spans:
            part = turned[..., start : start + size]
            part[...] = _transform(np.ascontiguousarray(part).reshape(-1, size)).reshape(part.shape)
        return turned


def _transform(rows: np.ndarray) -> np.ndarray:
    """rows·H/√n for float64 [count, n]: H is a Kronecker product of two small matrices, one after the other."""
    count, size = rows.shape
    left, right = _factors(size)
    inner = (rows.reshape(-1, len(right)) @ right).reshape(count, len(left), len(right))
    return (left @ inner).reshape(count, size) * (1 / math.sqrt(size))


@functools.cache
def _factors(size: int) -> tuple[np.ndarray, np.ndarray]:
    """A [a, a], symmetric, and B [b, b] with A ⊗ B a Hadamard matrix of order a·b = size, a near b."""
    order = _order(size)
    assert order is not None
    right = _paley(order)
    left = np.ones((1, 1))
    while len(left) * len(right) < size:
        if len(left) < len(right):
            left = _doubled(left)
        else:
            right = _doubled(right)
    return left, right


def _spans(size: int) -> tuple[tuple[int, int], ...]:
    largest = next(n for n in range(size, 0, -1) if _order(n))
    return ((0, size),) if largest == size else ((0, largest), (size - largest, largest))


def _order(size: int) -> int | None:
    """The smallest m, a Paley order or 1, with size = 2^k·m; None when there is none."""
    odd = size // (size & -size)
    if odd == 1:
        return 1
    orders = (odd << k for k in range(2, 11) if (odd << k) <= _MAX_DENSE and size % (odd << k) == 0)
    return next((m for m in orders if _is_first(m) or _is_second(m)), None)


def _is_first(order: int) -> bool:
    return order % 4 == 0 and _is_prime(order - 1)


def _is_second(order: int) -> bool:
    return order % 4 == 0 and (order // 2 - 1) % 4 == 1 and _is_prime(order // 2 - 1)


def _is_prime(q: int) -> bool:
    return q > 1 and all(q % d for d in range(2, math.isqrt(q) + 1))


def _paley(order: int) -> np.ndarray:
    """Hadamard matrix of a Paley order, float64 [order, order]."""
    if order == 1:
        return np.ones((1, 1))
    first = _is_first(order)
    q = order - 1 if first else order // 2 - 1
    square = np.full(q, -1.0)  # χ(x): 1 for squares modulo q, -1 for others, 0 for 0
    square[[x * x % q for x in range(1, q)]] = 1.0
    square[0] = 0.0
    steps = np.arange(q)
    border = np.ones((q + 1, q + 1))
    border[0, 0] = 0.0
    border[1:, 1:] = square[(steps[:, None] - steps) % q]
    if first:  # χ(-1) = -1: the border is skew
        border[1:, 0] = -1.0
        return border + np.eye(order)
    return np.kron(border, [[1.0, 1.0], [1.0, -1.0]]) + np.kron(np.eye(q + 1), [[1.0, -1.0], [-1.0, -1.0]])


def _doubled(matrix: np.ndarray) -> np.ndarray:
    return np.kron([[1.0, 1.0], [1.0, -1.0]], matrix)
