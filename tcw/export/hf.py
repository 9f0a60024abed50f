"""Plain Hugging Face safetensors: every tensor with the bytes it had, readable by any tool."""

import json
import math
import shutil
from pathlib import Path

from tcw.errors import UsageError
from tcw.events import Progress, Report
from tcw.safetensors_file import StreamWriter, header_bound
from tcw.source import Source
from tcw.tensor import TensorInfo

_METADATA = {"format": "pt"}


def write(source: Source, folder: Path, progress: Report, *, shard_gb: float = 5.0) -> None:
    """Write plain safetensors in files of up to `shard_gb` GB, the model's own config, and all side files.

    One tensor is in memory at a time.
    """
    if not 0 < shard_gb < math.inf:
        raise UsageError(f"target `hf`: `shard_gb` must be a size above 0, got `{shard_gb}`")
    copy_side_files(source, folder)
    shards = split(list(source.tensors().values()), int(shard_gb * 1e9))
    total = sum(info.nbytes for shard in shards for info in shard)
    where: dict[str, str] = {}
    done = 0
    for k, shard in enumerate(shards, 1):
        name = f"model-{k:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        with StreamWriter(folder / name, header_bound(shard, _METADATA), _METADATA) as writer:
            for info in shard:
                writer.append(info, source.read(info.name).data)
                where[info.name] = name
                done += info.nbytes
                progress(Progress("export", done, total, "bytes", info.name))
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def split(infos: list[TensorInfo], limit: int) -> list[list[TensorInfo]]:
    """Divide tensors, in order, into shards of at most `limit` bytes; a larger tensor has one to itself."""
    shards: list[list[TensorInfo]] = [[]]
    size = 0
    for info in infos:
        if shards[-1] and size + info.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(info)
        size += info.nbytes
    return shards


def copy_side_files(source: Source, folder: Path) -> None:
    """Copy config, tokenizer and the rest byte for byte; of a compressed model, config.json as it was before."""
    for relative in source.side_files():
        (folder / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source.path / relative, folder / relative)
    if source.kind in ("artifact", "df11"):
        config = {k: v for k, v in source.config.items() if k != "dfloat11_config"}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
