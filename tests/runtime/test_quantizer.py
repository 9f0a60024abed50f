"""What transformers asks the quantizer, and what it refuses."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, modeling_utils

from tcw.errors import UsageError
from tcw.runtime.quantizer import TcwConfig, _refuse_to_move


def test_what_changes_nothing_is_no_move() -> None:
    """On the device "meta", where no value is: a change of dtype alone leaves a tensor there."""
    model = SimpleNamespace(device=torch.device("meta"), dtype=torch.bfloat16)
    for same in (lambda t: t.bfloat16(), lambda t: t.to("meta"), lambda t: t.to(torch.bfloat16)):
        assert _refuse_to_move(model, same) is model
    for other in (lambda t: t.half(), lambda t: torch.empty_like(t, device="cpu")):
        with pytest.raises(UsageError, match="stay compressed on meta"):
            _refuse_to_move(model, other)


def test_packed_models_set_no_memory_aside(zoo: Any, monkeypatch: Any) -> None:
    """transformers asks for bytes twice: to spread a model, and once that is settled to set memory aside."""
    asked = []

    def warm_up(model: Any, places: Any, quantizer: Any) -> None:
        weight = model.lm_head.weight
        asked.append(quantizer.param_element_size(model, "lm_head.weight", weight))

    monkeypatch.setattr(modeling_utils, "caching_allocator_warmup", warm_up)
    for choice in ("packed", "huffman"):
        config = TcwConfig(residency=choice)
        LlamaForCausalLM.from_pretrained(
            zoo("llama").artifact, quantization_config=config, device_map={"": "cpu"}, dtype="auto"
        )
    assert asked == [0.0, 2 * 0.68]
