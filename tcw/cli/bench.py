"""`tcw bench`: how fast the kernels are here, and whether they are right."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tcw.cli import options
from tcw.cli.output import out
from tcw.errors import UsageError
from tcw.events import Progress, Report

if TYPE_CHECKING:
    from tcw.bench.rows import Row
    from tcw.device import Device

EXAMPLES = (
    ("all kernels and codecs, on the GPU if there is one", "tcw bench"),
    ("one of them, on the processor", "tcw bench lanes_decode --device cpu"),
    ("is it right? times nothing", "tcw bench lanes_decode --check"),
    ("longer, with the rows in a file", "tcw bench --seconds 2 -o rows.jsonl"),
)


def complete_op(incomplete: str) -> list[str]:
    """Complete an operation."""
    from tcw import bench as benches

    return [name for name in benches.names() if name.startswith(incomplete)]


def bench(
    op: Annotated[
        str | None,
        typer.Argument(
            metavar="OP",
            help="One kernel or codec.",
            autocompletion=complete_op,
            show_default=False,
        ),
    ] = None,
    device: options.Device = "auto",
    seconds: Annotated[float, typer.Option(min=0.01, help="Time spent on each way of each case.")] = 0.5,
    repeat: Annotated[
        int | None, typer.Option(min=1, help="Runs of each way, instead of --seconds.", show_default=False)
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Only check the results; time nothing.")] = False,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Append the rows to this file.", show_default=False),
    ] = None,
    no_save: Annotated[bool, typer.Option("--no-save", help="Append the rows to no file.")] = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Time kernels and codecs here, once their results are right.

    Every case is held against its reference first: where one is wrong nothing is timed, and the exit code is 1. Caches
    are flushed before each run. Rows are appended to kernels/OP/results.jsonl in a checkout, and in the cache folder
    elsewhere.
    """
    out.configure(json, quiet, verbose)
    if output and no_save:
        raise UsageError("`-o` and `--no-save` contradict each other", "leave one of them out")
    from tcw import bench as benches

    ops = [benches.folder_of(op).name] if op else benches.names()
    if not ops:
        raise UsageError("no kernel can be benchmarked", "`tcw doctor` says what is broken")
    place = benches.device_for(device)
    if place.kind == "cpu":
        out.note(f"no GPU: on the CPU ({place.name})" if device == "auto" else f"on the CPU ({place.name})")
    rows: list[Row] = []
    saved: dict[str, int] = {}
    with out.progress() as report:
        wrong, cases = _check(ops, place, report)
        if not wrong and not check:
            rows, saved = _measure(ops, place, (repeat, seconds), report, output, no_save)
    _say(place, cases, wrong, rows, saved)
    if wrong:
        if out.mode == "human":
            out.error(f"wrong here: {', '.join(wrong)}", "nothing was timed, and nothing was saved")
        raise typer.Exit(1)


def _check(ops: list[str], place: "Device", report: Report) -> tuple[dict[str, dict[str, str]], dict[str, int]]:
    """The cases that are wrong, by operation, and how many cases each operation has."""
    from tcw import bench as benches

    wrong, cases = {}, {}
    for done, op in enumerate(ops):
        report(Progress("check", done, len(ops), "kernels", op))
        found = benches.check(op, place)
        cases[op] = len(found)
        if bad := {case: fault for case, fault in found.items() if fault}:
            wrong[op] = bad
    report(Progress("check", len(ops), len(ops), "kernels"))
    return wrong, cases


def _measure(
    ops: list[str], place: "Device", length: tuple[int | None, float], report: Report, output: Path | None,
    no_save: bool,
) -> tuple[list["Row"], dict[str, int]]:  # fmt: skip
    """The rows, and how many of them went to which file; each is written as soon as it is there."""
    from tcw import bench as benches
    from tcw.bench.rows import append, place_of

    rows: list[Row] = []
    saved: dict[str, int] = {}
    for row in benches.measure(ops, place, repeat=length[0], seconds=length[1], progress=report):
        rows.append(row)
        if not no_save:
            path = output or place_of(benches.folder_of(row.op))
            append([row], path)
            saved[str(path)] = saved.get(str(path), 0) + 1
    return rows, saved


def _say(
    place: "Device", cases: dict[str, int], wrong: dict[str, dict[str, str]], rows: list["Row"], saved: dict[str, int]
) -> None:
    data: dict[str, Any] = {
        "device": {"name": place.name, "kind": place.kind},
        "checks": [{"op": op, "cases": count, "wrong": wrong.get(op, {})} for op, count in cases.items()],
        "ok": not wrong,
        "rows": [row.to_json() for row in rows],
        "saved": saved,
    }
    short = [f"{row.op} {row.case} {row.way}: {row.gbps:g} GB/s" for row in rows] or ["ok"]
    out.result(data, lambda: _tables(cases, wrong, rows), f"wrong: {', '.join(wrong)}" if wrong else short)
    for path, count in saved.items():
        out.note(f"{count} row{'s' * (count > 1)} appended to {path}")


def _tables(cases: dict[str, int], wrong: dict[str, dict[str, str]], rows: list["Row"]) -> None:
    for k, (op, count) in enumerate(cases.items()):
        if k:
            out.text()
        bad = wrong.get(op, {})
        out.text(f"{op}: {count - len(bad)} of {count} cases are right")
        if bad:
            out.table(("case", "what is wrong"), list(bad.items()))
        if mine := [row for row in rows if row.op == op]:
            _table(mine)
    if rows:
        known = rows[0].facts
        out.text()
        out.text(f"% copy: of {known.copy_gbps:g} GB/s, read and written, at which {known.device} copies")
        out.text("ratio: of the time to that of the case's first way")


def _table(rows: list["Row"]) -> None:
    processor = rows[0].cpu_gbps is not None
    headers = ("case", "way", "ms", "20-80 %", "GB/s", "% copy", "ratio")
    out.table(
        headers + ("GB/CPU s",) * processor,
        [
            (row.case, row.way, f"{row.ms_p50:.4g}", f"{row.ms_p20:.4g}-{row.ms_p80:.4g}", f"{row.gbps:.4g}",
             f"{row.percent_of_copy:.1f}", f"{row.ratio:.2f}", *([f"{row.cpu_gbps:.4g}"] if processor else []))
            for row in rows
        ],
    )  # fmt: skip
