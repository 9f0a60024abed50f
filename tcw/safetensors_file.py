"""Safetensors files, read and written as a stream: a strict parser, one tensor at a time, no mmap.

    | 8 bytes: N, little-endian | N bytes: JSON header, padded with spaces | tensors, back to back |

Nothing that the header says is believed before it is checked, and nothing is allocated by an unchecked number.
Spec: https://github.com/huggingface/safetensors#format
"""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self

import numpy as np

from tcw.disk import writing
from tcw.errors import FormatError, SourceError
from tcw.tensor import DTYPE_BITS, MAX_DIMS, TensorInfo

MAX_HEADER = 100_000_000  # the limit of the safetensors library
_MAX_NUMEL = 2**60
_FIELDS = {"dtype", "shape", "data_offsets"}


@dataclass(frozen=True)
class Slot:
    """A tensor and where its bytes lie: absolute file offsets, `end` excluded."""

    info: TensorInfo
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """What a safetensors file says of itself, checked; `tensors` is in file order."""

    tensors: dict[str, Slot]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """Read and check the header of a safetensors file; no tensor is touched.

    Raises SourceError when the file cannot be read and FormatError, naming the file, when it is not valid.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise SourceError(f"there is no file `{path}`")
        size = path.stat().st_size
        with path.open("rb", buffering=0) as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8:
                _bad(path, "is too short to be a safetensors file")
            if length > MAX_HEADER:
                _bad(path, f"declares a header of {length} bytes, more than the limit of {MAX_HEADER}")
            if length > size - 8:
                _bad(path, f"declares a header of {length} bytes but holds {size} bytes in all")
            raw = file.read(length)
    except OSError as error:
        raise SourceError(f"cannot read `{path}`: {error.strerror}") from None
    table = _parse(path, raw)
    metadata = _metadata(path, table.pop("__metadata__", {}))
    slots = [_slot(path, name, entry, 8 + length) for name, entry in table.items()]
    slots.sort(key=lambda s: (s.start, s.end))
    _check_cover(path, slots, 8 + length, size)
    return Header({s.info.name: s for s in slots}, metadata)


def read_slot(path: Path, slot: Slot) -> np.ndarray:
    """Read one tensor's bytes, uint8 [slot.end - slot.start], into a fresh buffer. Threads may call this at once."""
    return read_range(path, slot.start, slot.end)


def read_range(path: Path, start: int, end: int) -> np.ndarray:
    """Read the bytes [start, end) of a file. Raises SourceError when the file is gone or shorter."""
    try:
        with Path(path).open("rb", buffering=0) as file:
            if os.fstat(file.fileno()).st_size < end:
                raise SourceError(f"`{Path(path).name}` is shorter than it was", "was it changed? start again")
            data = np.empty(end - start, np.uint8)
            view, done = data.data, 0
            file.seek(start)
            while done < data.size:  # one read gives 2 GiB at most
                count = file.readinto(view[done:])
                if not count:
                    raise SourceError(f"`{Path(path).name}` ended while it was read", "was it changed? start again")
                done += count
    except OSError as error:
        raise SourceError(f"cannot read `{path}`: {error.strerror}") from None
    return data


def _bad(path: Path, why: str) -> NoReturn:
    raise FormatError(f"`{path.name}` {why}", f"the file `{path}` is damaged or not safetensors; get it again")


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table: dict[str, Any] = {}
        for key, value in pairs:
            if key in table:
                _bad(path, f"names `{_shown(key)}` twice in its header")
            table[key] = value
        return table

    try:
        if raw[:1] != b"{":
            _bad(path, "has a header that does not start with `{`")
        table = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except UnicodeDecodeError:
        _bad(path, "has a header that is not UTF-8")
    except (ValueError, RecursionError):
        _bad(path, "has a header that is not valid JSON")
    return table


def _shown(text: object) -> str:
    """Text out of a file, short and harmless on a terminal."""
    shown = ascii(text)[1:-1] if isinstance(text, str) else ascii(text)
    return shown if len(shown) <= 80 else shown[:77] + "..."


def _metadata(path: Path, value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        _bad(path, "has a `__metadata__` that is not a table of strings")
    return value


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _MAX_NUMEL


def _slot(path: Path, name: str, entry: Any, base: int) -> Slot:
    tensor = f"tensor `{_shown(name)}`"
    if not name or any(c < " " or "\x7f" <= c <= "\x9f" or "\ud800" <= c <= "\udfff" for c in name):
        _bad(path, f"holds a {tensor} whose name is not plain text")
    if not isinstance(entry, dict) or set(entry) != _FIELDS:
        _bad(path, f"describes {tensor} by something else than {', '.join(sorted(_FIELDS))}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        _bad(path, f"gives {tensor} the unknown dtype `{_shown(dtype)}`")
    if not isinstance(shape, list) or len(shape) > MAX_DIMS or not all(map(_is_size, shape)):
        _bad(path, f"gives {tensor} an impossible shape")
    numel = 1
    for size in shape:  # stop early: a product of a million large numbers would take for ever
        numel *= size
        if numel > _MAX_NUMEL:
            _bad(path, f"gives {tensor} an impossible shape")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        _bad(path, f"gives {tensor} offsets that are not two sizes")
    start, end = offsets
    if end - start != numel * DTYPE_BITS[dtype] // 8:
        _bad(path, f"gives {tensor} {end - start} bytes where {dtype} {_shown(shape)} needs another number")
    return Slot(TensorInfo(name, dtype, tuple(shape)), base + start, base + end)


def _check_cover(path: Path, slots: list[Slot], start: int, size: int) -> None:
    """Tensors lie back to back from the header to the end of the file."""
    at = start
    for slot in slots:
        if slot.end > size:
            _bad(path, f"ends before tensor `{_shown(slot.info.name)}` does")
        if slot.start < at:
            _bad(path, f"has tensor `{_shown(slot.info.name)}` overlap another")
        if slot.start > at:
            _bad(path, f"has a hole before tensor `{_shown(slot.info.name)}`")
        at = slot.end
    if at != size:
        _bad(path, f"has {size - at} bytes after its last tensor")


def header_bound(infos: Iterable[TensorInfo], metadata: dict[str, str] | None = None) -> int:
    """Bytes that are surely enough for the JSON header of these tensors, wherever they come to lie."""
    far = 2**60  # more digits than any offset has
    table = _table([Slot(info, far, far) for info in infos], 0, metadata)
    return _padded(len(_dump(table)))


def _padded(size: int) -> int:
    return -(-size // 8) * 8


def _dump(table: dict[str, Any]) -> bytes:
    return json.dumps(table, separators=(",", ":")).encode()


def _table(slots: Iterable[Slot], base: int, metadata: dict[str, str] | None) -> dict[str, Any]:
    table: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    for slot in slots:
        offsets = [slot.start - base, slot.end - base]
        table[slot.info.name] = {"dtype": slot.info.dtype, "shape": list(slot.info.shape), "data_offsets": offsets}
    return table


class StreamWriter:
    """Writes a safetensors file tensor by tensor, behind a header whose room is set aside at the start.

    The header is written by `close`; until then, and after a crash, the file is no valid safetensors file.
    Use it as a context manager: an exception leaves the file without a header.
    """

    def __init__(self, path: Path, reserve_header: int, metadata: dict[str, str] | None = None) -> None:
        """Create `path` (it must not exist) with room for a header of `reserve_header` bytes, see `header_bound`."""
        with writing(path):
            self._start(path, reserve_header, metadata, "xb")
            try:
                self._write(bytes(self._base))
            except BaseException:
                self._file.close()
                raise

    def _start(self, path: Path, reserve_header: int, metadata: dict[str, str] | None, mode: str) -> None:
        if reserve_header > MAX_HEADER:
            raise FormatError(f"`{path.name}` would need a header of {reserve_header} bytes, the limit is {MAX_HEADER}")
        self._path, self._metadata = path, metadata
        self._base = 8 + _padded(max(reserve_header, 2))
        self._slots: dict[str, Slot] = {}
        self._at = self._base
        self._file = path.open(mode, buffering=0)  # unbuffered: a full disk shows at the write, not at the close

    def _write(self, data: Any) -> None:
        view, done = memoryview(data), 0
        while done < len(view):  # one write takes 2 GiB at most
            done += self._file.write(view[done:])

    @classmethod
    def resume(
        cls, path: Path, reserve_header: int, slots: Iterable[Slot], end: int, metadata: dict[str, str] | None = None
    ) -> Self:
        """Go on after a crash: keep the tensors `slots`, which fill the file up to `end`, and drop what follows.

        Raises FormatError when the file does not hold what `slots` say.
        """
        path, writer = Path(path), cls.__new__(cls)
        with writing(path):
            writer._start(path, reserve_header, metadata, "r+b")
            try:
                for slot in slots:
                    if slot.start != writer._at or slot.end - slot.start != slot.info.nbytes:
                        _bad(path, f"was not written as tensor `{_shown(slot.info.name)}` is recorded")
                    writer._slots[slot.info.name], writer._at = slot, slot.end
                if writer._at != end or os.fstat(writer._file.fileno()).st_size < end:
                    _bad(path, "is shorter than what was recorded of it")
                writer._file.truncate(end)
                writer._file.seek(end)
            except BaseException:
                writer._file.close()
                raise
        return writer

    def tell(self) -> int:
        """Absolute file offset where the next tensor will lie."""
        return self._at

    def append(self, info: TensorInfo, data: np.ndarray) -> Slot:
        """Write one tensor; `data` is any C-contiguous array of `info.nbytes` bytes. Returns where it lies."""
        if data.nbytes != info.nbytes or not data.flags.c_contiguous:
            raise FormatError(f"tensor `{info.name}` should be {info.nbytes} contiguous bytes, got {data.nbytes}")
        if info.name in self._slots:
            raise FormatError(f"tensor `{info.name}` is written twice to `{self._path.name}`")
        with writing(self._path):
            self._write(data.reshape(-1).view(np.uint8))
        slot = Slot(info, self._at, self._at + info.nbytes)
        self._slots[info.name], self._at = slot, slot.end
        return slot

    def flush(self) -> None:
        """Put everything so far on the disk, so that `resume` finds it after a crash."""
        with writing(self._path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Write the header into its room, sync to disk and close. Does nothing the second time."""
        if self._file.closed:
            return
        header = _dump(_table(self._slots.values(), self._base, self._metadata))
        room = self._base - 8
        try:
            if len(header) > room:
                raise FormatError(f"the header of `{self._path.name}` needs {len(header)} bytes, {room} were reserved")
            with writing(self._path):
                self.flush()  # the tensors first: a header must never stand before bytes that are not there
                self._file.seek(0)
                self._write(room.to_bytes(8, "little") + header.ljust(room))
                self.flush()
        finally:
            self._file.close()

    def abandon(self) -> None:
        """Close without a header: the file stays unreadable."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()
