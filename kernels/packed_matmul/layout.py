"""Fixed-width layouts of BF16 weights whose decoding is a few instructions for several weights at once.

A weight is s eeeeeeee mmmmmmm. Its low byte (the last bit of e, and m) is kept as it is. Bits 14..8, called `upper`
here, take few values in a trained tensor: the commonest 8 (p4) or 4 (p3) are the palette, and a weight has a code for
one of them. An upper value stands for two neighbouring exponents, so palettes reach as far as 16 or 8 exponents would.
All other weights are escapes: they have code 0, and their upper bits in a list.

Tile: 16 rows by 64 columns, 32 weights a lane of a warp. Row 8r + g and column 32h + 8t + 4i + c of a tile are
weight 16h + 8i + 4r + c of lane 4g + t. Tiles follow each other along a row of tiles, of 1536 (p4) or 1408 bytes (p3):

    512 bytes   low bytes of weights 0..15, 16 bytes a lane
    512 bytes   low bytes of weights 16..31
    p4: 512 bytes, 16 a lane, byte 4v + b:
        bits 0..2 code of weight 8v + 2b      bit 3 sign of weight 8v + 4 + b
        bits 4..6 code of weight 8v + 2b + 1  bit 7 sign of weight 8v + b
    p3: twice 128 bytes, 4 a lane, u = 0 and 1, byte b, two bits each from the lowest on:
        codes of weights 16u + 2b, 16u + 2b + 8, 16u + 2b + 1, 16u + 2b + 9
        128 bytes, 4 a lane, byte b: bit q is the sign of weight 4q + b

    escapes  u16   16 lane + weight % 16 | upper << 9; tile by tile, of the first half, then of the second
    index    u32   a tile: escapes in its first half | in its second << 10 | those of earlier tiles of its four << 20
    base     u32   four tiles: escapes before them

Columns past the last are +0, so that a product adds there what plain weights padded with zeros would.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

CODES = {"p3": 4, "p4": 8}  # in a palette
FORMS = {size: form for form, size in CODES.items()}
TILE_BYTES = {"p3": 1408, "p4": 1536}
ROWS, COLUMNS = 16, 64  # of a tile
_SLAB = 1 << 22  # weights at a time: temporaries are at most 24 bytes for each
_MOST = (1 << 31) - 1  # escapes of a tensor


@dataclass(frozen=True)
class PackedWeight:
    """A weight [N, K] as the kernel reads it; `pack` makes one.

    Attributes:
        form: "p3" or "p4".
        shape: (N, K).
        palette: bits 14..8 of a weight, by code.
        tiles: uint8 [tiles, bytes of a tile].
        index: int32 [tiles], bits as the module's text says.
        base: int32 [ceil(tiles / 4)].
        escapes: int16, filled up to a multiple of 8, at least 8.
    """

    form: str
    shape: tuple[int, int]
    palette: tuple[int, ...]
    tiles: torch.Tensor
    index: torch.Tensor
    base: torch.Tensor
    escapes: torch.Tensor

    @property
    def nbytes(self) -> int:
        """Everything that is kept in memory."""
        return sum(t.nbytes for t in self.tensors())

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.tiles.device

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Tiles, index, base and escapes."""
        return self.tiles, self.index, self.base, self.escapes

    def with_tensors(self, tensors: tuple[torch.Tensor, ...]) -> "PackedWeight":
        """The same weight in other memory: `tensors` as `tensors()` gives them."""
        return replace(self, **dict(zip(("tiles", "index", "base", "escapes"), tensors, strict=True)))

    def to(self, device: Any, non_blocking: bool = False) -> "PackedWeight":
        """The same weight on another device."""
        return self.with_tensors(tuple(t.to(device, non_blocking=non_blocking) for t in self.tensors()))

    def pin_memory(self) -> "PackedWeight":
        """The same weight in pinned memory of the host."""
        return self.with_tensors(tuple(t.pin_memory() for t in self.tensors()))


def pack(weight: torch.Tensor, form: str = "p4", *, most: float = 0.9) -> PackedWeight | None:
    """Pack a weight, on its device. Every bit pattern comes back as it was.

    Beyond the result it needs at most 24 bytes for each weight of a slab: 2^22 weights, or 16 rows if they are more.

    Args:
        weight: BF16 [N, K].
        form: "p4", about 12.05 bits a weight, or "p3", about 11.4.
        most: the largest size that pays, as a share of the plain weight's.

    Returns:
        The packed weight, or None where it would be larger, or the tensor is no BF16 matrix.

    Raises:
        ValueError: there is no such form.
    """
    if form not in CODES:
        raise ValueError(f"no form {form!r}: there are {', '.join(CODES)}")
    if weight.dtype != torch.bfloat16 or weight.dim() != 2 or weight.numel() == 0:
        return None
    weight = weight.detach().contiguous()
    palette, escapes = _palette(weight, CODES[form])
    tiles = tiles_of(weight.shape)
    size = tiles * (TILE_BYTES[form] + 4) + 4 * -(-tiles // 4) + 2 * _room(escapes)
    if size > most * weight.nbytes or escapes > _MOST:
        return None
    lut = torch.full((128,), 255, dtype=torch.uint8)
    lut[list(palette)] = torch.arange(CODES[form], dtype=torch.uint8)
    made = _Made(weight, form, palette, lut.to(weight.device), escapes)
    for rows in slabs(weight.shape):
        made.add(rows)
    return made.weight()


def tiles_of(shape: tuple[int, int] | torch.Size) -> int:
    """How many tiles a matrix of `shape` has."""
    return -(-shape[0] // ROWS) * -(-shape[1] // COLUMNS)


def slabs(shape: tuple[int, int] | torch.Size) -> Iterator[slice]:
    """Rows to be treated at a time: a multiple of 16, but for the last."""
    step = max(1, _SLAB // max(shape[1], COLUMNS) // ROWS) * ROWS
    return (slice(at, min(at + step, shape[0])) for at in range(0, shape[0], step))


def _bytes(weight: torch.Tensor) -> torch.Tensor:
    """The two bytes of each weight, the low one first: uint8 [N, K, 2], no copy."""
    return weight.view(torch.uint8).view(*weight.shape, 2)


def _palette(weight: torch.Tensor, size: int) -> tuple[tuple[int, ...], int]:
    """The commonest upper values, ascending, and how many escapes they leave, with the columns that fill up tiles."""
    counts = torch.zeros(128, dtype=torch.int64)
    for rows in slabs(weight.shape):
        counts += torch.bincount((_bytes(weight[rows])[..., 1] & 127).flatten(), minlength=128).cpu()
    counts[0] += weight.shape[0] * (-weight.shape[1] % COLUMNS)
    chosen = torch.sort(counts, descending=True, stable=True).indices[:size].sort().values
    return tuple(chosen.tolist()), int(counts.sum() - counts[chosen].sum())


def _room(escapes: int) -> int:
    """How long the list of escapes is: the kernel reads eight at a time."""
    return max(8, -(-escapes // 8) * 8)


def tiled(values: torch.Tensor) -> torch.Tensor:
    """From rows [16 n, 64 k] to tiles [n k, 32 lanes, 32 weights]."""
    n, k = values.shape[0] // ROWS, values.shape[1] // COLUMNS
    return values.view(n, 2, 8, k, 2, 4, 2, 4).permute(0, 3, 2, 5, 4, 6, 1, 7).reshape(n * k, 32, 32)


def rowed(values: torch.Tensor, k: int) -> torch.Tensor:
    """From tiles [n k, 32 lanes, 32 weights] to rows [16 n, 64 k]."""
    n = values.shape[0] // k
    return values.view(n, k, 8, 4, 2, 2, 2, 4).permute(0, 6, 2, 1, 4, 3, 5, 7).reshape(n * ROWS, k * COLUMNS)


class _Made:
    """A packed weight that is being made, slab by slab."""

    def __init__(
        self, weight: torch.Tensor, form: str, palette: tuple[int, ...], lut: torch.Tensor, escapes: int
    ) -> None:
        self.source, self.form, self.palette, self.lut = weight, form, palette, lut
        tiles, device = tiles_of(weight.shape), weight.device
        self.tiles = torch.empty(tiles, TILE_BYTES[form], dtype=torch.uint8, device=device)
        self.counts = torch.empty(tiles, 2, dtype=torch.int64, device=device)
        self.escapes = torch.zeros(_room(escapes), dtype=torch.int16, device=device)
        self.tile = self.escape = 0

    def add(self, rows: slice) -> None:
        """Pack some rows."""
        low, high = self._tiles(rows, 0), self._tiles(rows, 1)
        upper = high & 127
        codes = self.lut.index_select(0, upper.flatten().int()).view(upper.shape)
        odd = (codes == 255).view(-1, 32, 2, 16).transpose(1, 2).contiguous()  # [tiles, half, lane, weight]
        upper = upper.view(-1, 32, 2, 16).transpose(1, 2)
        to = slice(self.tile, self.tile + len(codes))
        self.counts[to] = odd.sum(dim=(2, 3))
        place = odd.flatten().nonzero().squeeze(1)
        found = (place & 511) | upper[odd].long() << 9
        self.escapes[self.escape : self.escape + len(found)] = found.to(torch.int16)
        codes.masked_fill_(codes == 255, 0)
        self.tiles[to, :512], self.tiles[to, 512:1024] = low[..., :16].flatten(1), low[..., 16:].flatten(1)
        self.tiles[to, 1024:] = {"p3": _codes3, "p4": _codes4}[self.form](codes, high >> 7)
        self.tile, self.escape = to.stop, self.escape + len(found)

    def _tiles(self, rows: slice, byte: int) -> torch.Tensor:
        """A byte of some rows' weights in tiles: past the last column 0, past the last row what has a code."""
        part = _bytes(self.source[rows])[..., byte]
        n, k = part.shape
        if n % ROWS or k % COLUMNS:
            whole = part.new_full((-(-n // ROWS) * ROWS, -(-k // COLUMNS) * COLUMNS), self.palette[0])
            whole[:n, :k] = part
            whole[:n, k:] = 0
            part = whole
        return tiled(part.contiguous())

    def weight(self) -> PackedWeight:
        """What was packed, with the index of its escapes."""
        counts = self.counts.sum(dim=1)
        before = counts.cumsum(0) - counts
        base = before[::4]
        place = before - base.repeat_interleave(4)[: len(before)]
        index = self.counts[:, 0] | self.counts[:, 1] << 10 | place << 20
        shape = (self.source.shape[0], self.source.shape[1])
        return PackedWeight(
            self.form, shape, self.palette, self.tiles, index.to(torch.int32), base.to(torch.int32), self.escapes
        )


def _codes4(codes: torch.Tensor, signs: torch.Tensor) -> torch.Tensor:
    """Codes and signs [tiles, lane, weight] of p4 as bytes [tiles, 512]."""
    code, sign = codes.view(-1, 32, 4, 8), signs.view(-1, 32, 4, 8)
    return (code[..., 0::2] | sign[..., 4:] << 3 | code[..., 1::2] << 4 | sign[..., :4] << 7).flatten(1)


def _codes3(codes: torch.Tensor, signs: torch.Tensor) -> torch.Tensor:
    """Codes and signs [tiles, lane, weight] of p3 as bytes [tiles, 384]."""
    code = codes.view(-1, 32, 2, 2, 8)  # [.., u, 8i, n]
    first, second = code[..., 0, :], code[..., 1, :]
    planes = first[..., 0::2] | second[..., 0::2] << 2 | first[..., 1::2] << 4 | second[..., 1::2] << 6
    sign = signs.view(-1, 32, 8, 4)
    packed = sign[:, :, 0].clone()
    for q in range(1, 8):
        packed |= sign[:, :, q] << q
    return torch.cat([planes.transpose(1, 2).flatten(1), packed.flatten(1)], dim=1)
