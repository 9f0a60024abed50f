"""From the rows of codes that an artifact stores to the words that the kernel reads, and from those to weights.

A group is what shares a scale: `group_size` columns of W, or all of a row. The words of a group hold nothing else, so
that a kernel meets one scale at a time whatever the sizes are; what is over at the end of a group is padding:

    words int32 [groups · words_per_group, N]        neighbours in memory are neighbours in N

    bits     31 ......... 16    15 .......... 0
    columns   k+2h-1 .. k+h      k+h-1 ..... k       h = 16 // bits codes a half: 8 of 2 bits, 5 of 3, 4 of 4, 2 of 8

Word w of group g holds columns g·group_size + w·2h onwards. Halves, because 16 bits fit into the mantissa of a float32
(see kernel.py), and because 3 bits then need no code that lies in two words: they take 3.2 bits. Codes are stored as
they are, 0..2^bits - 1. Scales and zeros are turned too, to [groups, N].
"""

from dataclasses import dataclass

import torch
from torch.nn.functional import pad

_SLAB = 1 << 24  # codes repacked at a time


@dataclass(frozen=True)
class Layout:
    """Where each code is. `columns` is K, `group_size` the columns of a full group (K where a row is one group)."""

    bits: int
    columns: int
    group_size: int

    @property
    def half(self) -> int:
        """Codes in half a word."""
        return 16 // self.bits

    @property
    def fields(self) -> int:
        """Codes in a word."""
        return 2 * self.half

    @property
    def groups(self) -> int:
        """Groups in a row of W."""
        return -(-self.columns // self.group_size)

    @property
    def words_per_group(self) -> int:
        """Words that a group's codes take in each column of `words`."""
        return -(-self.group_size // self.fields)

    @property
    def rows(self) -> int:
        """Rows of `words`; the last group of a row may be shorter, and then has fewer."""
        last = self.columns - (self.groups - 1) * self.group_size
        return (self.groups - 1) * self.words_per_group - (-last // self.fields)

    def shifts(self) -> list[int]:
        """The lowest bit of each code in a word."""
        return [16 * half + self.bits * i for half in range(2) for i in range(self.half)]


def layout_of(bits: int, columns: int, group_size: int) -> Layout:
    """The layout for rows of `columns` codes; a group size of 0, or more than a row, is the whole row.

    Raises ValueError for sizes that no tensor has.
    """
    if bits not in (2, 3, 4, 8) or columns < 1 or group_size < 0:
        raise ValueError(f"no layout for {columns} columns of {bits} bits in groups of {group_size}")
    return Layout(bits, columns, min(group_size, columns) or columns)


def repack(codes: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Turn stored codes into the kernel's words; done once, when a model is loaded.

    Args:
        codes: int32 [N, ceil(K·bits/32)], code i of a row in bits i·bits .. of the row; on the CPU.
        layout: of the result.

    Returns:
        int32 [layout.rows, N], contiguous.

    Raises:
        ValueError: the codes have another shape or dtype.
    """
    n, expected = codes.shape[0], -(-layout.columns * layout.bits // 32)
    if codes.dtype != torch.int32 or codes.shape != (n, expected):
        raise ValueError(f"codes are {codes.dtype} {list(codes.shape)}, not int32 [{n}, {expected}]")
    out = torch.empty(layout.rows, n, dtype=torch.int32)
    step = max(1, _SLAB // layout.columns)
    for at in range(0, n, step):
        out[:, at : at + step] = _pack(_unpack(codes[at : at + step], layout), layout).T
    return out


def turned(values: torch.Tensor) -> torch.Tensor:
    """Scales or zeros [N, groups] as the kernel reads them: [groups, N], contiguous."""
    return values.T.contiguous()


@dataclass(frozen=True)
class Weight:
    """A weight [N, K] as the kernel reads it.

    Attributes:
        words: int32 [layout.rows, N].
        scale: BF16, F16 or F32 [groups, N].
        zero: for the grid "zero": uint8 [groups, N], the codes that stand for 0; for "float": values of code 0, like
            `scale`; else None.
        layout: of the words.
        grid: "symmetric", "zero", "midrise" or "float": tcw/weights/_integer.py says what a code stands for.
    """

    words: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    layout: Layout
    grid: str

    def __post_init__(self) -> None:
        """Hold the shapes against the layout. Raises ValueError."""
        groups = (self.layout.groups, self.words.shape[-1])
        zero = self.scale if self.zero is None else self.zero
        if self.words.shape != (self.layout.rows, groups[1]) or self.scale.shape != groups or zero.shape != groups:
            raise ValueError(f"words {list(self.words.shape)}, scale {list(self.scale.shape)} and zero do not fit")
        if (self.zero is None) != (self.grid in ("symmetric", "midrise")):
            raise ValueError(f"the grid {self.grid!r} has {'no' if self.zero is not None else 'a'} zero")

    def rows(self, wanted: torch.Tensor) -> "Weight":
        """Some rows of W, by their numbers, int64 [n]: as an embedding looks them up."""
        zero = None if self.zero is None else self.zero[:, wanted]
        return Weight(self.words[:, wanted], self.scale[:, wanted], zero, self.layout, self.grid)

    def codes(self) -> torch.Tensor:
        """The codes of W transposed, uint8 [K, N]."""
        layout, n = self.layout, self.words.shape[1]
        field = torch.arange(layout.fields, dtype=torch.int32, device=self.words.device)  # no copy from the host
        shifts = field % layout.half * layout.bits + field // layout.half * 16
        words = pad(self.words, (0, 0, 0, layout.groups * layout.words_per_group - layout.rows))
        codes = (words.unsqueeze(1) >> shifts.view(1, -1, 1)).bitwise_and_((1 << layout.bits) - 1).to(torch.uint8)
        codes = codes.view(layout.groups, -1, n)[:, : layout.group_size]  # without the padding of each group
        return codes.reshape(-1, n)[: layout.columns]

    def dequantize(self) -> torch.Tensor:
        """W transposed, float32 [K, N], in plain torch, each weight computed as the stored format says."""
        weight, size = self.codes().to(torch.float32), self.layout.group_size
        for g in range(self.layout.groups):
            group, scale = weight[g * size : (g + 1) * size], self.scale[g].float()
            if self.grid == "float":
                group.mul_(scale).add_(self.zero[g].float())
            else:
                group.sub_(middle_of(self.layout.bits, self.grid) if self.zero is None else self.zero[g].float())
                group.mul_(scale)
        return weight


def middle_of(bits: int, grid: str) -> float:
    """The code, or half code, that stands for 0 on a grid without stored zeros."""
    return ((1 << bits) - 1) / 2 if grid == "midrise" else float(1 << (bits - 1))


def _unpack(codes: torch.Tensor, layout: Layout) -> torch.Tensor:
    """uint8 [n, K] from a slab of stored rows: eight codes are `bits` bytes, whatever the bits."""
    n, bits, mask = codes.shape[0], layout.bits, (1 << layout.bits) - 1
    stream = codes.contiguous().view(torch.uint8)
    eights = pad(stream, (0, -stream.shape[1] % bits)).view(n, -1, bits)
    fields = torch.empty(n, eights.shape[1], 8, dtype=torch.uint8)
    for i in range(8):
        byte, shift = divmod(i * bits, 8)
        value = eights[..., byte] >> shift
        if shift + bits > 8:
            value = value | eights[..., byte + 1] << (8 - shift)
        fields[..., i] = value & mask
    return fields.view(n, -1)[:, : layout.columns]


def _pack(codes: torch.Tensor, layout: Layout) -> torch.Tensor:
    """int32 [n, layout.rows] from uint8 codes [n, K]."""
    n, width = codes.shape[0], layout.words_per_group * layout.fields
    groups = pad(codes, (0, layout.groups * layout.group_size - layout.columns)).view(n, layout.groups, -1)
    fields = pad(groups, (0, width - layout.group_size)).view(n, -1, layout.fields)[:, : layout.rows]
    words = torch.zeros(n, layout.rows, dtype=torch.int32)
    for i, shift in enumerate(layout.shifts()):
        words |= fields[..., i].to(torch.int32) << shift
    return words
