"""Shell completion: methods, recipes, targets and suites, without torch."""

import os
import subprocess
import sys

import pytest


def complete(line: str, shell: str = "bash") -> str:
    """What the shell is offered at the end of `line`; fails if torch was imported on the way."""
    code = (
        "import sys\n"
        "try:\n    from tcw.cli import main\n    main()\n"
        "finally:\n    assert not {'torch', 'transformers', 'numba'} & set(sys.modules)\n"
    )
    words = line.split(" ")
    environment = {
        **os.environ, "_TCW_COMPLETE": f"complete_{shell}", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1),
        "_TYPER_COMPLETE_ARGS": line, "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }  # fmt: skip
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60,
                         check=False)  # fmt: skip
    assert "AssertionError" not in run.stderr
    return run.stdout


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("tcw comp", "compress"), ("tcw compress x --method ", "dfloat11"), ("tcw compress x -m dfl", "dfloat11"),
        ("tcw compress x --recipe ", "lossless"), ("tcw export x --to ", "hf"), ("tcw export x --to df", "dfloat11"),
        ("tcw methods ", "dfloat11"), ("tcw verify x --suite ", "kv"),
        ("tcw run x y --residency h", "huffman"),
    ],
)  # fmt: skip
def test_bash(line: str, offered: str) -> None:
    assert offered in complete(line).split()


@pytest.mark.parametrize("option", ["compress x --method", "compress x --recipe", "export x --to"])
def test_nothing_fits(option: str) -> None:
    assert complete(f"tcw {option} qqq").split() == []


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells(shell: str) -> None:
    assert "lossless" in complete("tcw compress x --recipe ", shell)
