"""The definition of right: the official layout read cell by cell and bit by bit, in plain Python."""

import numpy as np

CELL_BITS, BLOCK_CELLS, POINTER = 64, 512, 240


def decode(
    luts: np.ndarray,
    encoded_exponent: np.ndarray,
    sign_mantissa: np.ndarray,
    output_positions: np.ndarray,
    gaps: np.ndarray,
    split_positions: np.ndarray | None = None,
) -> np.ndarray:
    """Decode a valid group to BF16 bit patterns, uint16 [n]; the arrays are those of `tcw.codecs.df11.Group`.

    Every cell decodes the codes that start in it. A block's weights begin at its output position, its cells' follow
    one another; no code is looked for behind the last weight.
    """
    n = sign_mantissa.size
    gap_bits = bits_of(gaps)
    bits = bits_of(encoded_exponent) + "0" * CELL_BITS * BLOCK_CELLS
    blocks = -(-encoded_exponent.size * 8 // (CELL_BITS * BLOCK_CELLS))
    begins = output_positions.view("<u4").tolist()[:blocks]
    words = np.zeros(n, dtype=np.uint16)
    for block, begin in enumerate(begins):
        exponents: list[int] = []
        wanted = [*begins, n][block + 1] - begin
        for cell in range(BLOCK_CELLS * block, BLOCK_CELLS * (block + 1)):
            start = CELL_BITS * cell + int(gap_bits[5 * cell : 5 * cell + 5], 2)
            exponents += cell_symbols(luts, bits, start, CELL_BITS * (cell + 1), wanted - len(exponents))
        for i, exponent in enumerate(exponents, begin):
            rest = int(sign_mantissa[i])
            words[i] = (rest & 0x80) << 8 | exponent << 7 | rest & 0x7F
    return words


def bits_of(array: np.ndarray) -> str:
    """The bits of bytes as a text, the most significant one of each byte first."""
    return "".join(format(byte, "08b") for byte in array.tolist())


def cell_symbols(luts: np.ndarray, bits: str, at: int, end: int, limit: int) -> list[int]:
    """The symbols whose codes start in at..end, `limit` of them at most."""
    symbols: list[int] = []
    while at < end and len(symbols) < limit:
        row, byte = 0, at
        while (entry := int(luts[row, int(bits[byte : byte + 8], 2)])) >= POINTER:
            row, byte = 256 - entry, byte + 8
        symbols.append(entry)
        at += int(luts[-1, entry])
    return symbols
