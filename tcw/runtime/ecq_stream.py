"""A weight of `ecq` that stays in its entropy code on a device, and is decoded there: 2.1 bits a weight are 2.1 bits.

    codes ──lanes_decode──► symbols ──pairs, offset, literals──► labels, by table
                                                                  │ place of each label: table, column, row
                                                                  ▼
                        W = diag(rows) points diag(columns) ◄── points [in, out], the trellis by sums modulo 2

The labels of a table lie column after column, rows in order. Which table a place has depends on the spread codes of
its column and its row alone (tcw/weights/_ecq_code.py), so a label is found by two small numbers: how many of its table
lie in the columns before, and how many in the rows before within a column of that spread code. No permutation is kept.

Every step is the one of the processor's decoder, in float32 and in the same order: the weights are the same bits.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch.nn.functional import linear

from tcw.kernels.lanes_decode.integers import check_integers, read, values
from tcw.runtime.packed import TORCH_DTYPES, Store
from tcw.runtime.quantized import QuantizedWeight
from tcw.weights import _ecq_code, _sic
from tcw.weights.ecq import named, opened

_SLAB = 1 << 24  # weights that are put in place at a time: 200 MB of temporaries


class EcqWeight(QuantizedWeight):
    """The matrix W [out, in] of one tensor, in its code; every product decodes it."""

    def __init__(self, store: Store, dtype: torch.dtype) -> None:
        """Check all parts, and that the codes decode. Raises FormatError."""
        super().__init__(store, dtype)
        found, self._memory, rows, columns = opened(store.info, store.encoded)
        with named(store.info):
            self._integers = read(found.parts, found.params, store.info.numel)
            check_integers(self._integers)
        self._stored = TORCH_DTYPES[store.info.dtype]
        for name, tensor in zip(self._names(), self._integers.tensors(), strict=True):
            self.register_buffer(name, tensor)
        self._keep_places(found.classes)
        self.register_buffer("row_scale", torch.from_numpy(rows))
        self.register_buffer("column_scale", torch.from_numpy(columns))

    def dense(self) -> torch.Tensor:
        """W, decoded anew: the bits that the processor decodes to, cast to `dtype` [out, in]."""
        labels = values(self._integers)
        out, columns = self.shape
        result = torch.empty(self.shape, dtype=self._stored, device=labels.device)
        step = max(1, _SLAB // out)
        for first in range(0, columns, step):
            some = slice(first, first + step)
            spread = self.column_spread[some].long()
            place = self.before[some].gather(1, self.table[spread].long()) + self.rank[spread]
            points = _points(labels[place], self._memory)
            points.mul_(self.column_scale[some, None]).mul_(self.row_scale)
            result[:, some] = points.T.to(self._stored)
        return result.to(self.dtype)

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows of W by number, int64 [n] -> `dtype` [n, in]; all of W is decoded for them."""
        return self.dense()[ids]

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """X Wᵀ + b: [..., in] -> [..., out]."""
        return linear(x, self.dense(), bias)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "EcqWeight":
        super()._apply(fn, recurse)
        self._integers = self._integers.with_tensors(tuple(getattr(self, name) for name in self._names()))
        return self

    def _names(self) -> list[str]:
        """Of the buffers that hold the stream."""
        return [f"stream_{k}" for k in range(len(self._integers.tensors()))]

    def _keep_places(self, classes: _ecq_code.Classes) -> None:
        """Keep what says where the label of a column and a row lies: first of its table, in the columns before, above.

        `table` and `rank` have a row for each of the 16 spread codes of a column, `before` one for each column.
        """
        codes = np.arange(_ecq_code.SPREADS)
        table = classes.tables[codes[:, None] + classes.rows[None, :]]
        rank, count = np.zeros(table.shape, np.int32), np.zeros((codes.size, classes.count), np.int64)
        for k in range(classes.count):
            mine = table == k
            rank += np.where(mine, np.cumsum(mine, axis=1) - 1, 0).astype(np.int32)
            count[:, k] = mine.sum(axis=1)
        before = np.cumsum(count[classes.columns], axis=0) - count[classes.columns] + self._integers.starts
        few = rank.max(initial=0) < 1 << 15
        self.register_buffer("column_spread", torch.from_numpy(classes.columns.copy()))
        self.register_buffer("table", torch.from_numpy(table))
        self.register_buffer("rank", torch.from_numpy(rank.astype(np.int16) if few else rank))
        self.register_buffer("before", torch.from_numpy(before))


def _points(labels: torch.Tensor, memory: int) -> torch.Tensor:
    """Where labels lie, in steps: int32 [columns, rows] -> float32; `tcw.weights._sic.points`, as torch operations."""
    if memory == 0:
        return labels.float()
    columns, rows = labels.shape
    parity, mirror = (
        labels & 1,
        torch.zeros(columns, -(-rows // memory) * memory, dtype=torch.int32, device=labels.device),
    )
    for k in range(1, memory):
        if _sic.TAPS[memory] >> (k - 1) & 1 and k < rows:
            mirror[:, k:rows] += parity[:, : rows - k]
    turned = mirror.view(columns, -1, memory).cumsum(1, dtype=torch.int32).view(columns, -1)[:, :rows] & 1
    points = labels.float().mul_(2).sub_(0.5)
    return torch.where(turned.bool(), -points, points)
