"""How the work is shared out, and starting the kernels: nothing here waits for the device or asks it anything.

All memory beyond the result is torch's, so a CUDA graph can hold a call. The plan depends on the sizes and on the
device's multiprocessors alone, not on how W is kept: plain and packed weights are added up in the same order.
"""

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tcw.kernels.packed_matmul.layout import COLUMNS, ROWS, TILE_BYTES, PackedWeight, tiles_of
from torch.nn.functional import pad

MOST_ROWS = 16  # of x
_STAGES = 4
_BLOCKS = 2  # a multiprocessor, where there is that much to share out
_LEAST = 4  # tiles a warp, so that its copies overlap
_SLOT = {"raw": 2048, "p3": TILE_BYTES["p3"] + 128, "p4": TILE_BYTES["p4"] + 32}  # slot_bytes() of kernel.cu
_PLANE = {"raw": 0, "p3": 1024, "p4": 1024}
_WARPS, _REDUCED = 8, 256  # tiles a block unpacks, outputs a block adds up
Weight = PackedWeight | torch.Tensor


@dataclass(frozen=True)
class Plan:
    """One launch: `wide` tiles of rows and as many groups of 8 rows of x a warp, `splits` blocks along K."""

    wide: int
    blocks: int
    splits: int

    @property
    def warps(self) -> int:
        """Warps of a block, which share its part of K."""
        return 8 // self.wide


@functools.lru_cache(maxsize=4096)
def plan(rows: int, n: int, k: int, multiprocessors: int) -> Plan:
    """Choose for x [rows, K] and W [N, K], rows <= 16."""
    wide = 1 if rows <= 8 else 2
    blocks = -(-n // (ROWS * wide))
    room = -(-k // COLUMNS) // (8 // wide * _LEAST)
    return Plan(wide, blocks, max(1, min(_BLOCKS * multiprocessors // blocks, room)))


def shared_bytes(form: str, wide: int) -> int:
    """Dynamic shared memory of a block: `warp_bytes` of kernel.cu for each of its warps."""
    return (8 // wide) * (_STAGES * wide * _SLOT[form] + _PLANE[form])


def matmul(module: Any, x: torch.Tensor, weight: Weight, bias: torch.Tensor | None) -> torch.Tensor:
    """Y = x Wᵀ + b in the kernel.

    Args:
        module: the kernels: `tcw.cuda.module("packed_matmul", x.device)`, or a stand-in.
        x: BF16 [M, K], M <= 16.
        weight: W [N, K] on the device of x: packed, or plain BF16.
        bias: BF16 [N] or None.

    Returns:
        BF16 [M, N].
    """
    (m, k), n = x.shape, weight.shape[0]
    y = x.new_empty(m, n)
    if m == 0 or n == 0:
        return y
    form, operands, columns = _operands(weight)
    chosen = plan(m, n, k, module.multiprocessors)
    partial = None if chosen.splits == 1 else x.new_empty(chosen.splits, m, n, dtype=torch.float32)
    bias = None if bias is None else bias.contiguous()
    module.launch(
        f"{form}_{'narrow' if chosen.wide == 1 else 'wide'}", (chosen.blocks, chosen.splits), 32 * chosen.warps,
        [*operands, _aligned(x, COLUMNS), bias, y, partial, *map(np.uint32, (m, n, columns))],
        shared_bytes(form, chosen.wide),
    )  # fmt: skip
    if partial is not None:
        sizes = map(np.uint32, (m * n, n, chosen.splits))
        module.launch("reduce", -(-m * n // _REDUCED), _REDUCED, [partial, bias, y, *sizes])
    return y


def unpack(module: Any, weight: PackedWeight, out: torch.Tensor) -> None:
    """Write a packed weight's values to `out`, BF16 [N, K], contiguous, on its device."""
    n, k = weight.shape
    aligned = k % 8 == 0 and out.data_ptr() % 16 == 0
    module.launch(
        f"{weight.form}_unpack", -(-tiles_of(weight.shape) // _WARPS), 32 * _WARPS,
        [*_packed(weight), out, *map(np.uint32, (n, k, aligned))], _WARPS * _PLANE[weight.form],
    )  # fmt: skip


def _operands(weight: Weight) -> tuple[str, list[Any], int]:
    """The name of a weight's form, what a kernel is told of it, and its columns as the kernel sees them."""
    if isinstance(weight, PackedWeight):
        return weight.form, _packed(weight), weight.shape[1]
    plain = _aligned(weight, 8)  # every row begins at a multiple of 16 bytes, as those of models do
    return "raw", [plain], plain.shape[1]


def _packed(weight: PackedWeight) -> list[Any]:
    """What a kernel is told of a packed weight. Raises ValueError where its memory is not aligned."""
    if weight.tiles.data_ptr() % 16 or weight.escapes.data_ptr() % 16:
        raise ValueError("tiles and escapes of a packed weight must begin at multiples of 16 bytes")
    low, high = (sum(v << 8 * i for i, v in enumerate(weight.palette[at : at + 4])) for at in (0, 4))
    return [*weight.tensors(), np.uint32(low), np.uint32(high)]


def _aligned(tensor: torch.Tensor, columns: int) -> torch.Tensor:
    """Contiguous, from a multiple of 16 bytes on, filled up with zeros to a multiple of `columns`; mostly no copy."""
    over = -tensor.shape[1] % columns
    tensor = pad(tensor, (0, over)) if over else tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % 16 else tensor
