"""What a kernel's `bench.py` hands over: things to run, and how many bytes each must move."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Timed:
    """One way to do one case; the first way that a `bench.py` gives for a case is the project's own.

    Attributes:
        case: what is done, such as "4096x4096".
        way: how: "lanes", "numba", "cuBLAS". The same in every case.
        run: does it once, on the current stream where there is one; what it returns is dropped.
        nbytes: bytes that must at least move: inputs read once and outputs written once. Speeds are made of it.
    """

    case: str
    way: str
    run: Callable[[], object]
    nbytes: int
