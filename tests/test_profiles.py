"""Every recipe that comes with tcw: it loads, runs on a model from end to end, and verify knows what it made."""

from pathlib import Path

import pytest

from tcw import methods, pipeline, recipe
from tcw.artifact import Artifact
from tcw.calibration import Settings
from tcw.source import open_source
from tcw.verify import verify
from tcw.weights import WeightMethod

KV = ["kv-eighth", "kv-quarter"]  # weights without loss, and a policy
LOSSY = [name for name in recipe.names() if not recipe.load(name).lossless and name not in KV]
SHORT = Settings(samples=8, length=128, device="cpu")


def calibrates(name: str) -> bool:
    built = [step.build() for step in recipe.load(name).steps]
    return any(method.calibrates() for method in built if isinstance(method, WeightMethod))


def test_the_recipes_of_the_catalogue() -> None:
    assert set(recipe.names()) == {
        "any-rate-3bit", "fp8-dynamic", "int2-small", "int4-balanced", "int8-safe", "lossless", "lossless-fp8", *KV,
    }  # fmt: skip
    assert [name for name in recipe.names() if recipe.load(name).lossless] == ["lossless"]
    assert [name for name in recipe.names() if calibrates(name)] == ["any-rate-3bit", "int2-small", "int4-balanced"]


@pytest.mark.parametrize("name", LOSSY)
def test_a_lossy_recipe_limits_outputs_tensors_and_bytes(name: str) -> None:
    loaded = recipe.load(name)
    wanted = {"max_kl", "min_top1", "max_ppl_rise", "max_weight_error", "max_bits_per_weight"}
    assert set(loaded.limits) == wanted
    assert loaded.steps[-1].method == "dfloat11"


@pytest.mark.parametrize("name", KV)
def test_a_kv_recipe_limits_bytes_retrieval_and_loss(name: str) -> None:
    loaded = recipe.load(name)
    assert set(loaded.limits) == {"max_kv_bytes", "max_key_nll_rise", "max_next_nll_rise"}
    families = [methods.family_of(step.method) for step in loaded.steps]
    assert (loaded.steps[0].method, set(families[1:])) == ("dfloat11", {"kv"})


def test_gentler_recipes_have_tighter_limits() -> None:
    order = ["int8-safe", "fp8-dynamic", "int4-balanced", "any-rate-3bit", "int2-small"]
    loaded = [recipe.load(name).limits for name in order]
    for key in ("max_kl", "max_ppl_rise"):
        assert [limits[key] for limits in loaded] == sorted(limits[key] for limits in loaded)
    tops = [limits["min_top1"] for limits in loaded]
    assert tops == sorted(tops, reverse=True)


@pytest.mark.parametrize("name", recipe.names())
def test_a_recipe_from_end_to_end(name: str, tiny_llama: Path, tmp_path: Path) -> None:
    source, loaded = open_source(tiny_llama), recipe.load(name)
    report = pipeline.compress(source, loaded, tmp_path / "out", calibration=SHORT)
    assert report.methods == [step.spec() for step in loaded.steps]
    assert report.ratio < 0.85
    artifact = Artifact.open(tmp_path / "out")
    assert artifact.limits() == loaded.limits
    found = verify(artifact, source, device="cpu")
    shown = found.to_json()
    assert not found.tensors.damaged
    assert not found.tensors.unexplained
    assert {limit["name"] for limit in shown["limits"]} == set(loaded.limits)
    assert all(limit["value"] is not None for limit in shown["limits"])
    held = {limit["name"]: limit["ok"] for limit in shown["limits"]}
    if loaded.lossless:
        assert found.verdict == "identical"
    elif name in KV:
        assert found.tensors.different == []
        assert all(gate["ok"] is not False for gate in shown["kv"]["gates"].values())
        # a quarter of 1,000 tokens is more of the short texts that this model has room for
        assert shown["kv"]["bytes_ratio"] < 0.5
    else:
        # a model of random weights that were scaled up amplifies errors: its outputs are no measure
        assert held["max_weight_error"]
        assert shown["weights"]["max_error"] > 0
        assert shown["weights"]["bits_per_weight"] < 16
        assert shown["weights"]["methods"].keys() <= {*methods.names("weights")}


def mean_kl(name: str, tiny_llama: Path, out: Path) -> float:
    source = open_source(tiny_llama)
    pipeline.compress(source, recipe.load(name), out, calibration=SHORT)
    return float(verify(Artifact.open(out), source, device="cpu").sections["logits"]["mean_kl"])


def test_more_bits_are_closer(tiny_llama: Path, tmp_path: Path) -> None:
    found = [mean_kl(name, tiny_llama, tmp_path / name) for name in ("int8-safe", "int4-balanced", "int2-small")]
    assert found == sorted(found)


@pytest.mark.slow
@pytest.mark.parametrize("name", recipe.names())
def test_a_real_small_model_keeps_the_limits(name: str, smollm2: Path, tmp_path: Path) -> None:
    source = open_source(smollm2)
    pipeline.compress(source, recipe.load(name), tmp_path / "out")
    found = verify(Artifact.open(tmp_path / "out"), source, device="cpu")
    assert found.ok, found.to_json()["limits"]
