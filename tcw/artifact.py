"""The artifact: a Hugging Face folder with compressed tensors and `tcw.json`, the manifest. Spec: docs/format.md.

This module reads; tcw/artifact_writer.py writes. Nothing in a file is believed: names stay inside the folder, sizes
are compared with what is on disk, parts with the declared shapes, and hashes by `check_files` and `tcw verify`.
"""

import functools
import hashlib
import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from tcw import methods
from tcw.errors import FormatError
from tcw.source import Source
from tcw.tensor import MAX_DIMS, PART_DTYPES, TensorData, TensorInfo
from tcw.weights import Encoded, WeightMethod

MANIFEST = "tcw.json"
FORMAT = "1.3"
QUANT_METHOD = "tcw"
POLICIES = "policies/"  # the folder of what policies measured
RAW, SAME = "raw", "same"  # entries that no method made: stored as it was; stored once under another name
_MAX_MANIFEST = 1 << 30
_PART_KINDS = {kind: numpy_name for numpy_name, kind in PART_DTYPES.items()}
_DAMAGED = "the artifact is damaged: fetch it again, or compress the model again"
_HEX = frozenset("0123456789abcdef")


@dataclass(frozen=True)
class Entry:
    """What the manifest says of one tensor."""

    info: TensorInfo
    method: str
    sha256: str
    params: dict[str, Any] = field(default_factory=dict)
    parts: tuple[str, ...] = ()
    crc32: int = 0  # of the parts' bytes, in order
    same_as: str | None = None
    bits_per_weight: float = 0.0
    rewritten: bool = False  # the source has other bytes: the model was rotated or scaled first

    @property
    def name(self) -> str:
        """The tensor's name."""
        return self.info.name

    def to_json(self) -> dict[str, Any]:
        """The entry as it stands in the manifest."""
        entry: dict[str, Any] = {
            "method": self.method, "dtype": self.info.dtype, "shape": list(self.info.shape), "sha256": self.sha256,
            "bits_per_weight": round(self.bits_per_weight, 4),
        }  # fmt: skip
        if self.rewritten:
            entry["rewritten"] = True
        if self.method == SAME:
            entry["as"] = self.same_as
        elif self.method != RAW:
            entry |= {"parts": list(self.parts), "crc32": self.crc32, "params": self.params}
        return entry

    @classmethod
    def from_json(cls, name: str, entry: Any) -> "Entry":
        """Read an entry. Raises FormatError for anything that is not as docs/format.md says."""
        method = _field(entry, "method", str, name)
        info = TensorInfo(name, _field(entry, "dtype", str, name), _shape(name, _field(entry, "shape", list, name)))
        sha256 = _hash(_field(entry, "sha256", str, name), name)
        bits = entry.get("bits_per_weight", 0.0)
        if isinstance(bits, bool) or not isinstance(bits, int | float):
            raise FormatError(f"`{MANIFEST}`: `{name}` has a `bits_per_weight` that is no number")
        rewritten = entry.get("rewritten", False)
        if not isinstance(rewritten, bool):
            raise FormatError(f"`{MANIFEST}`: `{name}` has a `rewritten` that is neither true nor false")
        if method == RAW:
            return cls(info, method, sha256, bits_per_weight=float(bits), rewritten=rewritten)
        if method == SAME:
            other = _field(entry, "as", str, name)
            return cls(info, method, sha256, same_as=other, bits_per_weight=float(bits), rewritten=rewritten)
        parts = _field(entry, "parts", list, name)
        if (
            not parts
            or not all(isinstance(p, str) and p.isidentifier() for p in parts)
            or len(set(parts)) != len(parts)
        ):
            raise FormatError(f"`{MANIFEST}`: `{name}` has impossible part names")
        params, crc = _field(entry, "params", dict, name), _field(entry, "crc32", int, name)
        return cls(info, method, sha256, params, tuple(parts), crc, None, float(bits), rewritten)


class Artifact(Source):
    """An artifact folder, opened: as a Source its tensors read as they were before compression."""

    kind = "artifact"

    def __init__(self, path: Path, *, id: str | None = None, revision: str | None = None) -> None:
        """Read the manifest and the headers and check them against each other. Raises FormatError."""
        path = Path(path)
        self.manifest = read_manifest(path)
        self._listed = _check_sizes(path, self.manifest)
        shards = [path / name for name in sorted(self._listed) if "/" not in name and name.endswith(".safetensors")]
        super().__init__(path, id=id, revision=revision, files=shards)
        self.quantized_by = None
        self.config.pop("quantization_config", None)  # ours; the model's own configuration is what is left
        self.entries = {n: Entry.from_json(n, e) for n, e in _field(self.manifest, "tensors", dict, "it").items()}
        _check_entries(self.entries, {name: slot.info for name, (_, slot) in self.stored.items()})

    @classmethod
    def open(cls, path: str | Path) -> "Artifact":
        """Open an artifact folder. Raises FormatError."""
        return cls(Path(path))

    def tensors(self) -> dict[str, TensorInfo]:
        """The original tensors: name -> dtype and shape."""
        return {name: entry.info for name, entry in self.entries.items()}

    def entry(self, name: str) -> Entry:
        """The manifest's entry of a tensor, behind an alias the one that holds the bytes."""
        entry = self.entries[name]
        return self.entries[entry.same_as] if entry.same_as else entry

    def encoded(self, name: str) -> Encoded:
        """The stored parts of a compressed tensor (an alias gives those of the tensor it names).

        They are held to their CRC-32: who decodes elsewhere, on a GPU say, has no hash of the result to compare.
        Raises FormatError.
        """
        encoded, crc = self._stored(name), 0
        for part in encoded.parts.values():
            crc = zlib.crc32(part.reshape(-1).view(np.uint8).data, crc)
        if crc != self.entry(name).crc32:
            raise FormatError(f"the parts of `{name}` are not those that were written: another CRC-32", _DAMAGED)
        return encoded

    def _stored(self, name: str) -> Encoded:
        entry = self.entry(name)
        return Encoded({p: self._read_part(f"{entry.name}.{p}") for p in entry.parts}, entry.params)

    def read(self, name: str) -> TensorData:
        """Decode one tensor to the bytes it had; a lossless one is held to its SHA-256.

        Raises FormatError when the parts do not fit, or are not those that were written.
        """
        info, entry = self.entries[name].info, self.entry(name)
        if entry.method == RAW:
            tensor = TensorData(info, self.read_stored(entry.name).data)
        else:
            method = method_class(entry.method)
            tensor = method.decode(info, self._stored(name) if method.lossless else self.encoded(name))
        if self.is_lossless(name) and tensor.sha256() != self.entries[name].sha256:
            raise FormatError(f"`{name}` is not what was compressed: its SHA-256 is not the manifest's", _DAMAGED)
        return tensor

    def is_lossless(self, name: str) -> bool:
        """Say whether a tensor decodes to the very bytes it had."""
        method = self.entry(name).method
        return method == RAW or method_class(method).lossless

    def sample(self, name: str, max_bytes: int) -> TensorData:
        """Up to `max_bytes` of the decoded tensor, from its start, as a 1-D tensor."""
        whole = self.read(name)
        count = min(whole.info.numel, max_bytes * 8 // whole.info.bits)
        return TensorData(TensorInfo(name, whole.info.dtype, (count,)), whole.data[: count * whole.info.bits // 8])

    def side_files(self) -> list[Path]:
        """Everything but weights, index, manifest and what policies measured, relative to the folder."""
        weights = (".safetensors", ".safetensors.index.json")
        sides = [n for n in sorted(self._listed) if not n.startswith(POLICIES)]
        return [Path(n) for n in sides if "/" in n or not n.endswith(weights)]

    def tensor_bytes(self, name: str) -> int:
        """Bytes that one tensor takes: its parts, or itself when raw; 0 for an alias."""
        entry = self.entries[name]
        if entry.same_as:
            return 0
        names = [name] if entry.method == RAW else [f"{name}.{p}" for p in entry.parts]
        return sum(self.stored[n][1].info.nbytes for n in names)

    def methods(self) -> list[str]:
        """Names of the methods that made this artifact, in recipe order."""
        return [step["use"] for step in self.manifest["recipe"]["method"]]

    def limits(self) -> dict[str, float]:
        """The limits that the recipe asks `tcw verify` to hold."""
        return dict(self.manifest["recipe"].get("verify", {}))

    def check_files(self) -> Iterator[tuple[str, bool]]:
        """Hash every file of the artifact: yields (name, whether its SHA-256 is the manifest's)."""
        for name, facts in sorted(self._listed.items()):
            yield name, file_sha256(self.path / name) == facts["sha256"]

    def record_verdict(self, verdict: dict[str, Any]) -> None:
        """Store the last verdict in the manifest, atomically; a folder that cannot be written is left as it is."""
        self.manifest["verdict"] = verdict
        draft = self.path / f".{MANIFEST}.{os.getpid()}"
        try:
            draft.write_text(dump_manifest(self.manifest), encoding="utf-8")
            draft.replace(self.path / MANIFEST)
        finally:
            draft.unlink(missing_ok=True)

    def _read_part(self, stored: str) -> np.ndarray:
        part = self.read_stored(stored)
        if part.info.dtype not in _PART_KINDS:
            raise FormatError(f"the part `{stored}` cannot be {part.info.dtype}")
        return part.data.view(_PART_KINDS[part.info.dtype]).reshape(part.info.shape)


@functools.cache
def method_class(name: str) -> type[WeightMethod]:
    """The weight method that an entry names. Raises UnknownName."""
    cls = methods.get(name)
    if not issubclass(cls, WeightMethod):
        raise FormatError(f"`{name}` is not a method for weights")
    return cls


def read_manifest(folder: Path) -> dict[str, Any]:
    """Parse `tcw.json` and check its version. Raises FormatError."""
    path = folder / MANIFEST
    try:
        if path.stat().st_size > _MAX_MANIFEST:
            raise FormatError(f"`{MANIFEST}` is larger than {_MAX_MANIFEST} bytes")
        manifest = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_no_duplicates)
    except OSError as error:
        raise FormatError(f"cannot read `{MANIFEST}` in `{folder.name}`: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise FormatError(f"`{MANIFEST}` in `{folder.name}` is not valid JSON: {error}") from None
    version = _field(manifest, "format", str, "it")
    major, _, minor = version.partition(".")
    if not (major.isdigit() and minor.isdigit()):
        raise FormatError(f"`{MANIFEST}` has the impossible format version `{version}`")
    if major != FORMAT.partition(".")[0]:
        raise FormatError(f"`{folder.name}` was made by a newer tcw (format {version})", "pip install -U tcw")
    recipe = _field(manifest, "recipe", dict, "it")
    for step in _field(recipe, "method", list, "recipe"):
        _field(step, "use", str, "recipe")
    _field(manifest, "source", dict, "it")
    return dict(manifest)


def dump_manifest(manifest: dict[str, Any]) -> str:
    """The manifest as text: the same for the same content."""
    return json.dumps(manifest, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def plain_name(name: str) -> bool:
    """Say whether `name` is a relative POSIX path that stays inside its folder."""
    parts = PurePosixPath(name).parts
    return bool(parts) and "\\" not in name and "\0" not in name and not name.startswith("/") and ".." not in parts


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return table


def _field(table: Any, key: str, kind: type, where: str) -> Any:
    value = table.get(key) if isinstance(table, dict) else None
    if not isinstance(value, kind):
        raise FormatError(f"`{MANIFEST}`: {where} has no valid `{key}`")
    return value


def _shape(name: str, shape: list[Any]) -> tuple[int, ...]:
    if len(shape) > MAX_DIMS or any(
        isinstance(d, bool) or not isinstance(d, int) or not 0 <= d < 1 << 48 for d in shape
    ):
        raise FormatError(f"`{MANIFEST}`: `{name}` has an impossible shape")
    return tuple(shape)


def _hash(text: str, name: str) -> str:
    if len(text) != 64 or not set(text) <= _HEX:
        raise FormatError(f"`{MANIFEST}`: `{name}` has an impossible sha256")
    return text


def _check_sizes(folder: Path, manifest: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Check every listed file's name and size against the disk."""
    files = _field(manifest, "files", dict, "it")
    for name, facts in files.items():
        if not plain_name(name) or name == MANIFEST:
            raise FormatError(f"`{MANIFEST}` lists the file `{name}`, which leaves the folder")
        size = _field(facts, "bytes", int, f"`{name}`")
        _hash(_field(facts, "sha256", str, f"`{name}`"), name)
        try:
            found = (folder / name).stat().st_size
        except OSError:
            raise FormatError(f"`{name}` is missing from `{folder.name}`", "compress the model again") from None
        if found != size:
            raise FormatError(f"`{name}` has {found} bytes, the manifest says {size}", _DAMAGED)
    return dict(files)


def _check_entries(entries: dict[str, Entry], stored: dict[str, TensorInfo]) -> None:
    """Every entry must have what it names in the files, and every stored tensor must belong to one entry."""
    owned: set[str] = set()
    for name, entry in entries.items():
        if entry.method == SAME:
            other = entries.get(entry.same_as or "")
            if (
                other is None
                or other.same_as
                or (other.info.dtype, other.info.shape) != (entry.info.dtype, entry.info.shape)
            ):
                raise FormatError(f"`{name}` is said to be the same as `{entry.same_as}`, which does not fit")
            continue
        for part in [name] if entry.method == RAW else [f"{name}.{p}" for p in entry.parts]:
            if part not in stored:
                raise FormatError(f"`{part}` is missing from the safetensors files")
            if part in owned:
                raise FormatError(f"`{part}` belongs to two tensors")
            owned.add(part)
        if entry.method == RAW:
            found = stored[name]
            if (found.dtype, found.shape) != (entry.info.dtype, entry.info.shape):
                raise FormatError(
                    f"`{name}` is {found.dtype} {list(found.shape)} in the file, "
                    f"{entry.info.dtype} {list(entry.info.shape)} in the manifest"
                )
    if extra := sorted(set(stored) - owned):
        raise FormatError(f"`{extra[0]}` is in the safetensors files but not in the manifest")
