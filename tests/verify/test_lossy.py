"""What verify says of quantised artifacts: error of each tensor, real bits, rotated models, limits of methods."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from tcw import methods, recipe
from tcw.artifact import Artifact, dump_manifest
from tcw.device import Device, pick
from tcw.errors import FormatError, UsageError
from tcw.pipeline import compress
from tcw.source import Source
from tcw.tensor import TensorData, TensorInfo
from tcw.verify import verify
from tcw.verify.running import residency_of
from tcw.verify.tensors import check_tensors, weigh
from tcw.verify.verdict import TensorReport
from tcw.weights import Encoded, Statistics, WeightMethod


@dataclass(frozen=True)
class Turned(WeightMethod):
    """Rotate the model, then keep the upper bits of every BF16 matrix that is no embedding."""

    drop: int = methods.option(4, "low bits to lose")

    def rotates(self) -> bool:
        return True

    def wants(self, info: TensorInfo) -> bool:
        return info.dtype == "BF16" and len(info.shape) == 2 and "embed" not in info.name and "head" not in info.name

    def part_names(self, info: TensorInfo) -> tuple[str, ...]:
        return ("words",)

    def encode(self, tensor: TensorData, statistics: Statistics | None = None) -> Encoded:
        return Encoded({"words": tensor.words >> self.drop}, {"drop": self.drop})

    @classmethod
    def decode(cls, info: TensorInfo, encoded: Encoded) -> TensorData:
        words = encoded.parts["words"].reshape(-1) << encoded.params["drop"]
        return TensorData(info, words.astype(np.uint16).view(np.uint8))


@pytest.fixture
def turned(tiny: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Artifact:
    """A rotated artifact that lost some bits."""
    monkeypatch.setitem(methods._locations(), "turned", ("weights", __name__))
    monkeypatch.setattr(methods, "get", lambda name, get=methods.get: Turned if name == "turned" else get(name))
    made = recipe.Recipe("turned", (recipe.make_step("turned", {}),), limits={"max_kl": 5.0, "max_weight_error": 0.2})
    return Artifact.open(compress(tiny, made, tmp_path / "turned").artifact)


def slow_error(reference: Source, artifact: Source, name: str) -> float:
    """||a - b|| / ||b|| with nothing shared with the code under test but reading."""
    b, a = (s.read(name).floats().astype(np.float64) for s in (reference, artifact))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def test_the_largest_error_and_the_bits_are_those_of_the_files(lossy: Callable[[int], Artifact], tiny: Source) -> None:
    artifact = lossy(5)
    found = verify(artifact, tiny, tensors_only=True).to_json()["weights"]
    errors = {n: slow_error(tiny, artifact, n) for n, i in tiny.tensors().items() if len(i.shape) == 2}
    assert found["max_error_tensor"] == max(errors, key=lambda n: errors[n])
    assert found["max_error"] == pytest.approx(max(errors.values()), rel=1e-6)
    assert found["bits_per_weight"] == 16.0, "the words are kept as they are"
    assert found["methods"] == {
        "coarse": {"tensors": len(errors), "bits_per_weight": 16.0,
                   "weights": sum(tiny.tensors()[n].numel for n in errors)}
    }  # fmt: skip


def test_bits_count_every_part_of_the_first_method_only(tiny: Source, tmp_path: Path, coarse: str) -> None:
    steps = (recipe.make_step("dfloat11", {}), recipe.make_step(coarse, {}))
    covered = recipe.Step(steps[0].method, steps[0].options, skip=("lm_head",))
    artifact = Artifact.open(compress(tiny, recipe.Recipe("two", (covered, steps[1])), tmp_path / "two").artifact)
    found = weigh(artifact, check_tensors(artifact, tiny, lambda event: None), True)
    coded = [e for e in artifact.entries.values() if e.method == "dfloat11"]
    stored = [artifact.stored[f"{e.name}.{p}"][1].info.nbytes for e in coded for p in e.parts]
    assert found["bits_per_weight"] == 8 * sum(stored) / sum(e.info.numel for e in coded)
    assert set(found["methods"]) == {"dfloat11", "coarse"}
    assert 9 < found["bits_per_weight"] < 14


@pytest.mark.parametrize(
    ("limits", "verdict"),
    [
        ({"max_weight_error": 0.2}, "equivalent"),
        ({"max_weight_error": 1e-6}, "different"),
        ({"max_bits_per_weight": 16.5}, "different"),  # size is no likeness
        ({"max_bits_per_weight": 16.5, "max_weight_error": 0.2}, "equivalent"),
        ({"max_bits_per_weight": 15.9, "max_weight_error": 0.2}, "different"),
    ],
)
def test_limits_that_need_no_model(
    limits: dict[str, float], verdict: str, lossy: Callable[[int], Artifact], tiny: Source
) -> None:
    found = verify(lossy(4), tiny, tensors_only=True, limits=dict(limits))
    assert found.verdict == verdict
    assert {l.name for l in found.limits} == set(limits)


def test_limits_without_a_reference(lossless: Artifact, tiny: Source) -> None:
    assert verify(lossless, limits={"max_bits_per_weight": 15.0}).verdict == "identical"
    assert verify(lossless, limits={"max_bits_per_weight": 3.0}).verdict == "different"
    with pytest.raises(UsageError, match="`max_weight_error` needs a reference"):
        verify(lossless, limits={"max_weight_error": 0.1})
    with pytest.raises(UsageError, match="tensors-only"):
        verify(lossless, tiny, limits={"min_greedy": 0.1}, tensors_only=True)


def test_greedy_divergence_is_a_limit(lossy: Callable[[int], Artifact], tiny: Source) -> None:
    found = verify(lossy(6), tiny, limits={"min_greedy": 1.0, "max_kl": 1e3}, device="cpu")
    generation = found.to_json()["generation"]
    assert generation["agreement"] == generation["identical_tokens"] / 64 < 1
    assert [(l.name, l.ok) for l in found.limits] == [("max_kl", True), ("min_greedy", False)]
    assert found.verdict == "different"


def test_a_rotated_artifact_is_held_against_the_rotated_reference(turned: Artifact, tiny: Source) -> None:
    assert turned.manifest["transforms"], "the pipeline did not rotate"
    report = check_tensors(turned, tiny, lambda event: None)
    name = "model.layers.1.mlp.up_proj.weight"
    assert slow_error(tiny, turned, name) > 1, "without the rotation the two have nothing in common"
    assert 0 < report.relative_error[name] < 0.06
    assert not report.unexplained
    assert report.relative_error["model.embed_tokens.weight"] == 0
    assert report.reasons["model.embed_tokens.weight"] == "is what hadamard makes of the reference"
    assert "after hadamard" in report.reasons[name]
    assert not report.damaged
    verdict = verify(turned, tiny, device="cpu")
    assert verdict.verdict == "equivalent"
    assert verdict.to_json()["weights"]["max_error"] < 0.06


def test_a_rotated_artifact_needs_its_reference(turned: Artifact) -> None:
    with pytest.raises(UsageError, match="manifest alone cannot judge"):
        verify(turned)


def rewritten(artifact: Artifact, change: Callable[[dict[str, Any]], None]) -> Artifact:
    """The artifact with another manifest."""
    change(artifact.manifest)
    (artifact.path / "tcw.json").write_text(dump_manifest(artifact.manifest), encoding="utf-8")
    return Artifact.open(artifact.path)


@pytest.mark.parametrize("transforms", [3, [3], [{}], [{"kind": "hadamard", "seed": -1}], [{"kind": "spin"}]])
def test_transforms_that_cannot_be(transforms: Any, turned: Artifact, tiny: Source) -> None:
    with pytest.raises(FormatError):
        check_tensors(rewritten(turned, lambda m: m.update(transforms=transforms)), tiny, lambda event: None)


def test_what_no_transform_explains_is_left_out_and_said(lossy: Callable[[int], Artifact], tiny: Source) -> None:
    artifact = lossy(4)
    worst = verify(artifact, tiny, tensors_only=True).to_json()["weights"]["max_error_tensor"]
    scaled = rewritten(artifact, lambda m: m["tensors"][worst].update(rewritten=True))
    verdict = verify(scaled, tiny, tensors_only=True)
    assert verdict.tensors.unexplained == [worst]
    assert verdict.to_json()["weights"]["max_error_tensor"] not in (worst, None)
    assert verdict.skipped["weight error"].startswith("1 of 21 tensors were rewritten")
    assert verdict.verdict == "different"


def test_an_error_that_is_no_number_comes_first(tiny: Source) -> None:
    report = TensorReport(3, ["a", "b", "c"], {}, {"a": 1.0, "b": float("nan"), "c": 2.0})
    assert weigh(tiny, report, True)["max_error_tensor"] == "b"
    assert weigh(tiny, TensorReport(3), True)["max_error"] == 0
    assert weigh(tiny, TensorReport(3), False)["max_error"] is None


def test_json_keeps_the_section(lossless: Artifact, tiny: Source) -> None:
    shown = json.loads(json.dumps(verify(lossless, tiny, tensors_only=True).to_json()))
    assert shown["weights"]["max_error"] == 0
    assert shown["weights"]["methods"]["dfloat11"]["tensors"] > 10


class Wide(Turned):
    """Lossy, with limits."""

    limits: ClassVar[dict[str, float]] = {"max_kl": 0.5, "min_top1": 0.7, "max_bits_per_weight": 9.0}


class Narrow(Turned):
    """Lossy, with limits that depend on an option."""

    @property
    def limits(self) -> dict[str, float]:
        return {"max_kl": self.drop / 100, "max_bits_per_weight": 5.0}


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ([Wide], {"max_kl": 0.5, "min_top1": 0.7, "max_bits_per_weight": 9.0}),
        ([Narrow], {"max_kl": 0.04, "max_bits_per_weight": 5.0}),
        ([Narrow, Wide], {"max_kl": 0.5, "max_bits_per_weight": 5.0}),
        ([Wide, Narrow], {"max_kl": 0.5, "max_bits_per_weight": 9.0}),
        ([Wide, Turned], {"max_bits_per_weight": 9.0}),  # of the second nothing is known
        ([Turned, Wide], {}),
    ],
)
def test_limits_of_methods(
    kinds: list[type[Turned]], expected: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    known = {f"m{i}": kind for i, kind in enumerate(kinds)}
    monkeypatch.setattr(methods, "get", lambda name, get=methods.get: known.get(name) or get(name))
    assert recipe.from_specs([*known, "dfloat11"]).limits == expected


def test_a_lossless_method_sets_no_limits() -> None:
    assert recipe.from_specs(["dfloat11"]).limits == {}


@pytest.mark.parametrize(
    ("spec", "residency"),
    [("fp8", "packed"), ("fp8:activation=none", "auto"), ("int8:algo=rtn", "auto"), ("dfloat11", "auto")],
)
def test_fp8_is_run_with_the_inputs_it_will_have(spec: str, residency: str, tiny: Source, tmp_path: Path) -> None:
    artifact = Artifact.open(compress(tiny, recipe.from_specs([spec]), tmp_path / "out").artifact)
    assert residency_of(artifact, pick("cpu")) == residency
    assert residency_of(tiny, pick("cpu")) == "auto"


def test_quantised_inputs_show_in_the_output(tiny: Source, tmp_path: Path) -> None:
    kl = {}
    for activation in ("none", "dynamic"):
        made = recipe.from_specs([f"fp8:activation={activation}"])
        artifact = Artifact.open(compress(tiny, made, tmp_path / activation).artifact)
        found = verify(artifact, tiny, device="cpu").to_json()
        assert found["runtime"] == {"residency": "packed" if activation == "dynamic" else "auto"}
        assert found["weights"]["max_error"] < 0.05
        kl[activation] = found["logits"]["mean_kl"]
    assert kl["dynamic"] > kl["none"] > 0


def test_on_a_gpu_weights_are_decoded_to_the_same_bits_whatever_fits(tiny: Source) -> None:
    def gpu(free: int) -> Device:
        return Device("a GPU", "cuda:0", "cuda", 80 << 30, free, "asked for")

    assert residency_of(tiny, gpu(80 << 30)) == "bf16"
    assert residency_of(tiny, gpu(1000)) == "huffman"
