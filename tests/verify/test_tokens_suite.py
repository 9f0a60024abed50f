import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tcw import recipe
from tcw.artifact import Artifact
from tcw.cli.verify import show
from tcw.errors import SourceError, UsageError
from tcw.pipeline import compress
from tcw.source import open_source
from tcw.verify import token_inputs, token_report, verify
from tcw.verify.html import render
from tests.tokens.models import TOWERS, VLMS

GATES = {"everything", "dropped", "cached", "batch", "sizes"}


@pytest.fixture(scope="module", autouse=True)
def few() -> Any:
    """Two samples with short answers are enough here."""
    from tcw.verify import token_damage

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_damage, "ANSWER", 6)
        yield


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "two.npy"
    np.save(path, np.stack([token_inputs.drawn(n)[:48, :64] for n in (0, 2)]))
    return path


def artifact(folder: Path, model: Any, *specs: str) -> Artifact:
    model.save_pretrained(folder / "source")
    compress(open_source(folder / "source"), recipe.from_specs(list(specs)), folder / "artifact")
    return Artifact.open(folder / "artifact")


@pytest.fixture(scope="module")
def divprune(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return artifact(tmp_path_factory.mktemp("vlm"), VLMS["llava"](), "divprune:keep=0.5")


@pytest.fixture(scope="module")
def shown(divprune: Artifact, pictures: Path) -> dict[str, Any]:
    limits = {"max_token_kl": 5.0, "max_token_flops": 0.9}
    return verify(divprune, suites=["tokens"], limits=limits, images=pictures, device="cpu").to_json()


def test_a_policy_is_measured_without_a_reference(shown: dict[str, Any]) -> None:
    assert shown["verdict"] == "equivalent"
    tokens = shown["tokens"]
    assert (tokens["kind"], tokens["kept"], tokens["visual"], tokens["samples"]) == ("images", 0.5, 36, 2)
    assert 0.5 < tokens["flops_ratio"] < 0.8
    assert tokens["kl"] > 0
    assert 0 <= tokens["top1"] <= 1
    nll = tokens["answer_nll"]
    assert nll["rise"] == nll["artifact"] - nll["reference"]
    assert tokens["methods"] == {"divprune": {"keep": 0.5, "positions": "keep"}}
    assert (tokens["pictures"], tokens["patch_cosine"]) == ("as given", None)
    assert {name: gate["ok"] for name, gate in tokens["gates"].items()} == dict.fromkeys(GATES, True)
    assert {limit["name"]: limit["ok"] for limit in shown["limits"]} == {"max_token_flops": True, "max_token_kl": True}
    json.dumps(shown, allow_nan=False)


def test_controls_do_the_same_work(shown: dict[str, Any]) -> None:
    tokens = shown["tokens"]
    assert set(tokens["controls"]) == {"random", "grid"}
    for control in tokens["controls"].values():
        assert control["flops_ratio"] == pytest.approx(tokens["flops_ratio"], abs=0.02)
        assert control["kl"] != tokens["kl"]


def test_without_a_limit_it_is_different(divprune: Artifact, pictures: Path) -> None:
    past = verify(divprune, limits={"min_token_top1": 1.0, "max_answer_nll_rise": 0.0}, images=pictures, device="cpu")
    assert past.verdict == "different"
    assert [limit.ok for limit in past.limits] == [False, False]
    only = verify(divprune, suites=["tokens"], limits={"max_token_flops": 0.9}, images=pictures, device="cpu")
    assert (only.verdict, only.failed) == ("different", {}), "little work is no likeness"


def test_with_a_reference_it_goes_without_saying(divprune: Artifact, pictures: Path) -> None:
    source = open_source(divprune.path.parent / "source")
    found = verify(divprune, source, limits={"max_token_kl": 5.0}, images=pictures, device="cpu").to_json()
    assert found["verdict"] == "equivalent"
    assert found["logits"]["bit_identical"], "the weights are judged with all tokens"
    assert "tokens" in found


def test_alone_it_is_skipped_and_said(divprune: Artifact) -> None:
    found = verify(divprune, device="cpu")
    assert found.verdict == "identical"
    assert "--suite tokens" in found.skipped["tokens"]


def test_a_gate_that_fails_is_different_whatever_the_limits(
    divprune: Artifact, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tcw.tokens import decoder, positions

    monkeypatch.setattr(decoder, "at_rows", lambda x, index: positions.at_rows(x, index).flip(-2))
    found = verify(divprune, suites=["tokens"], limits={"max_token_kl": 1e9}, images=pictures, device="cpu")
    assert found.verdict == "different"
    assert "tokens dropped" in found.failed


def test_the_page_and_the_terminal_show_it(
    divprune: Artifact, pictures: Path, shown: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    show(shown)
    said = capsys.readouterr().out
    assert "token exactness" in said
    assert "visual tokens kept, of 36" in said
    assert "even grid" in said
    page = render(verify(divprune, suites=["tokens"], limits={"max_token_kl": 5.0}, images=pictures, device="cpu"))
    assert "<h2>Token policy</h2>" in page
    assert "at most 5" in page
    assert "<h2>What was kept</h2>" in page
    assert page.count('class="cell dropped"') > 0, "patches that are gone are shown on the picture"
    assert "drawn" not in shown
    assert {row.limit for row in token_report.rows(shown["tokens"])} >= {"max_token_kl", "min_token_top1"}


def test_what_was_substituted_is_said(shown: dict[str, Any]) -> None:
    assert shown["tokens"]["notes"] == []
    said = token_report.gate_rows({**shown["tokens"], "notes": ["there is no class token"]})
    assert said[-1] == ("note", "there is no class token")


def test_a_tower(tmp_path: Path, pictures: Path) -> None:
    made = artifact(tmp_path, TOWERS["dinov2"](), "tome:keep=0.5")
    found = verify(made, suites=["tokens"], limits={"min_patch_cosine": 0.5}, images=pictures, device="cpu").to_json()
    tokens = found["tokens"]
    assert found["verdict"] == "equivalent"
    assert (tokens["kind"], tokens["kl"], tokens["kv_ratio"]) == ("tower", None, None)
    assert 0.5 < tokens["patch_cosine"] < 1
    assert set(tokens["gates"]) == GATES - {"cached"}
    show(found)


def test_a_text_policy(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=5, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    made = artifact(tmp_path, LlamaForCausalLM(config), "promptdistill:keep=0.3")
    found = verify(made, suites=["tokens"], limits={"max_token_kl": 5.0}, device="cpu").to_json()
    tokens = found["tokens"]
    assert (found["verdict"], tokens["kind"], tokens["inputs"]) == ("equivalent", "text", "random tokens")
    assert set(tokens["controls"]) == {"truncate"}
    assert tokens["controls"]["truncate"]["kept"] == tokens["kept"] == pytest.approx(0.3, abs=0.01)
    assert {name: gate["ok"] for name, gate in tokens["gates"].items()} == dict.fromkeys(GATES, True)
    assert "end of the text" in token_report.why(tokens)
    show(found)


def test_what_cannot_be_run(divprune: Artifact, lossless: Artifact, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="stores no token policy"):
        verify(lossless, suites=["tokens"])
    with pytest.raises(UsageError, match="stores no token policy"):
        verify(lossless, limits={"max_token_kl": 1.0})
    with pytest.raises(UsageError, match="tensors-only"):
        verify(divprune, tensors_only=True, limits={"max_token_kl": 1.0})
    with pytest.raises(SourceError, match="cannot read the pictures"):
        verify(divprune, suites=["tokens"], images=tmp_path / "none", device="cpu")


def test_drawn_pictures_are_always_the_same() -> None:
    assert np.array_equal(token_inputs.drawn(1), token_inputs.drawn(1))
    assert not np.array_equal(token_inputs.drawn(0), token_inputs.drawn(4))
    assert {token_inputs.drawn(n).shape for n in range(4)} == {
        (336, 448, 3),
        (448, 336, 3),
        (384, 384, 3),
        (288, 512, 3),
    }


def test_pictures_are_drawn_where_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tcw.calibration.images.shipped", list)
    found = token_inputs.Pictures.read(None)
    assert (found.origin, len(found.images)) == ("drawn by rule", token_inputs.SAMPLES)
