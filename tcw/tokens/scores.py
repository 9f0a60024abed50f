"""How much each token of an image matters. Every function here makes a `Score`: context -> float32 [N], higher stays.

    cls_attention         what the tower's class token looks at
    received_attention    what the tower's patches look at, their mean
    text_similarity       likeness to the text, in the language model's space
    last_row, text_rows   what the text looks at in a layer of the language model
    approximation_error   how badly a few tokens describe it
    norm, random_score    controls

`last` and `last_third` say which layers of the tower a score sums over; a stage names the same in `Stage.layers`.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from tcw.errors import UsageError
from tcw.tokens import Score
from tcw.tokens._similarity import farthest_points, unit
from tcw.tokens.context import Context, Rows, TowerView

Layers = Callable[[int], tuple[int, ...]]
"""How many layers of the tower have run -> numbers of those that are looked at."""

POOLS = ("mean", "max", "soft")
RIDGE = 1e-5


def last(depth: int) -> tuple[int, ...]:
    """The last layer that has run."""
    return (depth - 1,)


def last_third(depth: int) -> tuple[int, ...]:
    """The last third of the layers that have run, one at least: 16 to 22 of LLaVA's 23."""
    return tuple(range(min(math.ceil(2 * depth / 3), depth - 1), depth))


def min_max(values: Tensor) -> Tensor:
    """Shift and scale to 0..1, float32; where all are equal, all are 1."""
    values = values.float()
    low, high = values.min(), values.max()
    return torch.where(high > low, (values - low) / (high - low).clamp(min=torch.finfo(torch.float32).tiny), 1.0)


def tower_of(context: Context, need: str) -> TowerView:
    """What the tower did. Raises UsageError that names what the method needs of it, where it is not known."""
    if context.tower is None:
        raise UsageError(
            f"the method needs {need} of the vision tower, which is not known here",
            "use a method that looks at features only, such as `divprune`",
        )
    return context.tower


def cls_attention(layers: Layers = last) -> Score:
    """Attention of the tower's class token, mean over heads, sum over `layers`.

    A tower without one (SigLIP, Qwen-VL): the attention that a token receives from all, the substitute that the authors
    of VisPruner give (their repository, issue 1).
    """

    def score(context: Context) -> Tensor:
        tower = tower_of(context, "the attention of the class token")
        if not tower.has_cls:
            context.note("the vision tower has no class token: tokens are scored by the attention that they receive")
        return tower.cls(layers(tower.depth)).float()

    return score


def received_attention(layers: Layers = last) -> Score:
    """Attention that a token receives from all patches, mean over heads and patches, sum over `layers`."""

    def score(context: Context) -> Tensor:
        tower = tower_of(context, "attention")
        return tower.received(layers(tower.depth)).float()

    return score


def text_similarity(pool: str = "mean", temperature: float = 0.05, sign: int = 1) -> Score:
    """Cosine of a token and the sample's text tokens, pooled over these.

    Without any text (ours): likeness to the mean of the image's tokens, and a note.

    Args:
        pool: "mean", "max", or "soft": the mean weighted with the softmax of cosine / `temperature` (FlashVLM).
        temperature: of "soft".
        sign: -1 makes what is unlike the text matter.
    """
    if pool not in POOLS:
        raise ValueError(f"`pool` is one of {', '.join(POOLS)}, not {pool}")

    def score(context: Context) -> Tensor:
        cosine = unit(context.x) @ unit(_text(context)).T
        if pool == "mean":
            found = cosine.mean(1)
        elif pool == "max":
            found = cosine.max(1).values
        else:
            found = ((cosine / temperature).softmax(1) * cosine).sum(1)
        return sign * found

    return score


def _text(context: Context) -> Tensor:
    if context.text is not None and len(context.text):
        return context.text
    context.note("there is no text: tokens are compared with the mean of the image instead")
    return unit(context.x).mean(0, keepdim=True)


def rows_of(context: Context) -> Rows:
    """Attention from the text. Raises UsageError where the stage is not at a layer, or no text follows the image."""
    if context.rows is None:
        raise UsageError(
            "the method needs attention of a language-model layer, which is not known here",
            "put its stage at a layer, or use a method that needs no attention, such as `divprune`",
        )
    if not context.rows.attention.shape[1]:
        raise UsageError(
            "no text follows the image, so nothing in the language model looks at it",
            "put the question after the image, or use a method that needs no text, such as `divprune`",
        )
    return context.rows


def last_row() -> Score:
    """Attention of the prompt's last token, mean over heads."""

    def score(context: Context) -> Tensor:
        return rows_of(context).last().float()

    return score


def text_rows() -> Score:
    """Attention of the text tokens after the image, mean over heads and tokens."""

    def score(context: Context) -> Tensor:
        return rows_of(context).text().float().mean(0)

    return score


def residual(x: Tensor, basis: Tensor) -> Tensor:
    """How far each row of `x` [N, C] is from the best linear combination of the rows `basis` int64 [k]: float32 [N].

        W = X Sᵀ (S Sᵀ + λ I)⁻¹        e_i = ‖x_i - (W S)_i‖₂        λ = 1e-5 · mean of the diagonal of S Sᵀ

    ApET writes λ = 1e-5. Ours goes with the scale of the features, and k x k is solved in float64:
    tokens that are alike make it nearly singular.
    """
    x = x.float()
    S = x[basis]
    exact = S.cpu().double()
    gram = exact @ exact.T
    scale = gram.diagonal().mean()
    gram += torch.eye(len(gram), dtype=gram.dtype) * (RIDGE * scale if scale > 0 else 1.0)
    W = torch.linalg.solve(gram, (S @ x.T).cpu().double()).T.float().to(x.device)
    return torch.linalg.vector_norm(x - W @ S, dim=1)


def approximation_error(basis: int = 10) -> Score:
    """How badly `basis` far-apart tokens, at most half of the image's, describe each token (`residual`)."""

    def score(context: Context) -> Tensor:
        return residual(context.x, farthest_points(context.x, max(1, min(basis, context.tokens // 2))))

    return score


def norm() -> Score:
    """Length of a token."""

    def score(context: Context) -> Tensor:
        return torch.linalg.vector_norm(context.x.float(), dim=1)

    return score


def random_score(seed: int = 0) -> Score:
    """Random numbers: a control. `seed` is added to the context's."""

    def score(context: Context) -> Tensor:
        source = torch.Generator().manual_seed(context.seed + seed)
        return torch.rand(context.tokens, generator=source).to(context.x.device)

    return score
