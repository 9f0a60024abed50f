"""The plan of a policy: tokens and bytes of every layer and group at a length of text, before anything runs.

Nothing is computed by formula: the very layers that would run are run on the `meta` device, where tensors have shapes
and no memory, and their storages are counted.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tcw.kv import LayerShape
from tcw.kv.cache import nbytes

if TYPE_CHECKING:
    from tcw.kv.policy import Policy


@dataclass(frozen=True)
class PlanRow:
    """What one group of heads of one layer will hold: `tokens` for each head, `exact` of them as they are."""

    layer: int
    heads: int
    tokens: int
    exact: int


@dataclass(frozen=True)
class Plan:
    """What a policy will hold of `context` tokens, `batch` times.

    Attributes:
        rows: a row for each layer and group, in order.
        bytes: of the layers under the policy.
        dense_bytes: of the same layers with all keys and values as they are.
        shared_bytes: calibrated tensors, once for all caches.
        bounded: these are upper bounds: the policy decides by what it sees.
    """

    context: int
    batch: int
    rows: tuple[PlanRow, ...]
    bytes: int
    dense_bytes: int
    shared_bytes: int
    bounded: bool = False

    @property
    def ratio(self) -> float:
        """Bytes over dense bytes."""
        return self.bytes / self.dense_bytes if self.dense_bytes else 1.0

    def to_json(self) -> dict[str, Any]:
        """The plan with its rows."""
        return {
            "context": self.context, "batch": self.batch, "bytes": self.bytes, "dense_bytes": self.dense_bytes,
            "ratio": self.ratio, "shared_bytes": self.shared_bytes, "bounded": self.bounded,
            "rows": [vars(row) for row in self.rows],
        }  # fmt: skip


def plan(policy: "Policy", context: int, batch: int = 1, dtype: torch.dtype | None = None) -> Plan:
    """Predict what a policy holds once `context` tokens were read in one call.

    Args:
        policy: calibrated, or made of methods that need no calibration.
        context: tokens.
        batch: texts at once, of equal length.
        dtype: what keys and values are computed in; by default the model's.
    """
    rows: list[PlanRow] = []
    held, dense, used = 0, 0, dtype or policy.layers[0].dtype
    for layer in policy.layers:
        made = policy.new_layer(layer)
        _run(made, layer, context, batch, used)
        held += nbytes(made.tensors())
        dense += batch * context * layer.kv_heads * (layer.head_dim + layer.value_dim) * used.itemsize
        for group in made.groups:
            heads = len(group.parts.group.heads)
            rows.append(PlanRow(layer.index, heads, len(group), len(group) - len(group.store)))
    from tcw.kv import KVMethod

    shared = nbytes(t for tensors in policy.tensors.values() for t in tensors.values())
    bounded = any(type(m).count is not KVMethod.count for m in policy.methods.values())
    return Plan(context, batch, tuple(rows), held, dense, shared, bounded)


def _run(made: Any, layer: LayerShape, context: int, batch: int, dtype: torch.dtype) -> None:
    """Give a layer `context` tokens that have only shapes."""
    keys = torch.empty(batch, layer.kv_heads, context, layer.head_dim, dtype=dtype, device="meta")
    values = torch.empty(batch, layer.kv_heads, context, layer.value_dim, dtype=dtype, device="meta")
    query = torch.empty(batch, layer.heads, context, layer.head_dim, dtype=dtype, device="meta")
    made.update(keys, values)
    made.attend(_no_attention, torch.nn.Module(), query, None)


def _no_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None
