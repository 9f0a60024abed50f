"""Huffman codes against slow ways to the same answer."""

import heapq
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tcw.codecs import huffman

COUNTS = st.lists(st.integers(0, 1000), min_size=0, max_size=40)


def best_cost(counts: list[int], limit: int) -> int:
    """Least number of bits of any prefix code with the limit, by trying all lengths that satisfy Kraft's inequality."""
    used = sorted((c for c in counts if c), reverse=True)
    if len(used) <= 1:
        return sum(used)
    best = sum(used) * limit
    for lengths in itertools.combinations_with_replacement(range(1, limit + 1), len(used)):
        if sum(1 << (limit - size) for size in lengths) <= 1 << limit:
            best = min(best, sum(c * size for c, size in zip(used, lengths, strict=True)))
    return best


def unlimited_cost(counts: list[int]) -> int:
    """Bits of Huffman's own code: the sum of all merged weights."""
    heap = [c for c in counts if c]
    if len(heap) == 1:
        return heap[0]
    heapq.heapify(heap)
    cost = 0
    while len(heap) > 1:
        merged = heapq.heappop(heap) + heapq.heappop(heap)
        cost += merged
        heapq.heappush(heap, merged)
    return cost


@given(st.lists(st.integers(0, 50), min_size=0, max_size=7), st.integers(3, 6))
@settings(max_examples=150, deadline=None)
def test_lengths_are_optimal_under_the_limit(counts: list[int], limit: int) -> None:
    lengths = huffman.lengths(np.array(counts, dtype=np.int64), limit)
    assert huffman.coded_bits(np.array(counts, dtype=np.int64), lengths) == best_cost(counts, limit)


@given(COUNTS)
@settings(deadline=None)
def test_a_wide_limit_gives_huffmans_cost(counts: list[int]) -> None:
    array = np.array(counts, dtype=np.int64)
    assert huffman.coded_bits(array, huffman.lengths(array, 40)) == unlimited_cost(counts)


@given(COUNTS, st.integers(6, 12))
@settings(deadline=None)
def test_codes_are_complete_canonical_and_prefix_free(counts: list[int], limit: int) -> None:
    array = np.array(counts, dtype=np.int64)
    lengths = huffman.lengths(array, limit)
    assert ((lengths > 0) == (array > 0)).all()
    assert lengths.max(initial=0) <= limit
    used = np.count_nonzero(lengths)
    assert huffman.kraft(lengths, limit) == (0, 1 << (limit - 1), 1 << limit)[min(used, 2)]
    codes = huffman.canonical(lengths)
    texts = [format(codes[s], f"0{lengths[s]}b") for s in huffman.canonical_order(lengths)]
    assert texts == sorted(texts)
    assert all(not b.startswith(a) for a, b in itertools.pairwise(texts))
    back = huffman.reversed_bits(codes, lengths)
    assert all(format(back[s], f"0{n}b")[::-1] == format(codes[s], f"0{n}b") for s, n in enumerate(lengths) if n)


def test_a_code_by_hand() -> None:
    # the canonical code of DEFLATE's specification (RFC 1951, section 3.2.2)
    codes = huffman.canonical(np.array([3, 3, 3, 3, 3, 2, 4, 4], dtype=np.uint8))
    assert codes.tolist() == [0b010, 0b011, 0b100, 0b101, 0b110, 0b00, 0b1110, 0b1111]
    assert huffman.lengths(np.array([45, 13, 12, 16, 9, 5])).tolist() == [1, 3, 3, 3, 4, 4]


def test_the_largest_alphabet() -> None:
    counts = np.random.default_rng(0).integers(1, 1 << 40, 1 << 16)
    lengths = huffman.lengths(counts, 20)
    assert huffman.kraft(lengths, 20) == 1 << 20
    assert huffman.coded_bits(counts, lengths) < counts.sum() * (huffman.entropy(counts) + 0.1)
    full = huffman.lengths(counts, 16)
    assert (full == 16).all()
    with pytest.raises(ValueError, match="65536 symbols do not fit codes of 15 bits"):
        huffman.lengths(counts, 15)


def test_ties_are_settled_by_symbol_order() -> None:
    counts = np.array([7, 7, 7, 7, 7])
    assert huffman.lengths(counts).tolist() == huffman.lengths(counts).tolist() == [3, 3, 2, 2, 2]


def test_degenerate_alphabets() -> None:
    assert huffman.lengths(np.array([], dtype=np.int64)).size == 0
    assert huffman.canonical(np.zeros(3, dtype=np.uint8)).tolist() == [0, 0, 0]
    assert huffman.lengths(np.array([0, 9, 0])).tolist() == [0, 1, 0]
    assert huffman.entropy(np.array([0, 9])) == 0.0 == huffman.entropy(np.array([]))
    assert huffman.entropy(np.array([5, 5, 0, 10])) == pytest.approx(1.5)


def test_lengths_that_no_code_has() -> None:
    with pytest.raises(ValueError, match="no prefix code"):
        huffman.canonical(np.array([1, 1, 1], dtype=np.uint8))
