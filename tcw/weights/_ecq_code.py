"""How `ecq` stores labels: sorted into classes of like spread, coded by `lanes`, with the small things beside them.

Labels of a matrix differ in spread: rows and columns have steps of their own, and weights have norms of their own. A
code table fits one spread. So every row and every column has a spread code of 4 bits (thirds of an octave); the sum of
the two, 0..30, is the class of a label, and neighbouring sums share a table where that takes fewer bytes. Labels of a
table make a segment of the `lanes` stream, column after column, rows in order.

Parts:

    codes, table       of the lanes stream (tcw/codecs/lanes.py)
    index         U8   sizes of its lanes, 4 bits each: difference from the lane before (from 0 before the first), + 7;
                       15 says that the size itself follows, in a list of bytes at the end
    side          U8   spread codes of rows, of columns, 4 bits each; 31 bytes: the table of each sum; I32: `offset`
                       of the lanes stream
    escapes       U8   where there are literals: for each, its distance from the one before (the first: its position),
                       then its value v as 2v or -2v - 1. Seven bits to a byte, low ones first, the top bit set where
                       more follow

A lane's size has 8 bits in `lanes`, chunks are found by another 32, and a literal has 96: 0.07 bit a symbol and more.
Sizes of neighbours are alike, so 4 bits do, and the rest are sums.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tcw.codecs import huffman, lanes
from tcw.codecs.lanes_layout import CHUNK, LANES, chunks_of
from tcw.errors import FormatError

SPREADS = 16  # codes of a spread
SUMS = 2 * SPREADS - 1
OCTAVE = 3  # codes to an octave
_FAR = 15  # nibble of a lane size that differs by more than 7
_LANE_BITS = 3.5 + 4.1  # padding of a lane, and its size
_LIMITS = (5, 7, 10, 13, 18, 25, 31, 47, 63, 95, 127, 191, 255, 383, 511, 1023)  # labels beyond are literals
_REACH = {False: 1023, True: 31}  # the largest label that a code may have, alone and in a pair
_PARAMS = ("split", "symbols", "first_symbol", "alphabet", "max_length", "pair", "escape")


@dataclass(frozen=True)
class Classes:
    """What sorts labels: spread codes uint8 [out] and [in], and the table of each sum, uint8 [31]."""

    rows: np.ndarray
    columns: np.ndarray
    tables: np.ndarray

    def of_labels(self) -> np.ndarray:
        """Table of each label, uint8 [in, out]."""
        return self.tables[self.columns[:, None] + self.rows[None, :]]

    @property
    def count(self) -> int:
        """How many tables there are."""
        return int(self.tables.max()) + 1


@dataclass(frozen=True)
class Plan:
    """How a matrix of labels is stored best, and how many bytes that takes, the index included, `side` not."""

    classes: Classes
    pair: bool
    escape_above: int
    nbytes: float


def plan(labels: np.ndarray, size: np.ndarray) -> Plan:
    """Choose classes, pairs and escapes.

    Args:
        labels: int32 [in, out].
        size: float32 [in, out], points of the labels.
    """
    rows, columns = _spreads(size)
    counts = _count(labels, rows, columns)
    best: Plan | None = None
    for price in (480.0, 4000.0, 1e9):  # bits that one more table costs, for single labels, for pairs, never
        classes = Classes(rows, columns, _merge(counts, price))
        if best is not None and np.array_equal(classes.tables, best.classes.tables):
            continue
        for pair in (False, True):
            found = _cheapest(labels, classes, pair)
            if best is None or found.nbytes < best.nbytes:
                best = found
    assert best is not None
    return best


def _spreads(size: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Fit spread[in, out] ~ column * row; returns codes of rows and columns."""
    square = np.square(size)
    row = np.ones(size.shape[1], np.float32)
    for _ in range(2):
        column = (square / row).mean(axis=1) + 1e-6
        row = (square / column[:, None]).mean(axis=0) + 1e-6
    return _spread_codes(row), _spread_codes(column)


def _spread_codes(square: np.ndarray) -> np.ndarray:
    octaves = 0.5 * np.log2(square)
    codes = np.rint(OCTAVE * (octaves - np.median(octaves))) + SPREADS // 2
    return np.clip(codes, 0, SPREADS - 1).astype(np.uint8)


def _count(labels: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Histogram of labels, clipped to 8 bits, for each sum of spread codes: int64 [31, 256]."""
    ids = np.clip(labels, -128, 127) + 128
    ids += (columns.astype(np.int32)[:, None] + rows[None, :]) << 8
    return np.bincount(ids.reshape(-1), minlength=SUMS << 8).reshape(SUMS, 256)


def _merge(counts: np.ndarray, price: float) -> np.ndarray:
    """Table of each sum, uint8 [31], so that entropies plus `price` bits a table are least; tables are intervals."""
    total = np.concatenate([np.zeros((1, counts.shape[1])), np.cumsum(counts, axis=0)])
    best, back = np.full(SUMS + 1, np.inf), np.zeros(SUMS + 1, np.int64)
    best[0] = 0.0
    for end in range(1, SUMS + 1):
        part = total[end] - total[:end]
        size = part.sum(axis=1)
        cost = best[:end] + price * (size > 0) + _bits(size) - _bits(part).sum(axis=1)
        back[end] = int(np.argmin(cost))
        best[end] = cost[back[end]]
    tables, end = np.zeros(SUMS, np.uint8), SUMS
    while end:
        first = int(back[end])
        tables[first:end] = 1
        tables[first + 1 : end] = 0
        end = first
    tables[0] = 0
    return np.cumsum(tables, dtype=np.uint8)


def _bits(n: np.ndarray) -> np.ndarray:
    return n * np.log2(np.maximum(n, 1))


def _segments(labels: np.ndarray, classes: Classes) -> list[np.ndarray]:
    if classes.count == 1:
        return [labels.reshape(-1)]
    table = classes.of_labels()
    return [labels[table == k] for k in range(classes.count)]


def _cheapest(labels: np.ndarray, classes: Classes, pair: bool) -> Plan:
    """Try the limits beyond which a label is a literal."""
    reach = _REACH[pair]
    histograms = [_histogram(s, reach, pair) for s in _segments(labels, classes) if s.size]
    low, high = int(labels.min()), int(labels.max())
    magnitude = max(-low, high)
    large = np.abs(labels[(labels > _LIMITS[0]) | (labels < -_LIMITS[0])].astype(np.int64))
    best = Plan(classes, pair, 0, np.inf)
    for limit in [*(k for k in _LIMITS if k < magnitude), magnitude]:
        if limit > reach:
            break
        first, last = (max(low, -limit), min(high, limit)) if low <= limit and high >= -limit else (0, 0)
        literals = large[large > limit]
        ids = last - first + 1 + (1 if literals.size else 0)
        nbytes = (ids * ids if pair else ids) / 2 * len(histograms) + _literal_bytes(literals, labels.size)
        nbytes += sum(_segment_bytes(h, first, last, reach) for h in histograms)
        if nbytes < best.nbytes:
            best = Plan(classes, pair, limit, nbytes)
    return best


def _histogram(labels: np.ndarray, reach: int, pair: bool) -> np.ndarray:
    """Count labels -reach - 1 .. reach + 1 (and what is beyond), or pairs of them: int64 [2 reach + 3] or squared."""
    ids = np.clip(labels, -reach - 1, reach + 1) + (reach + 1)
    width = 2 * reach + 3
    if not pair:
        return np.bincount(ids, minlength=width)
    ids = np.append(ids, ids[-1]) if ids.size % 2 else ids
    return np.bincount(ids[0::2] * width + ids[1::2], minlength=width * width).reshape(width, width)


def _literal_bytes(magnitudes: np.ndarray, numel: int) -> int:
    """About what literals take: a byte or two for the place, one for seven bits of the value and its sign."""
    place = 1 if 100 * magnitudes.size > numel else 2
    more = sum(int(np.count_nonzero(2 * magnitudes >> 7 * k)) for k in (1, 2, 3, 4))
    return magnitudes.size * (place + 1) + more


def _segment_bytes(histogram: np.ndarray, first: int, last: int, reach: int) -> float:
    """Bytes of codes and index of one segment, labels outside first..last being escapes."""
    ids = np.arange(-reach - 1, reach + 2)
    ids = np.where((ids < first) | (ids > last), last - first + 1, ids - first)
    if histogram.ndim == 2:
        ids = ids[:, None] * (last - first + 2) + ids
    counts = np.bincount(ids.reshape(-1), weights=histogram.reshape(-1)).astype(np.int64)
    counts = counts[counts > 0]
    if counts.size > 1 << 12:
        return np.inf
    symbols = int(counts.sum())
    code = huffman.coded_bits(counts, huffman.lengths(counts))
    lanes_used = min(LANES * -(-symbols // CHUNK), -(-symbols // 4))
    return (code + _LANE_BITS * lanes_used) / 8


def encode(labels: np.ndarray, chosen: Plan) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Code labels, int32 [in, out], as planned; returns parts and parameters."""
    classes = chosen.classes
    segments = _segments(labels, classes)
    stream = lanes.encode_integers(
        np.concatenate(segments),
        pair=chosen.pair,
        escape_above=chosen.escape_above,
        segments=[s.size for s in segments],
    )
    parts = {key: stream.parts[key] for key in ("codes", "table")}
    parts["index"] = _pack_sizes(stream.parts["lane_bytes"])
    offset = np.array([stream.params["offset"]], "<i4").view(np.uint8)
    side = [_pack_nibbles(classes.rows), _pack_nibbles(classes.columns), classes.tables, offset]
    parts["side"] = np.concatenate(side)
    if "escape" in stream.params:
        parts["escapes"] = _pack_escapes(stream.parts["escape_positions"], stream.parts["escape_values"])
    return parts, {key: stream.params[key] for key in _PARAMS if key in stream.params}


@dataclass(frozen=True)
class Opened:
    """A stored matrix as a plain stream of `lanes`, which any decoder of that takes, and what puts its labels in place.

    `segments` counts labels; those of segment k belong to the places of [in, out], in C order, whose table is k.
    """

    classes: Classes
    segments: list[int]
    parts: dict[str, np.ndarray]
    params: dict[str, Any]


def unfold(parts: Mapping[str, np.ndarray], params: Mapping[str, Any], rows: int, columns: int) -> Opened:
    """Give a stored matrix the index of `lanes` back. Raises FormatError where parts and parameters do not fit."""
    classes, offset = _read_side(parts.get("side"), rows, columns)
    sizes = np.bincount(classes.of_labels().reshape(-1), minlength=classes.count).tolist()
    pair = "pair" in params
    chunks = sum(chunks_of(-(-size // 2) if pair else size) for size in sizes)
    lane_bytes = _unpack_sizes(parts.get("index"), LANES * chunks)
    begins = np.cumsum(lane_bytes.reshape(-1, LANES).sum(axis=1, dtype=np.int64))
    base = np.concatenate([[0], begins[:-1]]).astype(np.uint32)[:chunks]
    inner = {key: part for key, part in parts.items() if key not in ("index", "side", "escapes")}
    inner |= {"lane_bytes": lane_bytes, "chunk_base": base}
    if "escapes" in parts:
        inner |= _unpack_escapes(parts["escapes"], rows * columns)
    return Opened(classes, sizes, inner, {**params, "offset": offset, "segments": sizes})


def decode(parts: Mapping[str, np.ndarray], params: Mapping[str, Any], rows: int, columns: int) -> np.ndarray:
    """Give back labels, int32 [columns, rows]. Raises FormatError where parts and parameters do not fit."""
    opened = unfold(parts, params, rows, columns)
    values = lanes.decode_integers(opened.parts, opened.params, rows * columns)
    if opened.classes.count == 1:
        return values.reshape(columns, rows)
    table = opened.classes.of_labels()
    labels = np.empty((columns, rows), np.int32)
    at = 0
    for k, size in enumerate(opened.segments):
        labels[table == k] = values[at : at + size]
        at += size
    return labels


def _read_side(side: np.ndarray | None, rows: int, columns: int) -> tuple[Classes, int]:
    first, second = -(-rows // 2), -(-columns // 2)
    if side is None or side.dtype != np.uint8 or side.shape != (first + second + SUMS + 4,):
        raise FormatError("ecq: part `side` does not fit the shape")
    tables = side[first + second : -4]
    steps = np.diff(tables.astype(np.int64))
    if tables[0] != 0 or steps.min() < 0 or steps.max() > 1:
        raise FormatError("ecq: `side` does not number its tables in order")
    classes = Classes(_nibbles(side[:first], rows), _nibbles(side[first : first + second], columns), tables)
    return classes, int(side[-4:].copy().view("<i4")[0])


def _pack_nibbles(values: np.ndarray) -> np.ndarray:
    even = np.zeros(-(-values.size // 2) * 2, np.uint8)
    even[: values.size] = values
    return even[0::2] | even[1::2] << 4


def _nibbles(packed: np.ndarray, count: int) -> np.ndarray:
    values = np.stack([packed & 15, packed >> 4], axis=1).reshape(-1)
    if values[count:].any():
        raise FormatError("ecq: 4-bit values are not padded with 0")
    return values[:count]


def _pack_sizes(lane_bytes: np.ndarray) -> np.ndarray:
    step = np.diff(lane_bytes.astype(np.int64), prepend=0) + 7
    near = (step >= 0) & (step < _FAR)
    return np.concatenate([_pack_nibbles(np.where(near, step, _FAR).astype(np.uint8)), lane_bytes[~near]])


def _unpack_sizes(index: np.ndarray | None, count: int) -> np.ndarray:
    if index is None or index.dtype != np.uint8 or index.ndim != 1 or index.size < -(-count // 2):
        raise FormatError("ecq: part `index` does not fit the shape")
    codes = _nibbles(index[: -(-count // 2)], count)
    far = np.flatnonzero(codes == _FAR)
    sizes = index[-(-count // 2) :].astype(np.int64)
    if sizes.size != far.size:
        raise FormatError(f"ecq: `index` has {sizes.size} sizes beside {far.size} places for them")
    steps = codes.astype(np.int64) - 7
    steps[far] = 0
    run = np.cumsum(steps)
    since = np.cumsum(codes == _FAR)  # which size was given last: 0 for none
    restart = np.concatenate([[0], sizes - run[far]])
    result = run + restart[since]
    if count and (result.min() < 0 or result.max() > 255):
        raise FormatError("ecq: `index` has a lane that is too long")
    return result.astype(np.uint8)


def _pack_escapes(positions: np.ndarray, values: np.ndarray) -> np.ndarray:
    wide = values.astype(np.int64)
    numbers = np.stack(
        [np.diff(positions.astype(np.int64), prepend=0), np.where(wide < 0, -2 * wide - 1, 2 * wide)], axis=1
    )
    shifts = 7 * np.arange(9)
    pieces = numbers.reshape(-1, 1) >> shifts
    kept = (pieces > 0) | (shifts == 0)
    more = (pieces >> 7) > 0
    return ((pieces & 0x7F) | more << 7)[kept].astype(np.uint8)


def _unpack_escapes(escapes: np.ndarray, numel: int) -> dict[str, np.ndarray]:
    if escapes.dtype != np.uint8 or escapes.ndim != 1 or (escapes.size and escapes[-1] & 0x80):
        raise FormatError("ecq: part `escapes` does not end with the end of a number")
    last = np.flatnonzero(escapes < 0x80)
    first = np.concatenate([[0], last[:-1] + 1]).astype(np.int64)[: last.size]
    length = last - first + 1
    if last.size % 2 or last.size > 2 * numel or length.max(initial=0) > 8:
        raise FormatError("ecq: `escapes` does not hold places and values")
    place = np.arange(escapes.size) - np.repeat(first, length)
    numbers = np.add.reduceat((escapes & 0x7F).astype(np.int64) << 7 * place, first) if last.size else first
    steps, coded = numbers[0::2], numbers[1::2]
    if coded.max(initial=0) >= 1 << 32 or steps.max(initial=0) > numel or steps.sum() > numel:
        raise FormatError("ecq: `escapes` has a place or a value that cannot be")
    values = np.where(coded & 1, -(coded + 1) >> 1, coded >> 1)
    return {"escape_positions": np.cumsum(steps).astype(np.uint64), "escape_values": values.astype(np.int32)}
