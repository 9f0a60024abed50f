"""The residency `packed` for BF16 weights: kept in about 12 bits, and multiplied without writing them back.

While a model is loaded, each nn.Linear's weight is decoded on its device (out of the lanes code, or read from its
file), packed, and freed again: one tensor at a time. A weight that packing would not make smaller stays BF16. An
embedding is packed too, where its rows are cut as the layout's tiles are: then only the rows that are looked up are
unpacked. kernels/packed_matmul says what the layout is.
"""

from dataclasses import replace
from typing import Any

import torch
from torch.nn.functional import linear

from tcw.kernels.lanes_decode import decode, group
from tcw.kernels.packed_matmul import MOST_ROWS as MOST_ROWS
from tcw.kernels.packed_matmul import PackedWeight, pack, packed_matmul, unpack
from tcw.kernels.packed_matmul.layout import COLUMNS, ROWS
from tcw.runtime.packed import Packed, torch_dtype
from tcw.runtime.quantized import QuantizedWeight
from tcw.weights.dfloat11 import stream_params

_NAMES = ("tiles", "index", "base", "escapes")
_FOUR = 4 * COLUMNS  # columns of the tiles that share a base
_AT_ONCE = 256  # rows that are looked up: each costs 16 rows of memory, 34 MB in all where they have 4,096 columns


class LosslessWeight(QuantizedWeight):
    """A BF16 weight, packed: the tensors of a `PackedWeight`, and up to how many rows of x they are multiplied with."""

    def __init__(self, store: Any, packed: PackedWeight) -> None:
        """Take a packed weight, and its shape from where it was stored."""
        super().__init__(store, torch.bfloat16)
        self._form = packed.to("meta")  # all of it but its values, which may move
        self.fused_rows = MOST_ROWS  # of x; above that it is unpacked for a product of torch's
        for name, tensor in zip(_NAMES, packed.tensors(), strict=True):
            self.register_buffer(name, tensor)

    def packed(self) -> PackedWeight:
        """The weight as the kernels take it."""
        return self._form.with_tensors((self.tiles, self.index, self.base, self.escapes))

    def dense(self) -> torch.Tensor:
        """W, of `dtype` [out, in], unpacked anew."""
        return unpack(self.packed()).to(self.dtype)

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows of W by number, int64 [n] -> `dtype` [n, in]: the rows of tiles that they lie in are unpacked."""
        # the same numbers, which torch has checked: the last tile may have more rows than W
        ids = torch.arange(self.shape[0], device=ids.device).index_select(0, ids)
        return torch.cat([self._rows(some) for some in ids.split(_AT_ONCE)])

    def _rows(self, ids: torch.Tensor) -> torch.Tensor:
        tall, wide = ids // ROWS, self.shape[1] // COLUMNS
        near = replace(
            self._form,
            shape=(ROWS * len(ids), self.shape[1]),
            tiles=self.tiles.view(-1, wide, self.tiles.shape[1]).index_select(0, tall).flatten(0, 1),
            index=self.index.view(-1, wide).index_select(0, tall).flatten(),
            base=self.base.view(-1, self.shape[1] // _FOUR).index_select(0, tall).flatten(),
            escapes=self.escapes,  # places in it are absolute
        )
        found = unpack(near).view(len(ids), ROWS, self.shape[1])
        return found[torch.arange(len(ids), device=ids.device), ids % ROWS].to(self.dtype)

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """X Wᵀ + b: [..., in] -> [..., out]."""
        learns = torch.is_grad_enabled() and x.requires_grad  # the kernel has no gradient, torch's product has
        if x.dtype == torch.bfloat16 and x.shape[:-1].numel() <= self.fused_rows and not learns:
            return packed_matmul(x, self.packed(), bias)
        return linear(x, self.dense().to(x.dtype), bias)


def plain_on_device(weight: Packed, method: str) -> torch.Tensor:
    """A loaded weight, decoded where it is wanted."""
    if method != "dfloat11" or weight.dtype != torch_dtype(weight.store.info) or weight.device.type == "cpu":
        return weight.decode()
    encoded = weight.store.encoded
    streams = group([(encoded.parts, stream_params(weight.store.info, encoded), weight.numel())])
    return decode(streams.to(weight.device)).view(weight.shape)


def build(store: Any, plain: torch.Tensor, form: str, *, looked_up: bool) -> LosslessWeight | None:
    """Pack a weight, or return None where that does not pay; `looked_up`: its rows will be asked for."""
    if looked_up and plain.dim() == 2 and plain.shape[1] % _FOUR:
        return None
    packed = pack(plain, form)
    return None if packed is None else LosslessWeight(store, packed)
