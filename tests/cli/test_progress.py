"""Progress: plain lines that are few and true, bars that cut nothing off."""

import io
import re
import sys
import time

import pytest

from tcw.cli.progress import Bars, Lines, amount, clock, rate
from tcw.events import Progress


def feed(*events: tuple[float, Progress]) -> list[str]:
    said: list[str] = []
    now = iter(time for time, _ in events)
    lines = Lines(said.append, lambda: next(now))
    for _, event in events:
        lines(event)
    return said


def test_one_line_when_a_stage_ends() -> None:
    layers = [(i / 10, Progress("compress", i, 30, "layers", f"layer {i}")) for i in range(31)]
    assert feed(*layers) == ["  compress    30/30 layers  10.0 layers/s  layer 30"]


def test_a_line_every_five_seconds_with_time_left() -> None:
    events = [(float(i), Progress("compress", i * 1_000_000, 12_000_000, "bytes")) for i in range(13)]
    assert feed(*events) == [
        "  compress    5.0 MB/12.0 MB  1.0 MB/s  0:07 left",
        "  compress    10.0 MB/12.0 MB  1.0 MB/s  0:02 left",
        "  compress    12.0 MB/12.0 MB  1.0 MB/s",
    ]


def test_the_first_steps_promise_nothing() -> None:
    events = [(0.0, Progress("convert", 0, 272, "tensors")), (14.0, Progress("convert", 1, 272, "tensors"))]
    assert feed(*events) == ["  convert     1/272 tensors  14 s a tensor"]


def test_a_resumed_stage_is_as_fast_as_what_is_new() -> None:
    events = [(40.0 * i, Progress("calibrate", 12 + i, 16, "blocks", f"block {12 + i}")) for i in range(3)]
    assert feed(*events) == [
        "  calibrate   13/16 blocks  40 s a block  2:00 left  block 13",
        "  calibrate   14/16 blocks  40 s a block  1:20 left  block 14",
    ]


def test_an_end_is_said_once_and_an_unknown_total_is_fine() -> None:
    end = Progress("verify", 3, 3, "prompts")
    assert len(feed((0.0, end), (0.1, end), (9.0, end))) == 1
    unknown = [(0.0, Progress("read", 1, 0, "bytes")), (6.0, Progress("read", 6_000_000, 0, "bytes"))]
    assert feed(*unknown) == ["  read        6.0 MB  1.0 MB/s"]


def test_words() -> None:
    assert amount(12, 272, "tensors") == "12/272 tensors"
    assert rate(None, "bytes") == ""
    assert (rate(0.05, "layers"), rate(0.5, "layers"), rate(0.05, "bytes")) == ("20 s a layer", "0.5 layers/s", "0 B/s")
    assert (clock(65), clock(7207)) == ("1:05", "2:00:07")


@pytest.mark.parametrize(("columns", "noted"), [(80, False), (120, True)])
def test_bars_show_amount_rate_and_time_left(columns: int, noted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", Terminal())
    with Bars() as bars:
        for i in range(1, 6):
            time.sleep(0.06)
            bars(
                Progress("compress", i * 30_000_000, 900_000_000, "bytes", "model.layers.10.self_attn.k_proj.[weight]")
            )
    last = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", sys.stderr.getvalue()).replace("\r", "\n")  # type: ignore[attr-defined]
    assert re.search(r"compress ━.* 150\.0 MB/900\.0 MB  \d+\.\d MB/s  0:0\d left", last)
    assert ("k_proj.[weight]" in last) == noted
    assert max(map(len, last.splitlines())) <= columns
