"""Low rank: one short code a token stands for the keys of all heads, another for the values.

x is a token's keys before RoPE, those of all G heads one after another, μ its mean over a calibration text:

    c = Eᵀ(x - μ),   x̂ = F c + μ,   E and F [G·D, r], EᵀF = 1

and the keys read are x̂, rotated to where the tokens stood in the text. Values likewise, without a rotation. The codes
lie in another store, as its keys and values of a single head: in a dense one as they are, in a quantised one rounded.
Keys are taken apart before RoPE, as in CSKV (arXiv 2409.10593): a rotation would spread them over all dimensions.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tcw.kv.rope import Rope
from tcw.kv.stores import Store, pick
from tcw.kv.stores._wrapper import Wrapper


@dataclass(frozen=True)
class Factors:
    """How vectors of C elements become codes of r, and codes vectors. Weights of a policy: all its caches share them.

    Attributes:
        encode, decode: float32 [C, r]; the same where the basis is orthonormal.
        mean: float32 [C].
    """

    encode: Tensor
    decode: Tensor
    mean: Tensor

    def codes(self, x: Tensor) -> Tensor:
        """[..., C] -> float32 [..., r]."""
        return (x.float() - self.mean) @ self.encode

    def vectors(self, codes: Tensor) -> Tensor:
        """[..., r] -> float32 [..., C]."""
        return torch.nn.functional.linear(codes.float(), self.decode, self.mean)


class LowRank(Wrapper):
    """Codes in another store, and the positions to rotate keys to.

    Attributes:
        positions: int32 [B, 1, n]. They are kept even where they could be counted: a text's positions may have gaps.
    """

    def __init__(self, keys: Factors, values: Factors, rope: Rope, inner: Store) -> None:
        """`inner` must take any vectors as keys, and hold every token it is given."""
        super().__init__(inner)
        self.shares_tokens = True
        self.keys, self.values, self.rope = keys, values, rope
        self.positions: Tensor | None = None
        self._heads, self._dtype = 1, torch.float32

    def append(self, keys: Tensor, values: Tensor, positions: Tensor, scores: Tensor | None = None) -> Tensor | None:
        """Keep the codes, in the dtype of `keys`; all heads must bring the same tokens."""
        self._heads, self._dtype = keys.shape[1], keys.dtype
        positions = positions[:, :1]
        coded = [
            factors.codes(x.transpose(1, 2).flatten(2)).to(keys.dtype)[:, None]
            for factors, x in ((self.keys, self.rope.undo(keys, positions)), (self.values, values))
        ]
        order = self.inner.append(
            coded[0], coded[1], positions, None if scores is None else scores.mean(1, keepdim=True)
        )
        here = positions.int()
        here = here.clone() if self.positions is None else torch.cat([self.positions, here], 2)
        self.positions = here if order is None else pick(here, order)
        return None if order is None else order.expand(-1, self._heads, -1)

    def read(self) -> tuple[Tensor, Tensor]:
        """What the codes stand for: keys [B, G, n, D] and values [B, G, n, Dv]."""
        assert self.positions is not None
        keys, values = (
            factors.vectors(codes[:, 0]).unflatten(-1, (self._heads, -1)).transpose(1, 2)
            for factors, codes in zip((self.keys, self.values), self.inner.read(), strict=True)
        )
        return self.rope.rotate(keys, self.positions).to(self._dtype), values.to(self._dtype)

    def keep(self, index: Tensor) -> None:
        """Forget all tokens but those of `index`, which are the same for all heads."""
        assert self.positions is not None
        self.inner.keep(index[:, :1])
        self.positions = pick(self.positions, index[:, :1])

    def select_rows(self, rows: Tensor) -> None:
        """Keep those sequences."""
        self.inner.select_rows(rows)
        self.positions = None if self.positions is None else self.positions.index_select(0, rows)

    def tensors(self) -> list[Tensor]:
        """Codes and positions; the factors are the policy's."""
        return self.inner.tensors() + ([] if self.positions is None else [self.positions])
