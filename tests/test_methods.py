"""The registry: names by listing, import on use, entry points of other packages, clear errors."""

import sys
import types
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from typing import ClassVar

import pytest

from tcw import methods
from tcw.errors import TcwError, UnknownName, UsageError
from tcw.methods import Method, option


@dataclass(frozen=True)
class Guest(Method):
    """A method of another package."""

    family: ClassVar[str] = "kv"
    budget: int = option(128, "tokens kept")
    share: float = option(0.5, "share kept")
    sinks: bool = option(True, "keep the first tokens")
    mode: str = option("fast", "how", choices=("fast", "slow"))

    def __post_init__(self) -> None:
        if self.budget < 0:
            raise ValueError("budget cannot be negative")


@pytest.fixture
def guest(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("guest_package")
    module.Guest = Guest  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "guest_package", module)
    entry = EntryPoint("kv.my_guest", "guest_package:Guest", "tcw.methods")
    monkeypatch.setattr(methods, "entry_points", lambda group: [entry] if group == "tcw.methods" else [])
    methods._locations.cache_clear()
    yield
    methods._locations.cache_clear()


@pytest.mark.usefixtures("guest")
def test_a_method_of_another_package() -> None:
    assert "my-guest" in methods.names("kv")
    assert methods.family_of("MY_GUEST") == "kv"
    assert methods.get("my-guest") is Guest
    assert methods.card("my-guest").summary == "A method of another package."
    assert methods.build("my-guest", {"budget": "7", "sinks": "off", "share": 1}) == Guest(7, 1.0, False)


@pytest.mark.usefixtures("guest")
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"budget": "many"}, "a whole number"),
        ({"budget": "1.5"}, "a whole number"),
        ({"budget": True}, "takes int"),
        ({"budget": -1}, "cannot be negative"),
        ({"sinks": "maybe"}, "on or off"),
        ({"mode": "medium"}, "fast, slow"),
        ({"bugdet": 1}, "`budget`"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        methods.build("my-guest", options)
    assert words in caught.value.message + caught.value.hint


def test_two_methods_of_one_name_in_a_family_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = EntryPoint("weights.dfloat11", "guest_package:Guest", "tcw.methods")
    monkeypatch.setattr(methods, "entry_points", lambda group: [entry])
    methods._locations.cache_clear()
    try:
        with pytest.raises(TcwError, match="two methods are named `dfloat11`"):
            methods.names()
    finally:
        methods._locations.cache_clear()


def test_a_name_that_families_share_is_that_of_the_first_and_may_be_qualified() -> None:
    assert methods.family_of("random") == methods.family_of("kv.random") == "kv"
    assert methods.get("random") is methods.get("kv.random")
    assert methods.family_of("tokens.random") == "tokens"
    assert methods.family_of("prompt.random") == "prompt"
    assert {"random", "tokens.random", "prompt.random"} <= set(methods.names())
    assert "random" not in methods.names("tokens")
    assert methods.qualified("random", "tokens") == "tokens.random"
    assert methods.qualified("fastv", "tokens") == "fastv"
    with pytest.raises(UnknownName):
        methods.get("weights.random")


def test_unknown_names_offer_the_nearest() -> None:
    with pytest.raises(UnknownName) as caught:
        methods.get("dfloat1")
    assert "`dfloat11`" in caught.value.hint
    assert "tcw methods" in caught.value.hint


def test_errors_cross_a_process_boundary() -> None:
    import copy

    for error in (UsageError("what", "do this"), UnknownName("method", "x", ["y"])):
        again = copy.copy(error)  # by way of __reduce__, as a process pool does
        assert (type(again), again.message, again.hint) == (type(error), error.message, error.hint)
        assert str(again) == error.message
