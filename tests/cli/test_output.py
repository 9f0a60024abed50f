"""The output object: three modes, stdout for data and stderr for the rest, and what a table looks like."""

import io
import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tcw.cli.output import Output
from tcw.events import Progress, silent

Say = Callable[[Output], object]


@pytest.fixture
def check(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Say something in each mode, and compare (stdout, stderr) in all of them at once."""
    monkeypatch.setenv("COLUMNS", "80")

    def compare(say: Say, *, human: tuple[str, str], json: tuple[str, str], quiet: tuple[str, str]) -> None:
        for mode, expected in (("human", human), ("json", json), ("quiet", quiet)):
            out = Output()
            out.configure(json=mode == "json", quiet=mode == "quiet")
            say(out)
            assert tuple(capsys.readouterr()) == expected, mode

    return compare


def test_result(check: Callable[..., None]) -> None:
    check(
        lambda out: out.result({"bytes": 3}, lambda: out.text("three bytes"), 3),
        human=("three bytes\n", ""),
        json=('{\n  "schema": 1,\n  "bytes": 3\n}\n', ""),
        quiet=("3\n", ""),
    )


def test_a_list_is_one_item_a_line_in_quiet_mode(check: Callable[..., None]) -> None:
    check(
        lambda out: out.result({}, lambda: None, ["a", "b"]),
        human=("", ""),
        json=('{\n  "schema": 1\n}\n', ""),
        quiet=("a\nb\n", ""),
    )


def test_error(check: Callable[..., None]) -> None:
    human = "error: no model `x`\n\nhint: give a folder\n"
    error = '{"error": {"code": "source_error", "message": "no model `x`", "hint": "give a folder"}}\n'
    check(
        lambda out: out.error("no model `x`", "give a folder", "source_error"),
        human=("", human), json=("", error), quiet=("", human),
    )  # fmt: skip


def test_note_hint_warning_text(check: Callable[..., None]) -> None:
    check(lambda out: out.note("done"), human=("", "done\n"), json=("", ""), quiet=("", ""))
    check(lambda out: out.hint("go on"), human=("", "\nhint: go on\n"), json=("", ""), quiet=("", ""))
    check(lambda out: out.text("a line"), human=("a line\n", ""), json=("", ""), quiet=("", ""))
    check(lambda out: out.stream("par"), human=("par", ""), json=("", ""), quiet=("par", ""))
    warned = ("", "warning: careful\n")
    check(lambda out: out.warning("careful"), human=warned, json=warned, quiet=warned)


def test_json_holds_no_nan_and_knows_paths_and_numpy(capsys: pytest.CaptureFixture[str]) -> None:
    out = Output()
    out.configure(json=True)
    data = {
        "nan": float("nan"), "inf": [float("-inf")], "path": Path("a") / "b", "count": np.int64(7),
        "share": np.float32(0.5), "not": np.float32("nan"), "yes": np.bool_(True), "pair": (1, 2),
    }  # fmt: skip
    out.result(data, lambda: None, "")
    found = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(name))
    assert found == {
        "schema": 1, "nan": None, "inf": [None], "path": "a/b", "count": 7, "share": 0.5, "not": None, "yes": True,
        "pair": [1, 2],
    }  # fmt: skip
    with pytest.raises(TypeError, match="`object` has no JSON form"):
        out.result({"what": object()}, lambda: None, "")


def test_table_aligns_and_cuts_nothing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    rows = [("mlp", 90, "159.3 MB", "all of it, and then some words too many"), ("norm", 61, None, "x" * 50)]
    Output().table(("part", "tensors", "bytes", "what"), rows)
    assert capsys.readouterr().out.splitlines() == [
        "part  tensors     bytes  what",
        "mlp        90  159.3 MB  all of it, and then some",
        "                         words too many",
        "norm       61         -  " + "x" * 50,
    ]


def test_empty_table_has_its_headers(capsys: pytest.CaptureFixture[str]) -> None:
    Output().table(("part", "bytes"), [])
    assert capsys.readouterr().out == "part  bytes\n"


def test_facts_leave_out_what_is_not_known(capsys: pytest.CaptureFixture[str]) -> None:
    Output().facts({"name": "x", "verdict": None, "format": "tcw 1.0"})
    assert capsys.readouterr().out == "name    x\nformat  tcw 1.0\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("variables", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)])
def test_colour(variables: dict[str, str], coloured: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stderr", Terminal())
    Output().error("broken", "mend it")
    said = sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert ("\x1b[" in said) is coloured
    assert "error:" in said
    assert "hint:" in said


def test_letters_that_the_stream_cannot_say(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii", write_through=True))
    Output().text("naïve → ok")
    assert raw.getvalue() == b"na?ve ? ok\n"


def test_log_lines_need_verbose(capsys: pytest.CaptureFixture[str]) -> None:
    from tcw.cli.output import out

    for verbose, expected in ((False, ""), (True, "device: cpu\n")):
        out.configure(verbose=verbose)
        logging.getLogger("tcw.device").info("device: %s", "cpu")
        assert capsys.readouterr().err == expected
    logging.getLogger("tcw.device").warning("odd")
    assert capsys.readouterr().err == "warning: odd\n"
    out.configure()


@pytest.mark.parametrize(
    ("mode", "terminal", "variable", "drawn"),
    [
        ({}, True, "", "bars"), ({}, False, "", "lines"), ({"json": True}, True, "", "bars"),
        ({"json": True}, False, "", "nothing"), ({"quiet": True}, True, "", "nothing"), ({}, True, "1", "nothing"),
        ({}, False, "1", "nothing"),
    ],
)  # fmt: skip
def test_when_progress_is_drawn(
    mode: dict[str, bool], terminal: bool, variable: str, drawn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("TCW_NO_PROGRESS", variable)
    monkeypatch.setattr(sys, "stderr", Terminal() if terminal else io.StringIO())
    out = Output()
    out.configure(**mode)
    with out.progress() as report:
        assert {"Bars": "bars", "Lines": "lines"}.get(type(report).__name__, "nothing") == drawn
        assert (report is silent) == (drawn == "nothing")
        report(Progress("compress", 5_000_000, 10_000_000, "bytes", "layer.0"))
        out.note("beside it")
        report(Progress("compress", 10_000_000, 10_000_000, "bytes", "layer.1"))
    said = sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert ("compress" in said) == (drawn != "nothing")
    assert ("10.0 MB/10.0 MB" in said) == (drawn != "nothing")
    assert "beside it" in said or mode


def test_a_reader_that_goes_away_is_no_failure() -> None:
    """`tcw ... | head`: no traceback, and the exit code is still the command's."""
    code = "import sys\nfrom tcw.cli.output import out, flush\n"
    code += "for i in range(100_000): out.text(f'line {i}')\nflush(); sys.exit(3)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == "line 0\n"
    process.stdout.close()
    said = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=30) == 3
    assert said == ""


def test_names_from_files_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    out = Output()
    out.table(["name"], [["\x1b[31mred\u202eevil"]])
    out.facts({"a": "\x9b1m"})
    out.error("no `\x07`")
    shown = capsys.readouterr()
    assert shown.out == "name\n\\x1b[31mred\\u202eevil\na  \\x9b1m\n"
    assert shown.err == "error: no `\\x07`\n"
