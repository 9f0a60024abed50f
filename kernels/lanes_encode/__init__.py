"""Encode words as a `lanes` stream on a GPU, byte for byte what tcw.codecs.lanes.encode makes on a processor."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from tcw.kernels.lanes_encode import reference
from tcw.kernels.lanes_encode.stream import DeviceStream, Steps, as_words, encode_with

from tcw.codecs import lanes
from tcw.codecs.lanes_layout import LANES, LONGEST, SPLITS, chunks_of

__all__ = ["DeviceStream", "encode"]


def encode(
    words: torch.Tensor,
    split: str,
    *,
    segments: Sequence[int] | None = None,
    max_length: int = LONGEST,
    module: Any = None,
) -> DeviceStream:
    """Code a tensor where it is.

    On a GPU this waits for the device twice: codes are chosen on the host from the counts of symbols, and the codes'
    memory is allocated when their size is known. The words must not change meanwhile.

    Args:
        words: Any shape, and any dtype of the size of the split's words: a BF16 weight, say. Any bit pattern is kept.
        split: "bf16", "f16", "f32", "u8" or "u16".
        segments: Sizes that sum to the number of words, each with a table of its own; None for one table.
        max_length: Longest code in bits, 1..12.
        module: What runs the kernels; None for `tcw.cuda.module` of the tensor's device. On a processor, None means
            the codec.

    Returns:
        The stream, its parts on the device of `words`.

    Raises:
        NotCodable: A segment has more than 2^max_length different symbols, or the codes reach 4 GiB.
        NoGpu: The kernels cannot be compiled or loaded.
    """
    if module is not None:
        from tcw.kernels.lanes_encode import launch

        kernels = Steps(*(functools.partial(step, module) for step in (launch.count, launch.measure, launch.write)))
        return encode_with(kernels, words, split, segments, max_length)
    if words.device.type == "cpu":
        array = as_words(words, split).numpy().view(SPLITS[split].word)
        stream = lanes.encode(array, split, segments=segments, max_length=max_length)
        return DeviceStream({name: torch.from_numpy(part) for name, part in stream.parts.items()}, stream.params)
    return encode_with(OPERATIONS, words, split, segments, max_length)


@torch.library.custom_op("tcw::lanes_count", mutates_args=())
def _count(words: torch.Tensor, split: str) -> torch.Tensor:
    """How often each symbol occurs: `reference.count`."""
    return reference.count(words, split)


@_count.register_kernel("cuda")
def _count_on_gpu(words: torch.Tensor, split: str) -> torch.Tensor:
    from tcw.kernels.lanes_encode import launch

    return launch.count(_module(words), words, split)


@_count.register_fake
def _count_shape(words: torch.Tensor, split: str) -> torch.Tensor:
    rows = max(1, -(-words.numel() // reference.COUNTED))
    return words.new_empty(rows, SPLITS[split].mask + 1, dtype=torch.int32)


@torch.library.custom_op("tcw::lanes_measure", mutates_args=())
def _measure(words: torch.Tensor, table: torch.Tensor, split: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The size of each lane, and what is not coded: `reference.measure`."""
    return reference.measure(words, table, split)


@_measure.register_kernel("cuda")
def _measure_on_gpu(
    words: torch.Tensor, table: torch.Tensor, split: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from tcw.kernels.lanes_encode import launch

    return launch.measure(_module(words), words, table, split)


@_measure.register_fake
def _measure_shape(
    words: torch.Tensor, table: torch.Tensor, split: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    how, n = SPLITS[split], words.numel()
    lane_bytes = words.new_empty(LANES * chunks_of(n), dtype=torch.uint8)
    raw = words.new_empty(n if how.has_raw else 0, dtype=torch.uint8)
    return lane_bytes, raw, words.new_empty(n if how.has_low else 0, dtype=torch.int16)


@torch.library.custom_op("tcw::lanes_write", mutates_args=("codes",))
def _write(
    words: torch.Tensor, table: torch.Tensor, split: str, lane_bytes: torch.Tensor, chunk_base: torch.Tensor,
    room: int, codes: torch.Tensor,
) -> None:  # fmt: skip
    """Write the codes: `reference.write`."""
    reference.write(words, table, split, lane_bytes, chunk_base, room, codes)


@_write.register_kernel("cuda")
def _write_on_gpu(
    words: torch.Tensor, table: torch.Tensor, split: str, lane_bytes: torch.Tensor, chunk_base: torch.Tensor,
    room: int, codes: torch.Tensor,
) -> None:  # fmt: skip
    from tcw.kernels.lanes_encode import launch

    launch.write(_module(words), words, table, split, lane_bytes, chunk_base, room, codes)


@_write.register_fake
def _write_nothing(
    words: torch.Tensor, table: torch.Tensor, split: str, lane_bytes: torch.Tensor, chunk_base: torch.Tensor,
    room: int, codes: torch.Tensor,
) -> None:  # fmt: skip
    return None


OPERATIONS = Steps(torch.ops.tcw.lanes_count, torch.ops.tcw.lanes_measure, torch.ops.tcw.lanes_write)


def _module(words: torch.Tensor) -> Any:
    from tcw import cuda

    return cuda.module("lanes_encode", words.device)
