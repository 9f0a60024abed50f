import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tcw import data
from tcw.artifact import Artifact
from tcw.errors import FormatError, SourceError, UnknownName, UsageError
from tcw.events import Progress
from tcw.source import Source, open_source
from tcw.verify import suites, verify
from tcw.verify.suites import Job, Measured

KEYS = {
    "tensors": {"checked", "identical", "different"},
    "logits": {"bit_identical", "max_abs_diff", "mean_kl", "top1_agreement"},
    "perplexity": {"reference", "artifact", "rise"},
    "generation": {"tokens", "identical_tokens"},
}


def changed(folder: Path, out: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> Source:
    """A copy of a model in which one tensor is another, or gone."""
    shutil.copytree(folder, out)
    tensors = load_file(out / "model.safetensors")
    new = change(tensors.pop(name))
    if new is not None:
        tensors[name] = new
    save_file(tensors, out / "model.safetensors")
    return open_source(out)


def test_a_lossless_artifact_without_reference(lossless: Artifact, tiny: Source) -> None:
    verdict = verify(lossless)
    assert (verdict.verdict, verdict.exit_code) == ("identical", 0)
    assert verdict.tensors.checked == verdict.tensors.identical == len(tiny.tensors())
    shown = verdict.to_json()
    assert all(keys <= shown[section].keys() for section, keys in KEYS.items())
    assert shown["logits"]["bit_identical"] is None
    assert shown["limits"] == []
    assert "outputs" in verdict.skipped


def test_a_lossless_artifact_against_its_source(lossless: Artifact, tiny: Source) -> None:
    events: list[Progress] = []
    verdict = verify(lossless, tiny, progress=events.append, device="cpu")
    shown = verdict.to_json()
    assert verdict.verdict == "identical"
    assert shown["logits"] == {"bit_identical": True, "max_abs_diff": 0.0, "mean_kl": 0.0, "top1_agreement": 1.0}
    assert shown["generation"] == {"tokens": 64, "identical_tokens": 64, "agreement": 1.0}
    assert shown["weights"]["max_error"] == 0
    assert shown["perplexity"]["rise"] == 0
    assert shown["perplexity"]["reference"] > 1
    assert {limit["name"] for limit in shown["limits"]} == {"max_kl", "min_top1", "max_ppl_rise"}
    assert all(limit["ok"] for limit in shown["limits"])
    assert len([s for s in verdict.sequences if s.label in data.PROMPTS]) >= 8
    assert len([s for s in verdict.sequences if s.perplexity]) == 4
    stages = {e.stage for e in events}
    assert {"files", "tensors", "outputs of the reference", "greedy tokens of the artifact"} <= stages
    assert all(e.done <= e.total for e in events)


def test_the_artifact_remembers_the_verdict(lossless: Artifact) -> None:
    verdict = verify(lossless)
    stored = json.loads((lossless.path / "tcw.json").read_text(encoding="utf-8"))["verdict"]
    assert stored == json.loads(json.dumps(verdict.to_json()))
    assert verify(Artifact.open(lossless.path)).ok


def test_perplexity_equals_a_slow_one(tiny: Source, tmp_path: Path) -> None:
    from tcw.runtime.load import load, tokenizer

    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog, again and again. " * 40, encoding="utf-8")
    found = verify(tiny, tiny, text=text, device="cpu").to_json()["perplexity"]
    ids = tokenizer(tiny)(text.read_text(encoding="utf-8"))["input_ids"]
    model = load(tiny, device="cpu", dtype=torch.float32)
    whole = len(ids) // 256
    losses = []
    for k in (round(i * (whole - 1) / 3) for i in range(4)):
        window = ids[k * 256 : (k + 1) * 256]
        with torch.no_grad():
            rows = model(torch.tensor([window])).logits[0].double().numpy()
        for row, token in zip(rows, window[1:], strict=False):
            losses.append(np.log(np.exp(row - row.max()).sum()) + row.max() - row[token])
    assert len(losses) == 4 * 255
    assert found["reference"] == found["artifact"] == pytest.approx(np.exp(np.mean(losses)), rel=1e-9)


def test_two_folders_with_the_same_tensors(tiny: Source) -> None:
    verdict = verify(tiny, tiny, tensors_only=True)
    assert verdict.verdict == "identical"
    assert verdict.to_json()["generation"]["tokens"] is None


def test_one_changed_element_is_named(tiny: Source, tiny_llama: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"

    def flip(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(torch.int16)[3, 5] ^= 0x4000
        return tensor

    other = changed(tiny_llama, tmp_path / "other", name, flip)
    verdict = verify(other, tiny, device="cpu")
    assert (verdict.verdict, verdict.exit_code) == ("different", 1)
    assert verdict.tensors.different == [name]
    assert verdict.tensors.reasons[name].startswith("1 of 10240 elements")
    assert verdict.tensors.relative_error[name] > 0
    assert verdict.to_json()["logits"]["bit_identical"] is False


def test_missing_extra_and_reshaped_tensors_are_named(tiny: Source, tiny_llama: Path, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    lacking = changed(tiny_llama, tmp_path / "lacking", name, lambda t: None)
    verdict = verify(lacking, tiny, tensors_only=True)
    assert verdict.tensors.reasons == {name: "missing from `lacking`"}
    assert verdict.tensors.checked == len(tiny.tensors())
    assert verify(tiny, lacking, tensors_only=True).tensors.reasons == {name: "not in `lacking`"}
    wider = changed(tiny_llama, tmp_path / "wider", name, lambda t: t.float())
    verdict = verify(wider, tiny, tensors_only=True)
    assert "F32" in verdict.tensors.reasons[name]
    assert verdict.tensors.relative_error == {name: 0.0}
    assert verdict.verdict == "different"


def test_a_nan_is_compared_by_its_bits(tiny_llama: Path, tmp_path: Path) -> None:
    def poison(payload: int) -> Callable[[torch.Tensor], torch.Tensor]:
        def change(tensor: torch.Tensor) -> torch.Tensor:
            tensor.view(torch.int16)[0, 0] = payload
            return tensor

        return change

    name = "lm_head.weight"
    one, same, two = (
        changed(tiny_llama, tmp_path / folder, name, poison(payload))
        for folder, payload in (("one", 0x7FC1), ("same", 0x7FC1), ("two", 0x7FC2))
    )
    assert verify(same, one, device="cpu").verdict == "identical"
    assert verify(two, one, tensors_only=True).tensors.different == [name]


def stored_bytes(folder: Path) -> list[tuple[Path, int]]:
    """A byte in the middle of every tensor part of an artifact."""
    places = []
    for file in sorted(folder.glob("*.safetensors")):
        size = int.from_bytes(file.read_bytes()[:8], "little")
        header = json.loads(file.read_bytes()[8 : 8 + size])
        for name, slot in header.items():
            first, last = slot["data_offsets"] if name != "__metadata__" else (0, 0)
            if last > first:
                places.append((file, 8 + size + (first + last) // 2))
    return places


def test_any_flipped_byte_is_found(lossless_folder: Path, tmp_path: Path) -> None:
    places = stored_bytes(lossless_folder)
    assert len(places) > 40
    folder = tmp_path / "tampered"
    shutil.copytree(lossless_folder, folder)
    for k, (source, at) in enumerate(places):
        file = folder / source.name
        raw = bytearray(source.read_bytes())
        raw[at] ^= 1 << k % 8
        file.write_bytes(raw)
        try:
            verdict = verify(Artifact.open(folder))
        except FormatError:
            pass
        else:
            assert (verdict.verdict, verdict.tensors.damaged) == ("different", True)
            assert file.name in verdict.tensors.files
        file.write_bytes(source.read_bytes())
    assert verify(Artifact.open(folder)).verdict == "identical"


def test_a_tampered_tensor_is_named_even_if_the_file_hash_is_made_to_fit(lossless: Artifact, tiny: Source) -> None:
    """Whoever repairs the file's hash still has the tensor's against him; the damaged model is not run."""
    from tcw.artifact import dump_manifest, file_sha256

    file, at = stored_bytes(lossless.path)[-1]
    raw = bytearray(file.read_bytes())
    raw[at] ^= 0x10
    file.write_bytes(raw)
    lossless.manifest["files"][file.name]["sha256"] = file_sha256(file)
    (lossless.path / "tcw.json").write_text(dump_manifest(lossless.manifest), encoding="utf-8")
    verdict = verify(Artifact.open(lossless.path), tiny, limits={"max_kl": 1e9})
    assert verdict.verdict == "different"
    assert len(verdict.tensors.different) == 1
    assert verdict.tensors.files == []
    assert "damaged" in verdict.skipped["outputs"]


def test_a_changed_side_file_is_damage(lossless: Artifact) -> None:
    path = lossless.path / "tokenizer.json"
    raw = path.read_bytes()
    path.write_bytes(raw[:-2] + raw[-2:].swapcase()[::-1])
    verdict = verify(Artifact.open(lossless.path))
    assert (verdict.verdict, verdict.tensors.files, verdict.tensors.different) == ("different", ["tokenizer.json"], [])


def test_lossy_is_judged_by_its_limits(lossy: Callable[[int], Artifact], tiny: Source) -> None:
    fine = lossy(2)
    verdict = verify(fine, tiny, limits={"max_kl": 1e3}, device="cpu")
    shown = verdict.to_json()
    assert verdict.verdict == "equivalent"
    assert shown["limits"] == [{"name": "max_kl", "value": shown["logits"]["mean_kl"], "limit": 1e3, "ok": True}]
    assert shown["logits"]["mean_kl"] > 0
    assert 0 < max(shown["tensors"]["relative_error"].values()) < 0.05
    assert not verdict.tensors.damaged
    verdict = verify(fine, tiny, limits={"max_kl": 0.0}, device="cpu")
    assert (verdict.verdict, verdict.exit_code) == ("different", 1)
    assert [(l.name, l.limit, l.ok) for l in verdict.limits] == [("max_kl", 0.0, False)]


def test_losing_more_is_worse(lossy: Callable[[int], Artifact], tiny: Source) -> None:
    found = [verify(lossy(drop), tiny, device="cpu").to_json() for drop in (1, 5)]
    assert found[0]["limits"][0]["limit"] == 0.5, "the recipe's own limit"
    assert found[0]["logits"]["mean_kl"] < found[1]["logits"]["mean_kl"]
    assert found[0]["generation"]["identical_tokens"] >= found[1]["generation"]["identical_tokens"]
    assert found[1]["generation"]["identical_tokens"] < 64
    assert found[0]["perplexity"]["rise"] != 0


def test_lossy_without_a_reference_is_no_question(lossy: Callable[[int], Artifact]) -> None:
    with pytest.raises(UsageError, match="stored lossy") as error:
        verify(lossy(3))
    assert "--reference" in error.value.hint


def test_what_differs_without_a_limit_is_different(tiny: Source, tiny_llama: Path, tmp_path: Path) -> None:
    near = changed(tiny_llama, tmp_path / "near", "model.norm.weight", lambda t: t * 1.01)
    assert verify(near, tiny, device="cpu").verdict == "different"
    verdict = verify(near, tiny, device="cpu", limits={"max_kl": 10.0, "min_top1": 0.5, "max_ppl_rise": 10.0})
    assert verdict.verdict == "equivalent"
    assert len(verdict.limits) == 3


def test_questions_that_make_no_sense(lossless: Artifact, tiny: Source) -> None:
    with pytest.raises(UsageError, match="not an artifact"):
        verify(tiny)
    with pytest.raises(UsageError, match="needs a reference"):
        verify(lossless, limits={"max_kl": 0.1})
    with pytest.raises(UsageError, match="tensors-only"):
        verify(lossless, tiny, suites=["outputs"], tensors_only=True)
    with pytest.raises(UsageError, match="tensors-only"):
        verify(lossless, tiny, limits={"max_kl": 0.1}, tensors_only=True)
    with pytest.raises(UsageError, match="needs a reference"):
        verify(lossless, suites=["outputs"])
    with pytest.raises(UnknownName, match="no suite named `output`") as error:
        verify(lossless, suites=["output"])
    assert "outputs" in error.value.hint
    with pytest.raises(UnknownName, match="no limit named `max_ki`"):
        verify(lossless, tiny, limits={"max_ki": 1.0})
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="max_kl"):
            verify(lossless, tiny, limits={"max_kl": bad})


def test_texts_that_cannot_be_read(lossless: Artifact, tiny: Source, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="nothing"):
        verify(lossless, tiny, text=tmp_path / "nothing.txt")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(SourceError, match="UTF-8"):
        verify(lossless, tiny, text=tmp_path / "latin.txt")
    (tmp_path / "empty.txt").write_text("", encoding="utf-8")
    with pytest.raises(SourceError, match="too few"):
        verify(lossless, tiny, text=tmp_path / "empty.txt", device="cpu")


def test_a_suite_is_one_more_file(tiny: Source, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "extra.py").write_text("# found by its name", encoding="utf-8")
    monkeypatch.setattr(suites, "__path__", [*suites.__path__, str(tmp_path)])
    assert suites.names() == ["extra", "kv", "outputs", "residency", "tokens"]

    def run(job: Job) -> Measured:
        return Measured({"extra": {"answer": 42}}, identical=False)

    monkeypatch.setattr(suites, "get", lambda name, get=suites.get: run if name == "extra" else get(name))
    verdict = verify(tiny, tiny, suites=["extra", "extra"], device="cpu")
    assert verdict.to_json()["extra"] == {"answer": 42}
    assert verdict.to_json()["logits"]["bit_identical"] is True
    assert verdict.verdict == "different"


def test_verify_is_light_until_a_model_runs() -> None:
    code = "import sys, tcw.verify, tcw.verify.suites; assert 'torch' not in sys.modules, 'torch was imported'"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
