"""The official DFloat11 layout: one Huffman code for the BF16 exponents of a group of matrices, the rest as it is.

    luts              uint8 [rows + 1, 256]      look-up rows that decode the code; the last row is its lengths
    encoded_exponent  uint8 [bytes]              the exponents' codes, first bit on top
    sign_mantissa     uint8 [n]                  sign << 7 | mantissa, of each weight
    output_positions  uint8 [4 * (blocks + 1)]   uint32: weights before each block of 4096 bytes; the last is n
    gaps              uint8 [320 * blocks]       5 bits for each 8-byte cell: where its first code starts
    split_positions   int64 [matrices - 1]       weights before the second matrix of the group, the third ...

The writer gives the bytes of dfloat11 0.5.0 where those are right. Where the official writer goes wrong without a word
(exponents from 240 on, blocks too full for the kernel's shared memory, sizes beyond 31 bits) this one raises Uncodable.
Source: https://github.com/LeanModels/DFloat11, arXiv:2504.11651.
"""

from dataclasses import dataclass

import numpy as np

from tcw.codecs import df11_stream as kernels
from tcw.codecs.compiled import spread
from tcw.codecs.df11_stream import BLOCK_BITS, BLOCK_BYTES, BLOCK_CELLS, CELL, LOOKAHEAD
from tcw.codecs.df11_tables import EOF, MAX_ROWS, POINTER, Codes, build_codes, build_luts, check_luts, fast_table
from tcw.codecs.histogram import count_units
from tcw.errors import FormatError

PARTS = ("luts", "encoded_exponent", "sign_mantissa", "output_positions", "gaps", "split_positions")
MAX_BLOCK_WEIGHTS = 23_550  # more do not fit the 48 KiB of shared memory that the official kernel gets
_MAX_INT = 2**31 - 1  # the kernel takes sizes as int; no optimal code takes more bytes than there are weights
_CHUNK = 1 << 18  # weights that one thread encodes at a time


class Uncodable(ValueError):
    """The official layout cannot hold these weights; the message says why. They are to be stored as they are."""


@dataclass(frozen=True)
class Group:
    """The arrays of one group, as the module docstring lists them."""

    luts: np.ndarray
    encoded_exponent: np.ndarray
    sign_mantissa: np.ndarray
    output_positions: np.ndarray
    gaps: np.ndarray
    split_positions: np.ndarray

    @property
    def nbytes(self) -> int:
        """Bytes of all six arrays."""
        return sum(getattr(self, part).nbytes for part in PARTS)


# ---- writing


def encode(words: np.ndarray, sizes: tuple[int, ...] = ()) -> Group:
    """Encode a group.

    Args:
        words: BF16 bit patterns of all matrices one after the other, uint16 [n].
        sizes: Weights in each matrix; empty for one matrix.

    Raises:
        Uncodable: The layout cannot hold these weights.
        ValueError: `sizes` do not add up to n.
    """
    if sizes and sum(sizes) != words.size:
        raise ValueError(f"matrices of {sum(sizes)} weights in all, got {words.size}")
    _refuse(0 < words.size <= _MAX_INT, f"a group has 1 to {_MAX_INT} weights, not {words.size}")
    words = np.ascontiguousarray(words)
    chunks, counts = _count(words)
    total = counts.sum(axis=0)
    _refuse(not total[POINTER:].any(), f"{total[POINTER:].sum()} weights have an exponent of {POINTER} or more")
    codes = build_codes(total)
    luts = build_luts(codes)
    _refuse(len(luts) <= MAX_ROWS + 1, f"its code needs {len(luts) - 1} look-up rows, {MAX_ROWS} are allowed")
    bits = counts @ luts[-1].astype(np.int64)
    chunks[:, 2] = np.cumsum(bits) - bits
    stream, gaps, positions = _pack(words, chunks, int(bits.sum()), codes)
    fullest = int(np.diff(positions).max())
    _refuse(fullest <= MAX_BLOCK_WEIGHTS, f"a block holds {fullest} weights, {MAX_BLOCK_WEIGHTS} are allowed")
    return Group(
        luts=luts,
        encoded_exponent=stream,
        sign_mantissa=_sign_mantissa(words),
        output_positions=positions.astype("<u4").view(np.uint8),
        gaps=_pack_gaps(gaps),
        split_positions=np.cumsum(sizes, dtype=np.int64)[:-1],
    )


def _refuse(fine: bool, why: str) -> None:
    if not fine:
        raise Uncodable(why)


def _count(words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cut into chunks, int64 [chunks, 3] (first, last, 0), and count the exponents of each, int64 [chunks, 256]."""
    first = np.arange(0, words.size, _CHUNK, dtype=np.int64)
    last = np.minimum(first + _CHUNK, words.size)
    units = np.stack([first, last, first, last], axis=1)
    counts = np.zeros((first.size, 256), dtype=np.int64)
    spread(lambda a, b: count_units(words, 7, 255, units, a, b, counts), first.size)
    return np.stack([first, last, np.zeros_like(first)], axis=1), counts


def _pack(words: np.ndarray, chunks: np.ndarray, bits: int, codes: Codes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Write the stream, the gap of every cell of its blocks, and the positions of its blocks and of its end."""
    size = -(-bits // 8)
    blocks = -(-size // BLOCK_BYTES)
    cells = np.zeros(bits // CELL + 1, dtype=np.uint64)
    gaps = np.zeros(BLOCK_CELLS * blocks + 1, dtype=np.uint8)
    positions = np.full(blocks + 1, words.size, dtype=np.int64)
    positions[0] = 0
    code, length = np.zeros(256, dtype=np.uint64), np.zeros(256, dtype=np.uint8)
    for symbol, (n, v) in codes.items():
        if symbol != EOF:
            code[symbol], length[symbol] = v, n
    edges = np.zeros((len(chunks), 2), dtype=np.uint64)
    spread(lambda a, b: kernels.pack(words, chunks, code, length, a, b, cells, gaps, positions, edges), len(chunks))
    heads, tails = chunks[:, 2] // CELL, np.append(chunks[1:, 2], bits) // CELL
    np.bitwise_or.at(cells, heads, edges[:, 0])
    np.bitwise_or.at(cells, tails, edges[:, 1])
    if bits % 8:
        free = 8 - bits % 8
        n, v = codes[EOF]
        cells[-1] |= np.uint64((v << 8 >> n) & 255) >> np.uint64(8 - free) << np.uint64(CELL - free - bits % CELL)
    else:  # no code starts in the cell that the last one reaches into
        last = int(words[-1] >> 7) & 255
        gaps[bits // CELL] *= (bits - int(length[last])) // CELL == bits // CELL
    return cells.byteswap(inplace=True).view(np.uint8)[:size], gaps[:-1], positions


def _sign_mantissa(words: np.ndarray) -> np.ndarray:
    plane = np.empty(words.size, dtype=np.uint8)
    spread(lambda a, b: kernels.split_planes(words, a * _CHUNK, min(b * _CHUNK, words.size), plane),
           -(-words.size // _CHUNK))  # fmt: skip
    return plane


def _pack_gaps(gaps: np.ndarray) -> np.ndarray:
    """Eight 5-bit numbers to five bytes, the first number on top."""
    eights, number = gaps.reshape(-1, 8), np.zeros(gaps.size // 8, dtype=np.uint64)
    for k in range(8):
        number |= eights[:, k].astype(np.uint64) << np.uint64(35 - 5 * k)
    return np.ascontiguousarray(number.astype(">u8").view(np.uint8).reshape(-1, 8)[:, 3:]).reshape(-1)


def _unpack_gaps(packed: np.ndarray) -> np.ndarray:
    fives = np.zeros((packed.size // 5, 8), dtype=np.uint8)
    fives[:, 3:] = packed.reshape(-1, 5)
    number = fives.view(">u8")[:, 0].astype(np.uint64)
    return (
        np.stack([(number >> np.uint64(35 - 5 * k)) & np.uint64(31) for k in range(8)], 1).astype(np.uint8).reshape(-1)
    )


# ---- reading


@dataclass(frozen=True)
class Span:
    """What has to be read to decode the weights first..last of a group: byte ranges of three of its arrays."""

    first: int
    last: int
    blocks: tuple[int, int]
    stream: tuple[int, int]
    gaps: tuple[int, int]


def read_positions(output_positions: np.ndarray, stream_bytes: int, n: int) -> np.ndarray:
    """Weights before each block and before the end, int64 [blocks + 1], from the bytes of `output_positions`.

    dfloat11 leaves the last entry out when the last code ends, byte-aligned, in a block of its own; that is mended.

    Raises:
        FormatError: They do not fit a stream of `stream_bytes` for `n` weights.
    """
    blocks = -(-stream_bytes // BLOCK_BYTES)
    if max(stream_bytes, n) > _MAX_INT or (n > 0) != (stream_bytes > 0):
        raise FormatError(f"{n} weights cannot be coded in {stream_bytes} bytes of `encoded_exponent`")
    if output_positions.nbytes not in (4 * blocks, 4 * (blocks + 1)):
        raise FormatError(
            f"`output_positions` should hold {blocks + 1} numbers, it has {output_positions.nbytes} bytes"
        )
    positions = output_positions.reshape(-1).view("<u4").astype(np.int64)
    if positions.size == blocks:
        positions = np.append(positions, n)
    steps = np.diff(positions)
    if positions[0] != 0 or positions[-1] != n or (steps.size and (steps.min() < 0 or steps.max() > BLOCK_BITS)):
        raise FormatError(f"`output_positions` does not count from 0 to {n} in possible steps")
    return positions


def span(positions: np.ndarray, stream_bytes: int, first: int, last: int) -> Span:
    """Find the blocks that hold the weights first..last. Needs 0 <= first < last <= n."""
    begin = int(np.searchsorted(positions, first, side="right")) - 1
    end = int(np.searchsorted(positions, last, side="left"))
    blocks = len(positions) - 1
    return Span(
        first,
        last,
        (begin, end),
        (BLOCK_BYTES * begin, min(BLOCK_BYTES * end + LOOKAHEAD, stream_bytes)),
        (320 * begin, 320 * min(end + 1, blocks)),
    )


def decode_span(
    where: Span, luts: np.ndarray, positions: np.ndarray, stream: np.ndarray, gaps: np.ndarray, rest: np.ndarray
) -> np.ndarray:
    """Decode the weights of a span to BF16 bit patterns, uint16 [last - first].

    Args:
        where: From `span`.
        luts: The group's `luts`, whole.
        positions: What `read_positions` gave.
        stream: The bytes of `encoded_exponent` that the span names, uint8.
        gaps: The bytes of `gaps` that it names, uint8.
        rest: sign_mantissa[first:last], uint8.

    Raises:
        FormatError: The arrays contradict each other.
    """
    check_luts(luts)
    begin, end = where.blocks
    sizes = (stream.size, gaps.size, rest.size)
    if sizes != (where.stream[1] - where.stream[0], where.gaps[1] - where.gaps[0], where.last - where.first):
        raise FormatError("the arrays of a DFloat11 group do not have the sizes that belong together")
    cells = np.append(_unpack_gaps(gaps), np.uint8(0))  # after the last block the kernel never looks at it
    tables = (np.ascontiguousarray(luts), *fast_table(luts))
    near, total = positions[begin : end + 1] - where.first, int(positions[-1]) - where.first
    words = np.empty(where.last - where.first, dtype=np.uint16)
    bad = spread(lambda a, b: kernels.unpack(tables, stream, cells, near, total, rest, (a, b), words), end - begin)
    if wrong := [b for b in bad if b >= 0]:
        raise FormatError(f"block {begin + wrong[0]} of `encoded_exponent` does not decode as its tables say")
    return words


def decode(group: Group) -> np.ndarray:
    """Decode all weights of a group to BF16 bit patterns, uint16 [n]. Raises FormatError if the arrays disagree."""
    n, size = group.sign_mantissa.size, group.encoded_exponent.size
    positions = read_positions(group.output_positions, size, n)
    check_luts(group.luts)
    if group.gaps.size != 320 * (len(positions) - 1):
        raise FormatError(f"`gaps` should have {320 * (len(positions) - 1)} bytes, it has {group.gaps.size}")
    if n == 0:
        return np.empty(0, dtype=np.uint16)
    where = span(positions, size, 0, n)
    stream = group.encoded_exponent[slice(*where.stream)]
    return decode_span(where, group.luts, positions, stream, group.gaps[slice(*where.gaps)], group.sign_mantissa)
