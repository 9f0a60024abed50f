"""What the kernel reads: keys or values as whole numbers of a few bits, token by token, and what the numbers stand for.

    x[t, d] = (minimum[t // tokens, d // channels] + step[t // tokens, d // channels] · code[t, d]) · scale[d]

`tokens` tokens and `channels` channels share a minimum and a step. Keys with a pair for each channel of 32 tokens have
tokens = 32, channels = 1; values with a pair for each 32 channels of a token have tokens = 1, channels = 32. Code d of
a token lies in the bits d·bits .. of its bytes, low bits first: codes of 3 bits may lie in two bytes.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

BITS = (1, 2, 3, 4, 8)


@dataclass(frozen=True)
class Packed:
    """Keys or values of B sequences, G heads and n tokens, in `width` channels.

    Attributes:
        codes: uint8 [B, G, n, ceil(width·bits / 8)].
        minimum, step: floats of one dtype [B, 1 or G, blocks, ceil(width / channels)]; 1: for all heads.
        bits: of a code, 1, 2, 3, 4 or 8.
        width: channels of a token.
        tokens, channels: that share a minimum and a step: powers of two, or no less than there are.
        blocks: the row of `minimum` and `step` of each token, an integer [1 or B, 1 or G, n], or None: t // tokens.
        scale: what each channel is multiplied with besides, a float [B, G, 1, width], or None.
    """

    codes: Tensor
    minimum: Tensor
    step: Tensor
    bits: int
    width: int
    tokens: int
    channels: int
    blocks: Tensor | None = None
    scale: Tensor | None = None

    def __post_init__(self) -> None:
        """Hold the shapes against each other. Raises ValueError."""
        batch, heads, n, size = self.codes.shape
        rows = -(-n // self.tokens) if self.blocks is None else self.minimum.shape[2]
        columns = -(-self.width // self.channels)
        if self.bits not in BITS or self.codes.dtype != torch.uint8 or size != -(-self.width * self.bits // 8):
            raise ValueError(
                f"{self.codes.dtype} {list(self.codes.shape)} are no {self.width} codes of {self.bits} bits"
            )
        for what in (self.minimum, self.step):
            if what.shape not in ((batch, heads, rows, columns), (batch, 1, rows, columns)):
                raise ValueError(f"minima or steps are {list(what.shape)}, not {[batch, heads, rows, columns]}")
        if self.minimum.shape != self.step.shape or self.minimum.dtype != self.step.dtype:
            raise ValueError("minima and steps differ in shape or dtype")
        each = (batch, heads, n)
        if self.blocks is not None and any(s not in (1, m) for s, m in zip(self.blocks.shape, each, strict=True)):
            raise ValueError(f"blocks are {list(self.blocks.shape)}, not {list(each)}")
        if self.scale is not None and self.scale.shape != (batch, heads, 1, self.width):
            raise ValueError(f"channels are multiplied with {list(self.scale.shape)}")
        for shared, there in ((self.tokens, 0 if self.blocks is not None else n), (self.channels, self.width)):
            if shared < there and shared & (shared - 1):
                raise ValueError(f"{shared} tokens or channels share a step: not a power of two")

    def contiguous(self) -> "Packed":
        """The same, without gaps in memory."""
        return replace(self, **{name: t.contiguous() for name, t in vars(self).items() if isinstance(t, Tensor)})

    def unpack(self) -> Tensor:
        """The codes, uint8 [B, G, n, width]."""
        bit = torch.arange(self.width, device=self.codes.device) * self.bits
        byte, shift = bit // 8, (bit % 8).to(torch.int32)
        found = self.codes[..., byte].to(torch.int32) >> shift
        if self.bits == 3:  # what reaches into the next byte
            following = (byte + 1).clamp(max=self.codes.shape[-1] - 1)
            found = found | self.codes[..., following].to(torch.int32) << (8 - shift)
        return found.bitwise_and_((1 << self.bits) - 1).to(torch.uint8)

    def dequantize(self) -> Tensor:
        """Keys or values, float32 [B, G, n, width], in plain torch."""
        batch, heads, n, _ = self.codes.shape
        blocks = torch.arange(n, device=self.codes.device) // self.tokens if self.blocks is None else self.blocks.long()
        columns = torch.arange(self.width, device=self.codes.device) // self.channels
        row = blocks.expand(batch, heads, n)[..., None]
        minimum, step = (
            t.float()[..., columns].expand(-1, heads, -1, -1).gather(2, row.expand(-1, -1, -1, self.width))
            for t in (self.minimum, self.step)
        )
        x = minimum + step * self.unpack()
        return x if self.scale is None else x * self.scale.float()
