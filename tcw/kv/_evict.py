"""What methods share that forget tokens: the budget, and how it becomes tokens a head.

A budget is `ratio=` of the tokens seen, `tokens=` a head, or `bytes=` of the whole cache a sequence (what dense BF16
keys and values would take; a quantised store makes less of it). `ratio` follows the text as it grows.
"""

from dataclasses import dataclass

from tcw.errors import UsageError
from tcw.kv import Group, KVMethod, LayerShape
from tcw.methods import option
from tcw.units import parse_size

DEFAULT_RATIO = 0.5


@dataclass(frozen=True)
class Evicting(KVMethod):
    """Base of methods that keep so many tokens a head; each layer has one group unless a method says otherwise."""

    ratio: float = option(0.0, "share of the tokens seen to keep; 0.5 where no budget is given")
    tokens: int = option(0, "tokens to keep, a head")
    bytes: str = option("", "bytes to keep, a sequence, of all layers: 200MB")
    sinks: int = option(4, "first tokens that are always kept")
    window: int = option(32, "newest tokens that are always kept")
    interval: int = option(32, "when generating, forget this many at a time")

    def __post_init__(self) -> None:
        given = [name for name in ("ratio", "tokens", "bytes") if getattr(self, name)]
        if len(given) > 1:
            raise ValueError(f"give one budget, not {' and '.join(f'`{g}`' for g in given)}")
        if not 0 <= self.ratio <= 1:
            raise ValueError(f"`ratio` is between 0 and 1, not {self.ratio}")
        if min(self.tokens, self.sinks) < 0 or min(self.window, self.interval) < 1:
            raise ValueError("`tokens` and `sinks` are 0 or more, `window` and `interval` 1 or more")
        if self.tokens and self.tokens < self.sinks + self.window + 1:
            raise ValueError(
                f"a budget of {self.tokens} tokens has no room beside {self.sinks} sinks and a window of {self.window}"
            )
        if self.bytes:
            parse_size(self.bytes)

    def check(self, layers: tuple[LayerShape, ...]) -> None:
        """Refuse a budget in bytes that sinks and window alone exceed."""
        if self.bytes and self.mean_tokens(1 << 40, layers[0]) <= self.sinks + self.window:
            raise UsageError(
                f"{self.bytes} have no room beside {self.sinks} sinks and a window of {self.window} tokens",
                "give a larger budget, or fewer `sinks` or `window`",
            )

    def mean_tokens(self, seen: int, layer: LayerShape) -> int:
        """Tokens a head, averaged over the model, once `seen` tokens were seen; never fewer than sinks and window."""
        least = self.sinks + self.window
        if self.tokens:
            wanted = self.tokens
        elif self.bytes:
            a_token = 2 * layer.count * layer.kv_heads * (layer.head_dim + layer.value_dim)
            wanted = parse_size(self.bytes) // a_token
        else:
            wanted = round((self.ratio or DEFAULT_RATIO) * seen)
        return min(seen, max(least, wanted))

    def groups(self, layer: LayerShape, tensors: dict) -> tuple[Group, ...] | None:
        """All heads in one group."""
        return (Group(tuple(range(layer.kv_heads)), lambda seen: self.mean_tokens(seen, layer)),)
