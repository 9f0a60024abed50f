"""What methods share that hold keys and values in a few bits: the widths, and which tokens stay exact."""

from dataclasses import dataclass

from tcw.kv import Group, KVMethod
from tcw.kv.stores._packing import WIDTHS
from tcw.methods import option


@dataclass(frozen=True)
class Quantising(KVMethod):
    """Base of methods that round every aged token and forget none."""

    bits: int = option(4, "of a number", choices=WIDTHS)
    key_bits: int = option(0, "of a key's number; 0: as `bits`", choices=(0, *WIDTHS))
    value_bits: int = option(0, "of a value's number; 0: as `bits`", choices=(0, *WIDTHS))
    local_bits: int = option(
        0, "of any number in heads that keep only part of the text; 0: as all", choices=(0, *WIDTHS)
    )
    sinks: int = option(0, "first tokens that stay exact")
    window: int = option(32, "newest tokens that stay exact")
    interval: int = option(32, "when generating, round this many at a time")

    def __post_init__(self) -> None:
        if self.sinks < 0 or self.window < 0:
            raise ValueError("`sinks` and `window` are 0 or more")
        if self.interval < 1:
            raise ValueError("`interval` is 1 or more")

    def widths(self, group: Group) -> tuple[int, int]:
        """Bits of a key's and of a value's number: heads that may forget need fewer than those that must retrieve."""
        if self.local_bits and group.limit(1) is not None:
            return self.local_bits, self.local_bits
        return self.key_bits or self.bits, self.value_bits or self.bits
