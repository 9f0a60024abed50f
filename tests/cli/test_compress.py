"""`tcw compress` on a real small model, in every mode."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tcw import pipeline
from tcw.calibration import Settings
from tcw.cli.compress import model_name

Run = Callable[..., Any]


def test_all_modes(tcw: Run, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    human = tcw("compress", tiny_llama, "--recipe", "lossless")
    assert human.code == 0
    lines = dict(line.split("  ", 1) for line in human.out.splitlines())
    assert lines["wrote"].strip() == "tiny-llama.lossless/"
    assert "x smaller" in lines["size"]
    assert human.err.startswith("\nhint: `tcw verify tiny-llama.lossless` proves it")
    assert (tmp_path / "tiny-llama.lossless" / "tcw.json").is_file()

    quiet = tcw("compress", tiny_llama, "--method", "dfloat11", "-o", "quiet", "-q")
    assert (quiet.code, quiet.out, quiet.err) == (0, "quiet\n", "")

    as_json = tcw("compress", tiny_llama, "-m", "dfloat11", "-o", "json", "--json")
    assert (as_json.code, as_json.err) == (0, "")
    data = json.loads(as_json.out)
    assert data["schema"] == 1
    assert {"artifact", "methods", "bytes", "bits_per_weight", "tensors", "seconds", "peak_memory_bytes"} <= set(data)
    assert set(data["bytes"]) == {"original", "compressed", "ratio"}
    assert all(isinstance(data["bytes"][key], int) for key in ("original", "compressed"))
    assert set(data["tensors"]) == {"total", "compressed", "kept"}
    assert Path(data["artifact"]).resolve() == tmp_path / "json"
    assert isinstance(data["seconds"], float)


def test_what_exists_is_refused(tcw: Run, tiny_llama: Path, tmp_path: Path) -> None:
    target = tmp_path / "there"
    line = ("compress", tiny_llama, "--recipe", "lossless", "-o", target, "-q")
    assert tcw(*line).code == 0
    before = (target / "tcw.json").read_bytes()
    refused = tcw(*line)
    assert (refused.code, refused.out) == (2, "")
    assert refused.err == f"error: `{target}` exists\n\nhint: pass `--force` to replace it\n"
    assert (target / "tcw.json").read_bytes() == before
    assert tcw(*line, "--force").code == 0


def test_dry_run_writes_nothing_and_predicts(tcw: Run, tiny_llama: Path, tmp_path: Path) -> None:
    line = ("compress", tiny_llama, "--recipe", "lossless", "-o", tmp_path / "out")
    human = tcw(*line, "--dry-run")
    assert human.code == 0
    assert all(text.startswith("would ") for text in human.out.splitlines())
    data = json.loads(tcw(*line, "--dry-run", "--json").out)
    assert data["dry_run"] is True
    assert tcw(*line, "--dry-run", "-q").out == f"{data['bytes']['compressed']}\n"
    assert list(tmp_path.iterdir()) == []
    done = json.loads(tcw(*line, "--json").out)
    # a dry run counts tensors, a run whole files with their headers
    assert 0 < done["bytes"]["compressed"] - data["bytes"]["compressed"] < 20_000
    assert done["methods"] == data["methods"] == ["dfloat11"]


def test_fit(tcw: Run, tiny_llama: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    found = tcw("compress", tiny_llama, "--fit", "1GB", "-o", target, "--json")
    assert json.loads(found.out)["methods"] == ["dfloat11"]
    refused = tcw("compress", tiny_llama, "--fit", "1kB", "-o", tmp_path / "never")
    assert refused.code == 2
    assert "nothing makes `tiny-llama` fit into 1.0 kB" in refused.err
    assert "hint: the smallest is `ecq:bits=1.5` with about" in refused.err
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize("spec", [None, "mixed"])
def test_fit_below_eight_bits_sets_a_dial(spec: str | None, tcw: Run, tiny_llama: Path, tmp_path: Path) -> None:
    line = ("compress", tiny_llama, "--fit", "70kB", "-o", tmp_path / "out", "--dry-run", "--json")
    data = json.loads(tcw(*line, *(("--method", spec) if spec else ())).out)
    assert data["bytes"]["compressed"] <= 70_000
    name, _, options = data["methods"][0].partition(":")
    assert name == (spec or "ecq")
    assert re.search(r"bits=[2-7]", options)
    assert data["calibration"]["tokens"] == 32 * 512


def test_fit_with_what_it_cannot_turn(tcw: Run, tiny_llama: Path) -> None:
    several = tcw("compress", tiny_llama, "--fit", "1MB", "-m", "ecq", "-m", "dfloat11")
    assert (several.code, several.err.splitlines()[0]) == (2, "error: `--fit` sets the bits of one method")
    fixed = tcw("compress", tiny_llama, "--fit", "1MB", "-m", "dfloat11")
    assert (fixed.code, fixed.err.splitlines()[0]) == (2, "error: `dfloat11` has no `bits` to set by size")
    both = tcw("compress", tiny_llama, "--fit", "1MB", "-m", "ecq", "-r", "lossless")
    assert (both.code, both.err.splitlines()[0]) == (2, "error: more than one thing says what to do")


def test_calibration_reaches_the_work(
    tcw: Run, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Settings] = []
    needs = {"bytes_block": 28_300_000, "bytes_activations": 4_700_000, "where": "disk", "tokens": 256}

    def plan(source: Any, chosen: Any, *, calibration: Settings, progress: Any) -> pipeline.Plan:
        given.append(calibration)
        return pipeline.Plan(chosen, (), 1, needs)

    monkeypatch.setattr(pipeline, "plan", plan)
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "some words"}')
    line = ("compress", tiny_llama, "-m", "dfloat11", "-o", tmp_path / "out", "--dry-run", "--calibration", text)
    human = tcw(*line, "--samples", 4, "--length", 64, "--device", "cpu")
    assert given == [Settings(text, 4, 64, "cpu")]
    said = " ".join(human.out.split())
    assert "would calibrate on 256 tokens: 28.3 MB for a block at a time, 4.7 MB of activations on the disk" in said
    assert json.loads(tcw(*line, "--json").out)["calibration"] == needs
    tcw("compress", tiny_llama, "-m", "dfloat11", "-o", tmp_path / "out", "--dry-run")
    assert given[-1] == Settings(None, 32, 512, "auto")


def test_what_could_not_be_done_is_said(
    tcw: Run, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = pipeline.compress

    def compress(*arguments: Any, **options: Any) -> pipeline.CompressReport:
        return dataclasses.replace(run(*arguments, **options), notes=("`w` saw too few tokens",))

    monkeypatch.setattr(pipeline, "compress", compress)
    monkeypatch.setattr("tcw.recipe.Recipe.lossless", False)
    ran = tcw("compress", tiny_llama, "-m", "dfloat11", "-o", tmp_path / "out")
    assert ran.code == 0
    assert "`w` saw too few tokens" in ran.err
    assert f"`tcw verify {tmp_path / 'out'} --reference {tiny_llama}` measures what was lost" in ran.err
    data = json.loads(tcw("compress", tiny_llama, "-m", "dfloat11", "-o", tmp_path / "json", "--json").out)
    assert data["notes"] == ["`w` saw too few tokens"]


def test_an_interrupted_run_says_how_to_go_on(
    tcw: Run, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out"
    encode, calls = pipeline.compress_tensor, []

    def interrupted(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return encode(*arguments)

    monkeypatch.setattr(pipeline, "compress_tensor", interrupted)
    ran = tcw("compress", tiny_llama, "--recipe", "lossless", "-o", target)
    assert (ran.code, ran.out) == (130, "")
    assert ran.err.endswith("error: interrupted\n\nhint: the same command with `--resume` goes on with it\n")
    assert not target.exists()
    assert (tmp_path / "out.partial").is_dir()
    monkeypatch.setattr(pipeline, "compress_tensor", encode)
    assert tcw("compress", tiny_llama, "--recipe", "lossless", "-o", target, "--resume").code == 0
    assert not (tmp_path / "out.partial").exists()


def test_calibration_that_nothing_reads_is_said(tcw: Run, tiny_llama: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    line = ("compress", tiny_llama, "--recipe", "lossless", "-o", tmp_path / "out", "--dry-run", "--calibration", text)
    missing = tcw(*line)
    assert (missing.code, missing.out) == (2, "")
    assert f"no calibration text at `{text}`" in missing.err
    text.write_text("some words")
    assert f"no method of `lossless` needs calibration: `{text}` is not read" in tcw(*line).err


def test_a_device_that_is_not_here(tcw: Run, tiny_llama: Path, tmp_path: Path) -> None:
    ran = tcw("compress", tiny_llama, "--recipe", "lossless", "-o", tmp_path / "out", "--device", "abacus")
    assert ran.code == 2
    assert "`abacus`" in ran.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("org/name", "name"), ("org/name@main", "name"), ("demo:smollm2", "smollm2"), ("model.Q4.gguf", "model.Q4"),
        ("tiny-llama", "tiny-llama"), ("", "model"),
    ],
)  # fmt: skip
def test_default_name(source: str, name: str) -> None:
    assert model_name(source) == name


def test_commands_in_hints_can_be_pasted(tcw: Run, tiny_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "with space"
    ran = tcw("compress", tiny_llama, "-r", "lossless", "-o", out)
    assert f"`tcw verify '{out}'`" in ran.err
