"""The examples of docs/kv-cache.md and of the KV part of docs/add-a-method.md are run."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tcw import methods
from tcw.cli import COMMANDS
from tcw.kv.policy import Policy

DOCS = Path(__file__).resolve().parents[2] / "docs"
KV, ADD = ((DOCS / name).read_text(encoding="utf-8") for name in ("kv-cache.md", "add-a-method.md"))


def blocks(text):
    return [part.split("```")[0] for part in text.split("```python\n")[1:]]


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def test_the_python_examples_run(llama, capsys):
    ids = torch.randint(1, 64, (1, 120), generator=torch.Generator().manual_seed(0))
    names = {"model": llama, "inputs": {"input_ids": ids, "attention_mask": torch.ones_like(ids)}}
    for block in blocks(KV):
        exec(block, names)
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].endswith("bytes instead of 256,000")
    assert shown[1].endswith("held after 139 tokens")
    assert names["output"].shape == (1, 140)


def test_the_example_method_keeps_the_largest_values(llama, tmp_path, monkeypatch):
    code = next(block for block in blocks(ADD) if "tcw/kv/" in block)
    (tmp_path / "vnorm.py").write_text(code)
    spec = importlib.util.spec_from_file_location("vnorm", tmp_path / "vnorm.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "vnorm", module)
    spec.loader.exec_module(module)
    policy = Policy.make([module.Vnorm(tokens=30, sinks=2, window=8)], llama)
    ids, values = torch.randint(1, 64, (1, 90), generator=torch.Generator().manual_seed(1)), []
    hook = llama.model.layers[0].self_attn.v_proj.register_forward_hook(lambda m, i, out: values.append(out))
    cache = policy.new_cache(llama, track=True)
    with torch.no_grad():
        llama(ids, past_key_values=cache)
    hook.remove()
    norms = values[0][0].unflatten(-1, (2, 8)).norm(dim=-1)  # [n, G]
    kept = cache.kept()[0][0][1]
    for g in range(2):
        best = norms[2:82, g].topk(20).indices + 2
        assert kept[0, g].tolist() == [0, 1, *sorted(best.tolist()), *range(82, 90)]


@pytest.mark.parametrize("name", methods.names("kv"))
def test_every_method_is_in_the_guide(name):
    assert f"`{name}" in KV


def test_commands_exist():
    shown = [line.split()[2] for line in KV.splitlines() if line.startswith("$ tcw ")]
    assert shown
    assert set(shown) <= set(COMMANDS)
