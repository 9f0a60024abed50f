"""GPTQ: the tensor layout of AutoGPTQ and GPTQModel, which vLLM, SGLang, transformers and ExLlama read.

Takes an artifact with integers of 2, 3, 4 or 8 bits on a grid with an integer zero (`symmetric` or `zero`). Codes,
zeros and scales are those of the artifact, laid out anew. With rows of `in` weights in groups of g,

    X.qweight   I32 [in·bits/32, out]        codes of a column of this matrix, that is of a row of W, lowest bits first
    X.qzeros    I32 [groups, out·bits/32]    zeros of a group, along the rows of W in the same way
    X.scales    F16 [groups, out]
    X.g_idx     I32 [in]                     the group of each input: i // g

and w = (q - z) s. 32 codes take exactly `bits` words: a code of 3 bits may begin in one word and end in the next. The
older layout, `gptq`, stores z - 1, which a zero of 0 has no place in; `gptq_v2` stores z. `layout=auto` writes the
older one, which more programs read, unless a zero of 0 forbids it.

Scales are FP16, and readers multiply in FP16: codes, zeros and scales are exactly the artifact's, the products are
rounded otherwise than to BF16. A weight whose scales are no FP16 numbers stays plain. Weights with other bits or groups
than most have their own entry in `dynamic`, plain ones an entry that says so; GPTQModel, vLLM and SGLang read those.

Format: https://github.com/ModelCloud/GPTQModel, https://github.com/AutoGPTQ/AutoGPTQ.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import tcw
from tcw.artifact import Artifact, Entry
from tcw.errors import FormatError, UsageError
from tcw.events import Report, silent
from tcw.export import _integers
from tcw.export._layers import Layer, Plan, make_plan, module_of, write_model
from tcw.source import Source
from tcw.tensor import TensorInfo
from tcw.weights import Encoded
from tcw.weights._integer import Grid, pack, unpack_flat

LAYOUTS = ("auto", "gptq", "gptq_v2")
_BITS = (2, 3, 4, 8)
_WORD = 32


@dataclass(frozen=True)
class Scheme:
    """What the config says of a weight; a group size of -1 is the whole row."""

    bits: int
    group_size: int
    sym: bool


def write(
    source: Source, folder: Path, progress: Report = silent, *, shard_gb: float = 5.0, layout: str = "auto"
) -> dict[str, str]:
    """Write an artifact in the GPTQ layout.

    Args:
        source: an artifact with integer weights.
        folder: where the files go; empty.
        progress: told of every tensor.
        shard_gb: largest size of a file.
        layout: "gptq", "gptq_v2", or "auto" for the first where it can hold the zeros.

    Returns:
        The compressed tensors that are written plain, each with the reason.

    Raises:
        UsageError: `source` is no artifact, or has no weights that the format can hold.
        SourceError: transformers does not know the architecture.
    """
    if layout not in LAYOUTS:
        raise UsageError(f"`layout` cannot be `{layout}`", f"choose from: {', '.join(LAYOUTS)}")
    if layout == "auto":
        layout = "gptq_v2" if isinstance(source, Artifact) and _has_zero_zeros(source) else "gptq"

    def choose(source: Artifact, info: TensorInfo, entry: Entry) -> Layer | str:
        return _layer(source, info, entry, less=1 if layout == "gptq" else 0)

    plan = make_plan(source, "gptq", "int4", choose)
    write_model(plan, folder, progress, shard_gb, _config(plan, layout), {})
    return plan.kept


def _layer(source: Artifact, info: TensorInfo, entry: Entry, less: int) -> Layer | str:
    if not _integers.made_by(entry.method):
        return f"the format has nothing like {entry.method}"
    grid = _integers.grid_of(info, entry.params)
    if why := _unfit(grid, info) or _uneven(source, info, entry, grid, less):
        return why
    (out, width), module = info.shape, module_of(info.name)
    groups, bits, span = grid.groups(width), grid.bits, grid.span(width)
    infos = [
        TensorInfo(f"{module}.qweight", "I32", (width * bits // _WORD, out)),
        TensorInfo(f"{module}.qzeros", "I32", (groups, out * bits // _WORD)),
        TensorInfo(f"{module}.scales", "F16", (groups, out)),
        TensorInfo(f"{module}.g_idx", "I32", (width,)),
    ]

    def make(encoded: Encoded) -> list[np.ndarray]:
        codes, scale, zeros = _integers.parts_of(info, encoded, grid)
        return [
            np.ascontiguousarray(codes.T),
            pack(np.ascontiguousarray(zeros.T) - np.uint8(less), bits),
            np.ascontiguousarray(_floats(scale).T.astype(np.float16)),
            (np.arange(width) // span).astype(np.int32),
        ]

    scheme = Scheme(bits, -1 if span == width else span, grid.kind == "symmetric")
    return Layer(scheme, infos, make)


def _unfit(grid: Grid, info: TensorInfo) -> str:
    out, width = info.shape
    if grid.bits not in _BITS:
        return f"{grid.bits} bits are none of 2, 3, 4, 8"
    if out % _WORD or width % _WORD:
        return f"{_WORD} does not divide {out} x {width}, so codes do not fill whole words"
    if grid.scale == "F32":
        return "its scales are FP32, those of the format FP16"
    return _integers.unfit(grid, width)


def _uneven(source: Artifact, info: TensorInfo, entry: Entry, grid: Grid, less: int) -> str:
    """What only the values of scales and zeros tell."""
    scales = _floats(_part(source, info, entry, grid, "scale"))
    with np.errstate(over="ignore"):
        if not np.array_equal(scales.astype(np.float16).astype(np.float32), scales):
            return "its scales are no FP16 numbers"
    if less and _lowest_zero(source, info, entry, grid) == 0:
        return "a zero of 0 has no place in the layout `gptq` (`layout=gptq_v2` has one)"
    return ""


def _has_zero_zeros(source: Artifact) -> bool:
    for name, info in source.tensors().items():
        entry = source.entry(name)
        if _integers.made_by(entry.method):
            grid = _integers.grid_of(info, entry.params)
            if not _unfit(grid, info) and _lowest_zero(source, info, entry, grid) == 0:
                return True
    return False


def _lowest_zero(source: Artifact, info: TensorInfo, entry: Entry, grid: Grid) -> int:
    if grid.kind == "symmetric":
        return 1 << (grid.bits - 1)
    zeros = _part(source, info, entry, grid, "zero")
    return int(unpack_flat(zeros, grid.bits, info.shape[0] * grid.groups(info.shape[1])).min())


def _part(source: Artifact, info: TensorInfo, entry: Entry, grid: Grid, key: str) -> np.ndarray:
    """One of the small parts of a tensor, without its codes; its size is checked, the rest when it is written."""
    dtype, shape = grid.shapes(info.shape)[key]
    data = source.read_stored(f"{entry.name}.{key}").data
    if data.size != math.prod(shape) * dtype.itemsize:
        raise FormatError(f"tensor `{info.name}`: part `{key}` is not {dtype} {list(shape)}")
    return data.view(dtype)


def _floats(scales: np.ndarray) -> np.ndarray:
    """Scales as float32: from BF16 bit patterns, or FP16."""
    if scales.dtype == np.uint16:
        return (scales.astype(np.uint32) << 16).view(np.float32)
    return scales.astype(np.float32)


def _config(plan: Plan, layout: str) -> dict[str, Any]:
    (main, _), *others = plan.groups().items()
    dynamic: dict[str, dict[str, Any]] = {f"-:{_exactly(module)}": {} for module in plan.plain}
    for scheme, modules in others:
        entry = {"bits": scheme.bits, "group_size": scheme.group_size, "sym": scheme.sym}
        dynamic |= {f"+:{_exactly(module)}": entry for module in modules}
    config: dict[str, Any] = {
        "quant_method": "gptq",
        "bits": main.bits,
        "group_size": main.group_size,
        "sym": main.sym,
        "desc_act": False,
        "lm_head": any(name.rpartition(".")[0].endswith("lm_head") for name in plan.layers),
        "checkpoint_format": layout,
        "pack_dtype": "int32",
        "meta": {"quantizer": [f"tcw:{tcw.__version__}"]},
    }
    return config | ({"dynamic": dynamic} if dynamic else {})


def _exactly(module: str) -> str:
    return f"^{re.escape(module)}$"
