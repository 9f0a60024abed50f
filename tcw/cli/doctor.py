"""`tcw doctor`: what works here."""

import dataclasses

import typer

from tcw.cli import options
from tcw.cli.output import out

EXAMPLES = (
    ("what works here, and why not", "tcw doctor"),
    ("to paste into a bug report", "tcw doctor --json"),
)


def doctor(
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Check what works on this machine, and say why not.

    Versions, GPU, memory, caches, codecs, extras. The exit code is 1 when something is broken.
    """
    out.configure(json, quiet, verbose)
    from tcw.doctor import checks

    found = list(checks())
    faults = [check.name for check in found if check.state == "fault"]
    out.result(
        {"checks": [dataclasses.asdict(check) for check in found], "ok": not faults},
        lambda: out.table(("check", "", "what was found"), [(c.name, c.state, c.detail) for c in found]),
        f"fault: {', '.join(faults)}" if faults else "ok",
    )
    if faults:
        if out.mode == "human":
            out.error(f"{len(faults)} fault{'s' * (len(faults) > 1)}: {', '.join(faults)}")
        raise typer.Exit(1)
