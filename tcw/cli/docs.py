"""docs/cli.md and docs/methods.md, made of help texts and docstrings.

`python -m tcw.cli.docs` writes them; tests keep them true.
"""

import contextlib
import inspect
import io
import os
from pathlib import Path

from tcw import cli, methods, recipe

HEAD = """# Commands

The help text of every command, written by `python -m tcw.cli.docs`.

- Data goes to stdout, everything else to stderr. `--json` prints one object (bytes are integers, seconds are floats),
  `--quiet` the essential value only.
- Exit codes: 0 done; 1 it ran and the answer is no (`verify` past a limit, `doctor` found a fault); 2 it could not
  run (`error:` and `hint:` say why); 130 interrupted. With `--json` an error is
  `{"error": {"code", "message", "hint"}}` on stderr.
- Variables: `TCW_CACHE` (folder for converted models and compiled kernels), `TCW_NO_PROGRESS`, `NO_COLOR`,
  `TCW_DEBUG=1` (tracebacks).
- Nothing asks a question. Output that exists is refused, unless `--force`.
- Sizes are decimal: 1 MB is 1,000,000 bytes.
- `tcw --install-completion` teaches the shell commands, methods, recipes and targets.
"""


def help_text(*command: str) -> str:
    """What `tcw COMMAND --help` prints, 80 columns wide."""
    text = io.StringIO()
    columns = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "80"
    try:
        with contextlib.redirect_stdout(text):
            cli.execute([*command, "--help"])
    finally:
        if columns is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = columns
    return text.getvalue().strip("\n")


def page() -> str:
    """The whole of docs/cli.md."""
    parts = [HEAD, f"```text\n{help_text()}\n```\n"]
    parts += [f"## tcw {name}\n\n```text\n{help_text(name)}\n```\n" for name in cli.COMMANDS]
    return "\n".join(parts)


def methods_page() -> str:
    """The whole of docs/methods.md: each method's options, and what its module says of it."""
    parts = ["# Methods and recipes\n\nMade of the docstrings by `python -m tcw.cli.docs`.\n"]
    parts += [_method(name) for name in methods.names()]
    parts += ["## Recipes\n", "| recipe | what the user gets | methods |", "|---|---|---|"]
    for name in recipe.names():
        loaded = recipe.load(name)
        parts.append(f"| `{name}` | {loaded.summary} | {', '.join(f'`{s.spec()}`' for s in loaded.steps)} |")
    return "\n".join(parts) + "\n"


def _method(name: str) -> str:
    card = methods.card(name)
    kind = "lossless" if card.lossless else "lossy"
    lines = [f"## {name}\n", f"{card.summary} ({card.family}, {kind}; {card.paper})\n"]
    lines += ["| option | default | what it does |", "|---|---|---|"]
    for option in card.options:
        choices = f" ({', '.join(map(str, option['choices']))})" if option["choices"] else ""
        lines.append(f"| `{option['name']}` | `{option['default']}` | {option['help']}{choices} |")
    module = inspect.getmodule(methods.get(name))
    return "\n".join([*lines, f"\n```text\n{inspect.getdoc(module)}\n```\n"])


if __name__ == "__main__":
    docs = Path(__file__).resolve().parents[2] / "docs"
    (docs / "cli.md").write_text(page(), encoding="utf-8")
    (docs / "methods.md").write_text(methods_page(), encoding="utf-8")
