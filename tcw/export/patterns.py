"""Which matrices the official DFloat11 loader can decode together, and the `pattern_dict` that says so.

The loader decodes a group just before a module runs, into the `weight` of that module (a Linear or an Embedding) or of
Linear modules inside it. So every repeated block of the model (`prefix.N`) becomes one group of the linear matrices in
it, and each other Linear and Embedding a group of its own. `pattern_dict` maps a regular expression, which must match
the whole name of the module, to the paths of the Linear modules inside, in the order in which they are coded.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from tcw.sources.skeleton import Skeleton
from tcw.tensor import TensorInfo


@dataclass(frozen=True)
class Unit:
    """What is decoded at once: `module`, the `paths` of the Linear modules in it (none: itself), their `tensors`."""

    module: str
    paths: tuple[str, ...]
    tensors: tuple[str, ...]


def find_units(tensors: Iterable[TensorInfo], skeleton: Skeleton) -> tuple[list[Unit], dict[str, str]]:
    """Group the matrices of a model, in the model's own order.

    Returns:
        The units, and for each matrix that is in none the reason: tensor name -> why. `Unit.module` has the names of
        the model, `Unit.tensors` those of the checkpoint.
    """
    groups: dict[str, list[tuple[str, str]]] = {}
    raw: dict[str, str] = {}
    matrices = [i for i in tensors if len(i.shape) == 2 and i.numel and i.name.endswith(".weight")]
    for info in sorted(matrices, key=lambda i: (skeleton.place(i.name), _natural(i.name))):
        name, found = skeleton.full(info.name), skeleton.find(info.name)
        kind = skeleton.kinds.get(found or "", "other")
        if found in skeleton.tied:
            raw[info.name] = "tied weights have to stand where the loader can share them"
        elif kind == "other" and not (found and ".experts." in name):
            raw[info.name] = "the loader decodes Linear and Embedding modules only"
        elif skeleton.shape(info.name, info.numel) != info.shape:
            raw[info.name] = "the config gives it another shape"
        else:
            module = name.removesuffix(".weight")
            home = module if kind == "embedding" else _block(module, skeleton)
            groups.setdefault(home, []).append((module[len(home) + 1 :], info.name))
    return [Unit(home, _paths(members), tuple(t for _, t in members)) for home, members in groups.items()], raw


def _paths(members: list[tuple[str, str]]) -> tuple[str, ...]:
    return tuple(path for path, _ in members if path)


def _block(module: str, skeleton: Skeleton) -> str:
    """The outermost element of a module list that `module` lies in and that is called itself, or `module`."""
    parts = module.split(".")
    for k in range(1, len(parts) - 1):
        path = ".".join(parts[: k + 1])
        if parts[k].isdigit() and path not in skeleton.containers:
            return path
    return module


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """Sort key that puts `experts.10` after `experts.9`."""
    return [(p.isdigit(), int(p) if p.isdigit() else 0, p) for p in name.split(".")]


def pattern_dict(coded: list[Unit], units: list[Unit]) -> dict[str, list[str]]:
    r"""Patterns that match the modules of the `coded` ones among `units`, and no other, with their paths.

    `model\.layers\.\d+` where all blocks of that name are alike, else the numbers: `model\.layers\.(?:0|3|5)`.
    """
    alike: dict[tuple[str, tuple[str, ...]], list[Unit]] = {}
    for unit in coded:
        prefix, _, number = unit.module.rpartition(".")
        key = prefix if unit.paths and number.isdigit() else unit.module
        alike.setdefault((key, unit.paths), []).append(unit)
    patterns: dict[str, list[str]] = {}
    for (key, paths), members in alike.items():
        numbers = [unit.module.removeprefix(key + ".") for unit in members]
        everywhere = [u for u in units if re.fullmatch(re.escape(key) + r"\.\d+", u.module)]
        if not paths:
            pattern = re.escape(key)
        elif len(everywhere) == len(members):
            pattern = re.escape(key) + r"\.\d+"
        else:
            pattern = re.escape(key) + r"\." + (numbers[0] if len(numbers) == 1 else f"(?:{'|'.join(numbers)})")
        patterns[pattern] = list(paths)
    return patterns
