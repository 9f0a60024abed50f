"""Expected Attention against the paper's formula with whole matrices in double precision; its statistics."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tcw.errors import UsageError
from tcw.kv import AttentionCall, Group, LayerShape, Memory
from tcw.kv.expected_attention import ExpectedAttention
from tcw.kv.rope import Rope

from .attention_calls import assert_padding_changes_nothing, random_call, room_of, scored

SPREAD, NEAR = 1.5, {"atol": 1e-5, "rtol": 1e-4}
ROPES = {
    "halves": Rope(torch.tensor([1.0, 0.3, 0.1, 0.02])),
    "interleaved": Rope(torch.tensor([1.0, 0.3, 0.1, 0.02]), 1.0, True),
    "partial": Rope(torch.tensor([1.0, 0.1])),
    "yarn": Rope(torch.tensor([1.0, 0.3, 0.1, 0.02]), 1.3),
}


def layer(rope: Rope) -> LayerShape:
    return LayerShape(5, 0, 1, 4, 2, 8, 10, torch.float32, rope)


def statistics(seed: int = 1) -> dict[str, Tensor]:
    made = torch.Generator().manual_seed(seed)
    factor = torch.randn(4, 8, 8, generator=made) * SPREAD / 8
    return {
        "5.mean": torch.randn(4, 8, generator=made),
        "5.covariance": factor @ factor.transpose(1, 2),
    }


def scorer(rope: Rope = ROPES["halves"], heads: tuple[int, ...] = (0, 1), **options: float):
    return ExpectedAttention(**options).scorer(layer(rope), Group(heads), statistics())


def rotation(rope: Rope, position: int) -> Tensor:
    """The matrix that turns a query at `position`, float64 [8, 8]."""
    turn, bands = torch.eye(8, dtype=torch.float64), len(rope.inv_freq)
    for f, frequency in enumerate(rope.inv_freq.double().tolist()):
        a, b = (2 * f, 2 * f + 1) if rope.interleaved else (f, f + bands)
        cos, sin = math.cos(position * frequency), math.sin(position * frequency)
        turn[a, a], turn[a, b], turn[b, a], turn[b, b] = (x * rope.scaling for x in (cos, -sin, sin, cos))
    return turn


def expected(call: AttentionCall, rope: Rope, future: int, epsilon: float, sinks: int) -> Tensor:
    """[B, G, n] by the paper."""
    known, scores = statistics(), torch.zeros(call.keys.shape[:3], dtype=torch.float64)
    for b in range(call.keys.shape[0]):
        newest = int(call.positions[b, -1])
        mean_turn = sum(rotation(rope, newest + t) for t in range(1, future + 1)) / future
        for g in range(2):
            keys, values = call.keys[b, g].double(), call.values[b, g].double()
            for head in (2 * g, 2 * g + 1):
                mean = mean_turn @ known["5.mean"][head].double()
                covariance = mean_turn @ known["5.covariance"][head].double() @ mean_turn.T
                z = [math.exp(mean @ k * call.scaling + k @ covariance @ k * call.scaling**2 / 2) for k in keys]
                for j in range(sinks, len(keys)):
                    scores[b, g, j] += z[j] / sum(z[sinks:]) / 2
            scores[b, g] = (scores[b, g] + epsilon) * values.square().sum(-1).sqrt()
    return scores


@pytest.mark.parametrize("kind", list(ROPES))
@pytest.mark.parametrize(("future", "epsilon"), [(1, 0.0), (7, 0.02), (60, 0.5)])
def test_the_papers_score(kind: str, future: int, epsilon: float) -> None:
    call = random_call(batch=2)
    call.positions = torch.stack([torch.arange(12) + 8, torch.arange(12) + 3])
    found = scored(scorer(ROPES[kind], future=future, epsilon=epsilon), call)
    wanted = expected(call, ROPES[kind], future, epsilon, sinks=2)
    torch.testing.assert_close(found[..., 2:], wanted[..., 2:].float(), **NEAR)


def test_it_is_the_mean_of_exponentials() -> None:
    """With one position ahead and one head, what many drawn queries give."""
    rope, made = ROPES["halves"], torch.Generator().manual_seed(3)
    mean, factor = torch.randn(8, generator=made) * 0.5, torch.randn(8, 8, generator=made) * 0.3
    call = random_call(kv_heads=1, shared=1)
    drawn = mean + torch.randn(400_000, 8, generator=made) @ factor.T
    queries = rope.rotate(drawn, torch.full((len(drawn),), int(call.positions[0, -1]) + 1))
    weights = (queries @ call.keys[0, 0].T * call.scaling).exp().mean(0)
    known = {"5.mean": mean[None], "5.covariance": (factor @ factor.T)[None]}
    shape = replace(layer(rope), heads=1, kv_heads=1)
    method = ExpectedAttention(future=1, epsilon=0.0).scorer(shape, Group((0,)), known)
    found = scored(method, call)[0, 0, 2:] / call.values[0, 0, 2:].norm(dim=-1)
    torch.testing.assert_close(found, weights[2:] / weights[2:].sum(), atol=0, rtol=0.02)


def test_heads_of_a_group_have_their_own_statistics() -> None:
    call = random_call()
    both, one = scored(scorer(), call), replace(call, queries=call.queries[:, 2:])
    one.keys, one.values = call.keys[:, 1:], call.values[:, 1:]
    torch.testing.assert_close(scored(scorer(heads=(1,)), one), both[:, 1:])


@pytest.mark.parametrize("kind", ["halves", "partial"])
def test_padding(kind: str) -> None:
    assert_padding_changes_nothing(scorer(ROPES[kind]), random_call(queries=20))


def test_meta() -> None:
    call = random_call()
    call.queries, call.keys, call.values, call.positions = (
        t.to("meta") for t in (call.queries, call.keys, call.values, call.positions)
    )
    known = {name: t.to("meta") for name, t in statistics().items()}
    made = ExpectedAttention().scorer(layer(ROPES["halves"].to(torch.device("meta"))), Group((0, 1)), known)
    assert made.score(call, Memory(), room_of(call)).shape == (1, 2, 20)


class Watched:
    """A session of calls of one layer."""

    def __init__(self, rope: Rope, sequences: list[Tensor]) -> None:
        self.rope, self.sequences = rope, sequences

    def watch(self, look) -> None:
        for queries in self.sequences:
            positions = torch.arange(queries.shape[1])[None]
            turned = self.rope.rotate(queries[None], positions[:, None])
            look(layer(self.rope), AttentionCall(turned, turned, turned, None, positions, 1.0, None, 0))


@pytest.mark.parametrize("kind", list(ROPES))
def test_statistics_of_the_text(kind: str) -> None:
    made = torch.Generator().manual_seed(2)
    sequences = [torch.randn(4, m, 8, generator=made) + 5 for m in (30, 4, 3, 12, 5)]
    for queries in sequences:
        queries[:, :4] += 100  # the first ones do not count
    found = ExpectedAttention().calibrate(Watched(ROPES[kind], sequences))
    assert set(found) == {"5.mean", "5.covariance"}
    for head in range(4):
        rows = torch.cat([queries[head, 4:] for queries in sequences]).double()
        torch.testing.assert_close(found["5.mean"][head], rows.mean(0).float(), **NEAR)
        wanted = torch.cov(rows.T, correction=0).float()
        torch.testing.assert_close(found["5.covariance"][head], wanted, atol=1e-4, rtol=1e-4)


def test_a_text_too_short() -> None:
    with pytest.raises(UsageError, match="6 tokens"):
        ExpectedAttention().calibrate(Watched(ROPES["halves"], [torch.zeros(4, 5, 8)]))


@pytest.mark.parametrize("options", [{"future": 0}, {"epsilon": -1.0}])
def test_options_that_make_no_sense(options: dict[str, float]) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        ExpectedAttention(**options)
