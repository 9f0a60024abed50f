"""The best low-rank codes of vectors, in closed form, from their covariance.

Among all x̂ = F Eᵀ (x - μ) + μ of rank r, with C the covariance of x and M any metric,

    E = M^½ U_r,  F = M^-½ U_r,   U_r the first r eigenvectors of M^½ C M^½,

leave the least mean of (x - x̂)ᵀ M (x - x̂), which is the sum of the other eigenvalues (Eckart and Young, 1936). M = 1
is PCA. All in float64.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

RIDGE = 1e-2
"""Of a metric's mean eigenvalue, what is added to each: what counts for nothing would be reconstructed as anything."""


class Moments:
    """Mean and covariance of vectors that are seen a few at a time."""

    def __init__(self) -> None:
        self.count = 0
        self._sum: Tensor | None = None
        self._products: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """See vectors [n, C]."""
        x = precise(x)
        total, products = x.sum(0), x.T @ x
        self._sum = total if self._sum is None else self._sum + total
        self._products = products if self._products is None else self._products + products
        self.count += len(x)

    @property
    def mean(self) -> Tensor:
        """Float64 [C]."""
        assert self._sum is not None
        return self._sum / self.count

    @property
    def products(self) -> Tensor:
        """The mean of x xᵀ: float64 [C, C]."""
        assert self._products is not None
        return self._products / self.count

    @property
    def covariance(self) -> Tensor:
        """Float64 [C, C]."""
        return self.products - torch.outer(self.mean, self.mean)


@dataclass(frozen=True)
class Basis:
    """All directions, the most important first; the first r columns are the best code of r numbers.

    Attributes:
        encode, decode: float64 [C, C], E and F.
        energy: float64 [C], the error that leaving out each direction would make; not negative.
    """

    encode: Tensor
    decode: Tensor
    energy: Tensor


def best_basis(covariance: Tensor, metric: Tensor | None = None) -> Basis:
    """Find the directions in which vectors of this covariance vary most, as `metric` [C, C] measures it; None: PCA."""
    if metric is None:
        energy, vectors = torch.linalg.eigh(covariance)
        return Basis(vectors.flip(1), vectors.flip(1), energy.flip(0).clamp(min=0))
    size, vectors = torch.linalg.eigh(metric)
    size = size.clamp(min=0)
    size = size + RIDGE * size.mean() if size.sum() > 0 else torch.ones_like(size)
    root, inverse = (vectors * s @ vectors.T for s in (size.sqrt(), size.rsqrt()))
    energy, turned = torch.linalg.eigh(root @ covariance @ root)
    turned = turned.flip(1)
    return Basis(root @ turned, inverse @ turned, energy.flip(0).clamp(min=0))


def precise(x: Tensor) -> Tensor:
    """The same in float64, on the same device if that has it."""
    return x.to("cpu" if x.device.type == "mps" else x.device, torch.float64)
