"""Safetensors in files of a given size, with the index that readers want, written a job at a time."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np

from tcw.errors import UsageError
from tcw.events import Progress, Report
from tcw.safetensors_file import StreamWriter, header_bound
from tcw.tensor import TensorInfo

_METADATA = {"format": "pt"}


@dataclass(frozen=True)
class Job:
    """Tensors that are written together, and how many bytes of the model they stand for.

    `make` gives the data of `infos`, in that order: contiguous arrays of as many bytes.
    """

    name: str
    infos: list[TensorInfo]
    make: Callable[[], list[np.ndarray]]
    covers: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes to be written."""
        return sum(info.nbytes for info in self.infos)


def write_shards(jobs: list[Job], folder: Path, progress: Report, shard_gb: float) -> None:
    """Write `model.safetensors`, or files of up to `shard_gb` GB and an index; one job's data is in memory at a time.

    Raises UsageError for a size that is none.
    """
    if not 0 < shard_gb < math.inf:
        raise UsageError(f"`shard_gb` must be a size above 0, got `{shard_gb}`")
    shards = split(jobs, int(shard_gb * 1e9))
    total, done = sum(job.covers for job in jobs), 0
    where: dict[str, str] = {}
    for k, shard in enumerate(shards, 1):
        file = f"model-{k:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        infos = [info for job in shard for info in job.infos]
        with StreamWriter(folder / file, header_bound(infos, _METADATA), _METADATA) as writer:
            for job in shard:
                for info, data in zip(job.infos, job.make(), strict=True):
                    writer.append(info, data)
                done += job.covers
                progress(Progress("export", done, total, "bytes", job.name))
        where |= dict.fromkeys((info.name for info in infos), file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(job.nbytes for job in jobs)}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


class _Sized(Protocol):
    @property
    def nbytes(self) -> int: ...


T = TypeVar("T", bound=_Sized)


def split(items: Sequence[T], limit: int) -> list[list[T]]:
    """Divide tensors or jobs, in order, into shards of at most `limit` bytes; a larger one has a shard to itself."""
    shards: list[list[T]] = [[]]
    size = 0
    for item in items:
        if shards[-1] and size + item.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(item)
        size += item.nbytes
    return shards
