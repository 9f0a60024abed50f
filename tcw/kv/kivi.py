"""KIVI: keys rounded channel by channel, values token by token, with a window of exact tokens.

    q = round((x - z) / s),   x̂ = s·q + z,   z = min X,   s = (max X - min X) / (2^b - 1)

over groups X of `group_size` numbers: of a key, those of one channel in so many tokens; of a value, those of one token
in so many channels. A few channels of keys are large in every token: a step of their own keeps them from spoiling the
others. Liu et al., KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache, ICML 2024,
https://arxiv.org/abs/2402.02750, section 3.

Where we differ: 4 bits and a window of 32 are the defaults (the paper: 2 bits, 128); s and z are bfloat16, rounded so
that |x̂ - x| <= s/2; what is rounded stays so. When generating, tokens leave the window in groups of `group_size`.

- `layout=cst` is ZipCache's way with values, for keys too: each channel is divided by c = sqrt(max |x|), measured on
  the first tokens that age, then a token of a head is one group. He et al., https://arxiv.org/abs/2405.14256, 3.2.
- `dtype=fp8` rounds to E4M3 with one scale a head instead; bits and groups then say nothing.

A number costs b + 32 / `group_size` bits (`kivi`), b + 32 / D and 16 a channel (`cst`), or 8. Calibration: none.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tcw.kv import Group, LayerShape
from tcw.kv._widths import Quantising
from tcw.kv.stores import Store
from tcw.kv.stores._frames import LARGEST, Frame
from tcw.kv.stores._grids import Grid
from tcw.kv.stores.float8 import Float8Store
from tcw.kv.stores.integers import IntegerStore
from tcw.methods import option


@dataclass(frozen=True)
class Kivi(Quantising):
    """Hold keys and values in 1 to 8 bits: keys by channel, values by token."""

    paper: ClassVar[str] = "arXiv 2402.02750"

    group_size: int = option(32, "tokens, or channels, that share a scale")
    layout: str = option("kivi", "keys by channel and values by token, or both by token", choices=("kivi", "cst"))
    dtype: str = option("int", "integers of so many bits, or 8-bit floats", choices=("int", "fp8"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group_size < 1:
            raise ValueError("`group_size` is 1 or more")

    def store(
        self, layer: LayerShape, group: Group, tensors: dict[str, Tensor], inner: Callable[[], Store]
    ) -> Callable[[], Store]:
        """Codes and scales."""
        if self.dtype == "fp8":
            return Float8Store
        key_bits, value_bits = self.widths(group)
        if self.layout == "cst":
            by_token = Frame(scale=LARGEST)
            return lambda: IntegerStore(Grid(key_bits), Grid(value_bits), by_token, by_token)
        keys = Grid(key_bits, tokens=self.group_size, channels=1)
        return lambda: IntegerStore(keys, Grid(value_bits, channels=self.group_size))
