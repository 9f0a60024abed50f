"""The strict parser and the streaming writer, against the safetensors library and against hostile files."""

import contextlib
import errno
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from tcw import safetensors_file
from tcw.errors import FormatError, ResourceError, SourceError
from tcw.safetensors_file import StreamWriter, header_bound, read_header, read_range, read_slot
from tcw.tensor import DTYPE_BITS, TensorInfo

GOOD = {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}


def made(path: Path, header: Any, data: bytes = b"\0\1\2\3", length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)
    return path


def written(path: Path, tensors: list[tuple[TensorInfo, bytes]], metadata: dict[str, str] | None = None) -> Path:
    with StreamWriter(path, header_bound([i for i, _ in tensors], metadata), metadata) as writer:
        for info, data in tensors:
            assert writer.tell() == writer.append(info, np.frombuffer(data, np.uint8)).start
    return path


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    arrays = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.zeros((0, 7), np.int64), "s": np.float16(3)}
    arrays = {k: np.asarray(v) for k, v in arrays.items()}
    save_file(arrays, tmp_path / "x.safetensors", metadata={"format": "np"})
    header = read_header(tmp_path / "x.safetensors")
    assert header.metadata == {"format": "np"}
    assert set(header.tensors) == set(arrays)
    for name, slot in header.tensors.items():
        assert slot.info.shape == arrays[name].shape
        assert read_slot(tmp_path / "x.safetensors", slot).tobytes() == arrays[name].tobytes()


NUMPY = {"U8": np.uint8, "I16": np.int16, "F16": np.float16, "F32": np.float32, "I64": np.int64, "BOOL": np.bool_}


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_library_reads_what_we_write(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    text = st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1).filter(lambda t: t != "__metadata__")
    shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
    names = data.draw(st.lists(text, unique=True, max_size=5))
    infos = [TensorInfo(n, data.draw(st.sampled_from(sorted(NUMPY))), data.draw(shapes)) for n in names]
    tensors = [(i, bytes(k % 2 for k in range(i.nbytes))) for i in infos]
    metadata = data.draw(st.sampled_from([None, {"format": "pt"}, {"é": '"\\'}]))
    path = written(tmp_path_factory.mktemp("w") / "x.safetensors", tensors, metadata)
    loaded = load_file(path)
    assert {n: (a.shape, a.tobytes()) for n, a in loaded.items()} == {i.name: (i.shape, d) for i, d in tensors}
    header = read_header(path)
    assert [s.info for s in header.tensors.values()] == infos
    assert header.metadata == (metadata or {})
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0, "tensors start 8-byte aligned"


def test_header_bound_holds_for_far_offsets() -> None:
    infos = [TensorInfo("t" * 50, "BF16", (2**20, 2**20)) for _ in range(3)]
    far = [safetensors_file.Slot(i, 2**59, 2**59 + i.nbytes) for i in infos]
    assert header_bound(infos) >= len(safetensors_file._dump(safetensors_file._table(far, 0, None)))
    assert header_bound([]) >= 2


ATTACKS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "not json": (b"{nonsense", {}, "not valid JSON"),
    "not an object": (b"[1,2]", {}, "does not start with"),
    "leading space": (b" {}", {"data": b""}, "does not start with"),
    "not utf-8": (b'{"\xff":1}', {}, "not UTF-8"),
    "two documents": (b"{}{}", {"data": b""}, "not valid JSON"),
    "deep": (b'{"a":' + b"[" * 100_000, {}, "not valid JSON"),
    "huge number": (b'{"a":' + b"9" * 10_000 + b"}", {}, "not valid JSON"),
    "a tensor twice": (b'{"a":%s,"a":%s}' % ((json.dumps(GOOD).encode(),) * 2), {}, "`a` twice"),
    "a field twice": (b'{"a":{"dtype":"U8","dtype":"I8","shape":[4],"data_offsets":[0,4]}}', {}, "`dtype` twice"),
    "header past the limit": ({}, {"length": 100_000_001}, "more than the limit"),
    "header of 2^64-1": ({}, {"length": 2**64 - 1}, "more than the limit"),
    "header past the file": ({}, {"length": 5000}, "bytes in all"),
    "no fields": ({"a": {}}, {}, "describes tensor `a`"),
    "an extra field": ({"a": {**GOOD, "x": 1}}, {}, "describes tensor `a`"),
    "no table": ({"a": 3}, {}, "describes tensor `a`"),
    "unknown dtype": ({"a": {**GOOD, "dtype": "U7"}}, {}, "unknown dtype `U7`"),
    "dtype a list": ({"a": {**GOOD, "dtype": ["U8"]}}, {}, "unknown dtype"),
    "negative shape": ({"a": {**GOOD, "shape": [-4]}}, {}, "impossible shape"),
    "two negatives": ({"a": {**GOOD, "shape": [-2, -2]}}, {}, "impossible shape"),
    "a boolean shape": ({"a": {**GOOD, "shape": [True, 4]}}, {}, "impossible shape"),
    "a fractional shape": ({"a": {**GOOD, "shape": [4.0]}}, {}, "impossible shape"),
    "a product past 2^64": ({"a": {**GOOD, "shape": [2**40, 2**40]}}, {}, "impossible shape"),
    "a product that wraps to 4": ({"a": {**GOOD, "shape": [2**62 + 1, 4]}}, {}, "impossible shape"),
    "many large sizes": ({"a": {**GOOD, "shape": [2**50] * 100_000}}, {}, "impossible shape"),
    "sizes disagree": ({"a": {**GOOD, "shape": [3]}}, {}, "needs another number"),
    "backwards": ({"a": {**GOOD, "data_offsets": [4, 0]}}, {}, "needs another number"),
    "negative offset": ({"a": {**GOOD, "data_offsets": [-4, 0]}}, {}, "not two sizes"),
    "three offsets": ({"a": {**GOOD, "data_offsets": [0, 2, 4]}}, {}, "not two sizes"),
    "truncated data": ({"a": GOOD}, {"data": b"\0\1"}, "ends before tensor `a`"),
    "a trailing payload": ({"a": GOOD}, {"data": b"\0\1\2\3PK"}, "2 bytes after its last tensor"),
    "only a payload": ({}, {"data": b"PK"}, "2 bytes after its last tensor"),
    "overlap": ({"a": GOOD, "b": GOOD}, {}, "overlap"),
    "partial overlap": ({"a": GOOD, "b": {**GOOD, "data_offsets": [2, 6]}}, {"data": b"\0" * 6}, "overlap"),
    "a hole": ({"a": GOOD, "b": {**GOOD, "data_offsets": [6, 10]}}, {"data": b"\0" * 10}, "hole before tensor `b`"),
    "a hole at the start": ({"a": {**GOOD, "data_offsets": [4, 8]}}, {"data": b"\0" * 8}, "hole before tensor `a`"),
    "a NUL in a name": ({"a\0b": GOOD}, {}, "not plain text"),
    "an escape in a name": ({"a\x1b[2J": GOOD}, {}, "not plain text"),
    "half a surrogate": (b'{"\\ud800":%s}' % json.dumps(GOOD).encode(), {}, "not plain text"),
    "no name": ({"": GOOD}, {}, "not plain text"),
    "metadata a list": ({"__metadata__": ["x"], "a": GOOD}, {}, "table of strings"),
    "metadata of numbers": ({"__metadata__": {"x": 1}, "a": GOOD}, {}, "table of strings"),
}  # fmt: skip


@pytest.mark.parametrize("name", ATTACKS)
def test_hostile_headers_are_refused(tmp_path: Path, name: str) -> None:
    header, more, message = ATTACKS[name]
    path = made(tmp_path / "evil.safetensors", header, **more)
    with pytest.raises(FormatError, match=r"`evil\.safetensors`") as caught:
        read_header(path)
    assert message in caught.value.message
    assert len(caught.value.message) < 250
    assert caught.value.message.isprintable()


def test_the_good_neighbour_of_the_attacks_is_read(tmp_path: Path) -> None:
    path = made(tmp_path / "x.safetensors", {"__metadata__": {"x": "1"}, "a": GOOD})
    assert read_slot(path, read_header(path).tensors["a"]).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("size", [0, 3, 7])
def test_a_file_without_a_length_is_refused(tmp_path: Path, size: int) -> None:
    (tmp_path / "x.safetensors").write_bytes(bytes(size))
    with pytest.raises(FormatError, match="too short"):
        read_header(tmp_path / "x.safetensors")


def test_missing_and_special_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no file"):
        read_header(tmp_path / "none.safetensors")
    with pytest.raises(SourceError, match="no file"):
        read_header(tmp_path)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_noise_never_crashes_the_parser(tmp_path_factory: pytest.TempPathFactory, noise: bytes) -> None:
    path = made(tmp_path_factory.mktemp("n") / "x.safetensors", b"{" + noise, b"")
    with contextlib.suppress(FormatError):
        assert read_header(path).tensors == {}


def test_a_file_that_shrinks_is_noticed(tmp_path: Path) -> None:
    path = made(tmp_path / "x.safetensors", {"a": GOOD})
    slot = read_header(path).tensors["a"]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(SourceError, match="shorter"):
        read_slot(path, slot)
    with pytest.raises(SourceError, match="cannot read"):
        read_range(tmp_path / "gone", 0, 1)


# ---- writing

INFOS = [TensorInfo("a", "U8", (3,)), TensorInfo("b.weight", "BF16", (4, 5)), TensorInfo("c", "F32", (7,))]
TENSORS = [(info, bytes((7 * k + 1) % 256 for k in range(info.nbytes))) for info in INFOS]


@pytest.mark.parametrize("kept", [0, 1, 2, 3])
@pytest.mark.parametrize("junk", [0, 1, 1000])
def test_resuming_gives_the_same_bytes(tmp_path: Path, kept: int, junk: int) -> None:
    whole = written(tmp_path / "whole", TENSORS, {"format": "pt"}).read_bytes()
    room, path = header_bound(INFOS, {"format": "pt"}), tmp_path / "part"
    writer = StreamWriter(path, room, {"format": "pt"})
    slots = [writer.append(info, np.frombuffer(data, np.uint8)) for info, data in TENSORS[:kept]]
    end = writer.tell()
    writer.abandon()
    with path.open("ab") as file:
        file.write(b"\xee" * junk)  # a tensor that was being written
    with pytest.raises(FormatError):
        read_header(path)  # and it does not look finished
    with StreamWriter.resume(path, room, slots, end, {"format": "pt"}) as again:
        for info, data in TENSORS[kept:]:
            again.append(info, np.frombuffer(data, np.uint8))
    assert path.read_bytes() == whole


def test_resuming_refuses_a_file_that_is_too_short(tmp_path: Path) -> None:
    room, path = header_bound(INFOS), tmp_path / "part"
    writer = StreamWriter(path, room)
    slots = [writer.append(info, np.frombuffer(data, np.uint8)) for info, data in TENSORS]
    end = writer.tell()
    writer.abandon()
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FormatError, match="shorter"):
        StreamWriter.resume(path, room, slots, end)
    with pytest.raises(FormatError, match="recorded"):
        StreamWriter.resume(path, room, slots[1:], end)
    with pytest.raises(FormatError, match="recorded"):
        StreamWriter.resume(path, room + 64, slots, end)


def test_an_error_leaves_no_readable_file(tmp_path: Path) -> None:
    def fails() -> None:
        with StreamWriter(tmp_path / "x", header_bound(INFOS)) as writer:
            writer.append(INFOS[0], np.zeros(3, np.uint8))
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    with pytest.raises(FormatError):
        read_header(tmp_path / "x")


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with StreamWriter(tmp_path / "x", header_bound(INFOS)) as writer:
        writer.append(INFOS[0], np.zeros(3, np.uint8))
        with pytest.raises(FormatError, match="written twice"):
            writer.append(INFOS[0], np.zeros(3, np.uint8))
        with pytest.raises(FormatError, match="should be 40"):
            writer.append(INFOS[1], np.zeros(39, np.uint8))
        with pytest.raises(FormatError, match="contiguous"):
            writer.append(INFOS[1], np.zeros((5, 4), np.uint16).T)
    writer.close()  # a second time does nothing
    assert list(read_header(tmp_path / "x").tensors) == ["a"]
    short = StreamWriter(tmp_path / "y", 8)
    short.append(INFOS[0], np.zeros(3, np.uint8))
    with pytest.raises(FormatError, match="were reserved"):
        short.close()


def test_arrays_of_any_dtype_are_taken_as_bytes(tmp_path: Path) -> None:
    data = np.arange(7, dtype=np.float32)
    with StreamWriter(tmp_path / "x", header_bound(INFOS)) as writer:
        writer.append(INFOS[2], data)
    assert load_file(tmp_path / "x")["c"].tolist() == data.tolist()


@pytest.mark.parametrize(("code", "words"), [(errno.ENOSPC, "no space left"), (errno.EACCES, "not allowed")])
def test_a_full_disk_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, words: str) -> None:
    writer = StreamWriter(tmp_path / "x", header_bound(INFOS))

    def fail(self: StreamWriter, data: bytes) -> None:
        raise OSError(code, "system says")

    monkeypatch.setattr(StreamWriter, "_write", fail)
    with pytest.raises(ResourceError, match=words) as caught:
        writer.append(INFOS[0], np.zeros(3, np.uint8))
    assert caught.value.hint
    writer.abandon()


def test_every_dtype_round_trips(tmp_path: Path) -> None:
    tensors = [(TensorInfo(f"t.{d}", d, (3, 5)), bytes(range(15 * b // 8))) for d, b in sorted(DTYPE_BITS.items())]
    path = written(tmp_path / "x", tensors)
    header = read_header(path)
    assert [(s.info, read_slot(path, s).tobytes()) for s in header.tensors.values()] == tensors


def test_more_dimensions_than_an_array_can_have(tmp_path: Path) -> None:
    for count, fine in ((64, True), (65, False)):
        entry = {"dtype": "U8", "shape": [1] * count, "data_offsets": [0, 1]}
        text = json.dumps({"a": entry}).encode()
        path = tmp_path / f"{count}.safetensors"
        path.write_bytes(len(text).to_bytes(8, "little") + text + b"x")
        if fine:
            assert read_header(path).tensors["a"].info.shape == (1,) * 64
        else:
            with pytest.raises(FormatError, match="impossible shape"):
                read_header(path)
