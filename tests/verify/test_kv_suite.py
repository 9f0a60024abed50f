import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from tcw import data, recipe
from tcw.artifact import Artifact
from tcw.errors import SourceError, UsageError
from tcw.events import Progress
from tcw.kv.stores import DenseStore
from tcw.pipeline import compress
from tcw.source import Source, open_source
from tcw.verify import verify
from tcw.verify.html import render

LIMITS: dict[str, float | None] = {"max_key_nll_rise": 20.0, "max_next_nll_rise": 1.0, "max_kv_bytes": 0.6}
GATES = {"everything", "forgotten", "padding", "reordering", "bytes"}


@pytest.fixture(scope="module")
def snapkv(tiny: Source, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A lossless artifact that stores a policy."""
    folder = tmp_path_factory.mktemp("kv") / "snapkv"
    compress(tiny, recipe.from_specs(["dfloat11", "snapkv:ratio=0.5"]), folder)
    return Artifact.open(folder)


@pytest.fixture(scope="module")
def shown(snapkv: Artifact, tiny: Source) -> dict[str, Any]:
    """The verdict against the source, with limits."""
    return verify(snapkv, tiny, device="cpu", limits=LIMITS).to_json()


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few tasks of a short text, where their number does not matter."""
    from tcw.verify import kv_tasks
    from tcw.verify.suites import outputs

    make, text = kv_tasks.make_tasks, data.evaluation_text()[:5000]
    for module in (kv_tasks, outputs):
        monkeypatch.setattr(module, "evaluation_text", lambda: text)
    monkeypatch.setattr(
        kv_tasks, "make_tasks", lambda script, n: make(script, min(n, 150), placements=2, copies=1, continuations=1)
    )


def test_a_policy_is_measured_against_the_reference(shown: dict[str, Any]) -> None:
    assert shown["verdict"] == "equivalent"
    assert shown["tensors"]["different"] == []
    assert shown["logits"]["bit_identical"] is True, "the weights are judged with a full cache"
    assert shown["generation"] == {"tokens": 64, "identical_tokens": 64, "agreement": 1.0}
    kv = shown["kv"]
    for key in ("key_nll", "exact", "next_nll", "span_copy", "span_nll", "tokens_per_second"):
        assert {"reference", "artifact"} <= kv[key].keys()
    assert kv["key_nll"]["reference"] != kv["key_nll"]["artifact"]
    assert kv["next_nll"]["rise"] == kv["next_nll"]["artifact"] - kv["next_nll"]["reference"]
    assert (kv["placements"], kv["context"], kv["text"]) == (20, 512 - 129, "prose")
    assert kv["methods"]["snapkv"]["ratio"] == 0.5
    assert {limit["name"]: limit["value"] for limit in shown["limits"]} == {
        "max_kv_bytes": kv["bytes_ratio"],
        "max_key_nll_rise": kv["key_nll"]["rise"],
        "max_next_nll_rise": kv["next_nll"]["rise"],
    }
    assert shown["failed"] == {}
    json.dumps(shown, allow_nan=False)


def test_gates_are_in_the_verdict(shown: dict[str, Any]) -> None:
    gates = shown["kv"]["gates"]
    assert set(gates) == GATES
    assert all(gate["ok"] for gate in gates.values())
    assert gates["everything"]["error"] == gates["bytes"]["error"] == 0


def test_bytes_are_those_of_the_caches(shown: dict[str, Any], snapkv: Artifact) -> None:
    from tcw.kv.policy import Policy
    from tcw.runtime.load import load

    kv, length = shown["kv"], shown["kv"]["context"]
    config = json.loads((snapkv.path / "config.json").read_text(encoding="utf-8"))
    full = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * length * (64 // 4) * 4
    assert (kv["bytes"]["full"], kv["bytes"]["dtype"]) == (full, "float32")
    assert kv["bytes"]["bfloat16"]["full"] == full // 2
    model = load(snapkv, device="cpu", dtype=torch.bfloat16)
    policy = Policy.of_artifact(snapkv, model)
    assert policy is not None
    cache = policy.new_cache(model)
    with torch.no_grad():
        model(torch.arange(length)[None] % 256, past_key_values=cache)
    assert kv["bytes"]["bfloat16"]["policy"] == cache.nbytes()
    assert kv["bytes_ratio"] == pytest.approx(cache.nbytes() / (full // 2))
    assert 0.5 <= kv["bytes_ratio"] < 0.6


def test_quantised_tokens_are_not_flattered_by_float32(tiny: Source, tmp_path: Path, short: None) -> None:
    compress(tiny, recipe.from_specs(["dfloat11", "kivi:bits=4"]), tmp_path / "kivi")
    kv = verify(Artifact.open(tmp_path / "kivi"), suites=["kv"], device="cpu").to_json()["kv"]
    assert kv["bytes"]["policy"] / kv["bytes"]["full"] < 0.9 * kv["bytes_ratio"]
    assert kv["gates"]["forgotten"]["ok"] is None


def test_without_a_reference_the_artifact_is_its_own(snapkv: Artifact, shown: dict[str, Any]) -> None:
    found = verify(snapkv, suites=["kv"], device="cpu", limits=LIMITS)
    kv = found.to_json()["kv"]
    assert (found.verdict, found.exit_code) == ("equivalent", 0)
    for key in ("key_nll", "next_nll", "exact", "span_copy", "bytes", "gates"):
        assert kv[key] == shown["kv"][key], "lossless weights: the same numbers"
    assert "no reference" in found.skipped["outputs"]


def test_a_suite_not_run_says_how(snapkv: Artifact, tiny: Source, lossless: Artifact) -> None:
    found = verify(snapkv)
    assert (found.verdict, "kv" in found.sections) == ("identical", False)
    assert "--suite kv" in found.skipped["kv"]
    assert "only tensors" in verify(snapkv, tiny, tensors_only=True).skipped["kv"]
    assert "kv" not in verify(lossless).skipped


def test_a_policy_that_changes_outputs_needs_a_limit(snapkv: Artifact, tiny: Source, short: None) -> None:
    stated = {"max_key_nll_rise", "max_next_nll_rise"}
    assert stated <= snapkv.limits().keys(), "a policy brings limits of its own"
    wide: dict[str, float | None] = dict.fromkeys(sorted(stated), 20.0)
    assert verify(snapkv, device="cpu", limits=wide).verdict == "equivalent"
    past = verify(snapkv, device="cpu", limits={**wide, "max_next_nll_rise": 0.0})
    assert (past.verdict, past.exit_code) == ("different", 1)
    assert [limit.name for limit in past.limits if not limit.ok] == ["max_next_nll_rise"]
    snapkv.manifest["recipe"]["verify"].clear()
    try:
        other = verify(snapkv, tiny, device="cpu", limits={"max_kl": 1.0})
        assert (other.verdict, other.limits[0].ok) == ("different", True), "that is no limit on the policy"
        assert verify(snapkv, device="cpu", limits={"max_kv_bytes": 1.0}).verdict == "different", "size is no likeness"
    finally:
        snapkv.manifest["recipe"]["verify"].update(dict.fromkeys(stated, 0.5))


def test_a_policy_that_forgets_nothing_is_identical(tiny: Source, tmp_path: Path, short: None) -> None:
    compress(tiny, recipe.from_specs(["dfloat11", "knorm:tokens=500"]), tmp_path / "roomy")
    found = verify(Artifact.open(tmp_path / "roomy"), tiny, device="cpu")
    assert found.verdict == "identical"
    assert found.sections["kv"]["key_nll"]["reference"] == found.sections["kv"]["key_nll"]["artifact"]


def test_a_recipe_may_limit_the_policy(tiny: Source, tmp_path: Path, short: None) -> None:
    table = {
        "method": [{"use": "dfloat11"}, {"use": "knorm", "ratio": 0.5}],
        "verify": {"max_kv_bytes": 0.3, "max_next_nll_rise": 5.0},
    }
    compress(tiny, recipe.from_table("half", table), tmp_path / "half")
    artifact = Artifact.open(tmp_path / "half")
    found = verify(artifact, suites=["kv"], device="cpu")
    assert [(limit.name, limit.ok) for limit in found.limits] == [("max_kv_bytes", False), ("max_next_nll_rise", True)]
    assert found.verdict == "different"
    assert verify(artifact, device="cpu", limits={"max_kv_bytes": 0.9}).verdict == "equivalent"
    assert set(verify(artifact).skipped) == {"outputs", "kv"}, "limits of a suite that was not run need no line"


def test_a_broken_store_fails_whatever_the_limits(
    snapkv: Artifact, monkeypatch: pytest.MonkeyPatch, short: None
) -> None:
    def read(store: DenseStore, read: Any = DenseStore.read) -> tuple[Tensor, Tensor]:
        keys, values = read(store)
        return keys.flip(2), values

    monkeypatch.setattr(DenseStore, "read", read)
    found = verify(snapkv, suites=["kv"], device="cpu", limits=LIMITS)
    assert all(limit.ok for limit in found.limits)
    assert (found.verdict, found.exit_code) == ("different", 1)
    assert {"kv everything", "kv forgotten"} <= set(found.failed)
    assert "at most 0 are allowed" in found.failed["kv everything"]
    page = render(found)
    assert "kv everything: failed" in page
    assert '<p class="no">FAIL: everything' in page


def test_bytes_that_the_plan_does_not_know_fail(snapkv: Artifact, monkeypatch: pytest.MonkeyPatch, short: None) -> None:
    from tcw.kv.cache import PolicyCache

    nbytes = PolicyCache.nbytes
    monkeypatch.setattr(PolicyCache, "nbytes", lambda cache: nbytes(cache) + 8)
    found = verify(snapkv, suites=["kv"], device="cpu", limits=LIMITS)
    assert list(found.failed) == ["kv bytes"]


def test_no_policy_no_suite(lossless: Artifact, tiny: Source) -> None:
    for artifact, reference in ((lossless, None), (lossless, tiny), (tiny, tiny)):
        with pytest.raises(UsageError, match="stores no KV policy"):
            verify(artifact, reference, suites=["kv"], device="cpu")
    with pytest.raises(UsageError, match="stores no KV policy"):
        verify(lossless, limits={"max_key_nll_rise": 1.0}, device="cpu")
    with pytest.raises(UsageError, match="tensors-only"):
        verify(lossless, limits={"max_kv_bytes": 1.0}, tensors_only=True)


def test_damage_is_not_measured(snapkv: Artifact, tmp_path: Path) -> None:
    shutil.copytree(snapkv.path, tmp_path / "bad")
    shard = next((tmp_path / "bad").glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-9] ^= 1
    shard.write_bytes(data)
    found = verify(Artifact.open(tmp_path / "bad"), suites=["kv"])
    assert found.verdict == "different"
    assert found.skipped["kv"] == "the artifact is damaged"


def policy_on(folder: Path, out: Path) -> Artifact:
    compress(open_source(folder), recipe.from_specs(["dfloat11", "knorm:ratio=0.5"]), out)
    return Artifact.open(out)


def small(folder: Path, context: int) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=context, bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def test_without_a_tokenizer_tokens_are_random(tmp_path: Path, short: None) -> None:
    artifact = policy_on(small(tmp_path / "bare", 400), tmp_path / "out")
    found = verify(artifact, suites=["kv"], device="cpu", limits={"max_key_nll_rise": 20.0})
    assert found.verdict == "equivalent"
    assert found.sections["kv"]["text"] == "random tokens"


def test_layers_with_a_sliding_window_count_in_both_caches(tmp_path: Path, short: None) -> None:
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, max_position_embeddings=400, sliding_window=40,
    )  # fmt: skip
    Gemma2ForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    kv = verify(policy_on(tmp_path / "model", tmp_path / "out"), suites=["kv"], device="cpu").sections["kv"]
    held, gates = kv["bytes"]["bfloat16"], kv["gates"]
    assert all(gates[name]["ok"] for name in ("everything", "forgotten", "padding", "reordering"))
    assert "bytes" not in gates, "the plan knows nothing of them"
    a_layer = 2 * 150 * 2 * 8 * 2  # keys and values, tokens, heads, elements, bytes
    assert held["full"] > 2 * a_layer
    assert held["full"] - held["policy"] == pytest.approx(a_layer, rel=0.1), "half of two of the layers"


def test_a_short_context_is_said(tmp_path: Path) -> None:
    artifact = policy_on(small(tmp_path / "short", 160), tmp_path / "out")
    found = verify(artifact, suites=["kv"], device="cpu")
    assert "too short" in found.skipped["kv"]
    assert found.verdict == "different", "nothing shows what the policy does"


def test_another_text(snapkv: Artifact, tmp_path: Path, short: None, shown: dict[str, Any]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog, again and again. " * 40, encoding="utf-8")
    found = verify(snapkv, suites=["kv"], device="cpu", text=text)
    assert found.sections["kv"]["next_nll"]["reference"] != shown["kv"]["next_nll"]["reference"]
    text.write_text("Too little.", encoding="utf-8")
    with pytest.raises(SourceError, match="too short"):
        verify(snapkv, suites=["kv"], device="cpu", text=text)


def test_progress_is_told(snapkv: Artifact, short: None) -> None:
    events: list[Progress] = []
    verify(snapkv, suites=["kv"], device="cpu", progress=events.append)
    assert {"tasks with a full cache", "tasks with the KV policy", "gates"} <= {e.stage for e in events}
    assert all(e.done <= e.total for e in events)


def test_page_shows_retrieval_beside_perplexity(snapkv: Artifact, short: None) -> None:
    page = render(verify(snapkv, suites=["kv"], device="cpu", limits=LIMITS))
    for text in (
        "passkeys found",
        "following text, perplexity",
        "at most 60.00 %",
        "neither says enough alone",
        "everything",
    ):
        assert text in page, text
    assert page.count(">pass<") == 3
