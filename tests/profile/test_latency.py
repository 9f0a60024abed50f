"""Timing of real tiny models of each kind, with a clock that is under control where a number is asserted."""

import pytest
import torch
import transformers

from tcw.device import Device
from tcw.errors import SourceError
from tcw.profile import latency
from tcw.profile.latency import NEW_TOKENS, measure, time_model

CPU = Device("a processor", "cpu", "cpu", 1 << 33, 1 << 32, "asked for", 1)
SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 40,
}  # fmt: skip


def _llama() -> transformers.PreTrainedModel:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, num_key_value_heads=2)).to(torch.bfloat16)


def test_a_decoder_is_timed_in_both_phases() -> None:
    found = time_model(_llama(), CPU, batch=2)
    assert found.prefill_ms is not None
    assert found.decode_ms_per_token is not None
    assert found.prefill_ms > 0
    assert found.decode_ms_per_token > 0
    assert (found.prompt_tokens, found.batch, found.dtype, found.device) == (40, 2, "bfloat16", "cpu")
    assert found.forward_ms is None
    assert found.skipped is None


def test_times_are_medians_without_the_first_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls take 100, then 1, 2, 3, ... seconds; the warm-up's 100 must not show."""
    clock, calls = 0.0, 0

    def run() -> None:
        nonlocal clock, calls
        clock += 100.0 if calls == 0 else float(calls)
        calls += 1

    monkeypatch.setattr(latency.time, "perf_counter", lambda: clock)
    assert latency._repeat(run, lambda: None, "x", 4, lambda event: None) == [1.0, 2.0, 3.0, 4.0]
    calls = 0
    # 10 seconds are enough: 1 + 2 + 3 + 4 reaches them
    assert len(latency._repeat(run, lambda: None, "x", 50, lambda event: None)) == 4


def test_decoding_goes_on_behind_the_prompt_with_the_cache() -> None:
    """The token after each step is the one that the whole text, read at once, predicts."""
    model = _llama().float().eval()
    inputs = latency._inputs(model, 1, 7, "cpu")
    assert inputs is not None
    seen = []
    original = model.forward

    def watch(*args: object, **kwargs: object) -> object:
        seen.append(kwargs["input_ids"])
        return original(*args, **kwargs)

    model.forward = watch
    with torch.inference_mode():
        step = latency._decoder(model, {**inputs, "use_cache": True})
        for _ in range(4):
            step()
        text = seen[0]
        for token in seen[1:]:
            assert token.shape == (1, 1)
            assert token.item() == original(input_ids=text).logits[0, -1].argmax().item()
            text = torch.cat([text, token], 1)


@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_a_model_that_writes_nothing_has_a_forward_time(kind: str) -> None:
    shape = {k: v for k, v in SMALL.items() if k != "vocab_size" or kind == "bert"}
    extra = {"image_size": 16, "patch_size": 8} if kind == "vit" else {}
    model = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(kind, **shape, **extra))
    found = time_model(model, CPU)
    assert found.forward_ms is not None
    assert found.forward_ms > 0
    assert found.prefill_ms is None
    assert found.decode_ms_per_token is None


def test_an_encoder_decoder_is_timed_in_both_phases() -> None:
    config = transformers.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    found = time_model(transformers.T5ForConditionalGeneration(config), CPU)
    assert found.prefill_ms is not None
    assert found.decode_ms_per_token is not None


def test_mamba_decodes_with_its_own_state() -> None:
    config = transformers.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4)
    assert time_model(transformers.MambaForCausalLM(config), CPU).decode_ms_per_token is not None


def test_every_run_is_reported() -> None:
    events: list = []
    time_model(_llama(), CPU, progress=events.append)
    assert {e.note for e in events} == {"prefill", "decode"}
    assert sum(e.note == "decode" for e in events) == NEW_TOKENS


@pytest.mark.parametrize(("error", "reason"), [
    (SourceError("transformers has no class for `brand-new`"), "transformers has no class for `brand-new`"),
    (RuntimeError("out of memory\nand a long story"), "RuntimeError: out of memory"),
])  # fmt: skip
def test_a_model_that_cannot_be_run_is_skipped_with_the_reason(
    error: Exception, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tcw.runtime.load as runtime

    def refuse(source: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(runtime, "load", refuse)
    assert measure("a source", CPU).skipped == reason
