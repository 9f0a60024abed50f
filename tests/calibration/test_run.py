"""Calibrated runs from end to end: what goes wrong goes wrong early, and an interrupted run gives the same artifact."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import transformers

from tcw import pipeline, recipe
from tcw.artifact import Artifact
from tcw.calibration import Settings
from tcw.calibration import run as runs
from tcw.calibration.coder import Coder
from tcw.errors import ResourceError, SourceError, UsageError
from tcw.source import open_source

SPECS = ["int4:group_size=32", "int8:algo=rtn,targets=embedding", "dfloat11"]
FEW = Settings(samples=4, length=64)


def compress(model: Path, out: Path, specs: list[str] = SPECS, settings: Settings = FEW, **options: Any) -> Any:
    return pipeline.compress(open_source(model), recipe.from_specs(specs), out, calibration=settings, **options)


def content(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.parametrize("specs", [SPECS, ["int2", "dfloat11"], ["ecq:bits=3"], ["int4:algo=awq,group_size=32"]])
def test_an_interrupted_run_gives_the_same_artifact(
    specs: list[str], tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compress(tiny_llama, tmp_path / "whole", specs)
    code = Coder.code

    def dies(self: Coder, tasks: Any) -> Any:
        if "layers.1.mlp.gate" in tasks[0].name:
            raise KeyboardInterrupt
        return code(self, tasks)

    monkeypatch.setattr(Coder, "code", dies)
    with pytest.raises(KeyboardInterrupt):
        compress(tiny_llama, tmp_path / "cut", specs)
    monkeypatch.setattr(Coder, "code", code)
    assert (tmp_path / "cut.partial" / "calibration" / "block-00000.json").is_file()
    with pytest.raises(UsageError, match="another text"):
        compress(tiny_llama, tmp_path / "cut", specs, dataclasses.replace(FEW, length=32), resume=True)
    compress(tiny_llama, tmp_path / "cut", specs, resume=True)
    assert content(tmp_path / "cut") == content(tmp_path / "whole")
    assert not (tmp_path / "cut.partial").exists()


def test_the_manifest_says_on_what_was_calibrated(tiny_llama: Path, tmp_path: Path) -> None:
    text = tmp_path / "mine.txt"
    text.write_text("All work and no play makes Jack a dull boy. " * 5)
    report = compress(tiny_llama, tmp_path / "out", settings=Settings(text, samples=8, length=64))
    assert report.notes == ("the text has 3 sequences of 64 tokens, 8 were asked for",)
    said = Artifact.open(tmp_path / "out").manifest["calibration"]
    assert (said["text"], said["sequences"], said["length"]) == ("mine.txt", 3, 64)
    assert said["notes"] == list(report.notes)


@pytest.mark.parametrize("text", ["", "too short"])
def test_a_bad_text_leaves_nothing_behind(text: str, tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text(text)
    with pytest.raises(SourceError):
        compress(tiny_llama, tmp_path / "out", settings=Settings(tmp_path / "mine.txt", length=64))
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_memory_that_will_not_do_is_said_first(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pick = runs.pick
    monkeypatch.setattr(runs, "pick", lambda name: dataclasses.replace(pick(name), free_bytes=10_000))
    with pytest.raises(ResourceError, match="for a block and its Hessians"):
        compress(tiny_llama, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_plan_says_what_calibration_takes(tiny_llama: Path) -> None:
    source, steps = open_source(tiny_llama), recipe.from_specs(SPECS)
    needs = pipeline.plan(source, steps, calibration=FEW).calibration
    assert needs is not None
    assert (needs["tokens"], needs["where"], needs["bytes_activations"]) == (256, "memory", 4 * 256 * 64)
    assert pipeline.plan(source, recipe.from_specs(["int4:algo=rtn"])).calibration is None


def test_what_cannot_be_walked_is_coded_from_its_weights(tiny_llama: Path, tmp_path: Path) -> None:
    config = transformers.ViTConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128)
    transformers.ViTModel(config).save_pretrained(tmp_path / "vit")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "vit" / name).write_bytes((tiny_llama / name).read_bytes())
    report = compress(tmp_path / "vit", tmp_path / "out")
    assert any("coded from the weights alone" in note for note in report.notes)
    assert report.tensors_compressed > 0


def test_without_a_tokenizer_there_is_nothing_to_calibrate_on(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "model" / name).write_bytes((tiny_llama / name).read_bytes())
    with pytest.raises(SourceError, match="tokenizer"):
        compress(tmp_path / "model", tmp_path / "out")
    assert compress(tmp_path / "model", tmp_path / "out", ["int4:algo=rtn"]).notes == ()
