"""Writing an artifact: tensor after tensor into `<out>.partial`, with a journal from which a killed run goes on.

The order of the tensors and their division into shards follow from the source alone, so a resumed run writes the
same bytes as one that was never interrupted. The journal has one JSON line a tensor: its manifest entry, where its
parts lie and their CRC-32, which is checked before the run goes on.
"""

import contextlib
import json
import os
import platform
import shutil
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

import tcw
from tcw.artifact import FORMAT, MANIFEST, QUANT_METHOD, RAW, SAME, Artifact, Entry, dump_manifest, file_sha256
from tcw.disk import writing
from tcw.errors import FormatError, SourceError, UsageError
from tcw.safetensors_file import Slot, StreamWriter, header_bound, read_range
from tcw.source import Source
from tcw.staging import MARK, begin, claim, discard, hold, let_go, publish
from tcw.tensor import FLOAT_DTYPES, PART_DTYPES, TensorInfo

SHARD_BYTES = 5_000_000_000  # of original tensors; compressed shards come out smaller
INDEX = "model.safetensors.index.json"
_METADATA = {"format": "pt"}  # transformers refuses files that do not say this
_JOURNAL = "journal.jsonl"
_SCRATCH = "calibration"  # what a run keeps on the way, not part of the artifact
_VERSIONS = ("numpy", "numba", "safetensors", "torch", "transformers")


@dataclass(frozen=True)
class Stored:
    """One tensor, ready to be written: `method` is RAW or the one whose `parts` these are."""

    info: TensorInfo
    method: str
    sha256: str
    parts: dict[str, np.ndarray]
    params: dict[str, Any] = field(default_factory=dict)
    reason: str = ""  # why a tensor was kept raw
    rewritten: bool = False  # the source has other bytes: the model was rotated or scaled first

    @property
    def nbytes(self) -> int:
        """Bytes to be stored."""
        return sum(part.nbytes for part in self.parts.values())

    def named_parts(self) -> list[tuple[TensorInfo, np.ndarray]]:
        """The tensors of the safetensors file that hold this one."""
        if self.method == RAW:
            return [(self.info, self.parts[""])]
        return [
            (TensorInfo(f"{self.info.name}.{key}", PART_DTYPES[part.dtype.name], part.shape), part)
            for key, part in self.parts.items()
        ]


PartNames = Callable[[TensorInfo], Iterable[str]]
StorePolicies = Callable[[Artifact], list[dict[str, Any]]]  # writes files into the folder, returns manifest entries


class ArtifactWriter:
    """Writes one artifact. Use `add` for every tensor in `order`, then `finish`; `close` in any case."""

    def __init__(
        self, source: Source, recipe: dict[str, Any], out: Path, part_names: PartNames, *, force: bool, resume: bool
    ) -> None:
        self._source, self._recipe, self._out = source, recipe, out.absolute()
        self._folder = claim(self._out, [source.path, *source.weight_files()], force=force)
        self._shards = _shards(list(source.tensors().values()))
        self._room = [header_bound(_bound_infos(shard, part_names), _METADATA) for shard in self._shards]
        self.order = [info for shard in self._shards for info in shard]
        self._shard_of = {info.name: k for k, shard in enumerate(self._shards) for info in shard}
        self.entries: dict[str, Entry] = {}
        self.reasons: dict[str, int] = {}  # why tensors were kept raw, and how many
        self.scratch = self._folder / _SCRATCH
        self._sides = source.side_files()  # a bad one shows before the work, not after it
        self._first: dict[tuple[str, str, tuple[int, ...]], str] = {}  # compressed tensors by content
        self._weight_map: dict[str, str] = {}
        self._writer: StreamWriter | None = None
        self._current = -1
        self._hashing = ThreadPoolExecutor(1)
        self._file_hashes: dict[str, Future[str]] = {}
        self._lock = hold(self._folder) if self._folder.is_dir() else None
        try:
            if resume and self._folder.is_dir():
                self._resume()
            else:
                self._start(force)
        except BaseException:
            let_go(self._lock)
            raise

    def _start(self, force: bool) -> None:
        if self._folder.exists():
            if not force:
                raise UsageError(
                    f"`{self._folder.name}` is there from an interrupted run",
                    "pass `--resume` to go on with it, or `--force` to start again",
                )
            discard(self._folder)
            let_go(self._lock)
            self._lock = None
        with writing(self._folder):
            begin(self._folder)
            self._lock = hold(self._folder)
            self._journal = (self._folder / _JOURNAL).open("x", encoding="utf-8")
            self._log({"run": self._fingerprint()})

    def _fingerprint(self) -> dict[str, Any]:
        """What must be the same for a run to go on: the tool, the recipe, the source's files as they are now."""
        facts = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in self._source.weight_files()]
        files = [[name, size, time] for name, size, time in facts]
        return {
            "format": FORMAT,
            "tcw": tcw.__version__,
            "recipe": self._recipe,
            "source": self._source.id,
            "files": files,
        }

    def _log(self, line: dict[str, Any]) -> None:
        with writing(self._folder):
            self._journal.write(json.dumps(line, ensure_ascii=False) + "\n")
            self._journal.flush()

    def add(self, stored: Stored) -> Entry:
        """Write the next tensor of `order`. A compressed tensor equal to an earlier one is stored as its alias."""
        info, name = stored.info, stored.info.name
        content = (stored.sha256, info.dtype, info.shape)
        slots: list[Slot] = []
        crc = 0
        if stored.method != RAW and content in self._first:
            entry = Entry(info, SAME, stored.sha256, same_as=self._first[content], rewritten=stored.rewritten)
        else:
            writer = self._shard(self._shard_of[name])
            for part_info, part in stored.named_parts():
                if part_info.name in self._weight_map:
                    raise SourceError(
                        f"the part `{part_info.name}` has the name of another tensor",
                        f"keep `{info.name}` as it is: `skip` in a recipe",
                    )
                slots.append(writer.append(part_info, part))
                crc = zlib.crc32(part.reshape(-1).view(np.uint8).data, crc)
            bits = stored.nbytes * 8 / info.numel if info.numel else 0.0
            parts = () if stored.method == RAW else tuple(stored.parts)
            entry = Entry(info, stored.method, stored.sha256, stored.params, parts, crc, None, bits, stored.rewritten)
        self._record(entry, slots, stored.reason)
        places = [[s.info.name, s.info.dtype, list(s.info.shape), s.start, s.end] for s in slots]
        self._log({"name": name, "entry": entry.to_json(), "slots": places, "crc": crc, "reason": stored.reason})
        return entry

    def _record(self, entry: Entry, slots: list[Slot], reason: str) -> None:
        self.entries[entry.name] = entry
        if reason:
            self.reasons[reason] = self.reasons.get(reason, 0) + 1
        self._weight_map |= {s.info.name: self._shard_name(self._shard_of[entry.name]) for s in slots}
        if entry.method not in (RAW, SAME):
            self._first.setdefault((entry.sha256, entry.info.dtype, entry.info.shape), entry.name)

    def _shard_name(self, k: int) -> str:
        return f"model-{k + 1:05d}-of-{len(self._shards):05d}.safetensors"

    def _shard(self, k: int) -> StreamWriter:
        """The open shard `k`; the one before it is closed, and hashed while the work goes on."""
        while self._current < k:
            self._close_shard()
            self._current += 1
            self._writer = StreamWriter(
                self._folder / self._shard_name(self._current), self._room[self._current], _METADATA
            )
        assert self._writer is not None
        return self._writer

    def _close_shard(self) -> None:
        if self._writer is not None:
            self._writer.close()
            name = self._shard_name(self._current)
            self._file_hashes[name] = self._hashing.submit(file_sha256, self._folder / name)
            self._writer = None

    def _resume(self) -> None:
        """Read the journal, check what it says against the files, and open the last shard behind its last tensor."""
        lines = _read_journal(self._folder / _JOURNAL)
        if not lines or lines[0].get("run") != self._fingerprint():
            raise UsageError(
                f"`{self._folder.name}` was begun with another model, recipe or version of tcw",
                "pass `--force` without `--resume` to start again",
            )
        kept: dict[int, list[Slot]] = {}
        good = lines[:1]
        for line, info in zip(lines[1:], self.order, strict=False):
            slots = [Slot(TensorInfo(n, d, tuple(s)), a, b) for n, d, s, a, b in line["slots"]]
            k = self._shard_of[info.name]
            if line["name"] != info.name or not self._intact(k, slots, line["crc"]):
                break
            kept.setdefault(k, []).extend(slots)
            self._record(Entry.from_json(info.name, line["entry"]), slots, line.get("reason", ""))
            good.append(line)
        self._reopen(kept)
        draft = self._folder / f"{_JOURNAL}.new"
        with writing(draft):
            self._journal = draft.open("w", encoding="utf-8")
            for line in good:
                self._log(line)
            draft.replace(self._folder / _JOURNAL)

    def _intact(self, k: int, slots: list[Slot], crc: int) -> bool:
        found = 0
        for slot in slots:
            try:
                found = zlib.crc32(read_range(self._folder / self._shard_name(k), slot.start, slot.end).data, found)
            except SourceError:
                return False
        return found == crc

    def _reopen(self, kept: dict[int, list[Slot]]) -> None:
        """Finish again the shards before the last one that has tensors, and cut that one behind them."""
        for path in self._folder.glob("model-*.safetensors"):
            if path.name not in {self._shard_name(k) for k in kept}:
                path.unlink()
        for k in range(max(kept, default=-1) + 1):
            self._close_shard()
            self._current = k
            path, slots = self._folder / self._shard_name(k), kept.get(k, [])
            if slots:
                self._writer = StreamWriter.resume(path, self._room[k], slots, slots[-1].end, _METADATA)
            else:
                self._writer = StreamWriter(path, self._room[k], _METADATA)

    def finish(
        self,
        source_hashes: dict[str, str],
        calibration: dict[str, Any] | None = None,
        policies: StorePolicies | None = None,
    ) -> Path:
        """Write index, config, side files and manifest, and rename the folder into place.

        `calibration` is what the manifest says of the text and of what fell short; `kv_scales` in it stands by itself.
        `policies` gets the artifact as it will be but for them.
        """
        if missing := [info.name for info in self.order if info.name not in self.entries]:
            raise FormatError(f"tensor `{missing[0]}` was never written")
        if self.order:
            self._shard(len(self._shards) - 1)
        self._close_shard()
        with writing(self._folder):
            shutil.rmtree(self.scratch, ignore_errors=True)
            self._write_sides()
            manifest = self._manifest(source_hashes, self._files())
            said = dict(calibration or {})
            scales = said.pop("kv_scales", {})
            rare = {"transforms": list(self._source.transforms), "kv_scales": scales, "calibration": said}
            manifest |= {key: value for key, value in rare.items() if value}
        artifact = self._checked(manifest)
        if policies is not None:
            manifest["policies"] = policies(artifact)
            manifest["files"] = self._files()
            self._checked(manifest)
        with writing(self._folder):
            self._journal.close()
            (self._folder / _JOURNAL).unlink()
            publish(self._out)
        return self._out

    def _files(self) -> dict[str, Any]:
        """Bytes and SHA-256 of every file of the artifact but the manifest."""
        files = {p.relative_to(self._folder).as_posix(): p for p in sorted(self._folder.rglob("*")) if p.is_file()}
        return {name: self._facts(name, p) for name, p in files.items() if name not in (_JOURNAL, MARK, MANIFEST)}

    def _checked(self, manifest: dict[str, Any]) -> Artifact:
        """Write the manifest and open what there is: what cannot be opened again must not look finished."""
        with writing(self._folder):
            (self._folder / MANIFEST).write_text(dump_manifest(manifest), encoding="utf-8")
        return Artifact(self._folder)

    def _facts(self, name: str, path: Path) -> dict[str, Any]:
        known = self._file_hashes.get(name)
        return {"bytes": path.stat().st_size, "sha256": known.result() if known else file_sha256(path)}

    def _write_sides(self) -> None:
        total = sum((self._folder / name).stat().st_size for name in sorted(set(self._weight_map.values())))
        index = {"metadata": {"total_size": total}, "weight_map": self._weight_map}
        (self._folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
        for name in self._sides:
            target = self._folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self._source.path / name, target)
        mark = {"quant_method": QUANT_METHOD, "format_version": FORMAT, "dtype": _main_dtype(self.order)}
        config = {**self._source.config, "quantization_config": mark}
        (self._folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    def _manifest(self, source_hashes: dict[str, str], files: dict[str, Any]) -> dict[str, Any]:
        source = self._source
        sizes = {p.name: p.stat().st_size for p in source.weight_files()}
        return {
            "format": FORMAT,
            "tcw": tcw.__version__,
            "versions": _versions(),
            "source": {
                "id": source.id, "kind": source.kind, "revision": source.revision,
                "files": {n: {"bytes": sizes[n], "sha256": source_hashes[n]} for n in sorted(sizes)},
            },
            "recipe": self._recipe,
            "tensors": {info.name: self.entries[info.name].to_json() for info in self.order},
            "policies": [],
            "files": files,
            "verdict": None,
        }  # fmt: skip

    def close(self) -> None:
        """Let go of the open files; the `.partial` stays for `--resume`."""
        self._hashing.shutdown(wait=True, cancel_futures=True)
        if self._writer is not None:
            self._writer.abandon()
        with contextlib.suppress(OSError):
            self._journal.close()
        let_go(self._lock)
        self._lock = None


def _main_dtype(infos: list[TensorInfo]) -> str | None:
    """The dtype of most bytes: what a model without a dtype in its config is to be loaded as."""
    sizes: dict[str, int] = {}
    for info in infos:
        if info.dtype in FLOAT_DTYPES:
            sizes[info.dtype] = sizes.get(info.dtype, 0) + info.nbytes
    return max(sizes, key=lambda dtype: sizes[dtype], default=None)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _VERSIONS:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _shards(infos: list[TensorInfo]) -> list[list[TensorInfo]]:
    """Divide the tensors, in order, into shards of at most SHARD_BYTES of original bytes."""
    shards: list[list[TensorInfo]] = []
    room = 0
    for info in infos:
        if not shards or info.nbytes > room:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(info)
        room -= info.nbytes
    return shards


def _bound_infos(shard: list[TensorInfo], part_names: PartNames) -> list[TensorInfo]:
    """Tensors whose header entries are at least as long as those that will be written, raw or compressed."""
    infos: list[TensorInfo] = []
    for info in shard:
        longest = 10 ** len(str(max(info.nbytes, 1)))  # no part has more bytes than a tensor that is worth storing
        parts = [TensorInfo(f"{info.name}.{part}", "BF16", (longest, longest)) for part in part_names(info)]
        infos += parts or [info]
    return infos


def _read_journal(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a journal; a last line that was cut off is dropped."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    lines: list[dict[str, Any]] = []
    for line in text.split(os.linesep if os.linesep in text else "\n")[:-1]:
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines
