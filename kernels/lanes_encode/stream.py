"""The steps put together: counts to the host, codes chosen there, then sizes, sums of sizes, and the codes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tcw.kernels.lanes_encode.reference import LENGTH

from tcw.codecs import huffman, lanes, lanes_words
from tcw.codecs.lanes_layout import LANES, SPLITS

WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}  # by bytes; torch computes with few unsigned dtypes


@dataclass(frozen=True)
class DeviceStream:
    """A `lanes` stream whose parts are tensors of one device.

    Attributes:
        parts: By the names that tcw/codecs/lanes.py gives, of the same dtypes and shapes.
        params: The stream's parameters.
    """

    parts: dict[str, torch.Tensor]
    params: dict[str, Any]

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for part in self.parts.values())

    def numpy(self) -> lanes.Stream:
        """The stream in the processor's memory; waits for the device."""
        return lanes.Stream({name: part.cpu().numpy() for name, part in self.parts.items()}, dict(self.params))


@dataclass(frozen=True)
class Steps:
    """What does the work: the functions of reference.py, the kernels, or torch's operations."""

    count: Callable[..., torch.Tensor]
    measure: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    write: Callable[..., None]


def encode_with(
    steps: Steps, tensor: torch.Tensor, split: str, segments: Sequence[int] | None, max_length: int
) -> DeviceStream:
    """Encode as `tcw.codecs.lanes.encode` does, in `steps`; arguments and errors are `encode`'s."""
    words = as_words(tensor, split)
    sizes = lanes_words.segment_sizes(words.numel(), segments, max_length)
    pieces = list(words.split(sizes))
    first_symbol, lengths = _codes(steps, pieces, split, max_length)
    tables = torch.from_numpy(_entries(lengths, first_symbol, split)).to(words.device)
    measured = [steps.measure(piece, table, split) for piece, table in zip(pieces, tables, strict=True)]
    lane_bytes, raw, low = (parts[0] if len(parts) == 1 else torch.cat(parts) for parts in zip(*measured, strict=True))
    chunk_base, total, largest = _bases(lane_bytes)
    if total > lanes_words.MAX_CODES:
        raise lanes.NotCodable(f"{total} bytes of codes")
    codes = torch.empty(total, dtype=torch.uint8, device=words.device)
    room, chunk = -(-(largest + 15) // 16) * 16, 0
    for piece, table, (mine, *_) in zip(pieces, tables, measured, strict=True):
        count = mine.numel() // LANES
        steps.write(piece, table, split, mine, chunk_base[chunk : chunk + count], room, codes)
        chunk += count
    table = torch.from_numpy(lanes_words.pack_lengths(lengths)).to(words.device)
    parts = {"codes": codes, "lane_bytes": lane_bytes, "chunk_base": chunk_base, "table": table}
    parts |= {"raw": raw} if SPLITS[split].has_raw else {}
    parts |= {"low": low.view(torch.uint16)} if SPLITS[split].has_low else {}
    described = lanes_words.describe(split, words.numel(), first_symbol, lengths, max_length, segments)
    return DeviceStream(parts, described)


def as_words(tensor: torch.Tensor, split: str) -> torch.Tensor:
    """The bits of a tensor of any shape as the split's words [n], of uint8, int16 or int32. Raises ValueError."""
    size = np.dtype(SPLITS[split].word).itemsize
    if tensor.element_size() != size:
        raise ValueError(f"split {split} takes words of {size} bytes, got {tensor.dtype}")
    return tensor.detach().contiguous().view(-1).view(WORDS[size])


def _codes(steps: Steps, pieces: Sequence[torch.Tensor], split: str, max_length: int) -> tuple[int, np.ndarray]:
    """Choose codes on the host, as the codec does: the counts come here, which waits for the device."""
    counted = [steps.count(piece, split) for piece in pieces]
    table_of = np.repeat(np.arange(len(counted)), [len(rows) for rows in counted])
    counts = torch.cat(counted).cpu().numpy().view(np.uint32)
    return lanes_words.choose_codes(counts, table_of, len(pieces), max_length)


def _entries(lengths: np.ndarray, first_symbol: int, split: str) -> np.ndarray:
    """The kernels' tables, int32 [tables, symbols], by symbol: no word can index outside of them."""
    entries = np.zeros((len(lengths), SPLITS[split].mask + 1), dtype=np.int32)
    for row, size in zip(entries, lengths, strict=True):
        codes = huffman.reversed_bits(huffman.canonical(size), size)
        row[first_symbol : first_symbol + size.size] = codes | size.astype(np.uint32) << LENGTH
    return entries


def _bases(lane_bytes: torch.Tensor) -> tuple[torch.Tensor, int, int]:
    """Where each chunk begins, uint32 [chunks]; the bytes of all, and of the largest: this waits for the device."""
    sizes = lane_bytes.view(-1, LANES).sum(1, dtype=torch.int64)
    if not sizes.numel():
        return sizes.to(torch.int32).view(torch.uint32), 0, 0
    ends = sizes.cumsum(0)
    total, largest = torch.stack([ends[-1], sizes.max()]).tolist()
    return (ends - sizes).to(torch.int32).view(torch.uint32), total, largest
