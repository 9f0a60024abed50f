"""The loops of `ecq`: successive interference cancellation over columns, a trellis over the rows of each column.

SIC is GPTQ in other words (tcw/weights/ecq.py): with H = L Lᵀ and Y = W L, columns are settled from the last to the
first, and what a column's error does to the others is taken off them: Y ← Y - ŵ_i L[i, :].

The trellis replaces rounding (Marcellin and Fischer, "Trellis coded quantization", 1990; with entropy coding: Fischer
and Wang, 1992). A target v is coded by a label z as the point 2z - 1/2, or as its mirror image -(2z - 1/2): together
the two grids are twice as fine as each. Which one holds is not stored; it is a bit s that follows from the parities
p = z mod 2 of the labels in the rows above:

    s_t = s_{t-m} ⊕ ⊕_{k in taps} p_{t-k},        all 0 above the first row.

A Viterbi search over the 2^m states finds the labels whose points are nearest to the targets as a whole: 64 states have
0.2 bits a weight less than rounding at the same error (0.255 is what any quantiser can gain). Both grids have the same
histogram of labels, so nothing else about the entropy code changes. The taps were found by search on a Gaussian source.
"""

import numpy as np

from tcw.codecs.compiled import inline, kernel

BLOCK = 64  # columns that a kernel settles before the rest is brought up to date by one product of matrices

# m -> the taps as bits of a number: bit k - 1 is p_{t-k}
TAPS = {0: 0, 2: 0b1, 3: 0b1, 4: 0b111, 5: 0b1101, 6: 0b10011}


def points(labels: np.ndarray, memory: int) -> np.ndarray:
    """Where labels lie, in steps.

    Args:
        labels: integers [columns, rows].
        memory: m of the trellis; 0 for plain rounding, whose points are the labels.

    Returns:
        float32 [columns, rows].
    """
    if memory == 0:
        return labels.astype(np.float32)
    columns, rows = labels.shape
    padded = -(-rows // memory) * memory
    parity = (labels & 1).astype(np.bool_)
    mirror = np.zeros((columns, padded), np.bool_)
    for k in range(1, memory):
        if TAPS[memory] >> (k - 1) & 1:
            mirror[:, k:rows] ^= parity[:, : rows - k]
    turns = mirror.reshape(columns, -1, memory)
    np.logical_xor.accumulate(turns, axis=1, out=turns)
    result = labels.astype(np.float32) * np.float32(2) - np.float32(0.5)
    return np.negative(result, out=result, where=mirror[:, :rows])


@inline
def _distances(x, d):  # type: ignore[no-untyped-def]
    """d[2 s + p] = squared distance from x to the nearest point of grid s with a label of parity p."""
    quarter = np.float32(0.25)
    for s in range(2):
        u = -x if s else x
        for p in range(2):
            at = np.float32(2 * p - 0.5)
            e = u - at - np.float32(4) * np.rint((u - at) * quarter)
            d[2 * s + p] = e * e


@inline
def _search(v, near, cost, new, taken):  # type: ignore[no-untyped-def]
    """Fill taken[t, state], the parity of the best way into each state after row t; returns the final costs.

    States rotate: a state x with s = x & 1 goes to rotr(x) ^ (mask where p). So the top bit of a state is the grid of
    the label before it, and states 2j, 2 (j ^ mask) (s = 0) and their successors (s = 1) lead to j and j + half.
    """
    half, one = np.uint64(cost.size // 2), np.uint64(1)
    d = np.empty(4, np.float32)
    cost[:] = np.float32(1e30)
    cost[0] = np.float32(0)
    for t in range(v.size):
        _distances(v[t], d)
        d00, d01, d10, d11 = d[0], d[1], d[2], d[3]
        row = taken[t]
        for k in range(half):
            j = np.uint64(k)
            even, odd = cost[j + j] + d00, cost[near[j]] + d01
            row[j] = odd < even
            new[j] = min(even, odd)
            even, odd = cost[j + j + one] + d10, cost[near[j] + one] + d11
            row[half + j] = odd < even
            new[half + j] = min(even, odd)
        cost, new = new, cost
    return cost


@inline
def _follow(v, mask, cost, taken, labels, found):  # type: ignore[no-untyped-def]
    """Walk the best path back: labels and their points."""
    states = cost.size
    x = np.argmin(cost)
    for t in range(v.size - 1, -1, -1):
        p = np.int64(taken[t, x])
        s = x >= states // 2
        u = -v[t] if s else v[t]
        at = np.float32(2 * p - 0.5)
        z = np.int64(2 * np.rint((u - at) * np.float32(0.25))) + p
        labels[t] = z
        point = np.float32(2 * z - 0.5)
        found[t] = -point if s else point
        if p:
            x ^= mask
        x = (2 * x) % states + np.int64(s)


@inline
def _shrink(v, found):  # type: ignore[no-untyped-def]
    """LMMSE: the factor that brings the points nearest to the targets; 0 for no points."""
    dot, square = 0.0, 0.0
    for t in range(v.size):
        dot += v[t] * found[t]
        square += found[t] * found[t]
    return max(0.0, dot / square) if square > 0.0 else 0.0


@kernel
def settle(Y, L, steps, mask, near, states, labels, values):  # type: ignore[no-untyped-def]
    """Settle a block of columns, last to first.

    Args:
        Y: float32 [columns, rows], targets; those of the block are used up.
        L: float32 [columns, columns], the block of L on the diagonal.
        steps: float32 [columns], what one step is in Y.
        mask: taps of the trellis.
        near: uint64 [states / 2], 2 (j ^ mask).
        states: 2^m, 1 for rounding.
        labels: int32 [columns, rows], filled.
        values: float32 [columns, rows], filled with ŵ, the shrunk points in units of W.
    """
    rows = Y.shape[1]
    cost, new = np.empty(states, np.float32), np.empty(states, np.float32)
    taken = np.empty((rows, states), np.uint8)
    v = np.empty(rows, np.float32)
    for i in range(Y.shape[0] - 1, -1, -1):
        found = values[i]
        for t in range(rows):
            v[t] = Y[i, t] / steps[i]
        if states > 1:
            _follow(v, mask, _search(v, near, cost, new, taken), taken, labels[i], found)
        else:
            for t in range(rows):
                found[t] = np.rint(v[t])
                labels[i, t] = np.int32(found[t])
        scale = np.float32(_shrink(v, found) * steps[i] / L[i, i])
        for t in range(rows):
            found[t] *= scale
        for j in range(i):
            factor = L[i, j]
            for t in range(rows):
                Y[j, t] -= factor * found[t]


def sweep(Y: np.ndarray, L: np.ndarray, steps: np.ndarray, memory: int) -> np.ndarray:
    """Quantise all columns of Y = (W L)ᵀ.

    Args:
        Y: float32 [in, out], C order; used up.
        L: float32 [in, in], lower Cholesky factor of the Hessian.
        steps: float32 [in], what one step is in each row of Y: all alike, errors are white there.
        memory: m of the trellis, 0 for rounding.

    Returns:
        int32 [in, out], the labels.
    """
    labels = np.empty(Y.shape, np.int32)
    values = np.empty((BLOCK, Y.shape[1]), np.float32)
    mask = TAPS[memory]
    near = (2 * (np.arange(max(1, 1 << memory >> 1)) ^ mask)).astype(np.uint64)
    for end in range(Y.shape[0], 0, -BLOCK):
        first = max(0, end - BLOCK)
        block = np.ascontiguousarray(L[first:end, first:end])
        found = values[: end - first]
        settle(Y[first:end], block, steps[first:end], mask, near, 1 << memory, labels[first:end], found)
        Y[:first] -= L[first:end, :first].T @ found
    return labels
