"""Where a loaded model's weights live.

bf16      decoded once, at load: an ordinary model
huffman   compressed in memory, decoded a block at a time while the model runs: on the CPU (blocks.py), and on NVIDIA
          GPUs, where units of a block are decoded into a scratch, each beside the one before it (resident.py)
packed    quantised layers stay so and multiply with their codes (linear.py); a model that is not quantised keeps its
          BF16 matrices in about 12 bits and multiplies with those (lossless.py)
offload   an NVIDIA GPU runs what does not fit on it: compressed weights stay in the host's memory (offload.py)
auto      on the CPU: bf16 if the model fits comfortably in free memory, else huffman. On NVIDIA GPUs: packed where it
          is measured to be faster, else bf16 if it fits; the first of packed, huffman and offload that fits if not

`bf16` and `huffman` (and `offload`, which is the same on a GPU) give the source's logits to the last bit. `packed` has
the source's weights to the last bit, but sums products in an order of its own.
"""

import contextlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from tcw.artifact import RAW, SAME, Artifact, method_class
from tcw.device import pick
from tcw.errors import ResourceError, UnknownName, UsageError
from tcw.runtime.choose import COMFORT, Choice, Facts, choose
from tcw.runtime.packed import torch_dtype
from tcw.source import Source
from tcw.tensor import TensorInfo
from tcw.units import show_bytes
from tcw.weights.dfloat11 import LEAST_NUMEL

AUTO, BF16, HUFFMAN, PACKED, OFFLOAD = "auto", "bf16", "huffman", "packed", "offload"
CHOICES = (AUTO, BF16, HUFFMAN, PACKED, OFFLOAD)
KERNELS = {"cuda"}  # kinds of devices that decode lanes themselves
_PACKED, _CODED = 12.1 / 16, 0.68  # of a BF16 matrix, about
_WHOLE = "wants the whole model on GPUs, or all of it on the CPU"
_SMALLER = {BF16: PACKED, PACKED: HUFFMAN, HUFFMAN: OFFLOAD}
_log = logging.getLogger("tcw")


def check(choice: str) -> str:
    """Return `choice` if it is a residency. Raises UnknownName."""
    if choice not in CHOICES:
        raise UnknownName("residency", str(choice), CHOICES)
    return choice


def settle(choice: str, source: Source, dtype: torch.dtype | None, devices: Iterable[Any]) -> Choice:
    """Say which residency it will be, never AUTO; logs what `auto` chose, and why.

    Raises UsageError for compressed weights on a device that cannot decode them, for `packed` where there is nothing to
    pack, and where a part of the model is to be moved while it runs.
    """
    check(choice)
    places = list(dict.fromkeys(map(_name, devices)))
    if choice != AUTO:
        check_places(choice, places)
        if choice == PACKED and not any(packs(source, name) for name in source.tensors()):
            raise UsageError(
                f"nothing in `{source.id}` is quantised, nor a matrix in BF16", "use `residency='bf16'`, or quantise it"
            )
        return Choice(choice, "asked for")
    found = _auto(source, dtype, places)
    _log.info("residency %s: %s", found.residency, found.why)
    return found


def on_kernels(devices: Iterable[Any]) -> bool:
    """Say whether all devices decode lanes themselves."""
    return all(torch.device(_name(device)).type in KERNELS for device in devices)


def first_gpu(devices: Sequence[Any]) -> torch.device | None:
    """The first of the devices, where all of them decode lanes themselves; else None."""
    return torch.device(_name(devices[0])) if devices and on_kernels(devices) else None


def check_places(choice: str, devices: Iterable[Any]) -> None:
    """Refuse a residency on devices, or a mixture of them, that it does not run on. Raises UsageError."""
    places = list(dict.fromkeys(map(_name, devices)))
    kinds = {torch.device(place).type for place in places}
    other = next((p for p in places if torch.device(p).type not in {"cpu", *KERNELS}), None)
    if choice in (HUFFMAN, PACKED) and len(kinds) > 1:
        raise UsageError(
            f"the residency `{choice}` {_WHOLE}", "use `residency='bf16'`, or `residency='offload'` on one GPU"
        )
    if choice == PACKED and "meta" in kinds:
        raise UsageError(f"the residency `packed` {_WHOLE}", "use `residency='bf16'`")
    if choice == HUFFMAN and other is not None:
        raise UsageError(
            f"the residency `huffman` runs on the CPU and on NVIDIA GPUs, not on `{other}`",
            "use `residency='bf16'` there",
        )
    if choice == OFFLOAD and not on_kernels(places):
        raise UsageError(
            "the residency `offload` wants the model on NVIDIA GPUs, and keeps its weights beside them",
            "use `device='cuda'`, or `residency='huffman'` on the CPU",
        )


def _auto(source: Source, dtype: torch.dtype | None, places: Sequence[Any]) -> Choice:
    need = loaded_bytes(source, dtype)
    if all(torch.device(place).type == "cpu" for place in places):
        free = pick("cpu").free_bytes
        why = f"the model takes {show_bytes(need)} decoded, {show_bytes(free)} are free"
        return Choice(HUFFMAN if need > COMFORT * free else BF16, why)
    if not on_kernels(places):
        return Choice(BF16, f"the model goes to {next(p for p in places if torch.device(p).type != 'cpu')}")
    sizes = [loaded_bytes(source, dtype, PACKED), None if quantised(source) else loaded_bytes(source, dtype, HUFFMAN)]
    free = sum(pick(str(place)).free_bytes for place in places)
    if not quantised(source) and need > COMFORT * free and not _kernels_run(places):
        sizes = [need, None]
    faster = shapes = 0
    if not quantised(source) and dtype in (None, torch.bfloat16) and sizes[0] != need:
        faster, shapes = _measure(source, torch.device(places[0]))
    return choose(Facts(free, need, None if sizes[0] == need else sizes[0], sizes[1], faster, shapes))


def _kernels_run(places: Sequence[Any]) -> bool:
    """Say whether all of these GPUs can decode weights; logs why not."""
    from tcw import cuda

    try:
        for place in places:
            cuda.module("lanes_decode", torch.device(place))
    except cuda.NoGpu as error:
        _log.warning("weights cannot stay compressed: %s; %s", error.message, error.hint)
        return False
    return True


def _measure(source: Source, device: torch.device) -> tuple[int, int]:
    """Of how many kinds of BF16 matrices a product is faster packed, and how many there are."""
    from tcw.cuda import NoGpu
    from tcw.runtime import autotune

    shapes = {info.shape for info in source.tensors().values() if packs_shape(info)}
    try:
        table = autotune.measured(sorted((s[0], s[1]) for s in shapes), "p4", device)
    except NoGpu as error:
        _log.warning("kernels cannot be measured: %s", error.message)
        return 0, 0
    return sum(table.pays((s[0], s[1]), "p4") for s in shapes), len(shapes)


def stays_packed(source: Source, name: str) -> bool:
    """Say whether `packed` keeps a tensor as it is stored: a method has quantised it."""
    method = source.entry(name).method if isinstance(source, Artifact) else RAW
    return method != RAW and not method_class(method).lossless


def quantised(source: Source) -> bool:
    """Say whether a method has quantised any tensor."""
    return isinstance(source, Artifact) and any(stays_packed(source, name) for name in source.tensors())


def packs(source: Source, name: str) -> bool:
    """Say whether `packed` keeps a tensor smaller than BF16: what is quantised, or in a plain model what is BF16."""
    return stays_packed(source, name) if quantised(source) else packs_shape(source.tensors()[name])


def packs_shape(info: TensorInfo) -> bool:
    """Say whether a tensor is a BF16 matrix of a size that is worth it."""
    return info.dtype == "BF16" and len(info.shape) == 2 and info.numel >= LEAST_NUMEL


def loaded_bytes(source: Source, dtype: torch.dtype | None, choice: str = BF16) -> int:
    """Bytes of the model in memory, floating tensors cast to `dtype` if one is given.

    All of it decoded; for PACKED with the quantised tensors at their size in the file, or all BF16 matrices at what
    they take packed; for HUFFMAN and OFFLOAD with matrices at the size of their codes, and two of them decoded.
    """
    aliases = {n for n, e in source.entries.items() if e.method == SAME} if isinstance(source, Artifact) else set()
    whole = quantised(source)
    total, largest = 0, 0
    for name, info in source.tensors().items():
        own = torch_dtype(info)
        kept = dtype if dtype is not None and own.is_floating_point else own
        size = 0 if name in aliases else info.numel * kept.itemsize
        if choice == PACKED and isinstance(source, Artifact) and stays_packed(source, name):
            size = source.tensor_bytes(name)  # 0 for an alias
        elif choice == PACKED and not whole and kept == torch.bfloat16 and packs_shape(info):
            size = int(_PACKED * size)
        elif choice in (HUFFMAN, OFFLOAD) and len(info.shape) > 1 and own.is_floating_point:
            largest, size = max(largest, size), int(_CODED * size)
        total += size
    return total + 2 * largest


@contextlib.contextmanager
def fitting(choice: str) -> Iterator[None]:
    """Say in plain words that a device's memory is full, and what would take less of it."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        smaller = _SMALLER.get(choice)
        hint = f"use `residency='{smaller}'`" if smaller else "free memory of the device, or use one with more"
        first = str(error).splitlines()[0]
        raise ResourceError(
            f"the device's memory cannot hold the model with `residency='{choice}'`: {first}", hint
        ) from None


def _name(device: Any) -> Any:
    """Accelerate's device maps may hold plain GPU numbers, and "disk" for what is read back on use."""
    if isinstance(device, int):
        return f"cuda:{device}"
    return "meta" if device == "disk" else device
