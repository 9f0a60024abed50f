"""Where things are in a `lanes` stream: splits of a word, chunks, lanes, and the units that threads work on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tcw.codecs.compiled import readonly
from tcw.errors import FormatError

LANES = 32  # lanes in a chunk: one warp of a GPU
STEPS = 32  # steps of a lane
GROUP = 4  # neighbouring symbols that a lane owns in a step
ROW = LANES * GROUP  # symbols of one step
CHUNK = ROW * STEPS  # symbols of a chunk
LONGEST = 12  # longest code: a decoder's table has 2^12 entries
LANE_BYTES = ROW * LONGEST // 8  # most bytes that a lane can take: 192, so its length fits a byte
MAX_ALPHABET = 1 << 16
MAX_TABLES = 1 << 8  # a reader builds 36 KiB for each


@dataclass(frozen=True)
class Split:
    """How a word is taken apart: symbol = (word >> shift) & mask; the rest lies in the `raw` and `low` planes.

    raw = ((word >> sign) & 0x80) | ((word >> mantissa) & 0x7F), where `has_raw`; low = word & 0xFFFF, where `has_low`.
    """

    code: int
    word: type
    shift: int
    mask: int
    sign: int = 0
    mantissa: int = 0
    has_raw: bool = True
    has_low: bool = False

    @property
    def symbol(self) -> type:
        """Dtype of a symbol."""
        return np.uint8 if self.mask == 0xFF else np.uint16

    @property
    def plane_bytes(self) -> int:
        """Bytes a word that are stored as they are."""
        return (1 if self.has_raw else 0) + (2 if self.has_low else 0)


BF16, F16, F32, U8, U16 = range(5)
SPLITS: dict[str, Split] = {
    "bf16": Split(BF16, np.uint16, shift=7, mask=0xFF, sign=8),
    "f16": Split(F16, np.uint16, shift=8, mask=0xFF),
    "f32": Split(F32, np.uint32, shift=23, mask=0xFF, sign=24, mantissa=16, has_low=True),
    "u8": Split(U8, np.uint8, shift=0, mask=0xFF, has_raw=False),
    "u16": Split(U16, np.uint16, shift=0, mask=0xFFFF, has_raw=False),
}


def chunks_of(symbols: int) -> int:
    """How many chunks a segment of `symbols` symbols takes."""
    return -(-symbols // CHUNK)


def units(segments: Sequence[int], unit_chunks: int = 64) -> np.ndarray:
    """Cut segments into units of work of at most `unit_chunks` chunks that share a table.

    Returns:
        int64 [units, 5]: first chunk, end chunk, first symbol, end symbol, table.
    """
    rows, chunk, symbol = [], 0, 0
    for table, size in enumerate(segments):
        end_chunk, end = chunk + chunks_of(size), symbol + size
        while chunk < end_chunk:
            next_chunk = min(chunk + unit_chunks, end_chunk)
            next_symbol = min(symbol + unit_chunks * CHUNK, end)
            rows.append((chunk, next_chunk, symbol, next_symbol, table))
            chunk, symbol = next_chunk, next_symbol
    return np.array(rows, dtype=np.int64).reshape(-1, 5)


@dataclass(frozen=True)
class Layout:
    """The checked parameters of a stream; `segments` counts coded symbols and sums to `symbols`."""

    split: str
    symbols: int
    segments: tuple[int, ...]
    first_symbol: int
    alphabet: int
    max_length: int
    pair: int = 0
    escape: int = -1
    offset: int = 0

    @property
    def chunks(self) -> int:
        """Chunks of all segments."""
        return sum(chunks_of(size) for size in self.segments)


def read_layout(params: Mapping[str, Any], numel: int) -> Layout:
    """Check a stream's parameters against the number of values that it must give. Raises FormatError."""
    split = params.get("split")
    if not isinstance(split, str) or split not in SPLITS:
        raise FormatError(f"lanes: unknown split `{split}`")
    known = {"split", "symbols", "first_symbol", "alphabet", "max_length", "segments", "pair", "escape", "offset"}
    if unknown := sorted(str(key) for key in set(params) - known):
        raise FormatError(f"lanes: unknown parameter `{unknown[0]}`")
    pair = _number(params, "pair", 1, 1 << 8, default=0)
    segments = params.get("segments", [numel])
    if not isinstance(segments, list) or not segments or not all(_is_int(s) and s >= 0 for s in segments):
        raise FormatError("lanes: `segments` is not a list of sizes")
    if len(segments) > MAX_TABLES:
        raise FormatError(f"lanes: {len(segments)} segments, more than {MAX_TABLES}")
    if sum(segments) != numel:
        raise FormatError(f"lanes: segments of {sum(segments)} values for a tensor of {numel}")
    coded = tuple(-(-s // 2) if pair else s for s in segments)
    if _number(params, "symbols", 0, 1 << 62) != sum(coded):
        raise FormatError(f"lanes: {params['symbols']} symbols for a tensor of {numel} values")
    alphabet = _number(params, "alphabet", 0, MAX_ALPHABET)
    layout = Layout(
        split=split,
        symbols=sum(coded),
        segments=coded,
        first_symbol=_number(params, "first_symbol", 0, MAX_ALPHABET),
        alphabet=alphabet,
        max_length=_number(params, "max_length", 1, LONGEST),
        pair=pair,
        escape=_number(params, "escape", 0, MAX_ALPHABET - 1, default=-1),
        offset=_number(params, "offset", -(1 << 31), (1 << 31) - 1, default=0),
    )
    if layout.first_symbol + alphabet > SPLITS[split].mask + 1:
        raise FormatError(f"lanes: {alphabet} symbols from {layout.first_symbol} do not fit split `{split}`")
    if pair and layout.first_symbol + alphabet > pair * pair:
        raise FormatError(f"lanes: an alphabet of {alphabet} from {layout.first_symbol} has no pairs of {pair}")
    return layout


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(params: Mapping[str, Any], key: str, low: int, high: int, default: int | None = None) -> int:
    if key not in params and default is not None:
        return default
    value: Any = params.get(key)
    if not _is_int(value) or not low <= value <= high:
        raise FormatError(f"lanes: `{key}` cannot be `{value}`")
    return int(value)


def part(parts: Mapping[str, np.ndarray], name: str, dtype: type, shape: tuple[int | None, ...]) -> np.ndarray:
    """Take a part and check its dtype and shape (None: any size). Raises FormatError."""
    array = parts.get(name)
    if array is None:
        raise FormatError(f"lanes: part `{name}` is missing")
    fits = len(array.shape) == len(shape) and all(
        want in (None, have) for have, want in zip(array.shape, shape, strict=True)
    )
    if array.dtype != dtype or not fits:
        want = ", ".join("n" if s is None else str(s) for s in shape)
        raise FormatError(
            f"lanes: part `{name}` should be {np.dtype(dtype)} [{want}], is {array.dtype} {list(array.shape)}"
        )
    return readonly(array)
