"""`tcw run`: text on stdout as it comes, facts on stderr."""

import io
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

Run = Callable[..., Any]


@dataclass
class FakeGeneration:
    text: str = "Paris."
    tokens: tuple[int, ...] = (5, 6)
    tokens_per_second: float = 12.34
    prefill_seconds: float = 0.126
    peak_memory_bytes: int = 865_800_000

    def to_json(self) -> dict[str, Any]:
        return {"text": self.text, "tokens": 2, "tokens_per_second": 12.34, "peak_memory_bytes": 865_800_000}


class FakeModel:
    """A model that generates text, as far as `tcw run` looks at it."""

    main_input_name = "input_ids"
    config = SimpleNamespace(is_encoder_decoder=False)
    generation_config = SimpleNamespace(decoder_start_token_id=None, bos_token_id=None)

    def can_generate(self) -> bool:
        return True


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Generate without a model; gives the list of prompts."""
    calls: list[Any] = []

    def load(source: Any, *, residency: str, device: str) -> Any:
        calls.append((residency, device))
        return FakeModel()

    def generate(model: Any, tokenizer: Any, prompt: str, count: int, on_text: Callable[[str], None]) -> FakeGeneration:
        calls.append((prompt, count))
        for piece in ("Par", "is."):
            on_text(piece)
        return FakeGeneration()

    monkeypatch.setattr("tcw.source.open_source", lambda text, progress: SimpleNamespace(id=text))
    monkeypatch.setattr("tcw.runtime.load.load", load)
    monkeypatch.setattr("tcw.runtime.load.tokenizer", lambda source: "tokenizer")
    monkeypatch.setattr("tcw.runtime.generate.generate", generate)
    return calls


def test_all_modes(tcw: Run, fake: list[Any]) -> None:
    human, quiet, as_json = (tcw("run", "a", "Where?", "-n", 9, *mode) for mode in ([], ["-q"], ["--json"]))
    facts = "\n2 tokens, 12.3 a second, the first after 126 ms, peak memory 865.8 MB\n"
    assert (human.code, human.out, human.err) == (0, "Paris.\n", facts)
    assert (quiet.code, quiet.out, quiet.err) == (0, "Paris.\n", "")
    assert (as_json.code, as_json.err) == (0, "")
    assert json.loads(as_json.out) == {"schema": 1, **FakeGeneration().to_json()}
    assert fake[:2] == [("auto", "auto"), ("Where?", 9)]


def test_options_and_default_prompt(tcw: Run, fake: list[Any]) -> None:
    assert tcw("run", "a", "--residency", "huffman", "--device", "cpu").code == 0
    assert fake == [("huffman", "cpu"), ("What is the capital of France?", 64)]


def test_prompt_from_stdin(tcw: Run, fake: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("Two\nlines\n"))
    assert tcw("run", "a", "-").code == 0
    assert fake[1][0] == "Two\nlines\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO("  \n"))
    ran = tcw("run", "a", "-")
    assert (ran.code, ran.out) == (2, "")
    assert "the prompt is empty" in ran.err


def test_for_real(tcw: Run, tiny_llama: Path) -> None:
    ran = tcw("run", tiny_llama, "Once", "-n", 5, "--json")
    assert ran.code == 0, ran.err
    data = json.loads(ran.out)
    assert 1 <= data["tokens"] <= 5
    assert {"text", "tokens", "tokens_per_second", "peak_memory_bytes"} <= set(data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"can_generate": lambda self: False}, "does not go on from a text"),
        ({"main_input_name": "input_features"}, "does not go on from a text"),
        ({"config": SimpleNamespace(is_encoder_decoder=True)}, "which token its decoder starts with"),
    ],
)
def test_models_that_cannot_answer(
    tcw: Run, fake: list[Any], monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], message: str
) -> None:
    for name, value in change.items():
        monkeypatch.setattr(FakeModel, name, value)
    ran = tcw("run", "a", "Hi")
    assert ran.code == 2
    assert ran.err.startswith("error: `a`")
    assert message in ran.err


def test_a_prompt_that_is_not_text(tcw: Run, fake: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe"), "utf-8", errors="surrogateescape"))
    ran = tcw("run", "a", "-")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("error: the prompt is not UTF-8 text")
