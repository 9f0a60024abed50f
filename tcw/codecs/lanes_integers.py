"""Integers as a `lanes` stream: an offset makes them symbols, and rare large ones or pairs have ways of their own.

A quantiser's codes are mostly small, but a few channels have codes in the thousands: those become one escape symbol,
and their values lie in a list beside the stream, so that the decoder's loop has no branch for them. Below two bits an
integer, a code of whole bits wastes much of them: there one symbol stands for two neighbours.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tcw.codecs.lanes_layout import MAX_ALPHABET, Layout, part, read_layout
from tcw.codecs.lanes_words import NotCodable, Stream, decode_symbols, encode
from tcw.errors import FormatError


def encode_integers(
    values: np.ndarray, *, pair: bool = False, escape_above: int | None = None, segments: Sequence[int] | None = None
) -> Stream:
    """Code an array of integers.

    Args:
        values: int32 [n].
        pair: Code neighbours together, two to a symbol; for integers of less than about two bits.
        escape_above: Store integers of a larger magnitude as literals, 12 bytes each; None for no literals.
        segments: Sizes that sum to n, each with a code table of its own; None for one table.

    Returns:
        The stream; `decode_integers` gives `values` back.

    Raises:
        NotCodable: More than 4,096 different symbols in a segment, or a span of more than 65,536 (256 with `pair`).
    """
    values = np.ascontiguousarray(values)
    if values.dtype != np.int32 or values.ndim != 1:
        raise ValueError(f"integers are int32 [n], got {values.dtype} {list(values.shape)}")
    sizes = [values.size] if segments is None else [int(size) for size in segments]
    if sum(sizes) != values.size or min(sizes, default=-1) < 0:
        raise ValueError(f"segments of {sum(sizes)} for {values.size} integers")
    limit = 1 << 31 if escape_above is None else escape_above
    literal = np.flatnonzero((values > limit) | (values < -limit))
    low, high = _span(values, limit)
    ids = high - low + 1 + (1 if literal.size else 0)
    if ids > MAX_ALPHABET or (pair and ids * ids > MAX_ALPHABET):
        raise NotCodable(f"integers from {low} to {high}{' in pairs' if pair else ''}")
    symbols = (values.view(np.uint32) - np.uint32(low & 0xFFFFFFFF)).astype(np.uint16)  # modulo 2^32, so never too far
    params: dict[str, Any] = {"offset": low}
    parts: dict[str, np.ndarray] = {}
    if literal.size:
        symbols[literal] = params["escape"] = ids - 1
        parts = {"escape_positions": literal.astype(np.uint64), "escape_values": values[literal]}
    if pair:
        params["pair"] = ids
        symbols = _join(symbols, sizes, ids)
    coded = [-(-size // 2) if pair else size for size in sizes]
    small = (ids * ids if pair else ids) <= 1 << 8
    words = symbols.astype(np.uint8) if small else symbols
    stream = encode(words, "u8" if small else "u16", segments=coded)
    if segments is None:
        del stream.params["segments"]
    else:
        params["segments"] = sizes
    return Stream({**stream.parts, **parts}, {**stream.params, **params})


def _span(values: np.ndarray, limit: int) -> tuple[int, int]:
    """Least and greatest integer that is no literal; (0, 0) where there is none."""
    low, high = int(values.min(initial=0)), int(values.max(initial=0))
    if values.size and -limit <= low and high <= limit:
        return int(values.min()), int(values.max())
    kept = values[(values <= limit) & (values >= -limit)]
    return (int(kept.min()), int(kept.max())) if kept.size else (0, 0)


def _join(ids: np.ndarray, sizes: Sequence[int], base: int) -> np.ndarray:
    """Symbols first * base + second of neighbouring ids, uint16, segment by segment."""
    result, start = [], 0
    for size in sizes:
        two = np.zeros((-(-size // 2), 2), dtype=np.uint16)
        two.reshape(-1)[:size] = ids[start : start + size]
        result.append(two[:, 0] * np.uint16(base) + two[:, 1])  # base <= 256, so this fits
        start += size
    return np.concatenate(result)


def decode_integers(parts: Mapping[str, np.ndarray], params: Mapping[str, Any], numel: int) -> np.ndarray:
    """Give back the integers of a stream, int32 [numel]. Raises FormatError when parts and parameters do not fit."""
    if "offset" not in params:
        raise FormatError("lanes: this stream holds words, not integers")
    layout = read_layout(params, numel)
    if layout.split not in ("u8", "u16"):
        raise FormatError(f"lanes: integers cannot have split `{layout.split}`")
    positions, literals = _literals(parts, layout, numel)
    ids = decode_symbols(parts, layout)
    if layout.pair:
        ids = _part(ids, params.get("segments", [numel]), layout.pair)
    if layout.escape >= 0 and not np.array_equal(np.flatnonzero(ids == layout.escape), positions):
        raise FormatError("lanes: `escape_positions` does not say where the escapes are")
    values = ids.astype(np.int32)
    values += np.int32(layout.offset)
    values[positions] = literals
    return values


def _literals(parts: Mapping[str, np.ndarray], layout: Layout, numel: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions (int64) and values of the literals, the positions checked."""
    if layout.escape < 0:
        return np.empty(0, np.int64), np.empty(0, np.int32)
    positions = part(parts, "escape_positions", np.uint64, (None,))
    literals = part(parts, "escape_values", np.int32, (positions.size,))
    if positions.size and (int(positions[-1]) >= numel or (positions[1:] <= positions[:-1]).any()):
        raise FormatError("lanes: `escape_positions` is not ascending, or past the end")
    return positions.astype(np.int64), literals


def _part(symbols: np.ndarray, sizes: Sequence[int], base: int) -> np.ndarray:
    """Undo `_join`; ids of the dtype of symbols."""
    result, start = [], 0
    for size in sizes:
        coded = symbols[start : start + -(-size // 2)]
        two = np.stack(np.divmod(coded, np.uint16(base)), axis=1).reshape(-1)
        if size % 2 and two[-1]:
            raise FormatError("lanes: a pair is not padded with 0")
        result.append(two[:size])
        start += coded.size
    return np.concatenate(result).astype(symbols.dtype)
