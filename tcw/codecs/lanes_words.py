"""Words to a `lanes` stream and back; tcw/codecs/lanes.py says what the stream is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tcw.codecs import huffman
from tcw.codecs.compiled import readonly, spread
from tcw.codecs.histogram import count_units
from tcw.codecs.lanes_encode import PAIR_BITS, PAIR_TABLE, encode_units, fill_pairs
from tcw.codecs.lanes_layout import (
    LANES,
    LONGEST,
    MAX_TABLES,
    SPLITS,
    Layout,
    chunks_of,
    read_layout,
    units,
)
from tcw.codecs.lanes_read import Reader
from tcw.errors import FormatError

MAX_CODES = (1 << 32) - 1


class NotCodable(ValueError):
    """This stream cannot hold the input: too many different symbols, or 4 GiB of codes. Keep the tensor as it is."""


@dataclass(frozen=True)
class Stream:
    """A coded array: the parts to store, and the small JSON values that say how to read them."""

    parts: dict[str, np.ndarray]
    params: dict[str, Any] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(array.nbytes for array in self.parts.values())


@dataclass(frozen=True)
class _Plan:
    """What the histogram decides before a bit is written."""

    units: np.ndarray  # int64 [units, 5], see lanes_layout.units
    first_symbol: int
    lengths: np.ndarray  # uint8 [tables, alphabet]
    unit_bits: np.ndarray  # int64 [units]: bits of the codes alone


def encode(
    words: np.ndarray, split: str, *, segments: Sequence[int] | None = None, max_length: int = LONGEST
) -> Stream:
    """Code an array of words.

    Args:
        words: [n], of the split's word: uint8, uint16 or uint32. Any bit pattern is kept.
        split: "bf16", "f16", "f32", "u8" or "u16".
        segments: Sizes that sum to n, each with a table of its own; None for one table.
        max_length: Longest code in bits, 1..12.

    Returns:
        The stream; `decode` gives `words` back bit for bit.

    Raises:
        NotCodable: A segment has more than 2^max_length different symbols, or the codes reach 4 GiB.
    """
    how = SPLITS[split]
    words = readonly(words)
    if words.dtype != how.word or words.ndim != 1:
        raise ValueError(f"split {split} takes {np.dtype(how.word)} [n], got {words.dtype} {list(words.shape)}")
    plan = _plan(words, split, segments, max_length)
    codes, lane_bytes, raw, low = _write(words, split, plan)
    chunks = lane_bytes.reshape(-1, LANES).sum(axis=1, dtype=np.int64)
    parts = {
        "codes": codes,
        "lane_bytes": lane_bytes,
        "chunk_base": (np.cumsum(chunks) - chunks).astype(np.uint32),
        "table": pack_lengths(plan.lengths),
    }
    if how.has_raw:
        parts["raw"] = raw
    if how.has_low:
        parts["low"] = low
    return Stream(parts, describe(split, words.size, plan.first_symbol, plan.lengths, max_length, segments))


def describe(
    split: str, symbols: int, first_symbol: int, lengths: np.ndarray, max_length: int, segments: Sequence[int] | None
) -> dict[str, Any]:
    """The parameters of a stream of `symbols` words whose codes have `lengths`, uint8 [tables, alphabet]."""
    params: dict[str, Any] = {
        "split": split,
        "symbols": symbols,
        "first_symbol": first_symbol,
        "alphabet": lengths.shape[1],
        "max_length": max_length,
    }
    if segments is not None:
        params["segments"] = [int(size) for size in segments]
    return params


def predict(words: np.ndarray, split: str, *, segments: Sequence[int] | None = None, max_length: int = LONGEST) -> int:
    """Bytes that `encode` would make of the same arguments, within 0.1 % on tensors that fill their chunks.

    Exact but for the padding of lanes, taken as 3.5 bits each. Raises NotCodable where `encode` does.
    """
    plan = _plan(readonly(words), split, segments, max_length)
    sizes = [words.size] if segments is None else segments
    lanes = sum(min(LANES * chunks_of(size), -(-size // 4)) for size in sizes)  # lanes that hold a symbol
    lone = not (np.count_nonzero(plan.lengths, axis=1) > 1).any()
    padding = 0 if lone else 3.5 * lanes
    chunks = sum(chunks_of(size) for size in sizes)
    table = plan.lengths.shape[0] * ((plan.lengths.shape[1] + 1) // 2)
    coded = int((int(plan.unit_bits.sum()) + padding) / 8)
    return coded + chunks * (LANES + 4) + table + words.size * SPLITS[split].plane_bytes


def _plan(words: np.ndarray, split: str, segments: Sequence[int] | None, max_length: int) -> _Plan:
    """Count symbols and choose the codes."""
    how = SPLITS[split]
    sizes = segment_sizes(words.size, segments, max_length)
    work = units(sizes, 64 if how.mask == 0xFF else 512)
    counts = np.zeros((len(work), how.mask + 1), dtype=np.uint32)
    spread(lambda a, b: count_units(words, how.shift, how.mask, work, a, b, counts), len(work))
    first_symbol, lengths = choose_codes(counts, work[:, 4], len(sizes), max_length)
    counts = counts[:, first_symbol : first_symbol + lengths.shape[1]]
    unit_bits = np.array([huffman.coded_bits(c, lengths[t]) for c, t in zip(counts, work[:, 4], strict=True)], np.int64)
    return _Plan(work, first_symbol, lengths, unit_bits)


def segment_sizes(numel: int, segments: Sequence[int] | None, max_length: int) -> list[int]:
    """Check how `numel` words are asked to be coded; returns the size of each segment. Raises ValueError."""
    sizes = [numel] if segments is None else [int(s) for s in segments]
    if sum(sizes) != numel or min(sizes, default=-1) < 0 or len(sizes) > MAX_TABLES:
        raise ValueError(f"{len(sizes)} segments of {sum(sizes)} for {numel} words")
    if not 1 <= max_length <= LONGEST:
        raise ValueError(f"codes are 1 to {LONGEST} bits long, not {max_length}")
    return sizes


def choose_codes(counts: np.ndarray, table_of: np.ndarray, tables: int, max_length: int) -> tuple[int, np.ndarray]:
    """Choose the codes of each table from what was counted.

    Args:
        counts: uint32 [rows, symbols]: occurrences of each symbol in some part of the words.
        table_of: [rows], the table that this part is coded with.
        tables: How many there are.
        max_length: Longest code in bits.

    Returns:
        The first symbol that occurs, and lengths of codes, uint8 [tables, alphabet], from that symbol on.

    Raises:
        NotCodable: A table has more than 2^max_length different symbols.
    """
    used = np.flatnonzero(counts.any(axis=0))
    first_symbol, end = (int(used[0]), int(used[-1]) + 1) if used.size else (0, 0)
    counts = counts[:, first_symbol:end]
    lengths = np.zeros((tables, end - first_symbol), dtype=np.uint8)
    try:
        for table in range(tables):
            lengths[table] = huffman.lengths(counts[table_of == table].sum(axis=0, dtype=np.int64), max_length)
    except ValueError as error:
        raise NotCodable(str(error)) from None
    return first_symbol, lengths


def _write(words: np.ndarray, split: str, plan: _Plan) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Write all lanes; returns codes, lane_bytes, raw, low.

    A lane's padding is less than a byte, so the histogram bounds where each unit ends: units are written side by side
    into one array and then moved together.
    """
    how, work = SPLITS[split], plan.units
    room = (plan.unit_bits >> 3) + LANES * (work[:, 1] - work[:, 0]) + 8  # 8: a lane's last store
    bounds = np.cumsum(room) - room
    codes = np.empty(int(room.sum()), dtype=np.uint8)
    ends = np.zeros(len(work), dtype=np.int64)
    chunks = int(work[-1, 1]) if len(work) else 0
    lane_bytes = np.empty(LANES * chunks, dtype=np.uint8)
    raw = np.empty(words.size if how.has_raw else 0, dtype=np.uint8)
    low = np.empty(words.size if how.has_low else 0, dtype=np.uint16)
    singles, pairs = _write_tables(plan.lengths)

    def write(first: int, last: int) -> None:
        encode_units(
            how.code, words, plan.first_symbol, work, first, last,
            singles, pairs, raw, low, codes, bounds, ends, lane_bytes,
        )  # fmt: skip

    spread(write, len(work))
    at = 0
    for begin, end in zip(bounds.tolist(), ends.tolist(), strict=True):
        codes[at : at + end - begin] = codes[begin:end]
        at += end - begin
    if at > MAX_CODES:
        raise NotCodable(f"{at} bytes of codes")
    codes.resize(at, refcheck=False)  # in place: gives the slack back without a copy
    return codes, lane_bytes, raw, low


def _write_tables(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes as the writer wants them: uint32 [tables, alphabet], and by pairs of symbols, [tables, 4096] or [.., 0]."""
    tables, alphabet = lengths.shape
    singles = np.zeros((tables, alphabet), dtype=np.uint32)
    for row, size in zip(singles, lengths, strict=True):
        row[:] = huffman.reversed_bits(huffman.canonical(size), size) | size.astype(np.uint32) << 24
    pairs = np.zeros((tables, PAIR_TABLE if alphabet <= 1 << PAIR_BITS else 0), dtype=np.uint32)
    for row, joined in zip(singles, pairs, strict=True):
        if joined.size:
            fill_pairs(row, joined)
    return singles, pairs


def pack_lengths(lengths: np.ndarray) -> np.ndarray:
    """The part `table`: lengths of codes, uint8 [tables, alphabet], two to a byte, the low nibble first."""
    even = np.zeros((lengths.shape[0], (lengths.shape[1] + 1) // 2 * 2), dtype=np.uint8)
    even[:, : lengths.shape[1]] = lengths
    return even[:, 0::2] | even[:, 1::2] << 4


def decode(
    parts: Mapping[str, np.ndarray], params: Mapping[str, Any], numel: int, *, out: np.ndarray | None = None
) -> np.ndarray:
    """Give back the words of a stream.

    Args:
        parts: What `encode` made, as read from a file: nothing in it is trusted.
        params: Its parameters.
        numel: How many words the tensor has.
        out: Where to write them (contiguous, of the split's word, [numel]); None for a new array.

    Returns:
        The words, [numel].

    Raises:
        FormatError: Parts, parameters and numel do not fit each other.
    """
    return reader(parts, params, numel).decode(out)


def reader(parts: Mapping[str, np.ndarray], params: Mapping[str, Any], numel: int) -> Reader:
    """Open a stream of words for reading it again and again, or in part; arguments and errors are `decode`'s."""
    layout = read_layout(params, numel)
    if "offset" in params or layout.pair or layout.escape >= 0:
        raise FormatError("lanes: this stream holds integers, not words")
    return Reader(parts, layout)


def decode_symbols(parts: Mapping[str, np.ndarray], layout: Layout, out: np.ndarray | None = None) -> np.ndarray:
    """Decode a stream up to its words, before pairs, escapes and offsets. Raises FormatError."""
    return Reader(parts, layout).decode(out)
