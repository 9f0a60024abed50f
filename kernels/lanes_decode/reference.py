"""The definition of right: a `lanes` stream decoded bit by bit, written from the specification alone.

Slow on purpose, and trusting: it reads streams that a writer made. tcw/codecs/lanes.py says what the stream is.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

WORD = {"bf16": np.uint16, "f16": np.uint16, "f32": np.uint32, "u8": np.uint8, "u16": np.uint16}


def decode(parts: Mapping[str, np.ndarray], params: Mapping[str, Any], numel: int) -> np.ndarray:
    """Words [numel] of the split's dtype, or int32 [numel] where the stream holds integers."""
    symbols = decode_symbols(parts, params, numel)
    if "offset" in params:
        return integers(symbols, parts, params, numel)
    words = [word(s, j, parts, params["split"]) for j, s in enumerate(symbols)]
    return np.array(words, dtype=WORD[params["split"]])


def decode_symbols(parts: Mapping[str, np.ndarray], params: Mapping[str, Any], numel: int) -> list[int]:
    """All coded symbols, in the order of the tensor."""
    symbols: list[int] = []
    chunk = 0
    for table, values in enumerate(params.get("segments", [numel])):
        left = (values + 1) // 2 if "pair" in params else values
        codes = canonical_codes(code_lengths(parts["table"][table], params["alphabet"]))
        while left > 0:
            count = min(4096, left)
            plane = decode_chunk(parts, chunk, count, codes)
            symbols += [params["first_symbol"] + s for s in plane]
            chunk, left = chunk + 1, left - count
    return symbols


def code_lengths(row: np.ndarray, alphabet: int) -> list[int]:
    """Unpack nibbles, the low one first."""
    lengths = []
    for byte in row.tolist():
        lengths += [byte & 15, byte >> 4]
    return lengths[:alphabet]


def canonical_codes(lengths: list[int]) -> dict[str, int]:
    """Map each code, as a text of 0 and 1, to its symbol (counted from first_symbol)."""
    codes, code, before = {}, 0, 0
    for length, symbol in sorted((length, symbol) for symbol, length in enumerate(lengths) if length):
        code <<= length - before
        codes[format(code, f"0{length}b")] = symbol
        code, before = code + 1, length
    return codes


def decode_chunk(parts: Mapping[str, np.ndarray], chunk: int, count: int, codes: dict[str, int]) -> list[int]:
    """The `count` symbols of one chunk, in the order of the tensor."""
    plane = [-1] * count
    at = int(parts["chunk_base"][chunk])
    for lane in range(32):
        size = int(parts["lane_bytes"][32 * chunk + lane])
        bits = bits_of(parts["codes"][at : at + size])
        for step in range(32):
            for j in range(128 * step + 4 * lane, 128 * step + 4 * lane + 4):
                if j < count:
                    plane[j] = next_symbol(bits, codes)
        at += size
    return plane


def bits_of(data: np.ndarray) -> Iterator[str]:
    """The bits of a lane, the least significant bit of each byte first."""
    for byte in data.tolist():
        for k in range(8):
            yield str(byte >> k & 1)


def next_symbol(bits: Iterator[str], codes: dict[str, int]) -> int:
    """Take bits until they are a code."""
    code = ""
    while code not in codes:
        code += next(bits)
    return codes[code]


def word(symbol: int, j: int, parts: Mapping[str, np.ndarray], split: str) -> int:
    """Put a symbol and its place in the side planes together."""
    raw = int(parts["raw"][j]) if "raw" in parts else 0
    if split == "bf16":
        return (raw & 0x80) << 8 | symbol << 7 | raw & 0x7F
    if split == "f16":
        return symbol << 8 | raw
    if split == "f32":
        return (raw & 0x80) << 24 | symbol << 23 | (raw & 0x7F) << 16 | int(parts["low"][j])
    return symbol


def integers(symbols: list[int], parts: Mapping[str, np.ndarray], params: Mapping[str, Any], numel: int) -> np.ndarray:
    """Pairs to ids, ids to literals or integers."""
    ids: list[int] = []
    for values in params.get("segments", [numel]):
        if "pair" in params:
            segment, symbols = symbols[: (values + 1) // 2], symbols[(values + 1) // 2 :]
            ids += [i for s in segment for i in divmod(s, params["pair"])][:values]
        else:
            segment, symbols = symbols[:values], symbols[values:]
            ids += segment
    literals = iter(parts.get("escape_values", np.empty(0, np.int32)).tolist())
    values = [next(literals) if i == params.get("escape") else i + params["offset"] for i in ids]
    return np.array(values, dtype=np.int32)
