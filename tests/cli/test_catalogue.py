"""`tcw methods` and `tcw recipes`."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from tcw import methods, recipe

Run = Callable[..., Any]


def test_methods(tcw: Run) -> None:
    human, quiet, as_json = (tcw("methods", *mode) for mode in ([], ["-q"], ["--json"]))
    assert quiet.out.split() == methods.names()
    assert (quiet.err, as_json.err) == ("", "")
    listed = json.loads(as_json.out)["methods"]
    assert [m["name"] for m in listed] == methods.names()
    assert all(
        {"name", "family", "summary", "lossless", "needs_calibration", "options", "paper"} <= set(m) for m in listed
    )
    assert all(name in human.out for name in methods.names())
    assert max(map(len, human.out.splitlines())) <= 80
    assert human.err == "\nhint: `tcw methods NAME` lists the options of one\n"


@pytest.mark.parametrize("name", methods.names())
def test_one_method(name: str, tcw: Run) -> None:
    ran = tcw("methods", name.upper().replace("-", "_"))
    card = methods.card(name)
    assert (ran.code, ran.err) == (0, "")
    assert max(map(len, ran.out.splitlines())) <= 80
    assert ran.out.startswith(f"method       {name}\n")
    assert all(option["name"] in ran.out for option in card.options)
    assert card.paper.split()[0] in ran.out
    assert tcw("methods", name, "-q").out == f"{name}\n"


def test_recipes(tcw: Run) -> None:
    human, quiet, as_json = (tcw("recipes", *mode) for mode in ([], ["-q"], ["--json"]))
    assert quiet.out.split() == recipe.names()
    assert [r["name"] for r in json.loads(as_json.out)["recipes"]] == recipe.names()
    assert max(map(len, human.out.splitlines())) <= 80
    assert "lossless" in human.out
    assert "= fp8, then dfloat11" in human.out


def test_a_method_says_what_verify_holds_it_to(tcw: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods.get("int8"), "limits", {"max_kl": 0.01, "min_top1": 0.97}, raising=False)
    assert "limits       max_kl 0.01, min_top1 0.97\n" in tcw("methods", "int8").out
    assert json.loads(tcw("methods", "int8", "--json").out)["methods"][0]["limits"]["max_kl"] == 0.01
    assert "limits" not in tcw("methods", "dfloat11").out
