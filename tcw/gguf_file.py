"""GGUF headers: a strict reader that says what a file holds and where, without reading a tensor.

    "GGUF" | u32 version | u64 tensors | u64 keys | key, type, value ... | name, dims, type, offset ... | padding | data

Every count and length is checked against the size of the file before it is used. Arrays (the vocabulary, the merges)
are walked, not kept. Spec: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import itertools
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from tcw.errors import FormatError, MissingDependency, SourceError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_STRING = 2**24
_MAX_NUMEL = 2**60


@dataclass(frozen=True)
class GgufTensor:
    """A tensor in a GGUF file: `shape` is row-major, `type` a ggml type name such as "Q4_K", offsets are absolute."""

    name: str
    shape: tuple[int, ...]
    type: str
    start: int
    end: int


@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF file says of itself, checked. An array in `metadata` stands as its length."""

    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]

    @property
    def architecture(self) -> str:
        """The model's architecture as GGUF names it ("llama", "qwen2", ...)."""
        return str(self.metadata.get("general.architecture", ""))


def read_gguf(path: Path) -> GgufHeader:
    """Read and check the header of a GGUF file.

    Raises SourceError when the file cannot be read, FormatError when it is damaged or cut short, and
    MissingDependency without the `gguf` package, which knows the block sizes.
    """
    try:
        with path.open("rb") as file:
            return _Reader(path, file).header()
    except OSError as error:
        raise SourceError(f"cannot read `{path}`: {error.strerror}") from None


def ggml_types() -> Any:
    """The enum of ggml types and their (elements, bytes) a block, from the `gguf` package."""
    try:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    except ImportError:
        raise MissingDependency("gguf", "reading GGUF files", "gguf") from None
    return GGMLQuantizationType, GGML_QUANT_SIZES


class _Reader:
    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file = path, file
        self.size = path.stat().st_size

    def bad(self, why: str) -> NoReturn:
        raise FormatError(f"`{self.path.name}` {why}", f"the file `{self.path}` is damaged; get it again")

    def room(self, count: int, width: int) -> int:
        """Check that `count` items of at least `width` bytes can still follow."""
        if count * width > self.size - self.file.tell():
            self.bad("ends in the middle of its header")
        return count

    def take(self, code: str) -> Any:
        size = struct.calcsize("<" + code)
        self.room(1, size)
        values = struct.unpack("<" + code, self.file.read(size))
        return values[0] if len(values) == 1 else values

    def text(self) -> str:
        length = self.take("Q")
        if length > _MAX_STRING:
            self.bad(f"holds a text of {length} bytes in its header")
        try:
            return self.file.read(self.room(length, 1)).decode("utf-8")
        except UnicodeDecodeError:
            return self.bad("holds a text that is not UTF-8 in its header")

    def header(self) -> GgufHeader:
        if self.file.read(4) != b"GGUF":
            self.bad("is not a GGUF file")
        version = self.take("I")
        if version not in (2, 3):
            what = "is a big-endian GGUF file" if version & 0xFFFF == 0 else f"is GGUF version {version}"
            raise FormatError(f"`{self.path.name}` {what}, tcw reads versions 2 and 3, little-endian")
        tensors, keys = self.take("QQ")
        metadata: dict[str, Any] = {}
        for _ in range(self.room(keys, 13)):
            key = self.text()
            if key in metadata:
                self.bad(f"holds the key `{ascii(key)[1:-1][:80]}` twice")
            metadata[key] = self.value(self.take("I"))
        found = [self.tensor() for _ in range(self.room(tensors, 24))]
        align = metadata.get("general.alignment", 32)
        if not isinstance(align, int) or align <= 0 or align & (align - 1) or align > 2**20:
            self.bad("has an impossible alignment")
        base = -(-self.file.tell() // align) * align
        return GgufHeader(metadata, self.place(found, base))

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.take(_SCALARS[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            self.bad(f"holds a value of the unknown type {kind}")
        inner, count = self.take("IQ")
        if inner in _SCALARS:
            width = struct.calcsize("<" + _SCALARS[inner])
            self.file.seek(self.room(count, width) * width, 1)
        elif inner == _STRING:
            for _ in range(self.room(count, 8)):
                self.file.seek(self.room(self.take("Q"), 1), 1)
        else:
            self.bad(f"holds an array of the unknown type {inner}")
        return count

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name, rank = self.text(), self.take("I")
        if rank > 8:
            self.bad(f"gives tensor `{ascii(name)[1:-1][:80]}` {rank} dimensions")
        dims = [self.take("Q") for _ in range(rank)]
        kind, offset = self.take("IQ")
        return name, tuple(reversed(dims)), kind, offset

    def place(self, found: list[tuple[str, tuple[int, ...], int, int]], base: int) -> dict[str, GgufTensor]:
        kinds, sizes = ggml_types()
        tensors: dict[str, GgufTensor] = {}
        for name, shape, kind, offset in found:
            shown = f"tensor `{ascii(name)[1:-1][:80]}`"
            if not name or name in tensors:
                self.bad(f"holds {shown} twice" if name else "holds a tensor without a name")
            try:
                ggml = kinds(kind)
            except ValueError:
                self.bad(f"gives {shown} the unknown type {kind}")
            block, width = sizes[ggml]
            numel = 1
            for size in shape:
                numel *= size
                if numel > _MAX_NUMEL:
                    self.bad(f"gives {shown} an impossible shape")
            if (shape[-1] if shape else 1) % block:
                self.bad(f"gives {shown} rows that are no whole number of {ggml.name} blocks")
            start = base + offset
            end = start + numel // block * width
            if end > self.size:
                self.bad(f"ends before {shown} does")
            tensors[name] = GgufTensor(name, shape, ggml.name, start, end)
        ordered = sorted(tensors.values(), key=lambda t: (t.start, t.end))
        for before, after in itertools.pairwise(ordered):
            if after.start < before.end:
                self.bad(f"has tensor `{ascii(after.name)[1:-1][:80]}` overlap another")
        return {t.name: t for t in ordered}
