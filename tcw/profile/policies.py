"""What policies would leave: KV policies of a context, token policies of an image; beside the model as it is."""

from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tcw import methods
from tcw.errors import TcwError, UsageError
from tcw.profile.kv import KVCache
from tcw.recipe import Step

if TYPE_CHECKING:
    from tcw.source import Source
    from tcw.tokens.flops import Outlook


@dataclass(frozen=True)
class PolicyRow:
    """What a policy holds: `bytes` of the whole cache, of which `full_bytes` are what it would take without one.

    `tokens` are the fewest and the most that a head keeps; `bounded`: the policy decides by what it sees, and these are
    upper bounds; `shared_bytes`: what it measured on the model, once for all caches.
    """

    name: str
    bytes: int
    full_bytes: int
    tokens: tuple[int, int]
    shared_bytes: int
    bounded: bool

    def to_json(self) -> dict[str, Any]:
        """The row, with its ratio."""
        ratio = self.bytes / self.full_bytes if self.full_bytes else 1.0
        return {**vars(self), "tokens": list(self.tokens), "ratio": ratio}


@dataclass(frozen=True)
class Policies:
    """A row for each policy that can serve the model; `skipped` says of the others why they cannot."""

    rows: tuple[PolicyRow, ...] = ()
    skipped: dict[str, str] = field(default_factory=dict)


def policies(config: Any, specs: list[Step], cache: KVCache, context: int, batch: int) -> Policies:
    """Plan KV policies for a model.

    Args:
        config: of the model, as `read_config` makes it.
        specs: policies, each by itself; if there are several that go together, also all of them as one.
        cache: what the model caches without a policy.
        context: tokens of each sequence.
        batch: sequences.
    """
    if not specs or not cache.groups:
        return Policies()
    rows, skipped = [], {}
    for step in specs:
        try:
            rows.append(_row(step.spec(), [step], config, cache, context, batch))
        except UsageError as error:
            skipped[step.spec()] = error.message
    if len(specs) > 1 and len({step.method for step in specs}) == len(specs):
        with suppress(UsageError):  # alternatives, then
            rows.append(_row(" + ".join(step.spec() for step in specs), specs, config, cache, context, batch))
    return Policies(tuple(rows), skipped)


def default_specs() -> list[Step]:
    """Every KV policy with its defaults."""
    from tcw.recipe import make_step

    return [make_step(name, {}) for name in methods.names("kv")]


def _row(name: str, steps: list[Step], config: Any, cache: KVCache, context: int, batch: int) -> PolicyRow:
    import torch

    from tcw.kv import KVMethod
    from tcw.kv.policy import Policy
    from tcw.kv.shapes import shapes_of_config

    dtype = torch.float32 if cache.element_bytes == torch.float32.itemsize else torch.bfloat16
    built = {step.method: step.build() for step in steps}
    named = {key: method for key, method in built.items() if isinstance(method, KVMethod)}
    plan = Policy(named, shapes_of_config(config, dtype)).plan(context, batch)
    full = cache.bytes_at(context, batch)
    counts = [row.tokens for row in plan.rows]
    return PolicyRow(
        name, full - plan.dense_bytes + plan.bytes, full, (min(counts), max(counts)), plan.shared_bytes, plan.bounded
    )


@dataclass(frozen=True)
class TokenPolicies:
    """An outlook for each token policy, by its spec; `skipped` says of the others why they cannot serve the model."""

    rows: dict[str, "Outlook"] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The rows with their names."""
        rows = [{"name": name, **row.to_json()} for name, row in self.rows.items()]
        return {"policies": rows, "policies_skipped": self.skipped}


def token_policies(source: "Source", specs: list[Step]) -> TokenPolicies:
    """Plan token policies for a model, each by itself; if there are several that go together, also all as one."""
    if not specs:
        return TokenPolicies()
    from tcw.tokens import passes

    rows, skipped = {}, {}
    for step in specs:
        try:
            rows[step.spec()] = passes.outlook(source, passes.outlined(source, (step,)))
        except TcwError as error:
            skipped[step.spec()] = error.message
    if len(specs) > 1 and not skipped:
        with suppress(UsageError):  # alternatives, then
            together = passes.outlined(source, tuple(specs))
            rows[" + ".join(step.spec() for step in specs)] = passes.outlook(source, together)
    return TokenPolicies(rows, skipped)
