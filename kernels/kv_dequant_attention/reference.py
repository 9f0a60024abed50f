"""The definition of right, from the bits: one query and one token after the other, in float64."""

from dataclasses import dataclass

import numpy as np
import torch
from tcw.kernels.kv_dequant_attention.cases import SUMS, Inputs
from tcw.kernels.kv_dequant_attention.layout import Packed


def exact(tensor: torch.Tensor) -> np.ndarray:
    """A tensor's values as float64."""
    return tensor.double().numpy()


def unpack(packed: Packed) -> tuple[np.ndarray, np.ndarray]:
    """Keys or values, and the sizes they are made of, (|minimum| + |step|·code)·|scale|: float64 [B, G, n, width]."""
    batch, heads, n, _ = packed.codes.shape
    minimum, step = exact(packed.minimum), exact(packed.step)
    scale = np.ones((batch, heads, 1, packed.width)) if packed.scale is None else exact(packed.scale)
    x, span = np.empty((2, batch, heads, n, packed.width))
    for b in range(batch):
        for g in range(heads):
            shared = g if minimum.shape[1] > 1 else 0
            for t in range(n):
                string = int.from_bytes(packed.codes[b, g, t].numpy().tobytes(), "little")
                block = t // packed.tokens if packed.blocks is None else _of(packed.blocks, b, g, t)
                for d in range(packed.width):
                    code = string >> (d * packed.bits) & ((1 << packed.bits) - 1)
                    at = b, shared, block, d // packed.channels
                    x[b, g, t, d] = (minimum[at] + step[at] * code) * scale[b, g, 0, d]
                    span[b, g, t, d] = (abs(minimum[at]) + abs(step[at]) * code) * abs(scale[b, g, 0, d])
    return x, span


@dataclass(frozen=True)
class Expected:
    """What attention must give, and what its rounding errors are to be judged by; float64.

    Attributes:
        out: [B, H, q, Dv]; lse: [B, H, q].
        size: Σ p·span, what the values that were summed are made of; [B, H, q, Dv].
        spread: Σ p·|v - out|: errors of weights, whose sum is 1, go with it; [B, H, q, Dv].
        far: the largest |v| that a query looks at, [B, H, q, Dv].
        rounded: the largest Σ |q|·|k|·scaling of a query: errors of single keys go with it; [B, H, q]. Twice that
            where keys have a scale, which queries may take upon them.
        summed: the largest Σ |q|·span·scaling, and |bias|: what was summed to a logit; [B, H, q].
    """

    out: torch.Tensor
    lse: torch.Tensor
    size: torch.Tensor
    spread: torch.Tensor
    far: torch.Tensor
    rounded: torch.Tensor
    summed: torch.Tensor


def attend(inputs: Inputs) -> Expected:
    """The attention, from the inputs' exact values."""
    q = exact(inputs.queries)
    (k, k_span), (v, v_span) = unpack(inputs.keys), unpack(inputs.values)
    batch, heads, count, _ = q.shape
    groups, n = k.shape[1:3]
    out, size, spread, far = np.zeros((4, batch, heads, count, v.shape[-1]))
    lse, rounded, summed = np.full((3, batch, heads, count), -np.inf)
    rounded[:], summed[:] = 0, 0
    for b in range(batch):
        for h in range(heads):
            g = h // (heads // groups)
            for i in range(count):
                seen = [t for t in range(n) if _there(inputs, b, g, t) and _bias(inputs, b, h, i, t) > -np.inf]
                if not seen:
                    continue
                bias = np.array([_bias(inputs, b, h, i, t) for t in seen])
                logits = (k[b, g, seen] * q[b, h, i]).sum(-1) * inputs.scaling + bias
                top = logits.max()
                lse[b, h, i] = top + np.log(np.exp(logits - top).sum())
                p = np.exp(logits - lse[b, h, i])
                out[b, h, i], size[b, h, i] = p @ v[b, g, seen], p @ v_span[b, g, seen]
                spread[b, h, i] = p @ np.abs(v[b, g, seen] - out[b, h, i])
                far[b, h, i] = np.abs(v[b, g, seen]).max(0)
                grain = np.abs(q[b, h, i]) * abs(inputs.scaling)
                times = 1 if inputs.keys.scale is None else 2
                rounded[b, h, i] = times * (np.abs(k[b, g, seen]) * grain).sum(-1).max()
                summed[b, h, i] = ((k_span[b, g, seen] * grain).sum(-1) + np.abs(bias)).max()
    return Expected(*map(torch.from_numpy, (out, lse, size, spread, far, rounded, summed)))


def _of(held: torch.Tensor, b: int, g: int, t: int) -> int:
    """What is said of a token; axes of size 1 are said of all."""
    return int(held[b if held.shape[0] > 1 else 0, g if held.shape[1] > 1 else 0, t])


def _there(inputs: Inputs, b: int, g: int, t: int) -> bool:
    return inputs.real is None or bool(_of(inputs.real, b, g, t))


def _bias(inputs: Inputs, b: int, h: int, i: int, t: int) -> float:
    return 0.0 if inputs.bias is None else float(inputs.bias[b, h, i, t])


def compare(out: torch.Tensor, lse: torch.Tensor, expected: Expected, unit: float) -> float:
    """The largest error, as a share of what is allowed where keys, values and weights lose `unit` each."""
    if out.dtype != torch.float32 or lse.dtype != torch.float32 or out.shape != expected.out.shape:
        return float("inf")
    there = expected.lse > -torch.inf
    if not torch.equal(there, lse.cpu() > -torch.inf) or bool(out.cpu()[~there].any()):
        return float("inf")
    logit = unit * expected.rounded + SUMS * (expected.summed + expected.lse.abs().masked_fill(~there, 0.0) + 1)
    # weights are wrong by a factor between e^-2·logit and its inverse, and no weighted mean is farther than 2·far
    drift = torch.minimum(torch.expm1(2 * logit)[..., None] * expected.spread, 2 * expected.far)
    allowed = drift + (2 * unit + SUMS) * (expected.size + expected.far * unit) + 1e-30
    errors = (out.double().cpu() - expected.out).abs() / allowed
    errors_lse = ((lse.double().cpu() - expected.lse) / logit)[there].abs()
    found = torch.cat([errors.flatten(), errors_lse.flatten()]).nan_to_num(nan=float("inf"))
    return float(found.max()) if len(found) else 0.0
