"""How many bits a tensor's exponents carry: what no lossless coder of exponents can go below.

H = -sum p(e) log2 p(e)       bits per weight, p(e) the share of weights with exponent e
"""

import numpy as np

from tcw.tensor import TensorData

# dtype -> (bits right of the exponent, width of the exponent)
EXPONENTS: dict[str, tuple[int, int]] = {
    "BF16": (7, 8), "F16": (10, 5), "F32": (23, 8), "F8_E4M3": (3, 4), "F8_E5M2": (2, 5),
}  # fmt: skip
_UNIT = 1 << 20


def exponent_counts(tensor: TensorData) -> np.ndarray | None:
    """Count a tensor's exponents from its bits, int64 [2**width]; None where the dtype is not in EXPONENTS."""
    if tensor.info.dtype not in EXPONENTS:
        return None
    from tcw.codecs.compiled import spread
    from tcw.codecs.histogram import count_units

    shift, width = EXPONENTS[tensor.info.dtype]
    words, mask = tensor.words, (1 << width) - 1
    starts = np.arange(0, words.size, _UNIT)
    units = np.zeros((starts.size, 4), np.int64)
    units[:, 2], units[:, 3] = starts, np.minimum(starts + _UNIT, words.size)
    counts = np.zeros((starts.size, mask + 1), np.int64)
    spread(lambda first, last: count_units(words, shift, mask, units, first, last, counts), starts.size)
    return counts.sum(axis=0)


def entropy_bits(counts: np.ndarray) -> float:
    """Entropy in bits per symbol of a histogram; 0 for an empty one."""
    total = int(counts.sum())
    if total == 0:
        return 0.0
    share = counts[counts > 0] / total
    # + 0.0 turns the -0.0 of a single symbol into 0.0
    return float(-(share * np.log2(share)).sum()) + 0.0
