"""Tasks that show what a KV-cache policy costs: a context, what follows it, and which of its tokens are scored.

    passkey   a five-digit number is hidden in prose and asked for: what a policy forgot cannot be answered
    copy      a passage of the context begins again and is to be continued word by word
    next      the text goes on: its next tokens are predicted

The first two are lost long before the third notices: most of a text can be continued without its distant past. A policy
is therefore never judged by one of them alone.

The context is prefilled in one call and compressed; then all that follows is given at once, as the tokens that a
perfect model would have generated. So a policy cannot know at compression what will be asked for. Nothing here is
random but by seed, and the prose is the bundled evaluation text unless the caller gives another.
"""

import inspect
import math
import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from tcw.data import evaluation_text
from tcw.kv.cache import held_by, nbytes

CONTEXT = 1000  # tokens
PLACEMENTS = 20  # passkeys; an exact answer is all or nothing, so a few would say little
COPIES = 6
CONTINUATIONS = 6
SPAN = 48  # tokens to copy
CUE = 16  # tokens of the passage that are given
NEXT = 128  # tokens to predict
DEPTHS = (0.05, 0.95)  # of the context, from the first placement to the last
KINDS = ("passkey", "copy", "next")

_MARK = 8  # tokens that stand for "the pass key is" where there is no tokenizer
_DIGITS = 5

NewCache = Callable[[], Any]


@dataclass(frozen=True)
class Task:
    """One measurement.

    Attributes:
        kind: one of KINDS.
        label: for a person.
        context: int64 [T], prefilled in one call.
        follow: int64 [f], given in one call after it.
        first: `follow[first:]` are scored, each predicted from all before it; at least 1.
        depth: where in the context the answer starts, 0 to 1; None where it has no place.
    """

    kind: str
    label: str
    context: Tensor
    follow: Tensor
    first: int
    depth: float | None = None

    @property
    def targets(self) -> Tensor:
        """The tokens that are scored, int64 [f - first]."""
        return self.follow[self.first :]


@dataclass(frozen=True)
class Scores:
    """How well a model did one task.

    Attributes:
        kind: the task's.
        nll: mean of -log p over the scored tokens, in nats.
        exact: whether every scored token was the likeliest.
        token_accuracy: share of scored tokens that were the likeliest.
        cache_bytes: of the cache after the context, before what follows.
    """

    kind: str
    nll: float
    exact: bool
    token_accuracy: float
    cache_bytes: int


class Script(Protocol):
    """What tasks are made of, as token ids.

    Attributes:
        words: int64 [n], the haystack.
        start: what a text begins with.
        pause: what separates a text from what is asked about it.
    """

    words: Tensor
    start: list[int]
    pause: list[int]

    def needle(self, number: int) -> tuple[list[int], list[int], list[int]]:
        """For a five-digit number: what is hidden, what is asked, and the number itself."""
        ...


class Prose:
    """Natural text under a tokenizer."""

    def __init__(self, tokenizer: Any, text: str | None = None) -> None:
        self._tokenizer = tokenizer
        self.words = torch.tensor(self._encode(evaluation_text() if text is None else text), dtype=torch.int64)
        marked = tokenizer("a", verbose=False)["input_ids"]
        self.start = [marked[0]] if marked and marked[0] == tokenizer.bos_token_id is not None else []
        self.pause = self._encode("\n\n")

    def needle(self, number: int) -> tuple[list[int], list[int], list[int]]:
        """The passkey as sentences; tokens of the answer that hold no digit are part of the question."""
        hidden = f"\n\nThe pass key is {number}. Remember it. {number} is the pass key.\n\n"
        answer = self._encode(f" {number}")
        digits = [any(c.isdigit() for c in self._tokenizer.decode([token])) for token in answer]
        first = digits.index(True) if True in digits else 0
        question = self._encode("\n\nWhat is the pass key? The pass key is")
        return self._encode(hidden), question + answer[:first], answer[first:]

    def fits(self, vocabulary: int) -> bool:
        """Whether ids lie in a model's vocabulary and mean something; transformers makes up a missing tokenizer."""
        hidden, _, answer = self.needle(98765)
        spelt = self._tokenizer.decode(answer).replace(" ", "")
        return "98765" in spelt and max(*self.words.tolist(), *self.pause, *hidden) < vocabulary

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


class Noise:
    """Seeded random tokens, for a model without a tokenizer: the same structure, nothing to understand."""

    def __init__(self, vocabulary: int, seed: int = 0) -> None:
        self._draw = torch.Generator().manual_seed(seed)
        self._vocabulary = vocabulary
        self.words = torch.tensor(self._ids(1 << 15))
        self._mark = self._ids(_MARK)
        self.start: list[int] = []
        self.pause = self._ids(2)

    def needle(self, number: int) -> tuple[list[int], list[int], list[int]]:
        """A mark and a key, twice; the mark is what is asked."""
        drawn = torch.Generator().manual_seed(number)
        key = torch.randint(self._vocabulary, (_DIGITS,), generator=drawn).tolist()
        return 2 * (self._mark + key), self._mark, key

    def _ids(self, count: int) -> list[int]:
        return torch.randint(self._vocabulary, (count,), generator=self._draw).tolist()


def make_tasks(
    script: Script, length: int = CONTEXT, *, placements: int = PLACEMENTS, copies: int = COPIES,
    continuations: int = CONTINUATIONS, seed: int = 0,
) -> list[Task]:  # fmt: skip
    """Make so many tasks of each kind, with contexts of `length` tokens; the same for the same arguments.

    Raises ValueError where `length` or the text is too short for them.
    """
    if length < least_length(script) or len(script.words) < length + NEXT + 1:
        raise ValueError(f"no room for the tasks: contexts of {length} tokens, a text of {len(script.words)}")
    tasks = _passkeys(script, length, placements, seed)
    return tasks + _copies(script, length, copies) + _continuations(script, length, continuations)


def least_length(script: Script) -> int:
    """Tokens that a context needs at least: so that what is to be found is a small part of it."""
    return len(script.start) + 2 * max(len(script.needle(98765)[0]), CUE + SPAN)


def longest_follow(script: Script) -> int:
    """Tokens that follow a context at most."""
    _, question, answer = script.needle(98765)
    return max(len(question) + len(answer), len(script.pause) + CUE + SPAN, NEXT + 1)


def _passkeys(script: Script, length: int, count: int, seed: int) -> list[Task]:
    """Each has its own number, depth and place in the text; depth and place do not go together."""
    numbers = random.Random(seed).sample(range(10**_DIGITS // 10, 10**_DIGITS), count)
    order = random.Random(seed + 1).sample(range(count), count)
    tasks = []
    for i, number in enumerate(numbers):
        hidden, question, answer = script.needle(number)
        hay = _window(script, order[i], count, length - len(script.start) - len(hidden))
        depth = _spread(i, count, DEPTHS)
        at = round(depth * len(hay))
        context = _ids(script.start, hay[:at], hidden, hay[at:])
        label = f"passkey {number} at {depth:.0%}"
        tasks.append(Task("passkey", label, context, _ids(question, answer), len(question), depth))
    return tasks


def _copies(script: Script, length: int, count: int) -> list[Task]:
    tasks = []
    for i in range(count):
        context = _ids(script.start, _window(script, i, count, length - len(script.start)))
        depth = _spread(i, count, DEPTHS)
        at = len(script.start) + round(depth * (length - len(script.start) - CUE - SPAN))
        follow = _ids(script.pause, context[at : at + CUE + SPAN])
        tasks.append(Task("copy", f"copy from {depth:.0%}", context, follow, len(script.pause) + CUE, depth))
    return tasks


def _continuations(script: Script, length: int, count: int) -> list[Task]:
    tasks = []
    for i in range(count):
        text = _ids(script.start, _window(script, i, count, length - len(script.start) + NEXT + 1))
        tasks.append(Task("next", f"text {i + 1}", text[:length], text[length:], 1))
    return tasks


def _window(script: Script, part: int, parts: int, length: int) -> Tensor:
    """`length` tokens of the text, the `part`-th of `parts` spread evenly over it."""
    first = (len(script.words) - length) * part // max(1, parts - 1)
    return script.words[first : first + length]


def _spread(i: int, count: int, ends: tuple[float, float]) -> float:
    return sum(ends) / 2 if count == 1 else ends[0] + (ends[1] - ends[0]) * i / (count - 1)


def _ids(*pieces: Tensor | list[int]) -> Tensor:
    return torch.cat([torch.as_tensor(piece, dtype=torch.int64) for piece in pieces])


def run_task(model: Any, task: Task, new_cache: NewCache) -> Scores:
    """Do a task with a fresh cache, the context in one call and what follows in a second one."""
    cache = new_cache()
    with torch.inference_mode():
        prefill(model, task.context, cache)
        return answer(model, task, cache)


def answer(model: Any, task: Task, cache: Any) -> Scores:
    """Give what follows a task's context, which lies in the cache already."""
    held = cache_bytes(cache)
    follow = task.follow[None].to(model.device)
    rows = model(input_ids=follow, past_key_values=cache, use_cache=True).logits[0, task.first - 1 : -1].double()
    targets = task.targets.to(rows.device)
    losses = rows.logsumexp(-1) - rows.gather(1, targets[:, None])[:, 0]
    right = rows.argmax(-1) == targets
    return Scores(task.kind, float(losses.mean()), bool(right.all()), float(right.double().mean()), held)


def prefill(model: Any, context: Tensor, cache: Any) -> Tensor:
    """Fill a cache with a context, int64 [T], in one call; the last token's logits, [vocabulary]."""
    few = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    ids = context[None].to(model.device)
    return model(input_ids=ids, past_key_values=cache, use_cache=True, **few).logits[0, -1]


def full_cache(model: Any) -> Any:
    """The cache that transformers would use by itself: everything, in the model's dtype."""
    from transformers import DynamicCache

    return DynamicCache(config=model.config)


def cache_bytes(cache: Any) -> int:
    """Bytes of the storages that a cache keeps in memory: as it says itself, or counted in one of transformers'."""
    if hasattr(cache, "nbytes"):
        return int(cache.nbytes())
    return nbytes(tensor for layer in cache.layers for tensor in held_by(layer))


def decode_rate(model: Any, context: Tensor, new_cache: NewCache, count: int = 32) -> float:
    """Tokens a second when `count` are generated greedily after a context that was prefilled; nothing ends it early."""
    cache = new_cache()
    with torch.inference_mode():
        token = prefill(model, context, cache).argmax().view(1, 1)
        token.item()  # an accelerator has now done it
        start = time.perf_counter()
        for _ in range(count):
            token = model(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1].argmax(-1, keepdim=True)
        token.item()
        return count / (time.perf_counter() - start)


def summarise(scores: Iterable[Scores]) -> dict[str, dict[str, float]]:
    """Means by kind: `nll`, `exact`, `token_accuracy`, and the `count`; of kinds that were run."""
    found = list(scores)
    groups: dict[str, Sequence[Scores]] = {kind: [s for s in found if s.kind == kind] for kind in KINDS}
    return {
        kind: {
            "nll": math.fsum(s.nll for s in group) / len(group),
            "exact": sum(s.exact for s in group) / len(group),
            "token_accuracy": math.fsum(s.token_accuracy for s in group) / len(group),
            "count": len(group),
        }
        for kind, group in groups.items() if group
    }  # fmt: skip
