"""ZipVL: the number of tokens by brute force, the score by plain loops."""

import pytest
import torch

from tcw.kv import LayerShape, Memory, Room
from tcw.kv.zipvl import Zipvl, _probes

from .attention_calls import (
    assert_padding_changes_nothing,
    attention,
    behind_padding,
    random_call,
    room_of,
    scored,
    summed,
)  # fmt: skip

LAYER = LayerShape(0, 0, 2, 4, 2, 8, 8, torch.float32)


def scorer(probes: int = 3):
    return Zipvl(probes=probes).scorer(None, None, {})


def fewest(mass: list[float], room: Room, tau: float) -> int:
    """Try 0, 1, 2, ... tokens of the room until those and all outside hold the share."""
    inside = sorted(mass[room.first : room.end], reverse=True)
    outside = sum(mass) - sum(inside)
    for count in range(len(inside) + 1):
        if outside + sum(inside[:count]) >= tau * sum(mass):
            return count
    return len(inside)


@pytest.mark.parametrize("queries", [1, 2, 5, 64, 200, 5000])
def test_probes_are_the_newest_and_thin_out(queries: int) -> None:
    call = random_call(1, 1, 1, queries, queries, dim=1)
    rows = _probes(call, 64).tolist()
    assert rows == sorted(set(rows))
    assert rows[-min(64, queries) :] == list(range(max(0, queries - 64), queries))
    assert rows[0] >= 0
    assert len(rows) <= 64 + 8 * 7
    longer = _probes(random_call(1, 1, 1, queries + 9, queries + 9, dim=1), 64)
    assert (longer - 9)[-len(rows) :].tolist() == rows  # counted from the end


def test_normalised_attention() -> None:
    call = random_call(batch=2, shared=3, queries=20)
    rows = _probes(call, 3).tolist()
    sums = summed(attention(call), 2, rows)
    found = scored(scorer(), call)
    for b in range(2):
        for g in range(2):
            expected = [s / max(1, sum(row >= j for row in rows)) for j, s in enumerate(sums[b][g])]
            torch.testing.assert_close(found[b, g], torch.tensor(expected), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("tau", [0.05, 0.3, 0.5, 0.8, 0.95, 0.999])
@pytest.mark.parametrize("scale", [0.3, 1.0, 2.0])
def test_count_is_the_fewest_that_hold_the_share(tau: float, scale: float) -> None:
    method = Zipvl(tau=tau, probes=3)
    for seed in range(4):
        call = random_call(batch=2, queries=20, seed=seed, scale=scale)
        sums, room = summed(attention(call), 2, _probes(call, 3).tolist()), room_of(call, keep=14)
        brute = max(fewest(head, room, tau) for sequence in sums for head in sequence)
        assert method.count(call, Memory(), room) == brute
        assert method.count(call, Memory(), room_of(call, keep=2)) == min(2, brute)


def test_count_follows_tau_and_the_text() -> None:
    call, room = random_call(queries=20, scale=4.0), room_of(random_call(), keep=14)
    counts = [Zipvl(tau=tau).count(call, Memory(), room) for tau in (0.1, 0.5, 0.9, 0.99, 1.0)]
    assert counts == sorted(counts)
    assert counts[0] < counts[-1]
    even = random_call(queries=20, scale=0.0)
    assert Zipvl(tau=0.9).count(even, Memory(), room) > Zipvl(tau=0.9).count(call, Memory(), room)


def test_count_behind_padding() -> None:
    call = random_call(queries=20, scale=2.0)
    padded, room = behind_padding(call, 5), room_of(random_call(held=25), keep=19)
    both = Zipvl(tau=0.7, probes=3).count(padded, Memory(), room)
    second = random_call(1, 2, 2, 25, 25, seed=99)
    alone = [
        Zipvl(tau=0.7, probes=3).count(call, Memory(), room_of(call, keep=14)),
        Zipvl(tau=0.7, probes=3).count(second, Memory(), room),
    ]
    assert both == max(alone)


def test_a_step_and_a_plan_take_what_the_budget_gives() -> None:
    room = Room(2, 16, 7)
    assert Zipvl(tau=0.1).count(random_call(queries=1), Memory(), room) == 7
    call = random_call(queries=20)
    call.queries, call.keys, call.values = (t.to("meta") for t in (call.queries, call.keys, call.values))
    assert Zipvl(tau=0.1).count(call, Memory(), room) == 7


def test_padding() -> None:
    assert_padding_changes_nothing(scorer(), random_call(queries=20))


def test_without_a_budget_there_is_no_limit() -> None:
    assert Zipvl().groups(LAYER, {})[0].limit(1000) is None
    assert Zipvl(ratio=0.5).groups(LAYER, {})[0].limit(1000) == 500
    assert Zipvl(tokens=100).groups(LAYER, {})[0].limit(1000) == 100


@pytest.mark.parametrize("options", [{"tau": 0.0}, {"tau": 1.1}, {"probes": 0}])
def test_options_that_make_no_sense(options: dict[str, float]) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        Zipvl(**options)
