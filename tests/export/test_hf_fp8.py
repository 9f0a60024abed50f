"""`--to hf-fp8`: transformers decodes it to the weights that tcw decodes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tcw import export as exporting
from tcw.artifact import Artifact
from tcw.errors import UsageError
from tcw.source import open_source

Small = Callable[..., Artifact]


def loaded(folder: Path) -> dict[str, np.ndarray]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    state = {n: p for n, p in model.state_dict().items() if n.endswith(".weight")}
    return {n: p.contiguous().view(torch.int16).numpy().view(np.uint16) for n, p in state.items()}


def assert_same(folder: Path, artifact: Artifact) -> None:
    found = loaded(folder)
    wrong = [n for n in artifact.tensors() if not np.array_equal(found[n].reshape(-1), artifact.read(n).words)]
    assert wrong == []


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize(("spec", "model"), [
    ("fp8:scale=block", "wide_llama"), ("fp8:scale=tensor", "wide_llama"), ("fp8:scale=tensor", "tiny_llama"),
    ("fp8:scale=block,entropy=on", "wide_llama"),
])  # fmt: skip
def test_it_loads_as_we_decode_it(
    spec: str, model: str, small: Small, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    artifact = small(request.getfixturevalue(model), spec, "dfloat11")
    exporting.export(artifact, "hf-fp8", tmp_path / "out")
    assert_same(tmp_path / "out", artifact)
    assert config_of(tmp_path / "out") == {
        "quant_method": "fp8", "activation_scheme": "dynamic", "modules_to_not_convert": ["lm_head"],
        "weight_block_size": [128, 128] if "block" in spec else None,
    }  # fmt: skip
    stored, name = open_source(tmp_path / "out"), "model.layers.0.mlp.up_proj.weight"
    assert stored.tensors()[name].dtype == "F8_E4M3"
    scale = stored.tensors()[f"{name}_scale_inv"]
    assert (scale.dtype, scale.shape) == ("F32", (3, 2) if "block" in spec else ())


def test_codes_go_out_as_they_are(small: Small, wide_llama: Path, tmp_path: Path) -> None:
    artifact = small(wide_llama, "fp8:scale=block")
    exporting.export(artifact, "hf-fp8", tmp_path / "out")
    out = open_source(tmp_path / "out")
    for name in (n for n in artifact.tensors() if "_proj" in n):
        assert out.read(name).data.tobytes() == artifact.encoded(name).parts["codes"].tobytes()


def test_what_128_does_not_divide_is_plain(small: Small, tiny_llama: Path, tmp_path: Path) -> None:
    """Transformers would take 160 rows in two blocks for blocks of 80."""
    with pytest.raises(UsageError, match=r"do not divide 64 x 64 .*scale=tensor"):
        exporting.export(small(tiny_llama, "fp8:scale=block"), "hf-fp8", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_one_scheme_a_model(by_hand: Callable[..., Any], wide_llama: Path, tmp_path: Path) -> None:
    artifact, _ = by_hand(
        wide_llama,
        lambda i: ("fp8", {"scale": "tensor" if "q_proj" in i.name else "block"}) if "_proj" in i.name else None,
    )
    report = exporting.export(artifact, "hf-fp8", tmp_path / "out")
    plain = [f"model.layers.{k}.self_attn.q_proj" for k in (0, 1)]
    assert set(report.kept) == {f"{module}.weight" for module in plain}
    assert set(config_of(tmp_path / "out")["modules_to_not_convert"]) == {*plain, "lm_head"}
    assert_same(tmp_path / "out", artifact)


def test_static_activations(by_hand: Callable[..., Any], wide_llama: Path, tmp_path: Path) -> None:
    how = {"scale": "block", "activation": "static"}
    artifact, _ = by_hand(wide_llama, lambda i: ("fp8", how) if "_proj" in i.name else None)
    exporting.export(artifact, "hf-fp8", tmp_path / "out")
    assert config_of(tmp_path / "out")["activation_scheme"] == "static"
    scale = open_source(tmp_path / "out").read("model.layers.0.mlp.up_proj.activation_scale")
    assert (scale.info.shape, scale.floats().item()) == ((), 3.5 / 448)
    assert_same(tmp_path / "out", artifact)


@pytest.mark.parametrize(("spec", "why"), [
    ("fp8", "scale=block"), ("fp8:scale=tensor,activation=none", "activation=dynamic"), ("dfloat11", "dfloat11"),
])  # fmt: skip
def test_what_the_format_cannot_say_is_refused(
    spec: str, why: str, small: Small, wide_llama: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=why) as caught:
        exporting.export(small(wide_llama, spec), "hf-fp8", tmp_path / "out")
    assert caught.value.hint
    with pytest.raises(UsageError, match="quantised model"):
        exporting.export(open_source(wide_llama), "hf-fp8", tmp_path / "out")
