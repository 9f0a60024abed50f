"""A weight in the lanes code on a device: a parameter that any operation sees decoded, and whose rows can be looked up.

It stands in a model's modules while its unit does not run (units.py, arena.py), so that nothing hangs on knowing where
a model uses a weight: one that is used in another way is decoded for that one operation, which is slow and right.
"""

from typing import Any

import torch

from tcw.codecs.lanes_layout import CHUNK
from tcw.kernels.lanes_decode import Group, decode, decode_chunks
from tcw.runtime.packed import Packed
from tcw.tensor import TensorInfo


class Part:
    """One stream of a group: the weight that it holds."""

    def __init__(self, info: TensorInfo, group: Group, index: int, device: torch.device) -> None:
        """Take stream `index` of `group`; `device` is where the weight is wanted, which the group need not be on."""
        self.info, self.group, self.index, self.device = info, group, index, device
        self.shape = torch.Size(info.shape)

    def view(self, flat: torch.Tensor) -> torch.Tensor:
        """The weight in its group's decoded words [numel]."""
        start = self.group.starts[self.index]
        return flat[start : start + self.shape.numel()].view(self.shape)

    def decode(self) -> torch.Tensor:
        """The weight in memory of its own. The whole group is decoded for it."""
        return self.view(decode(self.group.to(self.device)))


class Coded(Packed):
    """A parameter whose values are a `Part`."""

    store: Part

    @staticmethod
    def __new__(cls, part: Part) -> "Coded":
        """Make the tensor's shell; it holds no values."""
        return torch.Tensor._make_wrapper_subclass(cls, part.shape, dtype=part.group.dtype, device=part.device)

    def __init__(self, part: Part) -> None:
        self.store = part

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Coded({self.store.info.name!r}, {self.dtype}, {list(self.shape)}, {self.device})"

    def lookup(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows by number, any integers [...] -> [..., width], without waiting for the device."""
        return rows(self.store, ids.reshape(-1).long()).view(*ids.shape, *self.shape[1:])


def rows(part: Part, ids: torch.Tensor) -> torch.Tensor:
    """Decode the chunks that some rows lie in, and no others.

    Args:
        part: a weight of one code table, [rows, ...].
        ids: int64 [n], on the weight's device. One out of range is an error of torch's, as in its own embedding.

    Returns:
        [n, ...]. Which chunks they are is worked out on the device; the sizes of all tensors follow from n alone, so a
        CUDA graph can hold it.
    """
    shape, device = part.shape, ids.device
    width, group = shape[1:].numel(), part.group.to(part.device)
    ids = torch.arange(shape[0], device=device).index_select(0, ids)  # the same numbers, which torch has checked
    span, first = _span(width), ids * width
    begin, end = part.group.chunk_starts[part.index : part.index + 2]
    chunks = begin + (first // CHUNK).unsqueeze(1) + torch.arange(span, device=device)  # [n, span]
    words = decode_chunks(group, chunks.clamp(max=end - 1).view(-1)).view(-1)
    places = torch.arange(ids.numel(), device=device) * (span * CHUNK) + first % CHUNK
    if not len(ids):
        return words.new_empty(0, *shape[1:])
    return words.unfold(0, width, 1)[places].view(-1, *shape[1:])  # an index a row, not one a word


def _span(width: int) -> int:
    """Chunks that a row of `width` words touches at most."""
    if CHUNK % width == 0 or width % CHUNK == 0:
        return max(1, width // CHUNK)
    return (width - 2) // CHUNK + 2
