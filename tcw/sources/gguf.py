"""GGUF files: converted once, tensor by tensor, to a BF16 Hugging Face folder in the cache.

Names, row orders and offsets that llama.cpp changed are undone by transformers' own tables, one tensor at a time, so
the result equals `from_pretrained(gguf_file=..., dtype=bfloat16)` with weights dequantised, and the whole model never
is in memory. Quantised weights do not become better: a Q4 file stays as good as 4 bits were.
"""

import contextlib
import functools
import hashlib
import json
import logging
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from tcw.cache import cache_folder
from tcw.disk import sync_folder, writing
from tcw.errors import FormatError, MissingDependency, ResourceError, SourceError, TcwError
from tcw.events import Progress, Report, silent
from tcw.gguf_file import GgufHeader, GgufTensor, ggml_types, read_gguf
from tcw.safetensors_file import StreamWriter, header_bound, read_range
from tcw.source import Source
from tcw.tensor import TensorInfo

CONVERTER = 1  # raise it when the same file would give other bytes
_CHUNK = 2**24  # elements dequantised at once where rows are independent
_STALE = 24 * 3600.0  # seconds after which an unfinished conversion is surely dead


def open_gguf(path: Path, *, id: str | None = None, progress: Report = silent) -> Source:
    """Open a GGUF file; it is converted into the cache unless that was done before.

    Raises SourceError or FormatError for a damaged file or one that transformers cannot convert, and
    MissingDependency without the `gguf` package.
    """
    path = path.resolve()
    folder = cache_folder() / "gguf" / f"{re.sub(r'[^A-Za-z0-9_.-]', '_', path.stem)[:80]}-{_fingerprint(path)}"
    if not folder.is_dir():
        _convert_into(folder, path, progress)
    try:
        return Source(folder, kind="gguf", id=id or path.name)
    except TcwError as error:
        raise type(error)(error.message, f"remove `{folder}`, it will be made again") from None


def _fingerprint(path: Path) -> str:
    """Name, size, time and both ends of the file: hashing 40 GB would take longer than opening them should."""
    try:
        status = path.stat()
        digest = hashlib.sha256(f"{CONVERTER} {path.name} {status.st_size} {status.st_mtime_ns}".encode())
        with path.open("rb") as file:
            digest.update(file.read(2**22))
            file.seek(max(0, status.st_size - 2**20))
            digest.update(file.read(2**20))
    except OSError as error:
        raise SourceError(f"cannot read `{path}`: {error.strerror}") from None
    return digest.hexdigest()[:16]


def _convert_into(folder: Path, path: Path, progress: Report) -> None:
    """Convert into a private folder and rename it; when two processes do so at once, the first one wins."""
    header = read_gguf(path)
    if header.metadata.get("split.count", 0) > 1:
        raise SourceError(f"`{path.name}` is one part of a split GGUF file", "join them: `llama-gguf-split --merge`")
    blocks = header.metadata.get(f"{header.architecture}.block_count", 0)
    if not isinstance(blocks, int) or blocks > len(header.tensors):  # before a model of so many blocks is built
        raise FormatError(f"`{path.name}` declares {blocks} blocks but holds {len(header.tensors)} tensors")
    with writing(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
        _sweep(folder)
        partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", suffix=".partial", dir=folder.parent))
    key = _fingerprint(path)
    try:
        with writing(partial):
            _convert(path, header, partial, progress)
        if _fingerprint(path) != key:
            raise SourceError(f"`{path.name}` changed while it was read", "wait for it and start again")
        with contextlib.suppress(OSError):  # somebody else was first: theirs is the same
            partial.rename(folder)
            sync_folder(folder.parent)
        if not folder.is_dir():
            raise SourceError(f"cannot write `{folder}`", "choose another cache folder with TCW_CACHE")
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _sweep(folder: Path) -> None:
    for left in folder.parent.glob(f"{folder.name}.*.partial"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > _STALE:
                shutil.rmtree(left, ignore_errors=True)


def _convert(path: Path, header: GgufHeader, out: Path, progress: Report) -> None:
    progress(Progress("convert", 0, len(header.tensors), "tensors", f"reading {path.name}"))
    with _transformers(path, header) as transformers:
        config = transformers.AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name)
        if "tokenizer.ggml.model" in header.metadata:
            tokenizer = transformers.AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
            tokenizer.save_pretrained(out)
        model = _skeleton(transformers, config)
        plan = _Plan(header, model, config)
    _write_config(transformers, model, config, out)
    bound = header_bound(plan.infos.values(), {"format": "pt"})
    with StreamWriter(out / "model.safetensors", bound, {"format": "pt"}) as writer:
        for done, tensor in enumerate(header.tensors.values(), 1):
            for info, data in plan.converted(path, tensor):
                writer.append(info, data)
            progress(Progress("convert", done, len(header.tensors), "tensors", tensor.name))
        plan.check_complete(path)
    if plan.unused:
        note = f"left out, as transformers does: {', '.join(plan.unused)}"
        progress(Progress("convert", len(header.tensors), len(header.tensors), "tensors", note))


@contextlib.contextmanager
def _transformers(path: Path, header: GgufHeader) -> Iterator[Any]:
    """Lend transformers, quiet, and turn what it says of this file into our errors.

    Meanwhile `gguf` remembers: transformers would read the file once for the config and once for the tokenizer, and
    build the table of names anew for every module.
    """
    try:
        import gguf
        import transformers
        from transformers import modeling_gguf_pytorch_utils  # noqa: F401  it must exist
    except ImportError as error:
        raise MissingDependency("transformers", f"reading GGUF files ({error})", "gguf") from None
    log = logging.getLogger("transformers")
    level = log.level
    log.setLevel(logging.ERROR)
    slow = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    try:
        for name, function in slow.items():
            setattr(gguf, name, functools.cache(function))
        yield transformers
    except (TcwError, MemoryError):
        raise
    except Exception as error:  # whatever it trips over, it trips over this file
        if "No space left on device" in str(error):  # the tokenizer is written by a library that says so in words
            raise ResourceError("no space left to convert a GGUF file", "move the cache with `TCW_CACHE`") from None
        first = str(error).partition("\n")[0][:200]
        raise SourceError(
            f"transformers {version('transformers')} cannot convert `{path.name}` "
            f"(architecture `{ascii(header.architecture)[1:-1]}`): {first}",
            "give the model in its Hugging Face form, as safetensors",
        ) from error
    finally:
        log.setLevel(level)
        for name, function in slow.items():
            setattr(gguf, name, function)


def _skeleton(transformers: Any, config: Any) -> Any:
    """The model without storage, of the class that generates text where there is one."""
    import torch

    with torch.device("meta"):
        for name in config.architectures or ():
            return getattr(transformers, name)(config)
        autos = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModel")
        auto = next(a for a in (getattr(transformers, n) for n in autos) if type(config) in a._model_mapping)
        return auto.from_config(config)


def _write_config(transformers: Any, model: Any, config: Any, out: Path) -> None:
    config.architectures = [type(model).__name__]
    table = json.loads(config.to_json_string(use_diff=True))
    table.pop("_model_name_or_path", None)
    table["dtype"] = table["torch_dtype"] = "bfloat16"
    rope = table.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:  # readers before transformers 5 look for these two
        table["rope_theta"] = rope["rope_theta"]
        if rope.get("rope_type", "default") != "default":
            table["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"}
    (out / "config.json").write_text(json.dumps(table, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if model.can_generate():
        transformers.GenerationConfig.from_model_config(config).save_pretrained(out)


class _Plan:
    """Which tensor of the file becomes which parameter, by transformers' tables."""

    def __init__(self, header: GgufHeader, model: Any, config: Any) -> None:
        from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

        self.processor = TENSOR_PROCESSORS.get(header.architecture, TensorProcessor)(config=config.to_dict())
        self.names: dict[str, str] = get_gguf_hf_weights_map(model, self.processor)
        tied = set(model._tied_weights_keys or ()) if config.tie_word_embeddings else set()
        single = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
        self.infos: dict[str, TensorInfo] = {}
        for name, value in model.state_dict().items():
            keep = any(re.search(rf"(^|\.){re.escape(part)}(\.|$)", name) for part in single)
            if name not in tied:
                self.infos[name] = TensorInfo(name, "F32" if keep else "BF16", tuple(value.shape))
        self.tied = tied
        self.left = {n: sum(self._target(t) == n for t in header.tensors) for n in self.infos}
        self.held: dict[str, Any] = {}  # parameters that several tensors make together, until the last one came
        self.written: set[str] = set()
        self.unused: list[str] = []

    def _target(self, gguf_name: str) -> str | None:
        return self.names.get(gguf_name) or self.names.get(gguf_name.removesuffix(".weight"))

    def converted(self, path: Path, tensor: GgufTensor) -> Iterator[tuple[TensorInfo, np.ndarray]]:
        """The parameters that are complete once this tensor has been read."""
        target = self._target(tensor.name)
        if target in self.tied:
            return
        if target in self.infos and tensor.name == "token_embd.weight":
            yield self._finish(target, _rows(path, tensor, self.infos[target]), tensor)
            return
        values = _dequantise(path, tensor, 0, _row_count(tensor))
        state = {"tensors": self.held, "config": self.processor.config}
        try:
            result = self.processor.process(
                weights=values, name=tensor.name, tensor_key_mapping=self.names, parsed_parameters=state
            )
        except (ValueError, IndexError, KeyError, RuntimeError) as error:
            first = str(error).partition("\n")[0]
            raise FormatError(f"tensor `{tensor.name}` of `{path.name}` does not fit its config: {first}") from None
        if result.name in self.names and self.names[result.name] in self.infos:
            yield self._finish(self.names[result.name], result.weights, tensor)
        elif result.name is not None:
            self.unused.append(tensor.name)
        if target in self.left:
            self.left[target] -= 1
        for name in [n for n in self.held if not self.left.get(n)]:
            yield self._finish(name, self.held.pop(name).numpy(), tensor)

    def _finish(self, name: str, values: np.ndarray, tensor: GgufTensor) -> tuple[TensorInfo, np.ndarray]:
        info = self.infos.get(name)
        if info is None or name in self.written or tuple(values.shape) != info.shape:
            shown = f"{list(values.shape)} where the model has {list(info.shape) if info else 'nothing'}"
            raise FormatError(f"tensor `{tensor.name}` gives `{name}` {shown}", "the file does not fit its own config")
        self.written.add(name)
        return info, values if values.dtype == np.uint16 else _cast(values, info.dtype)

    def check_complete(self, path: Path) -> None:
        """Raise FormatError when a parameter of the model was in no tensor."""
        if missing := [n for n in self.infos if n not in self.written]:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise FormatError(f"`{path.name}` has no tensor for `{missing[0]}`{more}", "the file is not complete")


def _row_count(tensor: GgufTensor) -> int:
    return int(np.prod(tensor.shape[:-1], dtype=np.int64))


def _rows(path: Path, tensor: GgufTensor, info: TensorInfo) -> np.ndarray:
    """Dequantise and round in slices of rows: for embeddings, the largest tensors, which keep their order."""
    count, width = _row_count(tensor), tensor.shape[-1]
    step = max(1, _CHUNK // max(1, width))
    parts = [_cast(_dequantise(path, tensor, i, min(count, i + step)), info.dtype) for i in range(0, count, step)]
    return np.concatenate(parts) if parts else np.empty(tensor.shape, np.uint16)


def _dequantise(path: Path, tensor: GgufTensor, first: int, last: int) -> np.ndarray:
    """Rows [first, last) as float32 (the whole tensor keeps its shape)."""
    from gguf.quants import dequantize

    kinds, sizes = ggml_types()
    kind = kinds[tensor.type]
    block, width = sizes[kind]
    row = (tensor.shape[-1] if tensor.shape else 1) // block * width
    raw = read_range(path, tensor.start + first * row, tensor.start + last * row)
    raw = raw.view({"F32": "<f4", "F16": "<f2", "F64": "<f8"}.get(tensor.type, "u1")).reshape(last - first, -1)
    try:
        values = raw.astype(np.float32) if tensor.type == "F64" else dequantize(raw, kind)
    except (NotImplementedError, KeyError):
        raise SourceError(f"`{path.name}` holds {tensor.type}, which the `gguf` package cannot dequantise") from None
    whole = first == 0 and last == _row_count(tensor)
    return values.reshape(tensor.shape if whole else (last - first, tensor.shape[-1]))


def _cast(values: np.ndarray, dtype: str) -> np.ndarray:
    """Round float32 to BF16, as uint16 bit patterns, exactly as torch does (NaN stays NaN)."""
    import torch

    tensor = torch.from_numpy(np.require(values, np.float32, ["C", "W"]))
    return tensor.numpy() if dtype == "F32" else tensor.to(torch.bfloat16).view(torch.uint16).numpy()
