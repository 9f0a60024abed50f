"""docs/prompt.md is run, and names every preset and method there is."""

import doctest
from pathlib import Path

from tcw import methods
from tcw.prompt.engine import compress
from tcw.prompt.protect import PRESETS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "prompt.md"
TEXT = PAGE.read_text(encoding="utf-8")


def test_examples() -> None:
    failed, tried = doctest.testfile(str(PAGE), module_relative=False)
    assert failed == 0
    assert tried > 3


def test_every_preset_and_method_is_named() -> None:
    assert all(f"| `{name}` |" in TEXT for name in PRESETS)
    assert all(f"`{name.removeprefix('prompt.')}" in TEXT for name in methods.names("prompt"))


def test_the_example_of_a_method_works() -> None:
    code = TEXT.split("```python\n")[-1].split("```")[0]
    space: dict[str, object] = {}
    exec(compile(code, str(PAGE), "exec"), space)
    method = space["Longest"]()  # type: ignore[operator]
    made = compress("a bbb cc dddd", method, rate=0.5, tokenizer=lambda text: len(text.split()))
    assert made.text == "bbb dddd"
