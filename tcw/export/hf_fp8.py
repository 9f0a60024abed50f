"""Fine-grained FP8 of transformers (`quant_method: fp8`), DeepSeek's format: 128x128 blocks or whole tensors.

Takes an artifact made with `fp8:scale=block` or `fp8:scale=tensor`. Stored codes and scales go out as they are:

    X.weight             F8_E4M3 [out, in]
    X.weight_scale_inv   FP32 [out/128, in/128], or a scalar where `weight_block_size` is null; what q is multiplied by
    X.activation_scale   FP32 scalar, with static activations

The config has one block size for the whole model: what is quantised otherwise than most of it is decoded and written
plain, and so is a weight whose sides 128 does not divide, which transformers would cut into wrong blocks. A reader that
multiplies in FP8 scales activations as the model runs, whether one wants it or not, so `activation=none` is refused.

transformers 5.23, vLLM and SGLang load it; without a GPU transformers decodes it, to the weights that `tcw` decodes.
"""

from collections import Counter
from pathlib import Path

import numpy as np

from tcw.artifact import Artifact, Entry
from tcw.events import Report, silent
from tcw.export._layers import Layer, make_plan, module_of, write_model
from tcw.source import Source
from tcw.tensor import TensorInfo
from tcw.weights import Encoded, fp8
from tcw.weights._fp8 import BLOCK, Grid


def write(source: Source, folder: Path, progress: Report = silent, *, shard_gb: float = 5.0) -> dict[str, str]:
    """Write an artifact in transformers' FP8 format.

    Args:
        source: an artifact with FP8 weights, scaled by block or tensor.
        folder: where the files go; empty.
        progress: told of every tensor.
        shard_gb: largest size of a file.

    Returns:
        The compressed tensors that are written plain, each with the reason.

    Raises:
        UsageError: `source` is no artifact, or has no weights that the format can hold.
        SourceError: transformers does not know the architecture.
    """
    main = _main_scheme(source)

    def choose(_: Artifact, info: TensorInfo, entry: Entry) -> Layer | str:
        if why := _unfit(info, entry):
            return why
        scheme = fp8.read_params(info, entry.params)
        return _layer(info, *scheme) if scheme == main else "one config holds one scheme, and most weights have another"

    plan = make_plan(source, "hf-fp8", "fp8:scale=block", choose)
    scale, activation = main or ("block", "dynamic")
    config = {
        "quant_method": "fp8",
        "activation_scheme": activation,
        "weight_block_size": [BLOCK, BLOCK] if scale == "block" else None,
        "modules_to_not_convert": plan.plain,
    }
    write_model(plan, folder, progress, shard_gb, config, {})
    return plan.kept


def _main_scheme(source: Source) -> tuple[str, str] | None:
    """The scale and activation of most weights that the format could hold."""
    if not isinstance(source, Artifact):
        return None
    entries = {name: source.entry(name) for name in source.tensors()}
    fit = [(info, entries[name]) for name, info in source.tensors().items() if not _unfit(info, entries[name])]
    counts = Counter(fp8.read_params(info, entry.params) for info, entry in fit)
    return max(counts, key=lambda scheme: counts[scheme], default=None)


def _unfit(info: TensorInfo, entry: Entry) -> str:
    """Why the format cannot hold a tensor; "" when it can."""
    if entry.method != "fp8":
        return f"the format has nothing like {entry.method}"
    scale, activation = fp8.read_params(info, entry.params)
    if scale == "channel":
        return "it has no scale for each row (`fp8:scale=block` or `scale=tensor` would go)"
    if activation == "none":
        return "it has no weights without quantised activations (`fp8:activation=dynamic` would go)"
    if scale == "block" and (info.shape[0] % BLOCK or info.shape[1] % BLOCK):
        return f"blocks of {BLOCK} do not divide {info.shape[0]} x {info.shape[1]} (`fp8:scale=tensor` would go)"
    return ""


def _layer(info: TensorInfo, scale: str, activation: str) -> Layer:
    shape = Grid(scale, *info.shape).shape if scale == "block" else ()
    infos = [TensorInfo(info.name, "F8_E4M3", info.shape), TensorInfo(f"{info.name}_scale_inv", "F32", shape)]
    if activation == "static":
        infos.append(TensorInfo(f"{module_of(info.name)}.activation_scale", "F32", ()))

    def make(encoded: Encoded) -> list[np.ndarray]:
        codes, scales = fp8.stored(info, encoded)
        return [codes, scales, *([encoded.parts["input_scale"]] if activation == "static" else [])]

    return Layer((scale, activation), infos, make)
