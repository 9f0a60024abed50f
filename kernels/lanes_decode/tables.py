"""The decoder's look-up tables: by the next 12 bits of a lane, the symbols that these bits begin with.

An entry is a uint32. Of 8-bit symbols it holds two, where the codes of both lie in 12 bits:

    bits  0..7    the first symbol
    bits  8..15   the second one, where there is one
    bits 16..19   bits of the first code
    bit  23       1: there is no second symbol
    bits 24..27   bits of both codes, or of the first where it is alone

and of 16-bit symbols one: the symbol in bits 0..15, the bits of its code in 24..27. An exponent of BF16 or F32 is
turned right by one bit: so its lowest bit, which goes to the other byte of the word, is where that byte wants it.

Codes are complete, so that each of
the 4,096 windows begins with one, and no length is 0: whatever bits a lane has, a decoder goes on, and ends.
"""

import numpy as np

from tcw.codecs.huffman import canonical_order, reversed_bits
from tcw.codecs.lanes_layout import LONGEST, SPLITS

WINDOW = 1 << LONGEST
ALONE = 1 << 23
_TURNED = ("bf16", "f32")

_REVERSED = reversed_bits(np.arange(WINDOW), np.full(WINDOW, LONGEST)).astype(np.int64)
_ALL = np.arange(WINDOW)


def build(code_lengths: np.ndarray, first_symbol: int, split: str) -> np.ndarray:
    """Make the table of a checked code.

    Args:
        code_lengths: uint8 [alphabet]: a complete code, a lone symbol of length 1, or no symbol at all.
        first_symbol: What the first of them stands for.
        split: What they are the symbols of.

    Returns:
        uint32 [4096]; zeros where there is no symbol.
    """
    order = canonical_order(code_lengths)
    if order.size == 0:
        return np.zeros(WINDOW, np.uint32)
    bits = code_lengths[order].astype(np.int64)
    widths = np.int64(1) << (LONGEST - (bits if order.size > 1 else 0 * bits))  # a lone symbol has every window
    symbols = order + first_symbol
    if split in _TURNED:
        symbols = symbols >> 1 | (symbols & 1) << 7
    first = np.repeat(symbols.astype(np.uint32), widths)[_REVERSED]
    size = np.repeat(bits.astype(np.uint32), widths)[_REVERSED]
    if split == "u16":
        return first | size << 24
    rest = _ALL >> size
    both = size + size[rest]
    fits = both <= LONGEST
    second = np.where(fits, first[rest] << 8, np.uint32(ALONE))
    return first | second | size << 16 | np.where(fits, both, size) << 24


def lengths(table: np.ndarray, split: str) -> np.ndarray:
    """The code that a table was built of: uint8 [256 or 65,536], the bits of each symbol's code, 0 for none."""
    mask = SPLITS[split].mask
    symbols = table & mask
    if split in _TURNED:
        symbols = symbols << 1 & 0xFF | symbols >> 7
    result = np.zeros(mask + 1, dtype=np.uint8)
    result[symbols] = table >> (24 if split == "u16" else 16) & 15
    return result
