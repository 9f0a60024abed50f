"""The code of an official DFloat11 group: which bits stand for an exponent, and the look-up rows that decode them.

The official writer takes its code from the package dahuffman: Huffman with an end-of-file symbol (EOF) of frequency 1
whose only use is to fill the last byte. The code is not canonical, so the same bytes come out only if ties are settled
in the same way: of two trees of one weight, the one whose leftmost leaf is smaller goes first, and EOF is below all.

Look-up rows: row 0 is indexed by the next byte of the stream. An entry below 240 is a symbol; 240 and more point to row
`256 - entry`, indexed by the byte after. The last row holds the code length of each symbol, 0 for those without a code.
"""

import heapq

import numpy as np

from tcw.codecs.compiled import kernel
from tcw.errors import FormatError

LONGEST = 32  # bits; a gap has 5 bits, so no code may reach over a whole 64-bit cell
POINTER = 240  # look-up entries from here on are pointers, so exponents from here on cannot be coded
MAX_ROWS = 17  # the root and the 16 rows that a pointer can name
EOF = -1  # as a symbol: smaller than every exponent

PEEK = 12  # bits that the fast decoding table is indexed by
BURST = 6  # symbols that one entry of it holds at most

Codes = dict[int, tuple[int, int]]  # symbol -> (length, code as a number), from the leftmost leaf to the rightmost


def build_codes(counts: np.ndarray) -> Codes:
    """Huffman code of the exponents that occur, and EOF, as dfloat11 0.5.0 makes it: at most 32 bits long.

    Codes that are too long are shortened by counting the k rarest exponents as 1, for k = 2, 3, ...

    Args:
        counts: Occurrences of each exponent, [256], at least one of them positive.
    """
    symbols = np.flatnonzero(counts)
    original = np.asarray(counts, dtype=np.int64)[symbols]
    codes = _huffman(symbols, original)
    for k in range(2, symbols.size):
        if max(length for length, _ in codes.values()) <= LONGEST:
            break
        changed = original.copy()
        changed[np.argpartition(original, k)[:k]] = 1
        codes = _huffman(symbols, changed)
    return codes


def _huffman(symbols: np.ndarray, counts: np.ndarray) -> Codes:
    heap = [(int(c), int(s), [(int(s), 0, 0)]) for s, c in zip(symbols, counts, strict=True)]
    heap.append((1, EOF, [(EOF, 0, 0)]))
    heapq.heapify(heap)  # (weight, leftmost leaf) is unique, so the order is total
    while len(heap) > 1:
        (weight_a, leftmost, a), (weight_b, _, b) = heapq.heappop(heap), heapq.heappop(heap)
        merged = [(s, n + 1, v) for s, n, v in a] + [(s, n + 1, v + (1 << n)) for s, n, v in b]
        heapq.heappush(heap, (weight_a + weight_b, leftmost, merged))
    return {s: (n, v) for s, n, v in heap[0][2]}


def build_luts(codes: Codes) -> np.ndarray:
    """Look-up rows of a code, uint8 [rows + 1, 256], as dfloat11 0.5.0 makes them; rows may exceed MAX_ROWS.

    Slots that no code reaches (they would be EOF's) repeat the slot before, across rows; the first ones, which the
    official writer leaves undefined, take the first symbol that follows.
    """
    texts = {s: format(v, f"0{n}b") for s, (n, v) in codes.items() if s != EOF}
    prefixes = sorted({t[: (len(t) - 1) // 8 * 8]: None for t in texts.values()} | {"": None}, key=len)
    row_of = {prefix: row for row, prefix in enumerate(prefixes)}
    luts = np.zeros((len(prefixes) + 1, 256), dtype=np.uint8)
    slots = np.full((len(prefixes), 256), -1)
    for symbol, text in texts.items():
        for depth in range(0, len(text), 8):
            row, rest = row_of[text[:depth]], text[depth : depth + 8]
            ends = len(text) - depth <= 8
            slots[row, int(rest.ljust(8, "0"), 2)] = symbol if ends else 256 - row_of[text[: depth + 8]]
        luts[-1, symbol] = len(text)
    flat = slots.reshape(-1)
    known = np.maximum.accumulate(np.where(flat >= 0, np.arange(flat.size), -1))
    known[known < 0] = np.flatnonzero(flat >= 0)[0]
    luts[:-1] = flat[known].reshape(slots.shape).astype(np.uint8)  # more than 16 pointers wrap; the caller counts rows
    return luts


def check_luts(luts: np.ndarray) -> None:
    """Raise FormatError unless `luts` is uint8 [2..18, 256] and every walk through it stays inside."""
    if luts.dtype != np.uint8 or luts.ndim != 2 or luts.shape[1] != 256 or not 2 <= luts.shape[0] <= MAX_ROWS + 1:
        raise FormatError(f"`luts` should be bytes of shape [2..{MAX_ROWS + 1}, 256], it has {list(luts.shape)}")
    rows, lengths = luts[:-1], luts[-1]
    pointers = rows[rows >= POINTER].astype(np.int64)
    if pointers.size and 256 - int(pointers.min()) >= rows.shape[0]:
        raise FormatError(f"`luts` has {rows.shape[0]} rows and points to row {256 - int(pointers.min())}")
    used = lengths[rows[rows < POINTER]]
    if used.size == 0 or used.min() == 0 or used.max() > LONGEST:
        raise FormatError(f"`luts` gives a symbol a code length outside 1..{LONGEST}")


@kernel
def walk(luts, window):  # type: ignore[no-untyped-def]
    """Symbol at the start of `window` (uint64, first bit of the stream on top), or -1 if no row resolves it."""
    row = 0
    for depth in range(4):
        entry = int(luts[row, np.int64((window >> np.uint64(56 - 8 * depth)) & np.uint64(255))])
        if entry < 240:
            return entry
        row = 256 - entry
    return -1


@kernel
def _resolve(luts, prefix, bits):  # type: ignore[no-untyped-def]
    """Symbol that `bits` leading bits settle whatever follows, or -1."""
    row = 0
    left = bits
    while left >= 8:
        entry = int(luts[row, (prefix >> (left - 8)) & 255])
        if entry < 240:
            return entry
        row = 256 - entry
        left -= 8
    low = (prefix & ((1 << left) - 1)) << (8 - left)
    entry = int(luts[row, low])
    for slot in range(low, low + (1 << (8 - left))):
        if luts[row, slot] != entry:
            return -1
    return entry if entry < 240 else -1


@kernel
def _fill_fast(luts, entries, starts):  # type: ignore[no-untyped-def]
    lengths = luts[luts.shape[0] - 1]
    for window in range(1 << PEEK):
        entry = np.uint64(0)
        count = 0
        used = 0
        mask = 1
        while count < BURST:
            left = PEEK - used
            symbol = _resolve(luts, window & ((1 << left) - 1), left)
            if symbol < 0 or np.int64(lengths[symbol]) > left:
                break
            entry |= np.uint64(symbol) << np.uint64(8 * count)
            used += int(lengths[symbol])
            mask |= 1 << used
            count += 1
        entries[window] = entry | np.uint64(count) << np.uint64(48) | np.uint64(used) << np.uint64(56)
        starts[window] = mask


def fast_table(luts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Make the table that decodes several symbols at a look, from checked `luts`.

    Returns:
        entries: uint64 [4096], by the next 12 bits: up to 6 symbols in the low bytes, their number in byte 6, the bits
            they take in byte 7; number 0 where the first code is longer than 12 bits.
        starts: uint16 [4096]: bit k is set when a code starts k bits in, the one after the last included.
    """
    entries, starts = np.empty(1 << PEEK, dtype=np.uint64), np.empty(1 << PEEK, dtype=np.uint16)
    _fill_fast(luts, entries, starts)
    return entries, starts
