"""RazorAttention: a few retrieval heads keep everything; the others keep sinks and a local window.

Heads are found without data. K random tokens are repeated four times and the model reads them once. Over the tokens
that have been there before, for each query head:

    echo score       attention paid to the earlier copies of the token itself
    induction score  attention paid to the tokens right after those

The best `induction` share of all query heads by the one score and the best `echo` share by the other are retrieval
heads; a key-value head is one if any of its query heads is. Of N tokens the other heads keep the sinks and the last
N / 5; what they forget leaves its mean behind (tcw/kv/stores/compensated.py). Tang et al., RazorAttention: Efficient KV
Cache Compression Through Retrieval Heads, ICLR 2025, https://arxiv.org/abs/2407.15891, sections 3.2 and 3.3.

Where we differ: 128 random tokens, not 2500; a local head keeps at least sinks and window, not 4000 tokens; what local
heads keep may be chosen by another method's scores. The paper's rule for ALiBi (section 3.1) is not here: heads are
told apart by their measured attention, whatever the positions are. Ours too:

- `ratio=` sets a budget: of the text a share l = `local` stays in local heads (a quarter of the ratio if not given),
  and so many key-value heads are retrieval heads, f of all, as f + (1-f)·l <= ratio allows; rounding's rest goes to l.
  The paper's shares give no order to go by. Ours is the product of a head's two ranks: a head that does both well, or
  one very well, comes early.
- `ranking=recall` multiplies that by the square of a third rank: by the loss on questions about a text when that head
  alone becomes local (tcw/kv/_recall.py).

Calibration: as said. The text is only used by `ranking=recall`, which needs a tokenizer too, and by some
`score`s.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from tcw.errors import UsageError
from tcw.kv import AttentionCall, Group, KVMethod, LayerShape, Scorer
from tcw.kv.stores import Store
from tcw.kv.stores.compensated import Compensated
from tcw.kv.streaming_llm import Recency
from tcw.methods import build, option

if TYPE_CHECKING:
    from collections.abc import Callable

    from tcw.kv.calibrate import Session

PAPER_LOCAL = 0.2
"""Of the tokens seen, what the paper's local heads keep (1/C with C = 5)."""
REPEATS = 4
_ROWS = 32  # queries whose attention is held at a time
_THEIRS = "local."  # before the names of the local scorer's tensors


@dataclass(frozen=True)
class RazorAttention(KVMethod):
    """Keep everything in retrieval heads, found by calibration, and a local window in all others."""

    paper: ClassVar[str] = "arXiv 2407.15891"
    needs_calibration: ClassVar[bool] = True
    wraps: ClassVar[bool] = True

    ratio: float = option(0.0, "share of the tokens seen to keep, over all heads; 0: as the two shares below make it")
    induction: float = option(0.14, "share of query heads that are retrieval heads by their induction score")
    echo: float = option(0.01, "and by their echo score")
    local: float = option(0.0, "share of the tokens seen that local heads keep; from 1 on: so many tokens")
    ranking: str = option("copying", "with a ratio, heads go by: copying, or also recall", ("copying", "recall"))
    score: str = option("recency", "which tokens local heads keep: recency, or a method that scores")
    compensation: bool = option(True, "let the mean of what a local head forgets stand for it")
    probe: int = option(128, "random tokens that are repeated to find the heads; the paper takes 2500")
    sinks: int = option(4, "first tokens that are always kept")
    window: int = option(32, "newest tokens that are always kept")
    interval: int = option(32, "when generating, forget this many at a time")

    def __post_init__(self) -> None:
        if not (0 <= self.ratio <= 1 and 0 <= self.induction <= 1 and 0 <= self.echo <= 1):
            raise ValueError("`ratio`, `induction` and `echo` are between 0 and 1")
        if self.local < 0 or (self.ratio and self.local >= self.ratio):
            raise ValueError(f"`local` is 0 or more and less than `ratio`, not {self.local}")
        if self.ranking == "recall" and not self.ratio:
            raise ValueError("`ranking=recall` needs a `ratio`: it puts heads in an order, and says not where to stop")
        if self.probe < 2 or self.sinks < 0 or min(self.window, self.interval) < 1:
            raise ValueError("`probe` is 2 or more, `sinks` 0 or more, `window` and `interval` 1 or more")
        if self.score != "recency" and type(self._other).scorer is KVMethod.scorer:
            raise ValueError(f"`{self.score}` does not score tokens")

    @cached_property
    def _other(self) -> KVMethod:
        """The method whose scores choose what local heads keep."""
        shared = {"sinks": self.sinks, "window": self.window, "interval": self.interval}
        method = build(self.score, shared)
        if not isinstance(method, KVMethod):
            raise ValueError(f"`{self.score}` is not a KV policy")
        return method

    def reads_text(self) -> bool:
        """Only for questions in words, or as the local scorer does: copying is measured on random tokens."""
        return self.ranking == "recall" or (self.score != "recency" and self._other.reads_text())

    @property
    def needs_rope(self) -> bool:  # type: ignore[override]
        """As the local scorer does."""
        return self.score != "recency" and self._other.needs_rope

    def check(self, layers: tuple[LayerShape, ...]) -> None:
        """Refuse layers that differ in their heads, and what the local scorer refuses."""
        if len({(layer.heads, layer.kv_heads) for layer in layers}) > 1:
            raise UsageError(
                "the full-attention layers of this model differ in their numbers of heads",
                "use a policy that treats all heads alike, such as `snapkv` or `kivi`",
            )
        if self.score != "recency":
            self._other.check(layers)

    def groups(self, layer: LayerShape, tensors: dict[str, Tensor]) -> tuple[Group, ...]:
        """Retrieval heads, which keep everything, and local heads; one group where there are none of the others."""
        chosen = self.retrieval(layer, tensors)
        local = tuple(head for head in range(layer.kv_heads) if head not in chosen)
        share = self._local_share(layer)

        def limit(seen: int) -> int:
            wanted = round(share) if self.local >= 1 else round(share * seen)
            return min(seen, max(self.sinks + self.window, wanted))

        return tuple(g for g in (Group(chosen), Group(local, limit)) if g.heads)

    def retrieval(self, layer: LayerShape, tensors: dict[str, Tensor]) -> tuple[int, ...]:
        """The retrieval heads among a layer's key-value heads."""
        if self.ratio:
            chosen = _ranks(self._order(layer, tensors)) <= self._wanted(layer)
        else:
            chosen = torch.zeros(layer.count * layer.heads, dtype=torch.bool)
            for name, share in (("induction", self.induction), ("echo", self.echo)):
                chosen |= _ranks(-tensors[name]) <= round(share * chosen.numel())
            chosen = chosen.view(layer.count * layer.kv_heads, -1).any(1)
        return tuple(chosen.view(layer.count, -1)[layer.depth].nonzero().flatten().tolist())

    def _order(self, layer: LayerShape, tensors: dict[str, Tensor]) -> Tensor:
        """Lower for key-value heads that come earlier: float64 [layers · G], the logarithm of a product of ranks."""
        order = torch.zeros(layer.count * layer.kv_heads, dtype=torch.float64)
        for name in ("induction", "echo"):
            order += _ranks(-tensors[name].view(len(order), -1).amax(1)).log()
        if self.ranking == "recall":
            order += 2 * _ranks(-tensors["damage"]).log()
        return order

    def _wanted(self, layer: LayerShape) -> int:
        """With a budget: how many key-value heads of all layers are retrieval heads."""
        local = self.local or self.ratio / 4
        return math.floor((self.ratio - local) / (1 - local) * layer.count * layer.kv_heads + 1e-6)

    def _local_share(self, layer: LayerShape) -> float:
        if not self.ratio:
            return self.local or PAPER_LOCAL
        whole = self._wanted(layer) / (layer.count * layer.kv_heads)
        return (self.ratio - whole) / (1 - whole) if whole < 1 else 1.0

    def scorer(self, layer: LayerShape, group: Group, tensors: dict[str, Tensor]) -> Scorer | None:
        """For local heads alone: the others forget nothing."""
        if not _is_local(group):
            return None
        if self.score == "recency":
            return Recency()
        theirs = {key.removeprefix(_THEIRS): t for key, t in tensors.items() if key.startswith(_THEIRS)}
        return self._other.scorer(layer, group, theirs)

    def store(
        self, layer: LayerShape, group: Group, tensors: dict[str, Tensor], inner: "Callable[[], Store]"
    ) -> "Callable[[], Store] | None":
        """Local heads compensate for what they forget, unless their store does something of the kind itself."""
        if not self.compensation or not _is_local(group):
            return None

        def make() -> Store:
            made = inner()
            return made if made.folds else Compensated(made)

        return make

    def calibrate(self, session: "Session") -> dict[str, Tensor]:
        """Find the retrieval heads.

        Returns:
            `induction` and `echo`, float32 [layers, H]; `damage`, float32 [layers, G], in nats, where asked for; and
            what the local scorer needs, its names after `local.`.
        """
        found = copying(session, self.probe)
        if self.ranking == "recall":
            from tcw.kv._recall import damages

            found["damage"] = damages(session, self.sinks, self.window)
        if self.score != "recency":
            found |= {_THEIRS + key: tensor for key, tensor in self._other.calibrate(session).items()}
        return found

    def outline(self, layers: tuple[LayerShape, ...]) -> dict[str, Tensor]:
        """Any heads: by `ratio` they are as many as will be found, by shares about as many."""
        generator = torch.Generator().manual_seed(0)
        heads = {"induction": layers[0].heads, "echo": layers[0].heads}
        if self.ranking == "recall":
            heads["damage"] = layers[0].kv_heads
        found = {name: torch.rand(len(layers), n, generator=generator) for name, n in heads.items()}
        if self.score != "recency":
            found |= {_THEIRS + key: tensor for key, tensor in self._other.outline(layers).items()}
        return found


def _is_local(group: Group) -> bool:
    return group.limit(1) is not None


def _ranks(scores: Tensor) -> Tensor:
    """1 for the lowest, and so on: float64 [all]."""
    return scores.flatten().argsort(stable=True).argsort().double() + 1


def copying(session: "Session", probe: int) -> dict[str, Tensor]:
    """Measure how much each query head looks at earlier copies of a token, and at the tokens after them.

    Returns:
        `induction` and `echo`, float32 [layers, H]: mean attention over the tokens that have an earlier copy.
    """
    plain = plain_tokens(session.model)
    drawn = torch.randperm(len(plain), generator=torch.Generator().manual_seed(session.seed))[:probe]
    probe, tokens = len(drawn), plain[drawn].repeat(REPEATS)[None]
    found = {name: [torch.empty(0)] * len(session.layers) for name in ("induction", "echo")}

    def look(layer: LayerShape, call: AttentionCall) -> None:
        n = call.queries.shape[2]
        at = torch.arange(n, device=call.queries.device)
        sums = torch.zeros(2, layer.heads, device=at.device)
        for rows in at[probe:].split(_ROWS):
            attention = call.attention(rows)[0].flatten(0, 1)  # [H, m, n]
            behind = rows[:, None] - at
            copies = (behind > 0) & (behind % probe == 0)
            after = (behind >= 0) & ((behind + 1) % probe == 0) & (at > 0)
            sums += torch.stack([(attention * seen).sum((1, 2)) for seen in (after, copies)])
        for name, total in zip(found, sums.cpu(), strict=True):
            found[name][layer.depth] = total / (n - probe)

    session.watch(look, tokens)
    return {name: torch.stack(rows) for name, rows in found.items()}


def plain_tokens(model: Any) -> Tensor:
    """The vocabulary without begin, end and padding: int64 [tokens]."""
    config = model.config.get_text_config(decoder=True)
    special: set[int] = set()
    for owner in (config, getattr(model, "generation_config", None)):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            ids = getattr(owner, name, None)
            special |= set(ids if isinstance(ids, list) else [] if ids is None else [ids])
    return torch.tensor([i for i in range(config.vocab_size) if i not in special])
