"""Cuts tokens inside a vision tower: between attention and MLP of its blocks (ViT, DINOv2, CLIP, SigLIP).

    x ← attention half of block b                            all tokens that are left
    for each image: plan = stage.plan(context, k)            class token and registers are never cut
    x ← plan.apply(x), padded where images differ in what is left
    x ← MLP half of block b

Padding is never attended to. Once tokens have been merged, a token that stands for s patches counts s times as a key
(proportional attention: log s is added to its logits; Bolya et al., Token Merging, ICLR 2023, section 3.2).

Towers inside vision-language models run with `restore`: they work on the tokens that are left, and every block gives
out its hidden states spread back to all patches, so that whatever layer the model reads has the shape it expects.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from tcw.errors import UsageError
from tcw.tokens import Stage
from tcw.tokens._tower_blocks import Parts, Together, attention_rows, leading
from tcw.tokens._tower_units import Left, Unit, join
from tcw.tokens.context import Context, LazyRows, Looked, TowerView
from tcw.tokens.cuts import budgets, plan_of
from tcw.tokens.plan import Plan
from tcw.tokens.trace import Trace
from tcw.tokens.watch import Call, blocks_of

COPY, RESIDUAL = "copy", "residual"
_NORMS = ("layernorm", "post_layernorm", "norm")


class TowerRun:
    """Stages at work in a tower, from now until `detach`; a context manager.

    Args:
        tower: a vision model of transformers, called with `pixel_values` [B, 3, height, width].
        stages: pairs of a block's number and a stage, in the order in which they are carried out.
        seed: of what methods draw at random.
        note: takes a sentence for the report.
        restore: give out hidden states of all patches: each gets its representative's vector.

    Raises:
        UsageError: for a tower or block that is not there, and in a forward pass where `keep` leaves no token.
    """

    def __init__(
        self,
        tower: PreTrainedModel,
        stages: Sequence[tuple[int, Stage]],
        seed: int = 0,
        note: Callable[[str], None] = lambda words: None,
        restore: bool = False,
    ) -> None:
        self.tower, self.seed, self.note, self.restore = tower, seed, note, restore
        blocks = blocks_of(tower)
        self._stages = [(_checked(number, len(blocks)), stage) for number, stage in stages]
        self._asked = {n % (number + 1) for number, stage in self._stages for n in stage.layers(number + 1)}
        self._whole = any(stage.whole for _, stage in self._stages)
        if self._whole and restore:
            raise UsageError(
                "inside a vision-language model a batch of the tower is more than one video",
                "use a policy that joins frames at the language model's input",
            )
        self._special, self._last = leading(tower), len(blocks) - 1
        self._first = min([number for number, _ in self._stages] + sorted(self._asked), default=len(blocks) - 1)
        self._parts = {n: Parts.of(blocks[n]) for n in range(self._first, len(blocks))}
        self._begin()
        self._hooks = [tower.register_forward_pre_hook(self._before, with_kwargs=True)]
        self._forwards: list[tuple[nn.Module, Any]] = []
        self._attach(blocks)

    def _attach(self, blocks: nn.ModuleList) -> None:
        for n in self._parts:
            self._forwards.append((blocks[n], blocks[n].__dict__.get("forward")))
            blocks[n].forward = partial(self._block, n)
        for name, module in self.tower.named_modules():
            if isinstance(module, nn.MultiheadAttention):
                self._hooks.append(module.register_forward_pre_hook(self._pooling, with_kwargs=True))
            if name.rpartition(".")[2] in _NORMS:
                self._hooks.append(module.register_forward_hook(self._normed))

    def detach(self) -> None:
        """Leave the tower as it was."""
        for hook in self._hooks:
            hook.remove()
        for block, before in self._forwards:
            if before is None:
                del block.forward
            else:
                block.forward = before
        self._hooks, self._forwards = [], []
        self._begin()

    def __enter__(self) -> "TowerRun":
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    # what became of the last batch

    @property
    def plans(self) -> list[Plan]:
        """Of the last batch: one plan over the N patches of each sequence; of `whole` stages, one over all F·N."""
        return [unit.plan() for unit in self._units]

    def traces(self) -> list[Trace]:
        """Of the last batch: a trace for each plan, cut by cut."""
        return [unit.trace for unit in self._units]

    def read_out(self, hidden: Tensor, how: str = COPY) -> Tensor:
        """A vector for each patch of the last batch: [B, N, D].

        A patch that was merged reads from its representative; one that was dropped, from the kept token that was most
        like it (cosine) where it was dropped.

        Args:
            hidden: the tower's `last_hidden_state`, [B, special + S, D].
            how: `copy`: the representative's output. `residual`: before the final norm, plus what the patch itself was
                more than its representative at the cut. The residual stream carries a token's own part through all
                blocks, so what a block adds is shared and what a patch is stays its own. This read-out is ours; in a
                trained DINOv2-S it is nearer to the dense output than `copy` for every method tried.

        Raises:
            UsageError: for another `how`.
        """
        if how not in (COPY, RESIDUAL):
            raise UsageError(f"patches are not read out by `{how}`", f"choose `{COPY}` or `{RESIDUAL}`")
        if self.restore:
            return hidden[:, self._special :]
        if how == COPY:
            return self._spread(hidden)
        assert self._out is not None, "no batch has been through the tower"
        spread = self._spread(self._out)
        own = [torch.zeros(1, device=hidden.device) if unit.own is None else unit.own for unit in self._units]
        spread = spread + torch.cat(
            [one.expand(len(unit.stand), spread.shape[-1]) for one, unit in zip(own, self._units, strict=True)]
        ).view_as(spread)
        return spread if self._norm is None else self._norm(spread)

    def _spread(self, hidden: Tensor) -> Tensor:
        found = [
            unit.gather(hidden, self._special)[unit.stand].reshape(len(unit.rows), unit.patches, -1)
            for unit in self._units
        ]
        return torch.cat(found)

    # a forward pass

    def _begin(self) -> None:
        """Forget the last batch."""
        self._units: list[Unit] = []
        self._pixels: tuple[int, int] = (0, 0)
        self._calls: dict[int, tuple[Call, list[Left]]] = {}
        self._bias: Tensor | None = None
        self._out: Tensor | None = None
        self._norm: nn.Module | None = None

    def _before(self, tower: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if tower.training and any(getattr(module, "gradient_checkpointing", False) for module in tower.modules()):
            raise UsageError("blocks that run twice cannot be cut", "turn gradient checkpointing off")
        pixels = kwargs["pixel_values"] if "pixel_values" in kwargs else args[0]
        self._begin()
        self._pixels = pixels.shape[-2], pixels.shape[-1]

    def _start(self, hidden: Tensor) -> None:
        """Take in the batch that the first of our blocks is given."""
        if hidden.dim() != 3:
            raise UsageError("this tower divides its tokens by itself", "use a policy that cuts after the tower")
        patches = hidden.shape[1] - self._special
        size = self.tower.config.patch_size
        tall, wide = (size, size) if isinstance(size, int) else size
        grid = self._pixels[0] // tall, self._pixels[1] // wide
        grid = grid if grid[0] * grid[1] == patches else (1, patches)
        count = len(hidden)
        ranges = [range(count)] if self._whole else [range(n, n + 1) for n in range(count)]
        self._units = [Unit(rows, grid, hidden.device) for rows in ranges]

    def _block(self, n: int, hidden_states: Tensor, attention_mask: Any = None, **kwargs: Any) -> Tensor:
        """What block n does instead of its own forward: the same, with cuts."""
        if n == self._first:
            self._start(hidden_states)
        x = self._out if self.restore and self._out is not None else hidden_states
        if attention_mask is not None:
            kwargs["attention_mask"] = attention_mask
        x, call = self._parts[n].first(x, self._bias, **kwargs)
        mine = [stage for number, stage in self._stages if number == n]
        if mine or n in self._asked:
            self._remember(n, call)
        if mine and attention_mask is not None:
            raise UsageError(
                "the tower is given an attention mask", "policies that cut inside a tower need whole images"
            )
        for stage in mine:
            x = self._cut(n, stage, x)
        x = self._parts[n].second(x)
        if n == self._last:
            x = self._cleared(x)
            self._calls = {}
        self._out = x
        if not self.restore:
            return x
        return torch.cat([x[:, : self._special], self._spread(x)], 1)

    def _remember(self, n: int, call: Call) -> None:
        """Keep queries and keys of block n, with the tokens of each sequence that they are of, and their sizes."""
        self._calls[n] = call, [one for unit in self._units for one in unit.sequences(range(len(unit.rows)))]

    def _cut(self, n: int, stage: Stage, x: Tensor) -> Tensor:
        """Carry out one stage on the batch [B, special + S, D]."""
        rows: list[Tensor] = []
        changed = False
        for unit in self._units:
            tokens = unit.gather(x, self._special)
            frames = [range(len(unit.rows))] if stage.whole else [range(f, f + 1) for f in range(len(unit.rows))]
            plan = join([self._plan(n, stage, unit, some, x, tokens) for some in frames])
            changed |= plan.kept < len(tokens) or plan.mix is not None
            left = plan.apply(tokens)
            unit.cut(f"block {n}", plan, tokens, left, not self.restore)
            rows += left.split(unit.counts())
        if not changed:
            return x
        self._bias = self._key_bias(x)
        return torch.cat([x[:, : self._special], pad_sequence(rows, batch_first=True)], 1)

    def _plan(self, n: int, stage: Stage, unit: Unit, frames: range, x: Tensor, tokens: Tensor) -> Plan:
        """Plan a stage for some sequences of a unit of which `tokens` [n, D] are left."""
        here = unit.within(frames)
        alive = unit.alive[here]
        place = unit.trace.place[alive]
        place[:, 0] -= frames.start
        rows = range(unit.rows[frames.start], unit.rows[frames.start] + len(frames))
        sequences = unit.sequences(frames)
        context = Context(
            x=tokens[here].detach().float(),
            grid=(len(frames), *unit.grid),
            place=place,
            original=len(frames) * unit.patches,
            alive=alive - frames.start * unit.patches,
            size=unit.size[here],
            text=x[rows.start : rows.stop, 0].detach().float() if self._special else None,
            tower=self._view(n, stage, rows, sequences, tokens[here]),
            rows=LazyRows(partial(self._attention, n, rows, sequences)),
            note=self.note,
            seed=self.seed,
        )
        return plan_of(stage, context, budgets(stage, [context])[0])

    def _view(self, n: int, stage: Stage, rows: range, sequences: list[Left], tokens: Tensor) -> TowerView:
        """What the blocks up to this one did with the tokens that are left."""
        looked: dict[int, Sequence[Looked]] = {}
        for layer in {layer % (n + 1) for layer in stage.layers(n + 1)}:
            call, then = self._calls[layer]
            frames = [
                self._looked(call, row, torch.searchsorted(then[row][0], left))
                for row, (left, _) in zip(rows, sequences, strict=True)
            ]
            ragged = len({len(left) for left, _ in sequences}) > 1
            looked[layer] = [Together.of(frames)] if ragged else frames
        hidden = tokens.detach()[None]
        return TowerView(n + 1, self._special > 0, looked, lambda found: found.flatten(0, 1), hidden)

    def _looked(self, call: Call, row: int, patches: Tensor) -> Looked:
        """One sequence of a call: its class token, if there is one, and `patches`. Registers are left out."""
        first = torch.zeros(min(self._special, 1), dtype=torch.int64, device=patches.device)
        tokens = torch.cat([first, patches + self._special])
        queries, keys, scaling = call
        return Looked(queries[row, :, tokens], keys[row, :, tokens], scaling, self._special > 0)

    def _attention(self, n: int, rows: range, sequences: list[Left]) -> tuple[Tensor, Tensor]:
        """Attention from the class tokens in this block and its logits, float32 [H, 1, n] (attention_rows)."""
        call, then = self._calls[n]
        found: list[tuple[Tensor, ...]] = []
        for row, (left, _) in zip(rows, sequences, strict=True):
            before, size = then[row]
            at = torch.searchsorted(before, left)
            found.append(tuple(one[..., at] for one in attention_rows(call, row, self._special, size)))
        attention, logits = zip(*found, strict=True)
        return torch.cat(attention, -1), torch.cat(logits, -1)

    def _real(self, x: Tensor) -> Tensor:
        """Which tokens of the batch [B, special + S, ...] are none of the padding: bool [B, special + S]."""
        counts = torch.tensor([n for unit in self._units for n in unit.counts()], device=x.device)
        return torch.arange(x.shape[1], device=x.device) < (self._special + counts)[:, None]

    def _key_bias(self, x: Tensor) -> Tensor | None:
        """What is added to the attention logits of each key, [B, 1, 1, special + S]; None: nothing has to be."""
        sizes = [one for unit in self._units for one in unit.size.split(unit.counts())]
        even = len({len(size) for size in sizes}) == 1
        if even and all(bool((size == 1).all()) for size in sizes):
            return None
        longest = max(len(size) for size in sizes)
        # the smallest number, not -inf: a frame that has no token left would have nothing but NaN to give
        nothing = torch.finfo(x.dtype).min
        bias = x.new_full((len(sizes), self._special + longest), nothing, dtype=torch.float32)
        for row, size in enumerate(sizes):
            bias[row, : self._special] = 0
            bias[row, self._special : self._special + len(size)] = size.log()
        return bias.to(x.dtype)[:, None, None]

    def _cleared(self, x: Tensor) -> Tensor:
        """The batch with zeros for padding."""
        real = self._real(x)
        return x if bool(real.all()) else torch.where(real[..., None], x, 0)

    def _normed(self, norm: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor | None:
        """The tower's last norm, known by what it is given: note it, and clear the padding behind it."""
        if args[0] is not self._out or self.restore or self._out is None:
            return None
        self._norm = norm
        return self._cleared(out)

    def _pooling(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """An attention pooling head (SigLIP): it sees no padding, and merged tokens as often as they count."""
        if self.restore or self._bias is None:
            return None
        return args, {**kwargs, "key_padding_mask": self._bias[:, 0, 0]}


def _checked(number: int, count: int) -> int:
    if not 0 <= number < count:
        raise UsageError(f"there is no block {number} in a tower of {count} blocks", f"choose one of 0 to {count - 1}")
    return number


def batches(images: Sequence[Tensor], most: int) -> list[Tensor]:
    """Images [3, height, width] put together to batches of `most` or fewer that have one size, in their order."""
    by_size: dict[torch.Size, list[Tensor]] = {}
    for image in images:
        by_size.setdefault(image.shape, []).append(image)
    return [part for same in by_size.values() for part in torch.stack(same).split(most)]
