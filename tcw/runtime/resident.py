"""The residencies `huffman` and `offload` on a GPU: weights stay in the lanes code, and units decode as they run.

    within blocks         units of weights (units.py), decoded into a scratch (arena.py); from the host in `offload`
    embeddings            coded on the GPU; the chunks that the wanted rows lie in are decoded (coded.py)
    the output head       see below
    all else              plain: vectors, what is not an nn.Linear or nn.Embedding outside blocks, and what coding does
                          not make smaller

The head of a model is often larger than its blocks: 1.05 GB of Llama-3.1-8B's 16 GB. Decoded as a whole it would need a
scratch of that size. So `head` says what becomes of it:

    whole     decoded into the scratch, which is made as large
    plain     not coded: it takes a third more than its code, and no scratch
    slices    decoded and multiplied some rows at a time: the smallest, but a GPU may sum in another order for another
              number of rows, and then logits differ from the source's in their last bits
    auto      `whole` or `plain`, whichever takes less memory in all; both are bit-identical

A tied head and embedding share one stream, or one plain weight.
"""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from tcw import cuda
from tcw.kernels.lanes_decode import Group, group
from tcw.runtime.arena import Arena, Supply, Unit
from tcw.runtime.coded import Coded, Part
from tcw.runtime.linear import Quantized, swap
from tcw.runtime.offload import Staging, on_host, room
from tcw.runtime.options import AUTO, PLAIN, SLICES, WHOLE, Options
from tcw.runtime.packed import Packed, Store, from_torch, torch_dtype
from tcw.runtime.sliced import SlicedLinear
from tcw.runtime.state import pack
from tcw.runtime.units import Planned, Weight, home_of, plan, scratch_for, stacks, weights_of
from tcw.units import show_bytes

_CODED = 0.68  # of BF16, about, where a weight is not coded yet
_log = logging.getLogger("tcw")


@dataclass(frozen=True)
class Held:
    """What one device holds: units, bytes of codes, of scratch (stages too), of weights that are plain, on the host."""

    device: torch.device
    units: int
    coded: int
    scratch: int
    plain: int
    host: int


def attach(model: nn.Module, options: Options | None = None) -> list[Held]:
    """Make a model decode itself whose weights were loaded as `Quantized`.

    Raises:
        FormatError: a stream is damaged.
        NoGpu: the kernels do not run here.
    """
    weights, done = weights_of(model, Quantized), []
    for device in dict.fromkeys(weight.tensor.device for weight in weights):
        if device.type == "cuda":
            cuda.module("lanes_decode", device)  # compiles it now, not when the model first runs
        here = [weight for weight in weights if weight.tensor.device == device]
        done.append(_Build(model, device, options or Options()).run(here))
    for held in done:
        facts = (held.device, held.units, *map(show_bytes, (held.coded, held.scratch, held.plain, held.host)))
        _log.info("%s: %d units; codes %s, scratch %s, plain weights %s; on the host %s", *facts)
    return done


class _Build:
    """Takes the weights of one device from what was loaded to what runs."""

    def __init__(self, model: nn.Module, device: torch.device, options: Options) -> None:
        self.model, self.device, self.options = model, device, options
        self.homes = stacks(model)
        self.stores: dict[int, Store] = {}
        self.coded = self.plain = self.host = 0

    def run(self, weights: list[Weight]) -> Held:
        blocks, heads, tables = self._sort(weights)
        units = plan(self.model, self._code(blocks), self._limit(blocks))
        size = self._size(units)
        whole, sliced = self._heads(heads, size)
        units += plan(self.model, whole, 0)
        size = max([size, *(unit.nbytes for unit in units)])
        arena = self._arena(units, size)
        for weight in self._code(tables):
            self._place(weight, weight.places, self._group([weight]))
        for weight in sliced:
            self._slice(weight, arena)
        staged = arena.supply.nbytes if isinstance(arena.supply, Staging) else 0
        return Held(self.device, len(units), self.coded, size + staged, self.plain, self.host)

    def _sort(self, weights: list[Weight]) -> tuple[list[Weight], list[Weight], list[Weight]]:
        """Weights of blocks, of linear layers outside them (embeddings too, where tied), of embeddings alone."""
        blocks: list[Weight] = []
        heads: list[Weight] = []
        tables: list[Weight] = []
        for weight in weights:
            outside = [module for path, module, _ in weight.places if not home_of(path, self.homes)]
            if not outside:
                blocks.append(weight)
            elif len(outside) < len(weight.places) or not all(isinstance(m, nn.Linear | nn.Embedding) for m in outside):
                self._decode(weight)
            else:
                (tables if all(isinstance(m, nn.Embedding) for m in outside) else heads).append(weight)
        return blocks, heads, tables

    def _limit(self, blocks: list[Weight]) -> int:
        """Bytes of a unit: what a scratch holds two of."""
        wanted = (self.options.scratch or 0) // (2 if self.options.overlap else 1)
        return max([wanted, *(weight.nbytes for weight in blocks)], default=0)

    def _size(self, units: list[Planned]) -> int:
        """Bytes of scratch for the blocks' units."""
        largest = max((unit.nbytes for unit in units), default=0)
        return scratch_for(units) if self.options.overlap else largest

    def _heads(self, heads: list[Weight], size: int) -> tuple[list[Weight], list[Weight]]:
        """Settle what becomes of heads: those to decode as a whole, and in slices."""
        whole: list[Weight] = []
        sliced: list[Weight] = []
        for weight in heads:
            choice = self.options.head
            if choice == AUTO:
                choice = WHOLE if coded_size(weight) + max(size, weight.nbytes) <= weight.nbytes + size else PLAIN
            if choice == PLAIN:
                self._decode(weight)
            elif self._code([weight]):
                (sliced if choice == SLICES and weight.nbytes > size > 0 else whole).append(weight)
        return whole, sliced

    def _code(self, weights: Iterable[Weight]) -> list[Weight]:
        """See to it that weights are coded; returns those that are, and makes the others plain."""
        found = []
        for weight in weights:
            store = as_stream(weight.tensor)
            if store is None:
                self._decode(weight)
            else:
                self.stores[id(weight)] = store
                found.append(weight)
        return found

    def _decode(self, weight: Weight) -> None:
        decoded = nn.Parameter(weight.tensor.decode())
        self.plain += decoded.nbytes
        for _, module, name in weight.places:
            module._parameters[name] = decoded

    def _arena(self, planned: list[Planned], size: int) -> Arena:
        units = []
        for number, unit in enumerate(planned):
            offload = self.options.offload and bool(unit.stack)
            units.append(self._unit(number, unit, offload))
        stage = max((sum(map(room, unit.groups)) for unit in units if unit.on_host), default=0)
        supply = Staging(self.device, stage) if self.options.offload else Supply()
        arena = Arena(self.device, size, supply, overlap=self.options.overlap)
        arena.add(units)
        for at, made in zip(planned, units, strict=True):
            arena.hook(self.model.get_submodule(at.path), made)
        for stack in dict.fromkeys(unit.stack for unit in units if unit.stack):
            owner = self.model.get_submodule(stack.rpartition(".")[0])
            owner.register_forward_pre_hook(arena.begin, prepend=True)
            owner.register_forward_hook(arena.finish, always_call=True)
        return arena

    def _unit(self, number: int, planned: Planned, offload: bool) -> Unit:
        groups: list[Group] = []
        places: list[tuple[nn.Module, str, Coded]] = []
        splits = dict.fromkeys(self.stores[id(weight)].encoded.params["split"] for weight in planned.weights)
        for split in splits:
            inside = [w for w in planned.weights if self.stores[id(w)].encoded.params["split"] == split]
            made, under = self._group(inside, offload), f"{planned.path}."
            groups.append(made)
            for index, weight in enumerate(inside):
                mine = [p for p in weight.places if f"{p[0]}.".startswith(under)]
                coded = self._place(weight, mine if planned.stack else weight.places, made, index)
                places += [(module, name, coded) for _, module, name in mine]
        return Unit(number, planned.stack, tuple(groups), places, offload)

    def _group(self, weights: Sequence[Weight], offload: bool = False) -> Group:
        """The streams of some weights side by side, where they will stay."""
        streams = []
        for weight in weights:
            store = self.stores[id(weight)]
            params = {key: value for key, value in store.encoded.params.items() if key != "codec"}
            streams.append((store.encoded.parts, params, store.info.numel))
        made = group(streams)
        made = on_host(made, self.device) if offload else made.to(self.device)
        if offload:
            self.host += made.nbytes
        else:
            self.coded += made.nbytes
        return made

    def _place(
        self, weight: Weight, places: Sequence[tuple[str, nn.Module, str]], made: Group, index: int = 0
    ) -> Coded:
        """Put a coded parameter where `Quantized` stood."""
        part = Part(self.stores[id(weight)].info, made, index, self.device)
        coded = nn.Parameter(Coded(part), requires_grad=False)
        for _, module, name in places:
            module._parameters[name] = coded
        return coded

    def _slice(self, weight: Weight, arena: Arena) -> None:
        """Multiply with slices in every linear layer that has the weight."""
        coded = self._place(weight, weight.places, self._group([weight]))
        heads = [module for _, module, _ in weight.places if isinstance(module, nn.Linear)]
        swap(self.model, {module: SlicedLinear(coded, module.bias, arena) for module in heads})


def coded_size(weight: Weight) -> int:
    """Bytes of a weight in the lanes code, estimated where it is not in that yet."""
    tensor = weight.tensor
    assert isinstance(tensor, Quantized)
    return tensor.store.nbytes if tensor.method == "dfloat11" else int(_CODED * weight.nbytes)


def as_stream(tensor: torch.Tensor) -> Store | None:
    """A loaded weight in the lanes code: as it is stored, or coded now; None where that does not make it smaller."""
    assert isinstance(tensor, Quantized)
    if tensor.method == "dfloat11" and tensor.dtype == torch_dtype(tensor.store.info):
        return tensor.store
    plain = from_torch(tensor.store.info.name, tensor.store.decode().to(tensor.dtype))
    coded = pack(plain, str(tensor.device))  # the device does the work
    return coded.store if isinstance(coded, Packed) else None
