"""Hadamard: keys and values turned so that a token of a head needs a single step, and rounded to 2 to 4 bits.

    y = H S ((Rᵀx - μ) / c),   q = round(y / s + (2^b - 1) / 2),   x̂ = R(μ + c·S Hᵀ(s·(q - (2^b - 1) / 2)))

R is the rotation of RoPE at the token's position and μ the mean of each channel (both of keys alone), c = sqrt(σ), σ a
channel's root mean square about μ, both over the first tokens that age; S signs drawn for each position and channel, H
an orthonormal Hadamard matrix, s one of 255 steps, an eighth of an octave apart: the one with the least squared error.
Put together from

- Ashkboos et al., QuaRot, NeurIPS 2024, https://arxiv.org/abs/2404.00456, section 4: H on the heads of keys and values
  makes outliers of single channels disappear, so that b bits and a scale a token do;
- Hooper et al., KVQuant, NeurIPS 2024, https://arxiv.org/abs/2401.18079, section 3.2: keys before RoPE lie closer
  together. Their μ then costs no bits either.

Where we differ: QuaRot turns keys after RoPE, KVQuant has steps for channels and calibrates them. c, S, s in one byte,
and the search for s are ours. A number costs b + 8 / D bits; a token 16 bits more for its position, where a group's
heads hold the same tokens (a head each, where they do not). H is made of smaller blocks where D is no power of two,
R is left out where there is no RoPE. Values have no μ: it gave them errors that do not average out. The first tokens
of a text are unlike others, and are exact (`sinks`).

Where heads are divided into those that keep all and those that do not (`razorattention`), `local_bits` is for the
latter: what must be retrieved from far away needs more bits than what is only read in passing. Calibration: none.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tcw.kv import Group, LayerShape
from tcw.kv._widths import Quantising
from tcw.kv.stores import Store
from tcw.kv.stores._frames import SPREAD, Frame
from tcw.kv.stores._grids import Grid
from tcw.kv.stores._packing import WIDTHS
from tcw.kv.stores.integers import IntegerStore
from tcw.methods import option


@dataclass(frozen=True)
class Hadamard(Quantising):
    """Hold keys and values in 2 to 4 bits, made alike by a Hadamard rotation."""

    paper: ClassVar[str] = "arXiv 2404.00456"

    bits: int = option(3, "of a number", choices=WIDTHS)
    sinks: int = option(4, "first tokens that stay exact")
    unrotate: bool = option(True, "undo RoPE before keys are rounded")

    def store(
        self, layer: LayerShape, group: Group, tensors: dict[str, Tensor], inner: Callable[[], Store]
    ) -> Callable[[], Store]:
        """Codes, steps, and what is needed to turn back."""
        key_bits, value_bits = self.widths(group)
        keys, values = Grid(key_bits, symmetric=True), Grid(value_bits, symmetric=True)
        key_frame = Frame(centre=True, scale=SPREAD, turn=True, rope=layer.rope if self.unrotate else None)
        value_frame = Frame(scale=SPREAD, turn=True)
        return lambda: IntegerStore(keys, values, key_frame, value_frame)
