"""What becomes of one image's tokens at one stage."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Plan:
    """Which of N tokens stay, and what they take in of the others.

    Attributes:
        keep: int64 [K], the tokens that stay, ascending.
        assign: int64 [N], for each token the number (0..K-1) of the kept one that stands for it, or -1: dropped. A kept
            token stands for itself.
        weight: float32 [N], how much a token counts in the mean that its representative becomes.
        size: float32 [K], for how many original tokens each kept one stands from here on (proportional attention).
        mix: float32 [K, N] with rows that sum to 1, instead of weighted means, where a token is shared between several
            kept ones; else None.
    """

    keep: Tensor
    assign: Tensor
    weight: Tensor
    size: Tensor
    mix: Tensor | None = None

    @classmethod
    def dropping(cls, keep: Tensor, size: Tensor) -> "Plan":
        """Keep the tokens `keep` (any order) of those with sizes `size` [N]; forget the others."""
        keep = keep.sort().values
        assign = torch.full((len(size),), -1, dtype=torch.int64, device=size.device)
        assign[keep] = torch.arange(len(keep), device=size.device)
        return cls(keep, assign, size, size[keep])

    @classmethod
    def merging(cls, keep: Tensor, assign: Tensor, size: Tensor, weight: Tensor | None = None) -> "Plan":
        """Keep `keep` (ascending); token i goes into kept one `assign[i]`, or is dropped at -1.

        `weight` [N] is by default the tokens' sizes, which makes the mean that of all original tokens.
        """
        total = torch.zeros(len(keep), dtype=size.dtype, device=size.device)
        stays = assign >= 0
        total.index_add_(0, assign[stays], size[stays])
        return cls(keep, assign, size if weight is None else weight, total)

    @classmethod
    def everything(cls, size: Tensor) -> "Plan":
        """Keep all tokens as they are."""
        return cls.dropping(torch.arange(len(size), device=size.device), size)

    @property
    def kept(self) -> int:
        """K."""
        return len(self.keep)

    @property
    def merges(self) -> bool:
        """Whether any kept token takes in another."""
        return self.mix is not None or bool((self.assign >= 0).sum() > self.kept)

    def apply(self, x: Tensor) -> Tensor:
        """The kept tokens of `x` [N, ...] with what they take in: [K, ...]. One that takes in none keeps its bits."""
        kept = x[self.keep]
        if not self.merges:
            return kept
        flat = x.reshape(len(x), -1).float()
        if self.mix is not None:
            mixed = self.mix @ flat
            own = torch.zeros_like(self.mix).scatter_(1, self.keep[:, None], 1.0)
            alone = (self.mix == own).all(1)
        else:
            stays = self.assign >= 0
            to, w = self.assign[stays], self.weight[stays].float()
            total = w.new_zeros(self.kept).index_add_(0, to, w)
            mixed = flat.new_zeros(self.kept, flat.shape[1]).index_add_(0, to, flat[stays] * w[:, None])
            mixed = mixed / total[:, None]
            alone = torch.bincount(to, minlength=self.kept) == 1
        mixed = mixed.reshape(kept.shape).to(x.dtype)
        return torch.where(alone.reshape(-1, *[1] * (x.dim() - 1)), kept, mixed)

    def then(self, later: "Plan") -> "Plan":
        """This plan and then another, of the tokens it kept, as one plan of the N tokens; `apply` may round otherwise.

        Weights are made such that `apply` gives the means of means; mixes are multiplied out.
        """
        keep = self.keep[later.keep]
        stays = self.assign >= 0
        assign = torch.where(stays, later.assign[self.assign.clamp(min=0)], -1)
        if self.mix is None and later.mix is None:
            w = self.weight.float()
            total = w.new_zeros(self.kept).index_add_(0, self.assign[stays], w[stays])
            share = torch.where(stays, w / total[self.assign.clamp(min=0)], w)
            weight = torch.where(stays, share * later.weight.float()[self.assign.clamp(min=0)], w)
            return Plan(keep, assign, weight, later.size)
        return Plan(keep, assign, self.weight, later.size, later.matrix() @ self.matrix())

    def matrix(self) -> Tensor:
        """`apply` as a matrix: float32 [K, N]."""
        if self.mix is not None:
            return self.mix
        stays = (self.assign >= 0).nonzero()[:, 0]
        matrix = self.weight.new_zeros(self.kept, len(self.assign), dtype=torch.float32)
        matrix[self.assign[stays], stays] = self.weight[stays].float()
        return matrix / matrix.sum(1, keepdim=True)

    def check(self, tokens: int, k: int | None) -> None:
        """Raise ValueError unless this is a plan for `tokens` tokens, of which `k` (None: any number) stay."""
        if self.keep.dim() != 1 or self.assign.shape != (tokens,) or self.weight.shape != (tokens,):
            raise ValueError("a plan's shapes do not fit the tokens")
        if self.size.shape != self.keep.shape:
            raise ValueError("a plan needs a size for every token that stays")
        if self.kept and (
            bool((self.keep.diff() <= 0).any()) or not 0 <= int(self.keep[0]) <= int(self.keep[-1]) < tokens
        ):
            raise ValueError("the tokens that stay are not ascending, or are none of the image's")
        if k is not None and self.kept != k:
            raise ValueError(f"{self.kept} tokens stay where {k} were asked for")
        own = torch.arange(self.kept, device=self.keep.device)
        if not torch.equal(self.assign[self.keep], own) or bool(
            (self.assign >= self.kept).any() | (self.assign < -1).any()
        ):
            raise ValueError("a plan assigns tokens to what does not stay")
        if not bool(torch.isfinite(self.size).all()) or not bool((self.size > 0).all()):
            raise ValueError("a plan's sizes must be positive numbers")
