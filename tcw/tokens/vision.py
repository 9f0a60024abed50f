"""Where pictures stand in a batch, and what the vision tower did with each.

A model's own functions are watched while it runs: `get_image_features` and `get_video_features` give features to put
in place of placeholder tokens, in reading order over the batch; the projector's input is the tower's output. From
these and the placeholders follows which column of which row is which patch of which picture. Nothing is computed
twice but where tokens come from (tcw/tokens/pack.py).

`generate` of transformers 5.23 calls the tower before the language model, and repeats what it gave for beams; earlier
ones repeat the pixels. Both are followed.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tcw.errors import UsageError
from tcw.tokens import pack
from tcw.tokens._views import View, Views, grids_of
from tcw.tokens.context import TowerView
from tcw.tokens.pack import Grid
from tcw.tokens.shape import inner_of, tower_of

_SEEN = "_tcw_seen"
_A = {"image": "an image", "video": "a video"}
_SOURCES = {"image": "get_image_features", "video": "get_video_features"}


@dataclass
class Picture:
    """An image or video of a batch, with N visual tokens.

    Attributes:
        sample: its row of the batch.
        number: which picture of that row it is, from 0.
        video: it is a video.
        columns: int64 [N], where its visual tokens stand in the row.
        separators: int64 [M], columns of its newlines, or of a class token among its tokens.
        closes: int64 [N], the separator (0..M-1) that ends the row of each token, or -1. One stays if any of its
            tokens does; one that ends no row stays if any token of the picture does.
        grid: (frames, rows, columns) as in `Context`.
        place: float32 [N, 3], as in `Context`.
        tower: what the tower did; its `arrange` maps [crops, patches, c] to these N tokens. None: not seen. Repetitions
            of a picture for beams share it.
        patches: int64 [N], crop * patches of a crop + patch that the token is, crops counted from the picture's first;
            -1: no single one.
    """

    sample: int
    number: int
    video: bool
    columns: Tensor
    separators: Tensor
    closes: Tensor
    grid: Grid
    place: Tensor
    tower: TowerView | None
    patches: Tensor


@dataclass
class _Forward:
    """A forward call of the model that is going on."""

    arguments: dict[str, Any]
    outputs: dict[str, Any] = field(default_factory=dict)


class Vision:
    """Watches a vision-language model from now until `detach`.

    Args:
        model: the model.
        layers: how many layers of the tower make the features -> numbers of those whose attention is recorded;
            negative ones count from there.
        note: takes a sentence where something had to be substituted.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: Callable[[int], set[int]],
        note: Callable[[str], None] = lambda words: None,
    ) -> None:
        self._inner, self._note = inner_of(model), note
        self._signature = inspect.signature(self._inner.forward)
        self._views = Views(self._inner, tower_of(model), layers, note)
        self._forward: _Forward | None = None
        self._before: dict[str, Any] = {}
        for kind, name in _SOURCES.items():
            if hasattr(self._inner, name):
                self._wrap(name, functools.partial(self._watch, kind))
        if pack.packing_of(self._inner) == pack.TILES:
            self._wrap("pack_image_features", self._watch_pack)
        self._hooks = [
            self._inner.register_forward_pre_hook(self._begin, with_kwargs=True),
            self._inner.register_forward_hook(self._end, always_call=True),
        ]

    def pictures(self) -> list[Picture]:
        """The pictures of the forward call that is going on, in reading order; none in decoding or for text only.

        Raises UsageError for a picture of no tokens, and for one that stands in two rows.
        """
        if self._forward is None:
            return []
        given = self._forward.arguments.get("mm_encoder_outputs") or {}
        found: list[Picture] = []
        for kind in _SOURCES:
            output = self._forward.outputs.get(kind, given.get(kind))
            if output is not None:
                found += self._placed(kind, output, self._forward.arguments)
        found.sort(key=lambda one: (one.sample, int(one.columns[0])))
        for n, one in enumerate(found):
            one.number = sum(other.sample == one.sample for other in found[:n])
        return found

    def detach(self) -> None:
        """Stop watching; the model is as it was."""
        for hook in self._hooks:
            hook.remove()
        for name, before in self._before.items():
            if before is None:
                delattr(self._inner, name)
            else:
                setattr(self._inner, name, before)
        self._views.detach()
        self._forward = None

    # What is watched.

    def _wrap(self, name: str, watch: Callable[..., Any]) -> None:
        self._before[name] = vars(self._inner).get(name)
        original = getattr(self._inner, name)

        # `generate` reads the function's signature.
        @functools.wraps(original)
        def watched(*args: Any, **kwargs: Any) -> Any:
            return watch(original, *args, **kwargs)

        setattr(self._inner, name, watched)

    def _watch(self, kind: str, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._views.passage is not None:  # Qwen3-VL's get_video_features calls get_image_features
            return original(*args, **kwargs)
        passage = self._views.begin(kind)
        try:
            output = original(*args, **kwargs)
            if hasattr(output, "pooler_output"):
                arguments = inspect.signature(original).bind_partial(*args, **kwargs).arguments
                # The features are looked at later, perhaps repeated for beams, but as the same object.
                setattr(output, _SEEN, self._views.of(passage, _counts(output), arguments))
                if self._forward is not None:
                    self._forward.outputs[kind] = output
        finally:
            self._views.end()
        return output

    def _watch_pack(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._views.passage is not None:
            self._views.passage.packed = dict(inspect.signature(original).bind(*args, **kwargs).arguments)
        return original(*args, **kwargs)

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments = self._signature.bind_partial(*args, **kwargs).arguments
        arguments.update(arguments.pop("kwargs", {}))
        self._forward = _Forward(arguments)

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._forward = None

    def _placed(self, kind: str, output: Any, arguments: dict[str, Any]) -> list[Picture]:
        """The pictures whose features `output` holds, at the placeholders that they replace."""
        counts = _counts(output)
        if 0 in counts:
            raise UsageError(f"{_A[kind]} of zero tokens has no place in the text", "leave it out")
        where = self._placeholders(kind, arguments).nonzero()
        runs = where.split(counts)  # the model has checked that there are as many placeholders as features
        rows = [int(run[0, 0]) for run in runs]
        if any(int(run[-1, 0]) != row for run, row in zip(runs, rows, strict=True)):
            raise UsageError(
                f"the tokens of {_A[kind]} stand in two samples",
                "give each sample its own, and where samples with several are repeated for beams, update transformers",
            )
        found = []
        for n, (layout, view) in enumerate(self._matched(kind, output, rows, arguments)):
            columns, of = runs[n][:, 1], where.device
            found.append(
                Picture(
                    sample=rows[n],
                    number=0,
                    video=kind == "video",
                    columns=columns[layout.real.to(of)],
                    separators=columns[layout.separators.to(of)],
                    closes=layout.closes.to(of),
                    grid=layout.grid,
                    place=layout.place.to(of),
                    tower=view,
                    patches=layout.patches.to(of),
                )
            )
        return found

    def _placeholders(self, kind: str, arguments: dict[str, Any]) -> Tensor:
        """Where features go: bool [B, L], found as the models find it."""
        token = getattr(self._inner.config, f"{kind}_token_id")
        ids = arguments.get("input_ids")
        if ids is not None:
            return ids == token
        embeds = arguments["inputs_embeds"]
        return (embeds == self._inner.get_input_embeddings()(torch.tensor(token, device=embeds.device))).all(-1)

    def _matched(self, kind: str, output: Any, rows: list[int], arguments: dict[str, Any]) -> list[View]:
        """For each entry of the features its picture; `rows` are the samples that the entries belong to."""
        counts = _counts(output)
        pictures: list[View] = getattr(output, _SEEN, [])
        matched = pictures
        if pictures and len(counts) > len(pictures) and len(counts) % len(pictures) == 0:
            matched = [pictures[n] for n in _unexpanded(rows, len(counts) // len(pictures))]
        if [layout.tokens for layout, _ in matched] == counts:
            return matched
        self._note("features were given from outside: what the tower did is not known")
        grids = grids_of(self._inner, kind, arguments, len(counts))
        return [(pack.unknown(n, grid), None) for n, grid in zip(counts, grids, strict=True)]


def _unexpanded(rows: list[int], times: int) -> list[int]:
    """Numbers of the pictures before each sample, with all its pictures, was repeated `times` times in a row."""
    before = {}  # sample -> pictures of samples before it
    counted = 0
    for sample in sorted({row // times for row in rows}):
        before[sample] = counted
        counted += rows.count(sample * times)
    return [before[row // times] + n - rows.index(row) for n, row in enumerate(rows)]


def _counts(output: Any) -> list[int]:
    """Tokens of each picture of a call."""
    features = output.pooler_output
    entries = [features] if isinstance(features, Tensor) and features.dim() == 2 else features
    counts = [len(one) for one in entries]
    seen: list[View] = getattr(output, _SEEN, [])
    if seen and all(layout.tokens == n + 1 for (layout, _), n in zip(seen, counts, strict=False)):
        return [n + 1 for n in counts]  # transformers 5.17 puts the newline of LLaVA-OneVision's videos there later
    return counts
