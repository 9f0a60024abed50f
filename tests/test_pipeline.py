"""Recipe + Source -> artifact: what is written, that it can be interrupted, and that nothing else is touched."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tcw import artifact_writer, export, pipeline, recipe
from tcw.artifact import RAW, SAME, Artifact
from tcw.errors import FormatError, OutputExists, ResourceError, SourceError, TcwError, UsageError
from tcw.events import Progress
from tcw.source import open_source

LOSSLESS = recipe.load("lossless")


def contents(folder: Path) -> dict[str, str]:
    """Name -> SHA-256 of every file below a folder."""
    return {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


@pytest.fixture(scope="module")
def whole(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artifact of an uninterrupted run."""
    out = tmp_path_factory.mktemp("whole") / "artifact"
    pipeline.compress(open_source(tiny_llama), LOSSLESS, out)
    return out


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder of a few hand-made tensors, two of them equal."""
    folder = tmp_path / "model"
    folder.mkdir()
    rng = np.random.default_rng(0)
    weight = rng.normal(0, 0.02, (96, 64)).astype(np.float32)
    tensors = {
        "a.weight": weight, "b.weight": weight.copy(), "c.weight": rng.normal(0, 1, (64, 64)).astype(np.float16),
        "norm.weight": np.ones(64, np.float32), "steps": np.arange(7), "empty.weight": np.empty((0, 8), np.float32),
        "noise.weight": rng.integers(0, 2**32, (64, 64), dtype=np.uint32).view(np.float32),
    }  # fmt: skip
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text('{"model_type": "llama", "hidden_size": 64}\n')
    (folder / "tokenizer.json").write_text("{}")
    return folder


def test_every_tensor_comes_back_bit_for_bit(tiny_llama: Path, whole: Path) -> None:
    source, artifact = open_source(tiny_llama), Artifact.open(whole)
    assert list(artifact.tensors().values()) == list(source.tensors().values())
    for name, info in source.tensors().items():
        assert artifact.read(name).info == info
        assert np.array_equal(artifact.read(name).data, source.read(name).data), name
        assert artifact.entries[name].sha256 == source.read(name).sha256()
    compressed = [e for e in artifact.entries.values() if e.method == "dfloat11"]
    assert len(compressed) >= 14
    assert all(10 < e.bits_per_weight < 12 for e in compressed)


def test_report_counts_what_is_on_the_disk(model: Path, tmp_path: Path) -> None:
    report = pipeline.compress(open_source(model), LOSSLESS, tmp_path / "out")
    assert report.bytes_compressed == sum(p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors"))
    assert report.bytes_original == (model / "model.safetensors").stat().st_size
    assert (report.tensors_total, report.tensors_compressed, report.tensors_kept) == (7, 3, 4)
    assert sum(report.kept_reasons.values()) == 4
    assert report.peak_memory_bytes > 0
    assert json.loads(json.dumps(report.to_json()))["bytes"]["ratio"] == report.ratio


def test_equal_tensors_are_stored_once(model: Path, tmp_path: Path) -> None:
    pipeline.compress(open_source(model), LOSSLESS, tmp_path / "out")
    artifact = Artifact.open(tmp_path / "out")
    assert [artifact.entries[f"{n}.weight"].method for n in "abc"] == ["dfloat11", SAME, "dfloat11"]
    assert artifact.tensor_bytes("b.weight") == 0
    assert np.array_equal(artifact.read("b.weight").data, artifact.read("a.weight").data)
    assert artifact.entries["steps"].method == artifact.entries["noise.weight"].method == RAW


@pytest.mark.parametrize("workers", [1, 2])
def test_processes_write_what_threads_write(tiny_llama: Path, whole: Path, tmp_path: Path, workers: int) -> None:
    pipeline.compress(open_source(tiny_llama), LOSSLESS, tmp_path / "artifact", workers=workers)
    assert contents(tmp_path / "artifact") == contents(whole)


@pytest.mark.parametrize("shard_bytes", [10**9, 60_000, 1])
@pytest.mark.parametrize("after", [1, 7, 21])
def test_interrupted_run_resumes_to_the_same_bytes(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int, shard_bytes: int
) -> None:
    monkeypatch.setattr(artifact_writer, "SHARD_BYTES", shard_bytes)
    source, out = open_source(tiny_llama), tmp_path / "artifact"
    pipeline.compress(source, LOSSLESS, tmp_path / "whole")
    seen = []

    def interrupt(event: Progress) -> None:
        seen.append(event)
        if len(seen) == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipeline.compress(source, LOSSLESS, out, progress=interrupt)
    assert not out.exists()
    with pytest.raises(UsageError, match="interrupted run"):
        pipeline.compress(source, LOSSLESS, out)
    torn = sorted((tmp_path / "artifact.partial").glob("model-*"))[-1]
    torn.write_bytes(torn.read_bytes() + b"half a tensor")
    redone: list[Progress] = []
    pipeline.compress(source, LOSSLESS, out, resume=True, progress=redone.append)
    assert len(redone) == len(source.tensors()) - after
    assert contents(out) == contents(tmp_path / "whole")


def test_resume_after_kill(tiny_llama: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "artifact"
    script = (
        "import os, sys; from pathlib import Path; from tcw import pipeline, recipe\n"
        "from tcw.source import open_source\n"
        "n = []\ndef kill(e):\n    n.append(e)\n    if len(n) == 9: os.kill(os.getpid(), 9)\n"
        "pipeline.compress(open_source(sys.argv[1]), recipe.load('lossless'), Path(sys.argv[2]), progress=kill)"
    )
    run = subprocess.run([sys.executable, "-c", script, tiny_llama, out], timeout=120)
    assert run.returncode == -signal.SIGKILL
    assert not out.exists()
    with pytest.raises(SourceError, match="not finished"):
        open_source(out)
    pipeline.compress(open_source(tiny_llama), LOSSLESS, out, resume=True)
    assert contents(out) == contents(whole)


def test_resume_redoes_a_tensor_whose_bytes_were_lost(tiny_llama: Path, whole: Path, tmp_path: Path) -> None:
    source, out = open_source(tiny_llama), tmp_path / "artifact"
    seen: list[Progress] = []

    def interrupt(event: Progress) -> None:
        seen.append(event)
        if len(seen) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipeline.compress(source, LOSSLESS, out, progress=interrupt)
    partial = next((tmp_path / "artifact.partial").glob("model-*"))
    data = bytearray(partial.read_bytes())
    data[-1] ^= 1  # a page that a power cut kept from the disk
    partial.write_bytes(data)
    pipeline.compress(source, LOSSLESS, out, resume=True)
    assert contents(out) == contents(whole)


def test_a_resume_can_be_interrupted_again(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while it closes shards that were whole before: a tensor at a time, a shard each, killed after every one."""
    monkeypatch.setattr(artifact_writer, "SHARD_BYTES", 1)
    source, out = open_source(tiny_llama), tmp_path / "artifact"
    pipeline.compress(source, LOSSLESS, tmp_path / "whole")

    def interrupt(event: Progress) -> None:
        raise KeyboardInterrupt

    def close(self: artifact_writer.StreamWriter) -> None:
        real(self)
        raise KeyboardInterrupt

    runs, real = 0, artifact_writer.StreamWriter.close
    while not out.exists():
        runs += 1
        progress = interrupt if runs <= 20 else lambda event: None
        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            if runs <= 20 and runs % 3 == 0:
                patch.setattr(artifact_writer.StreamWriter, "close", close)
            pipeline.compress(source, LOSSLESS, out, resume=True, progress=progress)
    assert runs > 20
    assert contents(out) == contents(tmp_path / "whole")


def test_resume_refuses_another_recipe(tiny_llama: Path, tmp_path: Path) -> None:
    def interrupt(event: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipeline.compress(open_source(tiny_llama), LOSSLESS, tmp_path / "out", progress=interrupt)
    other = recipe.from_specs(["dfloat11:min_saving=0.5"])
    with pytest.raises(UsageError, match="begun with another"):
        pipeline.compress(open_source(tiny_llama), other, tmp_path / "out", resume=True)
    pipeline.compress(open_source(tiny_llama), other, tmp_path / "out", force=True)
    assert Artifact.open(tmp_path / "out").methods() == ["dfloat11"]


def test_source_that_changes_is_an_error(model: Path, tmp_path: Path) -> None:
    def touch(event: Progress) -> None:
        os.utime(model / "model.safetensors", (1, 1))

    with pytest.raises(SourceError, match="changed while it was read"):
        pipeline.compress(open_source(model), LOSSLESS, tmp_path / "out", progress=touch)
    assert not (tmp_path / "out").exists()


def test_full_disk_is_one_clear_error(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = artifact_writer.StreamWriter._write

    def full(self: artifact_writer.StreamWriter, data: bytes) -> None:
        if self.tell() > 20_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(artifact_writer.StreamWriter, "_write", full)
        with pytest.raises(ResourceError, match="no space left"):
            pipeline.compress(open_source(model), LOSSLESS, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    pipeline.compress(open_source(model), LOSSLESS, tmp_path / "out", resume=True)
    assert Artifact.open(tmp_path / "out")


def test_output_is_refused_unless_forced_and_only_models_are_replaced(model: Path, tmp_path: Path) -> None:
    source, out = open_source(model), tmp_path / "out"
    before = contents(model)
    pipeline.compress(source, LOSSLESS, out)
    with pytest.raises(OutputExists) as caught:
        pipeline.compress(source, LOSSLESS, out)
    assert "--force" in caught.value.hint
    pipeline.compress(source, LOSSLESS, out, force=True)
    home = tmp_path / "home"
    home.mkdir()
    (home / "letters.txt").write_text("dear")
    with pytest.raises(OutputExists, match="not a model folder"):
        pipeline.compress(source, LOSSLESS, home, force=True)
    assert (home / "letters.txt").read_text() == "dear"
    for inside in (model, model / "sub", tmp_path):
        with pytest.raises(TcwError):
            pipeline.compress(source, LOSSLESS, inside, force=True)
    with pytest.raises(UsageError, match="no folder"):
        pipeline.compress(source, LOSSLESS, tmp_path / "nowhere" / "out")
    assert contents(model) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["home", "model", "out"]


def test_force_deletes_nothing_that_lies_beside(model: Path, tmp_path: Path) -> None:
    source, out = open_source(model), tmp_path / "out"
    pipeline.compress(source, LOSSLESS, out)
    for name in ("out.old", "out.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "letters.txt").write_text("dear")
    with pytest.raises(OutputExists, match="was not made by tcw"):
        pipeline.compress(source, LOSSLESS, out, force=True)
    (tmp_path / "out.partial").rename(tmp_path / "moved")
    pipeline.compress(source, LOSSLESS, out, force=True)
    assert (tmp_path / "out.old" / "letters.txt").read_text() == "dear"
    assert (tmp_path / "moved" / "letters.txt").read_text() == "dear"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "moved", "out", "out.old"]


def test_skip_and_only_are_obeyed(model: Path, tmp_path: Path) -> None:
    table = {"method": [{"use": "dfloat11", "only": ["*.weight"], "skip": ["c"]}]}
    pipeline.compress(open_source(model), recipe.from_table("mine", table), tmp_path / "out")
    entries = Artifact.open(tmp_path / "out").entries
    assert entries["c.weight"].method == RAW
    assert entries["a.weight"].method == "dfloat11"


def test_plan_predicts_what_is_written(tiny_llama: Path, whole: Path) -> None:
    plan = pipeline.plan(open_source(tiny_llama), LOSSLESS)
    artifact = Artifact.open(whole)
    stored = sum(artifact.tensor_bytes(name) for name in artifact.entries)
    assert plan.predicted_bytes == pytest.approx(stored, rel=0.005)
    assert {t.info.name: t.method for t in plan.tensors} == {n: e.method for n, e in artifact.entries.items()}


def test_a_model_quantised_elsewhere_is_refused(model: Path, tmp_path: Path) -> None:
    (model / "config.json").write_text('{"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}')
    with pytest.raises(SourceError, match="already quantised by"):
        pipeline.compress(open_source(model), LOSSLESS, tmp_path / "out")


def test_an_artifact_can_be_compressed_again(whole: Path, tmp_path: Path) -> None:
    pipeline.compress(open_source(whole), LOSSLESS, tmp_path / "again")
    first, again = Artifact.open(whole), Artifact.open(tmp_path / "again")
    assert {n: e.sha256 for n, e in first.entries.items()} == {n: e.sha256 for n, e in again.entries.items()}
    for path in first.weight_files():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_side_files_are_copied_byte_for_byte(tiny_llama: Path, whole: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (whole / name).read_bytes() == (tiny_llama / name).read_bytes()
    config = json.loads((whole / "config.json").read_text())
    assert config.pop("quantization_config") == {"quant_method": "tcw", "format_version": "1.3", "dtype": "BF16"}
    assert config == json.loads((tiny_llama / "config.json").read_text())


def test_nothing_is_written_when_the_model_is_damaged(model: Path, tmp_path: Path) -> None:
    whole = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(whole[:-5])
    with pytest.raises(TcwError):
        pipeline.compress(open_source(model), LOSSLESS, tmp_path / "out")
    shutil.rmtree(model)
    assert list(tmp_path.iterdir()) == []


def test_modules_beside_the_model_keep_their_weights(model: Path, tmp_path: Path) -> None:
    """sentence-transformers puts small layers of its own into numbered folders."""
    (model / "2_Dense").mkdir()
    save_file({"linear.weight": np.ones((4, 4), np.float32)}, model / "2_Dense" / "model.safetensors")
    pipeline.compress(open_source(model), LOSSLESS, tmp_path / "out")
    artifact = open_source(tmp_path / "out")
    assert "linear.weight" not in artifact.tensors()
    export.export(artifact, "hf", tmp_path / "back")
    assert (tmp_path / "back" / "2_Dense" / "model.safetensors").read_bytes() == (
        model / "2_Dense" / "model.safetensors"
    ).read_bytes()


def test_a_bad_side_file_shows_before_the_work(model: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (model / "LICENSE").symlink_to(tmp_path / "secret")
    with pytest.raises(SourceError, match="LICENSE"):
        pipeline.compress(open_source(model), LOSSLESS, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_what_cannot_be_opened_again_is_not_published(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tcw.artifact.MAX_DIMS", 1)
    with pytest.raises(FormatError, match="impossible shape"):
        pipeline.compress(open_source(model), LOSSLESS, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_two_runs_cannot_write_the_same_output(model: Path, tmp_path: Path) -> None:
    source, out = open_source(model), tmp_path / "out"

    def second(_: Progress) -> None:
        for options in ({}, {"force": True}, {"resume": True}):
            with pytest.raises(UsageError, match=r"another run is writing `out\.partial`"):
                pipeline.compress(source, LOSSLESS, out, **options)
        with pytest.raises(UsageError, match=r"another run is writing `out\.partial`"):
            export.export(source, "hf", out)

    report = pipeline.compress(source, LOSSLESS, out, progress=second)
    whole = contents(report.artifact)
    assert contents(pipeline.compress(source, LOSSLESS, tmp_path / "alone").artifact) == whole


def test_a_resumed_run_knows_why_tensors_were_kept(model: Path, tmp_path: Path) -> None:
    whole = pipeline.compress(open_source(model), LOSSLESS, tmp_path / "whole")
    count = 0

    def stop(_: Progress) -> None:
        nonlocal count
        count += 1
        if count == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipeline.compress(open_source(model), LOSSLESS, tmp_path / "out", progress=stop)
    resumed = pipeline.compress(open_source(model), LOSSLESS, tmp_path / "out", resume=True)
    assert resumed.kept_reasons == whole.kept_reasons
    assert sum(resumed.kept_reasons.values()) == resumed.tensors_kept


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_workers_do_not_outlive_a_killed_run(tiny_llama: Path, tmp_path: Path) -> None:
    code = (
        "import os, signal\nfrom tcw import pipeline, recipe\nfrom tcw.source import open_source\n"
        "def stop(_):\n    os.kill(os.getpid(), signal.SIGKILL)\n"
        f"if __name__ == '__main__':\n    source = open_source({str(tiny_llama)!r})\n"
        f"    out = __import__('pathlib').Path({str(tmp_path / 'out')!r})\n"
        "    pipeline.compress(source, recipe.load('lossless'), out, workers=2, progress=stop)\n"
    )
    script = tmp_path / "run.py"
    script.write_text(code)
    # the workers hold the pipe as well: it is closed when the last one has gone
    done = subprocess.run([sys.executable, script], capture_output=True, timeout=90)
    assert done.returncode == -signal.SIGKILL


@pytest.mark.skipif(sys.platform != "linux", reason="needs a process group")
def test_ctrl_c_is_for_the_parent_only() -> None:
    with pipeline._executor(1) as pool:
        assert pool.submit(signal.getsignal, signal.SIGINT).result(timeout=60) == signal.SIG_IGN
