"""`tcw bench`: checks first; red times and saves nothing; rows as tables, JSON and lines; results are appended."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tcw import kernels

Run = Callable[..., Any]
BENCH = """
from tcw.bench import Timed
def check(device):
    return {"one": "", "two": %r}
def timed(device):
    yield Timed("4x4", "ours", lambda: None, 1_000_000)
    yield Timed("4x4", "theirs", lambda: None, 1_000_000)
"""


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A checkout with the operations `fake_right` and `fake_left`, on a machine without a GPU."""
    monkeypatch.setattr(kernels, "__path__", [str(tmp_path / "kernels")])
    monkeypatch.setattr("tcw.bench.clock.copy_bytes", lambda device: 4096)
    monkeypatch.setattr("tcw.device.copy_bandwidth", lambda device: 100.0)
    monkeypatch.setattr("tcw.device.available", lambda: ["cpu"])
    monkeypatch.setenv("TCW_CACHE", str(tmp_path / "cache"))
    (tmp_path / ".git").mkdir()
    for op in ("fake_right", "fake_left"):
        (tmp_path / "kernels" / op).mkdir(parents=True)
        (tmp_path / "kernels" / op / "bench.py").write_text(BENCH % "")
    yield tmp_path
    for name in [n for n in sys.modules if n.startswith("tcw.kernels.fake")]:
        del sys.modules[name]


def results(folder: Path, op: str) -> list[dict[str, Any]]:
    path = folder / "kernels" / op / "results.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_a_table_for_each_operation(tcw: Run, checkout: Path) -> None:
    ran = tcw("bench", "--repeat", 3)
    assert ran.code == 0
    lines = ran.out.splitlines()
    assert lines[0] == "fake_left: 2 of 2 cases are right"
    assert " ".join(lines[1].split()) == "case way ms 20-80 % GB/s % copy ratio GB/CPU s"
    assert [line.split()[:2] for line in lines[2:4]] == [["4x4", "ours"], ["4x4", "theirs"]]
    assert lines[5] == "fake_right: 2 of 2 cases are right"
    assert lines[-2].startswith("% copy: of 100 GB/s, read and written")
    assert "no GPU: on the CPU" in ran.err
    for op in ("fake_left", "fake_right"):
        assert f"2 rows appended to {checkout}/kernels/{op}/results.jsonl" in ran.err
        assert [r["way"] for r in results(checkout, op)] == ["ours", "theirs"]
    tcw("bench", "fake_left", "--repeat", 3)
    assert [len(results(checkout, op)) for op in ("fake_left", "fake_right")] == [4, 2]


def test_json_and_quiet(tcw: Run, checkout: Path) -> None:
    ran = tcw("bench", "fake_left", "--seconds", 0.01, "--json", "--device", "cpu")
    assert (ran.code, ran.err) == (0, "")
    data = json.loads(ran.out)
    assert data["checks"] == [{"op": "fake_left", "cases": 2, "wrong": {}}]
    assert data["rows"] == results(checkout, "fake_left")
    assert data["saved"] == {f"{checkout}/kernels/fake_left/results.jsonl": 2}
    first = data["rows"][0]
    assert (first["op"], first["case"], first["way"], first["bytes"]) == ("fake_left", "4x4", "ours", 1_000_000)
    assert first["ms_p20"] <= first["ms_p50"] <= first["ms_p80"]
    assert (first["copy_gbps"], first["ratio"], first["driver"]) == (100.0, 1.0, "")
    quiet = tcw("bench", "fake_left", "--repeat", 3, "-q", "--no-save")
    assert quiet.err == ""
    assert [line.rpartition(":")[0] for line in quiet.out.splitlines()] == [
        "fake_left 4x4 ours",
        "fake_left 4x4 theirs",
    ]
    assert len(results(checkout, "fake_left")) == 2


@pytest.mark.parametrize("mode", [[], ["--check"], ["-q"], ["--json"]])
def test_nothing_is_timed_or_saved_when_a_case_is_wrong(tcw: Run, checkout: Path, mode: list[str]) -> None:
    code = (BENCH % "3.2 times the error allowed").replace("lambda: None", "lambda: 1 / 0")
    (checkout / "kernels" / "fake_right" / "bench.py").write_text(code)
    ran = tcw("bench", *mode)
    assert ran.code == 1
    assert not list(checkout.rglob("*.jsonl"))
    if "--json" in mode:
        data = json.loads(ran.out)
        wrong = {check["op"]: check["wrong"] for check in data["checks"]}
        assert wrong == {"fake_left": {}, "fake_right": {"two": "3.2 times the error allowed"}}
        assert (data["ok"], data["rows"], data["saved"]) == (False, [], {})
    elif "-q" in mode:
        assert ran.out == "wrong: fake_right\n"
    else:
        assert "fake_right: 1 of 2 cases are right\ncase  what is wrong\ntwo   3.2 times the error allowed" in ran.out
        assert "error: wrong here: fake_right" in ran.err
        assert "nothing was timed" in ran.err


def test_check_times_nothing(tcw: Run, checkout: Path) -> None:
    for op in ("fake_left", "fake_right"):
        code = (BENCH % "").replace("lambda: None", "lambda: 1 / 0")
        (checkout / "kernels" / op / "bench.py").write_text(code)
    ran = tcw("bench", "--check")
    assert ran.code == 0
    assert ran.out == "fake_left: 2 of 2 cases are right\n\nfake_right: 2 of 2 cases are right\n"
    assert tcw("bench", "--check", "-q").out == "ok\n"
    assert not list(checkout.rglob("*.jsonl"))


def test_rows_go_to_a_file_of_choice_or_to_the_cache(tcw: Run, checkout: Path) -> None:
    chosen = checkout / "rows" / "all.jsonl"
    assert tcw("bench", "--repeat", 3, "-o", chosen).code == 0
    assert [json.loads(line)["op"] for line in chosen.read_text().splitlines()] == ["fake_left"] * 2 + [
        "fake_right"
    ] * 2
    assert results(checkout, "fake_left") == []
    (checkout / ".git").rmdir()  # an installed package, not a checkout
    ran = tcw("bench", "fake_left", "--repeat", 3)
    assert f"2 rows appended to {checkout}/cache/bench/fake_left.jsonl" in ran.err
    assert len((checkout / "cache" / "bench" / "fake_left.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("args", "message", "hint"),
    [
        (["fake_rigth"], "no kernel named `fake_rigth`", "did you mean `fake_right`?"),
        (["x"], "no kernel named `x`", "choose from: fake_left, fake_right"),
        (["--device", "cuda"], "the device `cuda` is not here", "choose from: cpu"),
        (["--no-save", "-o", "x"], "`-o` and `--no-save` contradict each other", "leave one of them out"),
        (["--repeat", "0"], "invalid value for `--repeat`", "--help"),
    ],
)
def test_one_clear_error(tcw: Run, checkout: Path, args: list[str], message: str, hint: str) -> None:
    ran = tcw("bench", *args)
    assert ran.code == 2
    assert ran.out == ""
    assert message in ran.err
    assert hint in ran.err


def test_a_full_disk_is_said(tcw: Run, checkout: Path) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full here")
    ran = tcw("bench", "fake_left", "--repeat", 3, "-o", full)
    assert ran.code == 2
    assert "no space left to write `/dev/full`" in ran.err
