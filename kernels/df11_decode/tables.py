"""The decoder's tables, made from the look-up rows of a checked code: what the kernel keeps in shared memory.

First 1,024 entries of 8 bytes, by the next 10 bits of the stream: the symbols that these settle, four at most. A
symbol is an exponent turned right by one bit: 7 bits where they stand in a BF16, and the lowest bit on top. As two
little-endian words

    first     the symbols, the first one in the low byte; zeros where there are fewer
    second    bits 0..4   the bits that they take
              bits 11..13 their number
              bits 19..28 bit 19 + k is set where a symbol's code starts k bits in

and all zeros where the first code is longer than that, or its symbol depends on more bits. Then the look-up rows, 256
words of 16 bits each: symbol | bits of its code << 8, or the number of the row that the next byte is looked up in.
"""

import numpy as np

from tcw.codecs.df11_tables import POINTER

PEEK = 10  # bits; also in kernel.cu
BURST = 4  # symbols of an entry
ENTRIES_BYTES = 8 << PEEK
_KNOWN = 16  # bits: no row but the first two is asked for a code that 10 bits settle


def build(luts: np.ndarray) -> np.ndarray:
    """Make the tables of `luts` [rows + 1, 256], which `check_luts` has passed: uint8 [8192 + 512 rows]."""
    settled, lengths = _settled(luts), luts[-1].astype(np.uint32)
    window = np.arange(1 << PEEK)
    used = np.zeros(window.size, dtype=np.uint32)
    symbols, numbers = np.zeros_like(used), np.zeros_like(used)
    starts = np.zeros_like(used)
    going = np.ones(window.size, dtype=bool)
    for k in range(BURST):
        left = PEEK - used
        found = settled[left, window & ((1 << left) - 1)]
        size = lengths[np.maximum(found, 0)]
        going &= (found >= 0) & (size <= left)
        symbols |= np.where(going, _turned(found), 0).astype(np.uint32) << (8 * k)
        starts |= np.where(going, 1 << used, 0).astype(np.uint32)
        used += np.where(going, size, 0).astype(np.uint32)
        numbers += going
    entries = np.stack([symbols, used | numbers << 11 | starts << 19], axis=1).astype("<u4")
    return np.concatenate([entries.view(np.uint8).reshape(-1), _rows(luts).view(np.uint8).reshape(-1)])


def _rows(luts: np.ndarray) -> np.ndarray:
    """The look-up rows as 16-bit words, [rows, 256]."""
    rows, lengths = luts[:-1].astype(np.uint16), luts[-1].astype(np.uint16)
    return np.where(rows < POINTER, _turned(rows) | lengths[rows] << 8, 256 - rows).astype("<u2")


def _turned(exponents: np.ndarray) -> np.ndarray:
    return exponents >> 1 | (exponents & 1) << 7


def _settled(luts: np.ndarray) -> np.ndarray:
    """settled[k, p]: the symbol that the k bits p settle, whatever follows them; -1 where they do not. k is 0..10."""
    window = np.arange(1 << _KNOWN)
    first = luts[0, window >> 8].astype(np.int64)
    second = luts[np.where(first < POINTER, 0, 256 - first), window & 255].astype(np.int64)
    symbol = np.where(first < POINTER, first, np.where(second < POINTER, second, -1))
    settled = np.full((PEEK + 1, 1 << PEEK), -1)
    for bits in range(PEEK + 1):
        same = symbol.reshape(1 << bits, -1)
        low = same.min(axis=1)
        settled[bits, : 1 << bits] = np.where(low == same.max(axis=1), low, -1)
    return settled
