"""Compiled kernels on disk: what is damaged is made again, what cannot be written is done without."""

import subprocess
import sys
from pathlib import Path

import pytest

from tcw.cuda import cache
from tcw.cuda.build import compile_op

from .fakes import Compiler

HEADER = {"compiler": "13.5.37", "resources": {}}


@pytest.fixture
def stored(compiler: Compiler) -> Path:
    """The file of an op that was compiled once."""
    compile_op("toy", "sm_90")
    (file,) = cache.place().iterdir()
    return file


def test_the_second_time_is_read(compiler: Compiler, stored: Path) -> None:
    assert compile_op("toy", "sm_90") == compile_op("toy", "sm_90")
    assert compiler.compiled == [("toy.cu", "sm_90")]
    assert stored.name.startswith("toy-sm_90-")


def test_what_is_read_is_what_was_compiled(compiler: Compiler, stored: Path) -> None:
    read = compile_op("toy", "sm_90")
    stored.unlink()
    made = compile_op("toy", "sm_90")
    assert read == made
    assert made.resources["two"].spill_loads == 12
    assert (made.compiler, made.arch) == ("13.5.37", "sm_90")
    assert made.cubin.endswith(b"*a = s[p[1]]; }\n")


@pytest.mark.parametrize("place", [0, 31, 32, 33, 35, 36, 40, 100, -1, "middle"])
def test_a_changed_byte_is_found(
    compiler: Compiler, stored: Path, place: int | str, caplog: pytest.LogCaptureFixture
) -> None:
    whole = stored.read_bytes()
    data = bytearray(whole)
    data[len(data) // 2 if isinstance(place, str) else place] ^= 0x10
    stored.write_bytes(data)
    with caplog.at_level("INFO", "tcw"):
        built = compile_op("toy", "sm_90")
    assert len(compiler.compiled) == 2
    assert "is damaged and is compiled again" in caplog.text
    assert built.cubin.startswith(b"\x7fELF")
    assert stored.read_bytes() == whole


@pytest.mark.parametrize("size", [0, 1, 32, 35, 36, 37, 150, -1])
def test_a_file_cut_short_is_found(compiler: Compiler, stored: Path, size: int) -> None:
    whole = stored.read_bytes()
    stored.write_bytes(whole[:size])
    compile_op("toy", "sm_90")
    assert len(compiler.compiled) == 2
    assert stored.read_bytes() == whole


def test_a_longer_file_is_found(compiler: Compiler, stored: Path) -> None:
    with stored.open("ab") as file:
        file.write(b"\0")
    compile_op("toy", "sm_90")
    assert len(compiler.compiled) == 2


def test_a_folder_in_the_place_of_the_file_costs_only_time(
    compiler: Compiler, stored: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stored.unlink()
    stored.mkdir()
    (stored / "mine").touch()
    with caplog.at_level("INFO", "tcw"):
        assert compile_op("toy", "sm_90").resources
    assert "cannot read the compiled kernel" in caplog.text
    assert "cannot keep the compiled kernel" in caplog.text
    assert [path.name for path in cache.place().iterdir()] == [stored.name]  # nothing half written stays


def test_a_cache_that_cannot_be_written_costs_only_time(
    compiler: Compiler, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TCW_CACHE", str(tmp_path / "file" / "cache"))
    with caplog.at_level("INFO", "tcw"):
        assert compile_op("toy", "sm_90") == compile_op("toy", "sm_90")
    assert len(compiler.compiled) == 2
    assert "cannot keep the compiled kernel" in caplog.text


WRITER = """
import sys
from tcw.cuda import cache
for i in range(300):
    cache.write("op", {"by": sys.argv[1]}, sys.argv[1].encode() * 20_000)
"""


def test_processes_that_write_the_same_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TCW_CACHE", str(tmp_path))
    cache.write("op", {"by": "c"}, b"c" * 20_000)
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, name]) for name in "ab"]
    seen = set()
    while any(writer.poll() is None for writer in writers):
        found = cache.read("op")
        assert found is not None
        header, cubin = found
        assert cubin == str(header["by"]).encode() * 20_000
        seen.add(header["by"])
    assert [writer.returncode for writer in writers] == [0, 0]
    assert seen & {"a", "b"}
    assert [path.name for path in cache.place().iterdir()] == ["op.kernel"]
