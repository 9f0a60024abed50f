"""Decode official DFloat11 groups to BF16: a CUDA kernel on a GPU, the codec's loops on a processor; the same bits."""

import torch
from tcw.kernels.df11_decode.group import Group, group_of

from tcw.errors import FormatError

__all__ = ["Group", "check", "decode", "group_of"]


def decode(group: Group, out: torch.Tensor | None = None) -> torch.Tensor:
    """Decode all weights of a group.

    Args:
        group: What `group_of` made, or a copy of it on another device.
        out: Where to write, BF16 [numel], contiguous and on a boundary of 16 bytes, on the group's device; None for a
            new tensor.

    Returns:
        `out`. `group.views` splits it into matrices. A stream that is not what its tables say gives wrong weights on a
        GPU, none where it has too few codes, and FormatError on a processor; `check` tells beforehand.
    """
    tensors, sizes = list(group.tensors()), (group.stream_bytes, group.shortest)
    if out is None:
        return torch.ops.tcw.df11_decode(tensors, *sizes)
    torch.ops.tcw.df11_decode_into(tensors, *sizes, out)
    return out


def check(group: Group) -> None:
    """Look at all codes of a group, and wait for the answer. Raises FormatError as the codec of the processor does."""
    if not group.numel:
        return
    if group.device.type == "cpu":
        decode(group)
        return
    from tcw.kernels.df11_decode import launch

    from tcw import cuda

    status = torch.zeros(1, dtype=torch.int32, device=group.device)
    launch.check(cuda.module("df11_decode", group.device), group.tensors(), group.stream_bytes, status)
    refuse(int(status))


def refuse(status: int) -> None:
    """Raise FormatError if a status that `launch.check` left names a block."""
    if status:
        raise FormatError(f"block {-1 - status} of `encoded_exponent` does not decode as its tables say")


@torch.library.custom_op("tcw::df11_decode_into", mutates_args=("out",), device_types="cpu")
def _into(tensors: list[torch.Tensor], stream_bytes: int, shortest: int, out: torch.Tensor) -> None:
    """Decode the tensors of a group, on a processor."""
    from tcw.kernels.df11_decode import cpu

    out.copy_(cpu.decode(tensors, stream_bytes))


@_into.register_kernel("cuda")
def _into_on_gpu(tensors: list[torch.Tensor], stream_bytes: int, shortest: int, out: torch.Tensor) -> None:
    from tcw.kernels.df11_decode import launch

    from tcw import cuda

    launch.decode(cuda.module("df11_decode", out.device), tensors, shortest, out)


@_into.register_fake
def _into_nothing(tensors: list[torch.Tensor], stream_bytes: int, shortest: int, out: torch.Tensor) -> None:
    return None


@torch.library.custom_op("tcw::df11_decode", mutates_args=())
def _new(tensors: list[torch.Tensor], stream_bytes: int, shortest: int) -> torch.Tensor:
    """Decode into a tensor of its own, on any device that `df11_decode_into` knows."""
    out = torch.empty_like(tensors[3], dtype=torch.bfloat16)
    _into(tensors, stream_bytes, shortest, out)
    return out


@_new.register_fake
def _new_shape(tensors: list[torch.Tensor], stream_bytes: int, shortest: int) -> torch.Tensor:
    return torch.empty_like(tensors[3], dtype=torch.bfloat16)
