"""Options that several commands share, and what the shell completes them with."""

from pathlib import Path
from typing import Annotated

import typer

from tcw import methods, recipe
from tcw.disk import writing
from tcw.errors import OutputExists


def complete_spec(incomplete: str) -> list[str]:
    """Complete a SPEC: the names of all methods."""
    return [name for name in methods.names() if name.startswith(methods.canonical(incomplete))]


def complete_recipe(incomplete: str) -> list[str]:
    """Complete a recipe: the names of those that come with tcw."""
    return [name for name in recipe.names() if name.startswith(incomplete)]


def complete_target(incomplete: str) -> list[str]:
    """Complete an export target."""
    from tcw import export

    return [name for name in export.names() if name.startswith(incomplete)]


def complete_suite(incomplete: str) -> list[str]:
    """Complete a suite of `tcw verify`."""
    from tcw.verify import suites

    return [name for name in suites.names() if name.startswith(incomplete)]


Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print the essential value only.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Say more about what happens, on stderr.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what stands where the output goes.")]

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A Hugging Face folder, a hub id (`org/name[@revision]`), a .gguf file, a tcw artifact, or demo:smollm2.",
    ),
]
Artifact = Annotated[str, typer.Argument(metavar="ARTIFACT", help="A folder that `tcw compress` wrote.")]
Device = Annotated[
    str, typer.Option("--device", metavar="DEVICE", help="auto, cpu, mps, cuda or cuda:1; auto takes the fastest.")
]
Specs = Annotated[
    list[str] | None,
    typer.Option(
        "--method", "-m", metavar="SPEC", autocompletion=complete_spec,
        help="A method, `name` or `name:key=value,key=value`; may be given again. `tcw methods` lists them.",
    ),
]  # fmt: skip
Html = Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write a report as one HTML file.")]


def check_free(path: Path | None, force: bool) -> None:
    """Refuse an output that exists, before the work starts. Raises OutputExists."""
    if path is not None and path.exists() and not force:
        raise OutputExists(f"`{path}` exists", "pass `--force` to replace it")


def write_report(path: Path, text: str) -> None:
    """Write a report beside its place and rename it, so that a half-written one never stands there."""
    partial = path.with_name(path.name + ".partial")
    try:
        with writing(path):
            partial.write_text(text, encoding="utf-8")
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
