"""Which kernel, how many blocks of threads and how much shared memory; nothing here waits for the device.

The sizes are reasoned (README.md), none of them has been tuned on a GPU yet.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tcw.kernels.df11_decode.tables import ENTRIES_BYTES

THREADS, CHECK_THREADS = 256, 512
RESIDENT = {"decode_64": 6, "decode_128": 4}  # blocks of a multiprocessor, as far as registers go
_RESERVED = 1024  # bytes of shared memory that each block takes besides
_WARPS, _WARP, _WORD = 8, 32, 4
_ALIGN = {"stream": 16, "gaps": 1, "positions": 4, "rest": 8, "luts": 1, "tables": 16}  # bytes


def decode(module: Any, tensors: Sequence[torch.Tensor], shortest: int, out: torch.Tensor) -> None:
    """Decode a group on the module's device.

    Args:
        module: The op's kernels: `tcw.cuda.Module`, or what has its `launch`.
        tensors: Of a `Group`.
        shortest: Bits of its shortest code.
        out: BF16 [numel], contiguous, on a boundary of 16 bytes.
    """
    stream, gaps, positions, rest, _, tables = tensors
    blocks = _blocks(tensors)
    _need(out.dtype == torch.bfloat16 and out.shape == rest.shape, f"`out` is {out.dtype} {list(out.shape)}")
    _need(out.is_contiguous() and out.data_ptr() % 16 == 0, "`out` is not contiguous, or not aligned to 16 bytes")
    name, words = ("decode_64", 16) if shortest >= 2 else ("decode_128", 32)
    shared = tables.numel() + _WARPS * _WARP * (words + 1) * _WORD
    fitting = (module.shared_limit + _RESERVED) // (shared + 2 * _WARPS * _WORD + _RESERVED)
    grid = min(blocks, module.multiprocessors * max(1, min(RESIDENT[name], fitting)))
    sizes = [np.uint32(rest.numel()), np.uint32(blocks)]
    args = [tables, np.uint32(tables.numel()), stream, gaps, positions, rest, out, *sizes]
    module.launch(name, grid, THREADS, args, shared)


def check(module: Any, tensors: Sequence[torch.Tensor], stream_bytes: int, status: torch.Tensor) -> None:
    """Look whether the stream of a group is what its tables, gaps and positions say.

    Args:
        module: As for `decode`.
        tensors: Of a `Group`.
        stream_bytes: Of the stream, without padding.
        status: int32 [1], 0 at first; where block b is not valid it becomes -1 - b, that of the first such block.
    """
    stream, gaps, positions, rest, _, tables = tensors
    blocks = _blocks(tensors)
    sizes = [np.uint32(rest.numel()), np.uint64(stream_bytes), np.uint32(blocks)]
    args = [tables, np.uint32(tables.numel()), stream, gaps, positions, *sizes, status]
    module.launch("check", blocks, CHECK_THREADS, args, tables.numel() - ENTRIES_BYTES)


def _blocks(tensors: Sequence[torch.Tensor]) -> int:
    """Blocks of the stream. ValueError where the tensors are not those of one group."""
    for (name, align), tensor in zip(_ALIGN.items(), tensors, strict=True):
        _need(tensor.data_ptr() % align == 0, f"`{name}` is not aligned to {align} bytes")
    stream, gaps, positions, _, luts, tables = tensors
    blocks = positions.numel() - 1
    _need(stream.numel() == 4096 * blocks + 16 and gaps.numel() == 320 * blocks, "stream, gaps and positions differ")
    _need(tables.numel() == ENTRIES_BYTES + 512 * (len(luts) - 1), "`tables` is not that of `luts`")
    return blocks


def _need(fine: bool, what: str) -> None:
    if not fine:
        raise ValueError(what)
