"""The three steps of encoding in plain torch, on any device: what each kernel must give, and what a processor does.

That a whole stream is right is for the codec to say: tcw.codecs.lanes.encode makes the same bytes.
"""

import torch

from tcw.codecs.lanes_layout import CHUNK, GROUP, LANES, ROW, SPLITS, STEPS, chunks_of

COUNTED = 1 << 31  # words that are counted together: no counter of 32 bits overflows
LENGTH = 20  # an entry of a table holds a code, its first bit in bit 0, and its length from this bit up


def count(words: torch.Tensor, split: str) -> torch.Tensor:
    """How often each symbol occurs, uint32 in int32 [1 or more, symbols]: a row for each 2^31 words.

    Args:
        words: uint8, int16 or int32 [n], the split's words.
        split: "bf16", "f16", "f32", "u8" or "u16".
    """
    width = SPLITS[split].mask + 1
    parts = words.split(COUNTED) or (words,)
    rows = [torch.bincount(_symbols(part, split), minlength=width) for part in parts]
    return torch.stack(rows).to(torch.int32)


def measure(words: torch.Tensor, table: torch.Tensor, split: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The size of each lane, and what is not coded.

    Args:
        words: [n], as in `count`.
        table: int32 [symbols], by symbol: the code in bits 0..11, its length from bit 20 up.
        split: As in `count`.

    Returns:
        lane_bytes uint8 [32 chunks], raw uint8 [n] and low, uint16 in int16 [n]; [0] where the split has no such plane.
    """
    how, bits = SPLITS[split], words.to(torch.int32)
    lengths = _by_lane(table[_symbols(words, split)] >> LENGTH)
    lane_bytes = (lengths.sum(1) + 7) // 8
    raw = (bits >> how.sign) & 0x80 | (bits >> how.mantissa) & 0x7F if how.sign else bits & 0xFF
    low = words.view(torch.int16).view(-1, 2)[:, 0] if how.has_low else words.new_empty(0, dtype=torch.int16)
    return lane_bytes.to(torch.uint8), raw[: None if how.has_raw else 0].to(torch.uint8), low.clone()


def write(
    words: torch.Tensor, table: torch.Tensor, split: str, lane_bytes: torch.Tensor, chunk_base: torch.Tensor,
    room: int, codes: torch.Tensor,
) -> None:  # fmt: skip
    """Write the codes of words [n] to where their chunks begin in `codes`; other bytes are left as they are.

    Args:
        words: [n], as in `count`.
        table: As in `measure`.
        split: As in `count`.
        lane_bytes: What `measure` found.
        chunk_base: uint32 [chunks], where each chunk begins.
        room: At least 15 bytes more than the largest chunk has, a multiple of 16: the kernel's copy of it.
        codes: uint8 [bytes].
    """
    entries = _by_lane(table[_symbols(words, split)]).long()
    lengths, sizes = entries >> LENGTH, lane_bytes.view(-1, LANES).long()
    starts = chunk_base.view(torch.int32).long() & 0xFFFFFFFF
    starts = (starts[:, None] + sizes.cumsum(1) - sizes).view(-1, 1)
    at = 8 * starts + lengths.cumsum(1) - lengths  # the bit at which each code begins
    begin, size = int(at[0, 0]) // 8 if len(at) else 0, int(sizes.sum())
    pieces = (entries & ((1 << LENGTH) - 1)) << (at & 7)
    written = torch.zeros(size + 3, dtype=torch.int64, device=codes.device)
    for k in range(3):  # a code of 12 bits lies in three bytes at most
        written.index_add_(0, ((at >> 3) + (k - begin)).view(-1), (pieces >> 8 * k & 0xFF).view(-1))
    codes[begin : begin + size] = written[:size].to(torch.uint8)


def _symbols(words: torch.Tensor, split: str) -> torch.Tensor:
    return (words.long() >> SPLITS[split].shift) & SPLITS[split].mask


def _by_lane(values: torch.Tensor) -> torch.Tensor:
    """Values of symbols [n] as [lanes, 128], in the order in which each lane has them; zeros where there is none."""
    chunks = chunks_of(values.numel())
    whole = values.new_zeros(chunks * CHUNK)
    whole[: values.numel()] = values
    return whole.view(chunks, STEPS, LANES, GROUP).transpose(1, 2).reshape(-1, ROW)
