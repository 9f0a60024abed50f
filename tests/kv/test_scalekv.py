"""ScaleKV: two levels that add up to the budget; the index of a layer by plain loops."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tcw.errors import UsageError
from tcw.kv import AttentionCall, LayerShape
from tcw.kv import scalekv as module
from tcw.kv.scalekv import Scalekv

from .attention_calls import attention, random_call

BUDGETS = st.one_of(
    st.floats(0.01, 1).map(lambda share: {"ratio": share}), st.integers(40, 9000).map(lambda count: {"tokens": count})
)


def shape(depth: int, layers: int) -> LayerShape:
    return LayerShape(2 * depth, depth, layers, 4, 2, 8, 8, torch.float32)


def limits(method: Scalekv, selectivity: list[float], seen: int) -> list[int]:
    tensors, layers = {"selectivity": torch.tensor(selectivity)}, len(selectivity)
    return [method.groups(shape(depth, layers), tensors)[0].limit(seen) for depth in range(layers)]


class Watched:
    """A session of one or more calls for each layer."""

    def __init__(self, calls: list[list[AttentionCall]]) -> None:
        self.calls, self.layers = calls, tuple(shape(depth, len(calls)) for depth in range(len(calls)))

    def watch(self, look) -> None:
        for layer, calls in zip(self.layers, self.calls, strict=True):
            for call in calls:
                look(layer, call)


def test_drafters_keep_a_multiple() -> None:
    found = limits(Scalekv(ratio=0.25, times=3.0), [0.9, 0.1, 0.2, 0.8, 0.7, 0.3], 1036)
    assert sum(found) == 6 * 259
    spare = [f - 36 for f in found]
    assert all(abs(spare[d] - 334.5) < 1 for d in (1, 2, 5))
    assert all(abs(spare[r] - 111.5) < 1 for r in (0, 3, 4))


def test_a_drafter_cannot_keep_more_than_there_is() -> None:
    found = limits(Scalekv(ratio=0.8, times=4.0), [0.9, 0.1], 1000)
    assert found == [600, 1000]


def test_ties_go_to_lower_layers() -> None:
    found = limits(Scalekv(ratio=0.5), [0.5] * 4, 1000)
    assert min(found[:2]) > 600 > 400 > max(found[2:])


@given(
    selectivity=st.lists(st.floats(0, 1, width=32), min_size=1, max_size=60), seen=st.integers(0, 20000),
    drafters=st.floats(0, 1), times=st.floats(1, 30),
    budget=BUDGETS,
)  # fmt: skip
def test_no_token_is_lost(selectivity: list[float], seen: int, drafters: float, times: float, budget: dict) -> None:
    method, layers = Scalekv(drafters=drafters, times=times, **budget), len(selectivity)
    found = limits(method, selectivity, seen)
    assert sum(found) == layers * method.mean_tokens(seen, shape(0, layers))
    assert all(min(seen, 36) <= f <= seen for f in found)
    chosen = torch.tensor(selectivity).argsort(stable=True)[: round(drafters * layers)].tolist()
    least = min((found[d] for d in chosen), default=seen)
    assert all(found[r] <= least + 1 for r in range(layers) if r not in chosen)


@pytest.mark.parametrize("top", [1, 3, 50])
def test_the_index_by_its_definition(monkeypatch, top: int) -> None:
    monkeypatch.setattr(module, "_TOP", top)
    call, method = random_call(queries=20, scale=2.0), Scalekv(sinks=2, window=4)
    weights = attention(call)[0]
    current = older = best = count = 0.0
    for head in weights:
        for i in range(6, 20):  # queries with sinks, a window, and more before them
            past = [w for j, w in enumerate(head[i]) if 2 <= j <= i - 4]
            current += sum(head[i][i - 3 : i + 1])
            older += sum(past)
            best += sum(sorted(past, reverse=True)[:top])
            count += 1
    found = method.calibrate(Watched([[call]]))["selectivity"]
    torch.testing.assert_close(found, torch.tensor([current / count * best / older]), atol=1e-6, rtol=1e-6)


def layer_that_looks(where: str) -> AttentionCall:
    """Queries that look at the token before them, or everywhere."""
    call = random_call(queries=200, held=200, dim=200, kv_heads=1, shared=1, scale=0.0)
    keys = torch.eye(200)[None, None] * 30
    before = (torch.arange(200) - 1).clamp(min=0)
    return replace(
        call, queries=torch.eye(200)[before][None, None] * 30 if where == "near" else call.queries, keys=keys
    )


def test_layers_that_look_everywhere_become_drafters() -> None:
    session = Watched([[layer_that_looks(w)] * 2 for w in ("near", "spread", "near", "spread")])
    method = Scalekv(ratio=0.5)
    selectivity = method.calibrate(session)["selectivity"]
    assert selectivity.dtype == torch.float32
    assert selectivity[0] == selectivity[2] > 2 * selectivity[1]
    found = limits(method, selectivity.tolist(), 1000)
    assert min(found[1], found[3]) > max(found[0], found[2])


def test_a_text_no_longer_than_the_window() -> None:
    with pytest.raises(UsageError, match="no 37 tokens in a row"):
        Scalekv().calibrate(Watched([[random_call(queries=20)]]))


@pytest.mark.parametrize("options", [{"drafters": 1.5}, {"drafters": -0.1}, {"times": 0.5}, {"score": "int8"}])
def test_options_that_make_no_sense(options: dict) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        Scalekv(**options)


def test_always_calibrates() -> None:
    assert Scalekv.needs_calibration
    assert Scalekv().needs_calibration
