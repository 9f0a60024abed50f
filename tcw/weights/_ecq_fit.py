"""The layer that `ecq` quantises, as a problem of least squares: Hessian factored, rows weighted, scales fitted."""

from dataclasses import dataclass

import numpy as np

from tcw.weights import Statistics
from tcw.weights._sic import sweep

# a trellis of 64 states codes a Gaussian of s steps with ½ log2(1 + (s / 0.4836)²) bits, 0.048 bit above the bound at
# any rate; rounding (fitted above 1 bit) with 0.242 and 0.256
_RATE_STEP = {True: 0.4836, False: 0.2418}
_ABOVE_BOUND = {True: 0.048, False: 0.256}
_LEAST_WEIGHT = 1e-3  # a row counts at least so much of the mean
_RIDGE, _SHRINK = 1e-6, (0.0, 1.5)  # of the fit of column scales: there may be columns that hardly matter
_TURNS = 1  # more do not change the error by 0.2 %


@dataclass(frozen=True)
class Layer:
    """A layer to be quantised. Matrices of weights are [in, out] here: columns of W one after another.

    Attributes:
        target: float32 [in, out], what to come near to, rows of W scaled by `weight`.
        weight: float64 [out], square root of what an error of an output costs, geometric mean 1.
        hessian: float64 [in, in], damped, in a unit that makes its mean diagonal about 1.
        unit: what that is.
        factor: float64 [in, in], its lower Cholesky factor.
    """

    target: np.ndarray
    weight: np.ndarray
    hessian: np.ndarray
    unit: float
    factor: np.ndarray

    @classmethod
    def of(cls, W: np.ndarray, statistics: Statistics, damp: float, drift: bool) -> "Layer":
        """Set up the problem for W float32 [out, in]; without a Hessian, all inputs are alike."""
        hessian, unit, factor = _factored(statistics.hessian, W.shape[1], damp)
        target = W
        if drift and statistics.drift is not None and statistics.hessian is not None:
            target = W + np.linalg.solve(hessian, (W @ statistics.drift).T / unit).T
        weight = _row_weights(statistics.gradient, W.shape[0])
        return cls(np.ascontiguousarray((target * weight[:, None]).T, np.float32), weight, hessian, unit, factor)

    @property
    def spread(self) -> np.ndarray:
        """About how large Y is in each column, float64 [in]: σ_w ℓ."""
        return np.sqrt(np.square(self.target).mean(axis=1, dtype=np.float64)) * np.diag(self.factor)

    def labels(self, steps: np.ndarray, memory: int) -> np.ndarray:
        """Quantise with float64 steps [in] of Y: int32 [in, out]."""
        L = self.factor.astype(np.float32)
        return sweep(L.T @ self.target, L, steps.astype(np.float32), memory)

    def scales(self, where: np.ndarray, steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Fit scales to points float32 [in, out]: float64 [out] and [in], so that W ≈ rows · points · columns.

        Rows and columns take turns. Each is a problem of least squares with an exact solution.
        """
        H = self.hessian.astype(np.float32)
        HW = H @ self.target
        base = steps / np.diag(self.factor)
        A = where * base[:, None].astype(np.float32)
        columns, rows = np.ones(len(A)), self._fit_rows(A, H, HW)
        for _ in range(_TURNS):
            T = A * rows.astype(np.float32)
            M = (T @ T.T) * self.hessian
            M[np.diag_indices_from(M)] = np.diag(M) * (1 + _RIDGE) + np.finfo(np.float32).tiny
            left = (T * HW).sum(axis=1, dtype=np.float64) - M @ columns
            columns = np.clip(columns + np.linalg.solve(M, left), *_SHRINK)
            rows = self._fit_rows(A * columns[:, None].astype(np.float32), H, HW)
        return rows / self.weight, base * columns

    def fit_rows(self, where: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Scales of rows, float64 [out], for given scales of columns."""
        H = self.hessian.astype(np.float32)
        A = where * columns[:, None].astype(np.float32)
        return self._fit_rows(A, H, H @ self.target) / self.weight

    @staticmethod
    def _fit_rows(A: np.ndarray, H: np.ndarray, HW: np.ndarray) -> np.ndarray:
        dot = (A * HW).sum(axis=0, dtype=np.float64)
        square = (A * (H @ A)).sum(axis=0, dtype=np.float64)
        return np.maximum(dot / np.maximum(square, np.finfo(np.float64).tiny), 0.0)


def rate(spread: np.ndarray, steps: np.ndarray, trellis: bool) -> float:
    """Bits a weight that columns of Gaussian Y take, on average."""
    return float(0.5 * np.log2(1.0 + np.square(spread / steps / _RATE_STEP[trellis])).mean())


def distortion(spread: np.ndarray, steps: np.ndarray, trellis: bool) -> float:
    """Squared error of an output that goes with `rate`: the sum over columns."""
    square = np.square(spread)
    return float((square / (1.0 + np.square(spread / steps / _RATE_STEP[trellis]))).sum() * 4 ** _ABOVE_BOUND[trellis])


def _factored(hessian: np.ndarray | None, size: int, damp: float) -> tuple[np.ndarray, float, np.ndarray]:
    """Scale a Hessian, damp it until it has a Cholesky factor, and give both, float64 [in, in], and the unit."""
    if hessian is None or not np.isfinite(hessian).all() or not (unit := float(np.diag(hessian).mean())) > 0:
        return np.eye(size), 1.0, np.eye(size)
    H = hessian.astype(np.float64) / unit
    H = 0.5 * (H + H.T)
    diagonal = np.maximum(np.diag(H), 0.0)
    damp *= float(np.median(diagonal[diagonal > 0]))  # the mean may be that of a few massive channels
    while True:
        H[np.diag_indices(size)] = diagonal + damp
        try:
            return H, unit, np.linalg.cholesky(H)
        except np.linalg.LinAlgError:
            damp *= 10


def _row_weights(gradient: np.ndarray | None, size: int) -> np.ndarray:
    if gradient is None or not np.isfinite(gradient).all() or not gradient.any():
        return np.ones(size)
    g = gradient.astype(np.float64) / float(gradient.mean())
    g = np.maximum(g, _LEAST_WEIGHT)
    return np.sqrt(g / np.exp(np.log(g).mean()))
