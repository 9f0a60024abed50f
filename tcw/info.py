"""What a path holds, from headers alone: artifact, model folder, DFloat11 folder, GGUF or safetensors file."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tcw.gguf_file import read_gguf
from tcw.profile.parts import part_of
from tcw.safetensors_file import read_header


@dataclass(frozen=True)
class TensorFacts:
    """One tensor: its dtype and shape as a model sees it, and how it is stored."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    parameters: int
    bytes: int
    stored_bytes: int
    method: str = "raw"


@dataclass(frozen=True)
class Info:
    """What a path holds. `version` is the format's own; `verdict` is the last one that was recorded, if any."""

    id: str
    format: str
    version: str | None
    tensors: list[TensorFacts]
    methods: list[str] = field(default_factory=list)
    model_type: str | None = None
    source: str | None = None
    verdict: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The facts under the keys of docs/cli.md; sizes in bytes."""
        facts = asdict(self)
        tensors = [asdict(t) | {"shape": list(t.shape)} for t in self.tensors]
        stored, original = sum(t.stored_bytes for t in self.tensors), sum(t.bytes for t in self.tensors)
        return facts | {
            "parameters": sum(t.parameters for t in self.tensors if t.stored_bytes or not t.bytes),
            "bytes": {"original": original, "stored": stored, "by_dtype": self._by_dtype()},
            "tensors": tensors,
        }

    def _by_dtype(self) -> dict[str, int]:
        sizes: dict[str, int] = {}
        for tensor in self.tensors:
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.bytes
        return sizes

    def groups(self) -> list[dict[str, Any]]:
        """Tensors added up by part, dtype and method, in the order in which they first appear."""
        found: dict[tuple[str, str, str], dict[str, Any]] = {}
        for tensor in self.tensors:
            key = (part_of(tensor.name), tensor.dtype, tensor.method)
            group = found.setdefault(
                key,
                {"part": key[0], "dtype": key[1], "method": key[2], "tensors": 0, "parameters": 0, "bytes": 0,
                 "stored_bytes": 0},
            )  # fmt: skip
            group["tensors"] += 1
            for name in ("parameters", "bytes", "stored_bytes"):
                group[name] += getattr(tensor, name)
        return list(found.values())


def inspect(text: str) -> Info:
    """Look at `text`, a path or anything else that `open_source` takes, reading no tensor.

    Raises SourceError or FormatError, naming the file.
    """
    path = Path(text).expanduser()
    if path.is_file() and path.suffix.lower() == ".gguf":
        return _gguf(path)
    if path.is_file() and path.suffix == ".safetensors":
        header = read_header(path)
        infos = [slot.info for slot in header.tensors.values()]
        return Info(path.name, "safetensors", None, [_raw(i.name, i.dtype, i.shape, i.nbytes) for i in infos])
    return _opened(text)


def _opened(text: str) -> Info:
    from tcw.artifact import Artifact
    from tcw.source import open_source

    source = open_source(text)
    kind, model_type = source.kind, source.config.get("model_type")
    if isinstance(source, Artifact):
        verdict = source.manifest.get("verdict")
        tensors = [
            TensorFacts(
                name, entry.info.dtype, entry.info.shape, entry.info.numel, entry.info.nbytes,
                source.tensor_bytes(name), entry.method if not entry.same_as else f"same as {entry.same_as}",
            )
            for name, entry in source.entries.items()
        ]  # fmt: skip
        return Info(
            source.id, "tcw", source.manifest["format"], tensors, source.methods(), model_type,
            source.manifest["source"].get("id"), verdict.get("verdict") if isinstance(verdict, dict) else None,
        )  # fmt: skip
    if kind == "df11":
        return _df11(source, model_type)
    tensors = [_raw(i.name, i.dtype, i.shape, i.nbytes) for i in source.tensors().values()]
    name = "gguf" if kind == "gguf" else "huggingface"
    return Info(source.id, name, None, tensors, _quantised(source.config), model_type)


def _df11(source: Any, model_type: str | None) -> Info:
    """An official DFloat11 folder: what its groups take, spread over their matrices by size."""
    stored_names = set(source.stored)
    coded = [i for i in source.tensors().values() if i.name not in stored_names]
    plain = {i.name: i for i in source.tensors().values() if i.name in stored_names}
    total = sum(slot.info.nbytes for name, (_, slot) in source.stored.items() if name not in plain)
    whole = sum(i.nbytes for i in coded)
    tensors = [_raw(i.name, i.dtype, i.shape, i.nbytes) for i in plain.values()]
    for info in coded:
        share = total * info.nbytes // whole if whole else 0
        tensors.append(TensorFacts(info.name, info.dtype, info.shape, info.numel, info.nbytes, share, "dfloat11"))
    version = source.config.get("dfloat11_config", {}).get("version")
    return Info(source.id, "dfloat11", version, tensors, ["dfloat11"], model_type)


def _quantised(config: dict[str, Any]) -> list[str]:
    """What quantised the model, as config.json has it."""
    how = config.get("quantization_config")
    return [str(how["quant_method"])] if isinstance(how, dict) and "quant_method" in how else []


def _raw(name: str, dtype: str, shape: Iterable[int], nbytes: int) -> TensorFacts:
    shape = tuple(shape)
    return TensorFacts(name, dtype, shape, math.prod(shape), nbytes, nbytes)


def _gguf(path: Path) -> Info:
    header = read_gguf(path)
    with path.open("rb") as file:
        version = int.from_bytes(file.read(8)[4:], "little")  # behind the magic; read_gguf has checked it
    tensors = [_raw(t.name, t.type, t.shape, t.end - t.start) for t in header.tensors.values()]
    dtypes = [t.dtype for t in tensors]
    methods = sorted(set(dtypes) - {"F32", "F16", "BF16"}, key=lambda d: -dtypes.count(d))
    return Info(path.name, "gguf", str(version), tensors, methods, header.architecture or None)
