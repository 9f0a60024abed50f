"""`tcw export`: write another tool's format."""

from pathlib import Path
from typing import Annotated

import typer

from tcw.cli import options
from tcw.cli.output import out
from tcw.units import show_bytes

EXAMPLES = (
    ("plain safetensors, the bytes that came in", "tcw export ./smollm2.lossless --to hf -o ./smollm2"),
    ("for the DFloat11 package", "tcw export ./smollm2.lossless --to dfloat11 -o ./smollm2-df11"),
    ("quantised weights for vLLM", "tcw export ./smollm2.int4 --to compressed-tensors -o ./smollm2-w4"),
    ("an official DFloat11 model back to plain weights", "tcw export ./some-model-DF11 --to hf -o ./some-model"),
)

_SHOWN = 3  # tensors that could not be compressed, named one by one


def export(
    artifact: options.Artifact,
    to: Annotated[
        str, typer.Option("--to", "-t", metavar="TARGET", autocompletion=options.complete_target, help="The format.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="PATH", help="Where to write.")],
    force: options.Force = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Write an artifact in the format of another tool.

    Targets from any MODEL: hf (plain safetensors), dfloat11 (the official layout). From artifacts with quantised
    weights: compressed-tensors (for vLLM, SGLang, transformers), gptq (GPTQ's tensors), hf-fp8 (FP8 in blocks, for
    transformers). Codes and scales are written as they are, nothing is quantised again.
    """
    out.configure(json, quiet, verbose)
    from tcw import export as exporting
    from tcw.source import open_source

    exporting.get(to)  # an unknown target before anything is opened
    with out.progress() as progress:
        source = open_source(artifact, progress=progress)
        report = exporting.export(source, to, output, force=force, progress=progress)
    data = {
        "path": str(report.path),
        "target": report.target,
        "bytes": report.bytes,
        "files": [str(file) for file in report.files],
        "kept": report.kept,
        "notes": list(report.notes),
    }
    facts = {
        "wrote": f"{output}/",
        "target": report.target,
        "size": show_bytes(report.bytes),
        "files": len(report.files),
    }
    for name, why in list(report.kept.items())[:_SHOWN]:
        out.note(f"`{name}` stays as it is: {why}")
    if (more := len(report.kept) - _SHOWN) > 0:
        out.note(f"so do {more} more; `--json` lists them")
    for note in report.notes:
        out.note(note)
    out.result(data, lambda: out.facts(facts), output)
