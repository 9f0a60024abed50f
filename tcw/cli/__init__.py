"""The command line: one command a file, found by name; `main` is the entry point.

Exit codes: 0 done; 1 it ran and the answer is no; 2 it could not run; 130 interrupted.
"""

import importlib
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from tcw import __version__
from tcw.cli.failures import describe
from tcw.cli.output import abandon, flush, out

# in the order of `tcw --help`
COMMANDS = (
    "profile", "compress", "verify", "export", "run", "prompt", "info", "methods", "recipes", "bench", "doctor", "demo",
)  # fmt: skip

EXAMPLES = (
    ("the whole tour on a small model", "tcw demo"),
    ("what would it save?", "tcw profile demo:smollm2"),
    ("a third smaller, bit for bit the same", "tcw compress demo:smollm2 --recipe lossless"),
)


def epilog(examples: Sequence[tuple[str, str]]) -> str:
    """Lay out examples, (what for, command) pairs, for the end of a help text."""
    # \b keeps the line breaks of the block that follows
    lines = [line for what, command in examples for line in (f"  # {what}", f"  {command}")]
    return "\n".join(["\b", "Examples:", *lines])


def _version(wanted: bool) -> None:
    if wanted:
        out.raw(f"tcw {__version__}\n")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Profile a model, shrink it, prove that it still says the same thing, and ship it."""


def build() -> typer.Typer:
    """Put the commands together."""
    app = typer.Typer(
        name="tcw",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback(epilog=epilog(EXAMPLES))(_root)
    for name in COMMANDS:
        module = importlib.import_module(f"tcw.cli.{name}")
        app.command(name, epilog=epilog(module.EXAMPLES))(getattr(module, name))
    return app


def execute(args: Sequence[str]) -> int:
    """Run one command line and return its exit code; every failure has been said by then."""
    out.configure(json="--json" in args)
    try:
        code = build()(list(args), prog_name="tcw", standalone_mode=False)
    except KeyboardInterrupt:
        code = 130
    except Exception as error:
        return _fail(error)
    if code == 130:
        out.error("interrupted", out.interrupt_hint, code="interrupted")
    return code if isinstance(code, int) else 0


def _fail(error: Exception) -> int:
    if type(error).__name__ == "NoArgsIsHelpError":
        out.debug(str(error.format_message()))  # type: ignore[attr-defined]
        return 2
    if os.environ.get("TCW_DEBUG", "0") not in ("", "0"):
        out.debug("".join(traceback.format_exception(error)))
    failure = describe(error)
    out.error(failure.message, failure.hint, failure.code)
    return 2


def _settle_libraries(args: Sequence[str]) -> None:
    """Keep warnings, logs and progress bars of libraries off stderr; tcw draws its own."""
    if not sys.warnoptions and not {"-v", "--verbose"} & set(args):
        warnings.simplefilter("ignore")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # on a busy machine, threads that spin while they wait make small matrix products many times slower
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TQDM_DISABLE", "1")  # downloads from the hub show theirs all the same, on a terminal
    if os.environ.get("TCW_NO_PROGRESS") or {"-q", "--quiet"} & set(args):
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _stop_cleanly() -> None:
    """Let `kill`, a scheduler or a closed terminal end a command as Ctrl-C does: it cleans up and says what to do."""
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number and signal.getsignal(number) == signal.SIG_DFL:  # nohup ignores SIGHUP
            signal.signal(number, signal.default_int_handler)


def main() -> None:
    """Entry point of `tcw`."""
    _settle_libraries(sys.argv[1:])
    _stop_cleanly()
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller: `>&-`
            setattr(sys, name, Path(os.devnull).open("r" if name == "stdin" else "w"))  # noqa: SIM115  for good
    code = execute(sys.argv[1:])
    try:
        flush()
    except OSError as error:  # a full disk behind `> FILE`
        abandon(sys.stdout)
        code = _fail(error)
    sys.exit(code)
