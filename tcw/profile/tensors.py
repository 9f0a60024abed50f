"""One pass over a model's tensors: what they are, what their exponents carry, what each method would store.

Every tensor is read once and shown to every method. In models above 4 GB, tensors above 64 MB are sampled (runs of
bytes spread over the tensor) and counted up, so that a profile costs seconds where reading would cost minutes.
"""

from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tcw.cores import cores
from tcw.events import Progress, Report, silent
from tcw.profile.entropy import EXPONENTS, entropy_bits, exponent_counts
from tcw.profile.parts import PARTS, block_of, part_of
from tcw.recipe import Step
from tcw.source import Source
from tcw.tensor import DTYPE_BITS, TensorData, TensorInfo
from tcw.weights import WeightMethod

SAMPLED_MODEL_BYTES = 4 << 30
SAMPLED_TENSOR_BYTES = 64 << 20


@dataclass(frozen=True)
class Look:
    """What one tensor showed: exponent histogram (None: no float), and bytes under each step, in the steps' order."""

    info: TensorInfo
    counts: np.ndarray | None
    stored: tuple[int, ...]
    sampled: bool = False
    same_as: str | None = None

    @property
    def entropy(self) -> float | None:
        """Exponent entropy in bits per weight."""
        return None if self.counts is None else entropy_bits(self.counts)


@dataclass(frozen=True)
class Scan:
    """Every tensor of a model, looked at once."""

    looks: tuple[Look, ...]
    steps: tuple[Step, ...] = field(default=())

    def stored_bytes(self, step: int) -> int:
        """Bytes that the model's tensors take under one step, raw-kept ones included; what is compressed, once."""
        return sum(
            0 if look.same_as and look.stored[step] < look.info.nbytes else look.stored[step] for look in self.looks
        )

    def scratch_bytes(self, step: int) -> int:
        """Bytes of the largest block of decoded weights: what a runtime that decodes block by block needs besides."""
        blocks: dict[str, int] = {}
        for look in self.looks:
            if look.stored[step] < look.info.nbytes and look.same_as is None:
                block = block_of(look.info.name)
                blocks[block] = blocks.get(block, 0) + look.info.nbytes
        return max(blocks.values(), default=0)

    def by_dtype(self) -> dict[str, int]:
        """Bytes of each dtype, largest first."""
        sizes: Counter[str] = Counter()
        for look in self.looks:
            sizes[look.info.dtype] += look.info.nbytes
        return dict(sizes.most_common())

    def by_part(self) -> dict[str, dict[str, Any]]:
        """Tensors, parameters, bytes and exponent entropy of each part that the model has, in the order of PARTS."""
        groups: dict[str, list[Look]] = {part: [] for part in PARTS}
        for look in self.looks:
            groups[part_of(look.info.name)].append(look)
        return {k: {**_sums(v), "exponent_entropy_bits": mean_entropy(v)} for k, v in groups.items() if v}

    def exponents(self) -> tuple[str, np.ndarray] | None:
        """The dtype that most float weights have, and the histogram of its exponents over the whole model."""
        weights = {d: size // DTYPE_BITS[d] for d, size in self.by_dtype().items() if d in EXPONENTS}
        if not weights:
            return None
        dtype = max(weights, key=lambda d: weights[d])
        total = np.zeros(1 << EXPONENTS[dtype][1])
        for look in self.looks:
            if look.info.dtype == dtype and look.counts is not None and look.counts.sum():
                total += look.counts * (look.info.numel / look.counts.sum())
        return dtype, np.rint(total).astype(np.int64)


def _sums(looks: list[Look]) -> dict[str, Any]:
    return {
        "tensors": len(looks),
        "parameters": sum(look.info.numel for look in looks),
        "bytes": sum(look.info.nbytes for look in looks),
    }


def mean_entropy(looks: Iterable[Look]) -> float | None:
    """Exponent entropy of each tensor, weighted by parameters, in bits; None without a float tensor."""
    measured = [(look.info.numel, look.entropy) for look in looks if look.entropy is not None and look.info.numel]
    weights = sum(n for n, _ in measured)
    return sum(n * h for n, h in measured if h is not None) / weights if weights else None


def scan(source: Source, steps: Iterable[Step] = (), *, progress: Report = silent) -> Scan:
    """Look at every tensor of `source` once, on all cores; memory is bounded by the largest tensor times cores."""
    steps, infos = tuple(steps), source.tensors()
    built = [(step, step.build()) for step in steps]
    methods = [(step, method) for step, method in built if isinstance(method, WeightMethod)]
    total, done = sum(i.nbytes for i in infos.values()), 0
    large = total > SAMPLED_MODEL_BYTES
    looks: list[Look] = []

    # numba loads its type registries at its first compilation, and two threads must not do that at once
    exponent_counts(TensorData(TensorInfo("", "BF16", (1,)), np.zeros(2, np.uint8)))
    with ThreadPoolExecutor(cores()) as pool:
        for look in pool.map(lambda info: _look(source, info, methods, large), infos.values()):
            looks.append(look)
            done += look.info.nbytes
            progress(Progress("profile", done, total, "bytes", look.info.name))
    return Scan(tuple(_mark_repeats(source, looks)), steps)


def _look(source: Source, info: TensorInfo, methods: list[tuple[Step, WeightMethod]], large: bool) -> Look:
    sampled = large and info.nbytes > SAMPLED_TENSOR_BYTES
    data = source.sample(info.name, SAMPLED_TENSOR_BYTES).as_rows_of(info) if sampled else source.read(info.name)
    scale = info.nbytes / max(data.info.nbytes, 1)
    stored = []
    for step, method in methods:
        wanted = info.numel > 0 and step.covers(info.name) and method.wants(info)
        stored.append(min(info.nbytes, round(method.predict(data) * scale)) if wanted else info.nbytes)
    return Look(info, exponent_counts(data), tuple(stored), sampled)


def _mark_repeats(source: Source, looks: list[Look]) -> list[Look]:
    """Mark tensors whose bytes another tensor has (a head saved beside its tied embedding): they are stored once.

    Equal tensors have equal histograms, so only those whose histograms agree are read again and hashed.
    """
    alike: dict[tuple[Any, ...], list[Look]] = {}
    for look in looks:
        key = b"" if look.counts is None else look.counts.tobytes()
        alike.setdefault((look.info.dtype, look.info.shape, key), []).append(look)
    repeats: dict[str, str] = {}
    for group in alike.values():
        first: dict[str, str] = {}
        for look in group if len(group) > 1 and group[0].info.numel else ():
            data = source.sample(look.info.name, SAMPLED_TENSOR_BYTES) if look.sampled else source.read(look.info.name)
            repeats[look.info.name] = first.setdefault(data.sha256(), look.info.name)
    return [
        look if repeats.get(look.info.name, look.info.name) == look.info.name
        else Look(look.info, look.counts, look.stored, look.sampled, repeats[look.info.name])
        for look in looks
    ]  # fmt: skip
