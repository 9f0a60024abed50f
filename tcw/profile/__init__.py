"""What a model costs here, and what each method would save. Reads only.

scan      every tensor once: part, dtype, exponents, bytes under each method
kv        what a token of context costs, from the configuration
device    memory, and the measured speed of copying
fits      what of this fits at which context
latency   the model itself, loaded and timed
"""

from dataclasses import dataclass, field, replace
from typing import Any

from tcw import methods
from tcw.device import Device, copy_bandwidth, pick
from tcw.errors import UsageError
from tcw.events import Progress, Report, silent
from tcw.policies import is_policy
from tcw.profile.fits import Budget, Forward, forward
from tcw.profile.kv import KVCache, generates, kv_cache, read_config, text_config
from tcw.profile.latency import PROMPT_TOKENS, Latency, measure
from tcw.profile.parts import is_input_side, is_routed_expert, part_of
from tcw.profile.policies import Policies, TokenPolicies, default_specs, policies, token_policies
from tcw.profile.tensors import Scan, mean_entropy, scan
from tcw.recipe import Step, make_step, parse_spec
from tcw.source import Source
from tcw.tensor import DTYPE_BITS, FLOAT_DTYPES

DEFAULT_CONTEXT = 4096


@dataclass(frozen=True)
class Row:
    """What one method would make of the model; `budget` is the memory it needs, a function of the context."""

    name: str
    lossless: bool
    original_bytes: int
    weights: int
    budget: Budget

    @property
    def bytes(self) -> int:
        """Bytes of all tensors, those that the method keeps raw included."""
        return self.budget.weights

    def to_json(self, context: int, limit: int | None) -> dict[str, Any]:
        """The row under the keys of docs/cli.md, at `context` tokens; `limit` is what the model was made for."""
        return {
            "name": self.name,
            "bytes": self.bytes,
            "ratio": self.bytes / self.original_bytes if self.original_bytes else 1.0,
            "bits_per_weight": 8 * self.bytes / self.weights if self.weights else 0.0,
            "lossless": self.lossless,
            "fits": self.budget.fits(context),
            "needs_bytes": self.budget.need(context),
            "max_context": self.budget.max_context(limit),
        }


@dataclass(frozen=True)
class Profile:
    """What a model costs on a device. `rows` has the model as it is first, then a row for every method."""

    model: str
    architecture: str
    device: Device
    bandwidth_gbps: float
    scan: Scan
    kv: KVCache
    forward: Forward
    latency: Latency
    rows: tuple[Row, ...]
    context: int
    batch: int
    model_context: int | None
    tied_head: bool
    policies: Policies = field(default_factory=Policies)
    tokens: TokenPolicies = field(default_factory=TokenPolicies)

    def to_json(self) -> dict[str, Any]:
        """The profile under the keys of docs/cli.md and some more."""
        device = self.device
        exponents = self.scan.exponents()
        return {
            "model": self.model,
            "architecture": self.architecture,
            "device": {
                "name": device.name, "kind": device.kind, "memory_bytes": device.memory_bytes,
                "free_bytes": device.free_bytes, "cores": device.cores, "reason": device.reason,
                "bandwidth_gbps": self.bandwidth_gbps, "bandwidth_counts": "bytes read plus bytes written by a copy",
            },
            "weights": {
                "parameters": sum(look.info.numel for look in self.scan.looks),
                "bytes": self.rows[0].bytes,
                "by_dtype": self.scan.by_dtype(),
                "by_part": self.scan.by_part(),
                "exponent_entropy_bits": mean_entropy(self.scan.looks),
                "exponents": {"dtype": exponents[0], "counts": exponents[1].tolist()} if exponents else None,
                "tied_head": self.tied_head,
                "repeated_tensors": sum(look.same_as is not None for look in self.scan.looks),
                "sampled_tensors": sum(look.sampled for look in self.scan.looks),
            },
            "kv": {
                **self.kv.to_json(), "bytes": self.kv.bytes_at(self.context, self.batch),
                "policies": [row.to_json() for row in self.policies.rows],
                "policies_skipped": self.policies.skipped,
            },
            "tokens": self.tokens.to_json(),
            "activations": {"bytes": self.forward.bytes_at(self.context, self.batch)},
            "latency": self.latency.to_json(),
            "context": {"tokens": self.context, "batch": self.batch, "model_max": self.model_context},
            "original": self.rows[0].to_json(self.context, self.model_context),
            "methods": [row.to_json(self.context, self.model_context) for row in self.rows[1:]],
        }  # fmt: skip


def profile(
    source: Source,
    *,
    specs: list[str] | tuple[str, ...] = (),
    device: str = "auto",
    context: int | None = None,
    batch: int = 1,
    latency: bool = True,
    progress: Report = silent,
) -> Profile:
    """Measure what `source` costs on `device`, and predict what each method would make of it.

    Args:
        source: the model; it is only read.
        specs: methods to compare, as SPEC strings; by default all for weights and all KV policies (no token policies).
            None is calibrated for a prediction.
        device: "auto", "cpu", "cuda", "cuda:1" or "mps".
        context: tokens of context to plan for; by default 4,096 or what the model was made for, if that is less.
        batch: sequences at once.
        latency: load the model and time it, where it fits.
        progress: is told of tensors, and of timed runs.

    Raises:
        UsageError: a device, method or number that makes no sense.
        SourceError, FormatError: the model is damaged.
    """
    if batch < 1 or (context is not None and context < 1):
        raise UsageError(f"`--{'batch' if batch < 1 else 'context'}` takes 1 or more")
    steps, kv_steps, token_steps = _steps(specs)
    where = pick(device)
    seen = scan(source, steps, progress=progress)
    config = read_config(source.config)
    text = text_config(config)
    element_bytes = _element_bytes(seen)
    cache, pass_ = kv_cache(config, element_bytes), forward(text, element_bytes)
    longest = getattr(text, "max_position_embeddings", None)
    tokens = context or min(DEFAULT_CONTEXT, longest or DEFAULT_CONTEXT)
    progress(Progress("bandwidth", 0, 1, "runs"))
    bandwidth = copy_bandwidth(where)
    progress(Progress("bandwidth", 1, 1, "runs"))
    tied = _tied_head(source.config, config, seen)
    bare = Budget(0, 0, cache, pass_, where.free_bytes, batch)
    rows = _rows(seen, bare)
    timed = Latency(skipped="not asked for")
    if latency:
        timed = _latency(source, where, rows[0].budget.fits(PROMPT_TOKENS), batch, progress)
    if timed.decode_ms_per_token is not None and cache.groups:
        read = decode_bytes(seen, text, tied) + cache.bytes_at(timed.prompt_tokens or 0, batch)
        timed = replace(timed, decode_bound_ms=read / bandwidth / 1e6)
    return Profile(
        source.id, _architecture(source.config), where, bandwidth, seen, cache, pass_, timed, rows, tokens, batch,
        longest, tied, policies(config, kv_steps, cache, tokens, batch), token_policies(source, token_steps),
    )  # fmt: skip


def decode_bytes(seen: Scan, text: Any, tied: bool) -> int:
    """Bytes of weights that one decoded token reads.

    All but the embedding table (one row of it; all of it where it is the head too), experts that the token is not
    routed to, and encoders of the input.
    """
    experts = next((getattr(text, n) for n in _EXPERTS if getattr(text, n, None)), 0)
    used = getattr(text, "num_experts_per_tok", None) or getattr(text, "top_k_experts", None) or experts
    total = 0
    for look in seen.looks:
        name = look.info.name
        if is_input_side(name) or (part_of(name) == "embedding" and not tied):
            continue
        total += look.info.nbytes * used // experts if experts and is_routed_expert(name) else look.info.nbytes
    return total


_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


def _steps(specs: list[str] | tuple[str, ...]) -> tuple[list[Step], list[Step], list[Step]]:
    """Methods for weights, KV policies and token policies to compare: those asked for, or all of the first two."""
    if not specs:
        return [make_step(name, {}) for name in methods.names("weights")], default_specs(), []
    found: dict[str, list[Step]] = {"weights": [], "kv": [], "tokens": []}
    for step in map(parse_spec, specs):
        family = methods.family_of(step.method) if is_policy(step) else "weights"
        found["tokens" if family == "prompt" else family].append(step)
    return found["weights"], found["kv"], found["tokens"]


def _rows(seen: Scan, bare: Budget) -> tuple[Row, ...]:
    original = sum(look.info.nbytes for look in seen.looks)
    weights = sum(look.info.numel for look in seen.looks)
    rows = [Row("original", True, original, weights, replace(bare, weights=original))]
    for i, step in enumerate(seen.steps):
        budget = replace(bare, weights=seen.stored_bytes(i), scratch=seen.scratch_bytes(i))
        rows.append(Row(step.spec(), methods.get(step.method).lossless, original, weights, budget))
    return tuple(rows)


def _latency(source: Source, where: Device, fits: bool, batch: int, progress: Report) -> Latency:
    if not fits:
        return Latency(skipped="the model does not fit into the free memory")
    return measure(source, where, batch=batch, progress=progress)


def _element_bytes(seen: Scan) -> int:
    """Bytes of an activation: the dtype most float weights have, at least 16 bits."""
    floats = [d for d in seen.by_dtype() if d in FLOAT_DTYPES]
    return max(2, DTYPE_BITS[floats[0]] // 8) if floats else 2


def _tied_head(raw: dict[str, Any], config: Any, seen: Scan) -> bool:
    """Say whether the head is the embedding: no head is stored, or one with the same bits."""
    heads = [look for look in seen.looks if part_of(look.info.name) == "head" and len(look.info.shape) == 2]
    if not generates(config):
        return False
    if heads:
        names = {h.info.name for h in heads}
        return any(look.same_as and {look.info.name, look.same_as} & names for look in seen.looks)
    return bool(raw.get("tie_word_embeddings", getattr(config, "tie_word_embeddings", True)))


def _architecture(config: dict[str, Any]) -> str:
    names = config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else str(config.get("model_type", "unknown"))
