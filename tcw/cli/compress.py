"""`tcw compress`: run a recipe over a model and write an artifact."""

import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tcw import fit, recipe
from tcw.cli import options
from tcw.cli.output import out
from tcw.errors import SourceError, UsageError
from tcw.events import Report
from tcw.recipe import Step
from tcw.units import parse_size, show_bytes, show_seconds

if TYPE_CHECKING:
    from tcw.kv.plan import Plan as KVPlan
    from tcw.report import CompressReport, Plan
    from tcw.source import Source
    from tcw.tokens.flops import Outlook

EXAMPLES = (
    ("a third smaller, bit for bit the same", "tcw compress demo:smollm2 --recipe lossless"),
    ("what would it do? nothing is written", "tcw compress ./model --fit 200MB --dry-run"),
    ("four bits a weight, calibrated on your text", "tcw compress ./model -m int4 --calibration my.jsonl"),
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
    str | None,
    typer.Option(
        "--fit", metavar="SIZE",
        help="Take the gentlest way that fits: 200MB, 4GiB. With one --method that has an option `bits` (ecq, mixed), "
        "set that.",
    ),
]  # fmt: skip
Output = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="DIR", help="Where to write.  [default: MODEL.RECIPE]")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan; write nothing.")]
Workers = Annotated[
    int, typer.Option("--workers", metavar="N", min=0, help="Processes to work in; 0: threads, one a core.")
]
Calibration = Annotated[
    Path | None,
    typer.Option(
        "--calibration", metavar="PATH",
        help="Text for methods that look at activations: .txt, .jsonl or .parquet; or pictures: a folder, or .npy.  "
        "[default: a novel; scikit-image's pictures]",
    ),
]  # fmt: skip
Samples = Annotated[int, typer.Option("--samples", metavar="N", min=1, help="Windows of that text to look at.")]
Length = Annotated[int, typer.Option("--length", metavar="N", min=2, help="Tokens of a window.")]


@dataclass(frozen=True)
class Choice:
    """What was asked for: a recipe, or a size to fit into, perhaps with the method whose bits it sets."""

    recipe: recipe.Recipe | None
    limit: int = 0
    dial: Step | None = None


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
    samples: Samples = 32,
    length: Length = 512,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Make a model smaller, and write it as an artifact.

    Say what to do in one of three ways: methods in order (--method), a recipe (--recipe), or a size (--fit).
    The source is only read. Unfinished work lies in DIR.partial; --resume goes on with it.
    Methods that calibrate run the model on a text, one transformer block in memory at a time.
    """
    out.configure(json, quiet, verbose)
    choice = _choice(method, recipe_name, fit_size)
    _check(device, calibration)
    from tcw import pipeline
    from tcw.calibration import Settings
    from tcw.source import open_source

    text, pictures = _kinds(calibration)
    settings = Settings(text=text, samples=samples, length=length, device=device, images=pictures)
    with out.progress() as progress:
        source = open_source(model, progress=progress)
        chosen = _chosen(source, choice, progress)
        # a name that the system's own encoding cannot hold is written byte for byte
        target = output or Path(os.fsdecode(f"{model_name(source.id)}.{chosen.name}".encode()))
        _say_unused(chosen, calibration)
        if dry_run:
            plan = pipeline.plan(source, chosen, calibration=settings, progress=progress)
        else:
            options.check_free(target, force)
            out.interrupt_hint = "the same command with `--resume` goes on with it"
            report = pipeline.compress(
                source, chosen, target, force=force, resume=resume, workers=workers, calibration=settings,
                progress=progress,
            )  # fmt: skip
    if dry_run:
        _show_plan(source, plan, target)
    else:
        _show_report(report, target, model, chosen.lossless)


def model_name(id: str) -> str:
    """The part of a source's id that names the model: `org/name@main` is `name`, `demo:smollm2` is `smollm2`."""
    name = id.partition("@")[0].replace("\\", "/").rstrip("/").rpartition("/")[2].rpartition(":")[2]
    return name.removesuffix(".gguf") or "model"


def _choice(specs: list[str] | None, name: str | None, size: str | None) -> Choice:
    if size and specs and not name:
        if len(specs) > 1:
            raise UsageError("`--fit` sets the bits of one method", "give one `--method`, or none")
        step = recipe.parse_spec(specs[0])
        fit.dial_of(step)  # what cannot be turned is refused before the model is opened
        return Choice(None, parse_size(size), step)
    if sum(1 for given in (specs, name, size) if given) != 1:
        said = "nothing says what to do" if not (specs or name or size) else "more than one thing says what to do"
        raise UsageError(said, "give exactly one of `--method SPEC`, `--recipe NAME` and `--fit SIZE`")
    if specs:
        return Choice(recipe.from_specs(specs))
    return Choice(recipe.load(name)) if name else Choice(None, parse_size(size or ""))


def _chosen(source: "Source", choice: Choice, progress: Report) -> recipe.Recipe:
    if choice.recipe:
        return choice.recipe
    return fit.choose(source, choice.limit, method=choice.dial, progress=progress)[0]


def _check(device: str, calibration: Path | None) -> None:
    if device not in ("auto", "cpu"):
        from tcw.device import pick

        pick(device)  # raises when it is not there
    if calibration is not None and not calibration.exists():
        raise SourceError(
            f"no calibration text at `{calibration}`", "give a .txt, .jsonl or .parquet file, or a folder of pictures"
        )


def _kinds(calibration: Path | None) -> tuple[Path | None, Path | None]:
    """What was given to calibrate on, as a text and as pictures."""
    from tcw.calibration.images import is_images

    pictures = calibration is not None and is_images(calibration)
    return (None, calibration) if pictures else (calibration, None)


def _calibrates(chosen: recipe.Recipe, pictures: bool) -> bool:
    """Say whether a method of the recipe reads a text, or looks at pictures."""
    methods = [step.build() for step in chosen.steps]
    looks = [m for m in methods if m.family == "tokens" and m.needs_calibration]
    return bool(looks) if pictures else any(m.reads_text() for m in methods if m not in looks)


def _say_unused(chosen: recipe.Recipe, calibration: Path | None) -> None:
    if calibration is not None and not _calibrates(chosen, pictures=_kinds(calibration)[1] is not None):
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
        "calibration": plan.calibration,
        "kv": plan.kv.to_json() if plan.kv else None,
        "tokens": plan.tokens.to_json() if plan.tokens else None,
    }
    human = {
        "would read": source.id,
        "would run": ", then ".join(steps),
        "would write": f"{target}/",
        "would take": f"about {_share(plan.predicted_bytes, plan.original_bytes)}",
        "would use": f"up to {show_bytes(plan.peak_memory_bytes)} of memory",
        "would calibrate": _calibration(plan.calibration),
        "would cache": _cached(plan.kv) if plan.kv else None,
        "would keep": _kept(plan.tokens) if plan.tokens else None,
    }
    out.result(data, lambda: out.facts(human), plan.predicted_bytes)


def _cached(kv: "KVPlan") -> str:
    """`at 4,096 tokens 24.1 MB of 94.4 MB (25.5 %, 3.92x smaller), 1,044 to 4,096 tokens a head`."""
    counts = [row.tokens for row in kv.rows]
    tokens = f"{min(counts):,} to {max(counts):,}" if min(counts) != max(counts) else f"{counts[0]:,}"
    bound = "up to " if kv.bounded else ""
    return f"at {kv.context:,} tokens {bound}{_share(kv.bytes, kv.dense_bytes)}, {tokens} tokens a head"


def _kept(tokens: "Outlook") -> str:
    """`74 of 576 visual tokens; 31.2 % of the prefill's FLOPs and 21.6 % of the KV cache, with 64 tokens of text`."""
    bound = "up to " if tokens.bounded else ""
    often = "" if tokens.known else "say "
    cache = f" and {100 * tokens.kv_ratio:.1f} % of the KV cache" if tokens.kv_ratio < 1 else ""
    text = f", with {tokens.text} tokens of text" if tokens.text else ""
    work = f"{bound}{100 * tokens.flops_ratio:.1f} % of the prefill's FLOPs"
    return f"{bound}{tokens.kept:,} of {often}{tokens.visual:,} {tokens.what}; {work}{cache}{text}"


def _calibration(needs: dict[str, Any] | None) -> str | None:
    """`on 16,384 tokens: a block of 28.3 MB, activations of 37.7 MB in memory`."""
    if needs is None:
        return None
    block, activations = show_bytes(needs["bytes_block"]), show_bytes(needs["bytes_activations"])
    where = {"memory": "in memory", "disk": "on the disk"}[needs["where"]]
    return f"on {needs['tokens']:,} tokens: {block} for a block at a time, {activations} of activations {where}"


def _show_report(report: "CompressReport", target: Path, model: str, lossless: bool) -> None:
    kept = f"{report.tensors_kept} kept"
    if report.kept_reasons:
        kept += f" ({', '.join(f'{count}: {why}' for why, count in report.kept_reasons.items())})"
    facts = {
        "wrote": f"{target}/",
        "methods": ", then ".join(report.methods),
        "size": _share(report.bytes_compressed, report.bytes_original),
        "bits/weight": f"{report.bits_per_weight:.2f}",
        "KV cache": _cached(report.kv) if report.kv else None,
        "tokens": _kept(report.tokens) if report.tokens else None,
        "tensors": f"{report.tensors_compressed} compressed, {kept}",
        "time": show_seconds(report.seconds),
        "peak memory": show_bytes(report.peak_memory_bytes),
    }
    out.result(report.to_json(), lambda: out.facts(facts), target)
    for note in report.notes:
        out.note(note)
    artifact, reference = shlex.quote(str(target)), shlex.quote(model)
    if lossless:
        out.hint(f"`tcw verify {artifact}` proves it; `--reference {reference}` also compares what it says")
    else:
        out.hint(f"`tcw verify {artifact} --reference {reference}` measures what was lost")
