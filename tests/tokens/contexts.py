"""Random images as a method sees them, and the slow way to compute what it should say of them (float64, loops)."""

from collections.abc import Iterable

import torch
from torch import Tensor

from tcw.tokens.context import Context, Looked, Rows, TowerView

WIDTH, HEADS, HEAD = 12, 2, 6


def looked(patches: int, cls: bool, source: torch.Generator, scale: float = 1.0) -> Looked:
    """Queries and keys of one layer for one crop."""
    queries, keys = (
        torch.randn(HEADS, patches + cls, HEAD, generator=source) * scale,
        torch.randn(HEADS, patches + cls, HEAD, generator=source) * scale,
    )
    return Looked(queries, keys, HEAD**-0.5, cls)


def image(
    grid: tuple[int, int, int],
    seed: int = 0,
    layers: Iterable[int] = (),
    depth: int = 4,
    cls: bool = True,
    text: int | None = 3,
    rows: int | None = None,
    alive: int | None = None,
    scale: float = 1.0,
    flat: bool = False,
) -> Context:
    """An image.

    Args:
        grid: frames, rows, columns; there is a token for each place.
        seed: of all numbers.
        layers: of the tower that can be looked at; none: there is no tower to see.
        depth: layers that the tower has run.
        cls: the tower has a class token.
        text: tokens of text; None: there is no text.
        rows: text tokens that look at the image in a layer; None: the stage is at no layer.
        alive: how many tokens earlier cuts have left (with sizes above 1); None: all.
        scale: of the features.
        flat: all tokens are alike.
    """
    source = torch.Generator().manual_seed(seed)
    frames, height, width = grid
    patches = height * width
    original = frames * patches
    x = torch.randn(original, WIDTH, generator=source)
    x = (x[:1].expand_as(x).clone() if flat else x) * scale
    place = torch.stack(
        torch.meshgrid(torch.arange(frames), torch.arange(height), torch.arange(width), indexing="ij"), -1
    )
    left, size = torch.arange(original), torch.ones(original)
    if alive is not None:
        left = torch.randperm(original, generator=source)[:alive].sort().values
        size = torch.randint(1, 4, (alive,), generator=source).float()
    layers = tuple(layers)
    view = TowerView(
        depth,
        cls,
        {n: [looked(patches, cls, source) for _ in range(frames)] for n in layers},
        lambda c: c.reshape(-1, c.shape[-1])[left],
        torch.randn(frames, patches, WIDTH, generator=source),
    )
    attention = logits = torch.zeros(0)
    if rows is not None:
        logits = torch.randn(HEADS, rows, original + 5, generator=source)[..., left]
        attention = torch.randn(HEADS, rows, original + 5, generator=source).softmax(-1)[..., left]
    return Context(
        x=x[left],
        grid=grid,
        place=place.reshape(-1, 3)[left].float(),
        original=original,
        alive=left,
        size=size,
        text=None if text is None else torch.randn(text, WIDTH, generator=source) * scale,
        tower=view if layers else None,
        rows=None if rows is None else Rows(attention, logits),
    )


def cosines(x: Tensor) -> list[list[float]]:
    """All cosines, one at a time."""
    x = x.double()
    return [[float(a @ b / (a.norm() * b.norm())) for b in x] for a in x]


def class_row(one: Looked) -> Tensor:
    """What the class token attends to, mean over heads: float64."""
    rows = []
    for q, k in zip(one.queries.double(), one.keys.double(), strict=True):
        weights = torch.stack([q[0] @ key * one.scaling for key in k]).exp()
        rows.append((weights / weights.sum())[1:])
    return torch.stack(rows).mean(0)


def received_row(one: Looked) -> Tensor:
    """Attention that each patch receives, mean over patches and heads: float64."""
    first, total = int(one.cls), 0
    for q, k in zip(one.queries.double(), one.keys.double(), strict=True):
        for i in range(first, len(q)):
            weights = torch.stack([q[i] @ key * one.scaling for key in k]).exp()
            total = total + (weights / weights.sum())[first:]
    return total / (len(one.queries) * (one.queries.shape[1] - first))


def best(values: Iterable[float], k: int) -> list[int]:
    """Places of the k highest values, of equal ones the first; ascending."""
    values = list(values)
    return sorted(sorted(range(len(values)), key=lambda i: (-values[i], i))[:k])
