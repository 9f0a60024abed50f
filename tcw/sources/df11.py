"""An official DFloat11 folder as a source: its tensors are the matrices that went in, decoded when they are read.

The files hold no shapes and no names of the coded matrices: `pattern_dict` in config.json has the names, and the shapes
follow from the architecture. A matrix is decoded from the blocks of the stream that hold it, not from its whole group.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from tcw.codecs import df11
from tcw.errors import FormatError, SourceError
from tcw.safetensors_file import Slot, read_range
from tcw.source import Source
from tcw.sources import folder
from tcw.sources.skeleton import of_folder
from tcw.tensor import TensorData, TensorInfo

_MARK = ".encoded_exponent"
_MAX_PATTERNS, _MAX_PATTERN = 10_000, 10_000
_ATOM = r"(?:\\[.\-_d]|[\w.\-]|\[[\w\-]+\])"
# literals, `\d`, classes and one level of alternatives; repeats of single letters only, and two at most, so that no
# pattern takes longer than the square of a name
_HARMLESS = re.compile(rf"(?:{_ATOM}[+*?]?|\((?:\?:)?(?:{_ATOM}|\|)*\))*")
_RUNS = 64


@dataclass(frozen=True)
class Matrix:
    """A coded tensor: which group it is in, and its first and last weight there."""

    info: TensorInfo
    group: str
    first: int
    last: int


class DF11Source(Source):
    """A folder that dfloat11 0.2 to 0.5 wrote, or `tcw export --to dfloat11`."""

    kind = "df11"

    def __init__(self, path: Path, *, id: str | None = None, revision: str | None = None) -> None:
        """Read config.json and all headers. Raises SourceError or FormatError, naming what is wrong."""
        path = Path(path).absolute()
        names = sorted(p.name for p in path.glob("*.safetensors"))  # as the official loader: any index is ignored
        if not names:
            raise _no_files(path)
        super().__init__(path, id=id, revision=revision, files=[folder.inside(path, name) for name in names])
        groups = [name.removesuffix(_MARK) for name in self.stored if name.endswith(_MARK)]
        parts = {f"{group}.{part}" for group in groups for part in df11.PARTS}
        paths_of = _read_patterns(self.config)
        self.coded: dict[str, Matrix] = {}
        self._plain = {name: slot.info for name, (_, slot) in self.stored.items() if name not in parts}
        skeleton = of_folder(self.path, self.id) if groups else None
        for group in groups:
            for name, first, last in self._members(group, paths_of(group)):
                shape = skeleton.shape(name, last - first) if skeleton else None
                if shape is None:
                    count = last - first
                    raise SourceError(
                        f"the config of `{self.id}` does not say in which shape the {count} weights of `{name}` are"
                    )
                if name in self.coded or name in self._plain:
                    raise FormatError(f"`{name}` of `{self.id}` is stored twice")
                self.coded[name] = Matrix(TensorInfo(name, "BF16", shape), group, first, last)

    def tensors(self) -> dict[str, TensorInfo]:
        """Name, dtype and shape of every tensor, decoded ones first; no tensor is read."""
        return {name: matrix.info for name, matrix in self.coded.items()} | self._plain

    def read(self, name: str) -> TensorData:
        """Read one tensor; a coded one is decoded. Raises FormatError when its group does not decode."""
        matrix = self.coded.get(name)
        if matrix is None:
            return super().read(name)
        return TensorData(matrix.info, self._decode(matrix, matrix.first, matrix.last).view(np.uint8))

    def sample(self, name: str, max_bytes: int) -> TensorData:
        """Read up to `max_bytes` of a tensor, as a 1-D tensor: runs spread evenly over it; all of it when that fits."""
        matrix = self.coded.get(name)
        if matrix is None:
            return super().sample(name, max_bytes)
        numel, wanted = matrix.info.numel, max(1, max_bytes // 2)
        count = 1 if numel <= wanted else max(1, min(_RUNS, wanted // 4096))
        run = min(numel, wanted // count)
        starts = [matrix.first + k * (numel - run) // max(1, count - 1) for k in range(count)]
        words = np.concatenate([self._decode(matrix, start, start + run) for start in starts])
        return TensorData(TensorInfo(name, "BF16", (words.size,)), words.view(np.uint8))

    def _find(self, name: str) -> tuple[Path, Slot]:
        if name in self.stored and name not in self._plain:
            raise SourceError(f"`{name}` of `{self.id}` is a part of a coded group, no tensor of the model")
        return super()._find(name)

    def _members(self, group: str, paths: tuple[str, ...]) -> list[tuple[str, int, int]]:
        """Check the stored parts of a group and list its matrices: name, first and last weight."""
        infos = {part: self._part(group, part)[1].info for part in df11.PARTS}
        for part, info in infos.items():
            dtype, rank = ("I64", 1) if part == "split_positions" else ("U8", 2 if part == "luts" else 1)
            if info.dtype != dtype or len(info.shape) != rank:
                raise FormatError(
                    f"`{info.name}` should be {dtype} of {rank} dimensions, it is {info.dtype} {list(info.shape)}"
                )
        n, edges = infos["sign_mantissa"].numel, infos["split_positions"].numel
        names = [f"{group}.{path}.weight" for path in paths] or [f"{group}.weight"]
        if edges != len(names) - 1:
            raise FormatError(f"`{group}` has {edges + 1} matrices, and `pattern_dict` names {len(names)}")
        splits = self._read_part(group, "split_positions").view("<i8").tolist()
        bounds = [0, *splits, n]
        if any(a > b for a, b in pairwise(bounds)):
            raise FormatError(f"`{group}.split_positions` does not rise from 0 to {n}")
        return [(name, *edge) for name, edge in zip(names, pairwise(bounds), strict=True)]

    def arrays(self, group: str) -> dict[str, np.ndarray]:
        """The six arrays of a group, as `tcw.codecs.df11.Group` names and shapes them, unchecked."""
        found = {part: self._read_part(group, part) for part in df11.PARTS}
        found["luts"] = found["luts"].reshape(self._part(group, "luts")[1].info.shape)
        found["split_positions"] = found["split_positions"].view("<i8")
        return found

    def _part(self, group: str, part: str) -> tuple[Path, Slot]:
        if (name := f"{group}.{part}") not in self.stored:
            raise FormatError(f"`{self.id}` has no `{name}`", "the download may be incomplete; get all its files")
        return self.stored[name]

    def _read_part(self, group: str, part: str, begin: int = 0, end: int | None = None) -> np.ndarray:
        """Bytes begin..end of a stored part."""
        file, slot = self._part(group, part)
        size = slot.end - slot.start
        if not 0 <= begin <= (end := size if end is None else end) <= size:
            raise FormatError(f"`{group}.{part}` has {size} bytes where {end} are needed")
        data = read_range(file, slot.start + begin, slot.start + end)
        self._check(file)
        return data

    def _decode(self, matrix: Matrix, first: int, last: int) -> np.ndarray:
        """Weights first..last of a matrix's group as BF16 bit patterns, uint16."""
        if first == last:
            return np.empty(0, dtype=np.uint16)
        group = matrix.group
        size, n = (self._part(group, part)[1].info.numel for part in ("encoded_exponent", "sign_mantissa"))
        rows = self._part(group, "luts")[1].info.shape
        try:
            luts = self._read_part(group, "luts").reshape(rows)
            positions = df11.read_positions(self._read_part(group, "output_positions"), size, n)
            where = df11.span(positions, size, first, last)
            stream = self._read_part(group, "encoded_exponent", *where.stream)
            gaps = self._read_part(group, "gaps", *where.gaps)
            rest = self._read_part(group, "sign_mantissa", first, last)
            return df11.decode_span(where, luts, positions, stream, gaps, rest)
        except FormatError as error:
            raise FormatError(
                f"`{group}` of `{self.id}`: {error.message}", "the file is damaged; get it again"
            ) from None


def _no_files(path: Path) -> SourceError:
    if old := sorted(p.name for p in path.iterdir() if p.suffix in (".pkl", ".ptx")):
        return SourceError(
            f"`{path.name}` is of dfloat11 0.1, which kept weights in pickles: `{old[0]}`",
            "get the version of the model for dfloat11 0.2 or later, which has safetensors files",
        )
    return SourceError(f"`{path}` has no safetensors file", "the download is not complete; get the missing files")


def _read_patterns(config: dict[str, Any]) -> Callable[[str], tuple[str, ...]]:
    """Check `dfloat11_config`; the result maps a module's name to the paths of the Linear modules coded in it."""
    table = config.get("dfloat11_config")
    table = table if isinstance(table, dict) else {}
    patterns = table.get("pattern_dict")
    if table.get("bytes_per_thread") != 8 or table.get("threads_per_block") not in ([512], 512):
        raise FormatError("`dfloat11_config` is not of the layout with 512 threads of 8 bytes that tcw reads")
    if not isinstance(patterns, dict) or len(patterns) > _MAX_PATTERNS:
        raise FormatError("`dfloat11_config` has no usable `pattern_dict`")
    compiled = []
    for pattern, paths in patterns.items():
        if not isinstance(paths, list) or not all(isinstance(p, str) and re.fullmatch(r"[\w.\-]+", p) for p in paths):
            raise FormatError(f"`pattern_dict` lists something else than modules for `{ascii(pattern)[1:60]}`")
        compiled.append((_compile(pattern), tuple(paths)))

    def paths_of(group: str) -> tuple[str, ...]:
        found = [paths for pattern, paths in compiled if pattern.fullmatch(group)]
        if len(found) != 1:
            raise FormatError(f"{len(found)} patterns of `pattern_dict` match the group `{group}`, it takes one")
        return found[0]

    return paths_of


def _compile(pattern: str) -> re.Pattern[str]:
    """Compile a pattern out of a file, if it is of the kind that cannot run for ever."""
    repeats = len(re.findall(r"[+*?]", pattern.replace("(?:", "")))
    if len(pattern) > _MAX_PATTERN or repeats > 2 or not _HARMLESS.fullmatch(pattern):
        raise FormatError(f"`pattern_dict` has a pattern that tcw does not run: `{ascii(pattern)[1:60]}`")
    return re.compile(pattern)
