"""y = x Wᵀ + b where BF16 weights take 12 or 11.4 bits, to the last bit: a CUDA kernel that decodes as it multiplies.

weight = pack(W)                            once, on W's device; None where it does not pay
y = packed_matmul(x, weight, bias)          up to 16 rows of x in one kernel; more: unpacked for this call
y == raw_matmul(x, W, bias)                 the same kernel on plain weights, the same bits
"""

from collections.abc import Sequence

import torch
from tcw.kernels.packed_matmul.launch import MOST_ROWS
from tcw.kernels.packed_matmul.layout import FORMS, PackedWeight, pack
from tcw.kernels.packed_matmul.unpacking import unpack_in_torch
from torch.nn.functional import linear

from tcw.cuda.ops import define

__all__ = ["MOST_ROWS", "PackedWeight", "pack", "packed_matmul", "raw_matmul", "unpack"]


def packed_matmul(
    x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None = None, scratch: torch.Tensor | None = None
) -> torch.Tensor:
    """Multiply as `torch.nn.functional.linear` does, with a packed weight.

    Args:
        x: BF16 [..., K].
        weight: W [N, K], on the device of x.
        bias: BF16 [N], or None.
        scratch: BF16 of N·K elements or more, contiguous, for what is unpacked above 16 rows; new memory if None.

    Returns:
        BF16 [..., N]: float32 sums, rounded once, the same bits at each run on one device. Above 16 rows it is the
        `linear` of the unpacked weight.

    Raises:
        ValueError: the operands do not fit.
    """
    _fit(x, weight.shape, bias)
    if _rows(x) > MOST_ROWS:
        n, k = weight.shape
        return linear(x, unpack(weight, None if scratch is None else scratch.view(-1)[: n * k].view(n, k)), bias)
    y = torch.ops.tcw.packed_matmul(
        x.reshape(-1, x.shape[-1]), *weight.tensors(), bias, list(weight.palette), weight.shape[0]
    )
    return y.view(*x.shape[:-1], weight.shape[0])


def raw_matmul(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Multiply with a plain weight in the kernel of `packed_matmul`: the same bits as with the packed one.

    Args and result are those of `packed_matmul`, but for `weight`: BF16 [N, K]. Where K is no multiple of 8, or the
    weight does not begin at a multiple of 16 bytes, it is copied at each call. Raises ValueError likewise.
    """
    if weight.dtype != torch.bfloat16 or weight.dim() != 2:
        raise ValueError(f"the weight is {weight.dtype} {list(weight.shape)}, not a BF16 matrix")
    _fit(x, weight.shape, bias)
    if _rows(x) > MOST_ROWS:
        return linear(x, weight, bias)
    y = torch.ops.tcw.raw_matmul(x.reshape(-1, x.shape[-1]), weight, bias)
    return y.view(*x.shape[:-1], weight.shape[0])


def unpack(weight: PackedWeight, out: torch.Tensor | None = None) -> torch.Tensor:
    """Make a weight plain again.

    Args:
        weight: W [N, K].
        out: BF16 [N, K], contiguous, on the device of W, to be written; a new tensor if None.

    Returns:
        `out`.

    Raises:
        ValueError: `out` is something else.
    """
    if out is None:
        out = torch.empty(weight.shape, dtype=torch.bfloat16, device=weight.device)
    elif out.shape != weight.shape or out.dtype != torch.bfloat16 or not out.is_contiguous():
        raise ValueError(f"out is {out.dtype} {list(out.shape)}, not BF16 {list(weight.shape)}, or is not contiguous")
    torch.ops.tcw.packed_unpack(*weight.tensors(), list(weight.palette), out)
    return out


def _rows(x: torch.Tensor) -> int:
    return x.shape[:-1].numel()


def _fit(x: torch.Tensor, shape: Sequence[int], bias: torch.Tensor | None) -> None:
    """Hold the operands of a product against each other. Raises ValueError."""
    if x.dtype != torch.bfloat16 or x.dim() == 0 or x.shape[-1] != shape[1]:
        raise ValueError(f"x is {x.dtype} {list(x.shape)}, not BF16 [..., {shape[1]}]")
    if bias is not None and (bias.dtype != torch.bfloat16 or list(bias.shape) != [shape[0]]):
        raise ValueError(f"the bias is {bias.dtype} {list(bias.shape)}, not BF16 [{shape[0]}]")


def _packed_on_cpu(
    x: torch.Tensor, tiles: torch.Tensor, index: torch.Tensor, base: torch.Tensor, escapes: torch.Tensor,
    bias: torch.Tensor | None, palette: Sequence[int], n: int,
) -> torch.Tensor:  # fmt: skip
    """The operation in plain torch, for x [rows, K]."""
    weight = PackedWeight(FORMS[len(palette)], (n, x.shape[1]), tuple(palette), tiles, index, base, escapes)
    plain = x.new_empty(weight.shape)
    unpack_in_torch(weight, plain)
    return linear(x, plain, bias)


def _packed_on_gpu(
    x: torch.Tensor, tiles: torch.Tensor, index: torch.Tensor, base: torch.Tensor, escapes: torch.Tensor,
    bias: torch.Tensor | None, palette: Sequence[int], n: int,
) -> torch.Tensor:  # fmt: skip
    from tcw.kernels.packed_matmul import launch

    from tcw import cuda

    weight = PackedWeight(FORMS[len(palette)], (n, x.shape[1]), tuple(palette), tiles, index, base, escapes)
    return launch.matmul(cuda.module("packed_matmul", x.device), x, weight, bias)


def _packed_shape(
    x: torch.Tensor, tiles: torch.Tensor, index: torch.Tensor, base: torch.Tensor, escapes: torch.Tensor,
    bias: torch.Tensor | None, palette: Sequence[int], n: int,
) -> torch.Tensor:  # fmt: skip
    return x.new_empty(x.shape[0], n)


def _raw_on_cpu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The operation in plain torch, for x [rows, K]."""
    return linear(x, weight, bias)


def _raw_on_gpu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    from tcw.kernels.packed_matmul import launch

    from tcw import cuda

    return launch.matmul(cuda.module("packed_matmul", x.device), x, weight, bias)


def _raw_shape(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _unpack_on_cpu(
    tiles: torch.Tensor, index: torch.Tensor, base: torch.Tensor, escapes: torch.Tensor, palette: Sequence[int],
    out: torch.Tensor,
) -> None:  # fmt: skip
    """Unpacking in plain torch."""
    unpack_in_torch(
        PackedWeight(FORMS[len(palette)], tuple(out.shape), tuple(palette), tiles, index, base, escapes), out
    )


def _unpack_on_gpu(
    tiles: torch.Tensor, index: torch.Tensor, base: torch.Tensor, escapes: torch.Tensor, palette: Sequence[int],
    out: torch.Tensor,
) -> None:  # fmt: skip
    from tcw.kernels.packed_matmul import launch

    from tcw import cuda

    weight = PackedWeight(FORMS[len(palette)], tuple(out.shape), tuple(palette), tiles, index, base, escapes)
    launch.unpack(cuda.module("packed_matmul", out.device), weight, out)


def _unpack_shape(
    tiles: torch.Tensor, index: torch.Tensor, base: torch.Tensor, escapes: torch.Tensor, palette: Sequence[int],
    out: torch.Tensor,
) -> None:  # fmt: skip
    return None


define("packed_matmul", cpu=_packed_on_cpu, cuda=_packed_on_gpu, fake=_packed_shape)
define("raw_matmul", cpu=_raw_on_cpu, cuda=_raw_on_gpu, fake=_raw_shape)
define("packed_unpack", cpu=_unpack_on_cpu, cuda=_unpack_on_gpu, fake=_unpack_shape, mutates=["out"])
