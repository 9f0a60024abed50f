"""A token policy on a model: methods put together, what they learned, and the hooks that carry it out.

    policy = TokenPolicy.make("visionzip:keep=0.2", model)
    attached = policy.attach(model)            # from now on: model(**inputs), model.generate(**inputs)
    attached.traces                            # what became of the images of the last batch
    attached.detach()

In a vision-language model the tower's blocks are cut by tcw/tokens/tower.py, the language model by decoder.py, and
vision.py says where images stand in a batch. A plain tower has only the first.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from tcw.errors import UsageError
from tcw.methods import qualified
from tcw.tokens import DECODE, KEEP, Shape, Stage
from tcw.tokens.cuts import Image
from tcw.tokens.decoder import Decoder
from tcw.tokens.plan import Plan
from tcw.tokens.shape import TOWER, VLM, kind_of, shape_of, text_model_of, tower_of
from tcw.tokens.tower import TowerRun
from tcw.tokens.trace import Trace
from tcw.tokens.vision import Picture, Vision

_log = logging.getLogger("tcw")
Learned = dict[str, dict[str, Tensor]]  # by method, by name
_ORDER = {"block": 0, "input": 1, "layer": 2, "decode": 3}


@dataclass(frozen=True)
class TokenPolicy:
    """Which visual tokens a model goes on with.

    Attributes:
        methods: in the user's order, by name.
        shape: of the model.
        learned: what calibration found, for each method that calibrates.
        seed: of what methods draw.
    """

    methods: dict[str, Any]
    shape: Shape
    learned: Learned = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.methods:
            raise UsageError("a token policy needs a method", "`tcw methods` lists those of the family tokens")
        if len({getattr(m, "positions", KEEP) for m in self.methods.values()}) > 1:
            raise UsageError("methods disagree about `positions`", "give all of them the same")
        if self.over_text and (self.shape.blocks or len(self.methods) > 1):
            raise UsageError(
                "a policy over a prompt's text stands alone, and on a model that reads only text",
                "use methods of the family tokens for a model with images",
            )
        if not self.over_text and not self.shape.blocks:
            raise UsageError(
                "this model takes no images: policies for visual tokens have nothing to cut",
                "`tcw methods` lists policies for text models, under `kv` and `prompt`",
            )
        self.stages()

    @classmethod
    def make(
        cls, specs: "str | Iterable[Any]", model: Any, images: "list[Tensor] | None" = None, seed: int = 0
    ) -> "TokenPolicy":
        """Put a policy together for a loaded model, and calibrate it where a method needs that.

        Args:
            specs: SPEC strings (`visionzip:keep=0.2`) or methods.
            model: a vision-language model, a vision tower, or for a text policy a causal language model.
            images: to calibrate on, each float32 [3, height, width] as the tower expects them.
            seed: of what methods draw.

        Raises:
            UsageError: methods that do not go together or that the model cannot serve; no images where some are needed.
        """
        policy = cls(named(specs), shape_of(model), seed=seed)
        return policy.calibrated(model, images)

    def calibrated(self, model: Any, images: "list[Tensor] | None") -> "TokenPolicy":
        """The policy with what its methods learn of images. Raises UsageError where there are none."""
        learned = dict(self.learned)
        for name, method in self.methods.items():
            if method.needs_calibration and name not in learned:
                if not self.shape.merges_inside:
                    raise _whole_grid(name)
                if not images:
                    raise UsageError(f"`{name}` is calibrated on images, and none were given", "`--calibration FOLDER`")
                with torch.no_grad():
                    learned[name] = method.calibrate(tower_of(model), images)
        return replace(self, learned=learned)

    @property
    def over_text(self) -> bool:
        """Whether the policy cuts a prompt's text, not images."""
        return any(getattr(method, "span", "visual") == "text" for method in self.methods.values())

    @property
    def positions(self) -> str:
        """Whether tokens keep their positions ("keep") or gaps are closed ("compact")."""
        return next(getattr(method, "positions", KEEP) for method in self.methods.values())

    def stages(self) -> list[tuple[int, Stage]]:
        """All stages, resolved for the model, in the order in which they run: (block or layer, stage).

        A method that has to learn first and has not is left out. Raises UsageError.
        """
        found: list[tuple[int, Stage, str]] = []
        for name, method in self.methods.items():
            if method.needs_calibration and name not in self.learned:
                continue
            for stage in method.stages(self.shape, self.learned.get(name, {})):
                if (resolved := _resolved(stage, self.shape, name)) is not None:
                    found.append((*resolved, name))
        found.sort(key=lambda one: (_ORDER[one[1].at.kind], one[0]))
        places: dict[tuple[str, int], str] = {}
        for number, stage, name in found:
            place = (stage.at.kind, number)
            if places.setdefault(place, name) != name:
                raise UsageError(f"`{places[place]}` and `{name}` cut at the same place", "leave one out")
        return [(number, stage) for number, stage, _ in found]

    def attach(self, model: Any) -> "Attached":
        """Have a model work under this policy until `Attached.detach`. Raises UsageError."""
        if getattr(model, "token_policy", None) is not None:
            raise UsageError("the model works under a token policy already", "detach that one first")
        missing = [n for n, m in self.methods.items() if m.needs_calibration and n not in self.learned]
        if missing:
            raise UsageError(f"`{missing[0]}` is not calibrated", "make the policy with `TokenPolicy.make`")
        return Attached(self, model)


def named(specs: "str | Iterable[Any]") -> dict[str, Any]:
    """Methods by name, out of SPEC strings or methods. Raises UsageError for what cuts no tokens, or comes twice."""
    from tcw import methods
    from tcw.recipe import parse_spec

    found: dict[str, Any] = {}
    for spec in [specs] if isinstance(specs, str) else specs:
        if isinstance(spec, str):
            name, colon, options = spec.partition(":")
            step = parse_spec(qualified(name, "tokens") + colon + options)
            name, method = methods.canonical(step.method), step.build()
        else:
            name, method = qualified(type(spec).__module__.rpartition(".")[2], "tokens"), spec
        if not hasattr(method, "stages"):
            raise UsageError(f"`{name}` cuts no tokens inside a model", "`tcw methods` lists the family tokens")
        if name in found:
            raise UsageError(f"`{name}` is given twice")
        found[name] = method
    return found


def _resolved(stage: Stage, shape: Shape, name: str) -> tuple[int, Stage] | None:
    """The number of a stage's block or layer in a model of this shape; None: the stage has no place there."""
    kind = stage.at.kind
    if not shape.layers:  # a plain tower
        if kind == "decode":
            return None
        number = min(max(stage.at.of(shape.blocks), 0), shape.blocks - 1)
        return number, stage if kind == "block" else replace(stage, at=replace(stage.at, kind="block"))
    if kind == "input":
        return 0, stage
    if kind == "decode":
        return shape.layers, stage
    if kind == "block":
        if not shape.merges_inside:
            raise _whole_grid(name)
        return min(max(stage.at.of(shape.blocks), 0), shape.blocks - 1), stage
    number = max(stage.at.of(shape.layers), 1, shape.deepstack)
    if number >= shape.layers:
        raise UsageError(f"`{name}` cuts at layer {number}, and the model has {shape.layers}", "name an earlier layer")
    return number, stage


def _whole_grid(name: str) -> UsageError:
    return UsageError(
        f"`{name}` cuts tokens inside the vision tower, and this model's tower needs its whole grid",
        "use a policy that cuts at the input, such as `visionzip` or `divprune`",
    )


class Attached:
    """A policy at work on a model. Also a context manager that detaches at its end.

    Attributes:
        policy: what is at work.
        notes: what had to be substituted, one sentence each.
    """

    def __init__(self, policy: TokenPolicy, model: Any) -> None:
        """Attach; use `TokenPolicy.attach`."""
        self.policy, self.notes = policy, []
        self._model, self._traces = model, []
        stages = policy.stages()
        inside = [(n, s) for n, s in stages if s.at.kind == "block"]
        later = [(n, s) for n, s in stages if s.at.kind != "block"]
        of = kind_of(model)
        self._vision = Vision(model, _layers(later), self._note) if of == VLM else None
        self._tower = None
        if inside:
            self._tower = TowerRun(tower_of(model), inside, policy.seed, self._note, restore=of == VLM)
        self._decoder = None
        if of != TOWER:
            self._decoder = Decoder(
                text_model_of(model), later, self._images, positions=policy.positions, note=self._note, seed=policy.seed
            )
        self._guard = model.register_forward_pre_hook(_refuse_labels, with_kwargs=True)
        model.token_policy = policy

    notes: list[str]
    _traces: list[Trace]

    @property
    def traces(self) -> list[Trace]:
        """What became of the images of the last batch that had any."""
        return self._tower.traces() if self._decoder is None and self._tower is not None else self._traces

    def detach(self) -> None:
        """Leave the model as it was."""
        for part in (self._decoder, self._tower, self._vision):
            if part is not None:
                part.detach()
        self._guard.remove()
        self._model.token_policy = None

    def __enter__(self) -> "Attached":
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def read_out(self, hidden: Tensor, how: str = "copy") -> Tensor:
        """A plain tower's `last_hidden_state` with a vector for every original patch: [B, N, D].

        `how`: "copy" or "residual" (tcw/tokens/tower.py). Raises UsageError for a model that is no plain tower.
        """
        if self._tower is None or self._vision is not None:
            raise UsageError("only the output of a plain vision tower under a policy can be read out")
        return self._tower.read_out(hidden, how)

    @property
    def left(self) -> dict[int, list[Tensor]]:
        """Columns of the tokens that each part of the language model saw of the last batch (tcw/tokens/decoder.py)."""
        return self._decoder.left if self._decoder is not None else {}

    def _note(self, words: str) -> None:
        if words not in self.notes:
            self.notes.append(words)
            _log.info("%s", words)

    def _images(self, real: Tensor) -> list[Image]:
        """The images of the call that is going on, cut as the tower has cut them."""
        if self.policy.over_text:
            pictures = _texts(real)
        else:
            pictures = self._vision.pictures() if self._vision is not None else []
        images = [Image(p, Trace(p.sample, p.number, p.grid, p.place)) for p in pictures]
        if self._tower is not None and images:
            self._inside(images)
        if images:
            self._traces = [image.trace for image in images]
        return images

    def _inside(self, images: list[Image]) -> None:
        """Leave one of the tokens that the tower has merged, unless the language model is to see them all."""
        assert self._tower is not None
        plans = self._tower.plans
        if any(getattr(method, "expand", False) for method in self.policy.methods.values()):
            return
        starts = _first_crops(images)
        for image in images:
            patches = image.picture.patches
            if not len(patches) or bool((patches < 0).any()) or starts.get(None) != len(plans):
                self._note("tokens were merged inside the tower only: the language model sees all of this image")
                continue
            per = len(plans[0].assign)
            image.cut("tower", _left_by_tower(plans, patches + per * starts[id(image.picture.tower)], per))


def _first_crops(images: list[Image]) -> dict[int | None, int]:
    """The number of each picture's first crop in the tower's batch, by what the tower did with it; under None: of all.

    Beams repeat a picture, and share what the tower did with it.
    """
    starts: dict[int | None, int] = {}
    total = 0
    for view in (image.picture.tower for image in images):
        if view is not None and view.hidden is not None and id(view) not in starts:
            starts[id(view)] = total
            total += len(view.hidden)
    return {**starts, None: total}


def _left_by_tower(plans: list[Plan], patches: Tensor, per: int) -> Plan:
    """One token of each group that the tower has merged: all of a group have its features already.

    `patches` int64 [N]: crop * `per` + patch of each token. The first token of a group stands for it: the patch that
    the tower chose may have been cut away as padding.
    """
    groups = [
        torch.where(p.assign >= 0, p.keep[p.assign.clamp(min=0)] + per * crop, -1) for crop, p in enumerate(plans)
    ]
    group = torch.cat(groups)[patches]
    used, number = group.unique(return_inverse=True)
    at = torch.arange(len(group), device=group.device)
    first = at.new_full((len(used),), len(group)).scatter_reduce_(0, number, at, "amin")
    keep, order = first[used >= 0].sort()
    rank = torch.full_like(used, -1)
    rank[(used >= 0).nonzero()[:, 0][order]] = torch.arange(len(order), device=used.device)
    return Plan.merging(keep, rank[number], torch.ones(len(group), device=group.device))


def _layers(stages: list[tuple[int, Stage]]) -> Any:
    """Depth of the tower -> the layers whose attention stages of the language model look at."""
    return lambda depth: {n for _, stage in stages for n in stage.layers(depth)}


def _texts(real: Tensor) -> list[Picture]:
    """A prompt's text as what may be cut: all tokens of each row but the last."""
    if real.shape[1] < 2:
        return []
    found = []
    for sample, row in enumerate(real):
        columns = row.nonzero()[:-1, 0]
        place = torch.zeros(len(columns), 3, device=real.device)
        place[:, 2] = torch.arange(len(columns), device=real.device)
        none = columns[:0]
        closes = torch.full_like(columns, -1)
        found.append(
            Picture(
                sample, 0, False, columns, none, closes, (1, 1, len(columns)), place, None, torch.full_like(columns, -1)
            )
        )
    return found


def _refuse_labels(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
    if kwargs.get("labels") is not None:
        raise UsageError(
            "a model under a token policy has logits only for the tokens that are left, so `labels` do not fit",
            "leave `labels` out, and compare with `Attached.traces` at hand",
        )


__all__ = ["DECODE", "Attached", "TokenPolicy", "named"]
