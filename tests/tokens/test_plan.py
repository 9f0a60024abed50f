"""Plans: selection, means, mixes, composition, and what `check` refuses."""

import pytest
import torch
from torch import Tensor

from tcw.tokens.plan import Plan


def slow(plan: Plan, x: Tensor) -> Tensor:
    """Weighted means, token by token, in float64."""
    rows = []
    for k in range(plan.kept):
        members = [i for i in range(len(x)) if plan.assign[i] == k]
        total = sum(float(plan.weight[i]) for i in members)
        rows.append(sum(float(plan.weight[i]) * x[i].double() for i in members) / total)
    return torch.stack(rows).to(x.dtype)


def random_plan(tokens: int, kept: int, seed: int, dropped: bool = True) -> Plan:
    generator = torch.Generator().manual_seed(seed)
    keep = torch.randperm(tokens, generator=generator)[:kept].sort().values
    assign = torch.randint(-1 if dropped else 0, kept, (tokens,), generator=generator)
    assign[keep] = torch.arange(kept)
    return Plan.merging(keep, assign, torch.rand(tokens, generator=generator) + 0.5)


@pytest.mark.parametrize("seed", range(5))
def test_means(seed: int) -> None:
    plan, x = random_plan(20, 7, seed), torch.randn(20, 5, generator=torch.Generator().manual_seed(seed))
    plan.check(20, 7)
    torch.testing.assert_close(plan.apply(x), slow(plan, x))
    torch.testing.assert_close(plan.matrix() @ x, slow(plan, x))


def test_a_token_alone_keeps_its_bits() -> None:
    x = torch.randn(6, 4).to(torch.bfloat16)
    plan = Plan.merging(torch.tensor([0, 2, 5]), torch.tensor([0, 1, 1, -1, -1, 2]), torch.full((6,), 3.0))
    found = plan.apply(x)
    assert torch.equal(found[0], x[0])
    assert torch.equal(found[2], x[5])
    assert not torch.equal(found[1], x[2])
    assert plan.merges
    assert torch.equal(plan.size, torch.tensor([3.0, 6.0, 3.0]))


def test_dropping_is_a_gather() -> None:
    x = torch.randn(6, 2, 3)
    plan = Plan.dropping(torch.tensor([4, 1]), torch.ones(6))
    assert torch.equal(plan.apply(x), x[[1, 4]])
    assert not plan.merges
    assert torch.equal(plan.assign, torch.tensor([-1, 0, -1, -1, 1, -1]))
    assert torch.equal(Plan.everything(torch.ones(6)).apply(x), x)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("mixed", [False, True])
def test_two_plans_as_one(seed: int, mixed: bool) -> None:
    first, second = random_plan(20, 9, seed), random_plan(9, 4, seed + 100)
    if mixed:
        second = Plan(second.keep, second.assign, second.weight, second.size, second.matrix())
    x = torch.randn(20, 5, generator=torch.Generator().manual_seed(seed))
    both = first.then(second)
    both.check(20, 4)
    torch.testing.assert_close(both.apply(x), second.apply(first.apply(x)))
    assert torch.equal(both.keep, first.keep[second.keep])
    assert torch.equal(both.size, second.size)


def test_sizes_of_a_merge_sum_to_the_tokens() -> None:
    plan = random_plan(30, 11, 3, dropped=False)
    torch.testing.assert_close(plan.size.sum(), plan.weight.sum())


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (Plan.dropping(torch.tensor([1]), torch.ones(4)), "where 2 were asked"),
        (Plan(torch.tensor([2, 1]), torch.tensor([-1, 1, 0, -1]), torch.ones(4), torch.ones(2)), "ascending"),
        (Plan(torch.tensor([1, 4]), torch.tensor([-1, 0, -1, 1]), torch.ones(4), torch.ones(2)), "none of the image"),
        (Plan(torch.tensor([1, 2]), torch.tensor([-1, 0, 0, -1]), torch.ones(4), torch.ones(2)), "does not stay"),
        (Plan(torch.tensor([1, 2]), torch.tensor([5, 0, 1, -1]), torch.ones(4), torch.ones(2)), "does not stay"),
        (Plan(torch.tensor([1, 2]), torch.tensor([-1, 0, 1, -1]), torch.ones(3), torch.ones(2)), "do not fit"),
        (Plan(torch.tensor([1, 2]), torch.tensor([-1, 0, 1, -1]), torch.ones(4), torch.zeros(2)), "positive"),
    ],
)
def test_refused(plan: Plan, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        plan.check(4, 2)
