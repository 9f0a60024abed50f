"""What a method sees of one image (or video) at one stage. N tokens, D features, L tokens of text."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class Looked:
    """Queries and keys of one attention layer for one sequence (a picture, a crop or a frame of the tower).

    Attributes:
        queries, keys: [H, S, head_dim], as they enter the product (after RoPE).
        scaling: what q·k is multiplied with.
        cls: the sequence starts with a class token.
    """

    queries: Tensor
    keys: Tensor
    scaling: float
    cls: bool

    def rows(self, queries: Tensor) -> Tensor:
        """Attention of the tokens `queries` (int64 [m]) to all, mean over heads: float32 [m, S]."""
        logits = self.queries[:, queries].float() @ self.keys.float().mT * self.scaling
        return logits.softmax(-1).mean(0)

    def cls_row(self) -> Tensor:
        """What the class token attends to: float32 [patches]; without one, what all patches do (`received`)."""
        return (
            self.rows(torch.zeros(1, dtype=torch.int64, device=self.keys.device))[0, 1:]
            if self.cls
            else self.received()
        )

    def received(self) -> Tensor:
        """Attention that each patch receives from all patches, their mean: float32 [patches]."""
        first = int(self.cls)
        patches = torch.arange(first, self.queries.shape[1], device=self.keys.device)
        return self.rows(patches).mean(0)[first:]

    def mean_keys(self) -> Tensor:
        """Keys of the patches, mean over heads: float32 [patches, head_dim]."""
        return self.keys.float().mean(0)[int(self.cls) :]


@dataclass(frozen=True)
class TowerView:
    """What the vision tower did with an image.

    Attributes:
        depth: layers that have run; the last one is `depth - 1`.
        has_cls: it has a class token. Where it has not, `cls` is the attention that tokens receive (column means): the
            substitute that VisPruner's authors name; say so with `Context.note`.
        looked: by layer that a stage asked for (`Stage.layers`), one entry for each crop or frame.
        arrange: [crops, patches, c] -> [N, c]: brings what the tower has to the tokens at hand (2x2 fold, packing,
            earlier cuts).
        hidden: the tower's output, [crops, patches, C], or None.
    """

    depth: int
    has_cls: bool
    looked: dict[int, Sequence[Looked]]
    arrange: Callable[[Tensor], Tensor]
    hidden: Tensor | None = None

    def cls(self, layers: Sequence[int]) -> Tensor:
        """What the class token attends to, mean over heads, sum over `layers` (negative: from the end): [N]."""
        found = [torch.stack([one.cls_row() for one in self.looked[n % self.depth]]) for n in layers]
        return self.arrange(torch.stack(found).sum(0)[..., None])[:, 0]

    def received(self, layers: Sequence[int]) -> Tensor:
        """Attention received from all patches, mean over heads, sum over `layers`: [N]."""
        found = [torch.stack([one.received() for one in self.looked[n % self.depth]]) for n in layers]
        return self.arrange(torch.stack(found).sum(0)[..., None])[:, 0]

    def keys(self, layer: int = -1) -> Tensor:
        """Keys of one layer, mean over heads: [N, head_dim]."""
        return self.arrange(torch.stack([one.mean_keys() for one in self.looked[layer % self.depth]]))

    def features(self) -> Tensor:
        """The tower's output before the projector: [N, C]."""
        assert self.hidden is not None
        return self.arrange(self.hidden.float())


@dataclass(frozen=True)
class Rows:
    """Attention of a language-model layer from text to this image's tokens: softmax over all that a token sees.

    Attributes:
        attention: float32 [H, L, N]: from each of the sample's text tokens after the image (the last: the prompt's).
        logits: the same before the softmax.
    """

    attention: Tensor
    logits: Tensor

    def last(self) -> Tensor:
        """From the last token of the prompt, mean over heads: [N]."""
        return self.attention[:, -1].mean(0)

    def text(self) -> Tensor:
        """From every text token after the image, mean over heads: [L, N]."""
        return self.attention.mean(0)


class LazyRows(Rows):
    """Rows that are computed when they are first asked for: few methods do.

    Args:
        compute: gives attention and logits, each float32 [H, L, N].
    """

    def __init__(self, compute: Callable[[], tuple[Tensor, Tensor]]) -> None:
        object.__setattr__(self, "_compute", cache(compute))

    @property
    def attention(self) -> Tensor:
        """Float32 [H, L, N]."""
        return self._compute()[0]  # type: ignore[attr-defined]

    @property
    def logits(self) -> Tensor:
        """The same before the softmax."""
        return self._compute()[1]  # type: ignore[attr-defined]


@dataclass
class Context:
    """One image's tokens at a stage.

    Attributes:
        x: float32 [N, D], what they are here: tower hidden states, projected features, or a layer's input.
        grid: (frames, rows, columns) of the image as a whole; (1, 1, n) where it has no grid.
        place: float32 [N, 3], frame, row and column of each token. Of an image in crops, the overview is frame 0 and
            the rest frame 1, in its own rows and columns.
        original: how many tokens the image would have without any cut.
        alive: int64 [N], which of those these are.
        size: float32 [N], for how many of those each stands.
        text: float32 [L, D], the sample's text tokens at the same place, padding left out; None: there is no text. In a
            plain tower: the class token, [1, D], if it has one.
        tower: what the vision tower did; None: not asked for.
        rows: attention from the text; None: not at a layer. In a plain tower: from the class token in this block (or
            what tokens receive).
        note: takes a sentence for the report, once however often it is said.
        seed: of all that is drawn at random; the same for every image, so that a batch equals its parts.
    """

    x: Tensor
    grid: tuple[int, int, int]
    place: Tensor
    original: int
    alive: Tensor
    size: Tensor
    text: Tensor | None = None
    tower: TowerView | None = None
    rows: Rows | None = None
    note: Callable[[str], None] = field(default=lambda words: None)
    seed: int = 0

    @property
    def tokens(self) -> int:
        """N."""
        return len(self.x)

    @property
    def frames(self) -> int:
        """How many frames there are."""
        return self.grid[0]

    def generator(self) -> torch.Generator:
        """A fresh source of random numbers on the CPU."""
        return torch.Generator().manual_seed(self.seed)
