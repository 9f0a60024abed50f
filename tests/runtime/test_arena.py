"""Two streams share a scratch: every pair of accesses that meet has an order, and a missing edge would be seen."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import tcw
from tcw.runtime import arena as arena_module
from tcw.runtime import offload, residency, streams
from tcw.runtime.streams import Side
from tcw.runtime.units import Planned, Weight, plan, scratch_for


class Timeline:
    """Streams as vector clocks: who has seen what of whom, and which accesses to memory had no order."""

    def __init__(self) -> None:
        self.now = ["main"]
        self.clocks: dict[str, dict[str, int]] = {}
        self.seen: list[tuple[str, int, bool, int, int, str]] = []
        self.races: list[str] = []
        self.beside: list[str] = []  # what was decoded on a side
        self.kept: dict[str, list[tuple[int, int]]] = {}  # memory that torch's allocator knows a side to use

    def clock(self, stream: str) -> dict[str, int]:
        return self.clocks.setdefault(stream, {stream: 0})

    def sees(self, stream: str, other: str) -> None:
        for name, time in self.clock(other).items():
            self.clock(stream)[name] = max(time, self.clock(stream).get(name, 0))

    def access(self, tensor: torch.Tensor, write: bool, what: str) -> None:
        stream, first = self.now[-1], tensor.data_ptr()
        last = first + tensor.nbytes
        mine = self.clock(stream)
        for other, time, wrote, begin, end, who in self.seen:
            if (write or wrote) and begin < last and first < end and mine.get(other, 0) < time:
                self.races.append(f"{who} on {other} and {what} on {stream}")
        mine[stream] += 1
        self.seen.append((stream, mine[stream], write, first, last, what))

    @contextlib.contextmanager
    def on(self, stream: str) -> Iterator[None]:
        self.now.append(stream)
        yield
        self.now.pop()


class Watched(Side):
    """A side of a timeline; an edge can be left out."""

    def __init__(self, time: Timeline, name: str, missing: str) -> None:
        self.time, self.name, self.missing = time, name, missing

    def fork(self) -> None:
        if self.missing != f"{self.name} fork":
            self.time.sees(self.name, self.time.now[-1])

    def run(self, work: Callable[[], object]) -> None:
        with self.time.on(self.name):
            work()

    def join(self) -> None:
        if self.missing != f"{self.name} join":
            self.time.sees(self.time.now[-1], self.name)

    def keep(self, tensors: Iterable[torch.Tensor]) -> None:
        kept = self.time.kept.setdefault(self.name, [])
        kept += [(tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) for tensor in tensors]


def watch(monkeypatch: Any, missing: str = "") -> Timeline:
    """Have all streams, decodings and copies of models that are loaded from now on go through a timeline."""
    time = Timeline()
    monkeypatch.setattr(residency, "KERNELS", {"cpu"})
    monkeypatch.setattr(arena_module, "beside", lambda device: Watched(time, "decode", missing))
    monkeypatch.setattr(offload, "beside", lambda device: Watched(time, "copy", missing))
    decode, copy = arena_module.decode, offload.Staging._copy

    def decoding(group: Any, out: torch.Tensor | None = None) -> torch.Tensor:
        for tensor in group.tensors():
            time.access(tensor, False, "decode")
        if out is not None:
            time.access(out, True, "decode")
            time.beside += [time.now[-1]] if len(time.now) > 1 else []
        return decode(group, out=out)

    def copying(self: Any, unit: Any) -> None:
        time.access(self._stages[unit.number % 2], True, "copy")
        copy(self, unit)

    monkeypatch.setattr(arena_module, "decode", decoding)
    monkeypatch.setattr(offload.Staging, "_copy", copying)
    return time


def run(model: Any, time: Timeline, animal: Any) -> bool:
    """Run a model three times, noting what its layers read; say whether the logits are right."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda m, *_: time.access(m.weight, False, "compute"), prepend=True)
    expected = animal.plain()(**animal.inputs()).logits
    with torch.inference_mode():
        return all(torch.equal(model(**animal.inputs()).logits, expected) for _ in range(3))


@pytest.mark.parametrize("how", [{}, {"scratch": 1 << 20}, {"overlap": False}, {"scratch": 30_000}], ids=str)
@pytest.mark.parametrize("choice", ["huffman", "offload"])
@pytest.mark.parametrize("name", ["llama", "bart", "gpt-neox"])
def test_what_shares_memory_has_an_order(zoo: Any, monkeypatch: Any, name: str, choice: str, how: Any) -> None:
    time = watch(monkeypatch)
    model = tcw.load(zoo(name).artifact, residency=choice, device="cpu", **how)
    assert run(model, time, zoo(name))
    assert time.races == []
    assert bool(time.beside) is how.get("overlap", True)
    for stream, _, _, first, last, what in time.seen:
        assert stream == "main" or any(a <= first and last <= b for a, b in time.kept[stream]), what


@pytest.mark.parametrize("missing", ["decode fork", "decode join", "copy fork", "copy join"])
def test_an_edge_that_is_missing_would_be_seen(zoo: Any, monkeypatch: Any, missing: str) -> None:
    time = watch(monkeypatch, missing)
    run(tcw.load(zoo("llama").artifact, residency="offload", device="cpu"), time, zoo("llama"))
    assert time.races


def test_a_run_ends_joined_and_a_graph_begins_anew(zoo: Any, monkeypatch: Any) -> None:
    time, captured = watch(monkeypatch), [False]
    monkeypatch.setattr(arena_module, "capturing", lambda device: captured[0])
    model = tcw.load(zoo("llama").artifact, residency="offload", device="cpu")
    arena = next(h.__self__ for h in model.model._forward_hooks.values() if hasattr(h, "__self__"))
    assert run(model, time, zoo("llama"))
    assert (arena._pending, arena.supply._held, arena.supply._under_way) == (None, [None, None], False)
    assert all(time.clock("main")[side] == time.clock(side)[side] for side in ("decode", "copy"))
    first = model.model.layers[0].self_attn.q_proj
    enter, leave = (list(hooks.values())[-1] for hooks in (first._forward_pre_hooks, first._forward_hooks))
    with torch.inference_mode():
        enter(first, ())  # as if a run outside a graph stopped here: unit 1 is on its way, and unit 2 behind it
        leave(first, ())
        pending = arena._pending
        assert (pending.number, arena.supply._under_way) == (1, True)
        captured[0], before = True, dict(time.clock("main"))
        arena.enter(pending)  # in a graph that run does not count, and cannot be joined
        assert {**time.clock("main"), "main": 0} == {**before, "main": 0}
        module, name, coded = pending.places[0]
        assert torch.equal(module._parameters[name], coded)
        arena.leave(pending)
        assert module._parameters[name] is coded


def test_another_order_than_the_listed_one_is_learned() -> None:
    class Crossed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for k in (0, 2, 3):
                x = self.layers[k](x)
            return x

    model, expected, decoded = crossed(Crossed())
    x = torch.randn(3, 64).bfloat16()
    with torch.no_grad():
        right = expected(x)
        assert torch.equal(model(x), right)
        first = list(decoded)
        decoded.clear()
        assert torch.equal(model(x), right)
    assert (first, decoded) == ([0, 1, 2, 3], [0, 2, 3])


def crossed(model: nn.Module) -> tuple[nn.Module, nn.Module, list[int]]:
    """A model whose weights are coded, a plain copy of it, and the units that it decodes."""
    import copy

    from tcw.runtime import resident
    from tcw.runtime.linear import Quantized
    from tcw.runtime.options import Options
    from tcw.runtime.packed import from_torch
    from tcw.runtime.state import pack

    model = model.bfloat16()
    plain, decoded = copy.deepcopy(model), []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            store = pack(from_torch(name, module.weight.detach())).store
            module.weight = nn.Parameter(Quantized(store, "dfloat11", torch.bfloat16), requires_grad=False)
    resident.attach(model, Options())
    arena = next(h.__self__ for h in model._forward_hooks.values())
    decode = arena._decode
    arena._decode = lambda unit: (decoded.append(unit.number), decode(unit))
    return model, plain, decoded


def test_units_are_as_large_as_half_the_scratch_and_never_larger_than_a_block() -> None:
    attention = nn.ModuleDict({k: nn.Linear(64, 64) for k in "qkvo"})
    layers = nn.ModuleList([nn.ModuleDict({"attention": attention, "up": nn.Linear(64, 256)})])
    model = nn.ModuleDict({"layers": layers, "head": nn.Linear(64, 100), "table": nn.Embedding(100, 64)})
    weights = [
        Weight(m.weight, [(path, m, "weight")]) for path, m in model.named_modules() if hasattr(m, "weight")
    ]  # fmt: skip

    def units(limit: int) -> list[tuple[str, str, int]]:
        return [(u.path, u.stack, u.nbytes) for u in plan(model, weights, limit)]

    small, large, head = 64 * 64 * 4, 64 * 256 * 4, 100 * 64 * 4
    whole = ("layers.0", "layers", 4 * small + large)
    last = ("head", "", head)
    assert units(1 << 30) == [whole, last]
    assert units(large) == [("layers.0.attention", "layers", 4 * small), ("layers.0.up", "layers", large), last]
    assert [path for path, _, _ in units(0)] == [*(f"layers.0.attention.{k}" for k in "qkvo"), "layers.0.up", "head"]
    assert scratch_for([Planned("", "", weights[k : k + 1]) for k in (0, 4, 1)]) == small + large


def test_an_interrupted_run_is_forgotten_when_the_next_begins(zoo: Any, monkeypatch: Any) -> None:
    time = watch(monkeypatch)
    model = tcw.load(zoo("llama").artifact, residency="huffman", device="cpu", scratch=1 << 20)
    arena = next(h.__self__ for h in model.model._forward_hooks.values() if hasattr(h, "__self__"))
    ids = zoo("llama").inputs()["input_ids"]

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = model.model.layers[1].self_attn.k_proj.register_forward_hook(interrupt)
    with torch.no_grad(), pytest.raises(KeyboardInterrupt):  # which no hook of torch's hears of
        model(ids)
    assert arena._running == 1
    hook.remove()
    assert run(model, time, zoo("llama"))
    assert time.races == []
    assert (arena._running, arena._inside) == (0, {})


def test_another_stream_waits_for_the_one_before(monkeypatch: Any) -> None:
    waits: list[tuple[str, str]] = []

    class Stream(str):
        __slots__ = ()

        def wait_stream(self, other: str) -> None:
            waits.append((str(self), str(other)))

    now, captured = [Stream("a")], [False]
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("side"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: now[0])
    monkeypatch.setattr(streams, "capturing", lambda device: captured[0])
    side = streams.beside(torch.device("cuda", 0))
    for name, capture in (("a", False), ("a", False), ("b", False), ("graph", True), ("graph", True), ("a", False)):
        now[0], captured[0] = Stream(name), capture
        side.follow()
    assert waits == [("b", "a"), ("a", "graph")]
