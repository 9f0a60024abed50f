"""--help: quick, light, complete, 80 columns, with examples that can be typed."""

import functools
import importlib
import re
import resource
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tcw import cli
from tcw.cli import docs

ROOT = Path(__file__).resolve().parents[2]
PAGES = [(), *((name,) for name in cli.COMMANDS)]


def test_every_command_file_is_a_command() -> None:
    shared = {"__init__", "docs", "failures", "options", "output", "progress"}
    files = {path.stem for path in (ROOT / "tcw" / "cli").glob("*.py")} - shared
    assert files == set(cli.COMMANDS)


@pytest.mark.parametrize("command", PAGES, ids=lambda c: " ".join(c) or "tcw")
def test_help(command: tuple[str, ...], tcw: Callable[..., Any]) -> None:
    ran = tcw(*command, "--help")
    assert (ran.code, ran.err) == (0, "")
    assert ran.out == tcw(*command, "-h").out
    assert max(len(line) for line in ran.out.splitlines()) <= 80
    if command:
        options = set(re.findall(r"--[a-z][a-z0-9-]*", ran.out))
        assert {"--json", "--quiet", "--verbose", "--help"} <= options
        first = ran.out.splitlines()[2].strip()
        assert first.endswith(".")
        assert first[:1].isupper()
    # a help line for every option: no option stands alone on its line without words below or beside it
    listed = [line for line in ran.out.partition("Options:")[2].splitlines() if re.match(r"  (-\w, )?--", line)]
    assert listed
    assert all(re.search(r"(\S  +\S|\S)", line[3:]) for line in listed)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_line_in_the_short_list_is_whole(name: str, tcw: Callable[..., Any]) -> None:
    line = next(line for line in tcw("--help").out.splitlines() if line.startswith(f"  {name} "))
    assert not line.endswith("...")


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_examples_can_be_typed(name: str, tcw: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two to four a command, shown in the help; each parses, with the command itself taken out."""
    module = importlib.import_module(f"tcw.cli.{name}")
    called: list[dict[str, Any]] = []

    @functools.wraps(getattr(module, name))
    def record(**given: Any) -> None:
        called.append(given)

    text = tcw(name, "--help").out
    monkeypatch.setattr(module, name, record)
    assert 2 <= len(module.EXAMPLES) <= 4
    for what, command in module.EXAMPLES:
        assert what in text
        assert command in text
        program, own, *rest = shlex.split(command)
        assert (program, own) == ("tcw", name)
        ran = tcw(own, *rest)
        assert (ran.code, ran.err) == (0, ""), command
    assert len(called) == len(module.EXAMPLES)


def test_examples_of_the_program_name_commands() -> None:
    assert all(shlex.split(command)[1] in cli.COMMANDS for _, command in cli.EXAMPLES)


def test_docs_are_current() -> None:
    found = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert found == docs.page(), "run `python -m tcw.cli.docs`"
    for name in cli.COMMANDS:
        assert f"## tcw {name}\n" in found


def test_help_is_light_and_quick() -> None:
    """No torch, no compiler, no NumPy; the best of five within 0.4 s of processor time."""
    code = (
        "import sys\nfrom tcw import cli\ncli.execute(['--help'])\n"
        "heavy = {'torch', 'transformers', 'numba', 'numpy', 'huggingface_hub', 'gguf', 'rich'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert run.stderr.strip() == "[]"
    assert run.stdout.startswith("Usage: tcw")
    seconds = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "tcw", "--help"], capture_output=True, check=True, timeout=60)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) <= 0.4


def test_version(tcw: Callable[..., Any]) -> None:
    from tcw import __version__

    ran = tcw("--version")
    assert (ran.code, ran.out, ran.err) == (0, f"tcw {__version__}\n", "")
