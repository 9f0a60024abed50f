"""Start the kernels: nothing here waits for the device. `reference.py` says what each step takes and gives."""

from typing import Any

import numpy as np
import torch
from tcw.kernels.lanes_encode.reference import COUNTED

from tcw.codecs.lanes_layout import GROUP, LANES, SPLITS, chunks_of

THREADS = 256  # of a block; the kernels know it
_WARPS = THREADS // 32
_BLOCKS = 8  # a multiprocessor: as many as fit on most
_QUADS = 4  # that a thread counts, where there is so much to do
_SHARED = 40 << 10  # bytes that the copies of a block's chunks may take: with the table, what a block gets unasked


def count(module: Any, words: torch.Tensor, split: str) -> torch.Tensor:
    """Count symbols; `module` is what tcw.cuda.module("lanes_encode", device) gives."""
    words = _aligned(words)
    parts = words.split(COUNTED) or (words,)
    counts = torch.zeros(len(parts), SPLITS[split].mask + 1, dtype=torch.int32, device=words.device)
    for part, row in zip(parts, counts, strict=True):
        blocks = _blocks(module, part.numel(), THREADS * GROUP * _QUADS)
        module.launch(f"count_{split}", blocks, THREADS, [part, np.uint32(part.numel()), row])
    return counts


def measure(
    module: Any, words: torch.Tensor, table: torch.Tensor, split: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Find the size of each lane and write the planes."""
    how, n, words = SPLITS[split], words.numel(), _aligned(words)
    lane_bytes = words.new_empty(LANES * chunks_of(n), dtype=torch.uint8)
    raw = words.new_empty(n if how.has_raw else 0, dtype=torch.uint8)
    low = words.new_empty(n if how.has_low else 0, dtype=torch.int16)
    planes = [raw if how.has_raw else None, low if how.has_low else None]
    blocks = _blocks(module, chunks_of(n), _WARPS)
    module.launch(f"measure_{split}", blocks, THREADS, [words, np.uint64(n), table, lane_bytes, *planes])
    return lane_bytes, raw, low


def write(
    module: Any, words: torch.Tensor, table: torch.Tensor, split: str, lane_bytes: torch.Tensor,
    chunk_base: torch.Tensor, room: int, codes: torch.Tensor,
) -> None:  # fmt: skip
    """Write the codes."""
    n, words = words.numel(), _aligned(words)
    warps = _WARPS if _WARPS * room <= _SHARED else _WARPS // 2  # 4 of 6,160 bytes always fit
    blocks = _blocks(module, chunks_of(n), warps)
    args = [words, np.uint64(n), table, lane_bytes, chunk_base, codes, np.uint32(room)]
    module.launch(f"write_{split}", blocks, 32 * warps, args, shared=warps * room)


def _aligned(words: torch.Tensor) -> torch.Tensor:
    """The words where a thread can load four at once: a segment, or a slice of a tensor, may begin anywhere."""
    return words if words.data_ptr() % (GROUP * words.element_size()) == 0 else words.clone()


def _blocks(module: Any, work: int, of_a_block: int) -> int:
    return min(-(-work // of_a_block), _BLOCKS * module.multiprocessors)
