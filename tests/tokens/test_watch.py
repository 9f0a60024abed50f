"""Queries and keys as the attention functions get them, against the attention maps of the eager implementation."""

from typing import Any

import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXModel, LlamaConfig, LlamaModel, Qwen3Config, Qwen3Model

from tcw.errors import UsageError
from tcw.tokens.context import Looked
from tcw.tokens.watch import Recording, blocks_of, queries_keys

from .models import TOWERS

PIXELS = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["clip", "siglip", "vit", "dinov2"])
def test_recorded_rows_are_those_of_the_attention_map(name: str, attention: str) -> None:
    tower: Any = TOWERS[name]()
    tower.set_attn_implementation("eager")
    with torch.no_grad():
        maps = tower(PIXELS, output_attentions=True).attentions
        tower.set_attn_implementation(attention)
        wanted = tower(PIXELS).last_hidden_state
        recording = Recording(tower, [0, 3])
        assert torch.equal(tower(PIXELS).last_hidden_state, wanted)
    for layer in (0, 3):
        (queries, keys, scaling) = recording.calls[layer][0]
        cls = name != "siglip"
        for image in range(2):
            looked, map_ = Looked(queries[image], keys[image], scaling, cls), maps[layer][image].mean(0)
            if cls:
                torch.testing.assert_close(looked.cls_row(), map_[0, 1:])
            received = map_[int(cls) :, int(cls) :].mean(0)
            torch.testing.assert_close(looked.received(), received)
    recording.clear()
    assert recording.calls == {0: [], 3: []}
    recording.detach()
    assert tower.config._attn_implementation == attention
    with torch.no_grad():
        tower(PIXELS)
    assert recording.calls[0] == []


@pytest.mark.parametrize(
    ("cls", "config"),
    [
        (LlamaModel, LlamaConfig(num_key_value_heads=2)),
        (Qwen3Model, Qwen3Config(num_key_value_heads=2, head_dim=8)),
        (GPTNeoXModel, GPTNeoXConfig()),
    ],
)
def test_probed_rows_are_those_of_the_attention_map(cls: Any, config: Any) -> None:
    torch.manual_seed(0)
    for name, value in {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
                        "vocab_size": 50}.items():  # fmt: skip
        setattr(config, name, value)
    model = cls._from_config(config, attn_implementation="eager").eval()
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        out = model(ids, output_attentions=True, output_hidden_states=True)
        positions = model.rotary_emb(out.hidden_states[1], torch.arange(9)[None])
        queries, keys, scaling = queries_keys(blocks_of(model)[1], out.hidden_states[1], positions)
    rows = (queries[0, :, -1:].float() @ keys[0].float().mT * scaling).softmax(-1)
    torch.testing.assert_close(rows[:, 0], out.attentions[1][0, :, -1])
    assert model.config._attn_implementation == "eager"


def test_what_has_no_blocks_is_refused() -> None:
    with pytest.raises(UsageError, match="no transformer blocks"):
        blocks_of(torch.nn.Linear(2, 2))
