"""The one place that prints. Data goes to stdout; progress, notes, warnings and errors go to stderr.

Three modes: `human` (tables and sentences), `json` (one object a command) and `quiet` (the essential value only).
Nothing is said by colour alone, and `NO_COLOR` turns colour off.
"""

import json
import logging
import math
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TextIO

from tcw.cli.progress import Bars, Lines
from tcw.events import Report, silent

SCHEMA = 1
_COLOURS = {"red": "31", "yellow": "33", "green": "32", "cyan": "36"}
_NUMBER = re.compile(r"(-|[-+]?\d[\d,.]*(e[-+]?\d+)?( ?\S{1,9})?)?")


class Output:
    """What commands say things through; there is one, `out`."""

    def __init__(self) -> None:
        self.mode: Literal["human", "json", "quiet"] = "human"
        self.verbose = False
        self.interrupt_hint = ""
        self._bars: Bars | None = None

    def configure(self, json: bool = False, quiet: bool = False, verbose: bool = False) -> None:
        """Choose the mode; every command does this first. `json` wins over `quiet`."""
        self.mode = "json" if json else "quiet" if quiet else "human"
        self.verbose, self.interrupt_hint = verbose, ""
        logger = logging.getLogger("tcw")
        logger.setLevel(logging.DEBUG if verbose else logging.NOTSET)
        logger.handlers = [_ToOutput(self)]

    # ---- data, on stdout

    def result(self, data: dict[str, Any], human: Callable[[], None], quiet: object) -> None:
        """Give a command's answer in the mode that was asked for.

        Args:
            data: the JSON object, without `schema`; NaN and infinities are written as null.
            human: called in human mode; it uses `text`, `table` and `facts`.
            quiet: the one value to print in quiet mode; a list is printed one item a line.
        """
        if self.mode == "json":
            text = json.dumps(_plain({"schema": SCHEMA, **data}), indent=2, allow_nan=False)
            self._write(sys.stdout, text + "\n")
        elif self.mode == "quiet":
            lines = quiet if isinstance(quiet, list | tuple) else [quiet]
            self._write(sys.stdout, "".join(f"{line}\n" for line in lines))
        else:
            human()

    def text(self, line: str = "") -> None:
        """Print a line in human mode."""
        if self.mode == "human":
            self._write(sys.stdout, line + "\n")

    def table(self, headers: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """Print columns in human mode: numbers to the right, nothing cut off; None is shown as `-`."""
        cells = [["-" if cell is None else visible(str(cell)) for cell in row] for row in rows]
        right = [all(_NUMBER.fullmatch(row[i]) for row in cells) for i in range(len(headers))]
        lines = [list(headers), *cells] if any(headers) else cells
        width = [max((len(line[i]) for line in lines), default=0) for i in range(len(headers))]
        for line in lines:
            *padded, last = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, width, right, strict=True))
            self._hang("".join(f"{cell}  " for cell in padded), last.rstrip())

    def facts(self, pairs: Mapping[str, object]) -> None:
        """Print names and values in two columns, in human mode; pairs with None are left out."""
        shown = {name: value for name, value in pairs.items() if value is not None}
        width = max((len(name) for name in shown), default=0)
        for name, value in shown.items():
            self._hang(f"{name.ljust(width)}  ", visible(str(value)))

    def _hang(self, start: str, text: str) -> None:
        """Print `text` behind `start`; what does not fit the width goes below it. No word is ever cut."""
        room = max(24, shutil.get_terminal_size((80, 24)).columns - len(start))
        lines = textwrap.wrap(text, room, break_long_words=False, break_on_hyphens=False) or [""]
        for i, line in enumerate(lines if len(text) > room else [text]):
            self.text(((start if i == 0 else " " * len(start)) + line).rstrip())

    def stream(self, piece: str) -> None:
        """Print a piece of text as it comes, without a line end (human and quiet mode)."""
        if self.mode != "json":
            self._write(sys.stdout, piece)
            _flush(sys.stdout)

    def raw(self, text: str) -> None:
        """Pass text on to stdout as it is, in every mode (help, version)."""
        self._write(sys.stdout, text)

    # ---- everything else, on stderr

    def note(self, message: str) -> None:
        """Say something useful that is not data; silent in quiet and json mode."""
        if self.mode == "human":
            self._say(message)

    def detail(self, message: str) -> None:
        """Say something that only `--verbose` asks for."""
        if self.verbose:
            self._say(message)

    def hint(self, message: str) -> None:
        """Name the next command or choice, after an empty line; silent in quiet and json mode."""
        if self.mode == "human":
            self._say(f"\n{self._paint('hint:', 'cyan')} {message}")

    def warning(self, message: str) -> None:
        """Warn, in every mode."""
        self._say(f"{self._paint('warning:', 'yellow')} {visible(message)}")

    def error(self, message: str, hint: str = "", code: str = "error") -> None:
        """Say what went wrong, in every mode; as a JSON object in json mode."""
        if self.mode == "json":
            self._say(json.dumps({"error": {"code": code, "message": message, "hint": hint}}))
            return
        self._say(f"{self._paint('error:', 'red')} {visible(message)}")
        if hint:
            self._say(f"\n{self._paint('hint:', 'cyan')} {hint}")

    def debug(self, text: str) -> None:
        """Pass a traceback on to stderr."""
        self._say(text.rstrip("\n"))

    @contextmanager
    def progress(self) -> Iterator[Report]:
        """Draw progress while the block runs; what it gives is a `progress=` callback."""
        terminal = sys.stderr.isatty()
        if self.mode == "quiet" or os.environ.get("TCW_NO_PROGRESS") or (self.mode == "json" and not terminal):
            yield silent
        elif terminal and os.environ.get("TERM") != "dumb":
            with Bars() as self._bars:
                try:
                    yield self._bars
                finally:
                    self._bars = None
        else:
            yield Lines(self._say)

    # ---- how

    def _say(self, line: str) -> None:
        if self._bars is not None:
            self._bars.write(line)
        else:
            self._write(sys.stderr, line + "\n")
            _flush(sys.stderr)

    def _paint(self, word: str, colour: str) -> str:
        plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or self._bars is not None
        return word if plain or not sys.stderr.isatty() else f"\x1b[1;{_COLOURS[colour]}m{word}\x1b[0m"

    @staticmethod
    def _write(stream: TextIO, text: str) -> None:
        try:
            stream.write(text)
        except UnicodeEncodeError:
            encoding = stream.encoding or "ascii"
            stream.write(text.encode(encoding, errors="replace").decode(encoding))
        except OSError as error:
            _lost(stream, error)


def visible(text: str) -> str:
    """Show what would steer the terminal, or hide, as an escape: names come out of files of strangers."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class _ToOutput(logging.Handler):
    """Log records of tcw, as lines on stderr."""

    def __init__(self, to: Output) -> None:
        super().__init__()
        self._to = to

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:
            self._to.warning(record.getMessage())
        else:
            self._to.detail(record.getMessage())


def _plain(value: Any) -> Any:
    """Turn a value into what JSON can hold: paths and NumPy numbers become plain, NaN and infinities null."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, Path):
        return value.as_posix()
    if hasattr(value, "item"):
        return _plain(value.item())
    raise TypeError(f"`{type(value).__name__}` has no JSON form")


def _flush(stream: TextIO) -> None:
    try:
        stream.flush()
    except OSError as error:
        _lost(stream, error)


def _lost(stream: TextIO, error: OSError) -> None:
    """Give up a stream whose reader went away, and stderr in any case: the exit code must still tell the outcome."""
    if stream is not sys.stderr and not isinstance(error, BrokenPipeError):
        raise error
    abandon(stream)


def abandon(stream: TextIO) -> None:
    """Drop what goes to a stream whose reader went away (`tcw ... | head`): the exit code still tells the outcome."""
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, stream.fileno())
    except (OSError, ValueError):
        pass
    finally:
        os.close(null)


def flush() -> None:
    """Write out what is buffered, before the process ends."""
    for stream in (sys.stdout, sys.stderr):
        _flush(stream)


out = Output()
