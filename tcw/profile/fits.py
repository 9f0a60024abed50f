"""What fits at which context: weights + cache + one forward pass, against the memory that is free.

    need(tokens) = weights as stored + scratch of the largest decoded block + KV(tokens) + activations(tokens)

The activations are those of a prompt read in one go (the largest forward pass there is), for one layer at a time:
three hidden states and the larger of mlp (gate, up, product) and attention (queries rotated, keys, values), plus the
logits of the last position in 32 bits. Attention scores are not counted: fused attention never writes them down. Of
a mixture of experts one expert is counted. 5 % of the free memory is left for everything else.
"""

from dataclasses import dataclass
from typing import Any

from tcw.profile.kv import KVCache, head_size, kv_heads, numbers

HEADROOM = 0.05
_MOST_TOKENS = 1 << 40


@dataclass(frozen=True)
class Forward:
    """Elements that one forward pass holds: for every token, and once for a sequence."""

    per_token: int
    per_sequence_bytes: int
    element_bytes: int = 2

    def bytes_at(self, tokens: int, batch: int = 1) -> int:
        """Bytes at work while `batch` prompts of `tokens` tokens are read."""
        return batch * (tokens * self.per_token * self.element_bytes + self.per_sequence_bytes)


def forward(text: Any, element_bytes: int = 2) -> Forward:
    """Estimate from the configuration of the text model; 0 for what it does not say."""
    known = numbers(text)
    hidden, heads = known.get("hidden_size", 0), known.get("num_attention_heads", 0)
    mlp = 3 * _mlp_width(text, hidden)
    attention = head_size(text) * (4 * heads + 2 * kv_heads(text)) if heads else 2 * hidden
    vocabulary = getattr(text, "vocab_size", 0) or 0
    # the logits twice: in the model's dtype and in 32 bits
    return Forward(3 * hidden + max(mlp, attention), vocabulary * (4 + element_bytes), element_bytes)


def _mlp_width(text: Any, hidden: int) -> int:
    for name in ("intermediate_size", "ffn_dim", "d_ff", "n_inner", "ffn_hidden_size", "decoder_ffn_dim"):
        value = getattr(text, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return 4 * hidden


@dataclass(frozen=True)
class Budget:
    """One way to hold a model on a device: weights and scratch in bytes, and what grows with the context."""

    weights: int
    scratch: int
    kv: KVCache
    forward: Forward
    free: int
    batch: int = 1

    def need(self, tokens: int) -> int:
        """Bytes needed at `tokens` tokens of context."""
        return (
            self.weights
            + self.scratch
            + self.kv.bytes_at(tokens, self.batch)
            + self.forward.bytes_at(tokens, self.batch)
        )

    def fits(self, tokens: int) -> bool:
        """Say whether `tokens` tokens of context fit."""
        return self.need(tokens) <= self.free * (1 - HEADROOM)

    def max_context(self, limit: int | None = None) -> int:
        """The longest context that fits, at most `limit` tokens (what the model was made for); 0 if nothing does."""
        low, high = 0, limit or _MOST_TOKENS
        if self.fits(high):
            return high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.fits(middle) else (low, middle)
        return low
