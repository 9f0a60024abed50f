"""The cache that transformers gets: layers under a policy, and all others as transformers makes them."""

from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, CacheLayerMixin

from tcw.errors import UsageError
from tcw.kv.layer import PolicyLayer


class PolicyCache(Cache):  # type: ignore[misc]
    """A cache whose full-attention layers follow a policy. Make it with `Policy.new_cache`; give it to `generate`."""

    def __init__(self, config: Any, layers: dict[int, PolicyLayer]) -> None:
        """`layers`: those under the policy, by their number in the model."""
        made = DynamicCache(config=config).layers
        super().__init__(layers=[layers.get(i, layer) for i, layer in enumerate(made)])

    @property
    def policy_layers(self) -> list[PolicyLayer]:
        """The layers under the policy."""
        return [layer for layer in self.layers if isinstance(layer, PolicyLayer)]

    @property
    def is_croppable(self) -> bool:
        """What was forgotten cannot be brought back."""
        return False

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse. Raises UsageError."""
        raise UsageError(
            "a cache under a KV policy cannot be cut back", "generate without an assistant model, or without the policy"
        )

    def activate_past_recording(self) -> None:
        """Refuse: assisted generation would cut the cache back. Raises UsageError."""
        self.crop(0)

    def nbytes(self) -> int:
        """Bytes of all storages that the cache keeps in memory, each counted once and whole, views or not."""
        return nbytes(tensor for layer in self.layers for tensor in held_by(layer))

    def kept(self) -> list[list[tuple[tuple[int, ...], Tensor]]]:
        """For each layer under the policy and each of its groups: heads, and positions int [B or 1, 1 or G, n].

        Only of a cache made with `track=True`.
        """
        return [[(g.parts.group.heads, g.positions()) for g in layer.groups] for layer in self.policy_layers]


def held_by(layer: Any) -> list[Tensor]:
    """Every tensor that a layer of a cache keeps: ours says so itself, transformers' have them as attributes."""
    if isinstance(layer, PolicyLayer):
        return layer.tensors()
    if not isinstance(layer, CacheLayerMixin):
        return []
    values = [v for value in vars(layer).values() for v in (value.values() if isinstance(value, dict) else [value])]
    return [v for v in values if isinstance(v, Tensor)]


def nbytes(tensors: Any) -> int:
    """Bytes of the storages behind some tensors, each counted once."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
