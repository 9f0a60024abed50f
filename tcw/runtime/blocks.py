"""Run a model whose weights stay compressed: decode a transformer block just before it runs, forget it after.

A block is an element of an outermost ModuleList (the layers of every model in transformers), with all that is in it.
Compressed weights outside the blocks (the output head) are decoded by the module that owns them, and an embedding's
rows when they are looked up. All blocks of a model are decoded into one buffer (scratch.py), as large as the largest
of them: so at any time one block's weights exist decoded.

Threads may share a model: a block that runs in one thread is not decoded again for another.
"""

import threading
from typing import Any

import torch
from torch import nn

from tcw.runtime.packed import Packed, decode_all
from tcw.runtime.scratch import Scratch
from tcw.runtime.units import home_of, stacks

_ALIGN = 64  # as torch aligns its own memory


class Block:
    """The compressed parameters that exist decoded while one module runs."""

    def __init__(self, owned: list[tuple[nn.Module, str]], scratch: Scratch) -> None:
        """Take the parameters that stand in `owned` as (module, name), and make room for them in `scratch`."""
        self._owned = [(module, name, module._parameters[name]) for module, name in owned]
        distinct = {id(packed): packed.data.store for _, _, packed in self._owned}
        self._stores = sorted(distinct.items(), key=lambda item: -item[1].info.nbytes)  # long work goes first
        self._starts = [0]
        for _, store in self._stores:
            self._starts.append(self._starts[-1] + -(-store.info.nbytes // _ALIGN) * _ALIGN)
        self._scratch = scratch
        scratch.size = max(scratch.size, self._starts[-1])
        self._running = 0
        self._lock = threading.Lock()

    def enter(self, module: nn.Module, args: Any) -> None:
        """Put decoded parameters in place; a forward pre-hook."""
        with self._lock:
            if self._running == 0:
                decoded = self._decode()
                for owner, name, packed in self._owned:
                    owner._parameters[name] = decoded[id(packed)]
            self._running += 1

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """Put the compressed parameters back, also after an error; a forward hook."""
        with self._lock:
            self._running -= 1
            if self._running == 0:
                for owner, name, packed in self._owned:
                    owner._parameters[name] = packed

    def _decode(self) -> dict[int, nn.Parameter]:
        """All parameters, decoded, by the id of what they stand for; they alone keep the loan of the scratch."""
        loan = self._scratch.lend(self._starts[-1])
        places = [(start, start + s.info.nbytes) for start, (_, s) in zip(self._starts, self._stores, strict=False)]
        decode_all((s, loan[a:b]) for (a, b), (_, s) in zip(places, self._stores, strict=True))
        # as in an ordinary model it is no inference tensor and requires a gradient: torch picks kernels by that, and
        # for one row of input the other one copies the weight first
        with torch.inference_mode(False):
            data = torch.from_numpy(loan)
            return {
                key: nn.Parameter(store.shaped(data[a:b]))
                for (a, b), (key, store) in zip(places, self._stores, strict=True)
            }


def attach(model: nn.Module) -> int:
    """Hook every block of `model` that has compressed parameters. Returns how many there are."""
    packed = [
        (path, module, name)
        for path, module in model.named_modules()
        for name, parameter in module._parameters.items()
        if isinstance(parameter, Packed)
    ]
    homes = stacks(model)
    owned: dict[str, list[tuple[nn.Module, str]]] = {}
    for path, module, name in packed:
        home = home_of(path, homes) or path
        if home in homes or not isinstance(module, nn.Embedding):  # an embedding outside the blocks is read by rows
            owned.setdefault(home, []).append((module, name))
    scratch = Scratch()
    for home, parameters in owned.items():
        module = model.get_submodule(home)
        block = Block(parameters, scratch)
        module.register_forward_pre_hook(block.enter, prepend=True)
        module.register_forward_hook(block.leave, always_call=True)
    return len(owned)
