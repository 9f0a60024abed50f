import pytest
import torch
from torch import Tensor

from tcw.tokens import Shape
from tcw.tokens.ward import Ward, linkage, means

from .contexts import image


def slowly(x: Tensor, size: Tensor, k: int) -> Tensor:
    """Every pair of groups is looked at for every merge."""
    groups = [([i], x[i].double(), float(size[i])) for i in range(len(x))]
    while len(groups) > k:
        pairs = [(i, j) for i in range(len(groups)) for j in range(i + 1, len(groups))]

        def cost(pair: tuple[int, int]) -> float:
            (_, x, m), (_, y, n) = groups[pair[0]], groups[pair[1]]
            return m * n / (m + n) * float((x - y).square().sum())

        i, j = min(pairs, key=cost)
        (tokens, x_mean, m), (others, y_mean, n) = groups[i], groups[j]
        groups[i] = (tokens + others, (m * x_mean + n * y_mean) / (m + n), m + n)
        del groups[j]
    found = torch.empty(len(x), dtype=torch.int64)
    for number, (tokens, _, _) in enumerate(sorted(groups, key=lambda group: min(group[0]))):
        found[tokens] = number
    return found


@pytest.mark.parametrize("tokens", [1, 2, 3, 17, 26])
@pytest.mark.parametrize("weighted", [False, True])
def test_linkage_is_that_of_one_merge_after_the_other(tokens: int, weighted: bool) -> None:
    source = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, 4, generator=source)
    size = torch.randint(1, 6, (tokens,), generator=source).float() if weighted else torch.ones(tokens)
    for k in {1, 2, tokens // 2, tokens - 1, tokens} & set(range(1, tokens + 1)):
        assert torch.equal(linkage(x, size, k), slowly(x, size, k))


def test_tokens_that_are_the_same_come_first() -> None:
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))[torch.tensor([0, 1, 2, 0, 1, 5])]
    assert linkage(x, torch.ones(6), 4).tolist() == [0, 1, 2, 0, 1, 3]


@pytest.mark.parametrize("k", [1, 5, 7, 16])
def test_tokens_that_are_all_the_same(k: int) -> None:
    found = linkage(torch.ones(16, 3), torch.ones(16), k)
    assert found.unique().tolist() == list(range(k))


def test_a_group_becomes_its_mean_at_the_token_nearest_to_it() -> None:
    x = torch.tensor([[0.0], [9.0], [1.0], [8.0], [5.0]])
    plan = means(x, torch.tensor([1, 0, 1, 0, 1]), torch.tensor([1.0, 2.0, 3.0, 1.0, 1.0]))
    assert plan.keep.tolist() == [1, 2]
    assert plan.assign.tolist() == [1, 0, 1, 0, 1]
    assert plan.size.tolist() == [3.0, 5.0]
    assert torch.allclose(plan.apply(x), torch.tensor([[26 / 3], [8 / 5]]))


def test_groups_vary_less_than_those_around_random_tokens() -> None:
    context = image((1, 8, 8))
    (stage,) = Ward(keep=0.25).stages(Shape(blocks=4, layers=0, has_cls=True), {})
    plan = stage.plan(context, 16)
    plan.check(64, 16)

    def spread(assign: Tensor) -> float:
        x = torch.nn.functional.normalize(context.x, dim=-1)
        return sum(float((x[assign == g] - x[assign == g].mean(0)).square().sum()) for g in assign.unique())

    x = torch.nn.functional.normalize(context.x, dim=-1)
    around = torch.cdist(x, x[torch.randperm(64, generator=torch.Generator().manual_seed(0))[:16]]).argmin(1)
    assert spread(plan.assign) < 0.9 * spread(around)


def where(method: Ward, shape: Shape) -> list[tuple[str, int, float | None]]:
    return [(stage.at.kind, stage.at.of(shape.blocks), stage.keep) for stage in method.stages(shape, {})]


def test_where_it_cuts() -> None:
    shape = Shape(12, 6, True)
    assert where(Ward(), shape) == [("block", 6, 0.25)]
    assert where(Ward(depth=0.42), shape) == [("block", 5, 0.25)]
    assert where(Ward(keep=0.5, cuts=2), shape) == [("block", 3, 0.75), ("block", 9, 0.5)]
    assert where(Ward(keep=0.5, cuts=2, depth=0.25), shape) == [("block", 1, 0.75), ("block", 4, 0.5)]
    assert [number for _, number, _ in where(Ward(cuts=12), shape)] == list(range(12))
    assert where(Ward(cuts=3), Shape(12, 6, True, merges_inside=False)) == [("input", 3, 0.25)]


def test_more_cuts_than_blocks() -> None:
    assert where(Ward(keep=0.25, cuts=4), Shape(2, 0, True)) == [("block", 0, 0.625), ("block", 1, 0.25)]


@pytest.mark.parametrize(("options", "message"), [({"depth": 1.0}, "below 1"), ({"cuts": 0}, "1 or more")])
def test_options_that_make_no_sense(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Ward(**options)  # type: ignore[arg-type]
