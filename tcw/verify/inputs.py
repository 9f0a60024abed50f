"""What to feed two models so that their outputs can be compared: prompts and text, or seeded noise for other senses.

Everything is decided by the reference and its tokenizer once, so both models are given the same numbers.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from tcw.data import PROMPTS
from tcw.errors import SourceError

PROMPT_TOKENS = 48  # at most, of each prompt
WINDOW = 256  # tokens of a text window
WINDOWS = 4
NEW_TOKENS = 64


@dataclass(frozen=True)
class Feed:
    """One input. `targets` [length - 1] are the tokens to predict, for text windows."""

    label: str
    inputs: dict[str, torch.Tensor]
    targets: torch.Tensor | None = None


@dataclass
class Plan:
    """All inputs; how many tokens to generate from the first one; and what is left out, and why."""

    feeds: list[Feed]
    new_tokens: int = 0
    skipped: dict[str, str] = field(default_factory=dict)


def plan_inputs(model: Any, tokenizer: Any | None, text: str) -> Plan:
    """Choose the inputs for a model, by what its `forward` takes.

    Args:
        model: a transformers model.
        tokenizer: its tokenizer, or None: prompts are then seeded random tokens.
        text: what to measure perplexity on, for causal language models.
    """
    main = model.main_input_name
    if main in _SENSES:
        feeds = [Feed(f"{main} {i + 1}", _extend(model, {main: _SENSES[main](model.config, i)})) for i in range(8)]
        plan = Plan(feeds)
    elif main == "input_ids":
        plan = _text_plan(model, tokenizer, text)
    else:
        reason = f"the model takes `{main}`, for which there is no test input yet"
        return Plan([], skipped=dict.fromkeys(("logits", "generation", "perplexity"), reason))
    if not plan.new_tokens:
        plan.skipped.setdefault("generation", "the model does not generate text from a prompt")
        plan.skipped.setdefault("perplexity", "the model is not a causal language model")
    return plan


def _text_plan(model: Any, tokenizer: Any | None, text: str) -> Plan:
    config = model.config.get_text_config()
    context = getattr(config, "max_position_embeddings", None) or math.inf
    vocabulary, length = int(config.vocab_size), int(min(PROMPT_TOKENS, context / 2))
    prompts = _prompt_ids(tokenizer, vocabulary, length) if tokenizer is not None else None
    if prompts is None:
        tokenizer = None
        prompts = [(f"random tokens {i + 1}", _noise(i).integers(vocabulary, min(16, length))) for i in range(8)]
    feeds = [Feed(label, _extend(model, {"input_ids": torch.tensor([ids])})) for label, ids in prompts]
    plan = Plan(feeds)
    if not model.can_generate():
        return plan
    if model.config.is_encoder_decoder and _start_token(model.generation_config) is None:
        plan.skipped["generation"] = "the model does not say which token its decoder starts with"
        plan.skipped["perplexity"] = "the model is an encoder-decoder"
        return plan
    plan.new_tokens = int(min(NEW_TOKENS, context - feeds[0].inputs["input_ids"].shape[1]))
    if model.config.is_encoder_decoder:
        plan.skipped["perplexity"] = "the model is an encoder-decoder"
    elif tokenizer is None:
        plan.skipped["perplexity"] = "the model has no tokenizer that fits it"
    else:
        plan.feeds += _windows(tokenizer, text, int(min(WINDOW, context)), vocabulary)
    return plan


def _start_token(config: Any) -> Any:
    return config.bos_token_id if config.decoder_start_token_id is None else config.decoder_start_token_id


def _windows(tokenizer: Any, text: str, length: int, vocabulary: int) -> list[Feed]:
    """Windows of `length` tokens spread evenly over the text; each starts like a text when the tokenizer marks that."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    marked = tokenizer("a", verbose=False)["input_ids"]
    start = [marked[0]] if marked and marked[0] == tokenizer.bos_token_id is not None else []
    length -= len(start)
    if len(ids) < 2 or max(ids) >= vocabulary:
        raise SourceError(f"the text gives {len(ids)} usable tokens, too few to measure perplexity", "`--text FILE`")
    whole = max(1, len(ids) // length)
    count = min(WINDOWS, whole)
    picks = [round(i * (whole - 1) / max(1, count - 1)) for i in range(count)]
    cuts = [torch.tensor(start + ids[k * length : (k + 1) * length]) for k in picks]
    return [Feed(f"text, window {i + 1}", {"input_ids": c[None]}, c[1:]) for i, c in enumerate(cuts)]


def _prompt_ids(tokenizer: Any, vocabulary: int, length: int) -> list[tuple[str, list[int]]] | None:
    """The prompts as tokens, or None when the tokenizer is not this model's: transformers makes up an empty one."""
    rows = [tokenizer(p, verbose=False)["input_ids"][:length] for p in PROMPTS]
    if all(row and max(row) < vocabulary for row in rows):
        return list(zip(PROMPTS, rows, strict=True))
    return None


def _extend(model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Add what else the model wants: a start for its decoder, a picture beside the text."""
    first = next(iter(inputs.values()))
    if model.config.is_encoder_decoder:
        ids = first if first.dtype == torch.long else torch.arange(8)[None]
        inputs["decoder_input_ids"] = ids % model.config.get_text_config(decoder=True).vocab_size
    if "input_ids" in inputs and hasattr(model.config, "vision_config") and not model.can_generate():
        inputs["pixel_values"] = _pixels(model.config, 0)
    return inputs


class _noise:  # noqa: N801
    """Seeded noise: the same on every machine for the same `seed`."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def integers(self, high: int, count: int) -> list[int]:
        return torch.randint(high, (count,), generator=self.generator).tolist()

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator)


def _pixels(config: Any, seed: int) -> torch.Tensor:
    vision = getattr(config, "vision_config", config)
    size = vision.image_size
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return _noise(seed).normal(1, int(getattr(vision, "num_channels", 3)), int(height), int(width))


def _spectrum(config: Any, seed: int) -> torch.Tensor:
    return _noise(seed).normal(1, int(config.num_mel_bins), 2 * int(config.max_source_positions))


def _wave(config: Any, seed: int) -> torch.Tensor:
    return _noise(seed).normal(1, 16_000)


_SENSES: dict[str, Callable[[Any, int], torch.Tensor]] = {
    "pixel_values": _pixels,
    "input_features": _spectrum,
    "input_values": _wave,
}
