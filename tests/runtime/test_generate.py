import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import tcw
import tcw.errors
from tcw.recipe import from_specs
from tcw.runtime.generate import encode_prompt, generate
from tcw.runtime.load import tokenizer


@pytest.fixture(scope="session")
def artifact(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runtime") / "llama.tcw"
    tcw.compress(tcw.open_model(tiny_llama), from_specs(["dfloat11"]), out)
    return out


@pytest.mark.parametrize("residency", ["bf16", "huffman"])
def test_streams_the_tokens_of_the_source(tiny_llama: Path, artifact: Path, residency: str) -> None:
    from transformers import AutoModelForCausalLM

    words = tokenizer(tcw.open_model(artifact))
    model = tcw.load(artifact, residency=residency, device="cpu")
    model.generation_config.eos_token_id = None
    pieces: list[str] = []
    result = generate(model, words, "hello there", 24, pieces.append)
    plain = AutoModelForCausalLM.from_pretrained(str(tiny_llama))
    plain.generation_config.eos_token_id = None
    expected = plain.generate(**words("hello there", return_tensors="pt"), max_new_tokens=24, do_sample=False)
    assert result.tokens == expected[0, 11:].tolist()
    assert len(set(result.tokens)) > 4
    assert result.text == "".join(pieces) == words.decode(result.tokens, skip_special_tokens=True)
    assert result.tokens_per_second > 0
    assert result.prefill_seconds > 0
    assert result.peak_memory_bytes > 1 << 20
    assert result.to_json()["tokens"] == len(result.tokens)


def test_uses_the_chat_template_unless_told_not_to(tiny_llama: Path) -> None:
    words = tokenizer(tcw.open_model(tiny_llama))
    plain = encode_prompt(words, "hi")["input_ids"]
    words.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    assert words.decode(encode_prompt(words, "hi")["input_ids"][0]) == "<user>hi"
    assert torch.equal(encode_prompt(words, "hi", chat=False)["input_ids"], plain)


def test_works_for_encoder_decoders(zoo: Any, tiny_llama: Path) -> None:
    words = tokenizer(tcw.open_model(tiny_llama))
    model = zoo("bart").plain()
    result = generate(model, words, "hello there", 8)
    expected = model.generate(
        **words("hello there", return_tensors="pt"), max_new_tokens=8, do_sample=False, num_beams=1
    )
    assert result.tokens == expected[0, 1:].tolist()


RUN = """
import sys
import tcw
import tcw.errors
from tcw.memory import peak_memory
import tcw.codecs.lanes, transformers.generation
model = tcw.load(sys.argv[1], residency=sys.argv[2], device="cpu")
from tcw.runtime.load import tokenizer
result = tcw.generate(model, tokenizer(tcw.open_model(sys.argv[1])), "Why is the sky blue?", 16)
print(result.tokens, peak_memory())
"""


@pytest.mark.slow
def test_smollm2_says_the_same_in_less_memory(smollm2: Path, tmp_path: Path) -> None:
    tcw.compress(tcw.open_model(smollm2), from_specs(["dfloat11"]), tmp_path / "a")
    found = {}
    for name, folder, residency in (
        ("plain", smollm2, "bf16"), ("bf16", tmp_path / "a", "bf16"), ("huffman", tmp_path / "a", "huffman"),
    ):  # fmt: skip
        run = [sys.executable, "-c", RUN, str(folder), residency]
        done = subprocess.run(run, capture_output=True, text=True, timeout=300, check=True).stdout
        tokens, peak = done.rsplit(" ", 1)
        found[name] = tokens, int(peak)
    assert found["plain"][0] == found["bf16"][0] == found["huffman"][0]
    assert found["bf16"][1] - found["huffman"][1] > 30e6  # of 269 MB; the tied embedding is decoded as a whole


def test_stops_where_the_context_ends(tiny_llama: Path) -> None:
    """tiny_llama has a context of 512 tokens, one a byte."""
    words, model = tokenizer(tcw.open_model(tiny_llama)), tcw.load(tiny_llama, device="cpu")
    model.generation_config.eos_token_id = None
    assert len(generate(model, words, "a" * 500, 100).tokens) == 12
    with pytest.raises(tcw.errors.UsageError, match="512"):
        generate(model, words, "a" * 512, 1)
