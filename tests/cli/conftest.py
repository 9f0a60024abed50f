"""Run command lines in this process, and see what they print and return."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from tcw import cli


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str


@pytest.fixture
def tcw(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ran]:
    """`tcw("info", path, "--json")` -> exit code, stdout, stderr; 80 columns, no debugging."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("TCW_DEBUG", raising=False)

    def run(*args: object) -> Ran:
        capsys.readouterr()
        code = cli.execute([str(arg) for arg in args])
        captured = capsys.readouterr()
        return Ran(code, captured.out, captured.err)

    return run
