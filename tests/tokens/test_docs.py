"""The examples of docs/tokens.md are run, and every method is named there."""

from pathlib import Path

import pytest
import torch

from tcw import methods
from tcw.cli import COMMANDS
from tcw.recipe import TOKEN_LIMITS
from tcw.tokens.inputs import Sample, tower_inputs, vlm_inputs
from tests.tokens.models import SIDE, TOWERS, VLMS

TOKENS = (Path(__file__).resolve().parents[2] / "docs" / "tokens.md").read_text(encoding="utf-8")


def blocks(text):
    return [part.split("```")[0] for part in text.split("```python\n")[1:]]


def test_the_python_examples_run(capsys):
    picture = torch.randn(3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    tower, model = TOWERS["dinov2"](), VLMS["llava"]()
    names = {"tower": tower, "model": model, "pixels": tower_inputs(tower, [picture] * 2)}
    names["inputs"] = vlm_inputs(model, [Sample([[5], picture, [6, 7]])])
    with torch.no_grad():
        for block in blocks(TOKENS):
            exec(block, names)
    shown = capsys.readouterr().out.splitlines()
    assert shown == ["(2, 19, 32) (2, 36, 32)", "picture 0: 9 of 36 tokens"]
    assert model.token_policy is None


@pytest.mark.parametrize("name", [*methods.names("tokens"), "promptdistill"])
def test_every_method_is_in_the_guide(name):
    assert f"`{name}`" in TOKENS


def test_what_is_static_is_said():
    said = TOKENS[TOKENS.index("- `tcw export` leaves") :]
    static = [name for name in methods.names("tokens") if methods.get(name).static]
    controls = {"tokens.random", "grid"}
    assert all(f"`{name}`" in said for name in static if name not in controls)


@pytest.mark.parametrize("name", TOKEN_LIMITS)
def test_every_limit_is_explained(name):
    assert f"| `{name}` |" in TOKENS


def test_commands_exist():
    shown = [line.split()[2] for line in TOKENS.splitlines() if line.startswith("$ tcw ")]
    assert shown
    assert set(shown) <= set(COMMANDS)
