"""What the kernels take on each architecture, and the tables kernels/<op>/resources.json that the tests compare with.

python -m tcw.cuda.resources                   every op with a kernel.cu, compiled for every architecture
python -m tcw.cuda.resources lanes_decode      one op
python -m tcw.cuda.resources --record          and write the tables
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path

from tcw.cli.output import out
from tcw.cores import cores
from tcw.cuda import build
from tcw.cuda.build import ARCHITECTURES, Built
from tcw.cuda.errors import NoGpu
from tcw.cuda.log import Resources
from tcw.folders import folder

COLUMNS = ("registers", "shared_bytes", "stack", "spill_stores", "spill_loads")
MORE_REGISTERS = 16  # that another version of the compiler may take

Table = dict[str, dict[str, Resources]]  # kernel -> architecture -> what it takes


def compile_all(ops: Sequence[str], architectures: Sequence[str] = ARCHITECTURES) -> Iterator[Built]:
    """Compile ops for every architecture, and yield them in order.

    A process for each core: NVRTC compiles one program at a time in a process, whatever the threads.
    """
    jobs = [(op, arch) for op in ops for arch in architectures]
    with ProcessPoolExecutor(min(cores(), len(jobs)), get_context("spawn")) as pool:
        yield from pool.map(_compile, jobs)


def table_of(built: Sequence[Built]) -> Table:
    """Turn what one op takes around: by kernel, then by architecture."""
    names = sorted({name for one in built for name in one.resources})
    return {name: {one.arch: one.resources[name] for one in built if name in one.resources} for name in names}


def recorded(op: str) -> tuple[str, Table]:
    """Read kernels/<op>/resources.json: the compiler's version, and the table."""
    read = json.loads(_path(op).read_text(encoding="utf-8"))
    kernels = read["kernels"].items()
    return read["compiler"], {
        name: {arch: Resources(**dict(zip(COLUMNS, row, strict=True))) for arch, row in rows.items()}
        for name, rows in kernels
    }


def record(op: str, built: Sequence[Built]) -> Path:
    """Write kernels/<op>/resources.json, a line for each kernel and architecture."""
    kernels = []
    for name, rows in table_of(built).items():
        lines = [f'      "{arch}": {[asdict(row)[column] for column in COLUMNS]}' for arch, row in rows.items()]
        kernels.append(f'    "{name}": {{\n' + ",\n".join(lines) + "\n    }")
    head = f'{{\n  "compiler": "{built[0].compiler}",\n  "columns": {json.dumps(COLUMNS)},\n  "kernels": {{\n'
    _path(op).write_text(head + ",\n".join(kernels) + "\n  }\n}\n", encoding="utf-8")
    return _path(op)


def differences(op: str, built: Sequence[Built]) -> list[str]:
    """What is not as recorded; empty where all is.

    The same compiler must give the same figures. Another one may use 16 registers more and any other amount of shared
    memory and stack, but may not spill where the table has no spills.
    """
    if not _path(op).exists():
        return [f"{op}: nothing is recorded: `python -m tcw.cuda.resources {op} --record`"]
    compiler, table = recorded(op)
    found, wrong = table_of(built), []
    if (names := set(found) ^ set(table)) or any(set(found[name]) != set(table[name]) for name in found):
        return [f"{op}: other kernels or architectures than recorded: {', '.join(sorted(names)) or 'architectures'}"]
    for name, rows in found.items():
        for arch, row in rows.items():
            known = table[name][arch]
            same = row == known if built[0].compiler == compiler else _within(row, known)
            if not same:
                wrong.append(f"{op}: {name} on {arch} takes {row}, recorded is {known}")
    return wrong


def spills(built: Sequence[Built]) -> list[str]:
    """Kernels that spill registers, with how much: "decode on sm_75: 8 bytes stored, 12 loaded"."""
    return [
        f"{name} on {arch}: {row.spill_stores} bytes stored, {row.spill_loads} loaded"
        for name, rows in table_of(built).items()
        for arch, row in rows.items()
        if row.spill_stores or row.spill_loads
    ]


def _compile(job: tuple[str, str]) -> Built:
    return build.compile_op(*job)


def _within(row: Resources, known: Resources) -> bool:
    spilled = row.spill_stores + row.spill_loads
    return row.registers <= known.registers + MORE_REGISTERS and not (spilled and not known.spill_stores)


def _path(op: str) -> Path:
    return folder("kernels") / op / "resources.json"


def _show(op: str, built: Sequence[Built]) -> None:
    out.text(f"{op}, CUDA {built[0].compiler}")
    rows = [
        [name, arch, *(asdict(row)[column] for column in COLUMNS)]
        for name, by_arch in table_of(built).items()
        for arch, row in by_arch.items()
    ]
    out.table(["kernel", "arch", *(column.replace("_", " ") for column in COLUMNS)], rows)
    for line in [f"{one.arch}: {warning}" for one in built for warning in one.warnings]:
        out.text(line)
    for line in spills(built):
        out.text(f"spills: {line}")
    out.text()


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, show, and with `--record` write the tables; 1 where an op does not compile."""
    parser = argparse.ArgumentParser(prog="python -m tcw.cuda.resources", description="what the kernels take")
    parser.add_argument("ops", nargs="*", metavar="OP", help="folders of kernels/; without one, all")
    parser.add_argument("--record", action="store_true", help="write kernels/OP/resources.json")
    asked = parser.parse_args(arguments)
    out.configure(json=False, quiet=False, verbose=False)
    for op in asked.ops or build.operations():
        try:
            built = list(compile_all([op]))
        except NoGpu as error:
            out.text(error.message)
            out.text(str(error.__cause__ or "").partition("compilation log:")[2].partition("\nThe above")[0].rstrip())
            return 1
        _show(op, built)
        if asked.record:
            out.text(f"wrote {record(op, built)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
