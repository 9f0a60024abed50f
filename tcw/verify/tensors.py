"""Tensors against the manifest, by SHA-256, and against the reference, byte by byte.

Reading a tensor of an artifact compares its SHA-256 with the manifest; here that becomes a finding, not an error.
"""

import math
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass

import numpy as np

from tcw.artifact import Artifact
from tcw.cores import cores
from tcw.errors import FormatError
from tcw.events import Progress, Report
from tcw.source import Source
from tcw.tensor import TensorData, TensorInfo
from tcw.verify.verdict import TensorReport
from tcw.window import in_order

_BLOCK = 1 << 20  # elements at a time, where floats are compared


@dataclass(frozen=True)
class _Outcome:
    """One tensor: why it differs ("" when it does not), whether that is damage, and by how much."""

    name: str
    reason: str = ""
    damaged: bool = False
    error: float | None = None


def check_tensors(artifact: Source, reference: Source | None, progress: Report) -> TensorReport:
    """Decode every tensor and compare it with the manifest and the reference, whichever there are."""
    files = _changed_files(artifact, progress) if isinstance(artifact, Artifact) else []
    here = artifact.tensors()
    there = reference.tensors() if reference else {}
    outcomes = list(_outcomes(artifact, reference, here, there, progress))
    if reference:
        outcomes += [_Outcome(n, f"missing from `{artifact.id}`") for n in there if n not in here]
    wrong = [o for o in outcomes if o.reason]
    return TensorReport(
        checked=len(outcomes),
        different=[o.name for o in wrong],
        reasons={o.name: o.reason for o in wrong},
        relative_error={o.name: o.error for o in wrong if o.error is not None},
        files=files,
        damaged=bool(files) or any(o.damaged for o in wrong),
    )


def lossy_tensors(artifact: Artifact) -> list[str]:
    """Names of the tensors that do not decode to the bytes they had."""
    return [name for name in artifact.entries if not artifact.is_lossless(name)]


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
    reference: Source | None,
    here: dict[str, TensorInfo],
    there: dict[str, TensorInfo],
    progress: Report,
) -> Iterator[_Outcome]:
    """Check the tensors of `here`, some at once, and give the outcomes in order."""
    total, done = sum(i.nbytes for i in here.values()), 0
    pool = ThreadPoolExecutor(cores(), thread_name_prefix="tcw-verify")

    def submit(info: TensorInfo) -> Future[_Outcome]:
        return pool.submit(_check_one, artifact, reference, info, there.get(info.name))

    with closing(in_order(pool, here.values(), submit)) as outcomes:
        for info, outcome in outcomes:
            yield outcome
            done += info.nbytes
            progress(Progress("tensors", done, total, "bytes", info.name))


def _check_one(artifact: Source, reference: Source | None, info: TensorInfo, other: TensorInfo | None) -> _Outcome:
    name = info.name
    try:
        tensor = artifact.read(name)
    except FormatError as error:
        return _Outcome(name, error.message.removeprefix(f"`{name}` "), damaged=True)
    if reference is None:
        return _Outcome(name)
    if other is None:
        return _Outcome(name, f"not in `{reference.id}`")
    expected = reference.read(name)
    if (info.dtype, info.shape) != (other.dtype, other.shape):
        reason = f"is {info.dtype} {list(info.shape)}, the reference {other.dtype} {list(other.shape)}"
        return _Outcome(name, reason, error=relative_error(expected, tensor))
    if np.array_equal(tensor.data, expected.data):
        return _Outcome(name)
    count = int(np.count_nonzero(tensor.words != expected.words))
    reason = f"{count} of {info.numel} elements differ from the reference"
    return _Outcome(name, reason, error=relative_error(expected, tensor))


def _readable(info: TensorInfo) -> bool:
    return info.dtype in ("BF16", "F16", "F32", "F64")


def _floats(tensor: TensorData, first: int, last: int) -> np.ndarray:
    """Elements `first` to `last` as float64."""
    words = tensor.words[first:last]
    if tensor.info.dtype == "BF16":
        return (words.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return words.view(f"f{tensor.info.bits // 8}").astype(np.float64)
