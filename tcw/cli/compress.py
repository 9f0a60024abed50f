"""`tcw compress`: run a recipe over a model and write an artifact."""

import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tcw import fit, methods, recipe
from tcw.cli import options
from tcw.cli.output import out
from tcw.errors import SourceError, UsageError
from tcw.units import parse_size, show_bytes, show_seconds

if TYPE_CHECKING:
    from tcw.pipeline import CompressReport, Plan
    from tcw.source import Source

EXAMPLES = (
    ("a third smaller, bit for bit the same", "tcw compress demo:smollm2 --recipe lossless"),
    ("one method, its options spelled out", "tcw compress ./model --method dfloat11:layout=lanes -o ./smaller"),
    ("what would it do? nothing is written", "tcw compress ./model --fit 200MB --dry-run"),
    ("go on after an interruption", "tcw compress ./model --recipe lossless -o ./smaller --resume"),
)


RecipeName = Annotated[
    str | None,
    typer.Option(
        "--recipe", "-r", metavar="NAME|FILE", autocompletion=options.complete_recipe,
        help="A ready-made recipe (`tcw recipes`) or a TOML file.",
    ),
]  # fmt: skip
Fit = Annotated[
    str | None, typer.Option("--fit", metavar="SIZE", help="Take the gentlest recipe that fits: 200MB, 4GiB.")
]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="DIR", help="Where to write.  [default: MODEL.RECIPE]")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan; write nothing.")]
Workers = Annotated[
    int, typer.Option("--workers", metavar="N", min=0, help="Processes to work in; 0: threads, one a core.")
]
Calibration = Annotated[
    Path | None, typer.Option("--calibration", metavar="FILE", help="Text for methods that look at activations.")
]


@dataclass(frozen=True)
class Choice:
    """What was asked for: a recipe, or a size to fit into."""

    recipe: recipe.Recipe | None
    limit: int = 0


def compress(
    model: options.Model,
    method: options.Specs = None,
    recipe_name: RecipeName = None,
    fit_size: Fit = None,
    output: Output = None,
    force: options.Force = False,
    resume: Resume = False,
    dry_run: DryRun = False,
    workers: Workers = 0,
    device: options.Device = "auto",
    calibration: Calibration = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Make a model smaller, and write it as an artifact.

    Say what to do in one of three ways: methods in order (--method), a recipe (--recipe), or a size (--fit).
    The source is only read. Unfinished work lies in DIR.partial; --resume goes on with it.
    """
    out.configure(json, quiet, verbose)
    choice = _choice(method, recipe_name, fit_size)
    _check(device, calibration)
    from tcw import pipeline
    from tcw.source import open_source

    with out.progress() as progress:
        source = open_source(model, progress=progress)
        chosen, plan = (choice.recipe, None) if choice.recipe else fit.choose(source, choice.limit, progress=progress)
        # a name that the system's own encoding cannot hold is written byte for byte
        target = output or Path(os.fsdecode(f"{model_name(source.id)}.{chosen.name}".encode()))
        _say_unused(chosen, calibration)
        if dry_run:
            plan = plan or pipeline.plan(source, chosen, progress=progress)
        else:
            options.check_free(target, force)
            out.interrupt_hint = "the same command with `--resume` goes on with it"
            report = pipeline.compress(
                source, chosen, target, force=force, resume=resume, workers=workers, progress=progress
            )
    if dry_run and plan is not None:
        _show_plan(source, plan, target)
    else:
        _show_report(report, target, model)


def model_name(id: str) -> str:
    """The part of a source's id that names the model: `org/name@main` is `name`, `demo:smollm2` is `smollm2`."""
    name = id.partition("@")[0].replace("\\", "/").rstrip("/").rpartition("/")[2].rpartition(":")[2]
    return name.removesuffix(".gguf") or "model"


def _choice(specs: list[str] | None, name: str | None, size: str | None) -> Choice:
    if sum(1 for given in (specs, name, size) if given) != 1:
        said = "nothing says what to do" if not (specs or name or size) else "more than one thing says what to do"
        raise UsageError(said, "give exactly one of `--method SPEC`, `--recipe NAME` and `--fit SIZE`")
    if specs:
        return Choice(recipe.from_specs(specs))
    return Choice(recipe.load(name)) if name else Choice(None, parse_size(size or ""))


def _check(device: str, calibration: Path | None) -> None:
    if device not in ("auto", "cpu"):
        from tcw.device import pick

        pick(device)  # raises when it is not there
    if calibration is not None and not calibration.is_file():
        raise SourceError(f"no calibration text at `{calibration}`", "give a plain text file")


def _say_unused(chosen: recipe.Recipe, calibration: Path | None) -> None:
    if calibration is not None and not any(methods.get(s.method).needs_calibration for s in chosen.steps):
        out.note(f"no method of `{chosen.name}` needs calibration: `{calibration}` is not read")


def _share(part: int, whole: int) -> str:
    """`181.2 MB of 269.1 MB (67.3 %, 1.49x smaller)`."""
    times = f" ({100 * part / whole:.1f} %, {whole / part:.2f}x smaller)" if part and whole else ""
    return f"{show_bytes(part)} of {show_bytes(whole)}{times}"


def _show_plan(source: "Source", plan: "Plan", target: Path) -> None:
    steps = [step.spec() for step in plan.recipe.steps]
    ratio = plan.predicted_bytes / plan.original_bytes if plan.original_bytes else 1.0
    data: dict[str, Any] = {
        "dry_run": True,
        "artifact": str(target),
        "recipe": plan.recipe.name,
        "methods": steps,
        "bytes": {"original": plan.original_bytes, "compressed": plan.predicted_bytes, "ratio": ratio},
        "peak_memory_bytes": plan.peak_memory_bytes,
    }
    human = {
        "would read": source.id,
        "would run": ", then ".join(steps),
        "would write": f"{target}/",
        "would take": f"about {_share(plan.predicted_bytes, plan.original_bytes)}",
        "would use": f"up to {show_bytes(plan.peak_memory_bytes)} of memory",
    }
    out.result(data, lambda: out.facts(human), plan.predicted_bytes)


def _show_report(report: "CompressReport", target: Path, model: str) -> None:
    kept = f"{report.tensors_kept} kept"
    if report.kept_reasons:
        kept += f" ({', '.join(f'{count}: {why}' for why, count in report.kept_reasons.items())})"
    facts = {
        "wrote": f"{target}/",
        "methods": ", then ".join(report.methods),
        "size": _share(report.bytes_compressed, report.bytes_original),
        "bits/weight": f"{report.bits_per_weight:.2f}",
        "tensors": f"{report.tensors_compressed} compressed, {kept}",
        "time": show_seconds(report.seconds),
        "peak memory": show_bytes(report.peak_memory_bytes),
    }
    out.result(report.to_json(), lambda: out.facts(facts), target)
    artifact, reference = shlex.quote(str(target)), shlex.quote(model)
    out.hint(f"`tcw verify {artifact}` proves it; `--reference {reference}` also compares what it says")
