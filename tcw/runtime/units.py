"""What of a model is decoded together: units of weights, and where in the scratch each of them goes.

A unit is a module with all coded weights under it, which are decoded when it begins to run. It is as large as it can
be while its weights fit in half the scratch, so that the next one can be decoded while this one computes; but never
larger than a block (an element of an outermost ModuleList, the layers of every model in transformers):

    scratch of 2 blocks             a unit is a block
    scratch of 2 largest weights    a unit is an attention, or one matrix of an MLP: the default

Units at even places of a row of them begin at the start of the scratch, the others end at its end.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import nn

ALIGN = 512  # bytes: every weight begins where torch's own allocator would put it


@dataclass(eq=False)
class Weight:
    """A weight that is to be decoded, and the places that share it: (path of the module, module, parameter's name)."""

    tensor: torch.Tensor
    places: list[tuple[str, nn.Module, str]] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Bytes in the scratch."""
        return -(-self.tensor.numel() * self.tensor.element_size() // ALIGN) * ALIGN


@dataclass(eq=False)
class Planned:
    """A unit to be: the module that it runs with, the stack of blocks that this lies in (or ""), and its weights."""

    path: str
    stack: str
    weights: list[Weight]

    @property
    def nbytes(self) -> int:
        """Bytes in the scratch."""
        return sum(weight.nbytes for weight in self.weights)


def weights_of(model: nn.Module, kind: type) -> list[Weight]:
    """Every parameter of a class, once, with all places that share it."""
    found: dict[int, Weight] = {}
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if isinstance(parameter, kind):
                found.setdefault(id(parameter), Weight(parameter)).places.append((path, module, name))
    return list(found.values())


def stacks(model: nn.Module) -> dict[str, str]:
    """Paths of all blocks, with the path of the ModuleList that each is an element of; the outermost come first."""
    return {
        f"{path}.{name}" if path else name: path
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        for name, _ in module.named_children()
    }


def home_of(path: str, homes: Mapping[str, str]) -> str:
    """The outermost block that a module lies in, or "" where it lies in none."""
    names = path.split(".")
    parents = (".".join(names[:k]) for k in range(1, len(names) + 1))
    return next((parent for parent in parents if parent in homes), "")


def plan(model: nn.Module, weights: list[Weight], limit: int) -> list[Planned]:
    """Cut the weights of a model into units of at most `limit` bytes, but for single weights that are larger.

    A weight that modules of several units share is in each of them. An embedding outside the blocks is in none: it is
    read by rows.
    """
    homes, blocks = stacks(model), dict[str, list[Weight]]()
    planned: list[Planned] = []
    for weight in weights:
        read_by_rows = [
            p for p, module, _ in weight.places if isinstance(module, nn.Embedding) and not home_of(p, homes)
        ]
        for at in dict.fromkeys(home_of(p, homes) or p for p, _, _ in weight.places if p not in read_by_rows):
            blocks.setdefault(at, []).append(weight)
    for path, _ in model.named_modules():  # in the order of the model
        if inside := blocks.get(path):
            planned += _cut(path, model.get_submodule(path), homes.get(path, ""), inside, limit)
    return planned


def _cut(path: str, module: nn.Module, stack: str, weights: list[Weight], limit: int) -> Iterator[Planned]:
    whole = Planned(path, stack, weights)
    if whole.nbytes <= limit:
        yield whole
        return
    own = [w for w in weights if any(owner is module for _, owner, _ in w.places)]
    if own:
        yield Planned(path, stack, own)
    for name, child in module.named_children():
        under = f"{path}.{name}"
        inside = [w for w in weights if any(p == under or p.startswith(f"{under}.") for p, _, _ in w.places)]
        if inside:
            yield from _cut(under, child, stack, inside, limit)


def scratch_for(units: list[Planned]) -> int:
    """Bytes with which no unit has to wait for its scratch: those of two neighbours."""
    sizes = [unit.nbytes for unit in units]
    return max([*sizes, *(a + b for a, b in pairwise(sizes))], default=0)
