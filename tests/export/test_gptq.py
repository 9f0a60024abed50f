"""`--to gptq`: codes, zeros and scales, read back by an unpacker written from the description of the layout."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tcw import export as exporting
from tcw.artifact import Artifact
from tcw.errors import FormatError, UsageError
from tcw.source import open_source
from tcw.tensor import TensorInfo

ByHand = Callable[..., tuple[Artifact, dict[str, np.ndarray]]]


def unpack(words: np.ndarray, bits: int) -> np.ndarray:
    """Codes [n, columns] out of int32 [n * bits / 32, columns], as AutoGPTQ packs them.

    2, 4 and 8 bits: 32 / bits codes a word, the first in the lowest bits. 3 bits: of 32 codes, numbers 0-9 fill 30 bits
    of the first word; 10 has its 2 low bits above them and its high bit at the bottom of the second word; 11-20 follow
    there from bit 1; 21 has its low bit at bit 31 and its 2 high bits at the bottom of the third; 22-31 follow from
    bit 2.
    """
    words = words.view(np.uint32).astype(np.int64)
    if bits != 3:
        each = 32 // bits
        codes = [(words[k] >> (bits * j)) & ((1 << bits) - 1) for k in range(len(words)) for j in range(each)]
        return np.array(codes)
    codes = []
    for a, b, c in words.reshape(-1, 3, words.shape[1]):
        codes += [(a >> (3 * j)) & 7 for j in range(10)]
        codes.append(((a >> 30) & 3) | ((b & 1) << 2))
        codes += [(b >> (3 * j + 1)) & 7 for j in range(10)]
        codes.append(((b >> 31) & 1) | ((c & 3) << 1))
        codes += [(c >> (3 * j + 2)) & 7 for j in range(10)]
    return np.array(codes)


def weights_of(folder: Path, module: str, bits: int, layout: str) -> np.ndarray:
    """W [out, in] in float64: (q - z) s, with the group that g_idx gives each input."""
    source = open_source(folder)
    qweight, qzeros, g_idx = (
        source.read(f"{module}.{n}").data.view(np.int32).reshape(source.tensors()[f"{module}.{n}"].shape)
        for n in ("qweight", "qzeros", "g_idx")
    )
    scales = source.read(f"{module}.scales").floats().astype(np.float64)
    zeros = unpack(np.ascontiguousarray(qzeros.T), bits).T + (1 if layout == "gptq" else 0)
    return ((unpack(qweight, bits) - zeros[g_idx]) * scales[g_idx]).T


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def params(bits: int, grid: str, group: int, least: int = 1) -> dict[str, Any]:
    return {"bits": bits, "group_size": group, "grid": grid, "scale": "BF16", "least": least}


def is_linear(info: TensorInfo) -> bool:
    return "_proj" in info.name


def assert_same(folder: Path, expected: dict[str, np.ndarray], bits: dict[str, int], layout: str) -> None:
    """The products are exact in float64; rounded to BF16 they are the weights that the artifact stands for."""
    for module, width in bits.items():
        values = weights_of(folder, module, width, layout).astype(np.float32)
        words = values.reshape(-1).view(np.uint32)
        rounded = (words + 0x7FFF + ((words >> 16) & 1)) >> 16
        assert np.array_equal(rounded.astype(np.uint16), expected[f"{module}.weight"])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("grid", ["symmetric", "zero"])
@pytest.mark.parametrize("group", [32, 0])
@pytest.mark.parametrize("layout", ["gptq", "gptq_v2"])
def test_codes_zeros_and_scales(
    bits: int, grid: str, group: int, layout: str, by_hand: ByHand, tiny_llama: Path, tmp_path: Path
) -> None:
    artifact, expected = by_hand(tiny_llama, lambda i: ("mixed", params(bits, grid, group)) if is_linear(i) else None)
    report = exporting.export(artifact, f"gptq:layout={layout}", tmp_path / "out")
    assert report.kept == {}
    modules = [n.removesuffix(".weight") for n in expected if "_proj" in n]
    assert_same(tmp_path / "out", expected, dict.fromkeys(modules, bits), layout)
    config = config_of(tmp_path / "out")
    assert {k: config[k] for k in ("quant_method", "bits", "group_size", "sym", "desc_act", "checkpoint_format")} == {
        "quant_method": "gptq", "bits": bits, "group_size": group or -1, "sym": grid == "symmetric", "desc_act": False,
        "checkpoint_format": layout,
    }  # fmt: skip
    assert config["dynamic"] == {"-:^lm_head$": {}}
    shapes = {n: i for n, i in open_source(tmp_path / "out").tensors().items() if "0.mlp.down_proj" in n}
    groups = 160 // (group or 160)
    assert {n.rpartition(".")[2]: (i.dtype, i.shape) for n, i in shapes.items()} == {
        "qweight": ("I32", (160 * bits // 32, 64)), "qzeros": ("I32", (groups, 64 * bits // 32)),
        "scales": ("F16", (groups, 64)), "g_idx": ("I32", (160,)),
    }  # fmt: skip


def test_a_zero_of_zero_takes_the_second_layout(by_hand: ByHand, tiny_llama: Path, tmp_path: Path) -> None:
    how = params(4, "zero", 32, least=0)
    artifact, expected = by_hand(tiny_llama, lambda i: ("mixed", how) if is_linear(i) else None)
    exporting.export(artifact, "gptq", tmp_path / "out")
    assert config_of(tmp_path / "out")["checkpoint_format"] == "gptq_v2"
    modules = [n.removesuffix(".weight") for n in expected if "_proj" in n]
    assert_same(tmp_path / "out", expected, dict.fromkeys(modules, 4), "gptq_v2")
    with pytest.raises(UsageError, match="layout=gptq_v2"):
        exporting.export(artifact, "gptq:layout=gptq", tmp_path / "other")
    plain, _ = by_hand(tiny_llama, lambda i: ("mixed", params(4, "zero", 32)) if is_linear(i) else None)
    exporting.export(plain, "gptq", tmp_path / "first")
    assert config_of(tmp_path / "first")["checkpoint_format"] == "gptq"


def test_what_the_method_makes(tiny_llama: Path, small: Callable[..., Artifact], tmp_path: Path) -> None:
    artifact = small(tiny_llama, "int4:algo=rtn,group_size=32,grid=zero")
    exporting.export(artifact, "gptq", tmp_path / "out")
    expected = {n: artifact.read(n).words for n in artifact.tensors() if "_proj" in n}
    layout = config_of(tmp_path / "out")["checkpoint_format"]
    assert_same(tmp_path / "out", expected, {n.removesuffix(".weight"): 4 for n in expected}, layout)


def test_parts_that_lie_are_refused(by_hand: ByHand, tiny_llama: Path, tmp_path: Path) -> None:
    artifact, _ = by_hand(tiny_llama, lambda i: ("mixed", params(4, "zero", 32)) if is_linear(i) else None)
    name = "model.layers.0.mlp.up_proj.weight"
    for wrong in ({"group_size": 64}, {"bits": 8}, {"bits": True}, {"group_size": -1}, {"grid": "x"}, {"scale": "F16"}):
        entry = artifact.entries[name]
        artifact.entries[name] = dataclasses.replace(entry, params=entry.params | wrong)
        for target in ("gptq", "compressed-tensors"):
            with pytest.raises(FormatError, match=name):
                exporting.export(artifact, target, tmp_path / "out")
        artifact.entries[name] = entry
    assert not (tmp_path / "out").exists()


def test_several_bits(by_hand: ByHand, tiny_llama: Path, tmp_path: Path) -> None:
    def choose(info: TensorInfo) -> tuple[str, dict[str, Any]] | None:
        if "1.mlp.up_proj" in info.name or not is_linear(info):
            return None
        return "mixed", params(8 if "0.self_attn.v_proj" in info.name else 3, "symmetric", 32)

    artifact, expected = by_hand(tiny_llama, choose)
    exporting.export(artifact, "gptq", tmp_path / "out")
    config = config_of(tmp_path / "out")
    assert config["bits"] == 3
    assert config["dynamic"] == {
        r"-:^model\.layers\.1\.mlp\.up_proj$": {}, "-:^lm_head$": {},
        r"+:^model\.layers\.0\.self_attn\.v_proj$": {"bits": 8, "group_size": 32, "sym": True},
    }  # fmt: skip
    assert_same(
        tmp_path / "out", expected,
        {"model.layers.0.self_attn.v_proj": 8, "model.layers.0.self_attn.q_proj": 3}, "gptq",
    )  # fmt: skip


def test_scales_that_fp16_cannot_hold(by_hand: ByHand, tiny_llama: Path, tmp_path: Path) -> None:
    for largest in (1e-6, 1e6):  # among its subnormal numbers, and beyond its largest
        how = params(4, "symmetric", 32) | {"largest": largest}
        artifact, _ = by_hand(tiny_llama, lambda i, how=how: ("mixed", how) if is_linear(i) else None)
        with pytest.raises(UsageError, match="no FP16 numbers"):
            exporting.export(artifact, "gptq", tmp_path / "out")


def test_what_the_format_cannot_say(by_hand: ByHand, tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="quantised model"):
        exporting.export(open_source(tiny_llama), "gptq", tmp_path / "out")
    with pytest.raises(UsageError, match="`layout` cannot be `v3`"):
        exporting.export(open_source(tiny_llama), "gptq:layout=v3", tmp_path / "out")
    for how, why in {
        "midrise": (params(2, "midrise", 32), "no integer zero"), "bits": (params(5, "symmetric", 32), "5 bits"),
        "ragged": (params(4, "symmetric", 48), "do not divide"),
        "F32": (params(4, "symmetric", 32) | {"scale": "F32"}, "FP32"),
    }.values():  # fmt: skip
        artifact, _ = by_hand(tiny_llama, lambda i, how=how: ("mixed", how) if is_linear(i) else None)
        with pytest.raises(UsageError, match=why):
            exporting.export(artifact, "gptq", tmp_path / "out")
    artifact, _ = by_hand(tiny_llama, lambda i: ("fp8", {}) if is_linear(i) else None)
    with pytest.raises(UsageError, match="nothing like fp8"):
        exporting.export(artifact, "gptq", tmp_path / "out")
