"""The scratch of one device: a unit's weights are decoded into it when the unit begins, the next unit's beside that.

    device   decode 0 | compute 0 | compute 1 | compute 2 | ...
    beside              decode 1    decode 2    decode 3
                      ^ fork      ^ join, fork

Unit k + 1 is decoded beside unit k where their places in the scratch do not meet. Both hazards are settled by order:
the fork lies behind all that computed with what the scratch held before, and the unit's join before all that reads it.
Nothing waits for the device, no memory is taken and every address stays what it was when the model was loaded, so that
a CUDA graph can hold a run. At the end of a stack of blocks all is joined.

A unit that begins while another one runs (inside it, or in another thread), or while gradients are recorded, which need
weights after their unit has ended, is decoded into memory of its own. A model that runs on another stream than before
waits there for what it did on that one.
"""

import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tcw.kernels.lanes_decode import Group, decode
from tcw.runtime.coded import Coded
from tcw.runtime.streams import Side, beside, capturing
from tcw.runtime.units import ALIGN


@dataclass(eq=False)
class Unit:
    """What is decoded when a module begins to run.

    Attributes:
        number: its place in the order of the model.
        stack: the path of the ModuleList that it lies in; only units of one stack are decoded ahead.
        groups: its streams, one group for each type of words.
        places: (module, parameter's name, coded parameter), some of which may share one.
        on_host: the groups are in the host's memory, and `Staging` fetches them; else they are on the device.
        start: byte of the scratch where it begins.
        next: the unit that runs after it, as far as is known.
    """

    number: int
    stack: str
    groups: tuple[Group, ...]
    places: list[tuple[nn.Module, str, Coded]]
    on_host: bool = False
    start: int = 0
    next: "Unit | None" = None
    running: int = 0
    ready: dict[int, nn.Parameter] | None = None  # parameters in the scratch, by the id of what they stand for

    @property
    def nbytes(self) -> int:
        """Bytes in the scratch."""
        return sum(_room(group) for group in self.groups)

    def meets(self, other: "Unit") -> bool:
        """Say whether both have a byte of the scratch."""
        return self.start < other.start + other.nbytes and other.start < self.start + self.nbytes

    def flats(self, memory: torch.Tensor) -> list[torch.Tensor]:
        """Where each group goes in `memory`, uint8 [nbytes]: views of the groups' dtypes."""
        flats, at = [], 0
        for group in self.groups:
            flats.append(memory[at : at + group.numel * group.dtype.itemsize].view(group.dtype))
            at += _room(group)
        return flats

    def parameters(self, flats: Sequence[torch.Tensor]) -> dict[int, nn.Parameter]:
        """The decoded weights, by the id of what they stand for. They require gradients, as in an ordinary model."""
        found = {}
        for _, _, coded in self.places:
            if id(coded) not in found:
                of = next(k for k, group in enumerate(self.groups) if group is coded.store.group)
                found[id(coded)] = nn.Parameter(coded.store.view(flats[of]))
        return found


def _room(group: Group) -> int:
    return -(-group.numel * group.dtype.itemsize // ALIGN) * ALIGN


class Supply:
    """Where the groups of a unit come from: here they are on the device."""

    def groups(self, unit: Unit) -> Sequence[Group]:
        """The groups on the device, for work on the current stream."""
        return unit.groups

    def tensors(self) -> Sequence[torch.Tensor]:
        """Memory on the device that side work reads, beside the groups themselves."""
        return ()

    def ahead(self, unit: Unit) -> None:
        """Hear that `unit` will be asked for; all groups that were asked for before have been read, or will be."""

    def join(self) -> None:
        """Let what comes on the current stream wait for all that is fetched beside."""

    def forget(self) -> None:
        """Take nothing as fetched."""


class Arena:
    """The scratch of a device, and the order in which units are decoded into it."""

    def __init__(
        self, device: torch.device, size: int, supply: Supply, *, overlap: bool = True, side: Side | None = None
    ) -> None:
        """Take `size` bytes of the device. Without `overlap`, units are decoded when they begin and never before."""
        self.device, self.supply, self._overlap = device, supply, overlap
        self.memory = torch.empty(size, dtype=torch.uint8, device=device)
        self._side = side or beside(device)
        self._side.keep([self.memory, *supply.tensors()])
        self._pending: Unit | None = None  # decoded beside, and not joined
        self._last: Unit | None = None
        self._captured = False
        self._running = 0
        self._inside: dict[int, list[Unit]] = {}  # what each thread has entered and not left
        self._lock = threading.Lock()

    def add(self, units: Sequence[Unit]) -> None:
        """Give units their places, and hook the modules that they run with to `enter` and `leave` afterwards."""
        for k, unit in enumerate(units):
            here = [group for group in unit.groups if group.device.type == self.device.type]  # the others are staged
            self._side.keep(tensor for group in here for tensor in group.tensors())
            unit.start = 0 if k % 2 == 0 else self.memory.numel() - unit.nbytes
            unit.ready = unit.parameters(unit.flats(self.memory[unit.start :]))
            if k and unit.stack and units[k - 1].stack == unit.stack:
                units[k - 1].next = unit

    def hook(self, module: nn.Module, unit: Unit) -> None:
        """Decode `unit` whenever `module` runs."""
        module.register_forward_pre_hook(lambda *_: self.enter(unit), prepend=True)
        module.register_forward_hook(lambda *_: self.leave(unit), always_call=True)

    def enter(self, unit: Unit) -> None:
        """Put decoded parameters in place of coded ones."""
        with self._lock:
            self._side.follow()
            if unit.running == 0:
                alone = self._running == 0 and not torch.is_grad_enabled()
                found = self._bring(unit) if alone else self._apart(unit)
                for module, name, coded in unit.places:
                    module._parameters[name] = found[id(coded)]
            unit.running += 1
            self._running += 1
            self._inside.setdefault(threading.get_ident(), []).append(unit)

    def leave(self, unit: Unit) -> None:
        """Put the coded parameters back, also after an error."""
        with self._lock:
            thread = threading.get_ident()
            inside = self._inside.get(thread, [])
            if unit in inside:  # else what failed was to enter
                inside.remove(unit)
                self._left(unit)
            if not inside:
                self._inside.pop(thread, None)

    def begin(self, *_: Any) -> None:
        """Begin a run through a stack: what this thread never left was interrupted (Ctrl-C). A forward pre-hook."""
        with self._lock:
            for unit in self._inside.pop(threading.get_ident(), []):
                self._left(unit)

    def _left(self, unit: Unit) -> None:
        unit.running -= 1
        self._running -= 1
        if unit.running == 0:
            for module, name, coded in unit.places:
                module._parameters[name] = coded

    @contextlib.contextmanager
    def lend(self, size: int) -> Iterator[torch.Tensor]:
        """Give the first `size` bytes of the scratch, or as many elsewhere while it is in use."""
        with self._lock:
            self._side.follow()
            free = self._running == 0 and not torch.is_grad_enabled() and size <= self.memory.numel()
            if free:
                self._settle()
            self._running += 1
        try:
            yield self.memory[:size] if free else torch.empty(size, dtype=torch.uint8, device=self.device)
        finally:
            with self._lock:
                self._running -= 1

    def finish(self, *_: Any) -> None:
        """End a run through a stack: all is joined, and what was decoded ahead forgotten. A forward hook."""
        with self._lock:
            self._settle()
            self._last = None
            self.supply.join()
            self.supply.forget()

    def _settle(self) -> Unit | None:
        """Join what is decoded beside; returns that unit."""
        if (now := capturing(self.device)) != self._captured:  # what was done outside a graph is not part of it
            self._captured, self._pending, self._last = now, None, None
            self.supply.forget()
        done, self._pending = self._pending, None
        if done is not None:
            self._side.join()
        return done

    def _bring(self, unit: Unit) -> dict[int, nn.Parameter]:
        """Have `unit` in the scratch, and the one after it on its way."""
        if self._settle() is not unit:
            self._decode(unit)
            self._learn(unit)
        self._last, after = unit, unit.next
        if after is not None:
            self._begin(unit, after)
        assert unit.ready is not None
        return unit.ready

    def _begin(self, unit: Unit, after: Unit) -> None:
        if unit.meets(after) or not self._overlap:
            self.supply.ahead(after)
            return
        self._side.fork()
        self._side.run(lambda: self._decode(after))
        self._pending = after
        if after.next is not None:
            self.supply.ahead(after.next)

    def _decode(self, unit: Unit) -> None:
        groups = self.supply.groups(unit)
        for group, out in zip(groups, unit.flats(self.memory[unit.start :]), strict=True):
            decode(group, out=out)

    def _learn(self, unit: Unit) -> None:
        """Correct what runs after the last unit, where a model runs its modules in another order than listed."""
        last = self._last
        if last is not None and last.stack == unit.stack and last.stack and last.number < unit.number:
            last.next = unit

    def _apart(self, unit: Unit) -> dict[int, nn.Parameter]:
        """Decode into memory of its own."""
        with torch.inference_mode(False):  # an inference tensor would make torch choose other kernels
            return unit.parameters([decode(group.to(self.device)) for group in unit.groups])
