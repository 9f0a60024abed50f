"""The definition of right, from the stored format: one code after the other, in float64."""

from dataclasses import dataclass

import numpy as np
import torch
from tcw.kernels.int_matmul.cases import Inputs


def weights(inputs: Inputs) -> np.ndarray:
    """W, float64 [N, K]."""
    bits, k = inputs.bits, inputs.x.shape[1]
    n, groups = inputs.scale.shape
    group_size = inputs.group_size or k
    scale, zero = exact(inputs.scale), None if inputs.zero is None else exact(inputs.zero)
    out = np.empty((n, k))
    for row in range(n):
        string = int.from_bytes(inputs.codes[row].numpy().tobytes(), "little")
        for i in range(k):
            q = string >> (i * bits) & ((1 << bits) - 1)
            g = min(i // group_size, groups - 1)
            s, z = scale[row, g], 0.0 if zero is None else zero[row, g]
            out[row, i] = {
                "symmetric": (q - 2 ** (bits - 1)) * s,
                "zero": (q - z) * s,
                "midrise": (q - (2**bits - 1) / 2) * s,
                "float": q * s + z,
            }[inputs.grid]
    return out


@dataclass(frozen=True)
class Expected:
    """What a product must give, and what its rounding errors are to be judged by; all float64 [M, N].

    Attributes:
        y: the result.
        size: the sum of |x| |W| and |b|: errors of single weights go with it.
        span: the sum of |x| |s| 2^bits besides: what is summed, before zero points cancel, is no more.
    """

    y: torch.Tensor
    size: torch.Tensor
    span: torch.Tensor


def matmul(inputs: Inputs) -> Expected:
    """The product, from the inputs' exact values."""
    x, w = exact(inputs.x), weights(inputs)
    bias = 0.0 if inputs.bias is None else exact(inputs.bias)
    k = x.shape[1]
    steps = np.repeat(np.abs(exact(inputs.scale)), inputs.group_size or k, axis=1)[:, :k] * 2**inputs.bits
    y = np.array([[(row * column).sum() for column in w] for row in x]) + bias
    size = np.abs(x) @ np.abs(w).T + np.abs(bias)
    return Expected(*map(torch.from_numpy, (y, size, size + np.abs(x) @ steps.T)))


def exact(tensor: torch.Tensor) -> np.ndarray:
    """A tensor's values as float64."""
    return tensor.double().numpy()
