"""What an error in each layer costs: the original model once forward and once back, a block at a time.

Let δ be the error of a layer's outputs y and g = ∂L/∂y, where L is the summed loss on tokens drawn from the model's
own predictions. Then ½ E[(g·δ)²] is the KL divergence between the original and the perturbed model, to second order
(g gᵀ is the Fisher information). Errors of different rows are taken as uncorrelated, so the damage of a layer is

    ½ Σ_r E[g_r²] E[δ_r²],    E[δ_r²] = (ΔW H ΔWᵀ)_rr,  in nats a token.

Forward, every block gives the Hessians of its layers, and the method says how large ΔW H ΔWᵀ is at some sizes
(`probe`). Back, every block is run again from its stored input, with the gradient of what came after it. A model that
puts out no logits (an encoder) is taken for the mean of a Gaussian with unit variance: then g is of a random direction.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from tcw.calibration.activations import Activations
from tcw.calibration.blocks import BlockModel, Place
from tcw.calibration.watch import Covariance, Site, Watch, stages
from tcw.events import Progress, Report
from tcw.tensor import TensorData
from tcw.weights import Curve, Statistics, WeightMethod

_OUTPUTS = 1 << 23  # logits at a time: a vocabulary is wide, and positions do not depend on one another
MOST_SEQUENCES = 8  # a survey estimates sums over many rows: few tokens are enough
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"), ("query", "key", "value"))

Wants = Callable[[str], WeightMethod | None]  # tensor -> the method that allocates its bits
Room = Callable[[int, torch.Tensor], list[Activations]]  # n stores for states like this one


@dataclass
class Survey:
    """Squared errors at some sizes, and squared gradients, for each tensor."""

    errors: dict[str, dict[float, np.ndarray]] = field(default_factory=dict)
    gradients: dict[str, np.ndarray] = field(default_factory=dict)
    numel: dict[str, int] = field(default_factory=dict)

    def curves(self) -> list[Curve]:
        """Damage at each size, in nats a token. A tensor that no gradient reached counts as the least that was seen."""
        least = min((float(g.mean()) for g in self.gradients.values() if g.any()), default=1.0)
        made = []
        for name, options in self.errors.items():
            g = self.gradients.get(name)
            weight = g if g is not None and g.any() else least
            damage = {bits: 0.5 * float((error * weight).sum()) for bits, error in options.items()}
            made.append(Curve(name, self.numel[name], damage, group_of(name)))
        return made


def group_of(name: str) -> str:
    """Tensors that engines run as one matrix share a group: q, k, v; gate, up; all experts of a layer alike."""
    head, _, leaf = name.removesuffix(".weight").rpartition(".")
    for k, fused in enumerate(_FUSED):
        if leaf in fused:
            leaf = f"fused{k}"
    parts = ["*" if p.isdigit() and ".experts" in head[: head.find(p)] else p for p in head.split(".")]
    return ".".join([*parts, leaf])


def survey(model: BlockModel, ids: torch.Tensor, wants: Wants, room: Room, progress: Report) -> Survey:
    """Walk forward and back over int64 ids [batches, batch, length]."""
    found = Survey()
    states: list[Activations] = []
    total = 2 * len(model.paths) + 1
    with torch.no_grad():
        for b, hidden in enumerate(model.enter(ids)):
            states = states or room(len(model.paths) + 1, hidden)
            states[0][b] = hidden
    for k in range(len(model.paths)):
        _forward(model, k, ids, states, wants, found)
        progress(Progress("survey", k + 1, total, "layers", model.paths[k]))
    gradients = states[-1]  # the state after the last block is not needed once its gradient is known
    _tail(model, ids, gradients, wants, found)
    progress(Progress("survey", len(model.paths) + 1, total, "layers", "the output head"))
    for k in reversed(range(len(model.paths))):
        _back(model, k, states[k], gradients, wants, found, ids.numel())
        states[k].close()
        progress(Progress("survey", total - k, total, "layers", model.paths[k]))
    _entrance(model, ids, gradients, wants, found)
    gradients.close()
    return found


def members(model: BlockModel, site: Site) -> list[Place]:
    """The tensors of the source that a product's weight is made of."""
    return [p for p in model.places.get(site.parameter, []) if p.expert == site.expert]


@torch.no_grad()
def _forward(
    model: BlockModel, k: int, ids: torch.Tensor, states: list[Activations], wants: Wants, found: Survey
) -> None:
    block, parameters = model.block(k), model.parameters_of(k)
    found_stages = stages(lambda: model.run(k, block, states[k][0]), parameters)
    groups = [[s for s in g.sites if _wanted(model, s, wants)] for stage in found_stages for g in stage.groups]
    sums = {sites[0]: Covariance() for sites in groups if sites}  # products of a group share their input

    def note(site: Site, x: torch.Tensor, _: torch.Tensor) -> None:
        if site in sums:
            sums[site].add(x)

    with Watch(parameters, note):
        for b in range(len(ids)):
            states[k + 1][b] = model.run(k, block, states[k][b])
    for sites in filter(None, groups):
        for site in sites:
            _probe(model, site, sums[sites[0]], wants, found)
    model.release(k)


def _wanted(model: BlockModel, site: Site, wants: Wants) -> bool:
    return any(wants(place.tensor) for place in members(model, site))


def _probe(model: BlockModel, site: Site, covariance: Covariance, wants: Wants, found: Survey) -> None:
    statistics = covariance.statistics()
    for place in members(model, site):
        method = wants(place.tensor)
        if method is not None:
            tensor: TensorData = model.source.read(place.tensor)
            found.errors[place.tensor] = method.probe(tensor, statistics)
            found.numel[place.tensor] = tensor.info.numel


def _tail(model: BlockModel, ids: torch.Tensor, states: Activations, wants: Wants, found: Survey) -> None:
    """Replace the state after the last block by the gradient of the loss; probe the output head on the way."""
    covariance, squares = Covariance(), _Squares()
    generator = torch.Generator().manual_seed(0)
    with model.tail() as tail:
        site = Site(model.head or "")
        head = dict(model.model.named_parameters(remove_duplicate=False)).get(site.parameter)
        watched = {site.parameter: head} if head is not None else {}

        def note(at: Site, x: torch.Tensor, y: torch.Tensor) -> None:
            covariance.add(x)
            squares.follow(at, y)

        step = max(1, _OUTPUTS // max(1, head.shape[0] if head is not None else ids.shape[1]))
        for b, batch in enumerate(ids):
            gradient = torch.empty_like(states[b])
            for one, of_one, state in zip(batch, gradient, states[b], strict=True):
                for part in (slice(first, first + step) for first in range(0, len(one), step)):
                    hidden = state[part][None].requires_grad_()
                    with Watch(watched, note):
                        out = tail(one[part][None], hidden)
                    loss = _loss(out.float(), is_logits=model.head is not None, generator=generator)
                    of_one[part] = torch.autograd.grad(loss, hidden)[0][0]
            states[b] = gradient
        if site in squares.sums:
            _probe(model, site, covariance, wants, found)
            squares.keep(model, site, found, ids.numel())


def _loss(out: torch.Tensor, *, is_logits: bool, generator: torch.Generator) -> torch.Tensor:
    """A scalar whose gradient has the Fisher information of the output as its mean square."""
    flat = out.flatten(0, -2)
    if not is_logits:
        return (flat * torch.randn(flat.shape, generator=generator).to(flat.device)).sum()
    drawn = torch.multinomial(flat.detach().softmax(-1).cpu(), 1, generator=generator)[:, 0]
    return torch.nn.functional.cross_entropy(flat, drawn.to(flat.device), reduction="sum")


def _back(
    model: BlockModel, k: int, states: Activations, gradients: Activations, wants: Wants, found: Survey, tokens: int
) -> None:
    block, squares = model.block(k), _Squares()

    def note(site: Site, _: torch.Tensor, y: torch.Tensor) -> None:
        if _wanted(model, site, wants):
            squares.follow(site, y)

    for b in range(len(states)):
        hidden = states[b].requires_grad_()
        with Watch(model.parameters_of(k), note):
            out = model.run(k, block, hidden)
        gradients[b] = torch.autograd.grad(out, hidden, gradients[b])[0]
    for site in squares.sums:
        squares.keep(model, site, found, tokens)
    model.release(k)


def _entrance(model: BlockModel, ids: torch.Tensor, gradients: Activations, wants: Wants, found: Survey) -> None:
    """Probe an input embedding that is not the output head as well: a layer whose inputs are tokens, one at a time.

    Rows count by how often their token occurs, half by this text and half evenly: most tokens do not occur in it.
    """
    name = model.entrance
    method = wants(name) if name and name not in found.errors else None
    if method is None:
        return
    tensor = model.source.read(name)
    square = sum(float(gradients[b].double().square().sum()) for b in range(len(gradients)))
    share = np.bincount(ids.flatten().numpy(), minlength=tensor.info.shape[0]) / ids.numel()
    share = 0.5 * share + 0.5 / tensor.info.shape[0]
    found.errors[name] = method.probe(tensor, Statistics())
    found.numel[name] = tensor.info.numel
    found.gradients[name] = share * square / (ids.numel() * tensor.info.shape[1])


class _Squares:
    """Sums of squared gradients of each product's outputs."""

    def __init__(self) -> None:
        self.sums: dict[Site, Any] = {}

    def follow(self, site: Site, y: torch.Tensor) -> None:
        """Add the gradient of `y` when it comes."""
        if y.requires_grad:
            y.register_hook(lambda gradient: self._add(site, gradient))

    def _add(self, site: Site, gradient: torch.Tensor) -> None:
        squares = gradient.detach().reshape(-1, gradient.shape[-1]).float().square().sum(0)
        self.sums[site] = self.sums[site] + squares if site in self.sums else squares

    def keep(self, model: BlockModel, site: Site, found: Survey, tokens: int) -> None:
        """Store the means a token with the tensors that the product's weight is made of."""
        if site not in self.sums:
            return
        mean = (self.sums[site] / tokens).double().cpu().numpy()
        for place in members(model, site):
            found.gradients[place.tensor] = mean[place.first : place.end]
