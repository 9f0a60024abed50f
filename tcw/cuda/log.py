"""What the compiler says about a kernel: registers, shared memory, spills, stack; and its warnings.

`ptxas -v` writes for each entry point (before compute capability 9.0 the last line has constant memory as well)

    ptxas info    : Compiling entry function 'decode' for 'sm_90'
    ptxas info    : Function properties for decode
    ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
    ptxas info    : Used 30 registers, used 1 barriers, 16 bytes cumulative stack size, 2048 bytes smem

A function that was not inlined has properties of its own, which count for the entry point above it.
"""

import re
from dataclasses import dataclass

_ENTRY = re.compile(r"Compiling entry function '(\w+)' for '\w+'")


@dataclass(frozen=True)
class Resources:
    """What one kernel takes: `registers` a thread, bytes of static shared memory a block, the rest bytes a thread."""

    registers: int
    shared_bytes: int
    spill_stores: int
    spill_loads: int
    stack: int


def resources(log: str) -> dict[str, Resources]:
    """Read the log of a compilation with `-v`; the kernels in order of their names.

    A kernel is left out where the log does not say how many registers it takes: ptxas has changed its words then.
    """
    pieces = _ENTRY.split(log)
    found = {name: _one(said) for name, said in sorted(zip(pieces[1::2], pieces[2::2], strict=True))}
    return {name: resources for name, resources in found.items() if resources.registers}


def warnings(log: str) -> tuple[str, ...]:
    """Lines of the log that warn."""
    return tuple(line.strip() for line in log.splitlines() if "warning" in line.lower() and "Remark:" not in line)


def errors(log: str) -> tuple[str, ...]:
    """Lines of the log that say what is wrong."""
    return tuple(line.strip() for line in log.splitlines() if "error:" in line or "fatal" in line)


def _one(said: str) -> Resources:
    stacks = _numbers(r"(\d+) bytes (?:stack frame|cumulative stack size)", said)
    return Resources(
        registers=sum(_numbers(r"Used (\d+) registers", said)),
        shared_bytes=sum(_numbers(r"(\d+) bytes smem", said)),
        spill_stores=sum(_numbers(r"(\d+) bytes spill stores", said)),
        spill_loads=sum(_numbers(r"(\d+) bytes spill loads", said)),
        stack=max(stacks, default=0),
    )


def _numbers(pattern: str, text: str) -> list[int]:
    return [int(number) for number in re.findall(pattern, text)]
