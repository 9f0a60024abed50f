"""Token policies on the command line: `tcw compress`, `tcw profile`, `tcw verify`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tcw import pipeline
from tcw.calibration import Settings
from tests.tokens.models import TOWERS, VLMS

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "llava"
    VLMS["llava"]().save_pretrained(folder)
    return folder


def words(text: str) -> str:
    return " ".join(text.split())


def test_a_plan(tcw: Run, llava: Path, tmp_path: Path) -> None:
    line = ("compress", llava, "-m", "dfloat11", "-m", "divprune:keep=0.25", "-o", tmp_path / "out", "--dry-run")
    said = words(tcw(*line).out)
    assert "would keep 9 of 36 visual tokens; " in said
    assert "of the prefill's FLOPs and 73.0 % of the KV cache, with 64 tokens of text" in said
    data = json.loads(tcw(*line, "--json").out)
    assert (data["tokens"]["kept"], data["kv"]) == (9, None)
    assert not (tmp_path / "out").exists()


def test_compress_and_verify(tcw: Run, llava: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "p.npy", np.random.default_rng(0).integers(0, 255, (2, 48, 48, 3)).astype(np.uint8))
    made = tcw("compress", llava, "-m", "divprune:keep=0.5", "-o", tmp_path / "out")
    assert made.code == 0
    assert "tokens 18 of 36 visual tokens; " in words(made.out)
    line = ("verify", tmp_path / "out", "--suite", "tokens", "--images", tmp_path / "p.npy", "--device", "cpu")
    unlimited = tcw(*line)
    assert unlimited.code == 1
    assert "the token policy changes what the model says, and no limit says how much it may" in words(unlimited.err)
    good = tcw(*line, "--max-token-kl", 5, "--max-token-flops", 0.9, "--html", tmp_path / "page.html")
    assert good.code == 0
    assert "token exactness everything, dropped, cached, batch, sizes: hold" in words(good.out)
    assert "Token policy" in (tmp_path / "page.html").read_text()
    past = tcw(*line, "--min-token-top1", 1, "--max-answer-nll-rise", 0)
    assert past.code == 1
    assert "past its limit" in past.err


def test_pictures_and_text_to_calibrate_on(
    tcw: Run, llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Settings] = []

    def plan(source: Any, chosen: Any, *, calibration: Settings, progress: Any) -> pipeline.Plan:
        given.append(calibration)
        return pipeline.Plan(chosen, (), 1)

    monkeypatch.setattr(pipeline, "plan", plan)
    (tmp_path / "photos").mkdir()
    (tmp_path / "text.txt").write_text("words")
    line = ("compress", llava, "-o", tmp_path / "out", "--dry-run", "--calibration")
    looked = tcw(*line, tmp_path / "photos", "-m", "dymu")
    assert "is not read" not in looked.err
    unread = tcw(*line, tmp_path / "text.txt", "-m", "dymu")
    assert "is not read" in unread.err, "dymu looks at pictures, not at text"
    assert "is not read" in tcw(*line, tmp_path / "photos", "-m", "divprune").err
    assert [(each.text, each.images) for each in given[:2]] == [
        (None, tmp_path / "photos"), (tmp_path / "text.txt", None),
    ]  # fmt: skip
    assert tcw(*line, tmp_path / "none", "-m", "dymu").code == 2


def test_profile(tcw: Run, llava: Path, tiny_llama: Path, tmp_path: Path) -> None:
    line = ("profile", llava, "-m", "divprune:keep=0.2", "-m", "fastv", "-m", "dymu", "--no-latency")
    said = words(tcw(*line).out)
    assert "fastv 18 of 36 visual tokens" in said
    assert "dymu up to " in said
    assert "of a prompt of one image and 64 tokens of text" in said
    rows = {row["name"]: row for row in json.loads(tcw(*line, "--json").out)["tokens"]["policies"]}
    assert set(rows) == {"divprune:keep=0.2", "fastv", "dymu", "divprune:keep=0.2 + fastv + dymu"}
    assert rows["divprune:keep=0.2"]["flops_ratio"] < rows["fastv"]["flops_ratio"] < 1
    refused = tcw("profile", tiny_llama, "-m", "divprune", "--no-latency")
    assert "divprune: `LlamaForCausalLM` takes no images" in refused.out
    plain = tcw("profile", llava, "--no-latency")
    assert "token policy" not in plain.out
    TOWERS["dinov2"]().save_pretrained(tmp_path / "dinov2")
    assert "of 36 patches" in tcw("profile", tmp_path / "dinov2", "-m", "tome", "--no-latency").out
