"""`lanes`: canonical Huffman codes laid out so that 32 lanes of a GPU warp decode 32 streams at once.

What is coded. A `split` takes a word apart into a symbol, which is coded, and the rest, which is stored as it is:

    split   word   symbol               raw (U8)                               low (U16)
    bf16    16     (w >> 7)  & 0xFF     ((w >> 8) & 0x80) | (w & 0x7F)         -
    f16     16      w >> 8               w & 0xFF                              -
    f32     32     (w >> 23) & 0xFF     ((w >> 24) & 0x80) | ((w >> 16) & 0x7F)   w & 0xFFFF
    u8       8      w                   -                                      -         FP8 bytes, integer codes
    u16     16      w                   -                                      -         integer codes

The code. Canonical Huffman, no code longer than 12 bits: codes of one length are consecutive in the order of their
symbols, and codes of length l+1 go on at twice the number after the last code of length l. The first bit of a code is
its most significant. A code is complete (its Kraft sum is exactly 1), but for a lone symbol, whose code is one 0 bit.

The order. A segment is cut into chunks of 4,096 symbols; a chunk has 32 lanes of 128. In step i (0..31) lane l owns
symbols i*128 + 4l .. + 3, so that in each step a warp reads 128 bytes of `raw` and writes 256 bytes of BF16 side by
side. In the last chunk of a segment lanes simply have the positions that exist, possibly none. A lane's codes stand
one after another, its first code in its first byte, bits filled from the least significant one up (as in DEFLATE); the
rest of its last byte is zero. Lanes follow each other without gaps, chunks too.

Parts (little-endian, C order), for n coded symbols in c chunks:

    codes             U8  [bytes]     the lanes; fewer than 2^32 bytes
    lane_bytes        U8  [32 c]      bytes of each lane, at most 192
    chunk_base        U32 [c]         where each chunk begins in `codes`: sums of lane_bytes, there for random access
    table             U8  [tables, (alphabet+1)//2]   code lengths of symbols first_symbol, first_symbol + 1, ..., two
                                      to a byte, the low nibble first; 0 for a symbol that does not occur
    raw, low          U8 [n], U16 [n] where the split has them, in the order of the tensor
    escape_positions  U64 [k]         with `escape` only: which values are literals, ascending
    escape_values     I32 [k]         the literals

Parameters (JSON): `split`; `symbols` (n); `first_symbol` and `alphabet`, what the tables span; `max_length`, the limit
they were made with, at most 12; and only where used

    segments   values in each segment, at most 256 segments; each begins a new chunk and has its own row of `table`,
               all zeros for an empty one (default: one segment, one row)
    offset     integers only, and always there: value = id + offset
    pair       K: a symbol s stands for two ids, s // K and s % K; a segment of an odd size is padded with an id of 0
    escape     the id that stands for a literal

so that a symbol becomes one id or two, and an id an integer or a literal. All sizes follow from the number of values
and `lane_bytes`; a reader checks each of them before it uses it, and that each lane ends with its last code.
"""

from tcw.codecs.lanes_integers import decode_integers, encode_integers
from tcw.codecs.lanes_layout import SPLITS
from tcw.codecs.lanes_read import Reader
from tcw.codecs.lanes_words import NotCodable, Stream, decode, encode, predict, reader

__all__ = [
    "SPLITS",
    "NotCodable",
    "Reader",
    "Stream",
    "decode",
    "decode_integers",
    "encode",
    "encode_integers",
    "predict",
    "reader",
]
