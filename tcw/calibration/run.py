"""Calibrate a model for a recipe: text to tokens, a plan of what goes where, the walk, and notes on it."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import tcw
from tcw.calibration import Settings, texts
from tcw.calibration.activations import fits
from tcw.calibration.blocks import BlockModel, CannotCalibrate
from tcw.calibration.coder import Coder
from tcw.calibration.engine import Walk
from tcw.calibration.store import Calibrated, Store
from tcw.device import pick
from tcw.errors import ResourceError
from tcw.events import Report, silent
from tcw.recipe import Step
from tcw.source import Source
from tcw.units import show_bytes


@dataclass(frozen=True)
class Inputs:
    """What a run needs, checked before anything is written.

    Attributes:
        ids: int64 [sequences, length].
        facts: what the manifest says of them.
        notes: what of it could not be as asked.
        model: the model, still empty; None where its blocks cannot be walked.
        in_memory: whether activations stay in memory.
    """

    ids: np.ndarray
    facts: dict[str, Any]
    notes: tuple[str, ...]
    model: BlockModel | None = None
    in_memory: bool = True


def prepare(source: Source, steps: tuple[Step, ...], settings: Settings) -> Inputs:
    """Read and cut the text, make the empty model, and see that memory will do.

    Raises:
        SourceError: there is no tokenizer, or the text is too short or no text.
        ResourceError: memory would not do.
    """
    from tcw.runtime.load import tokenizer

    ids = texts.sequences(tokenizer(source), texts.read_texts(settings.text), settings.samples, settings.length)
    facts = {
        "text": settings.text.name if settings.text else "bundled", "sequences": len(ids), "length": ids.shape[1],
        "tokens_sha256": texts.fingerprint(ids),
    }  # fmt: skip
    notes: tuple[str, ...] = ()
    if len(ids) < settings.samples:
        notes = (f"the text has {len(ids)} sequences of {ids.shape[1]} tokens, {settings.samples} were asked for",)
    try:
        model = BlockModel(source, pick(settings.device).torch_name)
    except CannotCalibrate as error:
        return Inputs(ids, facts, (*notes, _from_weights(error)))
    found = _needs(model, Coder(source, steps), ids, settings)
    if found["bytes_block"] > found["bytes_free"]:
        raise ResourceError(
            f"calibration needs about {show_bytes(found['bytes_block'])} for a block and its Hessians, "
            f"{show_bytes(found['bytes_free'])} are free",
            "use a machine with more memory, or methods that look at weights alone, such as `int4:algo=rtn`",
        )
    return Inputs(ids, facts, notes, model, found["where"] == "memory")


def calibrate(
    source: Source,
    steps: tuple[Step, ...],
    folder: Path,
    inputs: Inputs,
    *,
    resume: bool = False,
    progress: Report = silent,
) -> Calibrated:
    """Code every tensor whose method wants to see activations.

    Args:
        source: the model, rotated already where a method asks for that.
        steps: the recipe's methods; a tensor belongs to the first that covers and wants it.
        folder: where results go, block by block.
        inputs: what `prepare` made of the text and the model.
        resume: take the blocks that are there from an interrupted run.
        progress: is told after every layer.

    Returns:
        The results, and notes on what could not be done as asked. A model whose blocks cannot be walked gives no
        results and a note: the pipeline then codes its weights without activations.

    Raises:
        SourceError: weights or activations are not finite.
        ResourceError: memory did not do.
        UsageError: `resume` with another text or other options.
    """
    if inputs.model is None:
        return Calibrated(None, inputs.notes, inputs.facts)
    store, coder = Store(folder), Coder(source, steps)
    known = {"tcw": tcw.__version__, **inputs.facts, "steps": json.loads(json.dumps([asdict(s) for s in steps]))}
    store.begin(known, resume)
    where = None if inputs.in_memory else folder
    try:
        extra = Walk(inputs.model, coder, store, torch.from_numpy(inputs.ids), where, progress).run()
    except CannotCalibrate as error:
        return Calibrated(None, (*inputs.notes, _from_weights(error)), inputs.facts)
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise ResourceError(
            f"no memory left while calibrating: {str(error).splitlines()[0] if str(error) else 'out of memory'}",
            "use shorter `--length`, or another device, then `--resume`",
        ) from None
    return Calibrated(store, (*inputs.notes, *coder.notes), {**inputs.facts, **extra})


def _from_weights(error: CannotCalibrate) -> str:
    return f"coded from the weights alone: {error.message}"


def needs(source: Source, steps: tuple[Step, ...], settings: Settings) -> dict[str, Any] | None:
    """What calibration would take, without doing it; None where no method calibrates or the model cannot be walked.

    Returns:
        `bytes_block` (a block in float32 and its Hessians), `bytes_activations`, `where` they would be ("memory" or
        "disk"), `tokens`, `bytes_free`.
    """
    coder = Coder(source, steps)
    if not coder.methods:
        return None
    try:
        model = BlockModel(source)
    except CannotCalibrate:
        return None
    return _needs(model, coder, np.empty((settings.samples, settings.length), np.int64), settings)


def _needs(model: BlockModel, coder: Coder, ids: np.ndarray, settings: Settings) -> dict[str, Any]:
    copies = 2 if any(m.wants_drift() for m in coder.methods) else 1
    free = pick(settings.device).free_bytes
    sizes = [sum(p.numel() for p in model.parameters_of(k).values()) for k in range(len(model.paths))]
    widths = [p.shape[-1] for k in range(len(model.paths)) for p in model.parameters_of(k).values() if p.dim() > 1]
    block = 4 * max(sizes) * copies + 36 * max(widths) ** 2  # a Hessian in float32, its factors in float64
    shape = (copies * ids.size, int(model.model.config.get_text_config().hidden_size))
    return {
        "bytes_block": block, "bytes_activations": 4 * shape[0] * shape[1], "tokens": ids.size, "bytes_free": free,
        "where": "memory" if fits(1, shape, free - block) else "disk",
    }  # fmt: skip
