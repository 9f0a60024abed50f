"""Streams that are decoded together: laid side by side, so that one launch decodes all weights of a layer.

flat buffer    stream 0 ......... pad | stream 1 .... pad | stream 2 ........      each begins at a multiple of 128
raw, low       the same places
codes          stream 0 | stream 1 | stream 2 | padding
units          what a block of threads works on: some chunks that share a table, and where their elements go
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from tcw.kernels.lanes_decode import tables

from tcw.codecs.lanes_layout import LANE_BYTES, LANES, SPLITS, Layout, chunks_of, read_layout, units
from tcw.codecs.lanes_read import Reader
from tcw.errors import FormatError

Stream = tuple[Mapping[str, np.ndarray], Mapping[str, Any], int]  # parts, params, how many values

ALIGN = 128  # elements: so a full row of a chunk is aligned in every plane
CODES_PAD = 272  # bytes behind the last code, zeros: a reader may look 192 bytes behind a lane's start, and refill
SHARED_PAD = 16 + 15 + LANE_BYTES + 16  # of a chunk's copy in shared memory: before it, to align it, behind it
DTYPES = {
    "bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32, "u8": torch.uint8, "u16": torch.uint16,
}  # fmt: skip
_WIDE = 128  # multiprocessors of a large GPU
_WAVES = 16  # units for each of them: enough that the last ones to finish do not matter


@dataclass(frozen=True)
class Group:
    """Streams of one split, checked, which one launch decodes into one flat buffer.

    Attributes:
        split: "bf16", "f16", "f32", "u8" or "u16".
        starts: Element of the flat buffer where each stream's words begin, multiples of 128.
        sizes: Words of each stream.
        numel: Elements of the flat buffer. What lies between streams is padding, and is not written.
        shared: Bytes that the copy of the largest chunk takes in shared memory, a multiple of 16.
        codes: uint8 [bytes + 272 or more], on a 16-byte boundary.
        lane_bytes: uint8 [32 chunks].
        chunk_base: uint32 [chunks + 1]: where in `codes` each chunk begins, and the last one ends.
        units: int64 [units, 5]: first chunk, end chunk, first element, end element, table. A sixth number would be the
            place in the output that the first element goes to, where that is another.
        tables: uint32 [tables, 4096], see tables.py.
        raw: uint8 [numel], or None where the split has none.
        low: uint16 [numel], or None.
    """

    split: str
    starts: tuple[int, ...]
    sizes: tuple[int, ...]
    numel: int
    shared: int
    codes: torch.Tensor
    lane_bytes: torch.Tensor
    chunk_base: torch.Tensor
    units: torch.Tensor
    tables: torch.Tensor
    raw: torch.Tensor | None
    low: torch.Tensor | None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors())

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.codes.device

    @property
    def chunk_starts(self) -> tuple[int, ...]:
        """First chunk of each stream, and the number of all chunks; for streams without segments."""
        return (0, *itertools.accumulate(chunks_of(size) for size in self.sizes))

    @property
    def dtype(self) -> torch.dtype:
        """Of the words."""
        return DTYPES[self.split]

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All tensors, in an order that `with_tensors` takes."""
        every = (self.codes, self.lane_bytes, self.chunk_base, self.units, self.tables, self.raw, self.low)
        return tuple(tensor for tensor in every if tensor is not None)

    def with_tensors(self, tensors: Sequence[torch.Tensor]) -> "Group":
        """The same streams with other tensors of the same shapes and dtypes, such as copies on another device."""
        mine = self.tensors()
        if [(t.shape, t.dtype) for t in tensors] != [(t.shape, t.dtype) for t in mine]:
            raise ValueError("these are not the tensors of this group")
        raw = tensors[5] if self.raw is not None else None
        low = tensors[6] if self.low is not None else None
        names = ("codes", "lane_bytes", "chunk_base", "units", "tables")
        return replace(self, **dict(zip(names, tensors, strict=False)), raw=raw, low=low)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Group":
        """The group on a device."""
        return self.with_tensors([tensor.to(device, non_blocking=non_blocking) for tensor in self.tensors()])

    def pin_memory(self) -> "Group":
        """The group in page-locked memory, from which copies to a GPU run in the background."""
        return self.with_tensors([tensor.pin_memory() for tensor in self.tensors()])

    def views(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """Each stream's words, [size]: views of a flat buffer [numel]."""
        return [flat[start : start + size] for start, size in zip(self.starts, self.sizes, strict=True)]


def group(streams: Sequence[Stream], unit_chunks: int = 0) -> Group:
    """Check streams of words, and lay them side by side, on the CPU.

    Args:
        streams: (parts, params, numel) of each, all of one split; nothing in them is trusted.
        unit_chunks: Chunks that a block of threads works on at most; 0 for a number that fills a large GPU.

    Raises:
        FormatError: Parts, parameters and numel of a stream do not fit each other, or it holds integers.
        ValueError: There are no streams, they have different splits, or their codes reach 4 GiB.
    """
    for _, params, _ in streams:
        if {"offset", "pair", "escape"} & set(params):
            raise FormatError("lanes: this stream holds integers, not words")
    return group_symbols([(parts, read_layout(params, numel)) for parts, params, numel in streams], unit_chunks)


def group_symbols(streams: Sequence[tuple[Mapping[str, np.ndarray], Layout]], unit_chunks: int = 0) -> Group:
    """As `group`, of streams whose parameters have been read; of integers, the symbols that they are coded as."""
    splits = {layout.split for _, layout in streams}
    if len(splits) != 1:
        raise ValueError(f"a group has streams of one split, got {sorted(splits)}")
    split = splits.pop()
    for parts, layout in streams:
        Reader(parts, layout)  # raises FormatError for what does not fit
    sizes = [layout.symbols for _, layout in streams]
    room = [-(-size // ALIGN) * ALIGN for size in sizes]
    starts = [sum(room[:k]) for k in range(len(room))]
    numel = starts[-1] + sizes[-1]
    lane_bytes = np.concatenate([parts["lane_bytes"] for parts, _ in streams])
    how = SPLITS[split]
    return Group(
        split=split,
        starts=tuple(starts),
        sizes=tuple(sizes),
        numel=numel,
        shared=_shared(lane_bytes),
        codes=torch.from_numpy(_side_by_side(streams, "codes", np.uint8)),
        lane_bytes=torch.from_numpy(lane_bytes),
        chunk_base=torch.from_numpy(_bases(lane_bytes)),
        units=torch.from_numpy(_units(streams, starts, unit_chunks or _filling(lane_bytes.size // LANES))),
        tables=torch.from_numpy(_tables(streams)),
        raw=_plane(streams, "raw", np.uint8, starts, numel) if how.has_raw else None,
        low=_plane(streams, "low", np.uint16, starts, numel) if how.has_low else None,
    )


def _shared(lane_bytes: np.ndarray) -> int:
    largest = int(lane_bytes.reshape(-1, LANES).sum(axis=1, dtype=np.int64).max(initial=0))
    return -(-(largest + SHARED_PAD) // 16) * 16


def _filling(chunks: int) -> int:
    """Chunks of a unit: a multiple of 8, so that 8 warps have the same work, and of 64 at most."""
    return 8 * max(1, min(8, chunks // (8 * _WIDE * _WAVES)))


def _side_by_side(streams: Sequence[tuple[Mapping[str, np.ndarray], Layout]], name: str, dtype: type) -> np.ndarray:
    total = sum(parts[name].size for parts, _ in streams)
    joined = np.empty(-(-total // 16) * 16 + CODES_PAD, dtype=dtype)
    joined[total:] = 0
    np.concatenate([parts[name] for parts, _ in streams], out=joined[:total])
    return joined


def _bases(lane_bytes: np.ndarray) -> np.ndarray:
    """Where each chunk of the group begins, and the last one ends, uint32 [chunks + 1]."""
    bases = np.zeros(lane_bytes.size // LANES + 1, dtype=np.int64)
    np.cumsum(lane_bytes.reshape(-1, LANES).sum(axis=1, dtype=np.int64), out=bases[1:])
    if int(bases[-1]) >= 1 << 32:
        raise ValueError("the codes of a group are 4 GiB or more")
    return bases.astype(np.uint32)


def _units(
    streams: Sequence[tuple[Mapping[str, np.ndarray], Layout]], starts: Sequence[int], unit_chunks: int
) -> np.ndarray:
    rows, chunk, table = [], 0, 0
    for (_, layout), start in zip(streams, starts, strict=True):
        rows.append(units(layout.segments, unit_chunks) + np.array([chunk, chunk, start, start, table]))
        chunk += layout.chunks
        table += len(layout.segments)
    return np.ascontiguousarray(np.concatenate(rows))


def _tables(streams: Sequence[tuple[Mapping[str, np.ndarray], Layout]]) -> np.ndarray:
    """uint32 [tables, 4096]."""
    rows = []
    for parts, layout in streams:
        packed = parts["table"]
        for row in np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1):
            rows.append(tables.build(row[: layout.alphabet], layout.first_symbol, layout.split))
    return np.stack(rows)


def _plane(
    streams: Sequence[tuple[Mapping[str, np.ndarray], Layout]],
    name: str,
    dtype: type,
    starts: Sequence[int],
    numel: int,
) -> torch.Tensor:
    """The planes `name` of all streams at their places, [numel]; zeros between them."""
    plane = np.zeros(numel, dtype=dtype)
    for (parts, layout), start in zip(streams, starts, strict=True):
        plane[start : start + layout.symbols] = parts[name]
    return torch.from_numpy(plane)
