"""What is done to keys or values before they are rounded, so that few bits hold them: y = H S ((Rᵀx - μ) / c).

    R  the rotation of RoPE at the token's position, undone: keys then lie around a fixed centre
    μ  that centre, the mean of the first tokens that come; constant offsets cost no levels
    c  a size for each channel, measured on them: sqrt(max |x|), or the root of their root mean square about μ, σ
    H  orthonormal Hadamard matrices, on blocks of the largest power of two that divides D: they make elements alike,
       so that one step suits them all
    S  signs for each channel, other ones at each position

R, μ, c and HS are optional. μ and c stay as they are once set, so that no token is ever rounded twice. With H, rounding
errors are alike in all elements of y, proportional to Σ σ²/c², and to c in those of x; c = sqrt(σ) makes the sum of
their squares the least possible: Σ c² · Σ σ²/c² >= (Σ σ)². Without S, like tokens would have like errors, which do not
average out where attention looks at many tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tcw.kv.rope import Rope
from tcw.kv.stores import pick
from tcw.kv.stores._grids import hadamard

LARGEST, SPREAD = "largest", "spread"
_PERIOD = 1 << 16  # positions are kept modulo this, in 16 bits: what is undone by p is redone by p, whatever p is
_WORD = 16  # signs that are drawn together
_32 = 0xFFFFFFFF
_LEAST = 1 / 16  # of the head's mean: a channel that is constant at first may vary later


@dataclass(frozen=True)
class Frame:
    """Which parts there are.

    Attributes:
        centre: subtract μ.
        scale: c is measured by `LARGEST` or `SPREAD`; "": there is none.
        turn: multiply with H S.
        rope: undo this rotation, if it fits into D.
    """

    centre: bool = False
    scale: str = ""
    turn: bool = False
    rope: Rope | None = None

    @property
    def places(self) -> bool:
        """Whether it takes a token's position to undo it."""
        return self.turn or self.rope is not None


class Framed:
    """A frame and what it has measured: counted in the cache's bytes.

    `leader` holds the positions of the same tokens, if it needs them too.
    """

    def __init__(self, frame: Frame, leader: "Framed | None" = None) -> None:
        self.frame = frame
        self.centre: Tensor | None = None  # bfloat16 [B, G, 1, D]
        self.scale: Tensor | None = None  # bfloat16 [B, G, 1, D]
        self._leader = leader if leader is not None and leader.frame.places else None
        self._places: Tensor | None = None  # int16 [B, 1 or G, n]
        self._started = False

    @property
    def places(self) -> Tensor | None:
        """Positions modulo 2^16, less 2^15: int16 [B, 1 or G, n]; None where they are not needed."""
        return self._places if self._leader is None else self._leader.places

    def enter(self, x: Tensor, positions: Tensor) -> Tensor:
        """Take in tokens x [B, G, m, D] at `positions` [B, 1 or G, m] (-1: padding) and return y, float32."""
        x = x.detach().float()  # rounding has no gradient
        new = (positions % _PERIOD - _PERIOD // 2).to(torch.int16)
        if self.frame.places and self._leader is None:
            self._places = new.clone() if self._places is None else _joined(self._places, new)
        if self._rotates(x.shape[-1]):
            x = self._rotated(x, new, -1)
        if not self._started:
            self._measure(x, positions >= 0)
        if self.centre is not None:
            x = x - self.centre.float()
        if self.scale is not None:
            x = x / self.scale.float()
        return hadamard(x * signs(new, x.shape[-1])) if self.frame.turn else x

    def leave(self, y: Tensor) -> Tensor:
        """Undo `enter` for all tokens held: y float32 [B, G, n, D] to x, float32."""
        places = self.places
        if self.frame.turn and places is not None:
            y = hadamard(y) * signs(places, y.shape[-1])
        if self.scale is not None:
            y = y * self.scale.float()
        if self.centre is not None:
            y = y + self.centre.float()
        if self._rotates(y.shape[-1]) and places is not None:
            y = self._rotated(y, places, 1)
        return y

    def keep(self, index: Tensor) -> None:
        """Forget all tokens but those numbered `index`, int64 [B, G, m]."""
        if self._places is not None:
            self._places = pick(self._places, index)

    def select_rows(self, rows: Tensor) -> None:
        """Keep the sequences `rows`, int64 [B']."""
        held = (self._places, self.centre, self.scale)
        self._places, self.centre, self.scale = (None if t is None else t.index_select(0, rows) for t in held)

    def tensors(self) -> list[Tensor]:
        """Everything held."""
        return [t for t in (self._places, self.centre, self.scale) if t is not None]

    def _rotates(self, dim: int) -> bool:
        return self.frame.rope is not None and self.frame.rope.rotary_dim <= dim

    def _rotated(self, x: Tensor, places: Tensor, way: int) -> Tensor:
        assert self.frame.rope is not None
        return self.frame.rope.turn(x, way * (places.int() + _PERIOD // 2))

    def _measure(self, x: Tensor, real: Tensor) -> None:
        """Set μ and c by the real tokens of x."""
        self._started = True
        weight = real[..., None].float()
        count = weight.sum(2, keepdim=True).clamp_min(1.0)
        mean = (x * weight).sum(2, keepdim=True) / count
        if self.frame.centre:
            self.centre = mean.to(torch.bfloat16)
            x = x - self.centre.float()
        if self.frame.scale:
            if self.frame.scale == LARGEST:
                size = (x.abs() * weight).amax(2, keepdim=True)
            else:
                size = ((x * weight).square().sum(2, keepdim=True) / count).sqrt()
            size = torch.maximum(size, size.mean(-1, keepdim=True) * _LEAST)
            self.scale = torch.where(size > 0, size, 1.0).sqrt().to(torch.bfloat16)


def signs(places: Tensor, dim: int) -> Tensor:
    """Signs for `dim` channels that depend on the place alone, int16 [...]: float32 [..., dim]."""
    words = -(-dim // _WORD)
    mixed = places.long()[..., None] * words + torch.arange(words, device=places.device)
    for factor in (0x21F0AAAD, 0x735A2D97):  # below 2^31, so that no product leaves int64
        mixed = mixed & _32
        mixed = (mixed ^ (mixed >> 15)) * factor
    bits = mixed[..., None] >> torch.arange(16, 16 + _WORD, device=places.device)
    return (1 - 2 * (bits & 1)).flatten(-2)[..., :dim].float()


def _joined(held: Tensor, new: Tensor) -> Tensor:
    heads = max(held.shape[1], new.shape[1])
    return torch.cat([held.expand(-1, heads, -1), new.expand(-1, heads, -1)], 2)
