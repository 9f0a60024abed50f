"""A quantised weight in memory: what is kept of it, on which device, and how a layer multiplies with it.

    method                    kept                               y = x Wᵀ + b
    int8 int4 int2 mixed      codes and scales, repacked once    kernels/int_matmul
    fp8                       FP8 bytes and scales               inputs to FP8 too, then torch._scaled_mm or the like
    ecq (not on the CPU)      its entropy code (ecq_stream.py)   W is decoded for each product

A weight has no say in the dtype it is computed in: that is the model's, `dtype`. Its own tensors are buffers: they move
with the model but are never cast, so that scales keep the dtype that they are stored in.

FP8 inputs. With `activation=dynamic` each token x gets the scale max|x| / 448 and is rounded to E4M3; with `static` all
share the one that was calibrated; with blocks, each 128 columns of a token have a scale, as DeepSeek-V3 does it. On a
GPU that can, BF16 layers whose sides are multiples of 16 multiply FP8 by FP8 (torch._scaled_mm). Everywhere else the
same rounded numbers are multiplied as float32, so that what is measured on a processor is what a GPU would give, up to
the order of sums.

On the CPU blocks.py decodes ecq, with the processor's own decoder.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import linear, pad

from tcw.artifact import method_class
from tcw.errors import FormatError
from tcw.kernels.int_matmul import Weight, int_matmul, layout_of, repack, turned
from tcw.runtime.packed import Store
from tcw.weights import Encoded
from tcw.weights._integer import IntegerMethod, unpack_flat

_E4M3 = torch.float8_e4m3fn
_LARGEST = 448.0  # of E4M3
_BLOCK = 128  # columns, and rows, of a block that shares a scale
_SIDE = 16  # FP8 matrices of a GPU have sides that are multiples of it


class QuantizedWeight(nn.Module):  # type: ignore[misc]
    """Base: W [out, in] as its method stores it. Buffers move with the model; only `dtype` is ever cast."""

    def __init__(self, store: Store, dtype: torch.dtype) -> None:
        """Take the shape from the store. `dtype`: what W would be decoded to."""
        super().__init__()
        self.shape = torch.Size(store.info.shape)
        self.dtype = dtype

    @property
    def nbytes(self) -> int:
        """Bytes in memory, all of them."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def dense(self) -> torch.Tensor:
        """W, of `dtype` [out, in], decoded anew."""
        raise NotImplementedError

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows of W by number, int64 [n] -> `dtype` [n, in]."""
        raise NotImplementedError

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """X Wᵀ + b: [..., in] -> [..., out]."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "QuantizedWeight":
        """Move buffers to where `fn` puts a tensor; cast none."""
        like = fn(torch.empty(0, dtype=self.dtype, device=next(self.buffers()).device))
        self.dtype = like.dtype
        for name, buffer in list(self.named_buffers(recurse=False)):
            setattr(self, name, buffer.to(like.device))
        return self


class IntegerWeight(QuantizedWeight):
    """Integers of 2, 3, 4 or 8 bits with a scale a group: `words`, `scale`, `zero` as kernels/int_matmul wants them."""

    def __init__(self, store: Store, dtype: torch.dtype) -> None:
        """Repack the codes. Raises FormatError for parts that do not fit."""
        super().__init__(store, dtype)
        parts, params = store.encoded.parts, store.encoded.params
        out, width = store.info.shape
        try:
            self._layout = layout_of(params["bits"], width, params["group_size"])
            words = repack(_tensor(parts["codes"]), self._layout)
            scale, zero = _scales(parts["scale"]), _zeros(store.encoded, (out, self._layout.groups))
            weight = Weight(words, turned(scale), None if zero is None else turned(zero), self._layout, params["grid"])
        except ValueError as error:
            raise FormatError(f"tensor `{store.info.name}`: {error}") from None
        self._grid = weight.grid
        self.register_buffer("words", weight.words)
        self.register_buffer("scale", weight.scale)
        self.register_buffer("zero", weight.zero)

    def dense(self) -> torch.Tensor:
        """W, of `dtype` [out, in], decoded anew."""
        return self._weight().dequantize().T.to(self.dtype)

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows of W by number, int64 [n] -> `dtype` [n, in]."""
        return self._weight().rows(ids).dequantize().T.to(self.dtype)

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """X Wᵀ + b: [..., in] -> [..., out]."""
        return int_matmul(x, self._weight(), bias)

    def _weight(self) -> Weight:
        return Weight(self.words, self.scale, self.zero, self._layout, self._grid)


class Fp8Weight(QuantizedWeight):
    """E4M3 bytes, `codes` [out, in]; `scale` for each row, each block or all; `input_scale` where that is static."""

    def __init__(self, store: Store, dtype: torch.dtype, *, quantize_activations: bool = True) -> None:
        """Take the bytes, out of their entropy code if they are in one. Raises FormatError."""
        from tcw.weights.fp8 import stored

        super().__init__(store, dtype)
        codes, scale = stored(store.info, store.encoded)
        params, static = store.encoded.params, store.encoded.parts.get("input_scale")
        self.activation = params["activation"] if quantize_activations else "none"
        self.blocks = params["scale"] == "block"
        self.register_buffer("codes", _tensor(codes).view(_E4M3))
        self.register_buffer("scale", _tensor(scale))
        self.register_buffer("input_scale", None if static is None else _tensor(static))

    def dense(self) -> torch.Tensor:
        """W, of `dtype` [out, in], decoded anew."""
        return (self.codes.float() * self._spread()).to(self.dtype)

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows of W by number, int64 [n] -> `dtype` [n, in]."""
        scale = self._spread().expand(self.shape[0], -1)[ids]
        return (self.codes.view(torch.uint8)[ids].view(_E4M3).float() * scale).to(self.dtype)

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """X Wᵀ + b: [..., in] -> [..., out], with x rounded to FP8 as the method says."""
        if self.activation == "none":
            return linear(x, self.dense(), bias)
        q, scale = self._rounded(x.reshape(-1, self.shape[1]))
        if self._multiplies_fp8(x):
            y = self.scaled_mm(q, scale, bias)
        else:
            y = linear(q.float() * scale, self.codes.float() * self._spread())
            y = (y if bias is None else y + bias).to(x.dtype)
        return y.view(*x.shape[:-1], self.shape[0])

    def scaled_mm(self, q: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """FP8 times FP8: q E4M3 [m, in] with `scale` float32 [m, 1] -> BF16 [m, out]; sides are multiples of 16."""
        columns = self.scale.view(1, -1).expand(1, self.shape[0]).contiguous()
        y = torch._scaled_mm(q, self.codes.t(), scale_a=scale, scale_b=columns, out_dtype=torch.bfloat16)
        return y if bias is None else y + bias

    def _multiplies_fp8(self, x: torch.Tensor) -> bool:
        fits = x.is_cuda and x.dtype == torch.bfloat16 and not any(side % _SIDE for side in self.shape)
        return fits and not self.blocks and x.numel() > 0 and torch.cuda.get_device_capability(x.device) >= (8, 9)

    def _rounded(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """X [m, in] in E4M3, and the float32 scales it was divided by: [m, 1], or [m, in] with blocks."""
        x = x.float()
        if self.activation == "static":
            scale = self.input_scale.expand(x.shape[0], 1).contiguous()
        elif self.blocks:
            largest = pad(x.abs(), (0, -x.shape[1] % _BLOCK)).unflatten(1, (-1, _BLOCK)).amax(2)
            scale = _positive(largest).repeat_interleave(_BLOCK, 1)[:, : x.shape[1]]
        else:
            scale = _positive(x.abs().amax(1, keepdim=True))
        return (x / scale).clamp_(-_LARGEST, _LARGEST).to(_E4M3), scale

    def _spread(self) -> torch.Tensor:
        """Scales, ready to multiply [out, in] with."""
        if not self.blocks:
            return self.scale
        full = self.scale.repeat_interleave(_BLOCK, 0).repeat_interleave(_BLOCK, 1)
        return full[: self.shape[0], : self.shape[1]]


def _kind(method: str) -> Any:
    """The form of a method's weights; None where it has none."""
    if issubclass(method_class(method), IntegerMethod):
        return IntegerWeight
    if method == "ecq":
        from tcw.runtime.ecq_stream import EcqWeight  # builds on this module

        return EcqWeight
    return {"fp8": Fp8Weight}.get(method)


def has_form(method: str, device: torch.device) -> bool:
    """Say whether weights of a method (its canonical name) have a form of their own on a device."""
    return _kind(method) is not None and not (method == "ecq" and device.type == "cpu")


def build(method: str, store: Store, dtype: torch.dtype, *, quantize_activations: bool) -> QuantizedWeight:
    """Make the form in memory of a stored weight, on the CPU. Raises FormatError."""
    kind = _kind(method)
    return kind(store, dtype, **({"quantize_activations": quantize_activations} if kind is Fp8Weight else {}))


def _positive(largest: torch.Tensor) -> torch.Tensor:
    """The scales for numbers up to `largest`; 1 where all are 0."""
    return torch.where(largest > 0, largest / _LARGEST, 1.0).clamp_min(torch.finfo(torch.float32).tiny)


def _tensor(part: np.ndarray) -> torch.Tensor:
    """A part as a tensor, copied only where it lies in a file."""
    return torch.from_numpy(part if part.flags.writeable else part.copy())


def _scales(part: np.ndarray) -> torch.Tensor:
    """Stored scales with their dtype: BF16 comes as uint16."""
    scale = _tensor(part)
    return scale.view(torch.bfloat16) if scale.dtype == torch.uint16 else scale


def _zeros(encoded: Encoded, shape: tuple[int, int]) -> torch.Tensor | None:
    """Zero points, uint8 [out, groups] from their packed form, or values of code 0."""
    part, bits = encoded.parts.get("zero"), encoded.params["bits"]
    if part is None or encoded.params["grid"] == "float":
        return None if part is None else _scales(part)
    return torch.from_numpy(unpack_flat(part, bits, shape[0] * shape[1])).view(shape)
