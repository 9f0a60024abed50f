"""The compiled loops of the official DFloat11 layout: exponents to bitstream, and blocks of the stream to BF16 words.

A code that starts in cell c (bits 64c .. 64c+63) is found by the cell's gap; the element that a block of 512 cells
starts with is found by its output position. So blocks decode independently, and ranges of elements encode
independently once their first bit is known.
"""

import numpy as np

from tcw.codecs.compiled import inline, kernel, load_u64, store_u64
from tcw.codecs.df11_tables import BURST, PEEK, walk

CELL = 64  # bits
BLOCK_CELLS = 512
BLOCK_BYTES = 4096
BLOCK_BITS = 32768
LOOKAHEAD = 8  # bytes after a block that its last code may reach into, and more


@inline
def big_endian(x):  # type: ignore[no-untyped-def]
    """Reverse the bytes of a uint64; one instruction once compiled."""
    x = ((x >> np.uint64(8)) & np.uint64(0x00FF00FF00FF00FF)) | ((x & np.uint64(0x00FF00FF00FF00FF)) << np.uint64(8))
    x = ((x >> np.uint64(16)) & np.uint64(0x0000FFFF0000FFFF)) | ((x & np.uint64(0x0000FFFF0000FFFF)) << np.uint64(16))
    return (x >> np.uint64(32)) | (x << np.uint64(32))


@kernel
def split_planes(words, first, last, sign_mantissa):  # type: ignore[no-untyped-def]
    """sign_mantissa[i] = the sign and the 7 mantissa bits of words[i], i in first..last."""
    source, target = words[first:last], sign_mantissa[first:last]
    for i in range(source.size):  # from 0, so that the compiler knows no index wraps around and uses wide registers
        word = np.uint32(source[i])
        target[i] = ((word >> 8) & 0x80) | (word & 0x7F)


@kernel
def pack(words, chunks, codes, lengths, first, last, stream, gaps, positions, edges):  # type: ignore[no-untyped-def]
    """Write the exponent codes of chunks first..last into the stream, with gaps and positions.

    Args:
        words: uint16 [n], BF16 patterns.
        chunks: int64 [chunks, 3]: first element, last element, first bit.
        codes: uint64 [256], by exponent.
        lengths: uint8 [256], by exponent.
        first: the first chunk to do here.
        last: the chunk after the last.
        stream: uint64 [cells], each cell a number whose top bit comes first. Zero at the start.
        gaps: uint8 [cells + 1], by cell.
        positions: int64 [blocks + 1], by block.
        edges: uint64 [chunks, 2], out: a chunk's bits of its first and of its last cell, which it shares with its
            neighbours; the caller ORs them in (one and the same cell: only the second is set).
    """
    for u in range(first, last):
        fill = chunks[u, 2] & 63
        cell = chunks[u, 2] >> 6
        head = cell
        bits = np.uint64(0)
        for i in range(chunks[u, 0], chunks[u, 1]):
            exponent = (words[i] >> 7) & 255
            code = codes[exponent]
            fill += np.int64(lengths[exponent])
            if fill < 64:
                bits |= code << np.uint64(64 - fill)
                continue
            fill -= 64
            bits |= code >> np.uint64(fill)
            if cell == head:
                edges[u, 0] = bits
            else:
                stream[cell] = bits
            cell += 1
            gaps[cell] = fill
            if cell & 511 == 0:
                positions[cell >> 9] = i + 1
            bits = code << np.uint64(64 - fill) if fill else np.uint64(0)
        edges[u, 1] = bits


@inline
def _meets_gap(gaps, bit, length, starts, left, more):  # type: ignore[no-untyped-def]
    """Say whether the codes in the `length` bits from `bit` start where the gap of the cell that they reach says.

    `starts` has a bit for the start of each code, and for the start of what follows: `left` codes of this block, then
    `more` of the next.
    """
    cell = (bit + length) >> 6
    if cell == bit >> 6:
        return True
    starts >>= 64 * cell - bit
    end = 1 << (bit + length - 64 * cell)
    if cell == BLOCK_CELLS and (left or starts != end):  # a code that starts in the next block is the next block's
        return False
    if not (left or more):
        starts ^= end
        if starts == 0:
            return True
    gap = np.int64(gaps[cell])
    return starts & ((2 << gap) - 1) == 1 << gap


@kernel
def _decode_block(luts, entries, starts, data, gaps, count, more, symbols):  # type: ignore[no-untyped-def]
    """Decode one block's `count` codes into `symbols`; the bit after the last code, or -1 where the block is not valid.

    `gaps` are those of the block's cells, then the next block's first one, which counts if `more` codes follow there.
    """
    lengths = luts[luts.shape[0] - 1]
    bit = np.int64(gaps[0])
    left = count
    while left:
        window = big_endian(load_u64(data, bit >> 3)) << np.uint64(bit & 7)
        for _ in range(4):  # 57 bits or more are loaded, and each look takes 12 at most
            top = np.int64(window >> np.uint64(64 - PEEK))
            entry = entries[top]
            length = np.int64(entry >> np.uint64(56))
            if length == 0 or left < BURST:
                break
            store_u64(symbols, count - left, entry)
            left -= np.int64((entry >> np.uint64(48)) & np.uint64(255))
            if not _meets_gap(gaps, bit, length, np.int64(starts[top]), left, more):
                return -1
            bit += length
            window <<= np.uint64(length)
        else:
            continue
        if left == 0:
            break
        symbol = walk(luts, big_endian(load_u64(data, bit >> 3)) << np.uint64(bit & 7))
        if symbol < 0:
            return -1
        symbols[count - left] = symbol
        left -= 1
        length = np.int64(lengths[symbol])
        if not _meets_gap(gaps, bit, length, 1 << length, left, more):
            return -1
        bit += length
    return -1 if more and bit < BLOCK_BITS else bit


@kernel
def unpack(tables, stream, gaps, positions, total, sign_mantissa, blocks, words):  # type: ignore[no-untyped-def]
    """Decode blocks of the stream into BF16 words; the first block that is not valid, or -1.

    Args:
        tables: (luts, entries, starts), see df11_tables.
        stream: uint8, from the first byte of block 0 to LOOKAHEAD bytes after the last block or to the stream's end.
        gaps: uint8 [512 * blocks + 1], unpacked.
        positions: int64 [blocks + 1]: elements before each block, counted from the first word that is wanted.
        total: elements before the end of the whole group, counted in the same way.
        sign_mantissa: uint8 [words].
        blocks: (first, last) of the blocks to do here.
        words: uint16 [words], out: the elements 0..words, where they lie in these blocks.
    """
    luts, entries, starts = tables
    data = np.zeros(BLOCK_BYTES + LOOKAHEAD, dtype=np.uint8)
    symbols = np.zeros(BLOCK_BITS + 8, dtype=np.uint8)
    for block in range(blocks[0], blocks[1]):
        at = BLOCK_BYTES * block
        size = min(data.size, stream.size - at)
        data[:size] = stream[at : at + size]
        data[size:] = 0
        begin, end = positions[block], positions[block + 1]
        cells = gaps[BLOCK_CELLS * block : BLOCK_CELLS * (block + 1) + 1]
        bit = _decode_block(luts, entries, starts, data, cells, end - begin, end < total, symbols)
        if bit < 0 or bit > 8 * (stream.size - at):
            return block
        low, high = max(begin, 0), max(min(end, words.size), 0)
        wanted, rests, target = symbols[low - begin : high - begin], sign_mantissa[low:high], words[low:high]
        for i in range(target.size):
            rest = np.uint32(rests[i])
            target[i] = ((rest & 0x80) << 8) | (np.uint32(wanted[i]) << 7) | (rest & 0x7F)
    return -1
