"""Every way to fail: exit code, message, hint, in text and in JSON, and never a traceback unasked."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest

from tcw import cli, errors
from tcw.cli.failures import describe


class OutOfMemoryError(RuntimeError):
    """Named as torch's."""


FAILURES: list[tuple[BaseException, str, str, str]] = [
    (errors.SourceError("no `x`", "try `y`"), "source_error", "no `x`", "try `y`"),
    (errors.UnknownName("method", "dfloat", ["dfloat11"]), "unknown_name", "no method named `dfloat`", "did you mean"),
    (errors.OutputExists("`a` exists"), "output_exists", "`a` exists", ""),
    (errors.MissingDependency("gguf", "this", "gguf"), "missing_dependency", "needs the package", "pip install"),
    (MemoryError(), "resource_error", "not enough memory", "--workers 1"),
    (OutOfMemoryError("CUDA out of memory"), "resource_error", "not enough memory", "--device cpu"),
    (OSError(errno.ENOSPC, "No space left on device", "f"), "resource_error", "no space left on the disk (`f`)", "-o"),
    (OSError(errno.EDQUOT, "Disk quota exceeded"), "resource_error", "no space left on the disk", "-o"),
    (OSError(errno.ENOMEM, "Cannot allocate memory"), "resource_error", "not enough memory", "--workers 1"),
    (PermissionError(errno.EACCES, "Permission denied", "f"), "system", "permission denied (`f`)", "who owns it"),
    (FileNotFoundError(errno.ENOENT, "No such file or directory", "f"), "system", "no such file or directory", "path"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "resource_error", "not enough memory", "--workers 1"),
    (ImportError("libx.so: failed to map segment"), "resource_error", "not enough memory", "--workers 1"),
    (ImportError("cannot import name `x`"), "import_error", "cannot load a part of tcw: cannot", "tcw doctor"),
    (BrokenProcessPool("x"), "resource_error", "a worker process was killed", "--workers 1"),
    (ZeroDivisionError("division\nby zero"), "internal", "internal: ZeroDivisionError: division by zero", "TCW_DEBUG"),
    (KeyError(), "internal", "internal: KeyError", "TCW_DEBUG=1"),
    (OSError("no number"), "internal", "internal: OSError: no number", "TCW_DEBUG=1"),
]


@pytest.mark.parametrize(("error", "code", "message", "hint"), FAILURES, ids=lambda v: type(v).__name__)
def test_words(error: BaseException, code: str, message: str, hint: str) -> None:
    failure = describe(error)
    assert failure.code == code
    assert message in failure.message
    assert hint in failure.hint
    assert "\n" not in failure.message
    assert not failure.message.endswith(".")


@pytest.mark.parametrize(("error", "code", "message", "hint"), FAILURES, ids=lambda v: type(v).__name__)
def test_exit_code_two_everywhere(
    error: BaseException, code: str, message: str, hint: str, tcw: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("tcw.recipe.names", fail)
    human, quiet, as_json = tcw("recipes"), tcw("recipes", "-q"), tcw("recipes", "--json")
    assert (human.code, quiet.code, as_json.code) == (2, 2, 2)
    assert human.out == quiet.out == as_json.out == ""
    assert human.err.startswith(f"error: {describe(error).message}\n")
    assert quiet.err == human.err
    assert ("\n\nhint: " in human.err) == bool(describe(error).hint)
    assert json.loads(as_json.err) == {"error": describe(error)._asdict()}
    assert "Traceback" not in human.err + as_json.err


def test_debug_shows_the_traceback(tcw: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tcw.recipe.names", lambda: 1 / 0)
    assert "Traceback" not in tcw("recipes").err
    monkeypatch.setenv("TCW_DEBUG", "0")
    assert "Traceback" not in tcw("recipes").err
    monkeypatch.setenv("TCW_DEBUG", "1")
    said = tcw("recipes").err
    assert "Traceback" in said
    assert "error: internal: ZeroDivisionError" in said


@pytest.mark.parametrize(
    ("line", "message", "hint"),
    [
        ("compres x", "no such command `compres`", "did you mean `compress`? `tcw --help` shows what it takes"),
        ("frobnicate", "no such command `frobnicate`", "`tcw --help` shows what it takes"),
        ("compress", "missing argument `MODEL`", "`tcw compress --help` shows what it takes"),
        ("compress x --recip y", "no such option: `--recip`", "did you mean `--recipe`?"),
        ("compress x --workers two", "invalid value for `--workers`", "`tcw compress --help`"),
        ("compress x --workers -1", "invalid value for `--workers`: it should be greater than or equal to 0", ""),
        ("export x -o y", "missing option `--to`", "`tcw export --help`"),
        ("verify x --min-top1 2", "invalid value for `--min-top1`", ""),
        ("run x y --residency lossy", "`lossy` is not one of `auto`, `bf16`, `huffman`", ""),
        ("info x y", "got unexpected extra argument(s) (y)", ""),
        ("compress x", "nothing says what to do", "give exactly one of"),
        ("compress x --recipe lossless --fit 1GB", "more than one thing says what to do", "give exactly one of"),
        ("compress x --method dfloat12", "no method named `dfloat12`", "did you mean `dfloat11`?"),
        (
            "compress x --method dfloat11:layuot=lanes",
            "no option of `dfloat11` named `layuot`",
            "did you mean `layout`?",
        ),
        ("compress x --method dfloat11:layout=rows", "`layout` cannot be `rows`", "choose from: lanes"),
        ("compress x --recipe losless", "no recipe named `losless`", "did you mean `lossless`?"),
        ("compress x --fit big", "cannot read `big` as a size", "200MB"),
        ("compress nothing/here --recipe lossless", "", ""),
        ("profile x --method fp88", "no method named `fp88`", ""),
        ("methods dfloat", "no method named `dfloat`", "did you mean `dfloat11`?"),
        ("verify ./nothing-here", "there is no model `./nothing-here`", "give a model folder"),
        ("export ./nothing-here --to hff -o y", "no export target named `hff`", "did you mean `hf`?"),
    ],
)
def test_bad_command_lines(
    line: str, message: str, hint: str, tcw: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = tcw(*line.split())
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("error: ")
    assert message in ran.err.partition("\n\nhint: ")[0]
    assert hint in ran.err.partition("\n\nhint: ")[2]
    found = json.loads(tcw(*line.split(), "--json").err)["error"]
    assert set(found) == {"code", "message", "hint"}
    assert found["message"] == ran.err.partition("\n")[0].removeprefix("error: ")
    assert list(tmp_path.iterdir()) == []


def test_no_command_prints_the_help(tcw: Callable[..., Any]) -> None:
    ran = tcw()
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("Usage: tcw [OPTIONS] COMMAND [ARGS]...")
    assert "error:" not in ran.err


@pytest.mark.parametrize("mode", [[], ["--json"], ["-q"]])
def test_interrupt(mode: list[str], tcw: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tcw.recipe.names", interrupt)
    ran = tcw("recipes", *mode)
    assert (ran.code, ran.out) == (130, "")
    assert "interrupted" in ran.err
    assert "Traceback" not in ran.err


def test_main_is_the_process(tmp_path: Path) -> None:
    """Through `python -m tcw`: the same exit codes, and a version."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TCW_")}
    for arguments, code in ((["--version"], 0), (["info", str(tmp_path / "no")], 2), (["recipes", "--json"], 0)):
        run = subprocess.run(
            [sys.executable, "-m", "tcw", *arguments], capture_output=True, text=True, env=environment, timeout=60,
            check=False,
        )  # fmt: skip
        assert run.returncode == code
        assert "Traceback" not in run.stderr
        assert bool(run.stdout) == (code == 0)
    assert cli.execute(["--version"]) == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_no_space_behind_stdout() -> None:
    with Path("/dev/full").open("w") as full:
        run = subprocess.run(
            [sys.executable, "-m", "tcw", "recipes"], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60,
            check=False,
        )  # fmt: skip
    assert run.returncode == 2
    assert run.stderr.startswith("error: no space left on the disk\n\nhint: ")


def test_ctrl_c_of_a_process(tmp_path: Path) -> None:
    """A real SIGINT: 130, one message, no traceback."""
    code = "import signal, time\nfrom tcw import cli, recipe\ndef names():\n    signal.raise_signal(signal.SIGINT)\n"
    code += "recipe.names = names\nimport sys; sys.argv = ['tcw', 'recipes']\ncli.main()\n"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (130, "", "error: interrupted\n")


@pytest.mark.skipif(sys.platform == "win32", reason="no such signals there")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_being_asked_to_stop_is_like_ctrl_c(name: str) -> None:
    code = (
        f"import signal\nfrom tcw import cli, recipe\n"
        f"recipe.names = lambda: signal.raise_signal(signal.{name})\n"
        f"import sys\nsys.argv = ['tcw', 'recipes']\ncli.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr.startswith("error: interrupted")


@pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX shell")
@pytest.mark.parametrize("streams", [">&-", "2>&-", ">&- 2>&-", "<&- >/dev/full 2>/dev/full"])
def test_lost_streams_leave_the_exit_code(streams: str) -> None:
    if "full" in streams and not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    for command, expected in (("recipes", 2 if "full" in streams else 0), ("info ./nothing-here", 2)):
        line = f"{sys.executable} -m tcw {command} {streams}"
        done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, timeout=60)
        assert done.returncode == expected, line
        assert "Traceback" not in done.stderr
