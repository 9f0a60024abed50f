"""A policy: methods put together for a model, with what they measured on it."""

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tcw.errors import UsageError
from tcw.kv import Group, KVMethod, LayerShape
from tcw.kv.attention import decoder_of, install
from tcw.kv.cache import PolicyCache
from tcw.kv.groups import GroupParts, HeadGroup
from tcw.kv.layer import PolicyLayer
from tcw.kv.plan import Plan, plan
from tcw.kv.shapes import shapes_of
from tcw.kv.stores import DenseStore, Store
from tcw.kv.streaming_llm import Recency

if TYPE_CHECKING:
    from tcw.artifact import Artifact

Tensors = dict[str, dict[str, Tensor]]  # by method, by name


@dataclass(frozen=True)
class Policy:
    """What the layers of one model keep of their keys and values.

    Attributes:
        methods: in the user's order, by name.
        layers: the model's full-attention layers; all others stay as they are.
        tensors: what calibration measured, for each method that calibrates.
    """

    methods: dict[str, KVMethod]
    layers: tuple[LayerShape, ...]
    tensors: Tensors = field(default_factory=dict)
    _moved: dict[tuple[str, torch.device], dict[str, Tensor]] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        _check(self.methods, self.layers)

    @classmethod
    def make(
        cls,
        specs: "str | Iterable[str | KVMethod]",
        model: Any,
        tokens: Tensor | None = None,
        seed: int = 0,
        tokenizer: Any = None,
    ) -> "Policy":
        """Put a policy together for a loaded model, and calibrate it where a method needs that.

        Args:
            specs: SPEC strings (`snapkv:ratio=0.25`) or methods.
            model: a causal language model of transformers.
            tokens: int64 [sequences, length], the text to calibrate on; a method that needs none ignores it.
            seed: for what methods draw.
            tokenizer: the model's, for methods that ask it something in words.

        Raises:
            UsageError: methods that do not go together, or a model they cannot serve; no text where one is needed.
        """
        from tcw.kv.calibrate import calibrated

        policy = cls(named(specs), shapes_of(model))
        return calibrated(policy, model, tokens, seed, tokenizer)

    @classmethod
    def of_artifact(cls, artifact: "Artifact", model: Any) -> "Policy | None":
        """The KV policy that an artifact stores, for the model loaded from it (tcw/kv/stored.py)."""
        from tcw.kv.stored import of_artifact

        return of_artifact(artifact, model)

    def everything(self) -> "Policy":
        """The same engine for the same model, forgetting nothing and rounding nothing: to test the engine by."""
        return Policy({"everything": _Everything()}, self.layers)

    def new_cache(self, model: Any, *, track: bool = False) -> PolicyCache:
        """Make an empty cache for `generate(past_key_values=...)` or a forward pass; use each for one text.

        Args:
            model: the model that the policy was made for; its attention function becomes ours, which changes nothing
                for other caches.
            track: remember the position of every token, for `PolicyCache.kept`.

        Raises UsageError: a policy of another model, or one whose calibration is missing.
        """
        if tuple(_facts(layer) for layer in shapes_of(model)) != tuple(_facts(layer) for layer in self.layers):
            raise UsageError("this KV policy was made for another model", "make it again: `Policy.make(specs, model)`")
        if missing := [n for n, m in self.methods.items() if m.needs_calibration and n not in self.tensors]:
            raise UsageError(f"`{missing[0]}` is not calibrated", "make the policy with `Policy.make(specs, model)`")
        install(model)
        return PolicyCache(model.config, {s.index: self.new_layer(s, track) for s in self.layers})

    def new_layer(self, layer: LayerShape, track: bool = False) -> PolicyLayer:
        """One layer of a cache, empty."""
        return PolicyLayer(layer, lambda device: [HeadGroup(p) for p in self._parts(layer, device, track)])

    def groups(self, layer: LayerShape) -> tuple[Group, ...]:
        """How the heads of a layer are divided: by the method that limits tokens; else they are all together."""
        name, method = self._allocator()
        found = method.groups(layer, self.tensors.get(name, {})) if method else None
        return found or (Group(tuple(range(layer.kv_heads))),)

    def _allocator(self) -> tuple[str, KVMethod | None]:
        return next(((n, m) for n, m in self.methods.items() if _allocates(m)), ("", None))

    def _on(self, name: str, device: torch.device) -> dict[str, Tensor]:
        """What a method measured, on a device: moved there once for all layers and caches."""
        if (name, device) not in self._moved:
            self._moved[name, device] = {key: tensor.to(device) for key, tensor in self.tensors.get(name, {}).items()}
        return self._moved[name, device]

    def _parts(self, layer: LayerShape, device: torch.device, track: bool) -> list[GroupParts]:
        groups = self.groups(layer)
        methods = list(self.methods.values())
        rope = layer.rope.to(device) if layer.rope else None
        here = replace(layer, rope=rope)
        _, allocator = self._allocator()
        return [
            GroupParts(
                group,
                *_indices(layer, group, device, len(groups)),
                scorer=self._scorer(here, group, device),
                new_store=self._store(here, group, device),
                counts=allocator or methods[0],
                sinks=max(m.sinks for m in methods),
                window=max(m.window for m in methods),
                interval=max(m.interval for m in methods),
                turns=rope if any(m.reindexes for m in methods) else None,
                track=track,
            )
            for group in groups
        ]

    def _scorer(self, layer: LayerShape, group: Group, device: torch.device) -> Any:
        """The scorer of the method that limits tokens, else of the first that has one, else recency."""
        first, _ = self._allocator()
        for name in sorted(self.methods, key=lambda name: name != first):
            scorer = self.methods[name].scorer(layer, group, self._on(name, device))
            if scorer is not None:
                return scorer
        return Recency()

    def _store(self, layer: LayerShape, group: Group, device: torch.device) -> Callable[[], Store]:
        """Formats first, then what wraps them."""
        make: Callable[[], Store] = DenseStore
        for name, method in sorted(self.methods.items(), key=lambda item: item[1].wraps):
            make = method.store(layer, group, self._on(name, device), make) or make
        return make

    def outlined(self) -> "Policy":
        """The policy with tensors that have only the shape of what calibration will find: enough for a plan."""
        blank = {n: m.outline(self.layers) for n, m in self.methods.items() if m.needs_calibration}
        return Policy(self.methods, self.layers, {**blank, **self.tensors})

    def plan(self, context: int, batch: int = 1, dtype: torch.dtype | None = None) -> Plan:
        """What a cache will hold of `context` tokens (tcw/kv/plan.py)."""
        return plan(self.outlined(), context, batch, dtype)

    def fingerprint(self, model: Any) -> str:
        """What ties calibrated tensors to a model: its layers, their RoPE, and its norms, as SHA-256."""
        facts = hashlib.sha256(json.dumps([_facts(layer) for layer in self.layers], sort_keys=True).encode())
        for name, parameter in decoder_of(model).named_parameters():
            if "norm" in name and parameter.dim() == 1:
                facts.update(parameter.detach().float().cpu().numpy().tobytes())
        return facts.hexdigest()


class _Everything(KVMethod):
    """Forgets nothing; the tokens still go through sinks, store and window."""

    sinks, window = 4, 32

    def options(self) -> dict[str, Any]:
        return {}


def named(specs: "str | Iterable[str | KVMethod]") -> dict[str, KVMethod]:
    """Methods by name, out of SPEC strings or methods. Raises UsageError for what is no KV policy, or comes twice."""
    from tcw.methods import canonical
    from tcw.recipe import parse_spec

    found: dict[str, KVMethod] = {}
    for spec in [specs] if isinstance(specs, str) else specs:
        if isinstance(spec, KVMethod):
            name, method = canonical(type(spec).__module__.rpartition(".")[2]), spec
        else:
            step = parse_spec(spec)
            name, method = step.method, step.build()  # type: ignore[assignment]
        if not isinstance(method, KVMethod):
            raise UsageError(f"`{name}` is not a KV policy", "`tcw methods` lists those of the family kv")
        if name in found:
            raise UsageError(f"`{name}` is given twice")
        found[name] = method
    return found


def _check(methods: dict[str, KVMethod], layers: tuple[LayerShape, ...]) -> None:
    """Refuse methods that do not go together and layers they cannot serve."""
    if not methods:
        raise UsageError("a KV policy needs a method", "`tcw methods` lists those of the family kv")
    for roles, what in ((_allocates, "how many tokens stay"), (_formats, "how tokens are stored")):
        both = [f"`{name}`" for name, method in methods.items() if roles(method)]
        if len(both) > 1:
            raise UsageError(f"{' and '.join(both[:2])} both decide {what}", "leave one out")
    for name, method in methods.items():
        if (method.needs_rope or method.reindexes) and any(layer.rope is None for layer in layers):
            raise UsageError(
                f"`{name}` rotates keys, and this model has no RoPE, or one that changes with the length of the text "
                "or with pictures in it",
                "use a policy that does not, such as `snapkv`, `knorm` or `kivi`",
            )
        method.check(layers)


def _overrides(method: KVMethod, name: str) -> bool:
    return getattr(type(method), name) is not getattr(KVMethod, name)


def _allocates(method: KVMethod) -> bool:
    return _overrides(method, "groups")


def _formats(method: KVMethod) -> bool:
    return _overrides(method, "store") and not method.wraps


def _indices(layer: LayerShape, group: Group, device: torch.device, groups: int) -> tuple[Tensor | None, Tensor | None]:
    """Query heads and key-value heads of a group; None for all."""
    if groups == 1:
        return None, None
    ratio = layer.heads // layer.kv_heads
    queries = [head * ratio + i for head in group.heads for i in range(ratio)]
    return torch.tensor(queries, device=device), torch.tensor(group.heads, device=device)


def _facts(layer: LayerShape) -> dict[str, Any]:
    """What must agree for a policy to serve a layer; the dtype may differ."""
    facts = {k: v for k, v in vars(layer).items() if k not in ("dtype", "rope")}
    return {**facts, "rope": layer.rope.facts() if layer.rope else None}
