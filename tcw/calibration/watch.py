"""See every matrix product of a block while it runs, whoever does it: a Linear module, or a fused stack of experts."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from tcw.weights import Statistics

OnLinear = Callable[["Site", torch.Tensor, torch.Tensor], None]
_MATMUL = (torch.Tensor.matmul, torch.Tensor.__matmul__)  # Falcon writes x @ W.T
OnAttention = Callable[[torch.Tensor, torch.Tensor], None]


@dataclass(frozen=True)
class Site:
    """One matrix product: the parameter, and which of its experts."""

    parameter: str
    expert: int | None = None


@dataclass
class Group:
    """Sites that get one and the same input."""

    sites: list[Site] = field(default_factory=list)


@dataclass
class Stage:
    """Groups whose inputs are known before any of their outputs is used; `last` is the last site that runs."""

    groups: list[Group] = field(default_factory=list)
    last: Site | None = None  # None: the whole block has to run


class Enough(Exception):
    """Everything that was wanted has been seen."""


class Watch(TorchFunctionMode):  # type: ignore[misc]
    """While active, calls `on_linear(site, input, output)` for every product with one of `parameters`."""

    def __init__(
        self, parameters: dict[str, nn.Parameter], on_linear: OnLinear, on_attention: OnAttention | None = None
    ) -> None:
        super().__init__()
        self._on_linear, self._on_attention = on_linear, on_attention
        self._sites: dict[tuple[int, torch.Size], Site] = {}
        for name, parameter in parameters.items():
            if parameter.dim() == 2:
                self._sites[parameter.data_ptr(), parameter.shape] = Site(name)
            elif parameter.dim() == 3:
                for k, expert in enumerate(parameter):
                    self._sites[expert.data_ptr(), expert.shape] = Site(name, k)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func is nn.functional.linear or func in _MATMUL:
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            weight = weight if func is nn.functional.linear else weight.mT
            site = self._sites.get((weight.data_ptr(), weight.shape))
            if site is not None:
                self._on_linear(site, args[0] if args else kwargs["input"], out)
        elif func is nn.functional.scaled_dot_product_attention and self._on_attention is not None:
            self._on_attention(args[1], args[2])
        return out


def stages(run: Callable[[], Any], parameters: dict[str, nn.Parameter]) -> list[Stage]:
    """Run a block once and divide its products into stages, in the order in which they first run.

    Products with the same input make a group. A dense group is a stage; all experts of one parameter are one stage,
    since which of them run is another for each batch.
    """
    found: list[Stage] = []
    seen: dict[Site, torch.Tensor] = {}  # keeps the inputs, so that none takes another's place in memory
    by_input: dict[tuple[int, torch.Size], Stage] = {}
    of_experts: dict[str, Stage] = {}

    def note(site: Site, x: torch.Tensor, _: torch.Tensor) -> None:
        if site in seen:
            return
        seen[site] = x
        if site.expert is not None:
            if site.parameter not in of_experts:
                of_experts[site.parameter] = Stage([Group([Site(site.parameter, k)]) for k in _experts(site)])
                found.append(of_experts[site.parameter])
            return
        key = (x.data_ptr(), x.shape)
        if key not in by_input:
            by_input[key] = Stage([Group()])
            found.append(by_input[key])
        by_input[key].groups[0].sites.append(site)
        by_input[key].last = site

    def _experts(site: Site) -> range:
        return range(parameters[site.parameter].shape[0])

    with Watch(parameters, note):
        run()
    return found


class Covariance:
    """Sums x xᵀ over tokens, (x₀ - x) xᵀ where x₀ is given, and the largest |x|; float32, where the inputs are."""

    def __init__(self) -> None:
        self._sum: torch.Tensor | None = None
        self._drift: torch.Tensor | None = None
        self._found: Statistics | None = None
        self._tokens = 0
        self._largest = 0.0

    def add(self, x: torch.Tensor, original: torch.Tensor | None = None) -> None:
        """Take inputs [..., in], and those of the original model for the same tokens, if they are known."""
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        if not len(rows):
            return
        if self._sum is None:
            self._sum = torch.zeros(rows.shape[1], rows.shape[1], device=rows.device)
        self._sum.addmm_(rows.T, rows)
        if original is not None and original.shape == x.shape:
            if self._drift is None:
                self._drift = torch.zeros_like(self._sum)
            self._drift.addmm_((original.detach().reshape(rows.shape).float() - rows).T, rows)
        self._tokens += len(rows)
        self._largest = max(self._largest, float(rows.abs().max()))

    def statistics(self) -> Statistics:
        """What was seen, as means over tokens. After that nothing can be added."""
        if self._found is None:
            sums = [None if s is None else s.div_(self._tokens).cpu().numpy() for s in (self._sum, self._drift)]
            self._found = Statistics(sums[0], self._tokens, drift=sums[1], input_max=self._largest)
        return self._found
