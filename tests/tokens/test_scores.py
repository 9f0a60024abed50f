"""Scores, beside loops in float64."""

import pytest
import torch
from torch import Tensor

from tcw.errors import UsageError
from tcw.tokens import scores
from tcw.tokens._similarity import farthest_points
from tcw.tokens.context import Context

from .contexts import HEADS, class_row, image, received_row


def close(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-4, atol=1e-6)


def noted(context: Context) -> list[str]:
    notes: list[str] = []
    context.note = notes.append
    return notes


@pytest.mark.parametrize("alive", [None, 9])
def test_cls_attention(alive: int | None) -> None:
    context = image((2, 3, 4), layers=(1, 3), alive=alive)
    notes = noted(context)
    rows = [torch.cat([class_row(one) for one in context.tower.looked[n]]) for n in (1, 3)]
    close(scores.cls_attention(lambda depth: (1, 3))(context), sum(rows)[context.alive])
    close(scores.cls_attention()(context), rows[1][context.alive])
    assert not notes


def test_cls_attention_without_a_class_token() -> None:
    context = image((2, 3, 4), layers=(3,), cls=False)
    notes = noted(context)
    close(scores.cls_attention()(context), torch.cat([received_row(one) for one in context.tower.looked[3]]))
    assert len(notes) == 1
    assert "class token" in notes[0]


@pytest.mark.parametrize("cls", [True, False])
def test_received_attention(cls: bool) -> None:
    context = image((1, 4, 3), layers=(2, 3), cls=cls)
    expected = sum(received_row(context.tower.looked[n][0]) for n in (2, 3))
    close(scores.received_attention(lambda depth: (2, 3))(context), expected)


@pytest.mark.parametrize("score", [scores.cls_attention(), scores.received_attention()])
def test_a_tower_that_is_not_known(score: scores.Score) -> None:
    with pytest.raises(UsageError, match="of the vision tower") as caught:
        score(image((1, 2, 2)))
    assert "divprune" in caught.value.hint


def test_layers() -> None:
    assert scores.last_third(23) == tuple(range(16, 23)), "LLaVA: layers 16 to 22"
    assert [scores.last_third(depth) for depth in (1, 2, 3, 4)] == [(0,), (1,), (2,), (3,)]
    assert scores.last_third(6) == (4, 5)
    assert scores.last(7) == (6,)


def pooled(context: Context, text: Tensor, pool: str) -> Tensor:
    found = []
    for token in context.x.double():
        cosines = torch.stack([token @ word / (token.norm() * word.norm()) for word in text.double()])
        weights = (cosines / 0.05).exp() if pool == "soft" else torch.ones(len(cosines))
        found.append(cosines.max() if pool == "max" else (cosines * weights).sum() / weights.sum())
    return torch.stack(found)


@pytest.mark.parametrize("pool", scores.POOLS)
def test_text_similarity(pool: str) -> None:
    context = image((1, 3, 3), text=5)
    close(scores.text_similarity(pool)(context), pooled(context, context.text, pool))
    close(scores.text_similarity(pool, sign=-1)(context), -pooled(context, context.text, pool))


@pytest.mark.parametrize("text", [None, 0])
def test_text_similarity_without_text(text: int | None) -> None:
    context = image((1, 3, 3), text=text)
    notes = noted(context)
    mean = (context.x / context.x.norm(dim=1, keepdim=True)).mean(0, keepdim=True)
    close(scores.text_similarity()(context), pooled(context, mean, "mean"))
    assert len(notes) == 1
    assert "no text" in notes[0]


def test_text_similarity_pools_in_three_ways() -> None:
    with pytest.raises(ValueError, match="mean, max, soft"):
        scores.text_similarity("median")


def test_rows_of_the_language_model() -> None:
    context = image((1, 3, 4), rows=4, alive=7)
    attention = context.rows.attention.double()
    last = [sum(attention[h, 3, j] for h in range(HEADS)) / HEADS for j in range(7)]
    every = [sum(attention[h, i, j] for h in range(HEADS) for i in range(4)) / HEADS / 4 for j in range(7)]
    close(scores.last_row()(context), torch.stack(last))
    close(scores.text_rows()(context), torch.stack(every))


@pytest.mark.parametrize("score", [scores.last_row(), scores.text_rows()])
@pytest.mark.parametrize(("rows", "words"), [(None, "language-model layer"), (0, "no text follows")])
def test_rows_that_are_not_there(score: scores.Score, rows: int | None, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        score(image((1, 2, 2), rows=rows))


def errors(x: Tensor, basis: list[int]) -> Tensor:
    """Each token's distance from what least squares with a small penalty make of it."""
    x = x.double()
    S = x[basis]
    ridge = 1e-5 * float((S @ S.T).diagonal().mean())
    tall = torch.cat([S.T, ridge**0.5 * torch.eye(len(basis), dtype=x.dtype)])
    found = []
    for token in x:
        wide = torch.cat([token, torch.zeros(len(basis), dtype=x.dtype)])
        found.append((token - torch.linalg.lstsq(tall, wide[:, None]).solution[:, 0] @ S).norm())
    return torch.stack(found)


def test_approximation_error() -> None:
    context = image((1, 5, 5))
    basis = farthest_points(context.x, 4)
    found = scores.residual(context.x, basis)
    torch.testing.assert_close(found.double(), errors(context.x, basis.tolist()), rtol=1e-4, atol=1e-4)
    assert float(found[basis].max()) < 1e-3 * float(found.mean())
    assert torch.equal(scores.approximation_error(4)(context), found)
    for scale in (1e4, 1e-4):  # the penalty goes with the features
        torch.testing.assert_close(scores.residual(context.x * scale, basis) / scale, found, rtol=1e-3, atol=1e-4)


def test_approximation_error_of_few_or_equal_tokens() -> None:
    assert scores.approximation_error(10)(image((1, 1, 3))).shape == (3,)
    assert float(scores.approximation_error(3)(image((1, 3, 3), flat=True, scale=1e4)).max()) < 10.0
    assert not scores.approximation_error(3)(image((1, 3, 3), scale=0.0)).any()


def test_farthest_points() -> None:
    for seed in range(5):
        x = image((1, 4, 5), seed=seed).x
        points = x.double()
        chosen = [int((points - points.mean(0)).norm(dim=1).argmax())]
        while len(chosen) < 8:
            gaps = [min(float((p - points[j]).norm()) for j in chosen) for p in points]
            chosen.append(max((i for i in range(20) if i not in chosen), key=lambda i: gaps[i]))
        assert farthest_points(x, 8).tolist() == chosen


def test_controls() -> None:
    context = image((1, 3, 4))
    close(scores.norm()(context), torch.stack([(t.double() ** 2).sum().sqrt() for t in context.x]))
    drawn = scores.random_score(1)(context)
    assert torch.equal(drawn, scores.random_score(1)(image((1, 3, 4), seed=9))), "of an image's size only"
    assert not torch.equal(drawn, scores.random_score(2)(context))
    context.seed = 1
    assert torch.equal(scores.random_score(0)(context), drawn)
    many = scores.random_score()(image((4, 40, 40)))
    assert abs(float(many.mean()) - 0.5) < 0.02


def test_min_max() -> None:
    assert scores.min_max(torch.tensor([3.0, 1.0, 2.0])).tolist() == [1.0, 0.0, 0.5]
    assert scores.min_max(torch.full((3,), 7.0)).tolist() == [1.0, 1.0, 1.0]
    assert scores.min_max(torch.tensor([1e30, 0.0])).tolist() == [1.0, 0.0]
