"""Token policies: which visual tokens a model goes on with, and what becomes of the others. One method a file.

A method is a list of stages. A stage says *where* tokens are cut (`At`), *what share* of the image's tokens is left
after it (`keep`, shared out over images by `allocate`) and *how* those are chosen (`plan`), made of primitives:

    Score     context -> how much each token matters                                   (tcw/tokens/scores.py)
    Select    context, scores, k -> the tokens that stay                               (tcw/tokens/selects.py)
    Merge     context, kept tokens -> what the kept ones take in of the others: a Plan (tcw/tokens/merges.py)
    Allocate  contexts, share -> k of each image                                       (tcw/tokens/allocates.py)
    Stage     the place in the model, and the four above                               (here)

The engine (tcw/tokens/engine.py) does the rest: it shows a method one image at a time (`Context`) and carries out the
`Plan` it gets back on features, positions, masks, deepstack features and the KV cache of a whole batch.

    block    in a block of the vision tower, between attention and MLP
    input    at the language model's input: the projector's output, all text known
    layer    before a layer of the language model, at prefill
    decode   after prefill: tokens that a later layer no longer has leave the caches of all since the first cut

In a model that is only a tower, `input` and `layer` become blocks at the same relative depth (`input`: a quarter).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from tcw.methods import Method, option

if TYPE_CHECKING:
    from torch import Tensor

    from tcw.tokens.context import Context
    from tcw.tokens.plan import Plan

ENGINE = (
    "allocates", "caches", "context", "cuts", "decoder", "engine", "flops", "inputs", "merges", "pack", "passes",
    "pictures", "plan", "positions", "scores", "selects", "shape", "stored", "tower", "trace", "vision", "watch",
)  # fmt: skip

KEEP, COMPACT = "keep", "compact"


@dataclass(frozen=True)
class At:
    """A place in a model.

    Attributes:
        kind: "block", "input", "layer" or "decode".
        index: number of the block or layer, from 0; None: by depth.
        depth: 0..1, how far into the tower's blocks or the language model's layers.
    """

    kind: str
    index: int | None = None
    depth: float = 0.25

    def of(self, count: int) -> int:
        """The block or layer among `count`."""
        return self.index if self.index is not None else round(self.depth * count)


INPUT, DECODE = At("input"), At("decode")


def block(index: int | None = None, depth: float = 0.25) -> At:
    """A block of the vision tower."""
    return At("block", index, depth)


def layer(index: int | None = None, depth: float = 0.5) -> At:
    """A layer of the language model: what it and all later ones see."""
    return At("layer", index, depth)


def no_layers(depth: int) -> tuple[int, ...]:
    """Look at the attention of no layer of the tower."""
    return ()


Score = Callable[["Context"], "Tensor"]
"""A context -> float32 [N]: higher stays."""
Select = Callable[["Context", "Tensor | None", int], "Tensor"]
"""A context, its scores (None: there are none) and k -> int64 [k], ascending."""
Merge = Callable[["Context", "Tensor"], "Plan"]
"""A context and the tokens that stay -> what becomes of all."""
Allocate = Callable[["list[Context]", float], "list[int]"]
"""The contexts of one sample's images and the share that is left of all their tokens together -> k of each."""


def choose(select: Select, merge: Merge, score: Score | None = None) -> "Callable[[Context, int | None], Plan]":
    """Put a stage's plan together from primitives."""

    def plan(context: "Context", k: int | None) -> "Plan":
        assert k is not None, "a selection needs a budget"
        return merge(context, select(context, score(context) if score else None, k))

    return plan


@dataclass(frozen=True)
class Stage:
    """One cut.

    Attributes:
        at: where.
        plan: what is kept and merged of one image's tokens: (context, k) -> Plan with exactly k tokens kept.
        keep: the share of the image's tokens, as the model would have them, that is left after this stage; None: `plan`
            is called with k = None and decides by what it sees.
        allocate: how `keep` is shared out over a sample's images; None: the same share of each.
        layers: depth of the tower -> numbers of its layers whose attention the primitives look at; `depth - 1` is the
            last one that has run (or, in a language model, that the features come from).
        probe: of a stage at layer k: attention rows (`Context.rows`) are those of layer k + probe; 0 or negative.
        whole: plan all images or frames of the batch as one: a method over the frames of a video given as a batch to
            a plain tower. A video in a vision-language model is one image with several frames anyway.
    """

    at: At
    plan: "Callable[[Context, int | None], Plan]"
    keep: float | None = None
    allocate: Allocate | None = None
    layers: Callable[[int], tuple[int, ...]] = field(default=no_layers)
    probe: int = 0
    whole: bool = False


@dataclass(frozen=True)
class Shape:
    """What a method may want to know of a model before it says what it does.

    Attributes:
        blocks: blocks of the vision tower, in a vision-language model those that its features come from.
        layers: layers of the language model; 0: there is none.
        has_cls: the tower has a class token.
        tokens: visual tokens of an image, where that is always the same; else 0.
        merges_inside: tokens may be cut inside the tower.
        deepstack: the language model's first layers into which tower features are added: no cut may come before that.
    """

    blocks: int
    layers: int
    has_cls: bool
    tokens: int = 0
    merges_inside: bool = True
    deepstack: int = 0


@dataclass(frozen=True)
class TokenMethod(Method):
    """A token policy. Gives its stages; learns on images first if `needs_calibration`.

    `keep` is the share of visual tokens that is left at the end; a method whose rule decides says so in its help line.
    `positions`: tokens keep the positions that they had, or gaps are closed.
    """

    family: ClassVar[str] = "tokens"
    video: ClassVar[bool] = False
    """The method is about the frames of a video; of a single image it makes what its docstring says."""
    static: ClassVar[bool] = False
    """How many tokens stay, and where, depends on no input: the schedule can be exported."""

    keep: float = option(0.25, "share of the visual tokens that is left")
    positions: str = option(KEEP, "positions of the tokens left: their own, or gaps closed", choices=(KEEP, COMPACT))

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise ValueError(f"`keep` is a share between 0 and 1, got {self.keep:g}")

    def reads_text(self) -> bool:
        """False: token policies learn from images."""
        return False

    def stages(self, shape: Shape, learned: "dict[str, Tensor]") -> tuple[Stage, ...]:
        """What the method does to a model of this shape; `learned` is what `calibrate` returned."""
        raise NotImplementedError

    def calibrate(self, model: object, images: "list[Tensor]") -> "dict[str, Tensor]":
        """Learn from images (each float32 [3, height, width], normalised as the tower expects them).

        `model` is a vision tower. What is returned is stored in the artifact.
        """
        return {}
