"""`tcw demo`: prints each command, runs it, compares what came out."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tcw.cli import COMMANDS as ALL
from tcw.cli import demo

Run = Callable[..., Any]


class FakeSource:
    def __init__(self, hashes: dict[str, str]) -> None:
        self.hashes = hashes

    def tensors(self) -> dict[str, str]:
        return dict.fromkeys(self.hashes, "BF16")

    def read(self, name: str) -> Any:
        return SimpleNamespace(sha256=lambda: self.hashes[name])


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run no command; `came_out` is what the export is said to hold, `code` what each command returns."""
    state: dict[str, Any] = {"ran": [], "came_out": {"a": "1", "b": "2"}, "code": 0}

    def run(argv: list[str], *, cwd: Path, stdout: Any, check: bool) -> Any:
        state["ran"].append(argv[4:])
        state["folder"] = cwd
        for name, size in ((demo.SMALL, 67), (demo.PLAIN, 100)):
            (cwd / name).mkdir(exist_ok=True)
            (cwd / name / "model.safetensors").write_bytes(bytes(size))
        return SimpleNamespace(returncode=state["code"], stdout=b'{"schema": 1}')

    def open_source(text: Any, progress: Any = None) -> FakeSource:
        return FakeSource({"a": "1", "b": "2"} if text == demo.MODEL else state["came_out"])

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr("tcw.source.open_source", open_source)
    return state


def test_all_modes(tcw: Run, fake: dict[str, Any]) -> None:
    human = tcw("demo")
    assert human.code == 0, human.err
    printed = [line.removeprefix("$ ") for line in human.out.splitlines() if line.startswith("$ ")]
    assert [line.split()[:2] for line in printed] == [["tcw", command[0]] for command in demo.COMMANDS]
    assert "was stored in  67 B (67.0 %)" in human.out
    assert "came out       2 of 2 tensors with the same SHA-256" in human.out
    assert not fake["folder"].exists(), "the temporary folder is gone"
    assert (tcw("demo", "-q").out, tcw("demo", "-q").err) == ("identical\n", "")
    fake["ran"].clear()
    as_json = tcw("demo", "--json")
    data = json.loads(as_json.out)
    assert as_json.err == ""
    assert [c["command"] for c in data["commands"]] == printed
    assert all(argv[-1] == "--json" for argv in fake["ran"])
    assert data["tensors"] == {"checked": 2, "identical": 2}


@pytest.mark.parametrize("came_out", [{"a": "1", "b": "other"}, {"a": "1"}, {"b": "2", "a": "1", "c": "3"}])
def test_a_difference_is_exit_code_one(came_out: dict[str, str], tcw: Run, fake: dict[str, Any]) -> None:
    fake["came_out"] = came_out
    assert tcw("demo").code == 1
    assert tcw("demo", "-q").out == "different\n"


def test_a_command_that_fails_ends_the_demo(tcw: Run, fake: dict[str, Any]) -> None:
    fake["code"] = 1
    ran = tcw("demo")
    assert ran.code == 2
    assert "error: `tcw profile demo:smollm2` ended with exit code 1" in ran.err
    assert len(fake["ran"]) == 1


def test_a_folder_is_kept_and_not_overwritten(tcw: Run, fake: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    assert tcw("demo", "-o", folder).code == 0
    assert (folder / demo.SMALL).is_dir()
    refused = tcw("demo", "-o", folder)
    assert (refused.code, refused.out) == (2, "")
    assert "holds a demo already" in refused.err
    assert tcw("demo", "-o", folder, "--force").code == 0


def test_the_four_verbs_and_run() -> None:
    assert {"profile", "compress", "verify", "export", "run"} == {command[0] for command in demo.COMMANDS} <= set(ALL)


@pytest.mark.slow
def test_for_real(tcw: Run, smollm2: Path, tmp_path: Path) -> None:
    ran = tcw("demo", "-o", tmp_path / "demo", "--json")
    assert ran.code == 0, ran.err
    data = json.loads(ran.out)
    assert data["tensors"]["checked"] == data["tensors"]["identical"] > 200
    assert data["commands"][2]["result"]["verdict"] == "identical"
    assert 0.6 < data["bytes"]["compressed"] / data["bytes"]["original"] < 0.7
    assert data["seconds"] <= 300
