"""Two ways to draw progress on stderr: a live bar on a terminal, a plain line now and then elsewhere."""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tcw.events import Progress
from tcw.units import show_bytes

if TYPE_CHECKING:
    from rich.progress import Task
    from rich.text import Text

LINE_EVERY = 5.0  # seconds between two plain lines of one stage
BAR_WIDTH = 12
_SLOW = 0.2  # units a second: below that, the time that one takes says more
_MEMORY = 600.0  # seconds of work that a rate is taken from: a block of a large model takes minutes
FACTS_WIDTH = 50  # the longest amount, rate and time, and the gaps between columns


def amount(done: float, total: float, unit: str) -> str:
    """`12.0 MB/269.1 MB` or `12/272 tensors`; a total of 0 is unknown and left out."""
    if unit == "bytes":
        return f"{show_bytes(done)}/{show_bytes(total)}" if total else show_bytes(done)
    return f"{done:,.0f}/{total:,.0f} {unit}" if total else f"{done:,.0f} {unit}"


def rate(speed: float | None, unit: str) -> str:
    """`31.5 MB/s`, `4.2 tensors/s` or, where one takes long, `14 s a block`."""
    if not speed:
        return ""
    if unit != "bytes" and speed < _SLOW:
        return f"{1 / speed:.0f} s a {unit.removesuffix('s')}"
    return f"{show_bytes(speed)}/s" if unit == "bytes" else f"{speed:,.1f} {unit}/s"


def clock(seconds: float) -> str:
    """`1:05` or `2:00:07`."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def one_line(note: str) -> str:
    """A note on one line: a prompt may hold line breaks."""
    return " ".join(note.split())


class Lines:
    """Plain lines: one when a stage ends, and at most one every few seconds before that."""

    def __init__(self, write: Callable[[str], None], now: Callable[[], float] = time.monotonic) -> None:
        self._write, self._now = write, now
        self._started: dict[str, tuple[float, int]] = {}
        self._last: dict[str, float] = {}
        self._ended: set[str] = set()

    def __call__(self, event: Progress) -> None:
        """Take an event; print it when it is due."""
        now = self._now()
        # a resumed stage does not begin at nothing
        started, already = self._started.setdefault(event.stage, (now, event.done))
        ended = bool(event.total) and event.done >= event.total
        if ended and event.stage in self._ended:
            return
        if not ended and now - self._last.setdefault(event.stage, now) < LINE_EVERY:
            return
        self._last[event.stage] = now
        if ended:
            self._ended.add(event.stage)
        self._write(self._line(event, now - started, event.done - already))

    def _line(self, event: Progress, elapsed: float, fresh: int) -> str:
        speed = fresh / elapsed if elapsed >= 0.5 else None
        # before a twentieth is done the rate says more about start-up than about the work
        known = speed and event.total and event.total / 20 <= event.done < event.total
        left = (event.total - event.done) / speed if speed and known else 0
        parts = [
            f"  {event.stage:<10}",
            amount(event.done, event.total, event.unit),
            rate(speed, event.unit),
            f"{clock(left)} left" if left else "",
            one_line(event.note),
        ]
        return "  ".join(part for part in parts if part).rstrip()


class Bars:
    """Live bars, one a stage, with rate and time left, in a terminal."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, ProgressColumn, TextColumn
        from rich.progress import Progress as RichProgress
        from rich.table import Column
        from rich.text import Text

        class Facts(ProgressColumn):
            """Amount, rate and time left."""

            def render(self, task: "Task") -> "Text":
                unit = task.fields["unit"]
                left = task.time_remaining
                parts = [
                    amount(task.completed, task.total or 0, unit),
                    rate(task.finished_speed or task.speed, unit),
                    clock(task.elapsed or 0) if task.finished else f"{clock(left)} left" if left else "",
                ]
                return Text("  ".join(part for part in parts if part))

        self._live = RichProgress(
            TextColumn("  {task.description}", table_column=Column(no_wrap=True)),
            BarColumn(bar_width=BAR_WIDTH),
            Facts(table_column=Column(no_wrap=True)),
            TextColumn("{task.fields[note]}", style="dim", markup=False, table_column=Column(no_wrap=True)),
            console=Console(stderr=True),
            transient=True,
            speed_estimate_period=_MEMORY,
        )
        self._tasks: dict[str, Any] = {}

    def __call__(self, event: Progress) -> None:
        """Take an event; the bar of its stage moves. The note gets the room that amounts and rates leave."""
        room = self._live.console.width - len(event.stage) - BAR_WIDTH - FACTS_WIDTH
        note = one_line(event.note) if room >= 16 else ""
        note = note if len(note) <= room else f"...{note[3 - room :]}"
        total = event.total or None
        if event.stage not in self._tasks:
            self._tasks[event.stage] = self._live.add_task(
                event.stage, total=total, completed=event.done, unit=event.unit, note=note
            )
        self._live.update(self._tasks[event.stage], completed=event.done, total=total, note=note, unit=event.unit)

    def __enter__(self) -> "Bars":
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def write(self, line: str) -> None:
        """Print a line above the bars."""
        self._live.console.print(line, markup=False, highlight=False, soft_wrap=True)
