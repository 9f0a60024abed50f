"""FlashVID, AOT and Tempo against loops in float64: trees, shares of a transport plan, budgets of segments."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tcw.tokens import Shape, TokenMethod
from tcw.tokens._frames import frames_of, part_of
from tcw.tokens.aot import Aot, anchors, between, budgets, layers
from tcw.tokens.context import Context
from tcw.tokens.flashvid import Flashvid, clustered, event
from tcw.tokens.merges import linked, transport
from tcw.tokens.plan import Plan
from tcw.tokens.tempo import Tempo, relevance

from .contexts import best, class_row, cosines, image

VLM = Shape(blocks=27, layers=28, has_cls=False)
TOWER = Shape(blocks=12, layers=0, has_cls=True)
METHODS = [Flashvid(), Aot(), Tempo()]


def planned(method: TokenMethod, context: Context, k: int) -> Plan:
    plan = method.stages(VLM, {})[0].plan(context, k)
    plan.check(context.tokens, k)
    return plan


def video(frames: int, height: int = 4, width: int = 5, seed: int = 0, **options: object) -> Context:
    return image((frames, height, width), seed=seed, layers=(1, 3), **options)  # type: ignore[arg-type]


def still(frames: int, noise: float = 0.0, seed: int = 0) -> Context:
    """A video that shows one picture, up to noise."""
    context = video(frames, seed=seed)
    x = context.x.clone()
    x = x[:20].repeat(frames, 1) + noise * x
    return replace(context, x=x)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("cls", [True, False])
def test_a_single_image(method: TokenMethod, cls: bool) -> None:
    context = video(1, cls=cls, text=None)
    for k in (1, 4, 19):
        plan = planned(method, context, k)
        assert torch.equal(plan.keep, planned(method, context, k).keep)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("k", [1, 3, 7, 40, 99])
def test_exactly_k_of_many_frames(method: TokenMethod, k: int) -> None:
    """Fewer tokens than frames, too; frames of which earlier cuts have left nothing, too."""
    planned(method, video(10, 2, 5), k)
    planned(method, video(12, 3, 5, alive=100), k)
    assert method.video


@pytest.mark.parametrize("method", METHODS)
def test_all_frames_are_planned_together_in_a_tower(method: TokenMethod) -> None:
    stages = method.stages(TOWER, {})
    assert all(stage.whole for stage in stages)
    assert stages[-1].keep == pytest.approx(method.keep)


# FlashVID


def test_event_relevance() -> None:
    context = video(3, seed=1)
    frames = [context.x[tokens].double() for tokens in frames_of(context)]
    for x, found in zip(context.x.double(), event(context).tolist(), strict=True):
        cosine = [float(x @ f.mean(0) / (x.norm() * f.mean(0).norm())) for f in frames]
        assert found == pytest.approx((1 + sum(cosine) / 3) / 2, abs=1e-5)


def slow_chosen(frame: Context, worth: list[float], count: int) -> list[int]:
    cosine = cosines(frame.x)
    n = len(cosine)
    chosen = [min(range(n), key=lambda i: max(cosine[i][j] for j in range(n) if j != i))]
    while len(chosen) < count:
        left = [i for i in range(n) if i not in chosen]
        chosen.append(max(left, key=lambda i: worth[i] * min(1 - cosine[i][j] for j in chosen)))
    return sorted(chosen)


def test_salient_and_diverse_tokens_of_each_frame_stay() -> None:
    context = video(2, seed=2)
    assert context.tower is not None
    plan = planned(Flashvid(segments=1, cut=-1.0), context, 20)
    worth = torch.cat([class_row(one) for one in context.tower.looked[3]]) * event(context).double()
    for f, tokens in enumerate(frames_of(context)):
        expected = slow_chosen(part_of(context, tokens), worth[tokens].tolist(), 7)
        alone = (plan.size[torch.searchsorted(plan.keep, tokens[expected])] == 1).all()
        assert {20 * f + i for i in expected} <= set(plan.keep.tolist())
        assert alone


def slow_roots(x: Tensor, free: list[bool], frames: list[list[int]], link: float, left: int) -> list[int]:
    """The root of each token; only the strongest links, so that `left` free tokens stay roots."""
    cosine, links = cosines(x), []
    for before, now in itertools.pairwise(frames):
        for i in (i for i in now if free[i]):
            there = [j for j in before if free[j]]
            if there:
                to = max(there, key=lambda j: cosine[i][j])
                links.append((-cosine[i][to], i, to))
    parent = list(range(len(x)))
    for unlike, i, to in sorted(links)[: sum(free) - left]:
        parent[i] = to if -unlike > link else i
    for _ in frames:
        parent = [parent[p] for p in parent]
    return parent


@pytest.mark.parametrize("noise", [0.05, 0.5, 3.0])
def test_trees(noise: float) -> None:
    """Links of any strength: as many trees as there is room for, those of the loops."""
    context = still(3, noise=noise, seed=3)
    plan = planned(Flashvid(segments=1, cut=-1.0, chosen=0.01, link=-1.0), context, 30)
    frames = [tokens.tolist() for tokens in frames_of(context)]
    assert context.tower is not None
    worth = torch.cat([class_row(one) for one in context.tower.looked[3]]) * event(context).double()
    chosen = [slow_chosen(part_of(context, torch.tensor(one)), worth[one].tolist(), 1)[0] + one[0] for one in frames]
    free = [i not in chosen for i in range(60)]
    roots = slow_roots(context.x, free, frames, -1.0, 27)
    assert plan.keep[plan.assign].tolist() == roots
    assert sum(roots[i] == i for i in range(60)) == 30


def test_only_strong_links_make_trees() -> None:
    """What is above the threshold is linked, and clusters make up for the rest."""
    context = still(3, noise=0.5, seed=3)
    frames = [tokens.tolist() for tokens in frames_of(context)]
    roots = slow_roots(context.x, [True] * 60, frames, 0.9, 1)
    trees = linked(context, 0.9, None, 1)
    assert trees.tolist() == roots
    assert 20 < sum(roots[i] == i for i in range(60)) < 60
    plan = planned(Flashvid(segments=1, cut=-1.0, chosen=0.01, link=0.9), context, 12)
    assert float(plan.size.sum()) == 60


def test_trees_of_a_still_video() -> None:
    """All frames the same: each tree is one place through all frames, and nothing is lost."""
    context = still(4, seed=4)
    plan = planned(Flashvid(segments=1, chosen=0.05), context, 24)
    trees = [j for j in range(24) if plan.size[j] == 4]
    assert len(trees) >= 16
    for j in trees:
        members = (plan.assign == j).nonzero()[:, 0]
        assert (members % 20).unique().numel() == 1
        assert (members // 20).tolist() == [0, 1, 2, 3]
    torch.testing.assert_close(plan.apply(context.x)[trees], context.x[plan.keep[trees]], rtol=1e-5, atol=1e-6)


def test_trees_end_with_their_segment() -> None:
    context = still(4, seed=4)
    plan = planned(Flashvid(segments=2, chosen=0.05), context, 44)
    where = plan.assign >= 0
    frame = torch.arange(80) // 20
    assert bool(where.all())
    assert torch.equal((frame >= 1), (frame[plan.keep[plan.assign]] >= 1))  # all alike: cut after the first frame


def test_clusters_make_the_budget() -> None:
    """As many as asked for, in proportion to the roots of each frame; tokens that are fixed stay alone."""
    forest = video(2, 3, 4, seed=5, alive=18)
    fixed = torch.zeros(18, dtype=torch.bool)
    fixed[[0, 7, 15]] = True
    for left in range(1, 16):
        plan = clustered(forest, fixed, left)
        plan.check(18, left + 3)
        assert {0, 7, 15} <= set(plan.keep.tolist())
        for token in (0, 7, 15):
            assert int((plan.assign == plan.assign[token]).sum()) == 1
        assert float(plan.size.sum()) == pytest.approx(float(forest.size.sum()))
        if left >= 2:  # each frame has a cluster, so none is merged into another frame
            assert torch.equal(forest.place[plan.keep[plan.assign], 0], forest.place[:, 0])


def test_flashvid_stages() -> None:
    """The authors' setting: about 31 % of the tokens before layer 20 of 28, 30 % of those after it."""
    first, later = Flashvid().stages(VLM, {})
    assert first.keep == pytest.approx(0.25 * 1.25, rel=0.01)
    assert (later.at.of(28), later.keep, later.probe) == (20, 0.094, -1)
    assert Flashvid(keep=0.5).stages(VLM, {})[0].keep == 1.0
    context = image((3, 3, 3), seed=1, rows=4)
    assert context.rows is not None
    last = sum(head[-1].double() for head in context.rows.attention)
    assert later.plan(context, 8).keep.tolist() == best(last.tolist(), 8)


@pytest.mark.parametrize("options", [{"late": 0.0}, {"chosen": 1.5}, {"segments": 0}])
def test_flashvid_options_that_make_no_sense(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        Flashvid(**options)  # type: ignore[arg-type]


# AOT


@pytest.mark.parametrize("frames", [1, 2, 7, 16])
@pytest.mark.parametrize("distinct", [0.0, 0.3, 1.0])
def test_budgets(frames: int, distinct: float) -> None:
    """They sum to k; a first frame keeps all its anchors, a later one about the share `distinct` of them."""
    sizes = [20] * frames
    for length in (1, 3, 8):
        clips = [range(i, min(i + length, frames)) for i in range(0, frames, length)]
        for k in range(len(clips), 20 * frames + 1, 7):
            count, left = budgets(sizes, clips, k, distinct)
            assert sum(left) == k
            assert all(0 <= b <= a <= 20 for a, b in zip(count, left, strict=True))
            first = {clip[0] for clip in clips}
            assert all(count[f] == left[f] >= 1 for f in first)
            assert max(count) - min(count) <= 1 or max(left[f] for f in range(frames) if f not in first) > min(count)


def test_budgets_of_frames_of_other_sizes() -> None:
    for k in range(2, 33):
        count, left = budgets([2, 10, 20], [range(1), range(1, 3)], k, 0.3)
        assert sum(left) == k
        assert all(b <= a <= n for a, b, n in zip(count, left, [2, 10, 20], strict=True))


def test_half_of_the_anchors_come_from_windows() -> None:
    context = video(1, 6, 6, seed=6)
    near, far = torch.rand(2, 36, generator=torch.Generator().manual_seed(1))
    found = anchors(context, near, far, 19).tolist()
    local = set()
    for r in range(3):
        for c in range(3):
            window = [row * 6 + col for row in (2 * r, 2 * r + 1) for col in (2 * c, 2 * c + 1)]
            local.add(max(window, key=lambda i: float(near[i])))
    others = [i for i in range(36) if i not in local]
    best_far = sorted(others, key=lambda i: -float(far[i]))[:10]
    assert found == sorted(local | set(best_far))


@pytest.mark.parametrize("depth", [1, 2, 4, 27])
def test_layers_that_aot_looks_at(depth: int) -> None:
    assert layers(depth)[-1] == depth - 1
    assert layers(27) == (5, 26)


def slow_between(context: Context, left: list[int]) -> tuple[list[int], dict[int, Tensor]]:
    """One clip: the tokens that stay, and what the first frame's become."""
    cosine, frames = cosines(context.x), [tokens.tolist() for tokens in frames_of(context)]
    stays = list(frames[0])
    total = {j: context.x[j].double() * float(context.size[j]) for j in frames[0]}
    mass = {j: float(context.size[j]) for j in frames[0]}
    for gap in range(1, len(frames)):
        unlike = [[1 - cosine[i][j] for j in frames[0]] for i in frames[gap]]
        least = min(min(row) for row in unlike)
        cost = torch.tensor([[one - least for one in row] for row in unlike]).double()
        share = transport(cost * (1 - math.exp(-(gap**2) / (2 * 1.5**2))), 0.1).double()
        order = sorted(range(len(frames[gap])), key=lambda i: (float(share[i].max()), i))
        stays += [frames[gap][i] for i in order[: left[gap]]]
        for i in order[left[gap] :]:
            for place, j in enumerate(frames[0]):
                given = float(share[i, place]) * float(context.size[frames[gap][i]])
                total[j] = total[j] + given * context.x[frames[gap][i]].double()
                mass[j] += given
    return sorted(stays), {j: total[j] / mass[j] for j in total}


@pytest.mark.parametrize("left", [[5, 0, 0], [5, 2, 3], [5, 5, 1]])
def test_a_clip_is_merged_into_its_first_frame(left: list[int]) -> None:
    context = image((3, 1, 5), seed=7)
    context = replace(context, size=torch.randint(1, 5, (15,), generator=torch.Generator().manual_seed(1)).float())
    plan = between(context, [range(3)], [5, 5, 5], left)
    stays, means = slow_between(context, left)
    assert plan.keep.tolist() == stays
    applied = plan.apply(context.x).double()
    for j, mean in means.items():
        torch.testing.assert_close(applied[stays.index(j)], mean, rtol=1e-4, atol=1e-5)
    for i in stays[5:]:
        assert torch.equal(plan.apply(context.x)[stays.index(i)], context.x[i])
    assert float(plan.size.sum()) == pytest.approx(float(context.size.sum()), rel=1e-5)


def test_nothing_is_lost_and_nothing_twice() -> None:
    """Frames, clips and all: sizes sum to all tokens, whatever their number."""
    context = video(7, seed=8)
    plan = planned(Aot(clip=3), context, 30)
    assert float(plan.size.sum()) == pytest.approx(140, rel=1e-4)
    assert plan.mix is not None
    assert plan.mix.sum(1).tolist() == pytest.approx([1.0] * 30, rel=1e-4)
    assert plan.keep.unique().numel() == 30


def test_clips_do_not_mix() -> None:
    context = video(6, seed=9)
    plan = planned(Aot(clip=3), context, 24)
    assert plan.mix is not None
    half = plan.keep < 60
    assert bool((plan.mix[half][:, 60:] == 0).all())
    assert bool((plan.mix[~half][:, :60] == 0).all())


def test_what_is_new_in_a_later_frame_stays() -> None:
    """A token like none of the first frame's goes to none in particular."""
    context = image((2, 1, 6), seed=10)
    x = torch.zeros(12, 12)
    x[:6] = torch.eye(12)[:6]
    x[6:] = x[:6]
    x[9] = torch.eye(12)[11]
    plan = between(replace(context, x=x), [range(2)], [6, 6], [6, 1])
    assert plan.keep.tolist() == [0, 1, 2, 3, 4, 5, 9]


@pytest.mark.parametrize("frames", [1, 2])
def test_strength(frames: int) -> None:
    """Anchors become the mean of what they are given, to a tenth unless told otherwise; sizes count all of it."""
    context = video(1, seed=11) if frames == 1 else still(2, noise=0.3, seed=11)
    plans = {s: planned(Aot(strength=s, distinct=0.0), context, 5) for s in (0.0, 0.1, 1.0)}
    own, full = context.x[plans[1.0].keep], plans[1.0].apply(context.x)
    assert bool(((full - own).norm(dim=1) / own.norm(dim=1) > 0.2).all())
    assert torch.equal(plans[0.0].apply(context.x), own)
    assert torch.equal(planned(Aot(distinct=0.0), context, 5).apply(context.x), plans[0.1].apply(context.x))
    for plan in plans.values():
        assert torch.equal(plan.keep, plans[1.0].keep)
        assert float(plan.size.sum()) == pytest.approx(context.tokens, rel=1e-4)
    if frames == 1:
        torch.testing.assert_close(plans[0.1].apply(context.x), 0.9 * own + 0.1 * full)


@pytest.mark.parametrize("options", [{"clip": 0}, {"distinct": 1.5}, {"strength": -0.1}])
def test_aot_options_that_make_no_sense(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        Aot(**options)  # type: ignore[arg-type]


# Tempo


def slow_relevance(context: Context) -> list[float]:
    assert context.text is not None
    found = []
    for x in context.x.double():
        found.append(sum(float(x @ t / (x.norm() * t.norm())) for t in context.text.double()) / len(context.text))
    return found


@pytest.mark.parametrize("k", [16, 40, 70])
def test_segments_get_tokens_by_relevance(k: int) -> None:
    """least + (k - S · least) · r / Σ r, r from 0 to 1, up to rounding; none more than it has."""
    context = video(8, 2, 6, seed=12)
    found = slow_relevance(context)
    r = [sum(found[24 * s : 24 * s + 24]) / 24 for s in range(4)]
    r = [(one - min(r)) / (max(r) - min(r)) for one in r]
    plan = planned(Tempo(segment=2, least=3), context, k)
    counts = [int(((plan.keep // 24) == s).sum()) for s in range(4)]
    assert sum(counts) == k
    assert counts[r.index(0.0)] == 3
    if max(counts) < 24:
        for count, one in zip(counts, r, strict=True):
            assert abs(count - (3 + (k - 12) * one / sum(r))) < 1
    assert sorted(range(4), key=lambda s: counts[s]) == sorted(range(4), key=lambda s: (min(counts[s], 24), r[s]))


def test_head_and_even() -> None:
    context = video(2, 2, 6, seed=12)
    head = planned(Tempo(segment=1, cut="head"), context, 10)
    even = planned(Tempo(segment=1), context, 10)
    for s in range(2):
        mine = [i - 12 * s for i in head.keep.tolist() if i // 12 == s]
        assert mine == list(range(len(mine)))
        spread = [i - 12 * s for i in even.keep.tolist() if i // 12 == s]
        assert spread == [math.floor((j + 0.5) * 12 / len(mine)) for j in range(len(mine))]
    assert not even.merges


def test_without_text_all_segments_are_alike() -> None:
    said: list[str] = []
    context = replace(video(4, 2, 6, seed=12, text=None), note=said.append)
    plan = planned(Tempo(segment=1), context, 20)
    assert [int(((plan.keep // 12) == s).sum()) for s in range(4)] == [5, 5, 5, 5]
    assert relevance(context).tolist() == [0.0] * 48
    assert "no text" in said[0]
