"""Progress as data: work reports events, the command line draws them, a library user may ignore them."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """How far a stage is: `done` of `total` in `unit` ("bytes", "tensors", "tokens", "prompts")."""

    stage: str
    done: int
    total: int
    unit: str
    note: str = ""


Report = Callable[[Progress], None]


def silent(event: Progress) -> None:
    """Ignore an event; the default of every `progress=` parameter."""
