"""The residency `offload`: coded weights stay in the host's memory and cross over coded, two thirds of their size.

    copies   copy 1    | copy 2    | copy 3    | ...       host -> one of two stages on the device
    beside             | decode 1  | decode 2  | ...       stage -> scratch
    device                         | compute 1 | compute 2 ...

A unit is copied while the one before it is decoded and the one before that computes, so the link to the host is never
idle within a stack of blocks. A stage is written again only behind the decoding of what it held.

The host's memory is page-locked where the driver allows it: only such memory is copied in the background.
"""

import contextlib
import logging
import mmap
import weakref
from collections.abc import Sequence

import numpy as np
import torch

from tcw.kernels.lanes_decode import Group
from tcw.runtime.arena import Supply, Unit
from tcw.runtime.streams import Side, beside, capturing
from tcw.runtime.units import ALIGN

_log = logging.getLogger("tcw")


class Staging(Supply):
    """Fetches groups from the host into one of two stages on the device."""

    def __init__(self, device: torch.device, size: int, copies: Side | None = None) -> None:
        """Take two stages of `size` bytes of the device."""
        self._stages = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2)]
        self._held: list[Unit | None] = [None, None]
        self._copies = copies or beside(device)
        self._copies.keep(self._stages)
        self._under_way = False  # a copy that nothing has been joined with

    def tensors(self) -> Sequence[torch.Tensor]:
        """The stages."""
        return self._stages

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return sum(stage.nbytes for stage in self._stages)

    def groups(self, unit: Unit) -> Sequence[Group]:
        """The groups in the unit's stage; what was not asked for ahead is copied now."""
        if not unit.on_host:
            return unit.groups
        self.join()
        if self._held[unit.number % 2] is not unit:
            self._copy(unit)
            self._held[unit.number % 2] = unit
        return [group.with_tensors(views(group, self._stages[unit.number % 2], at)) for group, at in places(unit)]

    def ahead(self, unit: Unit) -> None:
        """Begin to copy `unit`, unless its stage has it, or holds the unit before it, which may not be decoded yet."""
        held = self._held[unit.number % 2]
        if held is unit or (held is not None and held.next is unit):
            return
        self._copies.fork()
        self._copies.run(lambda: self._copy(unit))
        self._under_way, self._held[unit.number % 2] = True, unit

    def join(self) -> None:
        """Let what comes wait for the copies under way, if there are any."""
        if self._under_way:
            self._copies.join()
        self._under_way = False

    def forget(self) -> None:
        """Take the stages as empty, and no copy as under way."""
        self._under_way, self._held = False, [None, None]

    def _copy(self, unit: Unit) -> None:
        stage = self._stages[unit.number % 2]
        for group, at in places(unit):
            host = blob(group)
            stage[at : at + host.numel()].copy_(host, non_blocking=True)


def places(unit: Unit) -> list[tuple[Group, int]]:
    """The groups of a unit, and the byte of a stage where each begins."""
    found, at = [], 0
    for group in unit.groups:
        found.append((group, at))
        at += room(group)
    return found


def room(group: Group) -> int:
    """Bytes of a stage that a group takes."""
    return sum(-(-tensor.nbytes // ALIGN) * ALIGN for tensor in group.tensors())


def views(group: Group, memory: torch.Tensor, at: int = 0) -> list[torch.Tensor]:
    """Where the tensors of a group go in `memory`, uint8, from byte `at` on."""
    found = []
    for tensor in group.tensors():
        found.append(memory[at : at + tensor.nbytes].view(tensor.dtype).view(tensor.shape))
        at += -(-tensor.nbytes // ALIGN) * ALIGN
    return found


def on_host(group: Group, device: torch.device) -> Group:
    """The group in one piece of the host's memory, page-locked for copies to `device`."""
    memory = locked(room(group), device) if device.type == "cuda" else torch.empty(room(group), dtype=torch.uint8)
    copied = views(group, memory)
    for to, tensor in zip(copied, group.tensors(), strict=True):
        to.copy_(tensor)
    return group.with_tensors(copied)


def blob(group: Group) -> torch.Tensor:
    """All bytes of a group that `on_host` made."""
    return torch.empty(0, dtype=torch.uint8).set_(group.codes.untyped_storage(), 0, (room(group),))


def locked(size: int, device: torch.device) -> torch.Tensor:
    """Page-locked memory for copies to `device`, uint8 [size].

    What torch's own allocator of it takes is rounded up to a power of two.
    """
    array = np.frombuffer(mmap.mmap(-1, size), np.uint8)  # begins at a page, and shares none
    runtime, address = torch.cuda.cudart(), array.ctypes.data
    if failed := int(runtime.cudaHostRegister(address, size, 0)):
        _log.warning("the host's memory cannot be page-locked (CUDA error %d): copies run in the foreground", failed)
        with contextlib.suppress(RuntimeError):  # CUDA remembers it, and the next kernel of torch would be blamed
            torch.ones(1, device=device)
    else:
        weakref.finalize(array, _unlock, address, device).atexit = False  # the driver is gone by then
    return torch.from_numpy(array)


def _unlock(address: int, device: torch.device) -> None:
    if not capturing(device):
        torch.cuda.synchronize(device)  # copies may be under way
    torch.cuda.cudart().cudaHostUnregister(address)
