"""Suites: what `tcw verify` measures by running models. One suite a file, its name is the file's name.

A suite is a module with `run(job: Job) -> Measured`. What it returns under `sections` stands under the same keys in
the verdict's JSON, so `kv.py` may return {"kv": {...}} and touch nothing else.
"""

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tcw.errors import UnknownName
from tcw.events import Report, silent
from tcw.source import Source
from tcw.verify.verdict import Sequence


@dataclass(frozen=True)
class Job:
    """What a suite works on. `text` replaces the bundled evaluation text; `device` is as typed by the user.

    `images` is a folder, or a .npy file, of pictures for suites that look at some. `residency` is what the suite of
    that name judges.
    """

    artifact: Source
    reference: Source | None
    text: str | None = None
    device: str = "auto"
    progress: Report = silent
    images: Path | None = None
    residency: str = "auto"


@dataclass
class Measured:
    """What suites found.

    Attributes:
        sections: measurements, as they stand in the verdict's JSON.
        identical: False once any output of the two models differed in a bit.
        sequences: one entry for each input, for the report.
        skipped: what could not be measured, and why.
        lossy: sections whose own subject, not the weights, makes outputs differ: a limit on them must say how much.
        failed: checks that no limit can make up for, and what went wrong.
        drawn: by section, a piece of HTML for the page: pictures that say more than the numbers.
    """

    sections: dict[str, dict[str, Any]] = field(default_factory=dict)
    identical: bool = True
    sequences: list[Sequence] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    lossy: set[str] = field(default_factory=set)
    failed: dict[str, str] = field(default_factory=dict)
    drawn: dict[str, str] = field(default_factory=dict)

    def add(self, other: "Measured") -> None:
        """Take in what another suite found."""
        self.sections |= other.sections
        self.identical &= other.identical
        self.lossy |= other.lossy
        self.failed |= other.failed
        self.drawn |= other.drawn
        self.sequences += other.sequences
        self.skipped |= other.skipped


def names() -> list[str]:
    """Names of all suites, sorted."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def get(name: str) -> Callable[[Job], Measured]:
    """Return the `run` of a suite. Raises UnknownName."""
    if name not in names():
        raise UnknownName("suite", name, names())
    return importlib.import_module(f"{__name__}.{name}").run
