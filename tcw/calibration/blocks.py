"""A language model of which one transformer block is in memory at a time.

The model is made on torch's meta device, where it takes no memory. What lies outside the blocks (norms, rotary tables)
is filled once; a block is filled from the source when it is needed and emptied after. To find out what a block is
called with, the whole model runs once with blocks that only write down their arguments and pass the hidden state on.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from torch.overrides import TorchFunctionMode

from tcw.errors import SourceError, TcwError
from tcw.source import Source
from tcw.sources.skeleton import Skeleton

_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_SECOND_HALF = ("up_proj", "w3")  # of an expert's fused gate and up


class CannotCalibrate(TcwError):
    """The model is built in a way that the walk over its blocks does not know."""


@dataclass(frozen=True)
class Place:
    """Where a tensor of the source lies in a parameter: all of it, or the rows of one expert."""

    tensor: str
    expert: int | None = None
    first: int | None = None
    end: int | None = None

    def of(self, parameter: torch.Tensor) -> torch.Tensor:
        """The view of `parameter` that this tensor is."""
        return parameter if self.expert is None else parameter[self.expert][self.first : self.end]


@dataclass(frozen=True)
class Call:
    """What a block is called with besides the hidden state, the same for every batch."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class BlockModel:
    """The model of a source, empty but for what lies outside its blocks. Computes in float32.

    Attributes:
        paths: names of the blocks, in order.
        places: parameter name -> the tensors of the source that it is made of.
        head: parameter name of the output head, None when the model has none.
    """

    def __init__(self, source: Source, device: str = "cpu") -> None:
        """Make the empty model. Raises CannotCalibrate, and SourceError for what transformers cannot make."""
        self.source, self.device = source, torch.device(device)
        self.model = _empty_model(source)
        self._modules = dict(self.model.named_modules())
        self.paths = _block_paths(self.model)
        self.places = _places(source, self.model)
        output, entrance = self.model.get_output_embeddings(), self.model.get_input_embeddings()
        self.head = _name_of(self.model, output) if isinstance(output, nn.Linear) else None
        self._entrance = _name_of(self.model, entrance)
        self._calls: list[Call] = []
        self._returns_tuple = False
        inside = tuple(f"{path}." for path in self.paths)
        large = {self.head, self._entrance}
        for path, module in self._modules.items():
            if not f"{path}.".startswith(inside):
                self._fill(path, module, skip=large)

    def block(self, k: int) -> nn.Module:
        """Fill block `k` from the source and return it; `release` empties it again."""
        root = self.paths[k]
        for path, module in self._modules.items():
            if path == root or path.startswith(f"{root}."):
                self._fill(path, module)
        return self._modules[root]

    def release(self, k: int) -> None:
        """Empty block `k`."""
        self._modules[self.paths[k]].to(device="meta")

    def parameters_of(self, k: int) -> dict[str, nn.Parameter]:
        """Parameters of block `k`, by their names in the model."""
        root = self.paths[k]
        return {f"{root}.{name}": p for name, p in self._modules[root].named_parameters()}

    def enter(self, ids: torch.Tensor) -> Iterator[torch.Tensor]:
        """Give the hidden state before the first block, float32 [batch, length, hidden], for each batch of `ids`.

        `ids` is int64 [batches, batch, length]. What blocks are called with is noted on the way.
        """
        for k, batch in enumerate(ids):
            calls: list[Call] = []
            entered = self._outer(batch, calls)
            if k == 0:
                self._calls = calls
            elif not _same(calls, self._calls):
                raise CannotCalibrate(
                    f"the blocks of `{self.source.id}` get more than a hidden state that depends on the tokens"
                )
            yield entered

    def run(self, k: int, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """Run a filled block `k` on a hidden state."""
        call = self._calls[k]
        out = block(hidden, *call.args, **call.kwargs)
        return out[0] if isinstance(out, tuple) else out

    @contextmanager
    def tail(self) -> Iterator[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]:
        """Fill the output head and give a function (ids, hidden state after the last block) -> the model's output."""
        owner = self.head.rpartition(".")[0] if self.head else ""
        if owner:
            self._fill(owner, self._modules[owner])
        try:
            yield lambda ids, hidden: self._outer(ids, None, hidden)
        finally:
            if owner:
                self._modules[owner].to(device="meta")

    def _outer(self, ids: torch.Tensor, calls: list[Call] | None, last: torch.Tensor | None = None) -> torch.Tensor:
        """Run all but the blocks; returns what the first block gets, or (with `last`) what the model puts out."""
        entered: list[torch.Tensor] = []

        def stand_in(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if not entered:
                entered.append(hidden if last is None else last)
            if calls is not None:
                calls.append(Call(args, kwargs))
            return (entered[0],) if self._returns_tuple else entered[0]

        blocks = [self._modules[path] for path in self.paths]
        for block in blocks:
            block.forward = stand_in
        try:
            with _Rows(self):
                out = self.model(input_ids=ids.to(self.device), **_no_cache(self.model))
        except torch.OutOfMemoryError:
            raise
        except (AttributeError, TypeError, IndexError, RuntimeError, ValueError) as error:
            return self._again(error, ids, calls, last)
        finally:
            for block in blocks:
                block.__dict__.pop("forward", None)  # gone already after a second try
        if len(entered) != 1 or (calls is not None and len(calls) != len(blocks)):
            raise CannotCalibrate(f"`{self.source.id}` does not run its blocks one after another")
        if last is None:
            return entered[0].detach().float()
        return out.logits if hasattr(out, "logits") else out[0]

    def _again(
        self, error: Exception, ids: torch.Tensor, calls: list[Call] | None, last: torch.Tensor | None
    ) -> torch.Tensor:
        """Try with blocks that hand on tuples, as those of older models do."""
        if self._returns_tuple:
            why = (str(error).splitlines() or [type(error).__name__])[0]
            raise CannotCalibrate(f"`{self.source.id}` does not run on text alone: {why}") from None
        self._returns_tuple = True
        if calls is not None:
            calls.clear()
        return self._outer(ids, calls, last)

    def _fill(self, path: str, module: nn.Module, skip: Any = ()) -> None:
        """Give a module's own parameters and buffers memory and values."""
        if module._buffers:
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = torch.empty_like(buffer, device=self.device)
            self.model._init_weights(module)
        for name, parameter in module._parameters.items():
            full = f"{path}.{name}" if path else name
            if parameter is not None and full not in skip:
                value = self._value(full, parameter.shape)
                module._parameters[name] = nn.Parameter(value, requires_grad=False)
        for name in module._buffers:
            full = f"{path}.{name}" if path else name
            if full in self.source.tensors():
                module._buffers[name] = self._read(full).to(self.device)

    def _value(self, name: str, shape: torch.Size) -> torch.Tensor:
        places = self.places.get(name, [])
        if len(places) == 1 and places[0].expert is None:
            value = self._read(places[0].tensor)
            if value.shape != shape:
                raise CannotCalibrate(f"`{places[0].tensor}` is {list(value.shape)}, the model wants {list(shape)}")
            return value.to(self.device)
        value = torch.empty(shape, device=self.device)
        filled = 0
        for place in places:
            part, where = self._read(place.tensor), place.of(value)
            if part.shape != where.shape:
                raise CannotCalibrate(f"`{place.tensor}` is {list(part.shape)}, the model wants {list(where.shape)}")
            where.copy_(part)
            filled += part.numel()
        if filled != value.numel():
            raise SourceError(f"`{self.source.id}` has no tensor for `{name}`", "the model is incomplete")
        return value

    def _read(self, name: str) -> torch.Tensor:
        return torch.from_numpy(self.source.read(name).floats())

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows of the input embedding, float32 [*ids, hidden]; the embedding itself is in memory only meanwhile."""
        data = self.source.read(self.places[self._entrance][0].tensor)
        wanted, where = torch.unique(ids, return_inverse=True)
        words = data.words.reshape(data.info.shape)[wanted.cpu().numpy()]
        few = type(data)(type(data.info)(data.info.name, data.info.dtype, words.shape), words.reshape(-1).view("uint8"))
        return torch.from_numpy(few.floats()).to(self.device)[where]

    @property
    def entrance(self) -> str:
        """The source's tensor that is the input embedding; empty when there is none."""
        places = self.places.get(self._entrance, [])
        return places[0].tensor if places else ""

    def is_entrance(self, weight: Any) -> bool:
        """Say whether a parameter is the input embedding."""
        return weight is self.model.get_input_embeddings().weight


class _Rows(TorchFunctionMode):  # type: ignore[misc]
    """Looks tokens up in the source instead of in the empty embedding."""

    def __init__(self, owner: BlockModel) -> None:
        super().__init__()
        self._owner = owner

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is nn.functional.embedding and self._owner.is_entrance(args[1] if len(args) > 1 else kwargs["weight"]):
            return self._owner.rows(args[0] if args else kwargs["input"])
        return func(*args, **kwargs)


def _empty_model(source: Source) -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        table = {k: v for k, v in source.config.items() if k not in ("quantization_config", "auto_map")}
        config = CONFIG_MAPPING[table["model_type"]].from_dict(table)
        named = (getattr(transformers, name, None) for name in config.architectures or [])
        cls: Any = next((c for c in named if isinstance(c, type)), transformers.AutoModelForCausalLM)
        make = cls._from_config if hasattr(cls, "_from_config") else cls.from_config
        with torch.device("meta"):
            model = make(config, dtype=torch.float32)
        if hasattr(model, "set_experts_implementation") and model._can_set_experts_implementation():
            model.set_experts_implementation("eager")  # one matrix product an expert, which can be watched
        model.tie_weights()
        return model.eval()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise SourceError(f"transformers cannot make the model of `{source.id}` from its config: {line}") from None


def _block_paths(model: nn.Module) -> list[str]:
    """The elements of the largest outermost module list."""
    lists = [(path, m) for path, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    outer = [(p, m) for p, m in lists if not any(p.startswith(f"{q}.") for q, _ in lists)]
    if not outer:
        raise CannotCalibrate("the model has no list of blocks")
    path, blocks = max(outer, key=lambda item: sum(p.numel() for p in item[1].parameters()))
    return [f"{path}.{k}" for k in range(len(blocks))]


def _places(source: Source, model: Any) -> dict[str, list[Place]]:
    """Which tensors of the source each parameter is made of."""
    skeleton = Skeleton(model)
    places: dict[str, list[Place]] = {}
    for name, info in source.tensors().items():
        found = skeleton.find(name)
        if found is None:
            continue
        expert, shape = _EXPERT.search(name), skeleton.shapes[found]
        if expert is None or len(shape) != len(info.shape) + 1:
            places.setdefault(found, []).append(Place(name))
            continue
        half = shape[1] // 2
        fused = info.shape and info.shape[0] * 2 == shape[1]
        second = any(f".{part}." in name for part in _SECOND_HALF)
        rows = ((half, None) if second else (None, half)) if fused else (None, None)
        places.setdefault(found, []).append(Place(name, int(expert[1]), *rows))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in parameters.items():  # tied parameters stand in the source under one of their names
        if name not in places:
            same = [n for n, p in parameters.items() if p is parameter and n in places]
            if same:
                places[name] = places[same[0]]
    return places


def _name_of(model: nn.Module, module: nn.Module | None) -> str:
    return next((f"{path}.weight" for path, m in model.named_modules() if m is module), "")


def _no_cache(model: Any) -> dict[str, Any]:
    return {"use_cache": False} if hasattr(model.config.get_text_config(), "use_cache") else {}


def _same(a: Any, b: Any) -> bool:
    """Say whether two nested arguments are equal, tensors by value."""
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, Call) and isinstance(b, Call):
        return _same(a.args, b.args) and _same(a.kwargs, b.kwargs)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return type(a) is type(b)
