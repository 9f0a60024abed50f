"""How much recall depends on each key-value head: what a model forgets when that head alone sees a local window.

Facts are put into a text, one each, and the model is asked for them at its end. The damage of a head is by how much the
loss on the answers rises when that head, and no other, sees only the sinks and the last tokens of the text. Needs no
gradient. Ours, after the ablations by which Wu et al., Retrieval Head Mechanistically Explains Long-Context Factuality,
2024, https://arxiv.org/abs/2404.15574, confirm their heads: they mask heads, we shorten what they see.

Facts are in words: heads found by needles of random tokens serve copying, and miss some that questions need.
"""

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tcw.errors import UsageError
from tcw.kv import LayerShape
from tcw.kv.attention import Attention, body_of, install
from tcw.kv.cache import PolicyCache
from tcw.kv.layer import PolicyLayer

if TYPE_CHECKING:
    from tcw.kv.calibrate import Session

TEXTS, LENGTH = 8, 512
_ROWS = 16  # variants that are run together
_FACTS = (
    (" The code of the door is {number}.", "\n\nTo open the door, enter the code. The code of the door is"),
    ("\n{name}'s telephone number is {number}, as everybody knows.\n",
     "\n\nQuestion: What is {name}'s telephone number?\nAnswer: {name}'s telephone number is"),
    (" On that day {name} paid {number} pounds for the horse.",
     " How much did {name} pay for the horse? On that day {name} paid"),
    ("\n\nNote: ticket {number} belongs to {name}.\n\n", "\n\nWhich ticket belongs to {name}? It is ticket"),
)  # fmt: skip
_NAMES = ("Anna", "Peter", "Mr. Brown", "Martha", "Jack")


@dataclass(frozen=True)
class Recall:
    """A text with a fact in it, int64 [n], and what is asked with its answer, int64 [q], the last `answers` tokens."""

    text: Tensor
    asked: Tensor
    answers: int


def recalls(tokens: Tensor, tokenizer: Any, local: int, generator: torch.Generator) -> list[Recall]:
    """Put facts into stretches of a text, each at another depth, but not among the last `local` tokens.

    Args:
        tokens: int64 [sequences, length].
        tokenizer: of transformers.
        local: tokens at the end that stay free of facts.
        generator: what numbers and names are drawn with.

    Raises UsageError: the text is too short.
    """
    flat = tokens.flatten().cpu()
    length = min(LENGTH, len(flat) // 2)
    if length < 2 * local:
        raise UsageError(f"{len(flat)} tokens of text are too few to find retrieval heads by", "give a longer text")

    def encode(text: str) -> Tensor:
        return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.long)

    def draw(count: int) -> int:
        return int(torch.randint(count, (1,), generator=generator))

    found = []
    for i in range(TEXTS):
        start = (len(flat) - length) * i // (TEXTS - 1)
        text, depth = flat[start : start + length], (length - local) * (i * 3 % TEXTS) // TEXTS
        said = {"number": 10_000 + draw(90_000), "name": _NAMES[draw(len(_NAMES))]}
        fact, question = (encode(part.format(**said)) for part in _FACTS[i % len(_FACTS)])
        answer = encode(f" {said['number']}")
        found.append(Recall(torch.cat([text[:depth], fact, text[depth:]]), torch.cat([question, answer]), len(answer)))
    return found


class _Probed(PolicyLayer):
    """A layer that holds a text once, and lets each row of a later call see it in its own way.

    `local`: bool [rows, G], heads that see sinks and window alone; None while the text is read.
    """

    def __init__(self, shape: LayerShape, sinks: int, window: int) -> None:
        super().__init__(shape, lambda device: [])
        self.ends = (sinks, window)
        self.text: tuple[Tensor, Tensor] | None = None
        self.local: Tensor | None = None

    def attend(
        self,
        base: Attention,
        module: torch.nn.Module,
        query: Tensor,
        mask: Tensor | None,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> Tensor:
        keys, values = self._take()
        if self.text is None or self.local is None:
            self.text, self.seen = (keys, values), keys.shape[2]
            return base(module, query, keys, values, mask, scaling=scaling, **kwargs)[0]
        rows, kv_heads, new = keys.shape[:3]
        keys, values = (
            torch.cat([old.expand(rows, -1, -1, -1), side], 2)
            for old, side in zip(self.text, (keys, values), strict=True)
        )
        at = torch.arange(keys.shape[2], device=keys.device)
        far = (at >= self.ends[0]) & (at < self.seen - self.ends[1])
        future = at > self.seen + torch.arange(new, device=at.device)[:, None]  # [q, n]
        hidden = future | (far & self.local.repeat_interleave(query.shape[1] // kv_heads, 1)[:, :, None, None])
        mask = torch.zeros_like(hidden, dtype=query.dtype).masked_fill(hidden, torch.finfo(query.dtype).min)
        return base(module, query, keys, values, mask, scaling=scaling, **kwargs)[0]


@torch.no_grad()
def damages(session: "Session", sinks: int, window: int) -> Tensor:
    """How much each head's far sight matters, float32 [layers, G], in nats: above 0, it helps.

    Args:
        session: the model, a text and a tokenizer.
        sinks: first tokens that a local head sees.
        window: newest tokens of the text that it sees, and all of the question.

    Raises UsageError: there is no tokenizer, or the text is too short.
    """
    tokenizer = session.tokenizer
    if tokenizer is None:
        raise UsageError("`ranking=recall` asks questions in words, and was given no tokenizer", "give `tokenizer`")
    install(session.model)
    kv_heads = session.layers[0].kv_heads
    count = len(session.layers) * kv_heads
    total = torch.zeros(count, dtype=torch.float64)
    # a variant for each head, and one in which no head is local
    variants = torch.cat([torch.eye(count), torch.zeros(1, count)]).bool().view(-1, len(session.layers), kv_heads)
    generator = torch.Generator().manual_seed(session.seed)
    for recall in recalls(session.tokens, tokenizer, window, generator):
        cache = _read(session, recall.text, sinks, window)
        losses = torch.cat([_losses(session, cache, recall, part) for part in variants.split(_ROWS)])
        total += losses[:-1] - losses[-1]
    return (total / TEXTS).float().view(len(session.layers), kv_heads)


def _read(session: "Session", text: Tensor, sinks: int, window: int) -> PolicyCache:
    layers: dict[int, PolicyLayer] = {shape.index: _Probed(shape, sinks, window) for shape in session.layers}
    cache = PolicyCache(session.model.config, layers)
    body_of(session.model)(input_ids=text[None].to(session.model.device), past_key_values=cache, use_cache=True)
    return cache


def _losses(session: "Session", cache: PolicyCache, recall: Recall, local: Tensor) -> Tensor:
    """Mean loss over the answer for each variant, `local` bool [rows, layers, G]: float64 [rows] on the CPU."""
    device = session.model.device
    asked = recall.asked.to(device).expand(len(local), -1)
    logits = session.model(asked, past_key_values=_variant(cache, local.to(device)), use_cache=True).logits
    lost = torch.nn.functional.cross_entropy(
        logits[:, -recall.answers - 1 : -1].float().transpose(1, 2), asked[:, -recall.answers :], reduction="none"
    )
    return lost.mean(1).cpu().double()


def _variant(cache: PolicyCache, local: Tensor) -> PolicyCache:
    """The same text, seen by each row in its own way: `local` is bool [rows, layers, G]."""
    shown = copy.copy(cache)
    shown.layers = list(cache.layers)
    for i, layer in enumerate(cache.layers):
        if isinstance(layer, _Probed):
            layer.local = local[:, layer.shape.depth]
        else:
            shown.layers[i] = copy.deepcopy(layer)
            shown.layers[i].batch_repeat_interleave(len(local))
    return shown
