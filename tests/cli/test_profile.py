"""`tcw profile` in every mode, from the JSON that a profile gives; and once for real."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

Run = Callable[..., Any]
KEYS = {
    "device": {"name", "memory_bytes", "bandwidth_gbps"},
    "weights": {"parameters", "bytes", "by_dtype", "exponent_entropy_bits"},
    "kv": {"bytes_per_token"},
    "latency": {"prefill_ms", "decode_ms_per_token"},
}


def test_for_real(tcw: Run, tiny_llama: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    human = tcw("profile", tiny_llama, "--device", "cpu", "--html", report)
    assert human.code == 0, human.err
    assert max(map(len, human.out.splitlines())) <= 80
    assert "dfloat11" in human.out
    assert report.read_text(encoding="utf-8").lstrip().lower().startswith("<!doctype html")
    assert f"hint: `tcw compress {tiny_llama} --method dfloat11`" in human.err
    as_json = tcw("profile", tiny_llama, "--device", "cpu", "--no-latency", "--json")
    data = json.loads(as_json.out)
    assert as_json.err == ""
    for section, keys in KEYS.items():
        assert keys <= set(data[section] or keys), section
    method = next(m for m in data["methods"] if m["name"] == "dfloat11")
    assert {"name", "bytes", "ratio", "bits_per_weight", "lossless", "fits"} <= set(method)
    quiet = tcw("profile", tiny_llama, "--device", "cpu", "--no-latency", "-q")
    assert (quiet.out, quiet.err) == (f"{data['weights']['bytes']}\n", "")
    refused = tcw("profile", tiny_llama, "--html", report)
    assert (refused.code, refused.out) == (2, "")


def row(name: str, size: int, lossless: bool = True, fits: bool = True) -> dict[str, Any]:
    return {
        "name": name, "bytes": size, "ratio": size / 269e6, "bits_per_weight": 16 * size / 269e6, "lossless": lossless,
        "fits": fits, "needs_bytes": 2 * size, "max_context": 8192,
    }  # fmt: skip


def facts(**latency: Any) -> dict[str, Any]:
    return {
        "model": "org/name", "architecture": "LlamaForCausalLM",
        "device": {"name": "Some CPU", "memory_bytes": 25_300_000_000, "free_bytes": 23_100_000_000,
                   "bandwidth_gbps": 16.2},
        "weights": {"parameters": 134_500_000, "bytes": 269_000_000, "by_dtype": {"BF16": 269_000_000},
                    "by_part": {"mlp": {"tensors": 90, "parameters": 134_500_000, "bytes": 269_000_000}},
                    "exponent_entropy_bits": 2.61},
        "kv": {"bytes_per_token": 23_040, "bytes": 94_371_840},
    "tokens": {"policies": [], "policies_skipped": {}},
        "latency": {"prefill_ms": None, "decode_ms_per_token": None, **latency},
        "context": {"tokens": 4096, "batch": 1},
        "original": row("original", 269_000_000),
        "methods": [row("int2", 40_000_000, lossless=False), row("dfloat11", 180_700_000, fits=False)],
    }  # fmt: skip


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, Any]], list[dict[str, Any]]]:
    """Make profile() give these facts without looking; returns the list of its calls."""

    def give(data: dict[str, Any]) -> list[dict[str, Any]]:
        calls: list[dict[str, Any]] = []

        def profile(source: Any, **options: Any) -> Any:
            calls.append(options)
            return SimpleNamespace(to_json=lambda: data)

        monkeypatch.setattr("tcw.source.open_source", lambda text, progress: text)
        monkeypatch.setattr("tcw.profile.profile", profile)
        return calls

    return give


def test_tables(tcw: Run, fake: Any) -> None:
    fake(facts(prefill_ms=151.2, decode_ms_per_token=53.61, prompt_tokens=128))
    ran = tcw("profile", "org/name")
    assert ran.out.splitlines() == [
        "model      org/name, LlamaForCausalLM",
        "device     Some CPU, copies 16.2 GB/s",
        "memory     25.3 GB, 23.1 GB free",
        "weights    134.5 M parameters, 269.0 MB (BF16 269.0 MB)",
        "exponents  2.61 bits of entropy",
        "KV cache   23.0 kB a token, 94.4 MB at 4,096 tokens",
        "latency    prefill 151 ms for 128 tokens, then 53.6 ms a token",
        "",
        "part  tensors  parameters     bytes    share",
        "mlp        90     134.5 M  269.0 MB  100.0 %",
        "",
        "method       bytes   of now  bits/weight  lossless     needs  fits  context",
        "original  269.0 MB  100.0 %        16.00  yes       538.0 MB  yes     8,192",
        "int2       40.0 MB   14.9 %         2.38  no         80.0 MB  yes     8,192",
        "dfloat11  180.7 MB   67.2 %        10.75  yes       361.4 MB  no      8,192",
        "",
        "needs: memory to run with 4,096 tokens; context: the most tokens that fit here",
    ]
    # the hint is about what costs nothing, not about what is smallest
    assert ran.err == "\nhint: `tcw compress org/name --method dfloat11` would make about 180.7 MB\n"


@pytest.mark.parametrize(
    ("latency", "said"),
    [
        ({"skipped": "the model does not fit"}, "not measured: the model does not fit"),
        ({"forward_ms": 12.3}, "12 ms a pass"),
        ({"prefill_ms": 3.0}, "prefill 3 ms"),
        ({"prefill_ms": 3.0, "decode_ms_per_token": 2.0, "decode_bound_ms": 1.5}, "(memory alone takes 1.5 ms)"),
    ],
)
def test_latency(latency: dict[str, Any], said: str, tcw: Run, fake: Any) -> None:
    fake(facts(**latency))
    assert said in " ".join(tcw("profile", "x").out.split())


def test_options_reach_the_work(tcw: Run, fake: Any) -> None:
    calls = fake(facts())
    tcw("profile", "x", "-m", "dfloat11", "-m", "dfloat11:min_saving=0.1", "--context", 99, "--batch", 2,
        "--no-latency", "--device", "cpu")  # fmt: skip
    del calls[0]["progress"]
    assert calls == [
        {"specs": ["dfloat11", "dfloat11:min_saving=0.1"], "device": "cpu", "context": 99, "batch": 2, "latency": False}
    ]
