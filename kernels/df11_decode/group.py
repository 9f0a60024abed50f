"""The arrays of an official group, checked, and as the kernel takes them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from tcw.kernels.df11_decode import tables

from tcw.codecs import df11
from tcw.codecs.df11_stream import BLOCK_BYTES
from tcw.codecs.df11_tables import POINTER, check_luts
from tcw.errors import FormatError

STREAM_PAD = 16  # bytes behind the last block, zeros: its last thread reads the next one's first word
GAP_BYTES = 320  # of a block


@dataclass(frozen=True)
class Group:
    """One official group, checked, which one launch decodes.

    Attributes:
        sizes: Weights of each matrix; they lie one after the other.
        stream_bytes: Bytes of `encoded_exponent`.
        shortest: Bits of the shortest code.
        stream: uint8 [4096 blocks + 16], `encoded_exponent` and zeros.
        gaps: uint8 [320 blocks].
        positions: int32 [blocks + 1], weights before each block; the last is their number.
        rest: uint8 [numel], `sign_mantissa`.
        luts: uint8 [rows + 1, 256].
        tables: uint8 [8192 + 512 rows], see tables.py.
    """

    sizes: tuple[int, ...]
    stream_bytes: int
    shortest: int
    stream: torch.Tensor
    gaps: torch.Tensor
    positions: torch.Tensor
    rest: torch.Tensor
    luts: torch.Tensor
    tables: torch.Tensor

    @property
    def numel(self) -> int:
        """Weights in all."""
        return self.rest.numel()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors())

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.stream.device

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All tensors, in the order that `with_tensors` takes."""
        return self.stream, self.gaps, self.positions, self.rest, self.luts, self.tables

    def with_tensors(self, tensors: Sequence[torch.Tensor]) -> "Group":
        """The same group with other tensors of the same shapes and dtypes, such as copies on another device."""
        if [(t.shape, t.dtype) for t in tensors] != [(t.shape, t.dtype) for t in self.tensors()]:
            raise ValueError("these are not the tensors of this group")
        names = ("stream", "gaps", "positions", "rest", "luts", "tables")
        return replace(self, **dict(zip(names, tensors, strict=True)))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Group":
        """The group on a device."""
        return self.with_tensors([tensor.to(device, non_blocking=non_blocking) for tensor in self.tensors()])

    def pin_memory(self) -> "Group":
        """The group in page-locked memory, from which copies to a GPU run in the background."""
        return self.with_tensors([tensor.pin_memory() for tensor in self.tensors()])

    def views(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """Each matrix's weights, [size]: views of the decoded weights [numel]."""
        return list(flat.split(self.sizes))


def group_of(
    luts: np.ndarray,
    encoded_exponent: np.ndarray,
    sign_mantissa: np.ndarray,
    output_positions: np.ndarray,
    gaps: np.ndarray,
    split_positions: np.ndarray | None = None,
) -> Group:
    """Check the six arrays of a group, as tcw/codecs/df11.py lists them, and bring them into the kernel's form.

    The names are those of `tcw.codecs.df11.Group`, so `group_of(**vars(encoded))` takes one. What a stream says is not
    looked at (`check` does that), only what the kernel takes addresses and sizes from. `sign_mantissa` is not copied
    where it can be written to.

    Raises:
        FormatError: The arrays do not fit each other.
    """
    n, size = sign_mantissa.size, encoded_exponent.size
    for name, array in (("encoded_exponent", encoded_exponent), ("sign_mantissa", sign_mantissa), ("gaps", gaps)):
        if array.dtype != np.uint8 or array.ndim != 1:
            raise FormatError(f"`{name}` should be bytes of one dimension, it is {array.dtype} {list(array.shape)}")
    check_luts(luts)
    positions = df11.read_positions(output_positions, size, n)
    blocks = len(positions) - 1
    if gaps.size != GAP_BYTES * blocks:
        raise FormatError(f"`gaps` should have {GAP_BYTES * blocks} bytes, it has {gaps.size}")
    stream = np.zeros(BLOCK_BYTES * blocks + STREAM_PAD, dtype=np.uint8)
    stream[:size] = encoded_exponent
    rows = luts[:-1]
    return Group(
        sizes=_sizes(split_positions, n),
        stream_bytes=size,
        shortest=int(luts[-1][rows[rows < POINTER]].min()),
        stream=torch.from_numpy(stream),
        gaps=_tensor(gaps),
        positions=torch.from_numpy(positions.astype(np.int32)),
        rest=_tensor(sign_mantissa),
        luts=_tensor(luts),
        tables=torch.from_numpy(tables.build(luts)),
    )


def _sizes(split_positions: np.ndarray | None, n: int) -> tuple[int, ...]:
    bounds = [0, *([] if split_positions is None else split_positions.tolist()), n]
    if any(a > b for a, b in pairwise(bounds)):
        raise FormatError(f"`split_positions` does not rise from 0 to {n}")
    return tuple(b - a for a, b in pairwise(bounds))


def _tensor(array: np.ndarray) -> torch.Tensor:
    """A tensor over the same memory where torch may have it: torch tensors can be written to."""
    return torch.from_numpy(np.require(array, requirements=["C", "W", "A"]))
