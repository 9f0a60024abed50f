"""Recipe + Source -> artifact, tensor by tensor.

    rotate, calibrate             where a method asks for it: block by block, results on the disk
    read ─► hash ─► encode        in workers, several tensors at once, never more than a window of bytes
                      └─► write   here, in the source's order
    policies                      what applies when it runs (tcw/policies.py), calibrated on the weights as they now are

A tensor that calibration has coded already is only taken over. The unit of work is `compress_tensor`, a plain function
of plain arguments, so threads, processes or a cluster are a choice of executor. Memory is bounded by the window and the
largest tensor, never by the model.
"""

import os
import signal
import time
from collections.abc import Generator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import replace
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread, Timer
from typing import TYPE_CHECKING, Any

from tcw.artifact import RAW, SAME, file_sha256
from tcw.artifact_writer import ArtifactWriter, Stored
from tcw.calibration import Settings
from tcw.calibration.store import NOTHING, Calibrated
from tcw.cores import cores
from tcw.errors import ResourceError, SourceError, UsageError
from tcw.events import Progress, Report, silent
from tcw.memory import peak_memory, peak_of
from tcw.policies import Policies, is_policy
from tcw.recipe import Recipe, Step
from tcw.report import CompressReport, Plan, PlannedTensor
from tcw.source import Source
from tcw.tensor import TensorInfo
from tcw.weights import WeightMethod
from tcw.window import in_order

if TYPE_CHECKING:
    from tcw.calibration.run import Inputs

_GRACE = 5.0  # seconds
_SAMPLE_BYTES = 64 << 20  # a plan looks at this much of a tensor


def compress_tensor(
    source: Source, name: str, steps: tuple[Step, ...], calibrated: Calibrated = NOTHING, device: str = "cpu"
) -> Stored:
    """Read, hash and encode one tensor: the first step that covers, wants and shrinks it decides.

    `device`: where it is encoded, by methods that can use a GPU: "cpu", "cuda:0". The bytes do not depend on it.
    """
    if (result := calibrated.get(name)) is not None:
        return result.stored()
    tensor = source.read(name)
    digest, rewritten = tensor.sha256(), name in source.rewritten
    reason = "no method wants it"
    for step in steps:
        method = _weight_method(step)
        if not step.covers(name) or not method.wants(tensor.info):
            continue
        encoded = method.encode_on(device, tensor)
        if encoded is not None:
            return Stored(tensor.info, step.method, digest, encoded.parts, encoded.params, rewritten=rewritten)
        reason = f"{step.method} would not make it smaller"
    return Stored(tensor.info, RAW, digest, {"": tensor.data}, reason=reason, rewritten=rewritten)


def plan(source: Source, recipe: Recipe, *, calibration: Settings | None = None, progress: Report = silent) -> Plan:
    """Predict what `compress` would write, from the tensors' real bits (large ones sampled), writing nothing."""
    steps, policies = _check(source, recipe)
    source, _ = _rotated(source, steps, check=False)
    infos = source.tensors()
    total, done = sum(i.nbytes for i in infos.values()), 0
    planned = []
    with _executor(0) as pool:
        for result in pool.map(lambda info: _plan_tensor(source, info, steps), infos.values()):
            planned.append(result)
            done += result.info.nbytes
            progress(Progress("plan", done, total, "bytes", result.info.name))
    largest = max((i.nbytes for i in infos.values()), default=0)
    needs = _needs(source, steps, calibration or Settings())
    walk = sum(needs[k] for k in ("bytes_block", "bytes_activations")) if needs else 0
    return Plan(
        recipe, tuple(planned), (1 << 30) + max(2 * largest, walk), needs, policies.kv_plan(), policies.outlook(source)
    )  # fmt: skip


def _plan_tensor(source: Source, info: TensorInfo, steps: tuple[Step, ...]) -> PlannedTensor:
    for step in steps:
        method = _weight_method(step)
        if step.covers(info.name) and method.wants(info):
            sample = source.sample(info.name, _SAMPLE_BYTES).as_rows_of(info)
            scale = info.nbytes / max(sample.info.nbytes, 1)
            predicted = round(method.predict(sample) * scale)
            if predicted < info.nbytes:
                return PlannedTensor(info, step.method, predicted)
    return PlannedTensor(info, RAW, info.nbytes)


def compress(
    source: Source,
    recipe: Recipe,
    out: Path,
    *,
    force: bool = False,
    resume: bool = False,
    workers: int = 0,
    calibration: Settings | None = None,
    progress: Report = silent,
) -> CompressReport:
    """Run a recipe over a model and write the artifact.

    Args:
        source: where the tensors come from; it is only read.
        recipe: what to do with them.
        out: the folder to write; its parent must exist.
        force: replace what stands there, if it is a model folder.
        resume: go on with the `.partial` folder of an interrupted run.
        workers: 0: threads, one a core; N > 0: N processes.
        calibration: what methods that look at activations run the model on, by default the bundled text. Its `device`
            is also where tensors are encoded, by methods that can use a GPU.
        progress: is told after every tensor and, in a calibrated run, every layer.

    Raises:
        UsageError, OutputExists: `out` cannot be used as asked.
        SourceError: the model is damaged, or changed while it was read; it has no tokenizer to calibrate with.
        ResourceError: no space or no memory left; `resume` goes on.
    """
    steps, policies = _check(source, recipe)
    start, settings = time.monotonic(), calibration or Settings()
    source, notes = _rotated(source, steps, check=True)
    inputs = _inputs(source, steps, settings)  # what is wrong with them shows before the work
    device = _encoding_device(steps, settings)
    kv, tokens, store = policies.kv_plan(), policies.outlook(source), policies.storing(source, settings)
    writer = ArtifactWriter(source, recipe.to_json(), out, _part_names(steps), force=force, resume=resume)
    hasher = ThreadPoolExecutor(1)
    try:
        hashes = {path.name: hasher.submit(file_sha256, path) for path in source.weight_files()}
        calibrated = _calibrated(source, steps, writer.scratch, inputs, resume, progress)
        with closing(_results(source, steps, writer, calibrated, device, workers, progress)) as results:
            for stored in results:
                writer.add(stored)
        source_hashes = {name: future.result() for name, future in hashes.items()}
        source.check_unchanged()
        notes = (*notes, *calibrated.notes)
        facts = {**calibrated.facts, "notes": list(notes)} if calibrated.facts else {}
        artifact = writer.finish(source_hashes, facts, store)
    finally:
        hasher.shutdown(wait=False, cancel_futures=True)
        writer.close()
    report = _report(source, recipe, writer, artifact, time.monotonic() - start, workers, notes)
    return replace(report, kv=kv, tokens=tokens)


def _encoding_device(steps: tuple[Step, ...], settings: Settings) -> str:
    """Where tensors are encoded. Raises UsageError for a device that is not here."""
    if not any(_weight_method(step).encodes_on_gpu() for step in steps):
        return "cpu"
    from tcw.codecs import lanes_gpu

    return lanes_gpu.place(settings.device)


def _calibrates(steps: tuple[Step, ...]) -> bool:
    return any(_weight_method(step).calibrates() for step in steps)


def _rotated(source: Source, steps: tuple[Step, ...], *, check: bool) -> tuple[Source, tuple[str, ...]]:
    """The model in a rotated basis, where a method asks for that; with a note where it cannot be.

    `check`: run both on a few tokens, so that nothing is quantised that computes something else.
    """
    if not any(_weight_method(step).rotates() for step in steps):
        return source, ()
    from tcw.calibration.rotation import CannotRotate, RotatedSource, verify_rotation

    try:
        rotated = RotatedSource(source)
        if check:
            verify_rotation(source, rotated)
        return rotated, ()
    except CannotRotate as error:
        return source, (f"not rotated: {error.message}",)


def _inputs(source: Source, steps: tuple[Step, ...], settings: Settings) -> "Inputs | None":
    if not _calibrates(steps):
        return None
    from tcw.calibration import run

    return run.prepare(source, steps, settings)


def _calibrated(
    source: Source, steps: tuple[Step, ...], folder: Path, inputs: "Inputs | None", resume: bool, progress: Report
) -> Calibrated:
    if inputs is None:
        return NOTHING
    from tcw.calibration import run

    return run.calibrate(source, steps, folder, inputs, resume=resume, progress=progress)


def _needs(source: Source, steps: tuple[Step, ...], settings: Settings) -> dict[str, Any] | None:
    if not _calibrates(steps):
        return None
    from tcw.calibration import run

    return run.needs(source, steps, settings)


def _check(source: Source, recipe: Recipe) -> tuple[tuple[Step, ...], Policies]:
    """The steps for weights, and the policies of the others. Raises SourceError, UsageError."""
    if source.quantized_by:
        raise SourceError(
            f"`{source.id}` is already quantised by {source.quantized_by}", "start from the original model"
        )
    policies = tuple(step for step in recipe.steps if is_policy(step))
    steps = tuple(step for step in recipe.steps if step not in policies)
    for step in steps:
        _weight_method(step)
    return steps, Policies.of(source, policies)


def _weight_method(step: Step) -> WeightMethod:
    method = step.build()
    assert isinstance(method, WeightMethod), "policies are apart"
    return method


def _part_names(steps: tuple[Step, ...]) -> Any:
    """Names of the parts that a tensor may be stored as: the most that one of the steps could make of it."""

    def names(info: TensorInfo) -> tuple[str, ...]:
        built = [_weight_method(s) for s in steps if s.covers(info.name)]
        return max((m.part_names(info) for m in built if m.wants(info)), key=len, default=())

    return names


def _results(
    source: Source,
    steps: tuple[Step, ...],
    writer: ArtifactWriter,
    calibrated: Calibrated,
    device: str,
    workers: int,
    progress: Report,
) -> Generator[Stored, None, None]:
    """Compress what is left to do, some tensors at once, and give the results in order."""
    total = sum(i.nbytes for i in writer.order)
    todo = [i for i in writer.order if i.name not in writer.entries]
    done = total - sum(i.nbytes for i in todo)
    pool = _executor(workers)

    def submit(info: TensorInfo) -> Future[Stored]:
        return pool.submit(compress_tensor, source, info.name, steps, calibrated, device)

    try:
        with closing(in_order(pool, todo, submit)) as results:
            for info, stored in results:
                yield stored
                done += info.nbytes
                progress(Progress("compress", done, total, "bytes", info.name))
    except BrokenProcessPool:
        raise ResourceError(
            "a worker process died, most likely for want of memory", "use fewer `--workers`, then `--resume`"
        ) from None


def _executor(workers: int) -> Executor:
    if workers < 0:
        raise UsageError(f"`--workers` takes 0 or more, got `{workers}`")
    if workers == 0:
        return ThreadPoolExecutor(cores())
    share = max(1, cores() // workers)
    return ProcessPoolExecutor(workers, get_context("spawn"), initializer=_settle_worker, initargs=(share,))


def _settle_worker(threads: int) -> None:
    """Processes share the cores, each codec uses its part of them; none outlives the run that started it."""
    from tcw.codecs import compiled

    compiled.set_threads(threads)
    # a signal reaches the whole group; a worker that stops between a result and its delivery would hang the parent
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end_soon)
    Thread(target=_end_with_parent, daemon=True).start()


def _end_soon(*_: object) -> None:
    """Give the parent, which was asked to stop as well, time to end its workers in order."""
    timer = Timer(_GRACE, os._exit, (1,))
    timer.daemon = True
    timer.start()


def _end_with_parent() -> None:
    """A killed parent cannot tell its workers to stop: they would wait for work for ever."""
    if parent := parent_process():
        parent.join()
        os._exit(1)


def _report(
    source: Source,
    recipe: Recipe,
    writer: ArtifactWriter,
    artifact: Path,
    seconds: float,
    workers: int,
    notes: tuple[str, ...],
) -> CompressReport:
    entries = writer.entries.values()
    kept = sum(e.method == RAW for e in entries)
    original = sum(p.stat().st_size for p in source.weight_files())
    compressed = sum(p.stat().st_size for p in artifact.glob("model-*.safetensors"))
    weights = sum(e.info.numel for e in entries if e.method != SAME)
    return CompressReport(
        artifact=artifact,
        methods=[s.spec() for s in recipe.steps],
        bytes_original=original,
        bytes_compressed=compressed,
        bits_per_weight=compressed * 8 / weights if weights else 0.0,
        tensors_total=len(entries),
        tensors_compressed=len(entries) - kept,
        tensors_kept=kept,
        kept_reasons=writer.reasons,
        seconds=seconds,
        peak_memory_bytes=peak_memory() + workers * peak_of("RUSAGE_CHILDREN"),
        notes=notes,
    )
