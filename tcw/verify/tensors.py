"""Tensors against the manifest, by SHA-256, and against the reference, byte by byte.

Reading a tensor of an artifact compares its SHA-256 with the manifest; here that becomes a finding, not an error.
An artifact that was rotated before it was quantised says so under `transforms`; the reference is then rotated in the
same way, one tensor at a time, so that a relative error is that of the quantisation alone.
"""

import math
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np

from tcw.artifact import MANIFEST, RAW, SAME, Artifact
from tcw.cores import cores
from tcw.errors import FormatError
from tcw.events import Progress, Report
from tcw.source import Source
from tcw.tensor import TensorData, TensorInfo
from tcw.verify.verdict import SECTIONS, TensorReport
from tcw.window import in_order

_BLOCK = 1 << 20  # elements at a time, where floats are compared


@dataclass(frozen=True)
class _Outcome:
    """One tensor: why it differs ("" when it does not), whether that is damage, and by how much."""

    name: str
    reason: str = ""
    damaged: bool = False
    error: float | None = None
    unexplained: bool = False


@dataclass(frozen=True)
class _Reference:
    """What tensors should be: `original` as the user gave it, `expected` after the artifact's transforms.

    `rewritten` are the tensors that the manifest marks as not the source's own.
    """

    original: Source
    expected: Source
    rewritten: frozenset[str] = frozenset()
    kinds: tuple[str, ...] = ()

    def moved(self, tensor: TensorData) -> bool:
        """Say whether the transforms made this expected tensor, or left it as it was."""
        if self.expected is self.original:
            return False
        info = self.original.tensors().get(tensor.info.name)
        return info != tensor.info or not np.array_equal(self.original.read(tensor.info.name).data, tensor.data)


def check_tensors(artifact: Source, reference: Source | None, progress: Report) -> TensorReport:
    """Decode every tensor and compare it with the manifest and the reference, whichever there are."""
    files = _changed_files(artifact, progress) if isinstance(artifact, Artifact) else []
    here = artifact.tensors()
    against = _against(artifact, reference) if reference else None
    there = against.expected.tensors() if against else {}
    outcomes = list(_outcomes(artifact, against, here, there, progress))
    outcomes += [_Outcome(n, f"missing from `{artifact.id}`") for n in there if n not in here]
    wrong = [o for o in outcomes if o.reason]
    return TensorReport(
        checked=len(outcomes),
        different=[o.name for o in wrong],
        reasons={o.name: o.reason for o in wrong},
        relative_error={o.name: o.error for o in wrong if o.error is not None},
        files=files,
        damaged=bool(files) or any(o.damaged for o in wrong),
        unexplained=[o.name for o in wrong if o.unexplained],
    )


def lossy_tensors(artifact: Artifact) -> list[str]:
    """Names of the tensors that do not decode to the bytes they had."""
    rewritten = _rewritten(artifact)
    return [name for name in artifact.entries if name in rewritten or not artifact.is_lossless(name)]


def weigh(artifact: Source, tensors: TensorReport, compared: bool) -> dict[str, Any]:
    """The section `weights`: the largest relative error, and the bits per weight as they lie in the files.

    Bits are those of the tensors that the recipe's first method stored, which does the main work; every part counts:
    codes, scales, zeros, tables, indices. `methods` has the same for each method.
    """
    known = {n: e for n, e in tensors.relative_error.items() if n not in tensors.unexplained}
    broken = [n for n, e in known.items() if math.isnan(e)]
    worst = broken[0] if broken else max(known, key=lambda n: known[n], default=None)
    section: dict[str, Any] = dict.fromkeys(SECTIONS["weights"])
    if compared:
        section |= {"max_error": known[worst] if worst else 0.0, "max_error_tensor": worst}
    if isinstance(artifact, Artifact):
        found = _stored_by_method(artifact)
        first = next(iter(artifact.methods()), "")
        section |= {"methods": found, "bits_per_weight": found.get(first, {}).get("bits_per_weight")}
    return section


def _stored_by_method(artifact: Artifact) -> dict[str, dict[str, Any]]:
    """Tensors, weights and bits per weight of each method; a tensor stored under two names counts once."""
    sums: dict[str, list[int]] = {}
    for name, entry in artifact.entries.items():
        if entry.method not in (RAW, SAME) and entry.info.numel:
            row = sums.setdefault(entry.method, [0, 0, 0])
            for i, more in enumerate((1, entry.info.numel, artifact.tensor_bytes(name))):
                row[i] += more
    return {
        method: {"tensors": count, "weights": weights, "bits_per_weight": 8 * size / weights}
        for method, (count, weights, size) in sums.items()
    }


def _rewritten(artifact: Artifact) -> frozenset[str]:
    """Names of the tensors that the manifest marks as rewritten before they were stored."""
    return frozenset(name for name, entry in artifact.entries.items() if entry.rewritten)


def _against(artifact: Source, reference: Source) -> _Reference:
    """The reference, transformed as the artifact was. Raises FormatError for a transform that cannot be repeated."""
    if not isinstance(artifact, Artifact):
        return _Reference(reference, reference)
    transforms = artifact.manifest.get("transforms", [])
    if not isinstance(transforms, list) or not all(isinstance(t, dict) for t in transforms):
        raise FormatError(f"`{MANIFEST}` of `{artifact.id}` has impossible `transforms`")
    expected = reference
    for transform in transforms:
        from tcw.calibration.rotation import RotatedSource

        expected = RotatedSource.from_description(expected, transform)
    kinds = tuple(str(transform.get("kind")) for transform in transforms)
    return _Reference(reference, expected, _rewritten(artifact), kinds)


def relative_error(reference: TensorData, artifact: TensorData) -> float | None:
    """||artifact - reference||_F / ||reference||_F in float64; None when the shapes or dtypes cannot be compared.

    NaN where a value is no number, infinity where the reference is all zeros.
    """
    if reference.info.shape != artifact.info.shape or not (_readable(reference.info) and _readable(artifact.info)):
        return None
    error = norm = 0.0
    with np.errstate(all="ignore"):
        for first in range(0, reference.info.numel, _BLOCK):
            a, b = (_floats(t, first, first + _BLOCK) for t in (reference, artifact))
            error += float(np.square(b - a).sum())
            norm += float(np.square(a).sum())
    if norm == 0.0:
        return 0.0 if error == 0.0 else math.inf
    return math.sqrt(error / norm)


def _changed_files(artifact: Artifact, progress: Report) -> list[str]:
    changed, total = [], len(artifact.manifest["files"])
    for done, (name, ok) in enumerate(artifact.check_files(), start=1):
        if not ok:
            changed.append(name)
        progress(Progress("files", done, total, "files", name))
    return changed


def _outcomes(
    artifact: Source,
    against: _Reference | None,
    here: dict[str, TensorInfo],
    there: dict[str, TensorInfo],
    progress: Report,
) -> Iterator[_Outcome]:
    """Check the tensors of `here`, some at once, and give the outcomes in order."""
    total, done = sum(i.nbytes for i in here.values()), 0
    pool = ThreadPoolExecutor(cores(), thread_name_prefix="tcw-verify")

    def submit(info: TensorInfo) -> Future[_Outcome]:
        return pool.submit(_check_one, artifact, against, info, there.get(info.name))

    with closing(in_order(pool, here.values(), submit)) as outcomes:
        for info, outcome in outcomes:
            yield outcome
            done += info.nbytes
            progress(Progress("tensors", done, total, "bytes", info.name))


def _check_one(artifact: Source, against: _Reference | None, info: TensorInfo, other: TensorInfo | None) -> _Outcome:
    name = info.name
    try:
        tensor = artifact.read(name)
    except FormatError as error:
        return _Outcome(name, error.message.removeprefix(f"`{name}` "), damaged=True)
    if against is None:
        return _Outcome(name)
    if other is None:
        return _Outcome(name, f"not in `{against.original.id}`")
    return _compare(tensor, against.expected.read(name), against)


def _compare(tensor: TensorData, expected: TensorData, against: _Reference) -> _Outcome:
    info, other = tensor.info, expected.info
    name, moved = info.name, against.moved(expected)
    if name in against.rewritten and not moved:
        return _Outcome(name, "rewritten by its method, which the manifest has no way to repeat", unexplained=True)
    if (info.dtype, info.shape) != (other.dtype, other.shape):
        reason = f"is {info.dtype} {list(info.shape)}, the reference {other.dtype} {list(other.shape)}"
        return _Outcome(name, reason, error=relative_error(expected, tensor))
    if not np.array_equal(tensor.data, expected.data):
        count = int(np.count_nonzero(tensor.words != expected.words))
        what = f"the reference after {', '.join(against.kinds)}" if moved else "the reference"
        reason = f"{count} of {info.numel} elements differ from {what}"
        return _Outcome(name, reason, error=relative_error(expected, tensor))
    if moved:
        return _Outcome(name, f"is what {', '.join(against.kinds)} makes of the reference", error=0.0)
    return _Outcome(name)


def _readable(info: TensorInfo) -> bool:
    return info.dtype in ("BF16", "F16", "F32", "F64")


def _floats(tensor: TensorData, first: int, last: int) -> np.ndarray:
    """Elements `first` to `last` as float64."""
    words = tensor.words[first:last]
    if tensor.info.dtype == "BF16":
        return (words.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return words.view(f"f{tensor.info.bits // 8}").astype(np.float64)
