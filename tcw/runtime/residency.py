"""Where a loaded model's weights live.

bf16      decoded once, at load: an ordinary model
huffman   compressed in memory, decoded a block at a time while the model runs (CPU)
auto      bf16 if the model fits comfortably in free memory, else huffman
"""

import logging
from collections.abc import Iterable
from typing import Any

import torch

from tcw.artifact import SAME, Artifact
from tcw.device import pick
from tcw.errors import UnknownName, UsageError
from tcw.runtime.packed import torch_dtype
from tcw.source import Source
from tcw.units import show_bytes

AUTO, BF16, HUFFMAN = "auto", "bf16", "huffman"
CHOICES = (AUTO, BF16, HUFFMAN)
_COMFORT = 0.7  # of free memory; the rest is for activations, the KV cache and everybody else
_log = logging.getLogger("tcw")


def check(choice: str) -> str:
    """Return `choice` if it is a residency. Raises UnknownName."""
    if choice not in CHOICES:
        raise UnknownName("residency", str(choice), CHOICES)
    return choice


def settle(choice: str, source: Source, dtype: torch.dtype | None, devices: Iterable[Any]) -> bool:
    """Say whether weights stay compressed (True) or are decoded at load (False); logs what `auto` chose.

    Raises UsageError for compressed weights on a device other than the CPU.
    """
    check(choice)
    elsewhere = [name for name in map(_name, devices) if torch.device(name).type != "cpu"]
    if choice == HUFFMAN and elsewhere:
        raise UsageError(
            f"the residency `huffman` runs on the CPU, not on `{elsewhere[0]}`", "use `residency='bf16'` there"
        )
    if choice != AUTO:
        return choice == HUFFMAN
    if elsewhere:
        _log.info("residency bf16: the model goes to %s", elsewhere[0])
        return False
    need, free = loaded_bytes(source, dtype), pick("cpu").free_bytes
    packed = need > _COMFORT * free
    name = HUFFMAN if packed else BF16
    _log.info("residency %s: the model takes %s decoded, %s are free", name, show_bytes(need), show_bytes(free))
    return packed


def loaded_bytes(source: Source, dtype: torch.dtype | None) -> int:
    """Bytes of the decoded model in memory, floating tensors cast to `dtype` if one is given."""
    aliases = {n for n, e in source.entries.items() if e.method == SAME} if isinstance(source, Artifact) else set()
    total = 0
    for name, info in source.tensors().items():
        own = torch_dtype(info)
        kept = dtype if dtype is not None and own.is_floating_point else own
        total += 0 if name in aliases else info.numel * kept.itemsize
    return total


def _name(device: Any) -> Any:
    """Accelerate's device maps may hold plain GPU numbers, and "disk" for what is read back on use."""
    if isinstance(device, int):
        return f"cuda:{device}"
    return "meta" if device == "disk" else device
