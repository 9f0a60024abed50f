"""The decoder's hooks on a plain Llama: cut text spans, against the dense model with those keys masked."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from tcw.errors import UsageError
from tcw.tokens import DECODE, INPUT, Stage, layer
from tcw.tokens.cuts import Image
from tcw.tokens.decoder import Decoder
from tcw.tokens.plan import Plan
from tcw.tokens.trace import Trace

from .dense import masked_logits

START, END = 3, 15  # the columns that may be cut


def llama(attention: str = "sdpa", **options: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=100, bos_token_id=1, eos_token_id=None, pad_token_id=0, **options,
    )  # fmt: skip
    model = LlamaForCausalLM._from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(6)
    return model


def spans(real: Tensor, rows: tuple[int, ...] | None = None) -> list[Image]:
    """An image in every row, or in some: columns START..END after the padding; none in a decoding call."""
    if real.shape[1] < END:
        return []
    found = []
    for row in range(len(real)) if rows is None else rows:
        columns = real[row].nonzero()[START:END, 0]
        none = columns[:0]
        place = torch.zeros(len(columns), 3)
        place[:, 2] = torch.arange(len(columns))
        picture: Any = SimpleNamespace(
            sample=row, number=0, columns=columns, separators=none, closes=torch.full_like(columns, -1),
            grid=(1, 1, len(columns)), place=place, tower=None,
        )  # fmt: skip
        found.append(Image(picture, Trace(row, 0, (1, 1, len(columns)), place)))
    return found


def by_norm(context: Any, k: int | None) -> Plan:
    """Keep the longest vectors."""
    assert k is not None
    return Plan.dropping(context.x.norm(dim=1).argsort(descending=True, stable=True)[:k], context.size)


def by_rows(context: Any, k: int | None) -> Plan:
    """Keep what the last token looks at."""
    assert k is not None
    return Plan.dropping(context.rows.last().argsort(descending=True, stable=True)[:k], context.size)


def ragged(context: Any, k: int | None) -> Plan:
    """Keep what is longer than the mean: another number in every row."""
    return Plan.dropping((context.x.norm(dim=1) > context.x.norm(dim=1).mean()).nonzero()[:, 0], context.size)


CUTS = {
    "input": [(0, Stage(INPUT, by_norm, 0.5))],
    "layer": [(2, Stage(layer(2), by_rows, 0.5, probe=-1))],
    "layers": [(2, Stage(layer(2), by_rows, 0.75)), (4, Stage(layer(4), by_rows, 0.25, probe=-2))],
    "ragged": [(0, Stage(INPUT, ragged)), (3, Stage(layer(3), ragged))],
    "exit": [(3, Stage(layer(3), lambda context, k: Plan.dropping(context.alive[:0], context.size)))],
}


def attach(model: Any, stages: Any, positions: str = "keep", images: Any = spans) -> Decoder:
    return Decoder(model.model, stages, images, positions=positions, note=lambda words: None)


def prompts(padding: bool) -> dict[str, Tensor]:
    ids = torch.randint(3, 100, (2, 24), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padding:
        mask[1, :5], ids[1, :5] = 0, 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("cuts", CUTS)
def test_cut_equals_masked(cuts: str, padding: bool, attention: str) -> None:
    model, inputs = llama(attention), prompts(padding)
    decoder = attach(model, CUTS[cuts])
    with torch.no_grad():
        found = model(**inputs).logits
    left = decoder.left
    decoder.detach()
    assert any(len(row) < 24 for level in left.values() for row in level)
    wanted = masked_logits(model, inputs, left)
    last = left[max(left)]
    for row, columns in enumerate(last):
        mine = found[row, found.shape[1] - len(columns) :]
        torch.testing.assert_close(mine, wanted[row, columns], atol=1e-5 * float(wanted.abs().max()), rtol=0)


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("cuts", CUTS)
def test_keeping_all_changes_no_bit(cuts: str, padding: bool) -> None:
    model, inputs = llama(), prompts(padding)
    stages = [(n, Stage(s.at, s.plan, 1.0, probe=s.probe)) for n, s in CUTS[cuts]]
    with torch.no_grad():
        wanted = model(**inputs).logits
        tokens = model.generate(**inputs, max_new_tokens=6)
        decoder = attach(model, stages)
        assert torch.equal(model(**inputs).logits, wanted)
        assert torch.equal(model.generate(**inputs, max_new_tokens=6), tokens)
    decoder.detach()


def frozen(stages: Any) -> Any:
    """The same stages, each of which goes on deciding what it decided first for every image."""

    def freeze(stage: Stage) -> Stage:
        known: list[Plan] = []
        turn = iter(range(10**6))

        def plan(context: Any, k: int | None) -> Plan:
            n = next(turn)
            if n < 2:
                known.append(stage.plan(context, k))
            return known[n % 2]

        return replace(stage, plan=plan)

    return [(n, freeze(stage)) for n, stage in stages]


def on(inputs: dict[str, Tensor], tokens: Tensor) -> dict[str, Tensor]:
    """The prompts with tokens [2, n] after them."""
    ids = torch.cat([inputs["input_ids"], tokens], 1)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(tokens)], 1)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("positions", ["keep", "compact"])
@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("cuts", CUTS)
def test_cached_decode_equals_uncached(cuts: str, padding: bool, positions: str, attention: str) -> None:
    model, inputs = llama(attention), prompts(padding)
    decoder = attach(
        model, frozen(CUTS[cuts]), positions, lambda real: spans(real[:, :24]) if real.shape[1] > 1 else []
    )
    with torch.no_grad():
        cached = model.generate(**inputs, max_new_tokens=6, output_logits=True, return_dict_in_generate=True)
        for step, logits in enumerate(cached.logits):
            now = model(**on(inputs, cached.sequences[:, 24 : 24 + step]), use_cache=False).logits[:, -1]
            torch.testing.assert_close(logits, now, atol=1e-5 * float(now.abs().max()), rtol=0)
    decoder.detach()
    assert len(set(cached.sequences[0, 24:].tolist())) > 1, "a constant continuation would show nothing"


@pytest.mark.parametrize("cuts", CUTS)
def test_decode_without_mask_or_positions(cuts: str) -> None:
    """A caller may feed one token at a time and say nothing about it."""
    model, inputs = llama(), prompts(False)
    decoder = attach(model, CUTS[cuts])
    with torch.no_grad():
        wanted = model.generate(**inputs, max_new_tokens=5)[:, 24:]
        out = model(input_ids=inputs["input_ids"], use_cache=True)
        for step in range(5):
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            assert torch.equal(token[:, 0], wanted[:, step])
            out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
    decoder.detach()


@pytest.mark.parametrize("cuts", CUTS)
def test_a_batch_equals_its_rows(cuts: str) -> None:
    model, inputs = llama(), prompts(True)
    decoder = attach(model, CUTS[cuts])
    with torch.no_grad():
        both = model.generate(**inputs, max_new_tokens=6)[:, 24:]
        second = {name: x[1:, 5:] for name, x in inputs.items()}
        assert torch.equal(model.generate(**{k: v[:1] for k, v in inputs.items()}, max_new_tokens=6)[:, 24:], both[:1])
        assert torch.equal(model.generate(**second, max_new_tokens=6)[:, 19:], both[1:])
    decoder.detach()


@pytest.mark.parametrize("cuts", CUTS)
def test_beams(cuts: str) -> None:
    """Beams are rows of their own and may be reordered: the best one has the score that the masked model gives it."""
    model, inputs = llama(), prompts(True)
    decoder = attach(model, CUTS[cuts])
    with torch.no_grad():
        scored = {"return_dict_in_generate": True, "output_scores": True}
        found = model.generate(**inputs, max_new_tokens=4, num_beams=3, **scored)
        model(**inputs)
        left = {n: [torch.cat([row, torch.arange(24, 28)]) for row in rows] for n, rows in decoder.left.items()}
        decoder.detach()
        logits = masked_logits(model, on(inputs, found.sequences[:, 24:]), left)
    scores = logits[:, 23:27].log_softmax(-1).gather(2, found.sequences[:, 24:, None])[..., 0].sum(1) / 4
    torch.testing.assert_close(found.sequences_scores, scores, atol=1e-4, rtol=1e-4)


def test_closed_positions_are_those_of_the_short_text() -> None:
    model, inputs = llama(), prompts(False)
    decoder = attach(model, CUTS["input"], "compact")
    with torch.no_grad():
        found = model(**inputs).logits
        left = decoder.left[0]
        decoder.detach()
        for row, columns in enumerate(left):
            short = model(input_ids=inputs["input_ids"][row : row + 1, columns]).logits
            torch.testing.assert_close(found[row : row + 1], short, atol=1e-5 * float(short.abs().max()), rtol=0)


def test_merged_tokens_carry_the_mean() -> None:
    """Every kept token takes in the one after it: the dense model with those means in its embeddings, masked."""
    model, inputs = llama(), prompts(True)

    def pairs(context: Any, k: int | None) -> Plan:
        keep = torch.arange(0, context.tokens, 2)
        return Plan.merging(keep, torch.arange(context.tokens) // 2, context.size)

    decoder = attach(model, [(0, Stage(INPUT, pairs, 0.5))])
    with torch.no_grad():
        found = model(**inputs).logits
        left = decoder.left
        decoder.detach()
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        for row, real in enumerate(inputs["attention_mask"].bool()):
            columns = real.nonzero()[START:END, 0]
            embeds[row, columns[::2]] = (embeds[row, columns[::2]] + embeds[row, columns[1::2]]) / 2
        whole = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}
        whole["position_ids"] = inputs["position_ids"]
        wanted = masked_logits(model, whole, left)
    for row, columns in enumerate(left[0]):
        mine = found[row, found.shape[1] - len(columns) :]
        torch.testing.assert_close(mine, wanted[row, columns], atol=1e-5 * float(wanted.abs().max()), rtol=0)


@pytest.mark.parametrize("padding", [False, True])
def test_trimming_takes_dropped_tokens_out_of_earlier_caches(padding: bool) -> None:
    """Decoding then goes on as if the layers since the first cut had never held what the last one does not."""
    model, inputs = llama(), prompts(padding)
    decoder = attach(model, [*CUTS["layers"], (6, Stage(DECODE, by_norm))])
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        first = model(**inputs, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True)
        assert [cache.layers[n].keys.shape[2] for n in range(6)] == [24, 24, 15, 15, 15, 15]
        new = on(inputs, first)
        one = {"input_ids": first, "attention_mask": new["attention_mask"], "position_ids": new["position_ids"][:, -1:]}
        found = model(**one, past_key_values=cache).logits[:, -1]
        left = {n: [torch.cat([row, torch.tensor([24])]) for row in rows] for n, rows in decoder.left.items()}
        decoder.detach()
        wanted = untrimmed(model, inputs, new, left)
    torch.testing.assert_close(found, wanted, atol=1e-5 * float(wanted.abs().max()), rtol=0)


def untrimmed(model: Any, inputs: Any, new: Any, left: dict[int, list[Tensor]]) -> Tensor:
    """Prefill without trimming; then, from layer 2 on, the next token sees only what the last layer holds."""
    decoder = attach(model, CUTS["layers"])
    cache = DynamicCache(config=model.config)
    model(**inputs, past_key_values=cache)
    decoder.detach()
    real = new["attention_mask"].bool()

    def hook(number: int) -> Any:
        def before(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            start = max(n for n in left if n <= number)
            held = decoder_columns(left[start], cache.layers[number].keys.shape[2] + 1)
            seen = torch.stack([torch.isin(h, left[4][row]) if number >= 2 else h >= 0 for row, h in enumerate(held)])
            seen &= torch.stack([real[row, h.clamp(min=0)] & (h >= 0) for row, h in enumerate(held)])
            bias = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
            return args, {**kwargs, "attention_mask": bias[:, None, None]}

        return before

    for number, block in enumerate(model.model.layers):
        block.register_forward_pre_hook(hook(number), with_kwargs=True)
    one = {"input_ids": new["input_ids"][:, -1:], "position_ids": new["position_ids"][:, -1:]}
    return model(**one, past_key_values=cache).logits[:, -1]


def decoder_columns(rows: list[Tensor], width: int) -> Tensor:
    """Columns of the tokens in a cache, -1 where a row is filled up at the left."""
    out = torch.full((len(rows), width), -1)
    for n, row in enumerate(rows):
        out[n, width - len(row) :] = row
    return out


def test_a_second_turn_may_bring_another_image() -> None:
    model, inputs = llama(), prompts(False)
    decoder = attach(model, CUTS["input"])
    more = torch.randint(3, 100, (2, 20), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        out = model(**inputs, use_cache=True)
        left = decoder.left[0]
        again = model(input_ids=more, past_key_values=out.past_key_values).logits[:, -1]
        left = {0: [torch.cat([row, 24 + now]) for row, now in zip(left, decoder.left[0], strict=True)]}
        decoder.detach()
        wanted = masked_logits(model, on(inputs, more), left)[:, -1]
    torch.testing.assert_close(again, wanted, atol=1e-5 * float(wanted.abs().max()), rtol=0)


@pytest.mark.parametrize("cuts", CUTS)
def test_an_image_after_a_turn_of_text(cuts: str) -> None:
    """Nothing was cut in the first turn, and nobody gives a mask: the second one is cut all the same."""
    model, inputs = llama(), prompts(False)
    more, first = inputs["input_ids"], inputs["input_ids"].repeat(1, 2)[:, :30]
    decoder = attach(model, CUTS[cuts], images=lambda real: spans(real) if real.shape[1] == 24 else [])
    with torch.no_grad():
        cache = model(input_ids=first, use_cache=True).past_key_values
        found = model(input_ids=more, past_key_values=cache).logits[:, -1]
        left = {n: [torch.cat([torch.arange(30), 30 + row]) for row in rows] for n, rows in decoder.left.items()}
        decoder.detach()
        ids = torch.cat([first, more], 1)
        wanted = masked_logits(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, left)[:, -1]
    assert any(len(row) < 54 for rows in left.values() for row in rows)
    torch.testing.assert_close(found, wanted, atol=1e-5 * float(wanted.abs().max()), rtol=0)


def test_only_some_rows_have_an_image() -> None:
    model, inputs = llama(), prompts(True)
    decoder = attach(model, CUTS["layers"], images=lambda real: spans(real, (1,)))
    with torch.no_grad():
        found = model(**inputs).logits[0]
        decoder.detach()
        torch.testing.assert_close(found, model(**inputs).logits[0], atol=1e-4, rtol=1e-4)


def test_refusals() -> None:
    model, inputs = llama(), prompts(False)
    decoder = attach(model, CUTS["input"])
    with pytest.raises(UsageError, match="whose size is fixed"), torch.no_grad():
        model(**inputs, past_key_values=StaticCache(config=model.config, max_cache_len=64))
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        for held in cache.layers:
            held.keys, held.values = held.keys[:, :, :10], held.values[:, :, :10]
        with pytest.raises(UsageError, match="cut back"):
            model(input_ids=inputs["input_ids"][:, :1], past_key_values=cache)
    four = torch.ones(2, 1, 24, 24, dtype=torch.bool)
    with pytest.raises(UsageError, match="attention mask"), torch.no_grad():
        model(**{**inputs, "attention_mask": four})
    decoder.detach()
    model.config.layer_types = ["sliding_attention"] * 6
    with pytest.raises(UsageError, match="without full attention"):
        attach(model, CUTS["layer"])


def test_detaching_leaves_no_hook() -> None:
    model = llama()
    attach(model, CUTS["layers"]).detach()
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
