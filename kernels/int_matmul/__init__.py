"""y = x Wᵀ + b where W has 2, 3, 4 or 8 bits: a Triton kernel on a GPU, plain torch elsewhere."""

import functools

import torch
from tcw.kernels.int_matmul.layout import Layout, Weight, layout_of, repack, turned

__all__ = ["Layout", "Weight", "int_matmul", "layout_of", "repack", "turned"]


def int_matmul(x: torch.Tensor, weight: Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Multiply as `torch.nn.functional.linear` does.

    Args:
        x: BF16, F16 or F32 [..., K].
        weight: W [N, K], on the device of x; one made by `repack` and `turned`.
        bias: [N], or None.

    Returns:
        [..., N], of the dtype of x. Sums are float32, and the same bits at each run on one device.
    """
    layout = weight.layout
    return torch.ops.tcw.int_matmul(
        x, weight.words, weight.scale, weight.zero, bias, layout.bits, layout.group_size, weight.grid
    )


@torch.library.custom_op("tcw::int_matmul", mutates_args=())
def _op(
    x: torch.Tensor, words: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, bias: torch.Tensor | None,
    bits: int, group_size: int, grid: str,
) -> torch.Tensor:  # fmt: skip
    """The operation in plain torch: W is dequantised for this call, and rounded to the dtype of x."""
    weight = Weight(words, scale, zero, Layout(bits, x.shape[-1], group_size), grid)
    y = x @ weight.dequantize().to(x.dtype)
    return y if bias is None else y + bias


@_op.register_kernel("cuda")
def _on_gpu(
    x: torch.Tensor, words: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, bias: torch.Tensor | None,
    bits: int, group_size: int, grid: str,
) -> torch.Tensor:  # fmt: skip
    from tcw.kernels.int_matmul import launch  # triton is there where CUDA is

    weight = Weight(words, scale, zero, Layout(bits, x.shape[-1], group_size), grid)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    if rows.shape[0] == 0:
        return _shape_of(x, words, scale, zero, bias, bits, group_size, grid)
    with torch.cuda.device(x.device):
        y = launch.matmul(rows, weight, bias, launch.path_of(rows.shape[0]), _multiprocessors(x.device))
    return y.view(*x.shape[:-1], -1)


@_op.register_fake
def _shape_of(
    x: torch.Tensor, words: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, bias: torch.Tensor | None,
    bits: int, group_size: int, grid: str,
) -> torch.Tensor:  # fmt: skip
    return x.new_empty(*x.shape[:-1], words.shape[1])


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
