"""What an encoder must get right: the inputs that its test and its benchmark share, most of them the decoder's."""

from tcw.kernels.lanes_decode.cases import CASES as DECODED
from tcw.kernels.lanes_decode.cases import Case, make_inputs

__all__ = ["CASES", "Case", "cost", "make_inputs"]

CASES = [
    *(case for case in DECODED if case.split != "integers"),
    # segments that begin where no thread could load four words at once
    Case("tables-f32", "weights", "f32", 4_300, segments=(1, 4_099, 200)),
    Case("tables-u8", "any_bits", "u8", 4_200, segments=(3, 4_097, 100)),
    Case("tables-u16", "wide", "u16", 5_000, segments=(2, 4_998)),
    Case("eight-warps-and-more", "zero_runs", "bf16", 40_000),
]


def cost(case: Case) -> int:
    """Bytes that an encoder must at least move: the words in, the stream out."""
    words, stream = make_inputs(case)
    return words.nbytes + stream.nbytes
