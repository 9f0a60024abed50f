"""Merging, beside loops in float64."""

import math

import pytest
import torch
from torch import Tensor

from tcw.tokens import merges
from tcw.tokens._similarity import here
from tcw.tokens.context import Context
from tcw.tokens.plan import Plan

from .contexts import best, cosines, image

GRIDS = ((1, 1, 1), (1, 1, 7), (1, 4, 5), (3, 2, 4))


def cases() -> list[tuple[Context, Tensor]]:
    found = []
    for seed, grid in enumerate(GRIDS):
        for alive in (None, 5) if grid[1] > 1 else (None,):
            context = image(grid, seed=seed, alive=alive)
            for k in sorted({1, (context.tokens + 1) // 3 or 1, context.tokens}):
                order = torch.randperm(context.tokens, generator=torch.Generator().manual_seed(seed))
                found.append((context, order[:k].sort().values))
    return found


def means(context: Context, keep: list[int], into: dict[int, int], weight: list[float]) -> Tensor:
    """The mean of each kept token and what goes into it (token -> number of the kept one)."""
    rows = []
    for j, own in enumerate(keep):
        members = [own, *(i for i, to in into.items() if to == j)]
        total = sum(weight[i] for i in members)
        rows.append(sum(weight[i] * context.x[i].double() for i in members) / total)
    return torch.stack(rows)


def compare(context: Context, plan: Plan, expected: Tensor, k: int) -> None:
    plan.check(context.tokens, k)
    torch.testing.assert_close(plan.apply(context.x).double(), expected, rtol=1e-5, atol=1e-5)


def test_drop() -> None:
    for context, keep in cases():
        plan = merges.drop()(context, keep)
        compare(context, plan, context.x[keep].double(), len(keep))
        assert torch.equal(plan.size, context.size[keep])


def nearest(cosine: list[list[float]], keep: list[int], among: list[int], tokens: int) -> dict[int, int]:
    others = [i for i in range(tokens) if i not in keep]
    return {i: max(among, key=lambda j: cosine[i][keep[j]]) for i in others}


def test_nearest_mean() -> None:
    for context, keep in cases():
        kept = keep.tolist()
        into = nearest(cosines(context.x), kept, list(range(len(kept))), context.tokens)
        plan = merges.nearest_mean()(context, keep)
        compare(context, plan, means(context, kept, into, context.size.tolist()), len(kept))
        assert float(plan.size.sum()) == float(context.size.sum())


def test_nearest_mean_by_other_features() -> None:
    context = image((1, 4, 5), layers=(3,))
    keep = torch.tensor([0, 7, 13])
    keys = torch.stack([k.double() for k in context.tower.looked[3][0].keys]).mean(0)[1:]
    into = nearest(cosines(keys), [0, 7, 13], [0, 1, 2], 20)
    plan = merges.nearest_mean(lambda c: c.tower.keys())(context, keep)
    compare(context, plan, means(context, [0, 7, 13], into, [1.0] * 20), 3)


def test_only_some_take_in_some() -> None:
    context = image((1, 4, 5), alive=12)
    keep, takers = torch.tensor([1, 4, 6, 10]), torch.tensor([False, True, False, True])
    given = torch.arange(12) % 3 == 0
    into = {i: j for i, j in nearest(cosines(context.x), keep.tolist(), [1, 3], 12).items() if i % 3 == 0}
    plan = merges.into_nearest(context, keep, takers, given)
    compare(context, plan, means(context, keep.tolist(), into, context.size.tolist()), 4)
    assert {i: int(j) for i, j in enumerate(plan.assign) if j >= 0 and i not in keep} == into
    assert torch.equal(plan.apply(context.x)[~takers], context.x[keep[~takers]]), "bit for bit"
    nobody = merges.into_nearest(context, keep, torch.zeros(4, dtype=torch.bool))
    assert torch.equal(nobody.assign, Plan.dropping(keep, context.size).assign)


def sinkhorn(cost: list[list[float]], epsilon: float, rounds: int) -> list[list[float]]:
    n, m = len(cost), len(cost[0])
    kernel = [[math.exp(-c / epsilon) for c in row] for row in cost]
    u, v = [1.0] * n, [1.0] * m
    for _ in range(rounds):
        v = [1 / m / sum(u[i] * kernel[i][j] for i in range(n)) for j in range(m)]
        u = [1 / n / sum(kernel[i][j] * v[j] for j in range(m)) for i in range(n)]
    return [[u[i] * kernel[i][j] * v[j] for j in range(m)] for i in range(n)]


def test_ot() -> None:
    for context, keep in cases():
        kept, size = keep.tolist(), context.size.tolist()
        others = [i for i in range(context.tokens) if i not in kept]
        cosine, (_, rows, columns) = cosines(context.x), context.grid
        spot = [(float(p[1]) / rows, float(p[2]) / columns) for p in context.place]
        expected = {j: [(own, size[own])] for j, own in enumerate(kept)}
        if others:
            cost = [[1 - cosine[i][j] + 0.5 * math.dist(spot[i], spot[j]) for j in kept] for i in others]
            for i, row in zip(others, sinkhorn(cost, 0.1, 300), strict=True):
                for j, mass in enumerate(row):
                    expected[j].append((i, size[i] * mass / sum(row)))
        plan = merges.ot(rounds=300, tolerance=0.0)(context, keep)
        wanted = [sum(w * context.x[i].double() for i, w in row) / sum(w for _, w in row) for row in expected.values()]
        plan.check(context.tokens, len(kept))
        torch.testing.assert_close(plan.apply(context.x).double(), torch.stack(wanted), rtol=1e-3, atol=1e-3)
        assert plan.size.tolist() == pytest.approx([sum(w for _, w in row) for row in expected.values()], rel=1e-3)
        assert float(plan.size.sum()) == pytest.approx(float(context.size.sum()))


def test_transport_is_fair_to_both_sides() -> None:
    cost = torch.rand(30, 6, generator=torch.Generator().manual_seed(0))
    shares = merges.transport(cost, 0.1, rounds=500, tolerance=0.0)
    assert shares.sum(1).tolist() == pytest.approx([1.0] * 30)
    assert shares.sum(0).tolist() == pytest.approx([5.0] * 6, rel=1e-3)
    assert torch.isfinite(merges.transport(cost * 1e5, 1e-3)).all(), "in logarithms: no cost is too high"
    assert merges.transport(torch.zeros(0, 3), 0.1).shape == (0, 3)


def test_transport_stops_early() -> None:
    cost = torch.rand(30, 6, generator=torch.Generator().manual_seed(0))
    exact, soon = merges.transport(cost, 0.1, 500, 0.0), merges.transport(cost, 0.1)
    assert not torch.equal(exact, soon)
    torch.testing.assert_close(soon, exact, rtol=0.1, atol=0.01)


def test_shared_drops_what_is_not_given() -> None:
    context = image((1, 2, 3))
    plan = merges.shared(context, torch.tensor([0, 4]), torch.tensor([2]), torch.tensor([[0.25, 0.75]]))
    assert plan.assign.tolist() == [0, -1, 1, -1, 1, -1]
    assert plan.size.tolist() == [1.25, 1.75]
    expected = torch.stack([(context.x[0] + context.x[2] / 4) / 1.25, (context.x[4] + context.x[2] * 0.75) / 1.75])
    torch.testing.assert_close(plan.apply(context.x), expected)


def peaks(x: Tensor, k: int, neighbours: int) -> tuple[list[int], list[int]]:
    """Density peaks, distance by distance."""
    x = x.double()
    n = len(x)
    far = [[float((a - b).norm()) for b in x] for a in x]
    mean = sum(map(sum, far)) / n / n
    far = [[d / mean if mean else 0.0 for d in row] for row in far]
    density = []
    for i in range(n):
        near = sorted(far[i][j] for j in range(n) if j != i)[: min(neighbours, n - 1)]
        density.append(math.exp(-sum(d * d for d in near) / len(near)) if near else 1.0)
    denser = [[j for j in range(n) if (density[j], -j) > (density[i], -i)] for i in range(n)]
    peak = [min((far[i][j] for j in denser[i]), default=max(map(max, far))) for i in range(n)]
    centres = best([a * b for a, b in zip(density, peak, strict=True)], k)
    assign = [min(range(k), key=lambda c: far[i][centres[c]]) for i in range(n)]
    return centres, [centres.index(i) if i in centres else assign[i] for i in range(n)]


@pytest.mark.parametrize("neighbours", [1, 7])
def test_dpc_knn(neighbours: int) -> None:
    for context, keep in cases():
        centres, assign = merges.dpc_knn(context.x, len(keep), neighbours)
        assert (centres.tolist(), assign.tolist()) == peaks(context.x, len(keep), neighbours)
        scaled = merges.dpc_knn(context.x * 1024, len(keep), neighbours)
        assert torch.equal(scaled[0], centres), "of no scale"
        plan = merges.clusters(context, len(keep), neighbours)
        assert torch.equal(plan.assign, assign)
        assert float(plan.size.sum()) == float(context.size.sum())


def test_dpc_knn_finds_clusters() -> None:
    source = torch.Generator().manual_seed(3)
    x = torch.cat([torch.randn(10, 5, generator=source) * 0.1 + 4 * n for n in range(3)])
    _, assign = merges.dpc_knn(x, 3)
    assert assign.tolist() == [0] * 10 + [1] * 10 + [2] * 10


def roots(context: Context, threshold: float, free: list[bool], least: int) -> list[int]:
    """Links one at a time, then each token up to its root."""
    cosine, frames = cosines(context.x), context.place[:, 0].tolist()
    order = sorted(set(frames))
    links = []
    for i in range(context.tokens):
        before = [f for f in order if f < frames[i]][-1:]
        others = [j for j in range(context.tokens) if frames[j] in before and free[j]]
        if free[i] and others:
            to = max(others, key=lambda j: cosine[i][j])
            links.append((cosine[i][to], i, to))
    links = sorted(links, key=lambda one: -one[0])[: max(0, sum(free) - least)]
    parent = {i: to for alike, i, to in links if alike > threshold}
    found = []
    for token in range(context.tokens):
        root = token
        while root in parent:
            root = parent[root]
        found.append(root)
    return found


@pytest.mark.parametrize("grid", [(1, 2, 3), (2, 2, 3), (5, 2, 2), (9, 1, 2)])
def test_linked(grid: tuple[int, int, int]) -> None:
    for seed, threshold in ((0, -1.0), (1, 0.0), (2, 0.3)):
        context = image(grid, seed=seed)
        everyone, some = torch.ones(context.tokens, dtype=torch.bool), torch.arange(context.tokens) % 4 != 1
        for free, least in ((everyone, 1), (some, 1), (everyone, context.tokens // 2)):
            found = merges.linked(context, threshold, free, least)
            assert found.tolist() == roots(context, threshold, free.tolist(), least)
            assert len(found[free].unique()) >= min(least, int(free.sum()))
    assert torch.equal(merges.linked(context, 0.3), merges.linked(context, 0.3, everyone, 1, here))
