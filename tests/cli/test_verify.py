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
        "--device", "cpu")  # fmt: skip
    artifact, reference, options = calls[0]
    assert (artifact, reference) == ("opened a", "opened b")
    del options["progress"]
    assert options == {
        "suites": ("outputs",), "tensors_only": False, "text": text, "device": "cpu",
        "limits": {"max_kl": 0.5, "min_top1": 0.9, "max_ppl_rise": 0.1, "min_greedy": 0.25, "max_weight_error": 0.3,
                   "max_bits_per_weight": 4.5},
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
