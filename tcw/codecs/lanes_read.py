"""Reading a `lanes` stream: its parts are checked once, then it is decoded whole or in part, as often as one likes."""

from collections.abc import Mapping

import numpy as np

from tcw.codecs import huffman
from tcw.codecs.compiled import readonly
from tcw.codecs.lanes_decode import SLACK, decode_table, decode_units
from tcw.codecs.lanes_layout import CHUNK, LANE_BYTES, LANES, LONGEST, SPLITS, Layout, chunks_of, part, units
from tcw.codecs.pieces import Piece, run
from tcw.errors import FormatError


class Reader:
    """A checked stream. Threads may read from it at once; it keeps the parts, and 33 KiB for each table."""

    def __init__(self, parts: Mapping[str, np.ndarray], layout: Layout) -> None:
        """Check the parts against each other and the layout. Raises FormatError."""
        how, n = SPLITS[layout.split], layout.symbols
        if extra := sorted(set(parts) - _part_names(layout)):
            raise FormatError(f"lanes: unexpected part `{extra[0]}`")
        self._how, self.symbols = how, n
        self._lane_bytes = part(parts, "lane_bytes", np.uint8, (LANES * layout.chunks,))
        self._chunk_base = part(parts, "chunk_base", np.uint32, (layout.chunks,))
        packed = part(parts, "table", np.uint8, (len(layout.segments), (layout.alphabet + 1) // 2))
        self._codes = codes = part(parts, "codes", np.uint8, (None,))
        self._raw = part(parts, "raw", np.uint8, (n,)) if how.has_raw else readonly(np.empty(0, np.uint8))
        self._low = part(parts, "low", np.uint16, (n,)) if how.has_low else readonly(np.empty(0, np.uint16))
        ends = _check_index(self._lane_bytes, self._chunk_base, codes)
        if n > 8 * codes.size:
            raise FormatError(f"lanes: {codes.size} bytes cannot hold {n} codes")
        lengths = _read_lengths(packed, layout)
        _check_lone(lengths, layout, codes, ends)
        self._units = units(layout.segments)
        self._symbols: np.ndarray = np.empty(0, dtype=how.symbol)
        width = self._symbols.itemsize
        self._tables = np.array([decode_table(row, layout.first_symbol, width) for row in lengths])
        self._lengths = np.zeros((len(lengths), how.mask + 1), dtype=np.uint8)
        self._lengths[:, layout.first_symbol : layout.first_symbol + layout.alphabet] = lengths
        # chunks that end SLACK bytes before the stream does; a lane of the others may be read past the end of `codes`
        self._safe = int(np.searchsorted(ends[1:], codes.size - SLACK, side="right"))
        self._skipped = int(ends[self._safe])
        self._whole = _cut(self._units, self._safe)
        self._tail = readonly(np.concatenate([codes[self._skipped :], np.zeros(SLACK, np.uint8)]))

    def decode(self, out: np.ndarray | None = None) -> np.ndarray:
        """Decode all words, [symbols], on all cores. Raises FormatError when a lane does not hold its codes."""
        if out is None:
            out = np.empty(self.symbols, dtype=self._how.word)
        run(self.pieces(out))
        return out

    def pieces(self, out: np.ndarray) -> list[Piece]:
        """What has to be done to decode all words into `out` (contiguous, of the split's word, [symbols])."""
        if out.shape != (self.symbols,) or out.dtype != self._how.word or not out.flags.c_contiguous:
            raise ValueError(f"`out` should be contiguous {np.dtype(self._how.word)} [{self.symbols}]")
        return self._pieces(*self._whole, 0, out)

    def span(self, first: int, end: int) -> np.ndarray:
        """Decode words first..end, at least one, and of the others only those that share a chunk with them."""
        if not 0 <= first < end <= self.symbols:
            raise ValueError(f"words {first} to {end} of {self.symbols}")
        units = self._units[(self._units[:, 3] > first) & (self._units[:, 2] < end)]
        skip = np.maximum(first - units[:, 2], 0) // CHUNK
        units[:, 0] += skip
        units[:, 2] += skip * CHUNK
        take = -(-(np.minimum(units[:, 3], end) - units[:, 2]) // CHUNK)
        units[:, 1] = units[:, 0] + take
        units[:, 3] = np.minimum(units[:, 3], units[:, 2] + take * CHUNK)
        begin, stop = int(units[0, 2]), int(units[-1, 3])
        out: np.ndarray = np.empty(stop - begin, dtype=self._how.word)
        run(self._pieces(*_cut(units - [0, 0, begin, begin, 0], self._safe), begin, out))
        return out[first - begin : end - begin]

    def _pieces(self, body: np.ndarray, tail: np.ndarray, begin: int, out: np.ndarray) -> list[Piece]:
        """Decode units, one a piece; their words count from word `begin` of the stream, which is the first in `out`."""
        last = begin + out.size
        planes = self._raw[begin:last], self._low[begin:last]

        def piece(codes: np.ndarray, skipped: int, jobs: np.ndarray, k: int) -> Piece:
            return lambda: _check_lane(
                decode_units(
                    self._how.code, codes, skipped, self._lane_bytes, self._chunk_base, jobs, k, k + 1,
                    self._tables, self._lengths, *planes, self._symbols, out,
                )
            )  # fmt: skip

        pieces = [piece(self._codes, 0, body, k) for k in range(len(body))]
        return pieces + [piece(self._tail, self._skipped, tail, k) for k in range(len(tail))]


def _check_lane(bad: int) -> None:
    if bad >= 0:
        raise FormatError(f"lanes: lane {bad % LANES} of chunk {bad // LANES} does not end with its last code")


def _part_names(layout: Layout) -> set[str]:
    how = SPLITS[layout.split]
    names = {"codes", "lane_bytes", "chunk_base", "table"}
    names |= {"raw"} if how.has_raw else set()
    names |= {"low"} if how.has_low else set()
    return names | ({"escape_positions", "escape_values"} if layout.escape >= 0 else set())


def _check_index(lane_bytes: np.ndarray, chunk_base: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Check that lanes, chunks and codes agree; returns where each chunk begins and the last one ends, int64 [c+1]."""
    if lane_bytes.size and int(lane_bytes.max()) > LANE_BYTES:
        raise FormatError(f"lanes: a lane of {int(lane_bytes.max())} bytes, more than {LANE_BYTES}")
    sums = np.zeros(chunk_base.size + 1, dtype=np.int64)
    np.cumsum(lane_bytes.reshape(-1, LANES).sum(axis=1, dtype=np.int64), out=sums[1:])
    if not np.array_equal(sums[:-1], chunk_base):
        raise FormatError("lanes: `chunk_base` does not agree with `lane_bytes`")
    if int(sums[-1]) != codes.size:
        raise FormatError(f"lanes: lanes of {int(sums[-1])} bytes, `codes` has {codes.size}")
    return sums


def _read_lengths(packed: np.ndarray, layout: Layout) -> np.ndarray:
    """Code lengths, uint8 [tables, alphabet], each row a complete code or a lone symbol."""
    lengths = np.empty((packed.shape[0], 2 * packed.shape[1]), dtype=np.uint8)
    lengths[:, 0::2], lengths[:, 1::2] = packed & 15, packed >> 4
    if lengths[:, layout.alphabet :].any():
        raise FormatError("lanes: `table` has a code outside its alphabet")
    lengths = np.ascontiguousarray(lengths[:, : layout.alphabet])
    if lengths.size and int(lengths.max()) > layout.max_length:
        raise FormatError(f"lanes: a code of {int(lengths.max())} bits, the limit is {layout.max_length}")
    for table, (row, size) in enumerate(zip(lengths, layout.segments, strict=True)):
        have = np.count_nonzero(row)
        lone = have == 1 and int(row.max()) == 1
        complete = have > 1 and huffman.kraft(row, LONGEST) == 1 << LONGEST
        if not (lone or complete or (have == 0 and size == 0)):
            raise FormatError(f"lanes: table {table} is not a complete prefix code")
    return lengths


def _check_lone(lengths: np.ndarray, layout: Layout, codes: np.ndarray, sums: np.ndarray) -> None:
    """A lone symbol is coded as 0 bits: the tables would not notice another one."""
    chunk = 0
    for row, size in zip(lengths, layout.segments, strict=True):
        end = chunk + chunks_of(size)
        if np.count_nonzero(row) == 1 and codes[sums[chunk] : sums[end]].any():
            raise FormatError("lanes: a code that is not in its table")
        chunk = end


def _cut(work: np.ndarray, safe: int) -> tuple[np.ndarray, np.ndarray]:
    """Split units at the chunk `safe`: those before it, those from it on."""
    body, tail = work[work[:, 0] < safe].copy(), work[work[:, 1] > safe].copy()
    if len(body) and len(tail) and body[-1, 0] == tail[0, 0]:
        middle = body[-1, 2] + (safe - body[-1, 0]) * CHUNK
        body[-1, 1], body[-1, 3] = safe, middle
        tail[0, 0], tail[0, 2] = safe, middle
    return body, tail
