"""Generate text greedily, streaming, and say how fast it went and what it took."""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TextStreamer

from tcw.errors import UsageError
from tcw.memory import peak_memory


@dataclass(frozen=True)
class Generation:
    """What a model said. `tokens` are the new ids; speed is of the tokens after the first, which prefill yields."""

    text: str
    tokens: list[int]
    tokens_per_second: float
    prefill_seconds: float
    peak_memory_bytes: int

    def to_json(self) -> dict[str, Any]:
        """The keys of docs/cli.md; `tokens` is their number."""
        return {
            "text": self.text,
            "tokens": len(self.tokens),
            "tokens_per_second": self.tokens_per_second,
            "prefill_seconds": self.prefill_seconds,
            "peak_memory_bytes": self.peak_memory_bytes,
        }


def generate(
    model: Any,
    tokenizer: Any,
    prompt: str,
    max_new_tokens: int,
    on_text: Callable[[str], None] | None = None,
    *,
    chat: bool = True,
) -> Generation:
    """Continue `prompt` by up to `max_new_tokens` tokens, always the likeliest one.

    Args:
        model: a model that generates, from `tcw.load` or from_pretrained.
        tokenizer: its tokenizer.
        prompt: text; one user turn when the tokenizer has a chat template.
        max_new_tokens: the model may stop earlier, and does where its context ends.
        on_text: is called with pieces of text as they come.
        chat: use the chat template when there is one.

    Returns:
        The text, the ids, and what it took. Peak memory is the process's on the CPU, the allocator's on a GPU.

    Raises:
        UsageError: the prompt fills the model's context.
    """
    inputs = encode_prompt(tokenizer, prompt, chat=chat).to(model.device)
    max_new_tokens = min(max_new_tokens, _room(model, inputs["input_ids"].shape[1]))
    watch = _Watch(tokenizer, on_text or (lambda text: None))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    start = time.perf_counter()
    with torch.inference_mode():
        output = model.generate(
            **inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, temperature=None, top_p=None,
            top_k=None, pad_token_id=pad, streamer=watch,
        )  # fmt: skip
    given = 1 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    tokens = output[0, given:].tolist()
    times = watch.times[1:] or [time.perf_counter()]
    pace = (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else 0.0
    return Generation("".join(watch.pieces), tokens, pace, times[0] - start, _peak(model.device))


def _room(model: Any, length: int) -> int:
    """How many tokens fit behind a prompt of `length` tokens: past its context a model only babbles."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(context, int) or model.config.is_encoder_decoder:
        return sys.maxsize
    if length >= context:
        raise UsageError(
            f"the prompt has {length:,} tokens, the model's context is {context:,}", "give a shorter prompt"
        )
    return context - length


def encode_prompt(tokenizer: Any, prompt: str, *, chat: bool = True) -> Any:
    """Turn a prompt into a batch of one: `input_ids` and `attention_mask`, int64 [1, length]."""
    if chat and getattr(tokenizer, "chat_template", None):
        turns = [{"role": "user", "content": prompt}]
        return tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    encoded = tokenizer(prompt, return_tensors="pt")
    encoded.pop("token_type_ids", None)
    return encoded


class _Watch(TextStreamer):  # type: ignore[misc]
    """A streamer that hands text to a callback and notes when each token came."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_text = on_text
        self.times: list[float] = []  # the first one is the prompt's
        self.pieces: list[str] = []

    def put(self, value: Any) -> None:
        """Take the prompt's ids first, then one token at a time."""
        self.times.append(time.perf_counter())
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Pass on a piece of text that no later token can change."""
        if text:
            self.pieces.append(text)
            self._on_text(text)


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_memory()
