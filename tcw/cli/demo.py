"""`tcw demo`: the whole tour on a small model, each command printed before it runs."""

import contextlib
import json as jsonlib
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from tcw.cli import options
from tcw.cli.output import out
from tcw.errors import OutputExists, TcwError
from tcw.units import show_bytes, show_seconds

EXAMPLES = (
    ("profile, compress, verify, run, export", "tcw demo"),
    ("keep what it makes", "tcw demo --output ./tcw-demo"),
)
MODEL, SMALL, PLAIN = "demo:smollm2", "smollm2.lossless", "smollm2.hf"
COMMANDS: tuple[tuple[str, ...], ...] = (
    ("profile", MODEL),
    ("compress", MODEL, "--recipe", "lossless", "-o", SMALL),
    ("verify", SMALL, "--reference", MODEL),
    ("run", SMALL, "What is the capital of France?", "--max-new-tokens", "24"),
    ("export", SMALL, "--to", "hf", "-o", PLAIN),
)


@dataclass(frozen=True)
class Done:
    """One command that ran, with what it gave in json mode."""

    command: str
    seconds: float
    result: dict[str, Any] | None


def demo(
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="DIR", help="Work here and keep it.  [default: a temporary folder]"),
    ] = None,
    force: options.Force = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Show the whole tour on a small model, command by command.

    Profile, compress, verify, run and export a real language model of 135 M parameters.
    Needs the [demo] extra and no network. Each command is printed before it runs, so that you can run it yourself.
    """
    out.configure(json, quiet, verbose)
    from tcw.source import open_source

    with out.progress() as progress:
        open_source(MODEL, progress=progress)  # converts it, or says what is missing, before anything is printed
    with _folder(output, force) as folder:
        start = time.monotonic()
        done = [_run(folder, command) for command in COMMANDS]
        same, total = _compare(folder / PLAIN)
        seconds = time.monotonic() - start
        sizes = {name: _size(folder / name) for name in (SMALL, PLAIN)}
        kept = str(output) if output else None
    data = {
        "commands": [{"command": d.command, "seconds": d.seconds, "result": d.result} for d in done],
        "tensors": {"checked": total, "identical": same},
        "bytes": {"original": sizes[PLAIN], "compressed": sizes[SMALL]},
        "seconds": seconds,
        "folder": kept,
    }
    facts = {
        "went in": f"{show_bytes(sizes[PLAIN])} of weights",
        "was stored in": f"{show_bytes(sizes[SMALL])} ({100 * sizes[SMALL] / sizes[PLAIN]:.1f} %)",
        "came out": f"{same} of {total} tensors with the same SHA-256",
        "took": show_seconds(seconds),
        "kept in": kept,
    }
    out.result(data, lambda: out.facts(facts), "identical" if same == total else "different")
    if same != total:
        raise typer.Exit(1)
    if not output:
        out.hint("`tcw demo -o ./tcw-demo` keeps what it makes")


@contextlib.contextmanager
def _folder(output: Path | None, force: bool) -> Iterator[Path]:
    if output is None:
        with tempfile.TemporaryDirectory(prefix="tcw-demo-") as name:
            yield Path(name)
        return
    made = [output / SMALL, output / PLAIN]
    if not force and any(path.exists() for path in made):
        raise OutputExists(f"`{output}` holds a demo already", "pass `--force` to run it again")
    output.mkdir(parents=True, exist_ok=True)
    yield output


def _run(folder: Path, command: tuple[str, ...]) -> Done:
    """Run one command in its own process, as a user would; stop the demo when it fails."""
    shown = shlex.join(["tcw", *command])
    out.text(f"$ {shown}")
    flags = {"json": ["--json"], "quiet": ["--quiet"], "human": []}[out.mode]
    again = ["--force"] if command[0] in ("compress", "export") else []
    start = time.monotonic()
    argv = [sys.executable, "-P", "-m", "tcw", *command, *again, *flags]
    ran = subprocess.run(argv, cwd=folder, stdout=None if out.mode == "human" else subprocess.PIPE, check=False)
    if ran.returncode:
        raise TcwError(f"`{shown}` ended with exit code {ran.returncode}", "its own message stands above")
    out.text()
    result = jsonlib.loads(ran.stdout) if out.mode == "json" else None
    return Done(shown, time.monotonic() - start, result)


def _compare(exported: Path) -> tuple[int, int]:
    """Compare the exported weights with the source's by SHA-256: (how many are the same, how many there are)."""
    from tcw.source import open_source

    out.text(f"comparing {PLAIN} with {MODEL}, tensor by tensor")
    before, after = open_source(MODEL), open_source(exported)
    names = before.tensors()
    if list(after.tensors().values()) != list(names.values()):
        return 0, len(names)
    with out.progress() as progress:
        from tcw.events import Progress

        same = 0
        for i, name in enumerate(names):
            same += before.read(name).sha256() == after.read(name).sha256()
            progress(Progress("compare", i + 1, len(names), "tensors", name))
    return same, len(names)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
