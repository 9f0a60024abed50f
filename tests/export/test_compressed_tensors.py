"""`--to compressed-tensors`: what transformers and compressed-tensors make of it is what tcw decodes, bit for bit."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tcw import export as exporting
from tcw.artifact import Artifact
from tcw.errors import FormatError, SourceError, UsageError
from tcw.source import open_source
from tcw.tensor import TensorInfo

TARGET = "compressed-tensors"
pytestmark = pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
Small = Callable[..., Artifact]
ByHand = Callable[..., tuple[Artifact, dict[str, np.ndarray]]]


def decoded(artifact: Artifact) -> dict[str, np.ndarray]:
    return {name: artifact.read(name).words for name in artifact.tensors()}


def loaded(folder: Path, *, dequantize: bool) -> dict[str, np.ndarray]:
    """The weights that transformers computes with; without `dequantize` those that a first pass leaves in the model."""
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    options = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if dequantize else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **options)
    if not dequantize:
        with torch.no_grad():
            model(torch.arange(8)[None])
    kind = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
    state = {n: p for n, p in model.state_dict().items() if p.dtype in kind and not n.endswith("_scale")}
    return {n: p.contiguous().view(kind[p.dtype]).numpy().view(f"u{p.element_size()}") for n, p in state.items()}


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert set(expected) <= set(found)
    wrong = [n for n, words in expected.items() if not np.array_equal(found[n].reshape(-1), words)]
    assert wrong == []


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def is_linear(info: TensorInfo) -> bool:
    return "_proj" in info.name


# ---- FP8


@pytest.mark.parametrize("spec", [
    "fp8", "fp8:entropy=on", "fp8:scale=tensor", "fp8:scale=block", "fp8:activation=none",
    "fp8:scale=block,activation=none",
])  # fmt: skip
@pytest.mark.parametrize("model", ["tiny_llama", "wide_llama"])
def test_fp8_loads_as_we_decode_it(
    spec: str, model: str, small: Small, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    artifact = small(request.getfixturevalue(model), spec, "dfloat11")
    report = exporting.export(artifact, TARGET, tmp_path / "out")
    assert_same(loaded(tmp_path / "out", dequantize=True), decoded(artifact))
    assert_same(loaded(tmp_path / "out", dequantize=False), decoded(artifact))
    config = config_of(tmp_path / "out")
    assert config["format"] == "float-quantized"
    assert config["ignore"] == ["lm_head"]
    assert set(report.kept) == {n for n in artifact.tensors() if artifact.entry(n).method == "dfloat11"}
    stored = open_source(tmp_path / "out").tensors()
    assert stored["model.layers.0.mlp.up_proj.weight"].dtype == "F8_E4M3"
    assert stored["model.layers.0.mlp.up_proj.weight_scale"].dtype == ("F32" if "block" in spec else "BF16")


def test_fp8_codes_and_scales_go_out_as_they_are(small: Small, tiny_llama: Path, tmp_path: Path) -> None:
    artifact = small(tiny_llama, "fp8")
    exporting.export(artifact, TARGET, tmp_path / "out")
    out = open_source(tmp_path / "out")
    for name in (n for n in artifact.tensors() if "_proj" in n):
        parts = artifact.encoded(name).parts
        assert out.read(name).data.tobytes() == parts["codes"].tobytes()
        assert out.read(f"{name}_scale").data.tobytes() == parts["scale"].tobytes()


def test_static_activations(by_hand: ByHand, tiny_llama: Path, tmp_path: Path) -> None:
    how = {"scale": "tensor", "activation": "static"}
    artifact, expected = by_hand(tiny_llama, lambda i: ("fp8", how) if is_linear(i) else None)
    exporting.export(artifact, TARGET, tmp_path / "out")
    for dequantize in (True, False):
        assert_same(loaded(tmp_path / "out", dequantize=dequantize), expected)
    scale = open_source(tmp_path / "out").read("model.layers.0.mlp.up_proj.input_scale")
    assert scale.floats().tolist() == [3.5 / 448]
    inputs = config_of(tmp_path / "out")["config_groups"]["group_0"]["input_activations"]
    assert (inputs["strategy"], inputs["dynamic"]) == ("tensor", False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_dtypes(dtype: torch.dtype, tiny_llama: Path, small: Small, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=dtype).save_pretrained(tmp_path / "model")
    for spec in ("fp8", "fp8:scale=block"):
        artifact = small(tmp_path / "model", spec)
        exporting.export(artifact, TARGET, tmp_path / f"out-{len(spec)}")
        assert_same(loaded(tmp_path / f"out-{len(spec)}", dequantize=True), decoded(artifact))


# ---- integers


def integer_params(bits: int, grid: str, group: int) -> dict[str, Any]:
    return {"bits": bits, "group_size": group, "grid": grid, "scale": "BF16"}


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("grid", ["symmetric", "zero"])
@pytest.mark.parametrize("group", [32, 0])
def test_integers_load_as_the_formula_says(
    bits: int, grid: str, group: int, by_hand: ByHand, tiny_llama: Path, tmp_path: Path
) -> None:
    params = integer_params(bits, grid, group)
    artifact, expected = by_hand(tiny_llama, lambda info: ("mixed", params) if is_linear(info) else None)
    report = exporting.export(artifact, TARGET, tmp_path / "out")
    assert report.kept == {}
    assert_same(loaded(tmp_path / "out", dequantize=True), expected)
    if grid == "symmetric":  # transformers cannot load zero points unless it decodes at once
        assert_same(loaded(tmp_path / "out", dequantize=False), expected)
    weights = config_of(tmp_path / "out")["config_groups"]["group_0"]["weights"]
    assert (weights["num_bits"], weights["symmetric"]) == (bits, grid == "symmetric")
    assert weights["strategy"] == ("group" if group else "channel")


@pytest.mark.parametrize("spec", [
    "int8:algo=rtn", "int8:algo=rtn,grid=zero", "int4:algo=rtn,group_size=32", "int4:algo=rtn,group_size=32,grid=zero",
    "int2:algo=rtn,grid=zero,group_size=16,rotate=off", "mixed:algo=rtn,bits=3.6,group_size=32,targets=linear",
])  # fmt: skip
def test_what_the_methods_make(spec: str, small: Small, tiny_llama: Path, tmp_path: Path) -> None:
    artifact = small(tiny_llama, spec, "dfloat11")
    exporting.export(artifact, TARGET, tmp_path / "out")
    assert_same(loaded(tmp_path / "out", dequantize=True), decoded(artifact))
    assert open_source(tmp_path / "out").tensors()["model.layers.0.mlp.up_proj.weight_packed"].dtype == "I32"


@pytest.mark.parametrize("grid", ["symmetric", "zero"])
def test_several_groups(grid: str, by_hand: ByHand, tiny_llama: Path, tmp_path: Path) -> None:
    """Mixed bits, read by compressed-tensors' own converter, which goes by the groups' targets."""
    from compressed_tensors.entrypoints.convert import CompressedTensorsDequantizer
    from safetensors.torch import load_file

    bits = {"q_proj": 8, "down_proj": 3, "lm_head": 8}

    def choose(info: TensorInfo) -> tuple[str, dict[str, Any]] | None:
        if not is_linear(info) and "lm_head" not in info.name:
            return None
        return "mixed", integer_params(next((b for n, b in bits.items() if n in info.name), 4), grid, 32)

    artifact, expected = by_hand(tiny_llama, choose)
    exporting.export(artifact, TARGET, tmp_path / "out")
    config = config_of(tmp_path / "out")
    groups = config["config_groups"]
    assert [g["weights"]["num_bits"] for g in groups.values()] == [4, 8, 3]
    assert (config["format"], config["ignore"]) == ("pack-quantized", [])
    assert groups["group_2"]["targets"] == [f"model.layers.{k}.mlp.down_proj" for k in (0, 1)]
    assert "lm_head" in groups["group_1"]["targets"]
    converter = CompressedTensorsDequantizer(str(tmp_path / "out"), dtype=torch.bfloat16)
    plain = converter.validate(load_file(tmp_path / "out" / "model.safetensors"))
    assert_same({n: p.contiguous().view(torch.int16).numpy().view(np.uint16) for n, p in plain.items()}, expected)
    if grid == "symmetric":
        assert_same(loaded(tmp_path / "out", dequantize=False), expected)


def test_both_formats(by_hand: ByHand, tiny_llama: Path, tmp_path: Path) -> None:
    """A model with FP8 attention, packed integers in the MLP, and one layer that stays as it is."""

    def choose(info: TensorInfo) -> tuple[str, dict[str, Any]] | None:
        if "0.mlp.up_proj" in info.name or not is_linear(info):
            return None
        return ("mixed", integer_params(4, "symmetric", 32)) if "mlp" in info.name else ("fp8", {"scale": "tensor"})

    artifact, expected = by_hand(tiny_llama, choose)
    exporting.export(artifact, TARGET, tmp_path / "out")
    config = config_of(tmp_path / "out")
    assert config["format"] == "mixed-precision"
    assert {g["format"] for g in config["config_groups"].values()} == {"float-quantized", "pack-quantized"}
    assert config["ignore"] == ["model.layers.0.mlp.up_proj", "lm_head"]
    assert_same(loaded(tmp_path / "out", dequantize=False), expected)


# ---- what the format cannot say


@pytest.mark.parametrize(("params", "why"), [
    (integer_params(2, "midrise", 32), "no integer zero"),
    (integer_params(4, "symmetric", 48), "do not divide"),
])  # fmt: skip
def test_the_rest_is_written_plain(
    params: dict[str, Any], why: str, by_hand: ByHand, tiny_llama: Path, tmp_path: Path
) -> None:
    good = integer_params(4, "symmetric", 32)
    artifact, expected = by_hand(
        tiny_llama, lambda i: ("mixed", params if "q_proj" in i.name else good) if is_linear(i) else None
    )
    report = exporting.export(artifact, TARGET, tmp_path / "out")
    assert set(report.kept) == {f"model.layers.{k}.self_attn.q_proj.weight" for k in (0, 1)}
    assert all(why in reason for reason in report.kept.values())
    assert config_of(tmp_path / "out")["ignore"] == [
        "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "lm_head",
    ]  # fmt: skip
    assert_same(loaded(tmp_path / "out", dequantize=True), expected)


def test_embeddings_are_written_plain(small: Small, wide_llama: Path, tmp_path: Path) -> None:
    artifact = small(wide_llama, "fp8:targets=all")
    report = exporting.export(artifact, TARGET, tmp_path / "out")
    assert list(report.kept) == ["model.embed_tokens.weight"]
    assert_same(loaded(tmp_path / "out", dequantize=True), decoded(artifact))


@pytest.mark.parametrize("spec", ["fp8", "int4:algo=rtn,group_size=32"])
def test_experts(spec: str, small: Small, tmp_path: Path) -> None:
    """Transformers stacks the experts; the model with our plain weights is the same to the bit."""
    from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    torch.manual_seed(0)
    MixtralForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "moe")
    artifact = small(tmp_path / "moe", spec)
    assert any(".experts.3." in n and artifact.entry(n).method != "raw" for n in artifact.tensors())
    for target in (TARGET, "hf"):
        exporting.export(artifact, target, tmp_path / target)
    assert config_of(tmp_path / TARGET)["ignore"] == ["lm_head", "model.layers.0.block_sparse_moe.gate"]
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto").state_dict()
    expected = {n: p.view(torch.int16).numpy().view(np.uint16).reshape(-1) for n, p in plain.items()}
    found = loaded(tmp_path / TARGET, dequantize=True)
    assert sum(".experts." in n for n in found) == 2
    assert_same(found, expected)


def test_nothing_that_fits(small: Small, by_hand: ByHand, tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="quantised model") as caught:
        exporting.export(open_source(tiny_llama), TARGET, tmp_path / "out")
    assert "tcw compress" in caught.value.hint
    with pytest.raises(UsageError, match="dfloat11") as caught:
        exporting.export(small(tiny_llama, "dfloat11"), TARGET, tmp_path / "out")
    assert caught.value.hint
    midrise = integer_params(2, "midrise", 32)
    artifact, _ = by_hand(tiny_llama, lambda info: ("mixed", midrise) if is_linear(info) else None)
    with pytest.raises(UsageError, match="grid=zero"):
        exporting.export(artifact, TARGET, tmp_path / "out")
    artifact = small(tiny_llama, "fp8")
    (artifact.path / "config.json").write_text('{"model_type": "nonsense"}')
    with pytest.raises(SourceError, match="nonsense") as caught:
        exporting.export(artifact, TARGET, tmp_path / "out")
    assert "architecture of transformers" in caught.value.hint
    assert not (tmp_path / "out").exists()


# ---- the cache of keys and values, and files


def with_scales(artifact: Artifact, scales: Any) -> Artifact:
    artifact.manifest["kv_scales"] = scales
    return artifact


@pytest.mark.parametrize("dtype", ["fp8", "int8"])
def test_scales_of_keys_and_values(dtype: str, small: Small, tiny_llama: Path, tmp_path: Path) -> None:
    layers = {"0": {"k": 0.25, "v": 0.5}, "1": {"k": 1.5, "v": 2.5}}
    artifact = with_scales(small(tiny_llama, "fp8"), {"dtype": dtype, "layers": layers})
    exporting.export(artifact, TARGET, tmp_path / "out")
    out = open_source(tmp_path / "out")
    for layer, pair in layers.items():
        for which, value in pair.items():
            assert out.read(f"model.layers.{layer}.self_attn.{which}_scale").floats().tolist() == [value]
    scheme = config_of(tmp_path / "out")["kv_cache_scheme"]
    assert (scheme["type"], scheme["num_bits"], scheme["dynamic"]) == ({"fp8": "float", "int8": "int"}[dtype], 8, False)
    for dequantize in (True, False):
        assert_same(loaded(tmp_path / "out", dequantize=dequantize), decoded(artifact))


@pytest.mark.parametrize("scales", [
    {}, {"dtype": "fp4", "layers": {}}, {"dtype": "fp8", "layers": {"0": {"k": 1.0}}}, 7,
    {"dtype": "fp8", "layers": {"0": {"k": 1.0, "v": -1.0}}}, {"dtype": "fp8", "layers": {"9": {"k": 1.0, "v": 1.0}}},
])  # fmt: skip
def test_scales_that_are_none_are_refused(scales: Any, small: Small, tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="keys and values"):
        exporting.export(with_scales(small(tiny_llama, "fp8"), scales), TARGET, tmp_path / "out")


def test_shards(small: Small, tiny_llama: Path, tmp_path: Path) -> None:
    artifact = small(tiny_llama, "fp8")
    report = exporting.export(artifact, f"{TARGET}:shard_gb=0.00005", tmp_path / "out")
    assert sum(f.suffix == ".safetensors" for f in report.files) > 2
    assert_same(loaded(tmp_path / "out", dequantize=True), decoded(artifact))
    for size in ("0", "nan"):
        with pytest.raises(UsageError, match="shard_gb"):
            exporting.export(artifact, f"{TARGET}:shard_gb={size}", tmp_path / "other")
