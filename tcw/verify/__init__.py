"""Verify: an artifact against its source, and the answer is the exit code.

    tensors   every tensor decoded, its SHA-256 against the manifest; with a reference, byte for byte against it
    suites    with a reference: what both models put out for the same inputs (tcw/verify/suites, one suite a file);
              of a stored policy (KV cache, tokens) also whether it computes what it should, and what it costs;
              of a residency whether weights that stay compressed give what decoded ones give
    weights   the largest relative error of a tensor, and the bits per weight that lie in the files
    limits    what the recipe or the caller allows; only a limit that was measured and holds can make "equivalent"

Models run with decoded weights, in float32 where that fits: what is judged is the weights, not a kernel that multiplies
with them. Only FP8 artifacts that quantise the inputs of layers as well are run in that way ("packed").

The weights are judged with a full KV cache and all tokens, policies by the suites `kv` and `tokens` alone.

"identical": every file and tensor is bit for bit what it should be, and so is all output that was compared.
"equivalent": something differs, and every limit that was measured holds. "different": anything else.
"""

import math
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from tcw.artifact import Artifact
from tcw.artifact_policies import WHAT
from tcw.artifact_policies import families as families_of
from tcw.errors import SourceError, UnknownName, UsageError
from tcw.events import Report, silent
from tcw.recipe import KV_LIMITS, LIMITS, OUTPUT_LIMITS, TOKEN_LIMITS
from tcw.source import Source
from tcw.verify import suites as registry
from tcw.verify.suites import Job, Measured
from tcw.verify.tensors import check_tensors, lossy_tensors, weigh
from tcw.verify.verdict import SUITE_LIMITS, Limit, TensorReport, Verdict, decide, hold

__all__ = ["Limit", "Verdict", "verify"]

POLICIES = {"kv": {"kv"}, "tokens": {"tokens", "prompt"}}  # suite -> the families of policies that it judges
_ALONE = ("max_bits_per_weight", *KV_LIMITS, *TOKEN_LIMITS)  # limits on what needs no reference
_MAX_TEXT = 64 << 20


def verify(  # noqa: PLR0913  what to judge, by what, and on what
    artifact: Source,
    reference: Source | None = None,
    *,
    suites: Iterable[str] = (),
    tensors_only: bool = False,
    text: Path | None = None,
    limits: dict[str, float | None] | None = None,
    progress: Report = silent,
    device: str = "auto",
    images: Path | None = None,
    residency: str | None = None,
) -> Verdict:
    """Compare a model with what it was made of; an artifact remembers the verdict in its manifest.

    Args:
        artifact: what to judge; any source can be judged against a reference, an artifact also against its manifest.
        reference: the model it should be.
        suites: names of further suites to run; `outputs` always runs when there is a reference, `kv` and `tokens` too
            where the artifact stores such a policy, or when a limit on one is given.
        tensors_only: compare no output, run no model.
        text: a UTF-8 file to measure perplexity on instead of the bundled text.
        limits: values that override the recipe's, by the names in tcw.recipe.LIMITS; None leaves the recipe's.
        progress: is told after every tensor, file and prompt.
        device: where models run: "auto", "cpu", "cuda", "cuda:1", "mps".
        images: a folder of pictures, or a .npy file, for the suite `tokens`.
        residency: where the artifact's weights are to live for the suite `residency`, which runs if this is given.

    Raises:
        UnknownName: no such suite or limit.
        UsageError: there is nothing to compare with.
        SourceError, FormatError: the reference or the text cannot be read.
    """
    start = time.monotonic()
    asked = _check_limits(limits or {})
    _check_reference(artifact, reference, [n for n in asked if n not in _ALONE])
    named = [*suites, *(["residency"] if residency else [])]
    names = _choose_suites(list(dict.fromkeys(named)), artifact, reference is not None, asked, tensors_only)
    job = Job(artifact, reference, _read_text(text), device, progress, images, residency or "auto")
    tensors = check_tensors(artifact, reference, progress)
    measured = _run(names, job, "only tensors were asked for" if tensors_only else "", tensors.damaged)
    recipe = artifact.limits() if isinstance(artifact, Artifact) else {}
    measured.sections["weights"] = weigh(artifact, tensors, reference is not None)
    measured.skipped |= _unexplained(tensors)
    held = hold(recipe, asked, measured.sections, measured.skipped)
    verdict = Verdict(
        verdict=decide(tensors, measured.identical, held, measured.failed, measured.lossy),
        artifact=artifact.id,
        reference=reference.id if reference else None,
        tensors=tensors,
        sections=measured.sections,
        limits=held,
        sequences=measured.sequences,
        skipped=measured.skipped,
        seconds=time.monotonic() - start,
        failed=measured.failed,
        drawn=measured.drawn,
    )
    _remember(artifact, verdict)
    return verdict


def _unexplained(tensors: TensorReport) -> dict[str, str]:
    if not tensors.unexplained:
        return {}
    count = f"{len(tensors.unexplained)} of {tensors.checked} tensors were"
    return {"weight error": f"{count} rewritten in a way that cannot be repeated here"}


def _remember(artifact: Source, verdict: Verdict) -> None:
    if isinstance(artifact, Artifact):
        with suppress(OSError):  # a read-only folder can be verified, it just cannot remember it
            artifact.record_verdict(verdict.to_json())


def _choose_suites(
    names: list[str], artifact: Source, reference: bool, asked: dict[str, float], tensors_only: bool
) -> list[str]:
    """The suites to run: what was asked for, and what goes without saying. Refuses what cannot run."""
    for name in names:
        registry.get(name)
    limited = [suite for suite in POLICIES if any(name in SUITE_LIMITS[suite] for name in asked)]
    _check_run(tensors_only, bool(names), bool(limited) or any(name in OUTPUT_LIMITS for name in asked))
    if tensors_only:
        return []
    if reference and "outputs" not in names:
        names = ["outputs", *names]
    for suite, families in POLICIES.items():
        stored = families & families_of(artifact)
        if suite not in names and (suite in limited or (reference and stored)):
            names = [*names, suite]
        if suite in names and not stored:
            raise UsageError(
                f"`{artifact.id}` stores no {WHAT[suite]}",
                f"`tcw methods` lists those of the family {suite}; compress with one",
            )
    return names


def _run(names: list[str], job: Job, why_not: str, damaged: bool) -> Measured:
    """Run the suites, or say in `skipped` why they were not run."""
    measured = Measured()
    if not why_not and damaged:
        why_not = "the artifact is damaged"
    ready = [] if why_not else names
    if "outputs" not in ready:
        measured.skipped["outputs"] = why_not or "there is no reference to compare with"
    for suite, families in POLICIES.items():
        if suite not in ready and families & families_of(job.artifact):
            measured.skipped[suite] = why_not or f"`--suite {suite}` measures what the stored {WHAT[suite]} costs"
    for name in ready:
        measured.add(registry.get(name)(job))
    return measured


def _check_limits(limits: dict[str, float | None]) -> dict[str, float]:
    asked = {}
    for name, value in limits.items():
        if name not in LIMITS:
            raise UnknownName("limit", name, LIMITS)
        if value is None:
            continue
        if not math.isfinite(value) or value < 0:
            raise UsageError(f"the limit `{name}` must be a number of 0 or more, got `{value}`")
        asked[name] = float(value)
    return asked


def _check_run(tensors_only: bool, suite: bool, limit: bool) -> None:
    """Refuse what needs a model to run where none may."""
    if tensors_only and (suite or limit):
        what = "a suite" if suite else "a limit on output"
        raise UsageError(f"{what} needs the model to run, `--tensors-only` forbids it", "leave out `--tensors-only`")


def _check_reference(artifact: Source, reference: Source | None, limits: list[str]) -> None:
    """Refuse what could only be answered by guessing."""
    if reference is not None:
        return
    hint = "give the model it should equal: `--reference MODEL`"
    if not isinstance(artifact, Artifact):
        raise UsageError(f"`{artifact.id}` is not an artifact and has no manifest to be checked against", hint)
    if limits:
        raise UsageError(f"the limit `{limits[0]}` needs a reference to compare with", hint)
    if lossy := lossy_tensors(artifact):
        raise UsageError(f"`{lossy[0]}` of `{artifact.id}` is stored lossy, the manifest alone cannot judge it", hint)


def _read_text(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        if path.stat().st_size > _MAX_TEXT:
            raise SourceError(f"`{path.name}` is larger than {_MAX_TEXT} bytes", "a few hundred kilobytes are enough")
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise SourceError(f"cannot read the text `{path.name}`: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise SourceError(f"`{path.name}` is not UTF-8 text: {error.reason} at byte {error.start}") from None
