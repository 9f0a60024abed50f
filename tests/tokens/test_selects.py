"""Selections, beside loops in float64."""

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tcw.tokens import Select, selects
from tcw.tokens._similarity import Cosine, most_similar
from tcw.tokens.context import Context

from .contexts import best, cosines, image

GRIDS = ((1, 1, 1), (1, 1, 7), (1, 4, 5), (3, 2, 4))


def cases(most: int = 12) -> Iterator[tuple[Context, Tensor, int]]:
    """Images, scores for their tokens, and budgets."""
    for seed, grid in enumerate(GRIDS):
        for alive in (None, 5) if grid[1] > 1 else (None,):
            context = image(grid, seed=seed, alive=alive)
            scores = torch.rand(context.tokens, generator=torch.Generator().manual_seed(seed))
            for k in sorted({1, 2, context.tokens // 2, min(context.tokens, most)} - {0}):
                if k <= context.tokens:
                    yield context, scores, k


def test_top_k() -> None:
    for context, scores, k in cases(99):
        assert selects.top_k()(context, scores, k).tolist() == best(scores.tolist(), k)


def test_ties_go_to_the_first() -> None:
    context = image((1, 3, 3))
    assert selects.top_k()(context, torch.tensor([1.0, 2, 2, 2, 1, 2, 2, 2, 2]), 3).tolist() == [1, 2, 3]
    assert selects.windows_top_k(1)(context, torch.ones(9), 4).tolist() == [0, 1, 2, 3]
    assert selects.windows_top_k(3)(context, torch.ones(9), 4).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("across", [1, 2, 3])
def test_windows_top_k(across: int) -> None:
    for context, scores, k in cases(99):
        extent = {}
        for f, r, c in context.place.long().tolist():
            rows, columns = extent.get(f, (0, 0))
            extent[f] = max(rows, r + 1), max(columns, c + 1)
        where = []
        for f, r, c in context.place.long().tolist():
            where.append((f, r * across // extent[f][0], c * across // extent[f][1]))
        kept: list[int] = []
        rounds = {w: sorted((i for i in range(len(where)) if where[i] == w), key=lambda i: -scores[i]) for w in where}
        for n in itertools.count():
            row = sorted((tokens[n] for tokens in rounds.values() if len(tokens) > n), key=lambda i: -scores[i])
            kept += row[: k - len(kept)]
            if len(kept) == k:
                break
        assert selects.windows_top_k(across)(context, scores, k).tolist() == sorted(kept)


def test_windows_of_a_whole_image_get_the_same() -> None:
    context = image((2, 6, 6))
    kept = selects.windows_top_k(3)(context, torch.rand(72), 36)
    assert selects.windows(context, 3)[kept].bincount().tolist() == [2] * 18


def test_grid() -> None:
    assert selects.grid()(image((1, 6, 6)), None, 9).tolist() == [7, 9, 11, 19, 21, 23, 31, 33, 35]
    assert selects.grid()(image((1, 1, 8)), None, 4).tolist() == [1, 3, 5, 7]
    assert selects.grid()(image((4, 1, 4)), None, 2).tolist() == [2, 10], "two of four frames, evenly"


@pytest.mark.parametrize("shape", [(1, 5, 7), (3, 4, 4), (1, 12, 3), (2, 1, 9)])
def test_grid_is_even(shape: tuple[int, int, int]) -> None:
    context = image(shape)
    for k in range(1, context.tokens + 1):
        kept = selects.grid()(context, None, k)
        assert len(kept.unique()) == len(kept) == k
        frames = context.place[kept, 0].long().bincount(minlength=shape[0])
        assert int(frames.max() - frames.min()) <= 1
        for frame in range(shape[0]):
            rows = context.place[kept[context.place[kept, 0] == frame], 1].long()
            counts = rows.bincount()
            assert not len(rows) or int(counts.max() - counts[counts > 0].min()) <= 1


def test_grid_of_what_earlier_cuts_left() -> None:
    for seed in range(5):
        context = image((2, 6, 7), seed=seed, alive=31)
        for k in range(1, 32):
            kept = selects.grid()(context, None, k)
            assert len(kept) == k
            assert bool((kept.diff() > 0).all())


def first_of(x: Tensor, how: str) -> int:
    cosine = cosines(x)
    n = len(cosine)
    if how == selects.ISOLATED:
        near = [max((cosine[i][j] for j in range(n) if j != i), default=0.0) for i in range(n)]
        return min(range(n), key=lambda i: near[i])
    units = x.double() / x.double().norm(dim=1, keepdim=True)
    return int((units @ units.mean(0)).argmin())


@pytest.mark.parametrize("how", [selects.ISOLATED, selects.UNLIKE_MEAN])
@pytest.mark.parametrize("scored", [False, True])
def test_max_min(how: str, scored: bool) -> None:
    for context, scores, k in cases():
        cosine, weight = cosines(context.x), scores.double() if scored else torch.ones(context.tokens)
        chosen = [first_of(context.x, how)]
        while len(chosen) < k:
            rest = [i for i in range(context.tokens) if i not in chosen]
            chosen.append(max(rest, key=lambda i: float(weight[i]) * min(1 - cosine[i][j] for j in chosen)))
        found = selects.max_min(how)(context, scores if scored else None, k)
        assert found.tolist() == sorted(chosen)


@pytest.mark.parametrize("how", [selects.ISOLATED, selects.UNLIKE_MEAN])
def test_max_sum(how: str) -> None:
    for context, _, k in cases():
        cosine = cosines(context.x)
        chosen = [first_of(context.x, how)]
        while len(chosen) < k:
            rest = [i for i in range(context.tokens) if i not in chosen]
            chosen.append(max(rest, key=lambda i: sum(1 - cosine[i][j] for j in chosen)))
        assert selects.max_sum(how)(context, None, k).tolist() == sorted(chosen)


@pytest.mark.parametrize("lam", [0.0, 0.3, 0.5, 1.0])
def test_mmr(lam: float) -> None:
    for context, scores, k in cases():
        cosine, low, high = cosines(context.x), float(scores.min()), float(scores.max())
        worth = [(float(s) - low) / (high - low) if high > low else 1.0 for s in scores]
        chosen = [max(range(context.tokens), key=lambda i: worth[i])]
        while len(chosen) < k:
            rest = [i for i in range(context.tokens) if i not in chosen]
            chosen.append(max(rest, key=lambda i: lam * worth[i] - (1 - lam) * max(cosine[i][j] for j in chosen)))
        assert selects.mmr(lam)(context, scores, k).tolist() == sorted(chosen)


def most_probable(context: Context, r: list[float], k: int) -> list[int]:
    """Greedily the token with the largest determinant, each determinant computed anew."""
    kernel = torch.tensor(cosines(context.x), dtype=torch.float64).fill_diagonal_(1)
    kernel = kernel * torch.tensor(r)[:, None] * torch.tensor(r)
    chosen: list[int] = []
    while len(chosen) < k:
        rest = [i for i in range(context.tokens) if i not in chosen]
        chosen.append(max(rest, key=lambda i: float(torch.linalg.det(kernel[[*chosen, i]][:, [*chosen, i]]))))
    return chosen


@pytest.mark.parametrize("scored", [False, True])
def test_dpp(scored: bool) -> None:
    """Up to 10 tokens of 12 dimensions: beyond that, determinants are too small to tell."""
    for context, scores, k in cases(10):
        low, high = float(scores.min()), float(scores.max())
        r = [(float(s) - low) / (high - low) if scored and high > low else 1.0 for s in scores]
        if scored and k == context.tokens:
            continue  # the least of all scores is 0, and the last determinant 0 whatever it is
        found = selects.dpp()(context, scores if scored else None, k)
        assert found.tolist() == sorted(most_probable(context, r, k))


def test_dpp_fills_up_where_the_determinant_cannot_grow() -> None:
    context = image((1, 5, 6))
    scores = 0.5 + torch.arange(30) / 60
    kept = selects.dpp()(context, scores, 20).tolist()
    span = selects.dpp()(context, scores, 12).tolist()
    rest = [i for i in range(29, -1, -1) if i not in span]
    assert kept == sorted(span + rest[:8])
    same = image((1, 3, 3), flat=True)
    assert selects.dpp()(same, torch.arange(9.0), 3).tolist() == [6, 7, 8], "copies: the highest scores"


@pytest.mark.parametrize("removed", [1, 3, 8])
def test_bipartite_dedup(removed: int) -> None:
    for context, _, k in cases():
        assert selects.bipartite_dedup(removed)(context, None, k).tolist() == thinned(
            cosines(context.x), list(range(context.tokens)), k, removed
        )


def thinned(cosine: list[list[float]], tokens: list[int], k: int, removed: int) -> list[int]:
    tokens = list(tokens) if k else []
    while len(tokens) > k:
        here, there = tokens[::2], tokens[1::2]
        alike = {i: max(cosine[i][j] for j in there) for i in here}
        gone = sorted(here, key=lambda i: -alike[i])[: min(removed, len(tokens) - k)]
        tokens = [i for i in tokens if i not in gone]
    return tokens


@pytest.mark.parametrize("important", [0.0, 0.4, 1.0])
def test_important_then_diverse(important: float) -> None:
    for context, scores, k in cases():
        top = best(scores.tolist(), min(k, max(1, int(important * k + 0.5))))
        rest = [i for i in range(context.tokens) if i not in top]
        expected = top + thinned(cosines(context.x), rest, k - len(top), 3)
        found = selects.important_then_diverse(important, 3)(context, scores, k)
        assert found.tolist() == sorted(expected)


def test_more_go_in_a_round_of_a_large_image() -> None:
    context = image((1, 30, 40))
    scores = torch.rand(1200, generator=torch.Generator().manual_seed(0))
    order = scores.argsort(descending=True, stable=True)
    expected = selects.deduplicated(Cosine(context.x), order[200:].sort().values, 200, 16)
    found = selects.important_then_diverse(0.5, 8)(context, scores, 400)
    assert found.tolist() == sorted([*order[:200].tolist(), *expected.tolist()])


GREEDY: dict[str, Select] = {
    "max_min": selects.max_min(), "max_sum": selects.max_sum(), "mmr": selects.mmr(), "dpp": selects.dpp(),
    "dedup": selects.bipartite_dedup(3),
}  # fmt: skip


@pytest.mark.parametrize("name", GREEDY)
def test_many_tokens_are_compared_a_few_rows_at_a_time(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for context, scores, k in cases(8):
        at_once = GREEDY[name](context, scores, k)
        with monkeypatch.context() as patch:
            patch.setattr("tcw.tokens._similarity.AT_ONCE", 4)
            assert torch.equal(GREEDY[name](context, scores, k), at_once)


def test_most_similar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tcw.tokens._similarity.AT_ONCE", 4)
    x = image((1, 4, 5)).x
    cosine, tokens, among = cosines(x), torch.tensor([0, 3, 4, 7, 8, 11, 19]), torch.tensor([1, 2, 5, 18])
    values, places = most_similar(Cosine(x).units, tokens, among)
    for token, value, place in zip(tokens.tolist(), values.tolist(), places.tolist(), strict=True):
        row = [cosine[token][j] for j in among.tolist()]
        assert place == row.index(max(row))
        assert value == pytest.approx(max(row), abs=1e-5)
