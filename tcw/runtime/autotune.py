"""What a product costs on this device: measured once for each shape and number of rows, and kept in the cache folder.

    way        y = x Wᵀ
    plain      torch's product with the BF16 weight
    fused      the kernel that reads the packed weight (kernels/packed_matmul), up to 16 rows of x
    unpack     the weight is unpacked into memory of its own, then torch's product

Times are medians with cold caches (tcw/bench/clock.py). They hold for one GPU and one set of versions, which the file's
name says; a file that cannot be read is measured anew.
"""

import json
import logging
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch.nn.functional import linear

import tcw
from tcw.bench.clock import Clock, clock_of, percentile
from tcw.cache import cache_folder
from tcw.device import pick
from tcw.kernels.packed_matmul import MOST_ROWS, PackedWeight, pack, packed_matmul, unpack

ROWS = (1, 4, 16, 64)  # of x; a number between two of them counts as the next larger one
_SECONDS = 0.03  # for each measurement
_PAYS = 0.98  # of the plain product's time: less of a gain is not worth another layout
_log = logging.getLogger("tcw")
Shape = tuple[int, int]


@dataclass
class Table:
    """Microseconds by what was measured: "4096x14336 p4 1 fused"."""

    times: dict[str, float] = field(default_factory=dict)

    def time(self, shape: Shape, form: str, rows: int, way: str) -> float:
        """Microseconds of one product; infinity where the way cannot be gone, or was not measured."""
        return self.times.get(key(shape, form, rows, way), float("inf"))

    def pays(self, shape: Shape, form: str) -> bool:
        """Say whether one row of x, as in generation for one user, is multiplied faster with the packed weight."""
        packed = min(self.time(shape, form, 1, way) for way in ("fused", "unpack"))
        return packed < _PAYS * self.time(shape, form, 1, "plain")

    def fused_rows(self, shape: Shape, form: str) -> int:
        """Up to how many rows of x the fused kernel is faster than unpacking; 16 where nothing was measured."""
        found = 0
        for rows in ROWS:
            fused, unpacked = (self.time(shape, form, rows, way) for way in ("fused", "unpack"))
            if fused == unpacked == float("inf"):
                return max(found, MOST_ROWS) if rows == ROWS[0] else found
            if fused > unpacked:
                return found
            found = rows
        return found


def key(shape: Shape, form: str, rows: int, way: str) -> str:
    """The name of a measurement."""
    return f"{shape[0]}x{shape[1]} {form} {rows} {way}"


def measured(shapes: Iterable[Shape], form: str, device: torch.device, clock: Clock | None = None) -> Table:
    """Give the times of some shapes [N, K] on a device: from the cache, and measured where they are not in it."""
    path = file_of(device)
    table = read(path)
    new = [shape for shape in dict.fromkeys(shapes) if key(shape, form, 1, "plain") not in table.times]
    if new:
        clock = clock or clock_of(pick(str(device)))
        for shape in new:
            _log.info("measuring products with weights of %d x %d, once for this device", *shape)
            table.times |= _measure(shape, form, device, clock)
        write(path, table)
    return table


def _measure(shape: Shape, form: str, device: torch.device, clock: Clock) -> dict[str, float]:
    """Microseconds of every way and number of rows."""
    generator = torch.Generator(device).manual_seed(0)
    plain = torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(0, 0.02, generator=generator)
    packed = pack(plain, form)
    found: dict[str, float] = {}
    for rows in ROWS:
        x = torch.empty(rows, shape[1], dtype=torch.bfloat16, device=device).normal_(generator=generator)
        ways: dict[str, Callable[[], object]] = {"plain": partial(linear, x, plain)}
        if packed is not None:
            ways["unpack"] = partial(_unpacked, x, packed)
        if packed is not None and rows <= MOST_ROWS:
            ways["fused"] = partial(packed_matmul, x, packed)
        for way, run in ways.items():
            times = clock.measure(run, None, _SECONDS).ms
            found[key(shape, form, rows, way)] = round(1000 * percentile(times, 50), 3)
    return found


def _unpacked(x: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    return linear(x, unpack(weight))


def file_of(device: torch.device) -> Path:
    """Where the times of a device are kept."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    known = f"{name}-tcw{tcw.__version__}-torch{torch.__version__}-cuda{torch.version.cuda}"
    return cache_folder() / "autotune" / f"{re.sub(r'[^A-Za-z0-9.]+', '-', known)}.json"


def read(path: Path) -> Table:
    """The times in a file; none where it is missing or damaged."""
    try:
        times = json.loads(path.read_text(encoding="utf-8"))["microseconds"]
        if all(isinstance(k, str) and isinstance(t, float | int) and t > 0 for k, t in times.items()):
            return Table({k: float(t) for k, t in times.items()})
    except FileNotFoundError:
        return Table()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    _log.warning("`%s` cannot be read: products are measured anew", path)
    return Table()


def write(path: Path, table: Table) -> None:
    """Keep times, if the folder can be written to."""
    part = path.with_suffix(".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps({"microseconds": dict(sorted(table.times.items()))}, indent=1), encoding="utf-8")
        part.replace(path)
    except OSError as error:
        _log.warning("the times of products cannot be kept in `%s`: %s", path.parent, error)
