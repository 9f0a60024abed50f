"""The gentlest recipe that fits."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from tcw import fit, pipeline, recipe
from tcw.errors import UsageError


@dataclass
class FakePlan:
    predicted_bytes: int


# name -> (lossless, predicted bytes); in an order that is neither by size nor by loss
SHELF = {"a-tiny": (False, 20), "lossless": (True, 67), "middling": (False, 50), "exact": (True, 70)}


@pytest.fixture
def source(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(recipe, "names", lambda: sorted(SHELF))
    monkeypatch.setattr(recipe, "load", lambda name: recipe.Recipe(name, ()))
    monkeypatch.setattr(fit, "is_lossless", lambda candidate: SHELF[candidate.name][0])
    monkeypatch.setattr(pipeline, "plan", lambda source, r, progress: FakePlan(SHELF[r.name][1]))
    return SimpleNamespace(id="model")


@pytest.mark.parametrize(
    ("limit", "chosen"),
    [(100, "exact"), (70, "exact"), (69, "lossless"), (66, "middling"), (50, "middling"), (20, "a-tiny")],
)  # fmt: skip
def test_choice(limit: int, chosen: str, source: Any) -> None:
    found, plan = fit.choose(source, limit)
    assert found.name == chosen
    assert plan.predicted_bytes == SHELF[chosen][1] <= limit


def test_nothing_fits_names_the_smallest(source: Any) -> None:
    with pytest.raises(UsageError, match="no recipe makes `model` fit into 19 B") as caught:
        fit.choose(source, 19)
    assert caught.value.hint == "the smallest is `--recipe a-tiny` with about 20 B"


def test_lossless_is_what_every_method_says() -> None:
    assert fit.is_lossless(recipe.load("lossless"))
