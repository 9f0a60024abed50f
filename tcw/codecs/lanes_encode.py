"""The writing loops of `lanes`: take words apart, then write each lane's codes one after another."""

import numpy as np

from tcw.codecs.compiled import inline, kernel, load_u64, prefetch_range, store_u64
from tcw.codecs.lanes_layout import BF16, CHUNK, F16, F32, GROUP, LANE_BYTES, LANES, ROW, STEPS

PAIR_BITS = 6  # alphabets of at most 64 symbols are written two symbols a look-up
PAIR_TABLE = 1 << 2 * PAIR_BITS


@kernel
def fill_pairs(singles, pairs):  # type: ignore[no-untyped-def]
    """pairs[first | second << 6] = both codes in bits 0..23, their size above, of an alphabet of at most 64 symbols."""
    for first in range(singles.size):
        for second in range(singles.size):
            size = singles[first] >> 24
            code = (singles[first] & 0xFFFFFF) | (singles[second] & 0xFFFFFF) << size
            pairs[first | second << PAIR_BITS] = code | (size + (singles[second] >> 24)) << 24


@inline
def _take_apart(split, words, first_symbol, symbols, raw, low):  # type: ignore[no-untyped-def]
    """symbols[j] = symbol of words[j], less first_symbol; raw and low get the rest of the word.

    One plane a loop, over arrays that begin at 0: these are the loops that the compiler turns into vector code.
    """
    count = words.size
    symbols[count:] = 0
    if split == BF16:
        for j in range(count):
            symbols[j] = ((words[j] >> 7) & 0xFF) - first_symbol
        for j in range(count):
            raw[j] = ((words[j] >> 8) & 0x80) | (words[j] & 0x7F)
    elif split == F16:
        for j in range(count):
            symbols[j] = (words[j] >> 8) - first_symbol
        for j in range(count):
            raw[j] = words[j] & 0xFF
    elif split == F32:
        for j in range(count):
            symbols[j] = ((words[j] >> 23) & 0xFF) - first_symbol
        for j in range(count):
            raw[j] = ((words[j] >> 24) & 0x80) | ((words[j] >> 16) & 0x7F)
        for j in range(count):
            low[j] = words[j] & 0xFFFF
    else:
        for j in range(count):
            symbols[j] = words[j] - first_symbol


@inline
def _lane_of_pairs(symbols, lane, pairs, codes, at):  # type: ignore[no-untyped-def]
    """Write a full lane, four symbols a step from a table of pairs; returns where it ends."""
    acc, bits = np.uint64(0), np.uint64(0)
    for step in range(STEPS):
        x = load_u64(symbols, 2 * (step * ROW + GROUP * lane))
        x |= x >> np.uint64(16 - PAIR_BITS)
        a = np.uint64(pairs[x & np.uint64(PAIR_TABLE - 1)])
        b = np.uint64(pairs[(x >> np.uint64(32)) & np.uint64(PAIR_TABLE - 1)])
        size = a >> np.uint64(24)
        code = (a & np.uint64(0xFFFFFF)) | ((b & np.uint64(0xFFFFFF)) << size)
        acc |= code << bits
        bits += size + (b >> np.uint64(24))
        store_u64(codes, at, acc)
        at += np.int64(bits >> np.uint64(3))
        acc >>= bits & np.uint64(0x38)
        bits &= np.uint64(7)
    return at + np.int64(bits > 0)


@inline
def _lane_of_singles(symbols, lane, size, singles, codes, at):  # type: ignore[no-untyped-def]
    """Write a lane of `size` symbols, one symbol a look-up; returns where it ends."""
    acc, bits = np.uint64(0), np.uint64(0)
    for j in range(size):
        entry = np.uint64(singles[symbols[(j // GROUP) * ROW + GROUP * lane + j % GROUP]])
        acc |= (entry & np.uint64(0xFFFFFF)) << bits
        bits += entry >> np.uint64(24)
        if j % GROUP == GROUP - 1:
            store_u64(codes, at, acc)
            at += np.int64(bits >> np.uint64(3))
            acc >>= bits & np.uint64(0x38)
            bits &= np.uint64(7)
    store_u64(codes, at, acc)
    return at + np.int64((bits + np.uint64(7)) >> np.uint64(3))


@kernel
def encode_units(  # type: ignore[no-untyped-def]
    split, words, first_symbol, units, first, last, singles, pairs, raw, low, codes, bounds, ends, lane_bytes
):
    """Write units first..last, each from its own place bounds[u] in `codes`; ends[u] says where it ended.

    singles [tables, alphabet] and pairs [tables, 4096 or 0] hold a code in bits 0..23 and its length above. A unit
    needs 8 bytes of room behind its last one.
    """
    symbols = np.empty(CHUNK, dtype=np.uint16)
    width = words.itemsize
    for u in range(first, last):
        table = units[u, 4]
        at = bounds[u]
        start, stop = units[u, 2], units[u, 3]
        for chunk in range(units[u, 0], units[u, 1]):
            count = min(CHUNK, stop - start)
            end = start + count
            _take_apart(split, words[start:end], first_symbol, symbols, raw[start:end], low[start:end])
            for lane in range(LANES):
                ahead = end + lane * (CHUNK // LANES)  # the next chunk comes in while this one is written
                prefetch_range(words, ahead * width, (ahead + CHUNK // LANES) * width)
                prefetch_range(raw, ahead, ahead + CHUNK // LANES)
                prefetch_range(codes, at + 8 * LANE_BYTES // 3, at + 9 * LANE_BYTES // 3)
                before = at
                if count == CHUNK and pairs.shape[1] > 0:
                    at = _lane_of_pairs(symbols, lane, pairs[table], codes, at)
                else:
                    rest = count % ROW - GROUP * lane
                    size = GROUP * (count // ROW) + max(0, min(GROUP, rest))
                    at = _lane_of_singles(symbols, lane, size, singles[table], codes, at)
                lane_bytes[chunk * LANES + lane] = at - before
            start = end
        ends[u] = at
