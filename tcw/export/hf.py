"""Plain Hugging Face safetensors: every tensor with the bytes it had, readable by any tool."""

import json
import shutil
from pathlib import Path

from tcw.events import Report
from tcw.export._shards import Job, write_shards
from tcw.source import Source
from tcw.tensor import TensorInfo


def write(source: Source, folder: Path, progress: Report, *, shard_gb: float = 5.0) -> None:
    """Write plain safetensors in files of up to `shard_gb` GB, the model's own config, and all side files.

    One tensor is in memory at a time.
    """
    copy_side_files(source, folder)
    write_shards([plain(source, info) for info in source.tensors().values()], folder, progress, shard_gb)


def plain(source: Source, info: TensorInfo) -> Job:
    """Write a tensor as it is, or as it decodes."""
    return Job(info.name, [info], lambda: [source.read(info.name).data], info.nbytes)


def copy_side_files(source: Source, folder: Path) -> None:
    """Copy config, tokenizer and the rest byte for byte; of a compressed model, config.json as it was before."""
    for relative in source.side_files():
        (folder / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source.path / relative, folder / relative)
    if source.kind in ("artifact", "df11"):
        config = {k: v for k, v in source.config.items() if k != "dfloat11_config"}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
