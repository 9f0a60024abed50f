"""How many programs of which size, and starting them: nothing here waits for the device or asks it anything.

All memory beyond the result is torch's (a workspace of parts), so a CUDA graph can hold a call. The sizes come from the
shapes by a few rules; none of them has been tuned on a GPU yet.
"""

import functools
from dataclasses import dataclass

import torch
import triton
from tcw.kernels.kv_dequant_attention import kernel
from tcw.kernels.kv_dequant_attention.layout import Packed
from torch import Tensor

_PROGRAMS = 2  # a multiprocessor, where there are that many tiles
_WHOLE = 1 << 30  # tokens that share a step, where all do: one kernel whatever their number
_FUSED = {"enable_fp_fusion": True}  # multiply-adds; Triton's default is about to change


@dataclass(frozen=True)
class Plan:
    """One launch: `block_r` rows of queries, tiles of `block_n` tokens, `splits` programs a head with `tokens` each."""

    block_r: int
    block_n: int
    tokens: int
    splits: int
    stages: int

    @property
    def warps(self) -> int:
        """Of a program."""
        return 8 if self.block_r > 16 else 4


@functools.lru_cache(maxsize=4096)
def plan(heads: int, rows: int, n: int, size: int, gathered: bool, multiprocessors: int) -> Plan:
    """Choose sizes for `rows` rows of queries on each of `heads` heads and sequences, and n tokens.

    A tile of keys and one of values lie in shared memory, and the codes of the next ones: tokens of many bytes (`size`,
    unpacked) make smaller tiles. Where tokens are `gathered` from blocks, a minimum and a step for each lie there too.
    """
    block_n = 64 if size <= 256 and not gathered else 32 if size <= 512 else 16
    tiles = -(-n // block_n)
    each = -(-tiles // max(1, min(_PROGRAMS * multiprocessors // heads, tiles)))
    stages = 1 if size > 512 else 2 if gathered else 3
    return Plan(max(16, triton.next_power_of_2(rows)), block_n, each * block_n, -(-tiles // each), stages)


def attend(
    queries: Tensor, keys: Packed, values: Packed, scaling: float, real: Tensor | None, bias: Tensor | None,
    multiprocessors: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention over packed keys and values, and the logarithm of the sum of its weights.

    Args:
        queries: BF16, F16 or F32 [B, H, q, D]; H is a multiple of G, and H/G·q no more than 32.
        keys: n tokens of G heads, on the device of the queries.
        values: of the same tokens.
        scaling: what q·k is multiplied with.
        real: bool [B, 1 or G, n], False for tokens that are not there, or None.
        bias: what is added to the logits, a float [B, H, q, n], or None.
        multiprocessors: of the device.

    Returns:
        float32 [B, H, q, Dv] and [B, H, q]; 0 and -inf where no token is there.
    """
    (batch, heads, q, _), (_, groups, n, _) = queries.shape, keys.codes.shape
    rows = heads // groups * q
    shape, device = (batch, heads, q), queries.device
    if n == 0 or batch == 0:
        return torch.zeros(*shape, values.width, device=device), torch.full(shape, -torch.inf, device=device)
    size = triton.next_power_of_2(max(keys.width, values.width)) * queries.element_size()
    gathered = keys.blocks is not None or values.blocks is not None
    chosen = plan(batch * groups, rows, n, size, gathered, multiprocessors)
    parts = torch.empty(chosen.splits, *shape, values.width, dtype=torch.float32, device=device)
    lses = torch.empty(chosen.splits, *shape, dtype=torch.float32, device=device)
    keys, values = keys.contiguous(), values.contiguous()
    real = None if real is None else real.contiguous()
    kernel.attend[chosen.splits, groups, batch](
        queries.contiguous(), *_pointers(keys), *_pointers(values),
        keys.codes if real is None else real.view(torch.uint8), keys.step if bias is None else bias.contiguous(),
        parts, lses, rows, n, chosen.tokens, scaling, *_strides_of(keys), *_strides_of(values),
        *_strides(real), **_sizes("K", keys), **_sizes("V", values),
        HAS_REAL=real is not None, HAS_BIAS=bias is not None, BLOCK_R=chosen.block_r, BLOCK_N=chosen.block_n,
        WIDE=triton.knobs.runtime.interpret, num_warps=chosen.warps, num_stages=chosen.stages, **_FUSED,
    )  # fmt: skip
    if chosen.splits == 1:
        return parts[0], lses[0]
    return merged(parts, lses)


def merged(parts: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """One part of several: float32 [splits, ..., Dv] and [splits, ...]."""
    out, lse = torch.empty_like(parts[0]), torch.empty_like(lses[0])
    width = parts.shape[-1]
    kernel.merge[(lse.numel(),)](
        parts, lses, out, lse, lse.numel(), len(parts), WIDTH=width, BLOCK=triton.next_power_of_2(width), **_FUSED
    )
    return out, lse


def _sizes(name: str, packed: Packed) -> dict[str, int]:
    """What the kernel is compiled for."""
    block = max(16, triton.next_power_of_2(packed.width))
    tokens = _WHOLE if packed.tokens >= packed.codes.shape[2] else packed.tokens
    return {
        f"{name}_BITS": packed.bits,
        f"{name}_WIDTH": packed.width,
        f"{name}_TOKENS": tokens if packed.blocks is None else 0,
        f"{name}_CHANNELS": block if packed.channels >= packed.width else packed.channels,
        f"{name}_SCALED": packed.scale is not None,
        f"BLOCK_{name}": block,
    }


def _pointers(packed: Packed) -> list[Tensor]:
    """What the kernel reads; some pointer where it reads nothing."""
    optional = ((packed.blocks, packed.codes), (packed.scale, packed.step))
    return [packed.codes, packed.minimum, packed.step, *(some if t is None else t for t, some in optional)]


def _strides(held: Tensor | None) -> tuple[int, int]:
    """Elements from one sequence, and from one head, to the next; 0 where all have the same."""
    if held is None:
        return 0, 0
    b, g = (held.stride(axis) if held.shape[axis] > 1 else 0 for axis in (0, 1))
    return b, g


def _strides_of(packed: Packed) -> tuple[int, int, int, int]:
    """The strides of minima and steps, in rows, and those of blocks."""
    b, g = _strides(packed.minimum)
    columns = packed.minimum.shape[-1]
    return b // columns, g // columns, *_strides(packed.blocks)
