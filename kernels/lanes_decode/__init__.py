"""Decode `lanes` streams: a CUDA kernel on a GPU, the codec's loops on a processor; the same bits on both."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from tcw.kernels.lanes_decode.group import DTYPES, Group, group

from tcw.codecs import lanes
from tcw.codecs.lanes_layout import CHUNK, LANES
from tcw.cuda.ops import define
from tcw.errors import FormatError

__all__ = ["Group", "check", "decode", "decode_checked", "decode_chunks", "decode_stream", "group"]


def decode(group: Group, out: torch.Tensor | None = None, status: torch.Tensor | None = None) -> torch.Tensor:
    """Decode all streams of a group at once.

    Args:
        group: What `group` made, or a copy of it on another device.
        out: Where to write, [numel] or more of the split's dtype, contiguous, on the group's device; None for a new
            tensor.
        status: int32 [1] on the group's device, 0 at first; becomes 1 + the number (chunk * 32 + lane) of a lane that
            does not end with its last code. None: damaged codes give wrong words, on a CPU a FormatError.

    Returns:
        `out`: the words of stream k begin at starts[k]. What lies between two streams is not written.
    """
    tensors = list(group.tensors())
    if out is None and status is None:
        return torch.ops.tcw.lanes_decode(tensors, group.split, group.numel, group.shared)
    if out is None:
        out = torch.empty(group.numel, dtype=group.dtype, device=group.device)
    _fits(out, group, group.numel)
    torch.ops.tcw.lanes_decode_into(tensors, group.split, group.shared, out, status)
    return out


def decode_chunks(group: Group, chunks: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Decode some chunks of a group: 4,096 words each, such as those that rows of an embedding lie in.

    A stream's chunks begin where it or one of its segments does, so that chunk c of a stream without segments has its
    words 4096 c, 4096 c + 1, ... Chunks of a group are counted through, stream by stream; see `Group.chunk_starts`.

    Args:
        group: What `group` made, or a copy of it on another device.
        chunks: Their numbers, int64 or int32 [m], on the group's device; nothing waits for their values, so that one
            that the group does not have is taken for its first or last chunk.
        out: Where to write, [m, 4096] of the split's dtype, contiguous; None for a new tensor.

    Returns:
        `out`: row k has the words of chunk chunks[k]; past the end of a stream or segment anything.
    """
    if out is None:
        out = torch.empty(len(chunks), CHUNK, dtype=group.dtype, device=group.device)
    _fits(out, group, len(chunks) * CHUNK)
    tensors = list(group.tensors())
    tensors[3] = _single(group.units, chunks)
    torch.ops.tcw.lanes_decode_into(tensors, group.split, group.shared, out.view(-1), None)
    return out


def _single(units: torch.Tensor, chunks: torch.Tensor) -> torch.Tensor:
    """Units of one chunk each, int64 [m, 6], whose words go to rows 0, 1, ... of the output."""
    wanted = chunks.to(torch.int64).clamp(min=0).minimum(units[-1, 1] - 1)
    of = units[torch.searchsorted(units[:, 1].contiguous(), wanted, right=True)]
    first = of[:, 2] + (wanted - of[:, 0]) * CHUNK
    place = torch.arange(len(wanted), device=units.device) * CHUNK
    return torch.stack([wanted, wanted + 1, first, torch.minimum(of[:, 3], first + CHUNK), of[:, 4], place], dim=1)


def decode_checked(group: Group) -> torch.Tensor:
    """As `decode`, and wait for it. Raises FormatError when a lane does not end with its last code."""
    status = torch.zeros(1, dtype=torch.int32, device=group.device)
    words = decode(group, status=status)
    _refuse(int(status))
    return words


def check(group: Group) -> None:
    """Decode a group once, and wait for it. Raises FormatError when a lane does not end with its last code."""
    decode_checked(group)


def decode_stream(parts: Mapping[str, np.ndarray], params: Mapping[str, Any], numel: int) -> np.ndarray:
    """Decode on the processor: the words of a stream, or its integers where it holds integers. Raises FormatError."""
    if "offset" in params:
        return lanes.decode_integers(parts, params, numel)
    return lanes.decode(parts, params, numel)


def _fits(out: torch.Tensor, group: Group, numel: int) -> None:
    if (out.dtype, out.device) != (group.dtype, group.device) or out.numel() < numel or not out.is_contiguous():
        raise ValueError(f"`out` is not {numel} contiguous {group.dtype} on {group.device}")


def _refuse(status: int) -> None:
    if status:
        bad = status - 1
        raise FormatError(f"lanes: lane {bad % LANES} of chunk {bad // LANES} does not end with its last code")


def _into_on_cpu(
    tensors: list[torch.Tensor], split: str, shared: int, out: torch.Tensor, status: torch.Tensor | None
) -> None:
    """Decode the tensors of a group, on a processor."""
    from tcw.kernels.lanes_decode import cpu

    bad = cpu.decode(tensors, split, out)
    if status is None:
        _refuse(bad)
    else:
        status.clamp_(min=bad)


def _into_on_gpu(
    tensors: list[torch.Tensor], split: str, shared: int, out: torch.Tensor, status: torch.Tensor | None
) -> None:
    from tcw.kernels.lanes_decode import launch

    from tcw import cuda

    launch.decode(cuda.module("lanes_decode", out.device), tensors, split, shared, out, status)


def _into_nothing(
    tensors: list[torch.Tensor], split: str, shared: int, out: torch.Tensor, status: torch.Tensor | None
) -> None:
    return None


def _new(tensors: list[torch.Tensor], split: str, numel: int, shared: int) -> torch.Tensor:
    """Decode into a tensor of its own, on any device that `lanes_decode_into` knows."""
    out = tensors[0].new_empty(numel, dtype=DTYPES[split])
    torch.ops.tcw.lanes_decode_into(tensors, split, shared, out, None)
    return out


def _new_shape(tensors: list[torch.Tensor], split: str, numel: int, shared: int) -> torch.Tensor:
    return tensors[0].new_empty(numel, dtype=DTYPES[split])


define("lanes_decode_into", cpu=_into_on_cpu, cuda=_into_on_gpu, fake=_into_nothing, mutates=["out", "status"])
define("lanes_decode", cpu=_new, cuda=_new, fake=_new_shape)
