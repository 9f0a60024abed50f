"""`--to hf`: byte-identical tensors that transformers and safetensors load, whatever the source was."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from tcw import export as exporting
from tcw import pipeline, recipe
from tcw.errors import UsageError
from tcw.export._shards import split
from tcw.source import open_source
from tcw.tensor import TensorInfo


def test_plain_models_are_copied_exactly(tiny_llama: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    exporting.export(open_source(tiny_llama), "hf", tmp_path / "out")
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tiny_llama / name).read_bytes()
    theirs, ours = (AutoModelForCausalLM.from_pretrained(p) for p in (tiny_llama, tmp_path / "out"))
    expected, found = theirs.state_dict(), ours.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[n].view(torch.int16), found[n].view(torch.int16)) for n in expected)
    text = "a plain text"
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "out")(text).input_ids
        == AutoTokenizer.from_pretrained(tiny_llama)(text).input_ids
    )


def test_an_artifact_becomes_what_it_was(tiny_llama: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    pipeline.compress(open_source(tiny_llama), recipe.from_specs(["dfloat11"]), tmp_path / "small")
    exporting.export(open_source(tmp_path / "small"), "hf", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads(
        (tiny_llama / "config.json").read_text()
    )
    assert not (tmp_path / "out" / "tcw.json").exists()
    source, back = open_source(tiny_llama), open_source(tmp_path / "out")
    assert back.kind == "folder"
    assert list(back.tensors()) == list(source.tensors())
    assert all(back.read(n).data.tobytes() == source.read(n).data.tobytes() for n in source.tensors())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == torch.bfloat16
    assert getattr(loaded.config, "quantization_config", None) is None


def test_shards_have_an_index_that_transformers_reads(tiny_llama: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    source = open_source(tiny_llama)
    report = exporting.export(source, "hf:shard_gb=0.0001", tmp_path / "out")
    shards = [f.name for f in report.files if f.suffix == ".safetensors"]
    assert len(shards) > 1
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(i.nbytes for i in source.tensors().values())
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "out" / file, "pt") as opened:
            assert name in opened.keys()  # noqa: SIM118  it is no dict
    assert set(index["weight_map"]) == set(source.tensors())
    assert open_source(tmp_path / "out").tensors() == source.tensors()
    expected, found = (AutoModelForCausalLM.from_pretrained(p).state_dict() for p in (tiny_llama, tmp_path / "out"))
    assert all(torch.equal(expected[n].view(torch.int16), found[n].view(torch.int16)) for n in expected)


def test_sharding_again_removes_the_old_index(tiny_llama: Path, tmp_path: Path) -> None:
    exporting.export(open_source(tiny_llama), "hf:shard_gb=0.0001", tmp_path / "many")
    report = exporting.export(open_source(tmp_path / "many"), "hf", tmp_path / "one")
    assert {f.name for f in report.files if "safetensors" in f.name} == {"model.safetensors"}


@pytest.mark.parametrize(("sizes", "limit", "expected"), [
    ([], 10, [[]]),
    ([4, 4, 4], 8, [[4, 4], [4]]),
    ([20], 8, [[20]]),
    ([1, 20, 1], 8, [[1], [20], [1]]),
    ([8, 0, 8], 8, [[8, 0], [8]]),
])  # fmt: skip
def test_splitting(sizes: list[int], limit: int, expected: list[list[int]]) -> None:
    infos = [TensorInfo(str(k), "U8", (size,)) for k, size in enumerate(sizes)]
    shards = split(infos, limit)
    assert [[i.nbytes for i in shard] for shard in shards] == expected
    assert [i for shard in shards for i in shard] == infos


def test_any_dtype_and_shape(tmp_path: Path) -> None:
    """Bit patterns that no float survives, no dimension, no element, and subfolders of sentence-transformers."""
    from safetensors.numpy import save_file

    folder = tmp_path / "m"
    (folder / "1_Pooling").mkdir(parents=True)
    (folder / "1_Pooling" / "config.json").write_text('{"a":   1}')
    (folder / "config.json").write_bytes(b'{"x":1}\r\n')
    nan = np.array([0x7FC00001, 0xFFA00001, 0x80000000], np.uint32).view(np.float32)
    save_file(
        {"nan": nan, "scalar": np.array(3, np.int8), "none": np.zeros((3, 0)), "yes": np.array([True])},
        folder / "model.safetensors",
    )
    exporting.export(open_source(folder), "hf", tmp_path / "out")
    before, after = open_source(folder), open_source(tmp_path / "out")
    assert before.tensors() == after.tensors()
    assert all(before.read(n).data.tobytes() == after.read(n).data.tobytes() for n in before.tensors())
    assert (tmp_path / "out" / "config.json").read_bytes() == b'{"x":1}\r\n'
    assert (tmp_path / "out" / "1_Pooling" / "config.json").read_text() == '{"a":   1}'


@pytest.mark.parametrize("size", ["0", "-1", "nan", "inf"])
def test_impossible_shard_sizes(size: str, tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="must be a size above 0"):
        exporting.export(open_source(tiny_llama), f"hf:shard_gb={size}", tmp_path / "out")
    assert not list(tmp_path.iterdir())
