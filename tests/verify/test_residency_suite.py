"""The suite `residency`: what running with compressed weights gives the bits of."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tcw.artifact import Artifact
from tcw.errors import UnknownName, UsageError
from tcw.runtime.lossless import LosslessWeight
from tcw.source import Source
from tcw.verify import verify
from tcw.verify.verdict import Verdict


def run(artifact: Source, residency: str) -> tuple[Verdict, dict[str, Any]]:
    verdict = verify(artifact, residency=residency, device="cpu")
    return verdict, verdict.to_json()["residency"]


def test_huffman_gives_the_bits_of_decoded_weights(lossless: Artifact) -> None:
    verdict, found = run(lossless, "huffman")
    assert verdict.verdict == "identical"
    assert (found["name"], found["proved"], found["same_kernel"]) == ("huffman", "decoded weights", None)
    assert found["plain"]["bit_identical"]
    assert found["plain"]["tokens"] == found["plain"]["identical_tokens"] == 16


def test_packed_gives_the_bits_of_its_kernels_on_plain_weights(lossless: Artifact) -> None:
    verdict, found = run(lossless, "packed")
    assert verdict.verdict == "identical"
    assert (found["name"], found["proved"]) == ("packed", "the same kernels on plain weights")
    assert found["same_kernel"]["bit_identical"]
    assert found["plain"]["mean_kl"] < 1e-3


def test_a_packed_weight_that_is_wrong_fails(lossless: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    right = LosslessWeight.linear

    def wrong(self: LosslessWeight, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        y = right(self, x, bias).clone()
        y[..., 0] = torch.nextafter(y[..., 0].float(), torch.tensor(1e9)).add(1e-2).to(y.dtype)
        return y

    monkeypatch.setattr(LosslessWeight, "linear", wrong)
    verdict, found = run(lossless, "packed")
    assert (verdict.verdict, verdict.exit_code) == ("different", 1)
    assert found["proved"] is None
    assert "residency" in verdict.failed


def test_what_quantised_weights_give_is_measured_alone(tiny: Source, tmp_path: Path) -> None:
    from tcw.pipeline import compress
    from tcw.recipe import from_specs

    compress(tiny, from_specs(["int8:algo=rtn"]), tmp_path / "int8")
    verdict = verify(Artifact.open(tmp_path / "int8"), tiny, residency="packed", device="cpu")
    found = verdict.to_json()["residency"]
    assert (found["name"], found["proved"], found["same_kernel"]) == ("packed", None, None)
    assert not verdict.failed


def test_a_residency_must_be_one_that_the_device_has(lossless: Artifact) -> None:
    with pytest.raises(UnknownName):
        run(lossless, "zip")
    with pytest.raises(UsageError, match="offload"):
        run(lossless, "offload")
