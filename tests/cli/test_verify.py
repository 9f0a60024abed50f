"""`tcw verify`: the exit code is the answer, in every mode."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]
LOSSY: dict[str, Any] = {
    "verdict": "equivalent", "artifact": "a", "reference": "b",
    "tensors": {"checked": 9, "identical": 1, "different": [f"layer.{i}" for i in range(8)],
                "reasons": {"layer.0": "other bytes than the reference"}, "files_changed": []},
    "logits": {"bit_identical": False, "max_abs_diff": 0.125, "mean_kl": 0.0121, "top1_agreement": 0.985},
    "perplexity": {"reference": 16.42, "artifact": 16.79, "rise": 0.02253},
    "generation": {"tokens": 64, "identical_tokens": 37, "agreement": 37 / 64},
    "weights": {"max_error": 0.0921, "max_error_tensor": "layer.3", "bits_per_weight": 4.281,
                "methods": {"int4": {"tensors": 7, "weights": 1000, "bits_per_weight": 4.281},
                            "dfloat11": {"tensors": 1, "weights": 10, "bits_per_weight": 10.9}}},
    "limits": [{"name": "max_kl", "value": 0.0121, "limit": 0.02, "ok": True},
               {"name": "max_ppl_rise", "value": 0.02253, "limit": 0.03, "ok": True}],
    "skipped": {}, "seconds": 38.04,
}  # fmt: skip

KV: dict[str, Any] = {
    "bytes_ratio": 0.253, "key_nll": {"reference": 0.05, "artifact": 1.5}, "exact": {"reference": 1, "artifact": 0.15},
    "next_nll": {"reference": 3.0, "artifact": 3.25, "rise": 0.25}, "span_copy": {"reference": 0.941, "artifact": 0.4},
    "tokens_per_second": {"reference": 20.0, "artifact": 18.0, "ratio": 0.9}, "context": 1000,
    "bytes": {"bfloat16": {"full": 23_040_000, "policy": 5_829_120}},
    "gates": {"everything": {"ok": True, "error": 0.0, "bound": 0.0, "note": ""},
              "forgotten": {"ok": None, "error": None, "bound": None, "note": "nothing is forgotten"},
              "padding": {"ok": True, "error": 1e-6, "bound": 1e-5, "note": ""}},
}  # fmt: skip


@dataclass
class FakeVerdict:
    data: dict[str, Any]

    @property
    def verdict(self) -> str:
        return str(self.data["verdict"])

    @property
    def ok(self) -> bool:
        return self.verdict != "different"

    @property
    def exit_code(self) -> int:
        return 0 if self.ok else 1

    def to_json(self) -> dict[str, Any]:
        return self.data


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, Any]], list[tuple[Any, ...]]]:
    """Make verify() give a verdict without looking; returns the list of its calls."""

    def give(data: dict[str, Any]) -> list[tuple[Any, ...]]:
        calls: list[tuple[Any, ...]] = []

        def verify(artifact: Any, reference: Any, **options: Any) -> FakeVerdict:
            calls.append((artifact, reference, options))
            return FakeVerdict(data)

        monkeypatch.setattr("tcw.source.open_source", lambda text, progress: f"opened {text}")
        monkeypatch.setattr("tcw.verify.verify", verify)
        return calls

    return give


def test_lossy_within_limits(tcw: Run, judged: Any) -> None:
    judged(LOSSY)
    human, quiet, as_json = (tcw("verify", "a", "--reference", "b", *mode) for mode in ([], ["-q"], ["--json"]))
    assert (human.code, quiet.code, as_json.code) == (0, 0, 0)
    assert human.err == quiet.err == as_json.err == ""
    assert quiet.out == "equivalent\n"
    assert json.loads(as_json.out) == {"schema": 1, **LOSSY}
    assert human.out.splitlines() == [
        "check        result",
        "tensors      1 of 9 identical",
        "  different  layer.0: other bytes than the reference",
        "  different  layer.1: other bytes",
        "  different  layer.2: other bytes",
        "  different  layer.3: other bytes",
        "  different  layer.4: other bytes",
        "             and 3 more (`--json` has them all)",
        "weights      largest relative error 0.0921: layer.3",
        "             bits a weight: int4 4.281, dfloat11 10.900",
        "logits       largest difference 0.125",
        "             mean KL 0.0121, top-1 agreement 98.50 %",
        "perplexity   16.79, the reference has 16.42: rise 2.25 %",
        "generation   37 of 64 tokens identical before the first other one",
        "",
        "limit           found  allowed",
        "max_kl         0.0121     0.02  pass",
        "max_ppl_rise  0.02253     0.03  pass",
        "",
        "verdict: equivalent, found in 38.0 s",
    ]


def test_past_a_limit(tcw: Run, judged: Any) -> None:
    limit = {"name": "max_ppl_rise", "value": 0.21, "limit": 0.1, "ok": False}
    judged(LOSSY | {"verdict": "different", "limits": [limit]})
    human, quiet, as_json = (tcw("verify", "a", "--reference", "b", *mode) for mode in ([], ["-q"], ["--json"]))
    assert (human.code, quiet.code, as_json.code) == (1, 1, 1)
    assert "max_ppl_rise   0.21      0.1  FAIL" in human.out
    assert human.err == quiet.err == "error: past its limit: max_ppl_rise\n"
    assert quiet.out == "different\n"
    assert json.loads(as_json.out)["verdict"] == "different"
    assert as_json.err == ""


def test_options_reach_the_work(tcw: Run, judged: Any, tmp_path: Path) -> None:
    calls = judged(LOSSY)
    text = tmp_path / "text.txt"
    tcw("verify", "a", "--reference", "b", "--suite", "outputs", "--text", text, "--max-kl", 0.5, "--min-top1", 0.9,
        "--max-ppl-rise", 0.1, "--min-greedy", 0.25, "--max-weight-error", 0.3, "--max-bits-per-weight", 4.5,
        "--max-kv-bytes", 0.25, "--max-key-nll-rise", 0.5, "--max-next-nll-rise", 0.05, "--device", "cpu",
        "--images", tmp_path, "--residency", "packed")  # fmt: skip
    artifact, reference, options = calls[0]
    assert (artifact, reference) == ("opened a", "opened b")
    del options["progress"]
    assert options == {
        "suites": ("outputs",), "tensors_only": False, "text": text, "device": "cpu", "images": tmp_path,
        "residency": "packed",
        "limits": {"max_kl": 0.5, "min_top1": 0.9, "max_ppl_rise": 0.1, "min_greedy": 0.25, "max_weight_error": 0.3,
                   "max_bits_per_weight": 4.5, "max_kv_bytes": 0.25, "max_key_nll_rise": 0.5,
                   "max_next_nll_rise": 0.05},
    }  # fmt: skip
    tcw("verify", "a", "--tensors-only")
    assert calls[1][1] is None
    assert calls[1][2]["limits"] is None
    assert calls[1][2]["tensors_only"] is True


def test_html(tcw: Run, judged: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judged(LOSSY)
    pytest.importorskip("tcw.verify.html")
    monkeypatch.setattr("tcw.verify.html.render", lambda verdict: f"<p>{verdict.verdict}</p>")
    report = tmp_path / "report.html"
    assert tcw("verify", "a", "--html", report).code == 0
    assert report.read_text() == "<p>equivalent</p>"
    refused = tcw("verify", "a", "--html", report)
    assert (refused.code, refused.out) == (2, "")
    assert f"`{report}` exists" in refused.err
    assert tcw("verify", "a", "--html", report, "--force").code == 0
    assert list(tmp_path.iterdir()) == [report]


def test_a_kv_policy(tcw: Run, judged: Any) -> None:
    judged(LOSSY | {"kv": KV})
    human = tcw("verify", "a", "--suite", "kv")
    assert (human.code, human.err) == (0, "")
    assert human.out.splitlines()[13:27] == [
        "generation    37 of 64 tokens identical before the first other one",
        "KV exactness  everything, padding: hold",
        "  no check    forgotten: nothing is forgotten",
        "",
        "KV policy                        reference  artifact",
        "bytes after 1,000 tokens (BF16)    23.0 MB    5.8 MB",
        "share of a full cache              100.0 %    25.3 %",
        "passkeys found                     100.0 %    15.0 %",
        "passkey, nats a token                 0.05       1.5",
        "passage copied, tokens right        94.1 %    40.0 %",
        "following text, nats a token             3      3.25",
        "following text, perplexity           20.09     25.79",
        "tokens a second, here                   20        18",
        "Retrieval and perplexity, because neither says enough alone: prose goes on well without what was forgotten.",
    ]


def test_a_kv_policy_that_fails(tcw: Run, judged: Any) -> None:
    gates = KV["gates"] | {"padding": {"ok": False, "error": 0.5, "bound": 1e-5, "note": "32 tokens"}}
    judged(LOSSY | {"verdict": "different", "kv": KV | {"gates": gates}, "failed": {"kv padding": "an error"}})
    human = tcw("verify", "a", "--suite", "kv")
    assert human.code == 1
    assert "  FAIL        padding: an error of 0.5, at most 1e-05 (32 tokens)" in human.out
    assert human.err.startswith("error: failed: kv padding\n")


def test_a_kv_policy_without_a_limit(tcw: Run, judged: Any) -> None:
    judged(LOSSY | {"verdict": "different", "kv": KV})
    assert "no limit says how much it may" in tcw("verify", "a", "--suite", "kv").err
    judged(LOSSY | {"verdict": "different", "kv": KV, "limits": []})
    assert "differs from its source" in tcw("verify", "a", "--suite", "kv").err, "so do its tensors"


def test_a_kv_policy_for_real(tcw: Run, tiny_llama: Path, tmp_path: Path) -> None:
    methods, artifact = ("-m", "dfloat11", "-m", "snapkv:ratio=0.5"), tmp_path / "small"
    assert tcw("compress", tiny_llama, *methods, "-o", artifact, "-q").code == 0
    good = tcw("verify", artifact, "--suite", "kv", "--max-key-nll-rise", 20, "--device", "cpu")
    assert good.code == 0
    assert "everything, forgotten, padding, reordering, bytes: hold" in good.out
    plain = tcw("verify", artifact)
    assert plain.code == 0
    assert "--suite kv" in plain.out
    assert tcw("compress", tiny_llama, "-m", "dfloat11", "-o", tmp_path / "none", "-q").code == 0
    refused = tcw("verify", tmp_path / "none", "--suite", "kv")
    assert (refused.code, refused.out) == (2, "")
    assert "stores no KV policy" in refused.err


def test_for_real(tcw: Run, tiny_llama: Path, tmp_path: Path) -> None:
    artifact = tmp_path / "small"
    assert tcw("compress", tiny_llama, "--recipe", "lossless", "-o", artifact, "-q").code == 0
    good = tcw("verify", artifact)
    assert (good.code, good.err) == (0, "")
    assert "verdict: identical" in good.out
    assert "max_kl" not in good.out
    shard = next(artifact.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-100] ^= 1
    shard.write_bytes(data)
    bad = tcw("verify", artifact)
    assert bad.code == 1
    assert "verdict: different" in bad.out
    assert bad.err.startswith("error: ")
    assert tcw("verify", artifact, "-q").out == "different\n"
