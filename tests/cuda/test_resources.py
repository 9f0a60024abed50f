"""Tables of what kernels take: written, read again, and compared."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tcw import cuda
from tcw.cuda import resources
from tcw.cuda.build import Built
from tcw.cuda.log import Resources

ROW = Resources(registers=30, shared_bytes=2048, spill_stores=0, spill_loads=0, stack=16)


def built(arch: str = "sm_90", compiler: str = "13.5.37", **changes: int) -> Built:
    return Built("toy", arch, b"", {"two": replace(ROW, **changes), "one": ROW}, compiler)


def test_what_is_recorded_is_read_again(kernels: Path) -> None:
    path = resources.record("toy", [built("sm_80"), built("sm_90", registers=31)])
    assert path == kernels / "toy" / "resources.json"
    compiler, table = resources.recorded("toy")
    assert compiler == "13.5.37"
    assert table == {
        "one": {"sm_80": ROW, "sm_90": ROW},
        "two": {"sm_80": ROW, "sm_90": replace(ROW, registers=31)},
    }
    assert json.loads(path.read_text())["kernels"]["two"]["sm_90"] == [31, 2048, 16, 0, 0]
    assert resources.differences("toy", [built("sm_80"), built("sm_90", registers=31)]) == []


@pytest.mark.parametrize("changes", [{"registers": 29}, {"shared_bytes": 0}, {"stack": 8}, {"spill_loads": 4}])
def test_the_same_compiler_must_give_the_same_figures(kernels: Path, changes: dict[str, int]) -> None:
    resources.record("toy", [built()])
    (line,) = resources.differences("toy", [built(**changes)])
    assert line.startswith("toy: two on sm_90 takes Resources(")


@pytest.mark.parametrize(
    ("changes", "right"),
    [
        ({"registers": 46, "stack": 24, "shared_bytes": 4096}, True),
        ({"registers": 47}, False),
        ({"spill_stores": 4}, False),
        ({"spill_loads": 4}, False),
    ],
)
def test_another_compiler_has_limits(kernels: Path, changes: dict[str, int], right: bool) -> None:
    resources.record("toy", [built()])
    assert (resources.differences("toy", [built(compiler="13.0.48", **changes)]) == []) is right


def test_another_compiler_may_spill_where_the_table_does(kernels: Path) -> None:
    spilling = built(spill_stores=8, spill_loads=12)
    resources.record("toy", [spilling])
    assert resources.differences("toy", [built(compiler="14.0.1", spill_stores=20, spill_loads=20)]) == []
    assert resources.spills([spilling]) == ["two on sm_90: 8 bytes stored, 12 loaded"]


def test_nothing_recorded(kernels: Path) -> None:
    (line,) = resources.differences("toy", [built()])
    assert line == "toy: nothing is recorded: `python -m tcw.cuda.resources toy --record`"


def test_other_kernels_or_architectures(kernels: Path) -> None:
    resources.record("toy", [built()])
    less = Built("toy", "sm_90", b"", {"one": ROW}, "13.5.37")
    assert resources.differences("toy", [less]) == ["toy: other kernels or architectures than recorded: two"]
    (line,) = resources.differences("toy", [built("sm_80")])
    assert line.endswith("than recorded: architectures")


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Stands for the processes that compile; holds the jobs."""
    jobs: list[Any] = []

    def compile_all(ops: list[str]) -> list[Built]:
        jobs.extend(ops)
        if ops == ["broken"]:
            error = cuda.NoGpu("the kernel `broken` does not compile: x", "report it")
            raise error from RuntimeError("6: compilation log:\n\nx.cu(1): error: y\n\n\nThe above exception ...")
        return [replace(built("sm_80", spill_loads=4)), replace(built(), warnings=("x.cu(3): warning: z",))]

    monkeypatch.setattr(resources, "compile_all", compile_all)
    return jobs


def test_the_command(kernels: Path, in_this_process: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert resources.main([]) == 0
    assert in_this_process == ["toy"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "toy, CUDA 13.5.37"
    assert " ".join(lines[1].split()) == "kernel arch registers shared bytes stack spill stores spill loads"
    assert lines[2].split() == ["one", "sm_80", "30", "2048", "16", "0", "0"]
    assert lines[6:8] == ["sm_90: x.cu(3): warning: z", "spills: two on sm_80: 0 bytes stored, 4 loaded"]
    assert not (kernels / "toy" / "resources.json").exists()
    assert resources.main(["toy", "--record"]) == 0
    assert (kernels / "toy" / "resources.json").exists()


def test_the_command_shows_what_does_not_compile(
    kernels: Path, in_this_process: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert resources.main(["broken"]) == 1
    assert capsys.readouterr().out == "the kernel `broken` does not compile: x\n\n\nx.cu(1): error: y\n"
