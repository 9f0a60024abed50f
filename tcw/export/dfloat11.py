"""The official DFloat11 layout, for the package `dfloat11` and everything else that reads its checkpoints.

A group of matrices (see patterns.py) is read, coded and written before the next one, so memory holds one transformer
block at a time. What the layout cannot hold exactly stays as it is. `files=group` writes a file for each group, as
dfloat11 does on request; both forms are read by all versions since 0.2.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tcw.codecs import df11
from tcw.errors import SourceError, UsageError
from tcw.events import Progress, Report, silent
from tcw.export.hf import copy_side_files
from tcw.export.patterns import Unit, find_units, pattern_dict
from tcw.safetensors_file import StreamWriter, header_bound
from tcw.source import Source
from tcw.sources.skeleton import Skeleton, of_folder
from tcw.tensor import FLOAT_DTYPES, PART_DTYPES, TensorInfo

VERSION = "0.5.0"  # of the layout
_METADATA = {"format": "pt"}
_LARGEST = 2**31


def write(source: Source, folder: Path, progress: Report = silent, *, files: str = "one") -> dict[str, str]:
    """Write `source` into the existing folder `folder` in the official DFloat11 layout.

    Args:
        source: A model with BF16 matrices.
        folder: Where model.safetensors, config.json, the tokenizer ... go.
        progress: Told of every group and tensor.
        files: "one" for a single model.safetensors, "group" for one file a group and model.safetensors for the rest.

    Returns:
        The matrices that stay as they are, each with the reason.

    Raises:
        UsageError: `files` is neither.
        SourceError: Matrices are not BF16, transformers does not know the architecture, or nothing can be coded.
    """
    if files not in ("one", "group"):
        raise UsageError(f"`files` cannot be `{files}`", "choose from: one, group")
    skeleton = of_folder(source.path, source.id)
    infos = source.tensors()
    units, raw = find_units(infos.values(), skeleton)
    _check_dtypes(source, infos, units)
    job = _Job(source, folder, progress, skeleton, infos, raw, sum(i.nbytes for i in infos.values()))
    (job.one_file if files == "one" else job.many_files)(units)
    if not job.coded:
        why = next(iter(job.raw.values()), "it has no matrices")
        raise SourceError(f"nothing in `{source.id}` can be coded in the DFloat11 layout: {why}")
    copy_side_files(source, folder)
    _write_config(source, folder, pattern_dict(job.coded, units))
    return job.raw


def _check_dtypes(source: Source, infos: dict[str, TensorInfo], units: list[Unit]) -> None:
    for name in (name for unit in units for name in unit.tensors):
        if infos[name].dtype != "BF16":
            fix = "load it with `dtype=torch.bfloat16` and save it" if infos[name].dtype in FLOAT_DTYPES else ""
            raise SourceError(
                f"DFloat11 holds BF16 only, and `{name}` of `{source.id}` is {infos[name].dtype}",
                fix or "export the model before it was quantised",
            )


@dataclass
class _Job:
    """One export under way."""

    source: Source
    folder: Path
    progress: Report
    skeleton: Skeleton
    infos: dict[str, TensorInfo]
    raw: dict[str, str]  # matrices that stay as they are, and why
    total: int
    done: int = 0
    coded: list[Unit] = field(default_factory=list)

    def one_file(self, units: list[Unit]) -> None:
        """Write everything to model.safetensors: plain tensors first, widest dtype first, then the groups."""
        grouped = {name for unit in units for name in unit.tensors}
        plain = sorted((i for i in self.infos.values() if i.name not in grouped), key=lambda i: -i.bits)
        parts = [TensorInfo(f"{u.module}.{part}", "U8", (_LARGEST, _LARGEST)) for u in units for part in df11.PARTS]
        room = header_bound([*parts, *map(self._renamed, self.infos.values())], _METADATA)
        with StreamWriter(self.folder / "model.safetensors", room, _METADATA) as writer:
            for info in plain:
                self._copy(writer, info.name)
            for unit in units:
                group = self._code(unit)
                for name in unit.tensors if group is None else ():
                    self._copy(writer, name)
                _append(writer, unit, group)

    def many_files(self, units: list[Unit]) -> None:
        """Write each group, with the other tensors of its module, to a file, and the rest to model.safetensors."""
        written: set[str] = set()
        for unit in units:
            group = self._code(unit)
            if group is None:
                continue
            beside = [i for i in self.infos.values() if self.skeleton.full(i.name).startswith(unit.module + ".")]
            beside = sorted((i for i in beside if i.name not in unit.tensors), key=lambda i: -i.bits)
            parts = [i for i, _ in _arrays(unit, group)]
            path = self.folder / f"{unit.module.replace('.', '_')}.safetensors"
            with StreamWriter(
                path, header_bound([*parts, *map(self._renamed, beside)], _METADATA), _METADATA
            ) as writer:
                for info in beside:
                    self._copy(writer, info.name)
                _append(writer, unit, group)
            written |= {i.name for i in beside} | set(unit.tensors)
        rest = [i for i in self.infos.values() if i.name not in written]
        if not rest:
            return
        room = header_bound(map(self._renamed, rest), _METADATA)
        with StreamWriter(self.folder / "model.safetensors", room, _METADATA) as writer:
            for info in sorted(rest, key=lambda i: -i.bits):
                self._copy(writer, info.name)

    def _renamed(self, info: TensorInfo) -> TensorInfo:
        return TensorInfo(self.skeleton.full(info.name), info.dtype, info.shape)

    def _copy(self, writer: StreamWriter, name: str) -> None:
        writer.append(self._renamed(self.infos[name]), self.source.read(name).data)
        self._advance(self.infos[name].nbytes, name)

    def _code(self, unit: Unit) -> df11.Group | None:
        """Code the matrices of a unit; None, with a note, where they have to stay as they are."""
        sizes = tuple(self.infos[name].numel for name in unit.tensors)
        words, at = np.empty(sum(sizes), dtype=np.uint16), 0
        for name, size in zip(unit.tensors, sizes, strict=True):
            words[at : at + size] = self.source.read(name).words
            at += size
        try:
            group = df11.encode(words, sizes)
            why = "" if group.nbytes < words.nbytes else "it would not get smaller"
        except df11.Uncodable as error:
            why = str(error)
        if why:
            self.raw |= dict.fromkeys(unit.tensors, why)
            self._advance(0, f"`{unit.module}` stays as it is: {why}")
            return None
        self.coded.append(unit)
        self._advance(words.nbytes, unit.module)
        return group

    def _advance(self, count: int, note: str) -> None:
        self.done += count
        self.progress(Progress("export", self.done, self.total, "bytes", note))


def _arrays(unit: Unit, group: df11.Group) -> list[tuple[TensorInfo, np.ndarray]]:
    """The tensors of a group; those whose size may be odd come last."""
    parts = ("split_positions", "output_positions", "luts", "gaps", "sign_mantissa", "encoded_exponent")
    arrays = [(f"{unit.module}.{part}", getattr(group, part)) for part in parts]
    return [(TensorInfo(name, PART_DTYPES[a.dtype.name], a.shape), a) for name, a in arrays]


def _append(writer: StreamWriter, unit: Unit, group: df11.Group | None) -> None:
    for info, array in _arrays(unit, group) if group else ():
        writer.append(info, array)


def _write_config(source: Source, folder: Path, patterns: dict[str, list[str]]) -> None:
    config = _for_older_readers(source.config)
    config["dfloat11_config"] = {
        "version": VERSION, "threads_per_block": [512], "bytes_per_thread": 8, "pattern_dict": patterns,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _for_older_readers(config: dict[str, Any]) -> dict[str, Any]:
    """Say the rotary parameters also as transformers 4 does, which dfloat11 0.5.0 runs on; it ignores the newer key.

    Without `rope_theta` it takes a default without a word, and the model computes something else.
    """
    config = {k: _for_older_readers(v) if k == "text_config" and isinstance(v, dict) else v for k, v in config.items()}
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        return config
    for key in ("rope_theta", "partial_rotary_factor"):
        if key in rope:
            config.setdefault(key, rope[key])
    if rope.get("rope_type", "default") != "default":
        config.setdefault("rope_scaling", {k: v for k, v in rope.items() if k != "rope_theta"})
    return config
