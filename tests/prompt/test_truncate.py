"""Truncation keeps what stands at its side, whatever it says."""

import pytest

from tcw.errors import UsageError
from tcw.prompt.engine import Settings, compress, method_of

TEXT = "a b c d e f g h"


@pytest.mark.parametrize(
    ("side", "left"), [("head", "a b c d"), ("tail", "e f g h"), ("ends", "a b g h")]
)  # fmt: skip
def test_sides(side: str, left: str) -> None:
    assert compress(TEXT, f"truncate:side={side}", rate=0.5, tokenizer=lambda t: len(t.split())).text == left


def test_protected_words_stay_elsewhere() -> None:
    made = compress(
        TEXT, "truncate", target_tokens=3, tokenizer=lambda t: len(t.split()), settings=Settings(keep=("g",))
    )
    assert made.text == "a b g"


def test_an_unknown_side_is_refused() -> None:
    with pytest.raises(UsageError, match="`side` cannot be `middle`"):
        method_of("truncate:side=middle")
