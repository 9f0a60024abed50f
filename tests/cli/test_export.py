"""`tcw export` on a real small model."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tcw.export import names
from tcw.source import open_source

Run = Callable[..., Any]


@pytest.fixture
def artifact(tcw: Run, tiny_llama: Path, tmp_path: Path) -> Path:
    target = tmp_path / "small"
    assert tcw("compress", tiny_llama, "--recipe", "lossless", "-o", target, "-q").code == 0
    return target


def test_all_modes(tcw: Run, artifact: Path, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    human, quiet, as_json = (
        tcw("export", artifact, "--to", "hf", "-o", f"out{i}", *mode) for i, mode in enumerate(([], ["-q"], ["--json"]))
    )
    assert (human.code, quiet.code, as_json.code) == (0, 0, 0)
    assert human.err == quiet.err == as_json.err == ""
    assert human.out.splitlines()[0].split() == ["wrote", "out0/"]
    assert quiet.out == "out1\n"
    data = json.loads(as_json.out)
    assert set(data) == {"schema", "path", "target", "bytes", "files", "kept", "notes"}
    assert Path(data["path"]).resolve() == tmp_path / "out2"
    assert data["kept"] == {}
    assert data["bytes"] == sum((tmp_path / "out2" / file).stat().st_size for file in data["files"])
    before, after = open_source(tiny_llama), open_source(tmp_path / "out2")
    assert all(before.read(name).sha256() == after.read(name).sha256() for name in before.tensors())


def test_what_exists_is_refused(tcw: Run, artifact: Path, tmp_path: Path) -> None:
    line = ("export", artifact, "--to", "hf", "-o", tmp_path / "out")
    assert tcw(*line).code == 0
    refused = tcw(*line)
    assert (refused.code, refused.out) == (2, "")
    assert "--force" in refused.err
    assert tcw(*line, "--force").code == 0


def test_the_help_names_every_target(tcw: Run) -> None:
    text = " ".join(tcw("export", "--help").out.split())
    assert all(f"{name} (" in text for name in names())


def test_a_kv_policy_stays_behind_and_that_is_said(tcw: Run, tiny_llama: Path, tmp_path: Path) -> None:
    target = tmp_path / "small"
    assert tcw("compress", tiny_llama, "-m", "knorm:ratio=0.5", "-o", target, "-q").code == 0
    said = tcw("export", target, "--to", "hf", "-o", tmp_path / "out")
    assert (said.code, "KV policy stays behind" in said.err) == (0, True)
    assert not (tmp_path / "out" / "policies").exists()
