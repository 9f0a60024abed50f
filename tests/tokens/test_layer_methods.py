"""FastV, PyramidDrop, ADSC, MustDrop and DUET-VLM against loops in float64."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tcw.errors import UsageError
from tcw.tokens import Shape, TokenMethod
from tcw.tokens.adsc import Adsc
from tcw.tokens.context import Context
from tcw.tokens.duet_vlm import DuetVlm, clustered, salient_rows
from tcw.tokens.fastv import Fastv
from tcw.tokens.mustdrop import Mustdrop, key_tokens, likeness, merged, undropped, windows
from tcw.tokens.plan import Plan
from tcw.tokens.pyramiddrop import Pyramiddrop

from .contexts import best, cosines, image

VLM = Shape(blocks=24, layers=32, has_cls=True, tokens=576)
TOWER = Shape(blocks=12, layers=0, has_cls=True)


def kept(method: TokenMethod, context: Context, k: int, stage: int = 0, shape: Shape = VLM) -> list[int]:
    plan = method.stages(shape, {})[stage].plan(context, k)
    plan.check(context.tokens, k)
    return plan.keep.tolist()


def head_mean(attention: Tensor) -> Tensor:
    return sum(head.double() for head in attention) / len(attention)


# FastV and PyramidDrop


@pytest.mark.parametrize("method", [Fastv(), Pyramiddrop()])
@pytest.mark.parametrize("alive", [None, 13])
def test_what_the_last_token_looks_at_stays(method: TokenMethod, alive: int | None) -> None:
    context = image((1, 4, 5), seed=5, rows=3, alive=alive)
    assert context.rows is not None
    for k in (1, 5, 12):
        assert kept(method, context, k) == best(head_mean(context.rows.attention)[-1].tolist(), k)


def test_ties_go_to_the_first() -> None:
    context = image((1, 2, 4), rows=2)
    assert context.rows is not None
    even = replace(context, rows=replace(context.rows, attention=torch.full_like(context.rows.attention, 0.1)))
    assert kept(Fastv(), even, 3) == [0, 1, 2]


@pytest.mark.parametrize("method", [Fastv(), Pyramiddrop(), Mustdrop(), DuetVlm()])
def test_no_text_after_the_image(method: TokenMethod) -> None:
    context = image((1, 3, 4), rows=0, layers=(3,))
    stage = [s for s in method.stages(VLM, {}) if s.at.kind == "layer"][-1]
    with pytest.raises(UsageError, match="no text"):
        stage.plan(context, 4)


def test_fastv_looks_at_the_layer_before_its_cut() -> None:
    (stage,) = Fastv().stages(VLM, {})
    assert (stage.at.of(32), stage.probe, stage.keep) == (2, -1, 0.5)
    assert Fastv(layer=5).stages(VLM, {})[0].at.of(32) == 5
    assert Fastv().stages(replace(VLM, deepstack=3), {})[0].at.of(32) == 3
    assert Fastv().stages(TOWER, {})[0].at.of(12) == 2
    with pytest.raises(UsageError, match="no layer 40"):
        Fastv(layer=40).stages(VLM, {})


def test_pyramiddrop_schedule() -> None:
    """The paper's: half of what is left at each of layers 8, 16 and 24 of 32, by the layer's own attention."""
    stages = Pyramiddrop().stages(VLM, {})
    assert [s.at.of(32) for s in stages] == [8, 16, 24]
    assert [s.keep for s in stages] == pytest.approx([0.5, 0.25, 0.125])
    assert {s.probe for s in stages} == {0}


# ADSC


@pytest.mark.parametrize("k", [1, 3, 10, 24])
def test_adsc_needs_nothing_but_the_number(k: int) -> None:
    """Evenly, whatever the tokens are, and exactly k."""
    first, other = image((1, 4, 6), seed=1), image((1, 4, 6), seed=2, text=None, cls=False)
    expected = [math.floor((i + 0.5) * 24 / k) for i in range(k)]
    assert kept(Adsc(), first, k) == kept(Adsc(), other, k) == expected
    assert Adsc.static


# MustDrop


def slow_windows(place: Tensor) -> list[list[int]]:
    cells: dict[tuple[int, ...], list[int]] = {}
    for i, (frame, row, column) in enumerate(place.long().tolist()):
        cells.setdefault((frame, row // 3, column // 3), []).append(i)
    return [cells[cell] for cell in sorted(cells) if len(cells[cell]) == 9]


@pytest.mark.parametrize(("grid", "alive"), [((1, 6, 6), None), ((2, 7, 8), None), ((1, 9, 9), 60), ((1, 2, 9), None)])
def test_windows(grid: tuple[int, int, int], alive: int | None) -> None:
    """Nine neighbours each; those with tokens missing are left out."""
    place = image(grid, seed=1, alive=alive).place
    assert windows(place).tolist() == slow_windows(place)


def test_likeness_of_a_window() -> None:
    context = image((1, 6, 6), seed=3)
    window, cosine = windows(context.place), cosines(context.x)
    for tokens, found in zip(window.tolist(), likeness(context.x, window).tolist(), strict=True):
        pairs = [cosine[i][j] for i in tokens for j in tokens if i != j]
        assert found == pytest.approx(sum(pairs) / len(pairs), abs=1e-5)


def even_window(context: Context, number: int, noise: float) -> Context:
    """The same image with one window whose tokens are nearly the same."""
    tokens = windows(context.place)[number]
    x = context.x.clone()
    x[tokens] = x[tokens[0]] + noise * x[tokens]
    return replace(context, x=x)


def test_even_windows_become_one_token_in_their_centre() -> None:
    context = even_window(image((1, 6, 9), seed=4), 4, 0.01)
    tokens = windows(context.place)[4].tolist()
    plan = merged(context, 0.8, most=9)
    assert plan.keep.tolist() == [i for i in range(54) if i not in tokens or i == tokens[4]]
    place = plan.keep.tolist().index(tokens[4])
    assert float(plan.size[place]) == 9
    mean = sum(context.x[i].double() for i in tokens) / 9
    torch.testing.assert_close(plan.apply(context.x)[place].double(), mean, rtol=1e-5, atol=1e-6)
    assert float(plan.size.sum()) == 54


def test_sizes_weigh_in_the_mean() -> None:
    context = replace(even_window(image((1, 3, 3), seed=4), 0, 0.1), size=torch.arange(1.0, 10.0))
    plan = merged(context, 0.8, most=1)
    mean = sum(w * context.x[i].double() for i, w in enumerate(range(1, 10))) / 45
    torch.testing.assert_close(plan.apply(context.x)[0].double(), mean, rtol=1e-5, atol=1e-6)


def test_no_more_windows_than_the_budget_has_room_for() -> None:
    """The most alike are merged first; with no room, none."""
    context = even_window(even_window(image((1, 6, 6), seed=4), 1, 0.02), 2, 0.01)
    assert merged(context, 0.8, most=5).kept == 36 - 16
    one = merged(context, 0.8, most=1)
    assert one.assign[windows(context.place)[2]].unique().numel() == 1
    assert one.kept == 28
    assert not merged(context, 0.8, most=0).merges


def test_merging_leaves_what_the_first_cut_is_to_leave() -> None:
    """Even where all windows are even."""
    for keep in (0.05, 0.3, 0.9, 1.0):
        first, *later = Mustdrop(keep=keep).stages(VLM, {})
        context = image((1, 9, 9), flat=True)
        left = first.plan(context, None).kept
        assert later[0].keep is not None
        assert left >= math.floor(later[0].keep * 81 + 0.5)
    assert not first.plan(context, None).merges


def slow_undropped(attention: Tensor, key: list[float], single: float, k: int) -> list[int]:
    """Bisection on the global threshold; then on the single one; then key tokens go."""
    attention = attention.double()
    L, N = attention.shape
    total = [sum(float(attention[t, j]) for t in range(L)) for j in range(N)]
    most = [max(float(attention[t, j]) for t in range(L)) for j in range(N)]

    def left(together: float) -> list[int]:
        dropped = {j for j in range(N) if total[j] < together * sum(total) and most[j] < single and not key[j]}
        return [j for j in range(N) if j not in dropped]

    if len(left(2.0)) <= k:
        low, high = 0.0, 2.0
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if len(left(middle)) >= k else (low, middle)
        return left(low)
    safe = [j for j in range(N) if key[j]]
    if len(safe) <= k:
        others = sorted((j for j in left(2.0) if not key[j]), key=lambda j: (-total[j], j))
        return sorted(safe + others[: k - len(safe)])
    return sorted(sorted(safe, key=lambda j: -key[j])[:k])


@pytest.mark.parametrize("single", [0.0, 0.05, 0.2, 2.0])
@pytest.mark.parametrize("keys", [0, 3, 12])
def test_dual_threshold(single: float, keys: int) -> None:
    """What bisection on the threshold finds, and exactly k."""
    attention = torch.randn(4, 20, generator=torch.Generator().manual_seed(keys)).mul(2).softmax(1)
    key = key_tokens(torch.rand(20, generator=torch.Generator().manual_seed(9)), keys)
    for k in range(1, 21):
        found = undropped(attention, key, single, k).tolist()
        assert len(found) == k
        assert found == slow_undropped(attention, key.tolist(), single, k)


def test_key_tokens_are_never_dropped() -> None:
    """Not at any of three layers, although no text looks at them."""
    method = Mustdrop(keep=0.2)
    stages = [s for s in method.stages(VLM, {}) if s.at.kind == "layer"]
    context = image((1, 5, 8), seed=7, layers=(3,), rows=3)
    assert context.tower is not None
    assert context.rows is not None
    keys = best(context.tower.cls((3,)).tolist(), math.ceil(method.key * 40))
    attention = context.rows.attention.clone()
    attention[..., keys] = 0
    context = replace(context, rows=replace(context.rows, attention=attention))
    assert len(stages) == 3
    for stage in stages:
        assert stage.keep is not None
        assert set(keys) <= set(stage.plan(context, math.floor(stage.keep * 40 + 0.5)).keep.tolist())


def test_mustdrop_stages() -> None:
    """At the input, at three layers, and in the caches; in a plain tower from its first block on."""
    kinds = [s.at.kind for s in Mustdrop().stages(VLM, {})]
    assert kinds == ["input", "layer", "layer", "layer", "decode"]
    tower = Mustdrop().stages(TOWER, {})
    assert [(s.at.kind, s.at.of(12)) for s in tower] == [("block", 0), ("layer", 3), ("layer", 6), ("layer", 9)]


# DUET-VLM


def slow_clustered(
    context: Context, score: list[float], k: int, centres: int, width: int
) -> tuple[list[int], dict[int, list[int]]]:
    """Tokens that stay, and members of each cluster by its centre."""
    assert context.tower is not None
    order = sorted(range(context.tokens), key=lambda i: (-score[i], i))
    near = order[k - centres :][: width * centres]
    centre = [near[i * len(near) // centres] for i in range(centres)]
    cosine = cosines(context.tower.keys(-1))
    members = {c: [c] for c in centre}
    for i in near:
        if i not in members:
            members[max(sorted(centre), key=lambda c: cosine[i][c])].append(i)
    return sorted([*order[: k - centres], *centre]), members


@pytest.mark.parametrize(("k", "centres", "width"), [(8, 3, 4), (8, 8, 2), (20, 5, 4), (3, 1, 1), (5, 0, 4)])
def test_clusters(k: int, centres: int, width: int) -> None:
    context = image((1, 5, 6), seed=8, layers=(3,))
    score = torch.rand(30, generator=torch.Generator().manual_seed(k))
    plan = clustered(context, score, k, centres, width)
    keep, members = slow_clustered(context, score.tolist(), k, centres, width)
    assert plan.keep.tolist() == keep
    inside = {i for group in members.values() for i in group}
    for i in range(30):
        if i not in inside and i not in keep:
            assert int(plan.assign[i]) == -1
    for centre, group in members.items():
        place = keep.index(centre)
        assert sorted(group) == (plan.assign == place).nonzero()[:, 0].tolist()
        mean = sum(context.x[i].double() for i in group) / len(group)
        torch.testing.assert_close(plan.apply(context.x)[place].double(), mean, rtol=1e-5, atol=1e-6)


def test_a_cluster_of_equal_tokens_keeps_its_length() -> None:
    """The authors' sum of a centre and a mean would double it."""
    context = image((1, 4, 5), seed=8, layers=(3,), flat=True)
    plan = DuetVlm().stages(VLM, {})[0].plan(context, 8)
    assert plan.merges
    torch.testing.assert_close(plan.apply(context.x), context.x[:8])


@pytest.mark.parametrize("text", ["all", "salient"])
def test_what_the_text_looks_at_stays(text: str) -> None:
    context = image((1, 4, 5), seed=9, rows=6)
    assert context.rows is not None
    rows = head_mean(context.rows.attention)
    mass = [float(row.sum()) for row in rows]
    heard = [row for row, one in zip(rows, mass, strict=True) if text == "all" or one >= sum(mass) / len(mass)]
    assert text == "all" or 0 < len(heard) < 6
    expected = best((sum(heard) / len(heard)).tolist(), 7)
    assert kept(DuetVlm(text=text), context, 7, stage=1) == kept(DuetVlm(text=text), context, 7, stage=2) == expected


def test_a_single_text_token_is_salient() -> None:
    context = image((1, 2, 3), seed=9, rows=1)
    assert context.rows is not None
    torch.testing.assert_close(salient_rows(context).double(), head_mean(context.rows.attention)[0], rtol=1e-5, atol=0)


def test_duet_stages() -> None:
    stages = DuetVlm(keep=0.125).stages(VLM, {})
    assert [(s.at.kind, s.keep) for s in stages] == [
        ("input", pytest.approx(0.5)), ("layer", pytest.approx(0.25)), ("layer", 0.125),
    ]  # fmt: skip
    assert [s.at.of(32) for s in stages[1:]] == [16, 24]


@pytest.mark.parametrize("options", [{"contextual": 1.5}, {"width": 0}])
def test_duet_options_that_make_no_sense(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        DuetVlm(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", [Fastv(), Pyramiddrop(), Adsc(), Mustdrop(), DuetVlm()])
def test_a_tower_without_class_token(method: TokenMethod) -> None:
    """The engine gives what tokens receive instead; every stage works on that."""
    shape = replace(TOWER, has_cls=False)
    for stage in method.stages(shape, {}):
        context = image((1, 6, 6), seed=3, layers=stage.layers(4), rows=1, cls=False, text=None)
        k = None if stage.keep is None else 9
        plan: Plan = stage.plan(context, k)
        plan.check(36, k)
