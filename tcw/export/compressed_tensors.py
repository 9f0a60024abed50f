"""compressed-tensors: FP8 and packed integers as transformers, vLLM and SGLang load them.

Takes an artifact made with fp8, int8, int4, int2 or mixed. Stored codes and scales go out as they are:

    fp8                     `float-quantized`   weight F8_E4M3 [out, in], weight_scale [1], [out, 1] or one a block
    int8, int4, int2 ...    `pack-quantized`    weight_packed I32 [out, in·bits/32], weight_scale [out, groups],
                                                weight_shape I64 [2], weight_zero_point I32 [out·bits/32, groups]

Each way of quantising is a config group of its own; a model with several of one format keeps that format's name, with
both formats it is `mixed-precision`. What the format cannot say is decoded and written plain, and the report says why:
grids without an integer zero, groups that do not divide the width, ecq, embeddings.

FP8 scales are BF16 in a BF16 model, FP32 in others and for blocks; either way readers round q·s once, as we do, so
loading with `CompressedTensorsConfig(dequantize=True)` gives the very weights that `tcw` decodes. With several config
groups transformers 5.23 reads every layer by the first of them in that mode: use its default mode then, which in turn
cannot read zero points, or vLLM.

Format: https://github.com/vllm-project/compressed-tensors (0.20).
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tcw.artifact import Artifact, Entry
from tcw.errors import FormatError
from tcw.events import Report, silent
from tcw.export import _integers
from tcw.export._layers import Layer, Plan, make_plan, module_of, write_model
from tcw.source import Source
from tcw.tensor import TensorInfo
from tcw.weights import Encoded, fp8
from tcw.weights._fp8 import BLOCK
from tcw.weights._fp8 import Grid as ScaleGrid
from tcw.weights._integer import pack, words

_KV_TYPES = {"fp8": "float", "int8": "int"}


@dataclass(frozen=True)
class Scheme:
    """How a config group quantises: the fields of its entry in the config."""

    format: str
    bits: int
    strategy: str
    group_size: int = 0
    symmetric: bool = True
    activation: str = "none"  # or "static", "token", "group": the last two scaled as the model runs

    def to_json(self, targets: list[str]) -> dict[str, Any]:
        """The config group of the modules `targets`."""
        kind = "float" if self.format == "float-quantized" else "int"
        weights: dict[str, Any] = {
            "num_bits": self.bits, "type": kind, "strategy": self.strategy,
            "symmetric": self.symmetric, "dynamic": False,
        }  # fmt: skip
        if self.group_size:
            weights["group_size"] = self.group_size
        if self.strategy == "block":
            weights["block_structure"] = [BLOCK, BLOCK]
        return {
            "targets": targets, "format": self.format, "weights": weights, "input_activations": self._inputs(),
            "output_activations": None,
        }  # fmt: skip

    def _inputs(self) -> dict[str, Any] | None:
        if self.activation == "none":
            return None
        inputs: dict[str, Any] = {"num_bits": 8, "type": "float", "symmetric": True}
        if self.activation == "static":
            return inputs | {"strategy": "tensor", "dynamic": False}
        if self.activation == "group":
            return inputs | {"strategy": "group", "group_size": BLOCK, "dynamic": True}
        return inputs | {"strategy": "token", "dynamic": True}


def write(source: Source, folder: Path, progress: Report = silent, *, shard_gb: float = 5.0) -> dict[str, str]:
    """Write an artifact in the format of compressed-tensors.

    Args:
        source: an artifact with FP8 or integer weights.
        folder: where the files go; empty.
        progress: told of every tensor.
        shard_gb: largest size of a file.

    Returns:
        The compressed tensors that are written plain, each with the reason.

    Raises:
        UsageError: `source` is no artifact, or has no weights that the format can hold.
        SourceError: transformers does not know the architecture.
    """
    plan = make_plan(source, "compressed-tensors", "fp8", _choose)
    scales = _cache_scales(plan.source)
    write_model(plan, folder, progress, shard_gb, _config(plan, plan.source.manifest), scales)
    return plan.kept


def _config(plan: Plan, manifest: dict[str, Any]) -> dict[str, Any]:
    groups = plan.groups()
    formats = {scheme.format for scheme in groups}
    kv = manifest.get("kv_scales")
    scheme = {"num_bits": 8, "strategy": "tensor", "symmetric": True, "dynamic": False}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "ignore": plan.plain,
        "kv_cache_scheme": {**scheme, "type": _KV_TYPES[kv["dtype"]]} if kv else None,
        "config_groups": {
            f"group_{k}": scheme.to_json(["Linear"] if len(groups) == 1 else modules)
            for k, (scheme, modules) in enumerate(groups.items())
        },
    }


def _choose(source: Artifact, info: TensorInfo, entry: Entry) -> Layer | str:
    if entry.method == "fp8":
        return _fp8(info, entry.params)
    if _integers.made_by(entry.method):
        return _integer(info, entry.params)
    return f"the format has nothing like {entry.method}"


def _fp8(info: TensorInfo, params: dict[str, Any]) -> Layer:
    strategy, activation = fp8.read_params(info, params)
    if activation == "dynamic":  # what blocks multiply with is scaled in as long pieces, where they divide the width
        activation = "group" if strategy == "block" and info.shape[1] % BLOCK == 0 else "token"
    scheme = Scheme("float-quantized", 8, strategy, activation=activation)
    narrow = info.dtype == "BF16" and strategy != "block"
    infos = [
        TensorInfo(info.name, "F8_E4M3", info.shape),
        TensorInfo(f"{info.name}_scale", "BF16" if narrow else "F32", ScaleGrid(strategy, *info.shape).shape),
    ]
    if activation == "static":
        infos.append(TensorInfo(f"{module_of(info.name)}.input_scale", "F32", (1,)))

    def make(encoded: Encoded) -> list[np.ndarray]:
        codes, scales = fp8.stored(info, encoded)
        return [codes, encoded.parts["scale"] if narrow else scales, *_static(encoded)]

    return Layer(scheme, infos, make)


def _static(encoded: Encoded) -> list[np.ndarray]:
    return [encoded.parts["input_scale"]] if "input_scale" in encoded.parts else []


def _integer(info: TensorInfo, params: dict[str, Any]) -> Layer | str:
    grid, width = _integers.grid_of(info, params), info.shape[1]
    if why := _integers.unfit(grid, width):
        return why
    whole = grid.span(width) == width
    symmetric = grid.kind == "symmetric"
    scheme = Scheme(
        "pack-quantized", grid.bits, "channel" if whole else "group", 0 if whole else grid.group_size, symmetric
    )
    module, groups = module_of(info.name), grid.groups(width)
    infos = [
        TensorInfo(f"{module}.weight_packed", "I32", (info.shape[0], words(width, grid.bits))),
        TensorInfo(f"{module}.weight_scale", grid.scale, (info.shape[0], groups)),
        TensorInfo(f"{module}.weight_shape", "I64", (2,)),
    ]
    if not symmetric:
        infos.append(TensorInfo(f"{module}.weight_zero_point", "I32", (words(info.shape[0], grid.bits), groups)))

    def make(encoded: Encoded) -> list[np.ndarray]:
        codes, scale, zeros = _integers.parts_of(info, encoded, grid)
        arrays = [codes, scale, np.array(info.shape, np.int64)]
        if not symmetric:
            arrays.append(np.ascontiguousarray(pack(np.ascontiguousarray(zeros.T), grid.bits).T))
        return arrays

    return Layer(scheme, infos, make)


def _cache_scales(source: Artifact) -> dict[str, float]:
    """Scales of keys and values as tensors: name -> value, from the manifest."""
    found = source.manifest.get("kv_scales")
    if found is None:
        return {}
    try:
        layers = found["layers"].items()
        if found["dtype"] not in _KV_TYPES:
            raise KeyError(found["dtype"])
        scales = {(int(layer), which): float(pair[which]) for layer, pair in layers for which in ("k", "v")}
        if not all(0 < value < np.inf for value in scales.values()):
            raise ValueError
    except (TypeError, KeyError, ValueError, AttributeError):
        raise FormatError("the scales of keys and values in the manifest are not as the format says") from None
    homes = _attention(source)
    if missing := sorted({layer for layer, _ in scales} - set(homes)):
        raise FormatError(
            f"the manifest has scales of keys and values for layer {missing[0]}, the model no attention there"
        )
    return {f"{homes[layer]}.{which}_scale": value for (layer, which), value in scales.items()}


def _attention(source: Artifact) -> dict[int, str]:
    """Where the attention of each layer is: number -> module."""
    found = (re.match(r"(?:.*\.)?(\d+)\.[^.]*att[^.]*(?=\.)", name) for name in source.tensors())
    return {int(match[1]): match[0] for match in found if match}
