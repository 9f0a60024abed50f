"""The gentlest way that fits: a ladder of recipes, then a dial of bits."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from tcw import fit, pipeline, recipe
from tcw.errors import UsageError

WEIGHTS, REST = 8000, 100  # weights that a dial is for, and bytes that it does not change
RUNGS = {"lossless": 12_000, "lossless-fp8": 9_000, "int8-safe": 8_300}


@dataclass
class FakePlan:
    predicted_bytes: int


@dataclass
class Planner:
    """A `pipeline.plan` that knows sizes without looking, and notes what it was asked."""

    asked: list[str]
    bend: float = 0.0

    def size(self, bits: float) -> int:
        """Nearly a straight line in bits: `bend` bytes above it in the middle."""
        return REST + round(WEIGHTS * bits / 8 + self.bend * (bits - 1) * (8 - bits))

    def __call__(self, source: Any, asked: recipe.Recipe, progress: Any) -> FakePlan:
        self.asked.append(asked.name)
        if asked.name in RUNGS:
            return FakePlan(RUNGS[asked.name])
        return FakePlan(self.size(asked.steps[0].options["bits"]))


@pytest.fixture
def planner(monkeypatch: pytest.MonkeyPatch) -> Planner:
    found = Planner([])
    monkeypatch.setattr(pipeline, "plan", found)
    return found


SOURCE: Any = SimpleNamespace(id="model")


@pytest.mark.parametrize(
    ("limit", "chosen"), [(20_000, "lossless"), (12_000, "lossless"), (11_999, "lossless-fp8"), (8_999, "int8-safe")]
)
def test_the_ladder(limit: int, chosen: str, planner: Planner) -> None:
    found, plan = fit.choose(SOURCE, limit)
    assert found.name == chosen
    assert plan.predicted_bytes == RUNGS[chosen] <= limit
    assert planner.asked[-1] == chosen, "what comes after it costs a plan for nothing"


@pytest.mark.parametrize("bend", [0.0, 40.0, -30.0])
@pytest.mark.parametrize("limit", [REST + 1500, REST + 1501, 2345, 4321, 6000, 8000, REST + 7999])
def test_below_the_ladder_the_dial_is_set_as_high_as_fits(limit: int, bend: float, planner: Planner) -> None:
    planner.bend = bend
    fitting = [b / 100 for b in range(150, 801) if planner.size(b / 100) <= limit]
    if not fitting:
        with pytest.raises(UsageError):
            fit.choose(SOURCE, limit)
        return
    found, plan = fit.choose(SOURCE, limit)
    assert [step.method for step in found.steps] == ["ecq", "int8", "dfloat11"]
    bits = found.steps[0].options["bits"]
    assert planner.size(bits) == plan.predicted_bytes <= limit
    assert max(fitting) - 0.02 <= bits <= max(fitting)
    assert len(planner.asked) <= len(fit.LADDER) + 2 + 6


def test_a_dial_of_the_user_passes_the_ladder_by(planner: Planner) -> None:
    found, plan = fit.choose(SOURCE, 4_000, method=recipe.parse_spec("mixed"))
    assert (found.steps[0].method, plan.predicted_bytes) == ("mixed", planner.size(found.steps[0].options["bits"]))
    assert not set(planner.asked) & set(RUNGS)
    assert fit.choose(SOURCE, 1 << 30, method=recipe.parse_spec("mixed"))[0].steps[0].options["bits"] == 8.0


def test_other_options_of_the_dial_stay(planner: Planner) -> None:
    found, _ = fit.choose(SOURCE, 4_000, method=recipe.parse_spec("ecq:allocate=equal,bits=2"))
    assert found.steps[0].options["allocate"] == "equal"
    assert found.steps[0].options["bits"] > 2


def test_nothing_fits_names_the_smallest(planner: Planner) -> None:
    with pytest.raises(UsageError, match="nothing makes `model` fit into") as caught:
        fit.choose(SOURCE, 1_000)
    assert caught.value.hint == "the smallest is `ecq:bits=1.5` with about 1.6 kB"


@pytest.mark.parametrize("spec", ["dfloat11", "fp8", "int4"])
def test_methods_without_a_dial(spec: str) -> None:
    with pytest.raises(UsageError, match="no `bits` to set"):
        fit.dial_of(recipe.parse_spec(spec))


def test_a_dial_takes_what_its_method_takes() -> None:
    dial = fit.dial_of(recipe.parse_spec("ecq"))
    assert (dial.low, dial.high) == (1.5, 8.0)


def test_the_ladder_is_of_recipes_that_are_there() -> None:
    assert set(fit.LADDER) <= set(recipe.names())
    assert recipe.load(fit.LADDER[0]).lossless
    assert not recipe.load(fit.LADDER[1]).lossless
