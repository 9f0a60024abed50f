"""What stores share that hold their tokens in another store, in another form."""

from torch import Tensor

from tcw.kv.stores import Store


class Wrapper(Store):
    """Passes on to `inner` what it does not do itself."""

    def __init__(self, inner: Store) -> None:
        self.inner = inner
        self.block, self.wants_scores = inner.block, inner.wants_scores
        self.folds, self.shares_tokens = inner.folds, inner.shares_tokens

    @property
    def segments(self) -> tuple[int, ...]:
        """As the inner store has them."""
        return self.inner.segments

    def __len__(self) -> int:
        return len(self.inner)

    def fold(self, keys: Tensor, values: Tensor, real: Tensor | None) -> None:
        """Tell the inner store."""
        self.inner.fold(keys, values, real)

    def folded(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """The inner store's stand-ins."""
        return self.inner.folded()

    def tensors(self) -> list[Tensor]:
        """Those of the inner store."""
        return self.inner.tensors()
