"""Codes one layer after another with the recipe's methods, keeps to the bits allocated, and notes fallbacks."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tcw.calibration.store import Result
from tcw.calibration.survey import Survey
from tcw.cores import cores
from tcw.errors import SourceError
from tcw.recipe import Step
from tcw.source import Source
from tcw.tensor import TensorData, TensorInfo
from tcw.weights import Statistics, WeightMethod

_LEAST_TOKENS = 8  # a Hessian of fewer than in / 8 tokens says less than none
_SHOWN = 3  # names in a note


@dataclass(frozen=True)
class Task:
    """A tensor to be coded, read when its turn comes."""

    name: str
    read: Callable[[], TensorData]
    statistics: Statistics
    table: bool = False  # an embedding: its inputs are tokens, so there is no Hessian to miss


class Coder:
    """The methods of a recipe, built once.

    Attributes:
        bits: what was allocated: tensor -> real bits per weight.
        gradients: tensor -> mean squared gradient of each output, float32 [out].
    """

    def __init__(self, source: Source, steps: tuple[Step, ...]) -> None:
        """Take the recipe's steps; those that are not for weights are no concern here."""
        self._source = source
        built = [(step, step.build()) for step in steps]
        self._steps = [(step, method) for step, method in built if isinstance(method, WeightMethod)]
        self._infos = source.tensors()
        self.bits: dict[str, float] = {}
        self.gradients: dict[str, np.ndarray] = {}
        self._open = 0  # weights that still have to be coded within the allocation
        self._owed = 0.0  # bits that tensors so far left over (or took too many of, below 0)
        self._reasons: dict[str, list[str]] = {}
        self._fresh: dict[str, list[str]] = {}

    @property
    def methods(self) -> list[WeightMethod]:
        """The methods that calibrate."""
        return [method for _, method in self._steps if method.calibrates()]

    @property
    def notes(self) -> list[str]:
        """What could not be done as asked, one line a reason."""
        lines = []
        for reason, names in self._reasons.items():
            shown = ", ".join(f"`{n}`" for n in names[:_SHOWN]) + (" ..." if len(names) > _SHOWN else "")
            lines.append(f"{len(names)} {'tensor' if len(names) == 1 else 'tensors'} {reason}: {shown}")
        return lines

    def owner(self, name: str) -> tuple[Step, WeightMethod] | None:
        """The step that a tensor belongs to, if its method calibrates."""
        if name not in self._infos:
            return None
        for step, method in self._steps:
            if step.covers(name) and method.wants(self._infos[name]):
                return (step, method) if method.calibrates() else None
        return None

    def method(self, name: str) -> WeightMethod | None:
        """The method that calibrates for a tensor."""
        found = self.owner(name)
        return found[1] if found else None

    def allocate(self, found: Survey) -> None:
        """Let each method that allocates divide its bits over its tensors."""
        curves = found.curves()
        for step, method in self._steps:
            own = [c for c in curves if (o := self.owner(c.name)) is not None and o[0] is step]
            if own and method.allocates():
                self.bits |= {name: float(bits) for name, bits in method.share_out(own).items()}
        self.gradients = {n: g.astype(np.float32) for n, g in found.gradients.items() if n in self.bits}
        self.open_budget()

    def open_budget(self) -> None:
        """Count the weights that the allocation is for."""
        self._open = sum(self._infos[name].numel for name in self.bits)

    def skip(self, info: TensorInfo, nbytes: int) -> None:
        """Take a tensor that an interrupted run coded into account."""
        self._spend(info, nbytes)

    def code(self, tasks: list[Task]) -> list[Result | None]:
        """Code tensors side by side; None where the method would keep one as it is.

        What earlier tensors left over of the bits is shared out before, so that no result hangs on which is done first.
        """
        complete = [self._complete(task) for task in tasks]
        with ThreadPoolExecutor(max(1, min(len(tasks), cores()))) as pool:
            results = list(pool.map(self._code_one, complete))
        for info, result in results:
            self._spend(info, result.encoded.nbytes if result and result.encoded else info.nbytes)
            if result is None:
                self.note("would not get smaller", info.name)
        return [result for _, result in results]

    def _code_one(self, task: Task) -> tuple[TensorInfo, Result | None]:
        tensor = task.read()
        found = self.owner(tensor.info.name)
        assert found is not None
        step, method = found
        encoded = method.encode(tensor, task.statistics)
        if encoded is None:
            return tensor.info, None
        rewritten = tensor.info.name in self._source.rewritten
        return tensor.info, Result(tensor.info, step.method, tensor.sha256(), encoded=encoded, rewritten=rewritten)

    def decode(self, result: Result) -> np.ndarray:
        """What a coded tensor decodes to, float32 [out, in]."""
        method = self.method(result.info.name)
        assert result.encoded is not None
        assert method is not None
        return type(method).decode(result.info, result.encoded).floats()

    def _complete(self, task: Task) -> Task:
        """Add bits and gradient; leave out a Hessian that too few tokens went into. Raises SourceError."""
        name, statistics, extra = task.name, task.statistics, {}
        info = self._infos[name]
        if name in self.bits:
            extra["bits"] = self.bits[name] + (self._owed / self._open if self._open > 0 else 0.0)
        known: dict[str, Any] = {**extra, "gradient": self.gradients.get(name)}
        if task.table:
            return replace(task, statistics=replace(statistics, **known))
        if statistics.hessian is None or statistics.tokens * _LEAST_TOKENS < info.shape[-1]:
            self.note("saw too few tokens and are coded from their weights alone", name)
            return replace(task, statistics=replace(statistics, hessian=None, drift=None, **known))
        if not np.isfinite(statistics.hessian).all():
            raise SourceError(
                f"the inputs of `{name}` are not finite", "the model overflows on this text: check it, or try another"
            )
        return replace(task, statistics=replace(statistics, **known))

    def _spend(self, info: TensorInfo, nbytes: int) -> None:
        if info.name in self.bits:
            self._owed += self.bits[info.name] * info.numel - 8 * nbytes
            self._open -= info.numel

    def note(self, reason: str, name: str) -> None:
        """Keep in mind that a tensor was not treated as asked; `reason` goes on from "3 tensors"."""
        self._reasons.setdefault(reason, []).append(name)
        self._fresh.setdefault(reason, []).append(name)

    def fresh_notes(self) -> dict[str, list[str]]:
        """Reasons noted since this was asked last, with the tensors: what is kept with a block."""
        fresh, self._fresh = self._fresh, {}
        return fresh

    def note_again(self, kept: dict[str, list[str]]) -> None:
        """Take over what an interrupted run noted about a block."""
        for reason, names in kept.items():
            self._reasons.setdefault(reason, []).extend(names)
