"""Huffman codes: optimal lengths under a limit, the canonical code of those lengths, and what it costs.

Lengths are found by package-merge (Larmore and Hirschberg, 1990), the coin collector's algorithm: a symbol of weight w
is offered as a coin of each denomination 2^-1 ... 2^-L. At each level, pairs of the cheapest coins are packaged into
one coin of the next denomination and merged with the symbols there; the 2n-2 cheapest coins of the last level cover a
value of n-1, and a symbol's code length is how many of its coins are among them. No length exceeds L, and no other
prefix code with that limit is shorter.

The code is canonical: codes of one length are consecutive numbers in the order of their symbols, and each length goes
on where the shorter one stopped. So the lengths are all that a file has to hold.
"""

import numpy as np

from tcw.codecs.compiled import kernel


def lengths(counts: np.ndarray, limit: int = 12) -> np.ndarray:
    """Optimal code lengths under a limit, by package-merge. Ties are settled by symbol order, so always the same way.

    Args:
        counts: Occurrences of each symbol, any integer dtype, [alphabet]; 0 for a symbol that does not occur.
        limit: Longest code allowed, in bits.

    Returns:
        uint8 [alphabet]: the length of each symbol's code, 0 where the count is 0. A lone symbol gets length 1.

    Raises:
        ValueError: More symbols occur than `limit` bits can tell apart.
    """
    counts = np.asarray(counts, dtype=np.int64)
    used = np.flatnonzero(counts)
    result = np.zeros(counts.size, dtype=np.uint8)
    if used.size > 1 << limit:
        raise ValueError(f"{used.size} symbols do not fit codes of {limit} bits")
    if used.size <= 1:
        result[used] = 1
        return result
    order = used[np.argsort(counts[used], kind="stable")]
    result[order] = _package_merge(counts[order], limit)
    return result


@kernel
def _package_merge(weights, limit):  # type: ignore[no-untyped-def]
    """Code lengths of two or more symbols with ascending weights."""
    n = weights.size
    packages, coins = np.zeros(n, dtype=np.int64), np.zeros(2 * n, dtype=np.int64)
    is_symbol = np.zeros((limit, 2 * n), dtype=np.bool_)  # by level: which of the merged coins is a symbol's own
    packed = 0
    for level in range(limit):
        i = j = 0
        for k in range(n + packed):
            # a symbol goes before a package of the same weight
            is_symbol[level, k] = j == packed or (i < n and weights[i] <= packages[j])
            if is_symbol[level, k]:
                coins[k] = weights[i]
                i += 1
            else:
                coins[k] = packages[j]
                j += 1
        packed = (n + packed) // 2
        for k in range(packed):
            packages[k] = coins[2 * k] + coins[2 * k + 1]
    lengths = np.zeros(n, dtype=np.uint8)
    take = 2 * n - 2
    for level in range(limit - 1, -1, -1):
        chosen = 0
        for k in range(take):
            chosen += is_symbol[level, k]
        for k in range(chosen):  # the symbols among the cheapest coins are always the rarest ones
            lengths[k] += 1
        take = 2 * (take - chosen)
    return lengths


def kraft(code_lengths: np.ndarray, limit: int) -> int:
    """Kraft sum in units of 2^-limit: a prefix code exists up to 2^limit, and is complete at exactly 2^limit."""
    present = np.asarray(code_lengths)[np.asarray(code_lengths) > 0].astype(np.int64)
    return int((np.int64(1) << (limit - present)).sum())


def canonical_order(code_lengths: np.ndarray) -> np.ndarray:
    """Symbols that have a code, int64, in the order of their canonical codes: by length, then by symbol."""
    code_lengths = np.asarray(code_lengths)
    return np.argsort(np.where(code_lengths == 0, 255, code_lengths), kind="stable")[: np.count_nonzero(code_lengths)]


def canonical(code_lengths: np.ndarray) -> np.ndarray:
    """Canonical codes as numbers, uint32 [alphabet], the first bit of a code being its most significant one.

    Raises:
        ValueError: No prefix code has these lengths.
    """
    code_lengths = np.asarray(code_lengths)
    codes = np.zeros(code_lengths.size, dtype=np.uint32)
    order = canonical_order(code_lengths)
    if order.size == 0:
        return codes
    bits = code_lengths[order].astype(np.int64)
    longest = int(bits[-1])
    if kraft(code_lengths, longest) > 1 << longest:
        raise ValueError("no prefix code has these lengths")
    widths = np.int64(1) << (longest - bits)
    codes[order] = (np.cumsum(widths) - widths) >> (longest - bits)
    return codes


def reversed_bits(codes: np.ndarray, code_lengths: np.ndarray) -> np.ndarray:
    """Codes with their bits turned around, uint32: the first bit of a code is then its least significant one."""
    result = np.zeros(len(codes), dtype=np.uint32)
    _reverse(np.asarray(codes, dtype=np.uint32), np.asarray(code_lengths, dtype=np.uint8), result)
    return result


@kernel
def _reverse(codes, code_lengths, result):  # type: ignore[no-untyped-def]
    for s in range(codes.size):
        for bit in range(code_lengths[s]):
            result[s] = (result[s] << 1) | ((codes[s] >> bit) & 1)


def entropy(counts: np.ndarray) -> float:
    """Order-0 entropy in bits per symbol; 0.0 for no symbols."""
    counts = np.asarray(counts, dtype=np.float64)
    share = counts[counts > 0] / max(counts.sum(), 1)
    return float(-(share * np.log2(share)).sum()) + 0.0


def coded_bits(counts: np.ndarray, code_lengths: np.ndarray) -> int:
    """Bits that a message with these symbol counts takes."""
    return int((np.asarray(counts, dtype=np.int64) * np.asarray(code_lengths, dtype=np.int64)).sum())
