"""The reading loops of `lanes`: tables that give several symbols a look-up, four lanes at once, words put back."""

import numpy as np

from tcw.codecs.compiled import inline, kernel, load_u32, load_u64, prefetch_range, store_u32, store_u64
from tcw.codecs.huffman import canonical_order, reversed_bits
from tcw.codecs.lanes_layout import BF16, CHUNK, F16, F32, GROUP, LANE_BYTES, LANES, LONGEST, ROW, STEPS

WINDOW = 1 << LONGEST
SYMBOL_BYTES = 6  # an entry's symbols: six of 8 bits or three of 16
BURST = 4  # look-ups between two refills: 4 x 12 bits of the 57 that a refill gives at least
SLACK = 256  # how far behind a lane's start a reader may look: 192 bytes, and a refill

_REVERSED = reversed_bits(np.arange(WINDOW), np.full(WINDOW, LONGEST)).astype(np.int64)


def decode_table(code_lengths: np.ndarray, first_symbol: int, symbol_bytes: int) -> np.ndarray:
    """Build the look-up table of a checked code.

    Args:
        code_lengths: uint8 [alphabet], a complete code, a lone symbol of length 1, or no symbol at all.
        first_symbol: What the first of them stands for.
        symbol_bytes: 1 or 2.

    Returns:
        uint64 [4096] by the next 12 bits of the stream: as many symbols as these bits have in full in bits 0..47,
        their size in bytes in bits 48..57, the bits they use in 58..63.
    """
    order = canonical_order(code_lengths)
    if order.size == 0:
        return np.zeros(WINDOW, np.uint64)
    bits = code_lengths[order].astype(np.int64)
    if order.size == 1:  # its only code is 0, and the caller has seen that no bit is set
        bits = np.zeros(1, dtype=np.int64)
    widths = np.int64(1) << (LONGEST - bits)
    symbol = np.repeat((order + first_symbol).astype(np.uint16), widths)[_REVERSED]
    length = np.repeat(np.maximum(bits, 1).astype(np.uint8), widths)[_REVERSED]
    table = np.empty(WINDOW, dtype=np.uint64)
    _fill(symbol, length, symbol_bytes, table)
    return table


@kernel
def _fill(symbol, length, symbol_bytes, table):  # type: ignore[no-untyped-def]
    """Take codes off each window as long as one lies in it and there is room; symbol and length know the next one."""
    longest, room, width = np.uint64(LONGEST), np.uint64(8 * SYMBOL_BYTES), np.uint64(8 * symbol_bytes)
    for window in range(WINDOW):
        rest, used, filled, entry = np.uint64(window), np.uint64(0), np.uint64(0), np.uint64(0)
        while filled < room:
            bits = np.uint64(length[rest])
            if used + bits > longest:
                break
            entry |= np.uint64(symbol[rest]) << filled
            used += bits
            rest >>= bits
            filled += width
        table[window] = entry | filled >> np.uint64(3) << np.uint64(48) | used << np.uint64(58)


@inline
def _lane_fits(codes, start, read, size):  # type: ignore[no-untyped-def]
    """Say whether a lane of `size` bytes at `start` ends with its last code, padded with zero bits."""
    if (read + 7) >> 3 != size:
        return False
    return (read & 7) == 0 or (codes[start + size - 1] >> (read & 7)) == 0


@inline
def _four_lanes(codes, starts, lane, sizes, table, lengths, buffer, stride, step, reads):  # type: ignore[no-untyped-def]
    """Decode four lanes side by side: four chains of look-ups hide what one of them waits.

    A lane's state is bits read << 10 | bytes written; an entry shifted by 48 adds to both at once. A lane that has
    all its symbols stands still, until all four have theirs.
    """
    low, mask, top = np.uint64(0x3FF), np.uint64(WINDOW - 1), np.uint64(58)
    ten, three, seven, up = np.uint64(10), np.uint64(3), np.uint64(7), np.uint64(48)
    none = np.uint64(0)
    s0, s1, s2, s3 = none, none, none, none
    p0, p1, p2, p3 = starts[lane], starts[lane + 1], starts[lane + 2], starts[lane + 3]
    z0, z1 = np.uint64(sizes[lane]), np.uint64(sizes[lane + 1])
    z2, z3 = np.uint64(sizes[lane + 2]), np.uint64(sizes[lane + 3])
    t0 = lane * stride
    t1, t2, t3 = t0 + stride, t0 + 2 * stride, t0 + 3 * stride
    while (s0 & low) < z0 or (s1 & low) < z1 or (s2 & low) < z2 or (s3 & low) < z3:
        w0 = load_u64(codes, p0 + np.int64(s0 >> ten >> three)) >> (s0 >> ten & seven)
        w1 = load_u64(codes, p1 + np.int64(s1 >> ten >> three)) >> (s1 >> ten & seven)
        w2 = load_u64(codes, p2 + np.int64(s2 >> ten >> three)) >> (s2 >> ten & seven)
        w3 = load_u64(codes, p3 + np.int64(s3 >> ten >> three)) >> (s3 >> ten & seven)
        for _ in range(BURST):
            e0, e1, e2, e3 = table[w0 & mask], table[w1 & mask], table[w2 & mask], table[w3 & mask]
            store_u64(buffer, t0 + np.int64(s0 & low), e0)
            store_u64(buffer, t1 + np.int64(s1 & low), e1)
            store_u64(buffer, t2 + np.int64(s2 & low), e2)
            store_u64(buffer, t3 + np.int64(s3 & low), e3)
            w0, w1, w2, w3 = w0 >> (e0 >> top), w1 >> (e1 >> top), w2 >> (e2 >> top), w3 >> (e3 >> top)
            s0 += (e0 >> up) if (s0 & low) < z0 else none
            s1 += (e1 >> up) if (s1 & low) < z1 else none
            s2 += (e2 >> up) if (s2 & low) < z2 else none
            s3 += (e3 >> up) if (s3 & low) < z3 else none
    reads[lane] = _bits_read(s0, sizes[lane], lengths, buffer, t0, step)
    reads[lane + 1] = _bits_read(s1, sizes[lane + 1], lengths, buffer, t1, step)
    reads[lane + 2] = _bits_read(s2, sizes[lane + 2], lengths, buffer, t2, step)
    reads[lane + 3] = _bits_read(s3, sizes[lane + 3], lengths, buffer, t3, step)


@inline
def _bits_read(state, size, lengths, buffer, to, step):  # type: ignore[no-untyped-def]
    """Bits of the first `size` bytes of symbols: the last look-up may have given up to five more than the lane has."""
    read, over = np.int64(state >> np.uint64(10)), np.int64(state & np.uint64(0x3FF)) - size
    for k in range(0, SYMBOL_BYTES, step):
        symbol = load_u32(buffer, to + size + k) & np.uint32(0xFF if step == 1 else 0xFFFF)
        read -= np.int64(lengths[symbol]) if k < over else 0
    return read


@inline
def _put_together(split, symbols, raw, low, words):  # type: ignore[no-untyped-def]
    """words[j] = the word of symbols[j] and its place in the side planes; arrays begin at 0, for vector code."""
    count = words.size
    if split == BF16:
        for j in range(count):
            words[j] = (symbols[j] << 7) | ((raw[j] & 0x80) << 8) | (raw[j] & 0x7F)
    elif split == F16:
        for j in range(count):
            words[j] = (symbols[j] << 8) | raw[j]
    elif split == F32:
        for j in range(count):
            words[j] = (symbols[j] << 23) | ((raw[j] & 0x80) << 24) | ((raw[j] & 0x7F) << 16) | low[j]
    else:
        for j in range(count):
            words[j] = symbols[j]


@inline
def _reorder(buffer, stride, step, symbols):  # type: ignore[no-untyped-def]
    """Bring [lane, step, 4] symbols of `step` bytes into [step, lane, 4]."""
    for i in range(STEPS):
        for lane in range(LANES):
            if step == 1:
                store_u32(symbols, i * ROW + GROUP * lane, load_u32(buffer, lane * stride + GROUP * i))
            else:
                x = load_u64(buffer, lane * stride + 2 * GROUP * i)
                store_u64(symbols, 2 * (i * ROW + GROUP * lane), x)


@kernel
def decode_units(  # type: ignore[no-untyped-def]
    split, codes, skipped, lane_bytes, chunk_base, units, first, last, tables, lengths, raw, low, symbols, words
):
    """Decode units first..last into words; returns the first bad lane (chunk * 32 + lane), or -1.

    `codes` begins at byte `skipped` of the stream and goes on for SLACK bytes behind the start of any lane here.
    `tables` is uint64 [tables, 4096], `lengths` uint8 [tables, 256 or 65,536] by symbol. `symbols` is an empty array
    of the symbols' dtype.
    """
    step = symbols.itemsize
    stride = ROW * step + 16
    buffer = np.zeros(LANES * stride, dtype=np.uint8)
    plane = np.zeros(CHUNK, dtype=symbols.dtype)
    starts = np.zeros(LANES + 1, dtype=np.int64)
    sizes, reads = np.zeros(LANES, dtype=np.int64), np.zeros(LANES, dtype=np.int64)
    for u in range(first, last):
        table, length = tables[units[u, 4]], lengths[units[u, 4]]
        begin, stop = units[u, 2], units[u, 3]
        for chunk in range(units[u, 0], units[u, 1]):
            end = min(begin + CHUNK, stop)
            rows, rest = (end - begin) // ROW, (end - begin) % ROW
            starts[0] = np.int64(chunk_base[chunk]) - skipped
            for lane in range(LANES):
                sizes[lane] = step * (GROUP * rows + max(0, min(GROUP, rest - GROUP * lane)))
                starts[lane + 1] = starts[lane] + lane_bytes[chunk * LANES + lane]
            for lane in range(0, LANES, 4):
                near, far = begin + lane * (CHUNK // LANES), begin + (lane + 4) * (CHUNK // LANES)
                prefetch_range(words, near * words.itemsize, far * words.itemsize)
                prefetch_range(raw, near, far)
                prefetch_range(codes, starts[lane] + 8 * LANE_BYTES, starts[lane] + 9 * LANE_BYTES)
                _four_lanes(codes, starts, lane, sizes, table, length, buffer, stride, step, reads)
            for lane in range(LANES):
                if not _lane_fits(codes, starts[lane], reads[lane], starts[lane + 1] - starts[lane]):
                    return chunk * LANES + lane
            _reorder(buffer, stride, step, plane)
            _put_together(split, plane, raw[begin:end], low[begin:end], words[begin:end])
            begin = end
    return -1
