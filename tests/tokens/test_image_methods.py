"""Methods that look at one image, beside the slow way to do what their papers say (float64, loops)."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tcw import methods
from tcw.errors import UsageError
from tcw.tokens import INPUT, Shape, Stage, layer, no_layers
from tcw.tokens.context import Context
from tcw.tokens.plan import Plan

from .contexts import best, class_row, cosines, image, received_row
from .test_merges import means
from .test_scores import errors
from .test_selects import first_of, most_probable, thinned

VLM, TOWER = Shape(blocks=4, layers=8, has_cls=True), Shape(blocks=4, layers=0, has_cls=True)
DEPTH = 6


def stages(name: str, shape: Shape = VLM, **options: Any) -> tuple[Stage, ...]:
    return methods.build(methods.qualified(name, "tokens"), options).stages(shape, {})


def images(stage: Stage, rows: int | None = None) -> Iterator[tuple[Context, int]]:
    for seed, (grid, cls, alive) in enumerate(
        [((1, 4, 5), True, None), ((2, 3, 4), False, None), ((1, 1, 6), True, None), ((1, 6, 6), True, 17)]
    ):
        layers = stage.layers(DEPTH)
        context = image(grid, seed=seed, layers=layers, depth=DEPTH, cls=cls, alive=alive, rows=rows)
        for k in (1, 2, 5):
            yield context, k


def attention(context: Context, layers: tuple[int, ...]) -> list[float]:
    """The class token's attention (or what tokens receive) over layers, of the tokens that are left."""
    row = class_row if context.tower.has_cls else received_row
    every = [torch.cat([row(one) for one in context.tower.looked[n]]) for n in layers]
    return sum(every)[context.alive].tolist()


def normal(values: list[float]) -> list[float]:
    return [(v - min(values)) / (max(values) - min(values)) for v in values]


def test_one_cut_at_the_input() -> None:
    for name in ("random", "grid", "vtc_cls", "divprune", "cdpruner", "idpruner", "visionzip", "visprune"):
        (stage,) = stages(name, keep=0.3)
        assert (stage.at, stage.keep, stage.probe) == (INPUT, 0.3, 0)
        assert [s.at for s in stages(name, TOWER)] == [INPUT]


@pytest.mark.parametrize("name", ["random", "grid"])
def test_controls_cut_where_they_are_told(name: str) -> None:
    (stage,) = stages(name, at="layer", depth=0.25)
    assert stage.at == layer(depth=0.25)
    assert stage.at.of(8) == 2
    for context, k in images(stage):
        assert torch.equal(stage.plan(context, k).keep, stages(name)[0].plan(context, k).keep)
    with pytest.raises(UsageError, match="`depth`"):
        stages(name, depth=1.0)


def test_random() -> None:
    context = image((1, 20, 20))
    found = [set(stages("random", seed=seed)[0].plan(context, 100).keep.tolist()) for seed in (0, 1)]
    assert 10 < len(found[0] & found[1]) < 45, "a quarter of a quarter of 400 is 25"
    rows = context.place[sorted(found[0]), 1].long().bincount(minlength=20)
    assert rows.min() >= 1
    other = image((1, 20, 20), seed=7)
    assert set(stages("random")[0].plan(other, 100).keep.tolist()) == found[0]


def test_grid() -> None:
    (stage,) = stages("grid")
    assert stage.plan(image((1, 8, 8)), 16).keep.tolist() == [8 * r + c for r in (1, 3, 5, 7) for c in (1, 3, 5, 7)]


def test_vtc_cls() -> None:
    (stage,) = stages("vtc_cls")
    assert stage.layers(DEPTH) == (4, 5)
    for context, k in images(stage):
        plan = stage.plan(context, k)
        assert plan.keep.tolist() == best(attention(context, (4, 5)), k)
        assert not plan.merges


def test_divprune() -> None:
    (stage,) = stages("divprune")
    for context, k in images(stage):
        cosine = cosines(context.x)
        chosen = [first_of(context.x, "isolated")]
        while len(chosen) < k:
            rest = [i for i in range(context.tokens) if i not in chosen]
            chosen.append(max(rest, key=lambda i: min(1 - cosine[i][j] for j in chosen)))
        assert stage.plan(context, k).keep.tolist() == sorted(chosen)


def similarity(context: Context) -> list[float]:
    words = context.text.double()
    return [
        float(sum(t @ w / (t.norm() * w.norm()) for w in words)) / len(words) for t in context.x.double()
    ]  # fmt: skip


@pytest.mark.parametrize("sign", [1, -1])
def test_cdpruner(sign: int) -> None:
    (stage,) = stages("cdpruner", sign=sign)
    for context, k in images(stage):
        r = normal([sign * s for s in similarity(context)])
        assert stage.plan(context, k).keep.tolist() == sorted(most_probable(context, r, k))


def importance(context: Context, score: str) -> list[float]:
    if score == "cls":
        return attention(context, (DEPTH - 1,))
    if score == "received":
        return torch.cat([received_row(one) for one in context.tower.looked[DEPTH - 1]])[context.alive].tolist()
    if score == "norm":
        return [float(t.norm()) for t in context.x.double()]
    if score == "error":
        return errors(context.x, spread(context.x, min(10, context.tokens // 2))).tolist()
    return similarity(context)


def spread(x: Tensor, count: int) -> list[int]:
    """Farthest-point sampling from the token farthest from the mean."""
    points = x.double()
    chosen = [int((points - points.mean(0)).norm(dim=1).argmax())]
    while len(chosen) < count:
        rest = [i for i in range(len(points)) if i not in chosen]
        chosen.append(max(rest, key=lambda i: min(float((points[i] - points[j]).norm()) for j in chosen)))
    return chosen


@pytest.mark.parametrize("score", ["cls", "received", "norm", "error", "text"])
@pytest.mark.parametrize("lam", [0.5, 0.2])
def test_idpruner(score: str, lam: float) -> None:
    (stage,) = stages("idpruner", score=score, lam=lam)
    assert stage.layers(DEPTH) == ((DEPTH - 1,) if score in ("cls", "received") else ())
    for context, k in images(stage):
        worth, cosine = normal(importance(context, score)), cosines(context.x)
        chosen = [max(range(context.tokens), key=lambda i: worth[i])]
        while len(chosen) < k:
            rest = [i for i in range(context.tokens) if i not in chosen]
            chosen.append(max(rest, key=lambda i: lam * worth[i] - (1 - lam) * max(cosine[i][j] for j in chosen)))
        assert stage.plan(context, k).keep.tolist() == sorted(chosen)


def test_idpruner_refuses() -> None:
    with pytest.raises(UsageError, match="`lam`"):
        stages("idpruner", lam=1.5)
    with pytest.raises(UsageError, match="`score`"):
        stages("idpruner", score="size")


def approximated(context: Context, k: int, basis: int) -> tuple[list[int], Tensor]:
    """ApET on one image: the tokens kept, and what they become."""
    count = max(1, min(basis, k // 2))
    chosen = spread(context.x, count)
    error = errors(context.x, chosen).tolist()
    rest = sorted((i for i in range(context.tokens) if i not in chosen), key=lambda i: -error[i])
    keep = sorted([*chosen, *rest[: k - count]])
    takers = [j for j, i in enumerate(keep) if i not in chosen] or [0]
    cosine = cosines(context.x)
    others = [i for i in range(context.tokens) if i not in keep]
    into = {i: max(takers, key=lambda j: cosine[i][keep[j]]) for i in others}
    return keep, means(context, keep, into, context.size.tolist())


@pytest.mark.parametrize("basis", [1, 2, 10])
def test_apet(basis: int) -> None:
    first, second = stages("apet", basis=basis)
    assert first.layers is second.layers is no_layers
    for stage in (first, second):
        for context, k in images(stage):
            notes: list[str] = []
            context.note = notes.append
            plan = stage.plan(context, k)
            keep, mean = approximated(context, k, basis)
            assert plan.keep.tolist() == keep
            torch.testing.assert_close(plan.apply(context.x).double(), mean, rtol=1e-4, atol=1e-5)
            assert float(plan.size.sum()) == float(context.size.sum())
            assert bool(notes) == (k // 2 < basis and basis > 1)


def test_apet_shares() -> None:
    shares = [(s.at.kind, s.keep) for s in stages("apet", keep=0.1)]
    assert shares == [("input", pytest.approx(0.3, abs=1e-3)), ("layer", 0.1)]
    assert [s.keep for s in stages("apet", keep=0.5)] == [1.0, 0.5]
    assert [(s.at, s.keep) for s in stages("apet", keep=0.5, layer_keep=1.0)] == [(INPUT, 0.5)]
    assert [s.at.kind for s in stages("apet", TOWER)] == ["input", "layer"]
    for option in ({"basis": 0}, {"layer_keep": 0.0}, {"depth": 1.0}):
        with pytest.raises(UsageError, match=f"`{next(iter(option))}`"):
            stages("apet", **option)


@pytest.mark.parametrize("contextual", [0.0, 0.156, 0.5])
def test_visionzip(contextual: float) -> None:
    (stage,) = stages("visionzip", contextual=contextual)
    for context, _ in images(stage):
        keys = torch.cat(
            [sum(k.double() for k in one.keys)[int(one.cls) :] / len(one.keys) for one in context.tower.looked[5]]
        )
        cosine = cosines(keys[context.alive])
        for k in (1, 2, 5, context.tokens):
            count = min(int(contextual * k + 0.5), k - 1)
            dominant = best(attention(context, (5,)), k - count)
            others = [i for i in range(context.tokens) if i not in dominant]
            anchors = [others[int((n + 0.5) * len(others) / count)] for n in range(count)]
            keep = sorted(dominant + anchors)
            into = {}
            if anchors:
                takers = [keep.index(i) for i in anchors]
                gone = [i for i in others if i not in anchors]
                into = {i: max(takers, key=lambda j: cosine[i][keep[j]]) for i in gone}
            plan = stage.plan(context, k)
            assert plan.keep.tolist() == keep
            wanted = means(context, keep, into, context.size.tolist())
            torch.testing.assert_close(plan.apply(context.x).double(), wanted, rtol=1e-5, atol=1e-6)
            inside = [keep.index(i) for i in dominant]
            assert torch.equal(plan.apply(context.x)[inside], context.x[dominant]), "dominant tokens take in nothing"


@pytest.mark.parametrize(("important", "removed"), [(0.5, 8), (0.25, 2), (1.0, 8)])
def test_visprune(important: float, removed: int) -> None:
    (stage,) = stages("visprune", important=important, removed=removed)
    for context, k in images(stage):
        top = best(attention(context, (5,)), max(1, int(important * k + 0.5)))
        rest = [i for i in range(context.tokens) if i not in top]
        expected = top + thinned(cosines(context.x), rest, k - len(top), removed)
        assert stage.plan(context, k).keep.tolist() == sorted(expected)


@pytest.mark.parametrize(
    "option", [("visprune", "important", 1.5), ("visprune", "removed", 0), ("visionzip", "contextual", 1.0)]
)
def test_options_that_make_no_sense(option: tuple[str, str, float]) -> None:
    name, key, value = option
    with pytest.raises(UsageError, match=f"`{key}`"):
        stages(name, **{key: value})


@pytest.mark.parametrize("select", ["max-sum", "max-min"])
def test_todre_chooses(select: str) -> None:
    stage = stages("todre", select=select)[0]
    assert (stage.at, stage.keep) == (INPUT, 0.1)
    for context, k in images(stage):
        cosine = cosines(context.x)
        chosen = [first_of(context.x, "unlike-mean")]
        while len(chosen) < k:
            rest = [i for i in range(context.tokens) if i not in chosen]
            together = sum if select == "max-sum" else min
            chosen.append(max(rest, key=lambda i: together([1 - cosine[i][j] for j in chosen])))
        assert stage.plan(context, k).keep.tolist() == sorted(chosen)


def test_todre_leaves_where_the_text_looks_away() -> None:
    exits = stages("todre", exit_ratio=0.5)[1:]
    assert [s.at for s in exits] == [layer(4), layer(5), layer(6), layer(7)]
    context = image((1, 3, 4), rows=3)
    share = float(context.rows.attention.double().sum(-1).mean())
    assert 0.2 < share < 0.9
    for ratio, kept in ((share * 0.99, 12), (share * 1.01, 0)):
        plan = stages("todre", exit_ratio=ratio)[1].plan(context, None)
        plan.check(12, None)
        assert plan.kept == kept
        assert torch.equal(plan.apply(context.x), context.x[:kept])


def test_todre_leaves_at_once_or_never() -> None:
    (_, leave) = stages("todre", exit_ratio=1.0, exit_depth=0.7)
    assert leave.at == layer(6)
    plan = leave.plan(image((1, 3, 4)), None)
    assert isinstance(plan, Plan)
    assert plan.kept == 0
    assert len(stages("todre", exit_ratio=0.0)) == 1
    assert len(stages("todre", TOWER)) == 1, "a plain tower has no text"
    assert [s.at.index for s in stages("todre", Shape(4, 4, True, deepstack=3))[1:]] == [3]
    assert len(stages("todre", Shape(4, 1, True))) == 1, "no layer is left to cut at"
    for option in ({"exit_depth": 0.0}, {"exit_ratio": 1.5}):
        with pytest.raises(UsageError, match=f"`{next(iter(option))}`"):
            stages("todre", **option)
