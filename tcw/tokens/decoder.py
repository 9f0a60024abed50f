"""Cutting tokens in a language model: before its first layer, and before later ones.

Hooks on the text model and its layers shorten what goes in: hidden states, positions, masks, deepstack features. A
cache then holds fewer tokens in some layers than in others. Which tokens those are is remembered with the cache itself,
so several texts can be generated at a time, beams reordered and turns added; without a cache nothing is remembered.
Where nothing is cut nothing is touched: the model computes bit for bit what it always does.

Tokens have numbers: their columns in the text as the model would have it, over all calls; -1 is padding. Layers between
two cuts are a *level* and hold the same tokens. Rows of a batch that keep different numbers of tokens are filled up at
the left. B batch, S tokens of a call, L of them left.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from tcw.tokens import COMPACT, DECODE, Stage
from tcw.tokens.caches import keep_only, refuse_cache, refuse_windows
from tcw.tokens.context import Context, LazyRows, Rows
from tcw.tokens.cuts import Image, plan_stage
from tcw.tokens.positions import after, at_rows, closed, following, full, gathered, padded, real_of, visible
from tcw.tokens.watch import blocks_of, queries_keys

_HISTORY = "_tcw_tokens"
_QUERIES = 256  # text tokens whose attention a method may look at, the last ones: all would take memory without bound


@dataclass(frozen=True)
class Level:
    """Tokens in the caches of a level's layers: their numbers, int64 [B, n], and the position that comes next, [B]."""

    ids: Tensor
    next: Tensor | None = None


@dataclass(frozen=True)
class History:
    """What a cache holds: its levels, and how many tokens there were, padding included."""

    levels: tuple[Level, ...]
    seen: int


@dataclass
class Call:
    """One call of the text model, from the first layer to the last.

    Attributes:
        before: what the cache held.
        length: S.
        images: those among the call's tokens.
        text: bool [B, S], which tokens are text.
        ids: int64 [B, L], numbers of the tokens that are left at the level where the call is now.
        index: int64 [B, L], where those stand among the tokens that went into the first layer.
        positions: [axes, B, L].
        levels: what the cache will hold.
        left: `ids` at each of these levels.
        touched: something was cut, in this call or before.
    """

    before: History
    length: int
    images: list[Image]
    text: Tensor
    ids: Tensor
    index: Tensor
    positions: Tensor
    touched: bool
    levels: list[Level] = field(default_factory=list)
    left: list[Tensor] = field(default_factory=list)
    saved: dict[int, tuple[Tensor, Any, Tensor]] = field(default_factory=dict)
    override: dict[str, Any] = field(default_factory=dict)

    def enter(self, positions: Tensor, compact: bool) -> None:
        """Go on to the next level, whose tokens are `ids`, at these positions."""
        level, real = self.before.levels[len(self.levels)], self.ids >= 0
        self.left.append(self.ids)
        self.positions = closed(positions, real, level.next) if compact else positions
        self.levels.append(Level(torch.cat([level.ids, self.ids], 1), after(self.positions, real, level.next)))

    def take(self, index: Tensor) -> None:
        """Leave the tokens `index` [B, L'] (of those that are left; -1: padding)."""
        self.ids = gathered(self.ids + 1, index) - 1
        self.index = gathered(self.index + 1, index) - 1
        self.positions = at_rows(self.positions[..., None], index)[..., 0]

    def slots(self, row: int, columns: Tensor) -> Tensor:
        """Where tokens, given by their columns in the call, stand now."""
        return _lookup(self.ids[row], columns + self.before.seen)


def _lookup(ids: Tensor, wanted: Tensor) -> Tensor:
    """Where each of `wanted` stands in a row of numbers."""
    order = ids.argsort(stable=True)
    return order[torch.searchsorted(ids[order], wanted)]


class Decoder:
    """The hooks on one text model.

    Attributes:
        left: of the last call with images, for the first layer (0) and each layer before which tokens are cut: the
            columns of the tokens that it and the following layers see, int64 for each row.
    """

    def __init__(
        self,
        text_model: nn.Module,
        stages: Sequence[tuple[int, Stage]],
        images: Callable[[Tensor], list[Image]],
        *,
        positions: str,
        note: Callable[[str], None],
        seed: int = 0,
    ) -> None:
        """Attach.

        Args:
            text_model: a decoder of transformers that gets `inputs_embeds` or `input_ids`.
            stages: (layer, stage), in the order in which they run; "input" stages first, with any number.
            images: real (bool [B, S]) -> the images among the tokens of the call that is going on.
            positions: "keep" or "compact".
            note: takes sentences for the report.
            seed: of what methods draw.
        """
        self._model, self._images, self._note, self._seed = text_model, images, note, seed
        self._compact = positions == COMPACT
        self._layers = blocks_of(text_model)
        self._input = [stage for _, stage in stages if stage.at.kind == "input"]
        self._later: dict[int, list[Stage]] = {}
        for n, stage in stages:
            if stage.at.kind == "layer":
                self._later.setdefault(n, []).append(stage)
        self._trims = any(stage.at == DECODE for _, stage in stages)
        self._probed = {max(0, n + stage.probe) for n, found in self._later.items() for stage in found}
        self._call: Call | None = None
        self.left: dict[int, list[Tensor]] = {}
        refuse_windows(text_model, self._later)
        self._handles = [
            text_model.register_forward_pre_hook(self._enter, with_kwargs=True),
            text_model.register_forward_hook(self._leave, with_kwargs=True, always_call=True),
        ]
        first = min([*self._later, *self._probed], default=len(self._layers))
        for n in range(first, len(self._layers)):
            self._handles.append(self._layers[n].register_forward_pre_hook(self._layer_hook(n), with_kwargs=True))

    def detach(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()

    # before the first layer

    def _enter(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        self._call = None
        embeds, cache = _embeds(module, args, kwargs), kwargs.get("past_key_values")
        history: History | None = getattr(cache, _HISTORY, None)
        held = cache.get_seq_length() if cache is not None else 0
        real = real_of(kwargs.get("attention_mask"), embeds, held)
        images = self._images(real[:, -embeds.shape[1] :])
        if history is None and not images:
            return None
        refuse_cache(cache, history.levels[0].ids.shape[1] if history else held)
        call = self._begin(history or self._unseen(real, held), real[:, -embeds.shape[1] :], images, kwargs)
        call.touched = history is not None
        embeds, keep = self._cut_input(call, embeds)
        self._call = call
        if keep is None and history is None:
            call.enter(call.positions, compact=False)
            return None
        return (), self._shortened(call, embeds, keep, kwargs)

    def _unseen(self, real: Tensor, held: int) -> History:
        """The history of a cache in which nothing was cut."""
        ids = torch.where(real[:, :held], torch.arange(held, device=real.device), -1)
        return History(tuple(Level(ids) for _ in range(1 + len(self._later))), held)

    def _begin(self, before: History, real: Tensor, images: list[Image], kwargs: dict[str, Any]) -> Call:
        batch, length = real.shape
        positions = full(kwargs.get("position_ids"), batch, length, before.seen, real.device)
        if not images and before.levels[0].next is not None:
            positions = following(real, before.levels[0].next).expand(len(positions), -1, -1)
        text = real.clone()
        for image in images:
            text[image.picture.sample, image.picture.columns] = False
            text[image.picture.sample, image.picture.separators] = False
        index = torch.arange(length, device=real.device).expand(batch, -1)
        return Call(before, length, images, text, torch.where(real, index + before.seen, -1), index, positions, False)

    def _cut_input(self, call: Call, embeds: Tensor) -> tuple[Tensor, Tensor | None]:
        """Embeddings after the stages at the input, and which of the call's tokens stay; None: all as they are."""
        for stage in self._input:
            embeds = self._apply(call, stage, "input", embeds, None)
        keep = torch.ones_like(call.text)
        for image in call.images:
            row, picture = image.picture.sample, image.picture
            keep[row, picture.columns] = keep[row, picture.separators] = False
            keep[row, image.columns] = keep[row, image.separators()] = True
        merged = any(image.trace.plan is not None and image.trace.plan.merges for image in call.images)
        return embeds, keep if merged or not bool(keep.all()) else None

    def _shortened(self, call: Call, embeds: Tensor, keep: Tensor | None, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The text model's arguments for the tokens that stay."""
        call.touched = True
        rows = [r.nonzero()[:, 0] for r in (torch.ones_like(call.text) if keep is None else keep)]
        index = padded(rows)
        call.take(index)
        call.index = torch.arange(index.shape[1], device=index.device).expand(len(index), -1)
        call.enter(call.positions, self._compact)
        changed = {
            "input_ids": None,
            "inputs_embeds": gathered(embeds, index),
            "attention_mask": (call.levels[0].ids >= 0).long(),
            "position_ids": call.positions if len(call.positions) > 1 else call.positions[0],
        }
        if kwargs.get("visual_pos_masks") is not None:
            changed |= _deepstack(call, kwargs["visual_pos_masks"], kwargs["deepstack_visual_embeds"], index)
        return {**{k: v for k, v in kwargs.items() if k != "cache_position"}, **changed}

    # before a later layer

    def _layer_hook(self, number: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            call = self._call
            if call is None:
                return None
            hidden = args[0] if args else kwargs["hidden_states"]
            if number in self._probed and call.images:
                call.saved[number] = (hidden, {**kwargs, **call.override}["position_embeddings"], call.ids)
            if number in self._later:
                hidden = self._cut_layer(call, number, hidden, kwargs)
            return (hidden, *args[1:]), {**kwargs, **call.override}

        return hook

    def _cut_layer(self, call: Call, number: int, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Cut before a layer, and make what this layer and the later ones are called with."""
        for stage in self._later[number]:
            hidden = self._apply(call, stage, f"layer {number}", hidden, number)
        index = padded([self._left(call, b) for b in range(len(hidden))])
        whole = torch.arange(hidden.shape[1], device=hidden.device).expand(len(hidden), -1)
        if not torch.equal(index, whole):
            call.touched = True
            hidden = gathered(hidden, index)
            call.take(index)
        call.enter(call.positions, self._compact)
        if call.touched:
            call.override = self._overrides(call, hidden, kwargs)
        return hidden

    def _left(self, call: Call, row: int) -> Tensor:
        """Which slots of a row stay: all but those of an image's dropped tokens and separators."""
        keep = torch.ones(call.ids.shape[1], dtype=torch.bool, device=call.ids.device)
        for image in call.images:
            if image.picture.sample == row:
                gone = torch.cat([image.picture.columns, image.picture.separators]) + call.before.seen
                stay = torch.cat([image.columns, image.separators()]) + call.before.seen
                keep &= ~torch.isin(call.ids[row], gone) | torch.isin(call.ids[row], stay)
        return keep.nonzero()[:, 0]

    def _overrides(self, call: Call, hidden: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        implementation = self._model.config._attn_implementation
        changed: dict[str, Any] = {"attention_mask": visible(call.ids, call.levels[-1].ids, implementation, hidden)}
        if self._compact:
            positions = call.positions if len(call.positions) > 1 else call.positions[0]
            changed["position_embeddings"] = self._model.rotary_emb(hidden, positions)
        else:
            changed["position_embeddings"] = tuple(at_rows(e, call.index) for e in kwargs["position_embeddings"])
        if kwargs.get("position_ids") is not None:
            changed["position_ids"] = gathered(kwargs["position_ids"], call.index)
        return changed

    # stages

    def _apply(self, call: Call, stage: Stage, name: str, hidden: Tensor, layer: int | None) -> Tensor:
        """Plan a stage for all images; the hidden states with what kept tokens take in."""
        rows = self._rows(call, stage, layer) if layer is not None and call.images else None
        plans = plan_stage(stage, call.images, lambda image: self._context(call, image, hidden, rows))
        for image, plan in zip(call.images, plans, strict=True):
            row = image.picture.sample
            slots = call.slots(row, image.columns)
            if plan.merges:
                hidden = hidden.clone()
                hidden[row, slots[plan.keep]] = plan.apply(hidden[row, slots])
            image.cut(name, plan)
        return hidden

    def _context(self, call: Call, image: Image, hidden: Tensor, rows: Callable[[Image], Rows] | None) -> Context:
        row, picture = image.picture.sample, image.picture
        text = call.slots(row, call.text[row].nonzero()[:, 0])
        return Context(
            x=hidden[row, call.slots(row, image.columns)].detach().float(),
            grid=picture.grid,
            place=picture.place[image.alive],
            original=len(picture.columns),
            alive=image.alive,
            size=image.size,
            text=hidden[row, text].detach().float() if len(text) else None,
            tower=image.tower(),
            rows=rows(image) if rows is not None else None,
            note=self._note,
            seed=self._seed,
        )

    def _rows(self, call: Call, stage: Stage, layer: int) -> Callable[[Image], Rows]:
        """Attention of the text after an image to its tokens, in the layer that the stage looks at.

        Tokens of earlier calls, which are only in the cache, are left out of the softmax. What is not asked for is not
        computed.
        """
        number = max(0, layer + stage.probe)
        hidden, embeddings, ids = call.saved[number]

        @cache
        def products() -> tuple[Tensor, Tensor, float]:
            self._call = None  # the layer is called once more, and is not to be cut in that
            try:
                with torch.no_grad():
                    return queries_keys(self._layers[number], hidden, embeddings)
            finally:
                self._call = call

        def rows(image: Image) -> tuple[Tensor, Tensor]:
            queries, keys, scaling = products()
            row, seen = image.picture.sample, call.before.seen
            asked = self._asking(call, image) + seen
            logits = queries[row][:, _lookup(ids[row], asked)].float() @ keys[row].float().mT * scaling
            sees = (ids[row][None, :] >= 0) & (ids[row][None, :] <= asked[:, None])
            attention = logits.masked_fill(~sees, -torch.inf).softmax(-1)
            columns = _lookup(ids[row], image.columns + seen)
            return attention[..., columns], logits[..., columns]

        return lambda image: LazyRows(partial(rows, image))

    def _asking(self, call: Call, image: Image) -> Tensor:
        """Columns of the text tokens after an image; of the last token of all, where there are none."""
        row = image.picture.sample
        text = call.text[row].nonzero()[:, 0]
        last = image.picture.columns[-1:]
        found = text[text > last] if len(last) else text
        return found[-_QUERIES:] if len(found) else (call.ids[row].max() - call.before.seen)[None]

    # after the last layer

    def _leave(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        call, self._call = self._call, None
        cache = getattr(output, "past_key_values", None)
        if call is None or output is None:
            return
        if call.images:
            rows = [[ids[ids >= 0] - call.before.seen for ids in level] for level in call.left]
            self.left = dict(zip([0, *sorted(self._later)], rows, strict=True))
        if not call.touched or cache is None:
            return
        if self._trims and call.images:
            self._trim(call, cache)
        setattr(cache, _HISTORY, History(tuple(call.levels), call.before.seen + call.length))

    def _trim(self, call: Call, cache: Any) -> None:
        """Take tokens that the last level no longer has out of the caches of the levels before it, but the first."""
        starts = [0, *sorted(self._later), len(self._layers)]
        for number in range(1, len(call.levels) - 1):
            level = call.levels[number]
            left = [(torch.isin(ids, last)).nonzero()[:, 0] for ids, last in
                    zip(level.ids, call.levels[-1].ids, strict=True)]  # fmt: skip
            index = padded(left)
            for layer in range(starts[number], starts[number + 1]):
                keep_only(cache, layer, index)
            call.levels[number] = Level(gathered(level.ids + 1, index) - 1, level.next)


def _embeds(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Tensor:
    found = kwargs.get("inputs_embeds")
    if found is not None:
        return found
    ids = args[0] if args else kwargs["input_ids"]
    return module.get_input_embeddings()(ids)


def _deepstack(call: Call, at: Tensor, features: list[Tensor], index: Tensor) -> dict[str, Any]:
    """Features that are added in the first layers, merged and shortened like the tokens themselves.

    `at`: bool [B, S], to which tokens; `features`: for each layer [visual tokens of the batch, D].
    """
    kept = gathered(at, index)
    out = []
    for one in features:
        spread = one.new_zeros(*at.shape, one.shape[-1])
        spread[at] = one
        for image in call.images:
            plan, row, columns = image.trace.plan, image.picture.sample, image.picture.columns
            if plan is not None and plan.merges:
                spread[row, image.columns] = plan.apply(spread[row, columns])
        out.append(gathered(spread, index)[kept])
    return {"visual_pos_masks": kept, "deepstack_visual_embeds": out}
