"""How many programs of which size, and starting them: nothing here waits for the device or asks it anything.

All memory beyond the result is torch's (a workspace of partial sums, or the dequantised weight), so a CUDA graph can
hold a call. The sizes come from the shapes by a few rules; none of them has been tuned on a GPU yet.
"""

import functools
from dataclasses import dataclass

import torch
import triton
from tcw.kernels.int_matmul import kernel
from tcw.kernels.int_matmul.layout import Weight

GEMV_ROWS, GEMM_ROWS = 4, 64  # of x; above that W is dequantised
_COLUMNS = {"gemv": 256, "gemm": 128, "dequantize": 128}  # of W's transpose, a program; a warp reads 16 bytes a lane
_PROGRAMS = {"gemv": 4, "gemm": 2, "dequantize": 1}  # a multiprocessor, where there is that much to share out
_FUSED = {"enable_fp_fusion": True}  # multiply-adds; Triton's default is about to change


@dataclass(frozen=True)
class Plan:
    """One launch: BLOCK_M rows of x and BLOCK_W words a tile; `splits` programs share the `tiles` along K."""

    block_m: int
    block_w: int
    tiles_per_group: int
    tiles: int
    tiles_per_program: int

    @property
    def splits(self) -> int:
        """Partial sums for each y."""
        return -(-self.tiles // self.tiles_per_program)


def path_of(rows: int) -> str:
    """Which way a product with `rows` rows of x goes: "gemv", "gemm" or "dequantize"."""
    return "gemv" if rows <= GEMV_ROWS else "gemm" if rows <= GEMM_ROWS else "dequantize"


@functools.lru_cache(maxsize=4096)
def plan(path: str, rows: int, columns: int, bits: int, group: tuple[int, int], multiprocessors: int) -> Plan:
    """Choose sizes for x [rows, K] and W [columns, K], where a row of W has group[0] groups of group[1] words."""
    groups, words = group
    fields = {2: 16, 3: 16, 4: 8, 8: 4}[bits]  # that a word takes in a tile of `gemm`
    if path == "gemm":
        block_m = max(16, triton.next_power_of_2(rows))
        block_w = max(16 // fields, min(64 // fields, triton.next_power_of_2(words)))
    else:
        block_m, block_w = triton.next_power_of_2(rows), min(4, triton.next_power_of_2(words))
    tiles_per_group = -(-words // block_w)
    tiles = groups * tiles_per_group
    wanted = _PROGRAMS[path] * multiprocessors // -(-columns // _COLUMNS[path])
    return Plan(block_m, block_w, tiles_per_group, tiles, -(-tiles // max(1, min(wanted, tiles))))


def matmul(x: torch.Tensor, weight: Weight, bias: torch.Tensor | None, path: str, multiprocessors: int) -> torch.Tensor:
    """Y = x Wᵀ + b by one of the ways of `path_of`.

    Args:
        x: BF16, F16 or F32 [M, K], contiguous; M <= 4 for "gemv", <= 64 for "gemm".
        weight: W [N, K], on the device of x.
        bias: [N] or None.
        path: "gemv", "gemm" or "dequantize".
        multiprocessors: of the device.

    Returns:
        [M, N], of the dtype of x.
    """
    if path == "dequantize":
        y = x @ dequantized(weight, x.dtype)
        return y if bias is None else y + bias
    (m, k), n, layout = x.shape, weight.words.shape[1], weight.layout
    chosen = plan(path, m, n, layout.bits, (layout.groups, layout.words_per_group), multiprocessors)
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    whole = chosen.splits == 1
    out = y if whole else torch.empty(chosen.splits, m, n, dtype=torch.float32, device=x.device)
    b = weight.scale if bias is None else bias  # some pointer
    zero = weight.scale if weight.zero is None else weight.zero
    wide = {"WIDE": triton.knobs.runtime.interpret} if path == "gemm" else {}
    getattr(kernel, path)[-(-n // _COLUMNS[path]), chosen.splits](
        x, weight.words, weight.scale, zero, b, out, m, n, k, layout.group_size, layout.words_per_group,
        chosen.tiles_per_group, chosen.tiles, chosen.tiles_per_program, BITS=layout.bits, GRID=weight.grid,
        HAS_BIAS=whole and bias is not None, BLOCK_M=chosen.block_m, BLOCK_W=chosen.block_w,
        BLOCK_N=_COLUMNS[path], num_warps=8 if chosen.block_m > 32 else 4, **wide, **_FUSED,
    )  # fmt: skip
    if not whole:
        kernel.reduce[(-(-m * n // 512),)](
            out, b, y, m * n, n, chosen.splits, HAS_BIAS=bias is not None, BLOCK=512, **_FUSED
        )
    return y


def dequantized(weight: Weight, dtype: torch.dtype) -> torch.Tensor:
    """W transposed, [K, N], of `dtype`."""
    n, layout = weight.words.shape[1], weight.layout
    chosen = plan("dequantize", 1, n, layout.bits, (layout.groups, layout.words_per_group), 1)
    out = torch.empty(layout.columns, n, dtype=dtype, device=weight.words.device)
    columns = _COLUMNS["dequantize"]
    kernel.dequantize[-(-n // columns), chosen.tiles](
        weight.words, weight.scale, weight.scale if weight.zero is None else weight.zero, out, n, layout.columns,
        layout.group_size, layout.words_per_group, chosen.tiles_per_group, BITS=layout.bits, GRID=weight.grid,
        BLOCK_W=chosen.block_w, BLOCK_N=columns, **_FUSED,
    )  # fmt: skip
    return out
