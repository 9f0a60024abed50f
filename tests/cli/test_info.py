"""`tcw info`: every format, from headers alone; what is damaged is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tcw import source

Run = Callable[..., Any]
KEYS = {"schema", "id", "format", "version", "methods", "bytes", "tensors", "parameters", "model_type", "verdict"}


def test_artifact_in_all_modes(tcw: Run, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "small"
    assert tcw("compress", tiny_llama, "--recipe", "lossless", "-o", target, "-q").code == 0
    assert tcw("verify", target, "-q").code == 0
    monkeypatch.setattr(source.Source, "read", lambda *_: pytest.fail("a tensor was read"))
    human, quiet, as_json = (tcw("info", target, *mode) for mode in ([], ["-q"], ["--json"]))
    assert (human.code, quiet.code, as_json.code) == (0, 0, 0)
    assert human.err == quiet.err == as_json.err == ""
    assert quiet.out == "tcw\n"
    data = json.loads(as_json.out)
    assert set(data) >= KEYS
    assert (data["format"], data["version"], data["methods"]) == ("tcw", "1.3", ["dfloat11"])
    assert (data["model_type"], data["verdict"], data["source"]) == ("llama", "identical", "tiny-llama")
    assert 0 < data["bytes"]["stored"] < data["bytes"]["original"]
    assert data["bytes"]["original"] == sum(data["bytes"]["by_dtype"].values()) == 2 * data["parameters"]
    tensor = next(t for t in data["tensors"] if t["name"] == "lm_head.weight")
    assert tensor["shape"] == [256, 64]
    assert (tensor["dtype"], tensor["method"], tensor["bytes"]) == ("BF16", "dfloat11", 2 * 256 * 64)
    lines = human.out.splitlines()
    assert lines[1].split() == ["format", "tcw", "1.3"]
    header = next(i for i, line in enumerate(lines) if line.startswith("part "))
    assert lines[header].split() == ["part", "dtype", "method", "tensors", "parameters", "bytes", "stored"]
    assert {line.split()[0] for line in lines[header + 1 :]} == {"embedding", "attention", "mlp", "norm", "head"}
    everything = tcw("info", target, "--tensors").out
    assert all(t["name"] in everything for t in data["tensors"])
    assert "256x64" in everything


def test_folder_and_file(tcw: Run, tiny_llama: Path) -> None:
    folder = json.loads(tcw("info", tiny_llama, "--json").out)
    file = json.loads(tcw("info", tiny_llama / "model.safetensors", "--json").out)
    assert (folder["format"], file["format"]) == ("huggingface", "safetensors")
    assert folder["bytes"] == file["bytes"]
    assert folder["methods"] == []
    assert [t["name"] for t in folder["tensors"]] == [t["name"] for t in file["tensors"]]


@pytest.fixture
def gguf_file(tmp_path: Path) -> Path:
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(1)
    writer.add_tensor("token_embd.weight", np.zeros((8, 64), np.float32))
    quantised = gguf.quants.quantize(np.ones((4, 64), np.float32), gguf.GGMLQuantizationType.Q4_0)
    writer.add_tensor("blk.0.ffn_up.weight", quantised, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf_is_not_converted(tcw: Run, gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TCW_CACHE", str(tmp_path / "cache"))
    data = json.loads(tcw("info", gguf_file, "--json").out)
    assert (data["format"], data["version"], data["model_type"]) == ("gguf", "3", "llama")
    assert data["methods"] == ["Q4_0"]
    shapes = {t["name"]: (t["dtype"], t["shape"], t["bytes"]) for t in data["tensors"]}
    assert shapes["token_embd.weight"] == ("F32", [8, 64], 2048)
    assert shapes["blk.0.ffn_up.weight"] == ("Q4_0", [4, 64], 4 * 64 // 32 * 18)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("damage", ["truncated", "noise", "empty", "magic only", "huge counts"])
def test_a_damaged_gguf_is_refused(damage: str, tcw: Run, gguf_file: Path) -> None:
    good = gguf_file.read_bytes()
    gguf_file.write_bytes(
        {
            "truncated": good[: len(good) // 3], "noise": b"\x5a" * 4096, "empty": b"", "magic only": good[:8],
            "huge counts": good[:8] + b"\xff" * 16 + good[24:],
        }[damage]
    )  # fmt: skip
    ran = tcw("info", gguf_file)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("error: `model.gguf` ")


def test_damaged_safetensors_and_nothing(tcw: Run, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"\xff" * 32)
    for path in (file, tmp_path / "none", tmp_path):
        ran = tcw("info", path)
        assert (ran.code, ran.out) == (2, "")
        assert "internal" not in ran.err


def test_official_dfloat11_folder(tcw: Run, tiny_llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "df11"
    ran = tcw("export", tiny_llama, "--to", "dfloat11", "-o", folder, "-q")
    assert ran.code == 0, ran.err
    data = json.loads(tcw("info", folder, "--json").out)
    assert (data["format"], data["version"], data["methods"]) == ("dfloat11", "0.5.0", ["dfloat11"])
    plain = json.loads(tcw("info", tiny_llama, "--json").out)
    assert data["parameters"] == plain["parameters"]
    assert data["bytes"]["original"] == plain["bytes"]["original"]
    stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    # what the groups take is spread over their matrices; headers are not tensors
    assert 0.8 * stored < data["bytes"]["stored"] <= stored
    methods = {t["name"]: t["method"] for t in data["tensors"]}
    assert methods["model.layers.0.mlp.up_proj.weight"] == "dfloat11"
    assert methods["model.norm.weight"] == "raw"
