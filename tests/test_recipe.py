"""SPEC strings and TOML recipes: what is accepted, and the one error for what is not."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tcw import methods, recipe
from tcw.errors import FormatError, TcwError, UnknownName, UsageError


@pytest.mark.parametrize("name", recipe.names())
def test_shipped_recipes_load_and_say_what_the_user_gets(name: str) -> None:
    loaded = recipe.load(name)
    assert loaded.steps
    assert loaded.summary
    assert set(loaded.limits) <= set(recipe.LIMITS)
    assert Path(name).name == Path(name).stem == name


def test_dash_and_underscore_are_one_letter_and_defaults_are_filled_in() -> None:
    step = recipe.parse_spec("DFloat11:min-saving=0.1")
    assert step.method == "dfloat11"
    assert step.options["min_saving"] == 0.1
    assert step.options["layout"] == "lanes"
    assert step.spec() == "dfloat11:min_saving=0.1"
    assert recipe.parse_spec("dfloat11").spec() == "dfloat11"


@pytest.mark.parametrize(
    ("spec", "error", "words"),
    [
        ("dflat11", UnknownName, "dfloat11"),
        ("dfloat11:layot=lanes", UnknownName, "layout"),
        ("dfloat11:layout=zip", UsageError, "lanes"),
        ("dfloat11:min_saving=much", UsageError, "a number"),
        ("dfloat11:min_saving", UsageError, "name:key=value"),
        ("dfloat11:layout=lanes,layout=lanes", UsageError, "twice"),
        ("", UnknownName, "tcw methods"),
    ],
)
def test_bad_specs(spec: str, error: type[TcwError], words: str) -> None:
    with pytest.raises(error) as caught:
        recipe.parse_spec(spec)
    assert words in caught.value.message + caught.value.hint


@given(st.text(max_size=40))
def test_any_text_is_a_step_or_a_clear_error(text: str) -> None:
    try:
        said = recipe.parse_spec(text).method in methods.names()
    except TcwError as error:
        said = bool(error.message)
    assert said


@pytest.mark.parametrize(
    ("toml", "error", "words"),
    [
        ("summary = 3\nmethod = 4", UsageError, "no [[method]]"),
        ("[[method]]\nuse = 'dfloat11'\nlayuot = 'lanes'", UnknownName, "layout"),
        ("[[method]]\nlayout = 'lanes'", UsageError, "which method"),
        ("[[method]]\nuse = 'dfloat11'\nskip = 'lm_head'", UsageError, "list of patterns"),
        ("[[method]]\nuse = 'dfloat11'\n[verify]\nmax_lk = 1", UnknownName, "max_kl"),
        ("[[method]]\nuse = 'dfloat11'\n[verify]\nmax_kl = 'low'", UsageError, "takes a number"),
        ("[[pass]]\nuse = 'dfloat11'", UnknownName, "method"),
        ("not toml", FormatError, "not valid TOML"),
    ],
)
def test_bad_recipes(tmp_path: Path, toml: str, error: type[TcwError], words: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(toml)
    with pytest.raises(error) as caught:
        recipe.load(str(path))
    assert words in caught.value.message + caught.value.hint


def test_unknown_and_missing_recipes(tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="no recipe named") as caught:
        recipe.load("losless")
    assert "`lossless`" in caught.value.hint
    with pytest.raises(UsageError, match="cannot read"):
        recipe.load(str(tmp_path / "none.toml"))


def test_patterns_name_tensors_and_modules() -> None:
    step = recipe.Step("dfloat11", {}, only=("*.weight",), skip=("lm_head", "*.gate.*"))
    assert step.covers("model.layers.0.weight")
    assert not step.covers("lm_head.weight")
    assert not step.covers("a.gate.weight")
    assert not step.covers("a.bias")
