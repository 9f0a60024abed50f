"""Where a loaded model's weights live.

bf16      decoded once, at load: an ordinary model
huffman   compressed in memory, decoded a block at a time while the model runs (CPU)
packed    quantised layers stay so and multiply with their codes; all else is decoded (linear.py)
auto      bf16 if the model fits comfortably in free memory, else huffman
"""

import logging
from collections.abc import Iterable
from typing import Any

import torch

from tcw.artifact import RAW, SAME, Artifact, method_class
from tcw.device import pick
from tcw.errors import UnknownName, UsageError
from tcw.runtime.packed import torch_dtype
from tcw.source import Source
from tcw.units import show_bytes

AUTO, BF16, HUFFMAN, PACKED = "auto", "bf16", "huffman", "packed"
CHOICES = (AUTO, BF16, HUFFMAN, PACKED)
_COMFORT = 0.7  # of free memory; the rest is for activations, the KV cache and everybody else
_log = logging.getLogger("tcw")


def check(choice: str) -> str:
    """Return `choice` if it is a residency. Raises UnknownName."""
    if choice not in CHOICES:
        raise UnknownName("residency", str(choice), CHOICES)
    return choice


def settle(choice: str, source: Source, dtype: torch.dtype | None, devices: Iterable[Any]) -> str:
    """Say which residency it will be, never AUTO; logs what `auto` chose.

    Raises UsageError for compressed weights on a device other than the CPU, and for `packed` where nothing is quantised
    or a part of the model is to be moved while it runs.
    """
    check(choice)
    kinds = {name: torch.device(name).type for name in map(_name, devices)}
    elsewhere = [name for name, kind in kinds.items() if kind != "cpu"]
    if choice == HUFFMAN and elsewhere:
        raise UsageError(
            f"the residency `huffman` runs on the CPU, not on `{elsewhere[0]}`", "use `residency='bf16'` there"
        )
    if choice == PACKED:
        _check_packed(source, set(kinds.values()))
    if choice != AUTO:
        return choice
    if elsewhere:
        _log.info("residency bf16: the model goes to %s", elsewhere[0])
        return BF16
    need, free = loaded_bytes(source, dtype), pick("cpu").free_bytes
    name = HUFFMAN if need > _COMFORT * free else BF16
    _log.info("residency %s: the model takes %s decoded, %s are free", name, show_bytes(need), show_bytes(free))
    return name


def stays_packed(source: Source, name: str) -> bool:
    """Say whether `packed` keeps a tensor as it is stored: a method has quantised it."""
    method = source.entry(name).method if isinstance(source, Artifact) else RAW
    return method != RAW and not method_class(method).lossless


def _check_packed(source: Source, kinds: set[str]) -> None:
    if not any(stays_packed(source, name) for name in source.tensors()):
        raise UsageError(f"nothing in `{source.id}` is quantised", "use `residency='bf16'`, or quantise the model")
    if "meta" in kinds or len(kinds) > 1:
        raise UsageError(
            "the residency `packed` wants the whole model on GPUs, or all of it on the CPU", "use `residency='bf16'`"
        )


def loaded_bytes(source: Source, dtype: torch.dtype | None, choice: str = BF16) -> int:
    """Bytes of the model in memory, floating tensors cast to `dtype` if one is given.

    All of it decoded, or for PACKED with the quantised tensors at their size in the file.
    """
    aliases = {n for n, e in source.entries.items() if e.method == SAME} if isinstance(source, Artifact) else set()
    total = 0
    for name, info in source.tensors().items():
        own = torch_dtype(info)
        kept = dtype if dtype is not None and own.is_floating_point else own
        if isinstance(source, Artifact) and choice == PACKED and stays_packed(source, name):
            total += source.tensor_bytes(name)  # 0 for an alias
        elif name not in aliases:
            total += info.numel * kept.itemsize
    return total


def _name(device: Any) -> Any:
    """Accelerate's device maps may hold plain GPU numbers, and "disk" for what is read back on use."""
    if isinstance(device, int):
        return f"cuda:{device}"
    return "meta" if device == "disk" else device
