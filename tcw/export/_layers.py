"""What the formats of quantised models share: which layers of an artifact they take, and the files around them.

A target looks at each compressed weight and says how the format would store it (`Layer`), or why it cannot. The stored
codes and scales go out as they are: nothing is quantised again. All that a format cannot say is decoded and written
plain, one tensor in memory at a time.
"""

import json
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tcw.artifact import RAW, Artifact, Entry
from tcw.errors import SourceError, UsageError
from tcw.events import Report
from tcw.export._shards import Job, write_shards
from tcw.export.hf import copy_side_files, plain
from tcw.source import Source
from tcw.sources.skeleton import Skeleton, of_folder
from tcw.tensor import TensorInfo
from tcw.weights import Encoded


@dataclass(frozen=True)
class Layer:
    """A weight as a format stores it: `scheme` is what its entry in the config depends on.

    `make` turns the artifact's parts into the data of `infos`, in that order: contiguous arrays of as many bytes.
    """

    scheme: Hashable
    infos: list[TensorInfo]
    make: Callable[[Encoded], list[np.ndarray]]


@dataclass(frozen=True)
class Plan:
    """What goes where.

    Attributes:
        layers: weights in the format's own layout, by name.
        modules: what the model calls the modules of these weights, by the weights' names.
        kept: compressed weights that are written plain, and why.
        plain: modules whose weights are plain though they might be taken for quantised ones.
    """

    source: Artifact
    layers: dict[str, Layer]
    modules: dict[str, str]
    kept: dict[str, str]
    plain: list[str]

    def groups(self) -> dict[Any, list[str]]:
        """Modules by scheme, the scheme of most weights first."""
        groups: dict[Any, list[str]] = {}
        for name, layer in self.layers.items():
            groups.setdefault(layer.scheme, []).append(self.modules[name])
        return dict(sorted(groups.items(), key=lambda item: -len(item[1])))


def module_of(name: str) -> str:
    """The module whose `weight` a tensor is."""
    return name.removesuffix(".weight")


def make_plan(
    source: Source, target: str, example: str, choose: Callable[[Artifact, TensorInfo, Entry], Layer | str]
) -> Plan:
    """Ask `choose` about every compressed weight of a linear layer: a Layer, or why the format cannot hold it.

    `example` is a method whose artifacts the target takes.

    Raises:
        UsageError: the source is no artifact, or the format can hold none of its weights.
        SourceError: transformers does not know the architecture.
    """
    if not isinstance(source, Artifact):
        raise UsageError(
            f"target `{target}` writes the codes of a quantised model, and `{source.id}` has none",
            f"first `tcw compress MODEL --method {example} -o SMALL`, then export SMALL",
        )
    skeleton = _skeleton(source)
    layers: dict[str, Layer] = {}
    kept: dict[str, str] = {}
    for name, info in source.tensors().items():
        entry = source.entry(name)
        if entry.method == RAW:
            continue
        chosen = _not_linear(skeleton, name) or choose(source, info, entry)
        if isinstance(chosen, str):
            kept[name] = chosen
        else:
            layers[name] = chosen
    if not layers:
        why = "; ".join(sorted(set(kept.values()))) or "nothing in it is compressed"
        raise UsageError(
            f"`{source.id}` has no weights that `{target}` can hold: {why}",
            "`tcw export --to hf` writes every tensor plain",
        )
    modules = {name: module_of(skeleton.full(name)) for name in layers}
    return Plan(source, layers, modules, kept, _plain_modules(skeleton, source, layers))


def _skeleton(source: Source) -> Skeleton:
    try:
        return of_folder(source.path, source.id)
    except SourceError as error:
        raise SourceError(error.message, "the config names modules: it needs an architecture of transformers") from None


def _not_linear(skeleton: Skeleton, name: str) -> str:
    found = skeleton.find(name)
    if found and (skeleton.kinds.get(found) == "linear" or ".experts." in name) and name.endswith(".weight"):
        return ""
    return "loaders take quantised weights of linear layers only"


def _plain_modules(skeleton: Skeleton, source: Source, layers: dict[str, Layer]) -> list[str]:
    """Modules that stay plain where a reader might take them for quantised linear ones.

    Those of the model, also where no tensor is named after them, as a tied head; and other matrices of the checkpoint,
    such as routers and experts, which transformers holds otherwise but other programs as linear layers.
    """
    coded = {skeleton.find(name) for name in layers}
    plain = [module_of(n) for n, kind in skeleton.kinds.items() if kind == "linear" and n not in coded]
    matrices = [
        n for n, i in source.tensors().items() if len(i.shape) == 2 and n.endswith(".weight") and n not in layers
    ]
    others = [n for n in matrices if skeleton.kinds.get(skeleton.find(n) or "", "other") == "other"]
    return list(dict.fromkeys([*plain, *map(module_of, others)]))


def write_model(
    plan: Plan, folder: Path, progress: Report, shard_gb: float, config: dict[str, Any], extra: dict[str, float]
) -> None:
    """Write the weights in files of up to `shard_gb` GB, config.json, and the side files.

    Args:
        plan: what goes where.
        folder: where to.
        progress: told of every tensor.
        shard_gb: GB, above 0.
        config: the `quantization_config` of config.json.
        extra: scales to add, each a tensor F32 [1].
    """
    copy_side_files(plan.source, folder)
    whole = {**plan.source.config, "quantization_config": config}
    (folder / "config.json").write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
    write_shards(_jobs(plan, extra), folder, progress, shard_gb)


def _jobs(plan: Plan, extra: dict[str, float]) -> list[Job]:
    """Everything there is to write, in the order of the artifact."""
    jobs = [_scale(name, value) for name, value in extra.items()]
    for name, info in plan.source.tensors().items():
        layer = plan.layers.get(name)
        jobs.append(_coded(plan.source, info, layer) if layer else plain(plan.source, info))
    return jobs


def _scale(name: str, value: float) -> Job:
    return Job(name, [TensorInfo(name, "F32", (1,))], lambda: [np.array([value], np.float32)])


def _coded(source: Artifact, info: TensorInfo, layer: Layer) -> Job:
    return Job(info.name, layer.infos, lambda: layer.make(source.encoded(info.name)), info.nbytes)
