"""Every export target, found by itself: what it must do whatever it writes."""

import inspect
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tcw import export as exporting
from tcw.artifact import Artifact
from tcw.errors import OutputExists, ResourceError, SourceError, UnknownName, UsageError
from tcw.events import Progress
from tcw.source import open_source
from tcw.staging import MARK, begin

TARGETS = exporting.names()
# targets that write the codes of a quantised model, and what they are given
QUANTIZED = {
    "compressed-tensors": ("fp8", {}),
    "hf-fp8": ("fp8", {"scale": "tensor"}),
    "gptq": ("mixed", {"bits": 4, "group_size": 32, "grid": "symmetric", "scale": "BF16"}),
}


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


@pytest.fixture
def suited(model: Path, by_hand: Callable[..., tuple[Artifact, Any]]) -> Callable[[str], Path]:
    """A model that a target takes: plain, or an artifact whose linear layers are quantised."""

    def make(target: str) -> Path:
        if target not in QUANTIZED:
            return model
        return by_hand(model, lambda info: QUANTIZED[target] if "_proj" in info.name else None)[0].path

    return make


def snapshot(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_targets_are_found() -> None:
    assert "hf" in TARGETS
    assert not set(TARGETS) & set(exporting.ENGINE)
    for name in exporting.ENGINE:
        with pytest.raises(UnknownName):
            exporting.get(name)


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_explains_itself(target: str) -> None:
    module = exporting.get(target)
    summary = (module.__doc__ or "").partition("\n")[0]
    assert 10 <= len(summary) <= 120
    parameters = list(inspect.signature(module.write).parameters.values())
    assert [p.name for p in parameters[:3]] == ["source", "folder", "progress"]
    for option in parameters[3:]:
        assert option.kind is option.KEYWORD_ONLY
        assert type(option.default) in (bool, int, float, str)
    assert exporting.get(target.upper()) is module
    assert exporting.get(f"{target}:x=1") is module, "the command line asks with the options"


@pytest.mark.parametrize("target", TARGETS)
def test_what_goes_out_comes_back(target: str, suited: Callable[[str], Path], tmp_path: Path) -> None:
    events: list[Progress] = []
    model = suited(target)
    before, source = snapshot(model), open_source(model)
    report = exporting.export(source, target, tmp_path / "out", progress=events.append)
    assert snapshot(model) == before, "the source is never touched"
    files = snapshot(tmp_path / "out")
    assert (report.path, report.target) == (tmp_path / "out", target)
    assert [f.as_posix() for f in report.files] == sorted(files)
    assert report.bytes == sum(map(len, files.values()))
    assert not (tmp_path / "out.partial").exists()
    assert events[-1].done == events[-1].total > 0
    again = open_source(tmp_path / "out")
    plain = {n for n in source.tensors() if target not in QUANTIZED or "_proj" not in n}
    assert len(plain) > 5
    assert {i for n, i in again.tensors().items() if n in plain} == {source.tensors()[n] for n in plain}
    assert {n: again.read(n).sha256() for n in plain} == {n: source.read(n).sha256() for n in plain}
    assert bool(again.quantized_by) == (target in QUANTIZED)
    assert target in QUANTIZED or set(again.tensors()) == plain
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert files[name] == before[name]


@pytest.mark.parametrize("target", TARGETS)
def test_the_same_twice(target: str, suited: Callable[[str], Path], tmp_path: Path) -> None:
    model = suited(target)
    for name in ("one", "two"):
        exporting.export(open_source(model), target, tmp_path / name)
    assert snapshot(tmp_path / "one") == snapshot(tmp_path / "two")


@pytest.mark.parametrize("target", TARGETS)
def test_a_source_that_changes_leaves_nothing(target: str, suited: Callable[[str], Path], tmp_path: Path) -> None:
    model = suited(target)
    source, before = open_source(model), sorted(tmp_path.iterdir())
    os.utime(next(model.glob("model*.safetensors")), ns=(1, 1))
    with pytest.raises(SourceError, match="changed"):
        exporting.export(source, target, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("target", sorted(QUANTIZED))
def test_a_plain_model_is_refused(target: str, model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"`{target}` writes the codes of a quantised model") as caught:
        exporting.export(open_source(model), target, tmp_path / "out")
    assert "tcw compress" in caught.value.hint
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


# ---- the engine


def test_names_and_options(model: Path, tmp_path: Path) -> None:
    source = open_source(model)
    wrong = {"hff": "target named `hff`", "patterns": "no export target", "hf:shard_gib=1": "no option of target `hf`"}
    for target, words in wrong.items():
        with pytest.raises(UnknownName, match=words) as caught:
            exporting.export(source, target, tmp_path / "out")
        assert caught.value.hint
    for target in ("hf:shard_gb", "hf:shard_gb=x", "hf:shard_gb=1,shard_gb=2", "hf:shard_gb=0", "hf:shard_gb=nan"):
        with pytest.raises(UsageError):
            exporting.export(source, target, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    exporting.export(source, "HF:shard-gb=0.00005", tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2


def test_what_stands_there_is_kept(model: Path, tmp_path: Path) -> None:
    source = open_source(model)
    exporting.export(source, "hf", tmp_path / "out")
    (tmp_path / "out" / "mark").write_text("x")
    with pytest.raises(OutputExists) as caught:
        exporting.export(source, "hf", tmp_path / "out")
    assert "--force" in caught.value.hint
    assert (tmp_path / "out" / "mark").exists()
    exporting.export(source, "hf", tmp_path / "out", force=True)
    assert not (tmp_path / "out" / "mark").exists()


def test_force_replaces_model_folders_only(model: Path, tmp_path: Path) -> None:
    source = open_source(model)
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("x")
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(home)
    for out in ("home", "file", "link"):
        with pytest.raises(OutputExists):
            exporting.export(source, "hf", tmp_path / out, force=True)
    assert (home / "thesis.tex").exists()


def test_the_source_is_never_the_output(model: Path, tmp_path: Path) -> None:
    source, before = open_source(model), snapshot(model)
    (tmp_path / "config.json").write_text("{}")  # so that the parent looks replaceable
    (tmp_path / "alias").symlink_to(model)
    for out in (model, tmp_path, tmp_path / "alias", model / "inner"):
        with pytest.raises((UsageError, OutputExists)):
            exporting.export(source, "hf", out, force=True)
    assert snapshot(model) == before


def test_no_space_left_leaves_nothing(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    source = open_source(model)
    exporting.export(source, "hf", tmp_path / "out")
    before = snapshot(tmp_path / "out")
    for place in ("tcw.safetensors_file.StreamWriter._write", "shutil.copyfile"):
        with monkeypatch.context() as patch:
            patch.setattr(place, full)
            with pytest.raises(ResourceError, match="no space left"):
                exporting.export(source, "hf", tmp_path / "out", force=True)
        assert snapshot(tmp_path / "out") == before, "what stood there stands"
        assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out"]


def test_an_interrupt_leaves_nothing(model: Path, tmp_path: Path) -> None:
    def stop(event: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        exporting.export(open_source(model), "hf", tmp_path / "out", progress=stop)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_left_partial_is_replaced(model: Path, tmp_path: Path) -> None:
    begin(tmp_path / "out.partial")
    (tmp_path / "out.partial" / "old").write_text("x")
    report = exporting.export(open_source(model), "hf", tmp_path / "out")
    assert Path("old") not in report.files
    assert Path(MARK) not in report.files


def test_a_partial_of_somebody_else_is_kept(model: Path, tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "letters.txt").write_text("dear")
    for _ in range(2):
        with pytest.raises(OutputExists, match="was not made by tcw"):
            exporting.export(open_source(model), "hf", tmp_path / "out", force=True)
    assert (tmp_path / "out.partial" / "letters.txt").read_text() == "dear"
