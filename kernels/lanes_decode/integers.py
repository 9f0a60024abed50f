"""Streams of integers: symbols by the kernel, then pairs, the offset and literals by torch, on the same device.

Each segment becomes a stream of its group, so that it begins where the kernel stores whole words at a time: the values
of a stream lie in one flat tensor, those of segment k from starts[k] on, with padding between them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from tcw.kernels.lanes_decode import check, decode
from tcw.kernels.lanes_decode.group import Group, group_symbols

from tcw.codecs.lanes_layout import LANES, Layout, chunks_of, part, read_layout
from tcw.codecs.lanes_read import Reader
from tcw.errors import FormatError


@dataclass(frozen=True)
class Integers:
    """A checked stream of integers.

    Attributes:
        group: Its symbols, a stream for each segment.
        sizes: Integers of each segment.
        pair: Ids that a symbol of two is made of: it is first * pair + second; 0 where a symbol is one id.
        offset: An integer is id + offset.
        escape: The id that stands for a literal, or -1.
        places: int64 [literals], ascending: where in the flat values the literals are.
        literals: int32 [literals].
    """

    group: Group
    sizes: tuple[int, ...]
    pair: int
    offset: int
    escape: int
    places: torch.Tensor
    literals: torch.Tensor

    @property
    def starts(self) -> tuple[int, ...]:
        """Where the integers of each segment begin in the flat values."""
        return tuple(start * (2 if self.pair else 1) for start in self.group.starts)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All tensors, in an order that `with_tensors` takes."""
        return (self.places, self.literals, *self.group.tensors())

    def with_tensors(self, tensors: tuple[torch.Tensor, ...]) -> "Integers":
        """The same stream with other tensors of the same shapes and dtypes, such as copies on another device."""
        places, literals, *rest = tensors
        return replace(self, group=self.group.with_tensors(rest), places=places, literals=literals)

    def to(self, device: torch.device | str) -> "Integers":
        """The stream on a device."""
        return self.with_tensors(tuple(tensor.to(device) for tensor in self.tensors()))

    def pieces(self, flat: torch.Tensor) -> Iterator[torch.Tensor]:
        """The integers of each segment, [size]: views of the flat values."""
        return (flat[start : start + size] for start, size in zip(self.starts, self.sizes, strict=True))


def read(parts: Mapping[str, np.ndarray], params: Mapping[str, Any], numel: int) -> Integers:
    """Check a stream, on the CPU. Raises FormatError; what only its symbols show is for `check_integers` to see."""
    if "offset" not in params:
        raise FormatError("lanes: this stream holds words, not integers")
    layout = read_layout(params, numel)
    if layout.split not in ("u8", "u16"):
        raise FormatError(f"lanes: integers cannot have split `{layout.split}`")
    positions, literals = np.empty(0, np.int64), np.empty(0, np.int32)
    if layout.escape >= 0:
        positions = part(parts, "escape_positions", np.uint64, (None,)).astype(np.int64)
        literals = part(parts, "escape_values", np.int32, (positions.size,))
        if positions.size and (not 0 <= positions[0] <= positions[-1] < numel or (np.diff(positions) <= 0).any()):
            raise FormatError("lanes: `escape_positions` is not ascending, or past the end")
    Reader(parts, layout)  # as a whole, before it is cut
    sizes = tuple(params.get("segments", [numel]))
    integers = Integers(
        group_symbols(list(_segments(parts, layout))), sizes, layout.pair, layout.offset, layout.escape,
        torch.empty(0, dtype=torch.int64), torch.from_numpy(literals.copy()),
    )  # fmt: skip
    ends = np.cumsum(sizes)
    of = np.searchsorted(ends, positions, side="right")
    moved = positions + (np.array(integers.starts) - (ends - np.array(sizes)))[of]
    return replace(integers, places=torch.from_numpy(moved))


def _segments(parts: Mapping[str, np.ndarray], layout: Layout) -> Iterator[tuple[dict[str, np.ndarray], Layout]]:
    """Each segment as a stream with one table."""
    chunks = np.cumsum([0, *map(chunks_of, layout.segments)]).tolist()
    base = np.append(parts["chunk_base"].astype(np.int64), parts["codes"].size)
    for k, (size, (first, end)) in enumerate(zip(layout.segments, pairwise(chunks), strict=True)):
        mine = {
            "codes": parts["codes"][base[first] : base[end]],
            "lane_bytes": parts["lane_bytes"][LANES * first : LANES * end],
            "chunk_base": (base[first:end] - base[first]).astype(np.uint32),
            "table": parts["table"][k : k + 1],
        }
        yield mine, replace(layout, symbols=size, segments=(size,), pair=0, escape=-1)


def values(integers: Integers) -> torch.Tensor:
    """The flat values, int32, on the stream's device; what lies between segments is anything."""
    flat = _ids(integers).add_(integers.offset)
    return flat.index_copy_(0, integers.places, integers.literals) if integers.literals.numel() else flat


def decode_integers(integers: Integers) -> torch.Tensor:
    """All integers, int32 [n], on the stream's device."""
    return torch.cat(list(integers.pieces(values(integers))))


def check_integers(integers: Integers) -> None:
    """Decode once, and wait for it. Raises FormatError where the symbols do not fit the other parts."""
    check(integers.group)
    ids = _ids(integers)
    odd = [start + size for start, size in zip(integers.starts, integers.sizes, strict=True) if size % 2]
    if integers.pair and any(int(ids[place]) for place in odd):
        raise FormatError("lanes: a pair is not padded with 0")
    if integers.escape >= 0:
        found = [
            torch.nonzero(piece == integers.escape).view(-1) + start
            for piece, start in zip(integers.pieces(ids), integers.starts, strict=True)
        ]
        if not torch.equal(torch.cat(found), integers.places):
            raise FormatError("lanes: `escape_positions` does not say where the escapes are")


def _ids(integers: Integers) -> torch.Tensor:
    """The ids of the flat values, int32."""
    symbols = decode(integers.group)
    ids = symbols.int() if symbols.dtype == torch.uint8 else symbols.view(torch.int16).int() & 0xFFFF
    if not integers.pair:
        return ids
    return torch.stack([ids // integers.pair, ids % integers.pair], dim=1).view(-1)
