"""The walk over a model's blocks: see what goes into each layer, code it, put the decoded weight back, go on.

Within a block the layers go in the order in which they run (q, k, v, then o, then gate and up, then down), and each is
calibrated on inputs that the layers before it, already coded, produce: so later layers make up for earlier errors.
"""

import contextlib
import copy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tcw.calibration.activations import Activations
from tcw.calibration.blocks import BlockModel
from tcw.calibration.coder import Coder, Task
from tcw.calibration.scaling import fold, norm_before
from tcw.calibration.store import Result, Store
from tcw.calibration.survey import MOST_SEQUENCES, members, survey
from tcw.calibration.watch import Covariance, Enough, Group, Site, Stage, Watch, stages
from tcw.events import Progress, Report
from tcw.tensor import TensorData
from tcw.weights import Statistics

_TOKENS_A_BATCH = 2048
_SURVEY_BYTES = 64 << 20  # of states before every block that are kept in memory, not on the disk
_LARGEST = {"fp8": 448.0, "int8": 127.0}  # what a cache of this kind can hold

Means = dict[Site, Statistics]


@dataclass(frozen=True)
class Job:
    """A weight to be coded: the tensor's name, where it lies in the block, and whether its columns were scaled."""

    name: str
    weight: torch.Tensor
    statistics: Statistics
    scaled: bool


def batches(ids: torch.Tensor) -> torch.Tensor:
    """Cut sequences [n, length] into equal batches [batches, batch, length] of some two thousand tokens."""
    most = max(1, _TOKENS_A_BATCH // ids.shape[1])
    size = max(d for d in range(1, most + 1) if len(ids) % d == 0)
    return ids.reshape(len(ids) // size, size, ids.shape[1])


class Walk:
    """One run over the blocks of a model."""

    def __init__(
        self, model: BlockModel, coder: Coder, store: Store, ids: torch.Tensor, folder: Path | None, progress: Report
    ) -> None:
        """Take int64 ids [sequences, length]; activations go to `folder`, or (None) stay in memory."""
        self.model, self.coder, self.store, self.progress = model, coder, store, progress
        self._ids, self._folder = batches(ids), folder
        self._few = batches(ids[:: max(1, len(ids) // MOST_SEQUENCES)][:MOST_SEQUENCES])
        self._drift = any(m.wants_drift() for m in coder.methods)
        self._cache = next((kv for m in coder.methods if (kv := getattr(m, "kv", "off")) != "off"), "off")
        self._total = sum(1 for ps in model.places.values() for p in ps if coder.owner(p.tensor))
        self._done = 0

    def run(self) -> dict[str, Any]:
        """Walk over all blocks and the output head. Returns facts for the manifest."""
        self._ask_bits()
        with torch.no_grad():
            first = next(iter(self.model.enter(self._ids[:1])))
            hidden = self._room("hidden", first)
            original = self._room("original", first) if self._drift else None
            for b, state in enumerate(self.model.enter(self._ids)):
                hidden[b] = state
                if original is not None:
                    original[b] = state.clone()
            scales: dict[str, dict[str, float]] = {}
            for k in range(len(self.model.paths)):
                scales |= self._block(k, hidden, original)
            self._head(hidden)
            self._table()
        for states in filter(None, (hidden, original)):
            states.close()
        return {"kv_scales": {"dtype": self._cache, "layers": scales}} if scales else {}

    def _room(self, name: str, like: torch.Tensor) -> Activations:
        return Activations(len(self._ids), tuple(like.shape), self._folder, name, self.model.device)

    def _ask_bits(self) -> None:
        """Survey the model where a method allocates bits, or take what an interrupted run found."""
        known = self.store.facts("survey")
        if known is not None:
            self.coder.bits = known["extra"]["bits"]
            self.coder.gradients = {n: np.array(g, np.float32) for n, g in known["extra"]["gradients"].items()}
            self.coder.open_budget()
            return
        if not any(m.allocates() for m in self.coder.methods):
            return

        def wants(name: str) -> Any:
            method = self.coder.method(name)
            return method if method is not None and method.allocates() else None

        def room(count: int, like: torch.Tensor) -> list[Activations]:
            shape = tuple(like.shape)
            small = 4 * count * len(self._few) * like.numel() <= _SURVEY_BYTES
            folder = None if small else self.store.folder
            return [Activations(len(self._few), shape, folder, f"survey{k}", self.model.device) for k in range(count)]

        self.coder.allocate(survey(self.model, self._few, wants, room, self.progress))
        gradients = {name: g.tolist() for name, g in self.coder.gradients.items()}
        self.store.save("survey", [], {"bits": self.coder.bits, "gradients": gradients})

    def _block(self, k: int, hidden: Activations, original: Activations | None) -> dict[str, dict[str, float]]:
        """Code block `k`, or put back what an interrupted run made of it; then run it. Returns scales of its cache."""
        key, block = f"block-{k:05d}", self.model.block(k)
        untouched = copy.deepcopy(block) if original is not None else None
        if self.store.intact(key):
            self._restore(k, key)
        else:
            results = self._code(k, block, untouched, hidden, original)
            self.store.save(key, results, {"notes": self.coder.fresh_notes()})
        scales = self._advance(k, block, hidden)
        if untouched is not None and original is not None:
            for b in range(len(original)):
                original[b] = self.model.run(k, untouched, original[b])
        self.model.release(k)
        return scales

    def _restore(self, k: int, key: str) -> None:
        parameters = self.model.parameters_of(k)
        found = self.store.results(key)
        self.coder.note_again((self.store.facts(key) or {}).get("extra", {}).get("notes", {}))
        for name, parameter in parameters.items():
            for place in self.model.places[name]:
                result = found.get(place.tensor)
                if result is None:
                    continue
                values = result.values.floats() if result.values else self.coder.decode(result)
                place.of(parameter).copy_(torch.from_numpy(values))
                if result.encoded is not None:
                    self.coder.skip(result.info, result.encoded.nbytes)
                    self._tell(place.tensor)

    def _code(
        self, k: int, block: nn.Module, untouched: nn.Module | None, hidden: Activations, original: Activations | None
    ) -> list[Result]:
        parameters = self.model.parameters_of(k)
        results: list[Result] = []
        for stage in stages(lambda: self.model.run(k, block, hidden[0]), parameters):
            groups = [g for g in stage.groups if any(self._owned(site) for site in g.sites)]
            if not groups:
                continue
            means = self._statistics(k, block, stage, hidden, untouched, original)
            jobs: list[Job] = []
            for group in groups:
                scaled, statistics = self._scaled(k, block, group, means[group.sites[0]], hidden)
                results += scaled
                for site in group.sites:
                    for place in members(self.model, site):
                        weight = place.of(parameters[site.parameter])
                        if self.coder.owner(place.tensor) is not None:
                            jobs.append(Job(place.tensor, weight, statistics, bool(scaled)))
                        elif scaled:
                            tensor = self._tensor(place.tensor, weight)
                            results.append(Result(tensor.info, None, tensor.sha256(), values=tensor, rewritten=True))
            results += self._put_back(jobs)
        return results

    def _owned(self, site: Site) -> bool:
        return any(self.coder.owner(place.tensor) for place in members(self.model, site))

    def _statistics(
        self,
        k: int,
        block: nn.Module,
        stage: Stage,
        hidden: Activations,
        untouched: nn.Module | None,
        original: Activations | None,
    ) -> Means:
        """Run all batches up to the end of a stage. Returns statistics for the first site of each group."""
        seen = {group.sites[0]: Covariance() for group in stage.groups}
        before: dict[Site, torch.Tensor] = {}

        def note(site: Site, x: torch.Tensor, _: torch.Tensor) -> None:
            if site in seen:
                seen[site].add(x, before.get(site))
            if site == stage.last:
                raise Enough

        def note_original(site: Site, x: torch.Tensor, _: torch.Tensor) -> None:
            if site in seen:
                before[site] = x
            if site == stage.last:
                raise Enough

        for b in range(len(hidden)):
            if untouched is not None and original is not None:
                self._watched(k, untouched, original[b], note_original)
            self._watched(k, block, hidden[b], note)
        return {site: covariance.statistics() for site, covariance in seen.items()}

    def _watched(self, k: int, block: nn.Module, state: torch.Tensor, note: Any) -> None:
        root = self.model.paths[k]
        parameters = {f"{root}.{name}": p for name, p in block.named_parameters()}
        with contextlib.suppress(Enough), Watch(parameters, note):
            self.model.run(k, block, state)

    def _scaled(
        self, k: int, block: nn.Module, group: Group, statistics: Statistics, hidden: Activations
    ) -> tuple[list[Result], Statistics]:
        """Scale the inputs of products that share them, where a method wants that: the norm that took up the scale."""
        names = [place.tensor for site in group.sites for place in members(self.model, site)]
        method = next((m for name in names if (m := self.coder.method(name))), None)
        experts = any(site.expert is not None for site in group.sites)
        if method is None or not method.prescales() or statistics.hessian is None or experts:
            return [], statistics
        parameters = self.model.parameters_of(k)
        weights = {site.parameter: parameters[site.parameter] for site in group.sites}
        run = partial(self.model.run, k, block, hidden[0])
        norm = norm_before(self.model, k, weights, run)  # without one, a search for scales would be for nothing
        scale = method.prescale([w.cpu().numpy() for w in weights.values()], statistics) if norm else None
        results = fold(self.model, norm, weights, scale, run) if scale is not None else []
        if not norm or (scale is not None and not results):
            self.coder.note("could not be scaled: no norm before them takes the scale", names[0])
        return (results, statistics.scaled(scale)) if results and scale is not None else ([], statistics)

    def _put_back(self, jobs: list[Job]) -> list[Result]:
        """Code weights that do not depend on one another, side by side, and let the block compute with the results."""
        tasks = [
            Task(job.name, partial(self._tensor, job.name, job.weight if job.scaled else None), job.statistics)
            for job in jobs
        ]
        found = []
        for job, result in zip(jobs, self.coder.code(tasks), strict=True):
            self._tell(job.name)
            if result is not None:
                job.weight.copy_(torch.from_numpy(self.coder.decode(result)))
                found.append(replace(result, rewritten=result.rewritten or job.scaled))
        return found

    def _tensor(self, name: str, weight: torch.Tensor | None) -> TensorData:
        """A tensor as the source has it, or with the values that it has by now."""
        if weight is None:
            return self.model.source.read(name)
        return TensorData.of_floats(self.model.source.tensors()[name], weight.cpu().numpy())

    def _advance(self, k: int, block: nn.Module, hidden: Activations) -> dict[str, dict[str, float]]:
        """Run a coded block on all batches; the largest key and value on the way give the scales of its cache."""
        largest = [0.0, 0.0]

        def note(key: torch.Tensor, value: torch.Tensor) -> None:
            largest[0] = max(largest[0], float(key.abs().max()))
            largest[1] = max(largest[1], float(value.abs().max()))

        watch = Watch({}, lambda *_: None, note) if self._cache != "off" else contextlib.nullcontext()
        with watch:
            for b in range(len(hidden)):
                hidden[b] = self.model.run(k, block, hidden[b])
        if not any(largest):
            return {}
        key, value = (x / _LARGEST[self._cache] for x in largest)
        return {str(k): {"k": key, "v": value}}

    def _head(self, hidden: Activations) -> None:
        """Code the output head, where a method that calibrates wants it."""
        site = Site(self.model.head or "")
        places = [p for p in members(self.model, site) if self.coder.owner(p.tensor)]
        if not places:
            return
        if self.store.intact("head"):
            self._tell(places[0].tensor)
            return
        covariance = Covariance()

        def note(_: Site, x: torch.Tensor, __: torch.Tensor) -> None:
            covariance.add(x)
            raise Enough

        with self.model.tail() as tail:
            parameters = dict(self.model.model.named_parameters(remove_duplicate=False))
            for b, ids in enumerate(self._ids):
                with contextlib.suppress(Enough), Watch({site.parameter: parameters[site.parameter]}, note):
                    tail(ids, hidden[b])
        tasks = [Task(p.tensor, partial(self._tensor, p.tensor, None), covariance.statistics()) for p in places]
        coded = self.coder.code(tasks)
        self._tell(places[0].tensor)
        self.store.save("head", [r for r in coded if r])

    def _table(self) -> None:
        """Code an input embedding that bits were allocated to and that is not the output head as well."""
        name = self.model.entrance
        tied = any(place.tensor == name for place in self.model.places.get(self.model.head or "", []))
        if name not in self.coder.bits or tied:
            return
        if not self.store.intact("entrance"):
            task = Task(name, partial(self._tensor, name, None), Statistics(), table=True)
            self.store.save("entrance", [r for r in self.coder.code([task]) if r])
        self._tell(name)

    def _tell(self, name: str) -> None:
        self._done += 1
        self.progress(Progress("calibrate", self._done, self._total, "layers", name))
