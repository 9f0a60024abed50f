"""Keys and values in 1, 2, 3, 4 or 8 bits: codes on uniform grids, packed into bytes.

What is appended is rounded once and never again. Where T tokens share a grid (`Grid.tokens`), they are those that were
appended together; the last block of an append may be ragged. A token's block then has to be remembered, from the first
ragged block or the first forgotten token on.

    x̂ = frame⁻¹(minimum + step·q), computed in float32     |ŷ - y| <= step/2 on asymmetric grids, y in the frame

Where the frame neither turns nor rotates, |x̂ - x| <= c·step/2 for every element, and half a unit in the last place of
the model's dtype. Where it does, the same holds for the 2-norm of a token, with a factor sqrt(D).
"""

import torch
from torch import Tensor

from tcw.kv.stores import Store, pick
from tcw.kv.stores._frames import Frame, Framed
from tcw.kv.stores._grids import Grid, unit_of
from tcw.kv.stores._packing import pack, unpack


class Integers:
    """The keys, or the values, of a group.

    Attributes:
        grid: how codes are read: `bits`, `tokens` and `channels` that share a grid.
        codes: uint8 [B, G, n, ceil(D·bits / 8)]; code d of a token is in bits d·bits.. of its bytes, low bits first.
        grids: minimum and step, bfloat16 [B, G, blocks, ceil(D / C)] each; or one tensor of step codes in uint8.
        dim: D.
        blocks: each token's block, uint8, int16 or int32 [B or 1, G or 1, n]; None: token t is of block t // T.
        frame: what was done to the tokens before.
    """

    def __init__(self, grid: Grid, frame: Frame, leader: Framed | None = None) -> None:
        self.grid, self.frame = grid, Framed(frame, leader)
        self.codes: Tensor | None = None
        self.grids: tuple[Tensor, ...] = ()
        self.blocks: Tensor | None = None
        self.unit: Tensor | None = None  # float32 [B, G, 1, 1], for symmetric grids
        self.dim = 0
        self._dtype = torch.float32

    def __len__(self) -> int:
        return 0 if self.codes is None else self.codes.shape[2]

    @property
    def minimum(self) -> Tensor:
        """Minimum of each block and group of channels, where grids are asymmetric."""
        return self.grids[0]

    @property
    def step(self) -> Tensor:
        """Step of each block and group of channels, or its code."""
        return self.grids[-1]

    @property
    def scale(self) -> Tensor | None:
        """Each channel's c, bfloat16 [B, G, 1, D], or None."""
        return self.frame.scale

    def append(self, x: Tensor, positions: Tensor) -> None:
        """Round and pack x [B, G, m, D] at `positions` [B, 1 or G, m] (-1: padding)."""
        self.dim, self._dtype = x.shape[-1], x.dtype
        y = self.frame.enter(x, positions)
        if self.unit is None:
            self.unit = unit_of(y) if self.grid.symmetric else y.new_zeros(1, 1, 1, 1)
        grids = self.grid.fit(y, positions >= 0, self.unit)
        blocks = self._numbered(y.shape[2])
        own = None if blocks is None else blocks[..., len(self) :] - self._block_count()
        codes = pack(self.grid.codes(y, *self._spread(grids, own, y.shape[2])), self.grid.bits)
        self.codes = codes if self.codes is None else torch.cat([self.codes, codes], 2)
        self.grids = tuple(torch.cat(pair, 2) for pair in zip(self.grids, grids, strict=True)) if self.grids else grids
        self.blocks = None if blocks is None else blocks.to(_smallest(self._block_count()))

    def read(self) -> Tensor:
        """All tokens, [B, G, n, D], in the model's dtype."""
        assert self.codes is not None
        minimum, step = self._spread(self.grids, self.blocks, len(self))
        y = unpack(self.codes, self.grid.bits, self.dim).float().mul_(step).add_(minimum)
        limit = torch.finfo(self._dtype).max  # a grid spans its block and may end beyond what float16 holds
        return self.frame.leave(y).clamp_(-limit, limit).to(self._dtype)

    def keep(self, index: Tensor) -> None:
        """Forget all tokens but those numbered `index`, int64 [B, G, m]."""
        assert self.codes is not None
        if self.grid.tokens == 1:
            self.grids = tuple(pick(grid, index) for grid in self.grids)
        else:
            blocks = self._block_numbers(len(self)) if self.blocks is None else self.blocks
            self._drop_unused(pick(blocks.expand(*self.codes.shape[:2], -1), index))
        self.codes = pick(self.codes, index)
        self.frame.keep(index)

    def select_rows(self, rows: Tensor) -> None:
        """Keep the sequences `rows`, int64 [B']."""
        assert self.codes is not None
        self.codes = self.codes.index_select(0, rows)
        self.grids = tuple(grid.index_select(0, rows) for grid in self.grids)
        if self.blocks is not None and len(self.blocks) > 1:
            self.blocks = self.blocks.index_select(0, rows)
        if self.unit is not None and self.grid.symmetric:
            self.unit = self.unit.index_select(0, rows)
        self.frame.select_rows(rows)

    def tensors(self) -> list[Tensor]:
        """Everything held."""
        held = [self.codes, *self.grids, self.blocks, self.unit if self.grid.symmetric else None]
        return [t for t in held if t is not None] + self.frame.tensors()

    def _block_count(self) -> int:
        return self.grids[0].shape[2] if self.grids else 0

    def _block_numbers(self, count: int) -> Tensor:
        assert self.codes is not None
        return (torch.arange(count, device=self.codes.device) // self.grid.tokens)[None, None]

    def _numbered(self, new: int) -> Tensor | None:
        """Each token's block once `new` are appended, int64 [B or 1, G or 1, n]; None: token t is of block t // T."""
        if self.grid.tokens == 1 or (self.blocks is None and len(self) % self.grid.tokens == 0):
            return None
        fresh = self._block_numbers(new) + self._block_count()
        held = self._block_numbers(len(self)) if self.blocks is None else self.blocks.long()
        return torch.cat([held, fresh.expand(*held.shape[:2], -1)], 2)

    def _spread(self, grids: tuple[Tensor, ...], blocks: Tensor | None, count: int) -> tuple[Tensor, Tensor]:
        """Minimum and step of every token and channel."""
        assert self.unit is not None
        if self.grid.tokens > 1:
            if blocks is None:
                grids = tuple(grid.repeat_interleave(self.grid.tokens, 2)[:, :, :count] for grid in grids)
            else:
                shared = blocks.long().expand(grids[0].shape[0], -1, -1)
                grids = tuple(pick(grid, shared) for grid in grids)
        return self.grid.spread(grids, self.unit, self.dim)

    def _drop_unused(self, blocks: Tensor) -> None:
        """Renumber `blocks` and forget grids that no token of any sequence and head uses."""
        if blocks.device.type != "meta":  # a plan cannot know which: it counts all
            used = blocks.unique()
            blocks = torch.searchsorted(used, blocks)
            self.grids = tuple(grid.index_select(2, used.long()) for grid in self.grids)
        self.blocks = blocks.to(_smallest(self._block_count()))


def _smallest(count: int) -> torch.dtype:
    """The smallest dtype that numbers so many blocks."""
    return torch.uint8 if count <= 1 << 8 else torch.int16 if count <= 1 << 15 else torch.int32


class IntegerStore(Store):
    """Keys and values as codes.

    Attributes:
        keys, values: `Integers`.
        fusible: a kernel that multiplies with the codes can serve this: x̂ = c·(minimum + step·q), nothing more.
    """

    def __init__(
        self, keys: Grid, values: Grid, key_frame: Frame | None = None, value_frame: Frame | None = None
    ) -> None:
        """Make an empty one; frames do nothing by default."""
        self.keys = Integers(keys, key_frame or Frame())
        self.values = Integers(values, value_frame or Frame(), self.keys.frame)
        self.block = max(keys.tokens, values.tokens)
        self.fusible = not any(
            t.grid.symmetric or t.frame.frame.centre or t.frame.frame.turn or t.frame.frame.rope
            for t in (self.keys, self.values)
        )

    def __len__(self) -> int:
        return len(self.keys)

    def append(self, keys: Tensor, values: Tensor, positions: Tensor, scores: Tensor | None = None) -> Tensor | None:
        """Round and pack the tokens."""
        self.keys.append(keys, positions)
        self.values.append(values, positions)
        return None

    def read(self) -> tuple[Tensor, Tensor]:
        """All tokens, in the dtype of those that were appended last."""
        return self.keys.read(), self.values.read()

    def keep(self, index: Tensor) -> None:
        """Gather codes; nothing is rounded again."""
        self.keys.keep(index)
        self.values.keep(index)

    def select_rows(self, rows: Tensor) -> None:
        """Gather sequences."""
        if len(self):
            self.keys.select_rows(rows)
            self.values.select_rows(rows)

    def tensors(self) -> list[Tensor]:
        """Codes, grids, block numbers, and what the frames measured."""
        return self.keys.tensors() + self.values.tensors()
