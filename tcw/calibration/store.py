"""What calibration made of each block, on the disk: an interrupted run goes on from it, and the pipeline takes it.

`block-00012.safetensors` has the parts of the block's tensors, `block-00012.json`, written last, says what they are.
"""

import json
import shutil
import zlib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from tcw.artifact import RAW
from tcw.artifact_writer import Stored
from tcw.disk import writing
from tcw.errors import FormatError, SourceError, UsageError
from tcw.safetensors_file import StreamWriter, header_bound, read_header, read_slot
from tcw.tensor import PART_DTYPES, TensorData, TensorInfo
from tcw.weights import Encoded

_KINDS = {kind: name for name, kind in PART_DTYPES.items()}
_RUN = "run.json"


@dataclass(frozen=True)
class Result:
    """What became of one tensor: coded by `method`, or (`method` None) to be stored as it is, with other `values`.

    `sha256` is of the bytes that were coded or are to be stored; `rewritten` says that the source has others.
    """

    info: TensorInfo
    method: str | None
    sha256: str
    encoded: Encoded | None = None
    values: TensorData | None = None
    rewritten: bool = False

    def stored(self) -> Stored:
        """The tensor as the artifact's writer takes it."""
        if self.encoded is not None and self.method is not None:
            parts, params = self.encoded.parts, self.encoded.params
            return Stored(self.info, self.method, self.sha256, parts, params, rewritten=self.rewritten)
        assert self.values is not None
        return Stored(self.info, RAW, self.sha256, {"": self.values.data}, rewritten=self.rewritten)


@dataclass(frozen=True)
class Store:
    """A folder of results. Picklable; processes may read at once."""

    folder: Path

    def begin(self, fingerprint: dict[str, Any], resume: bool) -> None:
        """Make the folder, or go on with it. Raises UsageError when it was begun with other data or options."""
        path = self.folder / _RUN
        if resume and path.is_file():
            try:
                known = json.loads(path.read_text(encoding="utf-8"))
            except ValueError:
                known = None
            if known != fingerprint:
                raise UsageError(
                    "the interrupted run was calibrated with another text or other options",
                    "pass `--force` without `--resume` to start again",
                )
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        with writing(self.folder):
            self.folder.mkdir(parents=True)
            path.write_text(json.dumps(fingerprint), encoding="utf-8")

    def save(self, key: str, results: list[Result], extra: dict[str, Any] | None = None) -> None:
        """Write a block's results; `extra` is small JSON that comes back from `facts`."""
        arrays: dict[str, tuple[TensorInfo, np.ndarray]] = {}
        table: dict[str, Any] = {}
        for result in results:
            name, crc = result.info.name, 0
            if result.encoded is not None:
                for part, array in result.encoded.parts.items():
                    key_of_part = f"{name}.{part}"
                    arrays[key_of_part] = TensorInfo(key_of_part, PART_DTYPES[array.dtype.name], array.shape), array
            elif result.values is not None:
                arrays[name] = result.info, result.values.data
            parts = list(result.encoded.parts) if result.encoded else []
            for array in [arrays[f"{name}.{p}"][1] for p in parts] or [arrays[name][1]]:
                crc = zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data, crc)
            table[name] = {
                "dtype": result.info.dtype, "shape": list(result.info.shape), "method": result.method, "crc32": crc,
                "params": result.encoded.params if result.encoded else {}, "parts": parts, "sha256": result.sha256,
                "rewritten": result.rewritten,
            }  # fmt: skip
        path = self.folder / f"{key}.safetensors"
        path.unlink(missing_ok=True)
        with StreamWriter(path, header_bound([info for info, _ in arrays.values()])) as writer:
            for info, array in arrays.values():
                writer.append(info, array)
        draft = self.folder / f"{key}.json.new"
        with writing(draft):
            draft.write_text(json.dumps({"tensors": table, "extra": extra or {}}), encoding="utf-8")
            draft.replace(self.folder / f"{key}.json")

    def facts(self, key: str) -> dict[str, Any] | None:
        """What `save` wrote about a block, None when it has not; a file that is damaged counts as none."""
        try:
            return dict(json.loads((self.folder / f"{key}.json").read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return None

    @cached_property
    def index(self) -> "dict[str, tuple[str, dict[str, Any]]]":
        """Every tensor that has a result: name -> (block's key, its facts)."""
        found: dict[str, tuple[str, dict[str, Any]]] = {}
        for path in sorted(self.folder.glob("*.json")):
            if path.name != _RUN and (facts := self.facts(path.stem)):
                found |= {name: (path.stem, entry) for name, entry in facts["tensors"].items()}
        return found

    def get(self, name: str) -> Result | None:
        """The result of one tensor, None when it has none. Raises FormatError when its bytes are not those written."""
        if name not in self.index:
            return None
        key, entry = self.index[name]
        return self.read(key, name, entry)

    def read(self, key: str, name: str, entry: dict[str, Any]) -> Result:
        """Read a result back, held to its CRC-32."""
        info = TensorInfo(name, entry["dtype"], tuple(entry["shape"]))
        path = self.folder / f"{key}.safetensors"
        slots = read_header(path).tensors
        arrays, crc = {}, 0
        try:
            for part in entry["parts"] or [""]:
                slot = slots[f"{name}.{part}" if part else name]
                data = read_slot(path, slot)
                crc = zlib.crc32(data.data, crc)
                arrays[part] = data.view(_KINDS[slot.info.dtype]).reshape(slot.info.shape) if part else data
        except KeyError:
            raise FormatError(f"`{path.name}` lacks a part of `{name}`", "start again with `--force`") from None
        if crc != entry["crc32"]:
            raise FormatError(f"`{path.name}` is damaged", "start again with `--force`")
        common = {"sha256": entry["sha256"], "rewritten": entry["rewritten"]}
        if entry["method"] is None:
            return Result(info, None, values=TensorData(info, arrays[""]), **common)
        return Result(info, entry["method"], encoded=Encoded(arrays, entry["params"]), **common)

    def results(self, key: str) -> dict[str, Result]:
        """All results of a block."""
        facts = self.facts(key) or {"tensors": {}}
        return {name: self.read(key, name, entry) for name, entry in facts["tensors"].items()}

    def intact(self, key: str) -> bool:
        """Say whether a block was written whole."""
        try:
            return self.facts(key) is not None and self.results(key) is not None
        except (FormatError, SourceError):
            return False


@dataclass(frozen=True)
class Calibrated:
    """What the pipeline gets: the results, and what is to be said about the run."""

    store: Store | None = None
    notes: tuple[str, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)

    def get(self, name: str) -> Result | None:
        """The result of one tensor, None when it is to be coded from its weights alone."""
        return self.store.get(name) if self.store else None


NOTHING = Calibrated()
