"""What the tower did with each picture of a call, and which tokens it makes (tcw/tokens/vision.py places them)."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tcw.errors import UsageError
from tcw.tokens import pack
from tcw.tokens.context import Looked, TowerView
from tcw.tokens.pack import Grid, Layout
from tcw.tokens.shape import depth_of, has_class_token
from tcw.tokens.watch import Recording, blocks_of

View = tuple[Layout, TowerView | None]
"""The tokens of a picture, and what the tower did with it (None: not seen)."""


@dataclass
class Passage:
    """Pictures on their way through the tower.

    Attributes:
        kind: "image" or "video".
        hidden: the projector's input.
        packed: arguments of `pack_image_features`.
    """

    kind: str
    hidden: Tensor | None = None
    packed: dict[str, Any] = field(default_factory=dict)


class Views:
    """Watches the tower of a vision-language model from now until `detach`; see `Vision` for the arguments."""

    def __init__(
        self,
        inner: PreTrainedModel,
        tower: PreTrainedModel,
        layers: Callable[[int], set[int]],
        note: Callable[[str], None],
    ) -> None:
        self.passage: Passage | None = None
        self._inner, self._tower, self._note = inner, tower, note
        self._packing, self._cls = pack.packing_of(inner), has_class_token(tower)
        self._depth = depth_of(inner, len(blocks_of(tower)))
        self._layers = {n: self._recorded(n) for n in sorted(_within(layers(self._depth), self._depth))}
        self._recording = Recording(tower, sorted(set(self._layers.values())))
        projector = _projector(inner, tower)
        self._hook = projector.register_forward_pre_hook(self._keep_hidden) if projector is not None else None

    def detach(self) -> None:
        """Stop watching; the tower is as it was."""
        if self._hook is not None:
            self._hook.remove()
        self._recording.detach()

    def begin(self, kind: str) -> Passage:
        """Pictures go in."""
        self._recording.clear()
        self.passage = Passage(kind)
        return self.passage

    def end(self) -> None:
        """They are through, or failed."""
        self.passage = None
        self._recording.clear()

    def _keep_hidden(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self.passage is not None and args:
            self.passage.hidden = args[0].detach()

    def _recorded(self, layer: int) -> int:
        """The layer that stands in for one whose attention does not see the whole picture (Qwen2.5-VL's windows)."""
        full = getattr(self._tower.config, "fullatt_block_indexes", None)
        if not full or layer in full:
            return layer
        nearest = max((n for n in full if n < layer), default=min(full))
        self._note(f"layer {layer} of the tower sees windows only: layer {nearest}, which sees all, stands in for it")
        return nearest

    def of(self, passage: Passage, counts: list[int], arguments: dict[str, Any]) -> list[View]:
        """Layouts and views of the pictures of a call of `get_image_features` or `get_video_features`.

        Args:
            passage: what was seen of the call.
            counts: tokens of each picture.
            arguments: what the function was called with.
        """
        layouts = self._layouts(passage, counts, arguments)
        lengths = [per for layout, per in layouts for _ in range(layout.crops)]
        hidden = None if passage.hidden is None else self._sequences(passage.hidden, lengths)
        looked = {n: self._looked(n, m, lengths) for n, m in self._layers.items()} if lengths else {}
        pictures: list[View] = []
        done = 0
        for layout, per in layouts:
            if not layout.crops:
                pictures.append((layout, None))
                continue
            mine = slice(done, done := done + layout.crops)
            view = TowerView(
                depth=self._depth,
                has_cls=self._cls,
                looked={n: sequences[mine] for n, sequences in looked.items()},
                arrange=layout.arrange,
                hidden=None if hidden is None else torch.stack([one[-per:] for one in hidden[mine]]),
            )
            pictures.append((layout, view))
        return pictures

    def _layouts(self, passage: Passage, counts: list[int], arguments: dict[str, Any]) -> list[tuple[Layout, int]]:
        """For each picture of a call its layout and the number of patches of a crop."""
        if self._packing == pack.PATCHES:
            grids = [(int(t), int(h), int(w)) for t, h, w in arguments[f"{passage.kind}_grid_thw"].tolist()]
            vision = self._inner.config.vision_config
            return [(pack.folded(vision, grid), grid[1] * grid[2]) for grid in grids]
        if self._packing == pack.FIXED and arguments.get("image_sizes") is None:
            per = pack.side_of(self._inner) ** 2
            return [(pack.fixed(self._inner, n) if n >= per else pack.unknown(n), per) for n in counts]
        if self._packing == pack.TILES:
            per = pack.side_of(self._inner) ** 2
            if passage.kind == "video":
                frames = next(iter(arguments.values())).shape[1]
                return [(pack.pooled(self._inner, frames), per) for _ in counts]
            options = dict(passage.packed)
            parts, sizes = options.pop("image_features"), options.pop("image_sizes")
            options.pop("image_newline", None)
            return [
                (pack.tiled(self._inner, len(tiles), size, **options), per)
                for tiles, size in zip(parts, sizes, strict=True)
            ]
        known = grids_of(self._inner, passage.kind, arguments, len(counts))
        return [(pack.unknown(n, grid), 0) for n, grid in zip(counts, known, strict=True)]

    def _looked(self, layer: int, recorded: int, lengths: list[int]) -> list[Looked]:
        """What a layer's attention was called with, one entry for each crop or frame of the call."""
        calls = self._recording.calls[recorded]
        if not calls:
            raise UsageError(
                f"`{type(self._tower).__name__}` does not call its attention as transformers' models do",
                "use a policy that needs no attention of the tower, such as `divprune`",
            )
        joined = 2 if self._packing == pack.PATCHES else 0
        queries = self._sequences(torch.cat([q for q, _, _ in calls], joined), lengths)
        keys = self._sequences(torch.cat([k for _, k, _ in calls], joined), lengths)
        for one, length in zip(queries, lengths, strict=True):
            if one.shape[-2] != length + int(self._cls):
                raise UsageError(
                    f"layer {layer} of the tower has only {one.shape[-2] - int(self._cls)} of {length} patches left",
                    "attach a policy that looks at the tower's attention without one that cuts tokens inside it",
                )
        return [Looked(q, k, calls[0][2], self._cls) for q, k in zip(queries, keys, strict=True)]

    def _sequences(self, x: Tensor, lengths: list[int]) -> list[Tensor]:
        """Divide [crops, ..., S, d] or, where all crops are one sequence, [1, ..., sum of S, d] into [..., S, d]."""
        if self._packing != pack.PATCHES:
            return list(x)
        return [one.reshape(*x.shape[1:-2], -1, x.shape[-1]) for one in x.split(lengths, -2)]


def grids_of(inner: PreTrainedModel, kind: str, arguments: dict[str, Any], count: int) -> list[Grid | None]:
    """Grids of the tokens of each of `count` pictures, where the model was given such."""
    grids = arguments.get(f"{kind}_grid_thw")
    if grids is None or len(grids) != count:
        return [None] * count
    merge = getattr(inner.config.vision_config, "spatial_merge_size", 1)
    return [(int(t), int(h) // merge, int(w) // merge) for t, h, w in grids.tolist()]


def _within(layers: set[int], depth: int) -> set[int]:
    for n in layers:
        if not -depth <= n < depth:
            raise UsageError(
                f"layer {n} of the tower is not one of the {depth} that make the features", "name an earlier layer"
            )
    return {n % depth for n in layers}


def _projector(inner: PreTrainedModel, tower: PreTrainedModel) -> nn.Module | None:
    """The module whose input is the tower's output."""
    return getattr(inner, "multi_modal_projector", None) or getattr(tower, "merger", None)
