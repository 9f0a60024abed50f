"""The whole flow on real and tiny models: keys, sums, and predictions against what `compress` then writes."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tcw import methods
from tcw.errors import UnknownName, UsageError
from tcw.pipeline import compress
from tcw.profile import Profile, decode_bytes, profile, tensors
from tcw.profile.tensors import scan
from tcw.recipe import from_specs, parse_spec
from tcw.source import open_source
from tcw.tensor import TensorInfo
from tcw.weights import WeightMethod

KEYS = {
    "model": str,
    "device": {"name": str, "memory_bytes": int, "bandwidth_gbps": float},
    "weights": {"parameters": int, "bytes": int, "by_dtype": dict, "exponent_entropy_bits": float},
    "kv": {"bytes_per_token": int},
    "latency": {"prefill_ms": (float, type(None)), "decode_ms_per_token": (float, type(None))},
    "methods": list,
}
ROW = {"name": str, "bytes": int, "ratio": float, "bits_per_weight": float, "lossless": bool, "fits": bool}


def _check(found: dict, expected: dict) -> None:
    for key, kind in expected.items():
        assert key in found
        if isinstance(kind, dict):
            _check(found[key], kind)
        else:
            assert isinstance(found[key], kind), key


@pytest.fixture(scope="module")
def tiny(tiny_llama: Path) -> Profile:
    return profile(open_source(tiny_llama), device="cpu", context=300, batch=2)


def test_json_has_the_keys_of_the_contract(tiny: Profile) -> None:
    facts = json.loads(json.dumps(tiny.to_json()))
    _check(facts, KEYS)
    for row in [facts["original"], *facts["methods"]]:
        _check(row, ROW)


def test_every_weight_method_has_a_row(tiny: Profile) -> None:
    """Those that calibrate as well: a prediction needs no data."""
    names = methods.names("weights")
    assert [row["name"] for row in tiny.to_json()["methods"]] == names
    assert {"dfloat11", "fp8", "int4", "ecq"} <= set(names)


def test_weights_are_counted_by_dtype_and_by_part(tiny: Profile) -> None:
    weights = tiny.to_json()["weights"]
    assert weights["parameters"] == 2 * 256 * 64 + 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 160 + 2 * 64) + 64
    assert weights["bytes"] == 2 * weights["parameters"]
    assert weights["by_dtype"] == {"BF16": weights["bytes"]}
    parts = {k: v["parameters"] for k, v in weights["by_part"].items()}
    assert parts == {
        "embedding": 256 * 64, "attention": 2 * (2 * 64 * 64 + 2 * 64 * 32), "mlp": 2 * 3 * 64 * 160,
        "norm": 5 * 64, "head": 256 * 64,
    }  # fmt: skip
    assert not weights["tied_head"]


def test_entropy_is_the_weighted_mean_of_the_tensors(tiny: Profile, tiny_llama: Path) -> None:
    source = open_source(tiny_llama)
    total, bits = 0, 0.0
    for name in source.tensors():
        share = np.bincount((source.read(name).words >> 7) & 255) / source.tensors()[name].numel
        total += source.tensors()[name].numel
        bits -= source.tensors()[name].numel * sum(p * np.log2(p) for p in share if p)
    assert tiny.to_json()["weights"]["exponent_entropy_bits"] == pytest.approx(bits / total, rel=1e-9)


def test_memory_is_weights_cache_and_activations(tiny: Profile) -> None:
    facts = tiny.to_json()
    assert facts["kv"]["bytes_per_token"] == 2 * 2 * (2 * 16) * 2
    assert facts["kv"]["bytes"] == 2 * 300 * facts["kv"]["bytes_per_token"]
    original = facts["original"]
    assert original["needs_bytes"] == original["bytes"] + facts["kv"]["bytes"] + facts["activations"]["bytes"]
    assert original["fits"]
    assert original["max_context"] == facts["context"]["model_max"] == 512


def test_latency_is_measured_on_the_loaded_model(tiny: Profile) -> None:
    latency = tiny.to_json()["latency"]
    assert latency["prefill_ms"] > 0
    assert latency["decode_ms_per_token"] > 0
    assert latency["decode_bound_ms"] > 0
    assert latency["dtype"] == "bfloat16"


def _prediction(folder: Path, out: Path) -> tuple[int, int]:
    source = open_source(folder)
    report = compress(source, from_specs(["dfloat11"]), out)
    artifact = open_source(out)
    assert report.artifact == out
    stored = sum(artifact.tensor_bytes(name) for name in artifact.tensors())
    found = profile(source, specs=["dfloat11"], device="cpu", latency=False)
    assert found.to_json()["latency"]["skipped"] == "not asked for"
    return found.rows[1].bytes, stored


@pytest.mark.parametrize("model", ["tiny_llama", "minilm", "smollm2"])
def test_prediction_is_what_compress_writes(model: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    predicted, stored = _prediction(request.getfixturevalue(model), tmp_path / "artifact")
    assert abs(predicted / stored - 1) < 0.005


def test_an_artifact_is_profiled_as_the_model_it_holds(tiny_llama: Path, tmp_path: Path) -> None:
    compress(open_source(tiny_llama), from_specs(["dfloat11"]), tmp_path / "artifact")
    before, after = (profile(open_source(p), device="cpu", latency=False) for p in (tiny_llama, tmp_path / "artifact"))
    assert before.to_json()["weights"] == after.to_json()["weights"]
    assert before.rows[1].bytes == after.rows[1].bytes


def test_an_encoder_has_a_forward_time_and_no_cache(minilm: Path) -> None:
    facts = profile(open_source(minilm), device="cpu").to_json()
    assert facts["kv"]["bytes_per_token"] == 0
    assert facts["latency"]["prefill_ms"] is None
    assert facts["latency"]["forward_ms"] > 0
    assert facts["context"]["tokens"] == 512


def test_a_tensor_saved_twice_is_stored_once(tiny_llama: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "twice"
    shutil.copytree(tiny_llama, folder)
    state = load_file(folder / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    predicted, stored = _prediction(folder, tmp_path / "artifact")
    assert abs(predicted / stored - 1) < 0.005
    found = profile(open_source(folder), device="cpu", latency=False).to_json()["weights"]
    assert found["tied_head"]
    assert found["repeated_tensors"] == 1 + 4  # the five norms are all ones


def test_large_tensors_of_large_models_are_sampled(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, step = open_source(tiny_llama), parse_spec("dfloat11")
    by_rows = [parse_spec(spec) for spec in ("int4:group_size=32", "fp8", "ecq")]
    whole = scan(source, [step, *by_rows])
    monkeypatch.setattr(tensors, "SAMPLED_MODEL_BYTES", 1000)
    monkeypatch.setattr(tensors, "SAMPLED_TENSOR_BYTES", 8192)
    sampled = scan(source, [step, *by_rows])
    assert sum(look.sampled for look in sampled.looks) == sum(i.nbytes > 8192 for i in source.tensors().values()) > 0
    assert sampled.stored_bytes(0) == pytest.approx(whole.stored_bytes(0), rel=0.02)
    for i in range(1, 4):  # what counts scales by rows and groups sees whole rows
        assert sampled.stored_bytes(i) == pytest.approx(whole.stored_bytes(i), rel=0.02)
    assert sampled.exponents()[1].sum() == pytest.approx(whole.exponents()[1].sum(), abs=256)
    assert all(look.same_as is None for look in sampled.looks if look.sampled)


def test_scratch_is_the_largest_block_that_is_coded(tiny_llama: Path) -> None:
    source = open_source(tiny_llama)
    found = scan(source, [parse_spec("dfloat11")])
    layer = {n: i for n, i in source.tensors().items() if n.startswith("model.layers.1.")}
    coded = sum(i.nbytes for i in layer.values() if len(i.shape) == 2)
    assert found.scratch_bytes(0) == coded


def test_progress_counts_bytes_to_the_end(tiny_llama: Path) -> None:
    events: list = []
    source = open_source(tiny_llama)
    profile(source, device="cpu", latency=False, progress=events.append)
    looked = [e for e in events if e.stage == "profile"]
    assert looked[-1].done == looked[-1].total == sum(i.nbytes for i in source.tensors().values())
    assert [e.done for e in looked] == sorted(e.done for e in looked)


def test_what_makes_no_sense_is_refused(tiny_llama: Path) -> None:
    source = open_source(tiny_llama)
    for options in ({"batch": 0}, {"context": 0}):
        with pytest.raises(UsageError, match=next(iter(options))):
            profile(source, device="cpu", latency=False, **options)
    with pytest.raises(UnknownName, match="dfloat1"):
        profile(source, specs=["dfloat1"], device="cpu", latency=False)
    with pytest.raises(UsageError, match="gpu"):
        profile(source, device="gpu", latency=False)


def test_a_model_that_does_not_fit_is_not_loaded(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tcw.profile as flow
    from tcw.device import Device

    monkeypatch.setattr(flow, "pick", lambda text: Device("tiny", "cpu", "cpu", 100_000, 100_000, "asked for", 1))
    monkeypatch.setattr(flow, "measure", lambda *a, **k: pytest.fail("the model was loaded"))
    facts = profile(open_source(tiny_llama), device="cpu").to_json()
    assert "does not fit" in facts["latency"]["skipped"]
    assert not facts["original"]["fits"]
    assert facts["original"]["max_context"] == 0


def test_all_methods_see_every_tensor_once(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(tiny_llama)
    reads: list[str] = []
    original = type(source).read
    monkeypatch.setattr(type(source), "read", lambda self, name: reads.append(name) or original(self, name))
    found = scan(source, [parse_spec("dfloat11"), parse_spec("dfloat11:min_saving=0.5")])
    norms = [n for n in source.tensors() if "norm" in n]
    # the norms are all ones, so they are read again to see that they are the same
    assert sorted(reads) == sorted([*source.tensors(), *norms])
    assert found.stored_bytes(0) < found.stored_bytes(1) == sum(i.nbytes for i in source.tensors().values())
    assert isinstance(parse_spec("dfloat11").build(), WeightMethod)


def test_a_decoded_token_reads_the_head_once_and_only_its_experts() -> None:
    infos = [
        TensorInfo("model.embed_tokens.weight", "BF16", (100, 10)),
        TensorInfo("model.layers.0.self_attn.q_proj.weight", "BF16", (10, 10)),
        TensorInfo("model.layers.0.mlp.experts.0.up_proj.weight", "BF16", (10, 80)),
        TensorInfo("model.layers.0.mlp.shared_expert.up_proj.weight", "BF16", (10, 20)),
        TensorInfo("model.vision_tower.encoder.layers.0.mlp.fc1.weight", "BF16", (10, 70)),
    ]
    seen = tensors.Scan(tuple(tensors.Look(info, None, ()) for info in infos))
    text = SimpleNamespace(num_experts=8, num_experts_per_tok=2)
    used = 2 * (10 * 10 + 10 * 80 * 2 // 8 + 10 * 20)
    assert decode_bytes(seen, text, tied=False) == used
    assert decode_bytes(seen, text, tied=True) == used + 2 * 100 * 10
