"""The official decoding kernel, one thread after the other, in plain Python: slow, obvious, and not built from tcw."""

import numpy as np


def decode(luts, codes, sign_mantissa, positions, gaps):
    """BF16 words that `decode.ptx` of dfloat11 0.5.0 writes; positions uint32 [blocks + 1], all else uint8."""
    rows, lengths = luts[:-1].tolist(), luts[-1].tolist()
    text = "".join(format(byte, "08b") for byte in codes.tolist()) + "0" * (2**15 + 64)
    gap_text = "".join(format(byte, "08b") for byte in gaps.tolist())
    words = np.zeros(len(sign_mantissa), dtype=np.uint16)
    for block in range(-(-len(codes) // 4096)):
        exponents = []
        for thread in range(512):
            start = 64 * (512 * block + thread)
            cell = 512 * block + thread
            bit = start + int(gap_text[5 * cell : 5 * cell + 5], 2)
            while bit < start + 64 and bit < 8 * len(codes):
                row, at = 0, bit
                while (entry := rows[row][int(text[at : at + 8], 2)]) >= 240:
                    row, at = 256 - entry, at + 8
                exponents.append(entry)
                bit += lengths[entry]
        begin, end = int(positions[block]), int(positions[block + 1])
        for i in range(begin, end):
            rest = int(sign_mantissa[i])
            words[i] = (rest & 0x80) << 8 | exponents[i - begin] << 7 | rest & 0x7F
    return words
