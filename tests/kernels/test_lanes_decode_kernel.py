"""The CUDA source, run on the processor: the right words from every case, and nothing outside its arrays."""

import contextlib
import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tcw.kernels.lanes_decode import Group, decode, group, launch, tables
from tcw.kernels.lanes_decode.bench import _variants, check, words_of
from tcw.kernels.lanes_decode.cases import CASES, Case, make_inputs
from tcw.kernels.lanes_decode.group import group_symbols
from tcw.kernels.lanes_decode.launch import Plan, fitted

from tcw import cuda
from tcw.codecs.lanes import decode as processor
from tcw.codecs.lanes_layout import read_layout
from tcw.kernels import lanes_decode
from tests.kernels.host import HostError, HostModule

WORDS = [case for case in CASES if case.split != "integers"]
BY_NAME = {case.name: case for case in CASES}
ORDERS = ["forward", "reverse", 1, 2]
SOURCE = Path(launch.__file__).with_name("kernel.cu")
POISON = 0xA5


def run(module: HostModule, streams: Group, status: torch.Tensor | None = None, plan: Plan | None = None) -> np.ndarray:
    """Decode on `module`; returns words, with 64 bytes that nobody may write behind them looked at."""
    held = torch.full((streams.numel * streams.dtype.itemsize + 64,), POISON, dtype=torch.uint8)
    out = held[:-64].view(streams.dtype)
    launch.decode(module, streams.tensors(), streams.split, streams.shared, out, status, plan)
    assert bool((held[-64:] == POISON).all())
    return words_of(out)


def one(case: Case, unit_chunks: int = 0) -> tuple[np.ndarray, Group]:
    values, stream = make_inputs(case)
    return values, group([(stream.parts, stream.params, case.numel)], unit_chunks)


@pytest.mark.parametrize("case", WORDS, ids=lambda case: case.name)
def test_words(case: Case, host: Callable[..., HostModule]) -> None:
    values, streams = one(case, unit_chunks=5)
    for order in ORDERS:
        status = torch.zeros(1, dtype=torch.int32)
        decoded = run(host("lanes_decode", order=order), streams, status)
        np.testing.assert_array_equal(decoded, values, err_msg=str(order))
        assert int(status) == 0


@pytest.mark.parametrize("case", [c for c in CASES if c.split == "integers"], ids=lambda case: case.name)
def test_symbols_of_integers(case: Case, host: Callable[..., HostModule]) -> None:
    _, stream = make_inputs(case)
    streams = group_symbols([(stream.parts, read_layout(stream.params, case.numel))])
    plain = {"symbols", "first_symbol", "alphabet", "max_length", "split"}
    params = {key: value for key, value in stream.params.items() if key in plain}
    if "segments" in stream.params:
        pair = "pair" in params or "pair" in stream.params
        params["segments"] = [-(-size // 2) if pair else size for size in stream.params["segments"]]
    parts = {name: array for name, array in stream.parts.items() if not name.startswith("escape")}
    np.testing.assert_array_equal(run(host("lanes_decode"), streams), processor(parts, params, params["symbols"]))


def together(split: str, unit_chunks: int = 0) -> tuple[list[np.ndarray], Group]:
    """All cases of a split in one group."""
    inputs = [(case, *make_inputs(case)) for case in WORDS if case.split == split]
    streams = group([(stream.parts, stream.params, case.numel) for case, _, stream in inputs], unit_chunks)
    return [values for _, values, _ in inputs], streams


@pytest.mark.parametrize("split", ["bf16", "f16", "f32", "u8", "u16"])
def test_groups(split: str, host: Callable[..., HostModule]) -> None:
    values, streams = together(split, unit_chunks=3)
    flat = torch.from_numpy(run(host("lanes_decode", order=5), streams))
    for wanted, start, found in zip(values, streams.starts, streams.views(flat), strict=True):
        assert start % 128 == 0
        np.testing.assert_array_equal(found.numpy(), wanted)


@functools.cache
def small() -> tuple[list[np.ndarray], Group]:
    """A few streams with rare symbols, whole and ragged chunks, and units of several chunks."""
    cases = [Case("a", "not_finite", "bf16", 20_481), Case("b", "any_bits", "bf16", 4_097), BY_NAME["ragged-129"]]
    inputs = [(case, *make_inputs(case)) for case in cases]
    streams = group([(stream.parts, stream.params, case.numel) for case, _, stream in inputs], 6)
    return [values for _, values, _ in inputs], streams


PLANS = [Plan(chunks, warps, buffers) for chunks in (1, 2) for warps in (1, 4, 16) for buffers in (1, 2)]


@pytest.mark.parametrize("unit_chunks", [1, 2, 7, 64])
def test_every_plan_gives_the_same(unit_chunks: int, host: Callable[..., HostModule]) -> None:
    values, streams = together("bf16", unit_chunks)
    module = host("lanes_decode", order=unit_chunks)
    for plan in PLANS:
        status = torch.zeros(1, dtype=torch.int32)
        flat = torch.from_numpy(run(module, streams, status, plan))
        assert int(status) == 0
        for wanted, found in zip(values, streams.views(flat), strict=True):
            np.testing.assert_array_equal(found.numpy(), wanted, err_msg=str(plan))


@pytest.mark.parametrize(
    "name", ["weights-f32", "192-byte-lanes-bf16", "192-byte-lanes-u16", "66-tables-u8", "ragged-1"]
)
def test_nothing_outside_the_arrays(name: str, host: Callable[..., HostModule]) -> None:
    values, streams = one(BY_NAME[name])
    plan = Plan(2 if streams.split == "bf16" else 1, 4, 2)
    np.testing.assert_array_equal(run(host("lanes_decode", sanitize=True), streams, plan=plan), values)


@pytest.mark.parametrize("sanitize", [False, True])
@pytest.mark.parametrize("name", ["weights-bf16", "weights-f32", "2000-symbols-u16", "ragged-129"])
def test_damaged_codes_are_seen_and_stay_inside(name: str, sanitize: bool, host: Callable[..., HostModule]) -> None:
    """Any codes decode to something within bounds; status names the last lane that does not end with its last code."""
    _, streams = one(BY_NAME[name])
    module, rng = host("lanes_decode", sanitize=sanitize), np.random.default_rng(3)
    size = int(streams.chunk_base.numpy()[-1])
    noise = torch.from_numpy(rng.integers(0, 256, streams.codes.numel(), dtype=np.uint8))
    for damage in (noise, torch.full_like(noise, 255), torch.zeros_like(noise)):
        codes = streams.codes.clone()
        codes[:size] = damage[:size]
        status = torch.zeros(1, dtype=torch.int32)
        run(module, streams.with_tensors([codes, *streams.tensors()[1:]]), status)
        assert 0 < int(status) <= streams.lane_bytes.numel()


def test_status_is_the_damaged_lane(host: Callable[..., HostModule]) -> None:
    """The last byte of a lane is never all padding: with its bits turned, the lane ends elsewhere, or with ones."""
    _, streams = one(BY_NAME["12-bit-codes-u8"])
    ends = np.cumsum(streams.lane_bytes.numpy())
    seen = 0
    for lane in (0, 31, 32, 100, 287):
        codes = streams.codes.clone()
        codes[int(ends[lane]) - 1] ^= 0xFF
        status = torch.zeros(1, dtype=torch.int32)
        run(host("lanes_decode"), streams.with_tensors([codes, *streams.tensors()[1:]]), status)
        assert int(status) in (0, lane + 1)
        seen += int(status) > 0
    assert seen >= 3


def without(statement: str) -> tuple[str, str]:
    return statement, f"if (broken != K) {{ {statement} }}"


BROKEN = {
    "no second look-up": ("if (found[j][k] & ALONE) ", "if (broken != K && (found[j][k] & ALONE)) "),
    "no refill after a pair": ("if (j == 1) refill(", "if (j == 1 && broken != K) refill("),
    "no refill in a joined pair": (
        "    refill(lane);\n    return __",
        "    if (broken != K) refill(lane);\n    return __",
    ),
    "length of two for one": (
        "lane.at += second >> 16 & 15;",
        "lane.at += broken == K ? second >> 24 : second >> 16 & 15;",
    ),
    "sign where it was": without("high ^= swapped;"),
    "first bit off by two": ("8 * start - 2", "8 * start - (broken == K ? 0 : 2)"),
    "lane that is not aligned": ("return {to + skew, size};", "return {broken == K ? to : to + skew, size};"),
    "rest of another step": ("element + AHEAD * ROW);", "element + (broken == K ? 1 : AHEAD) * ROW);"),
    "a copy less": ("k < skew + (end - begin)", "k + (broken == K ? 16 : 0) < skew + (end - begin)"),
    "a table that is not there yet": without("__syncthreads();"),
    "codes that are overwritten": ("__syncwarp(ALL);  // all", "if (broken != K) __syncwarp(ALL);  // all"),
    "the wrong chunk of a warp": ("first + warp_id() * COUNT,", "first + warp_id() * (broken == K ? 1 : COUNT),"),
    "wrong place": ("place + skip);", "place + skip + (broken == K ? 4 : 0));"),
    "ragged chunk one too long": ("if (j >= count) break;", "if (j >= count + (broken == K ? 1 : 0)) break;"),
    "padding not looked at": ("&& padding == 0", "&& (padding == 0 || broken == K)"),
    "size not looked at": ("(read + 7) / 8 == lane.size ", "(broken == K || (read + 7) / 8 == lane.size) "),
}
ENTRY = re.compile(r'extern "C" __global__ void __launch_bounds__\(512\) lanes_decode_(f16|f32|u8|u16)\(.*\n.*\n}\n')


@pytest.fixture(scope="module")
def breakable(tmp_path_factory: pytest.TempPathFactory, host: Callable[..., HostModule]) -> HostModule:
    """The kernel for BF16 with all its faults in one library; the upper bits of `buffers` say which one it has."""
    text = ENTRY.sub("", SOURCE.read_text(encoding="utf-8"))
    changes = {
        "enum Split {": "static u32 broken;\nenum Split {",
        "    unit += static": "    broken = buffers >> 8;\n    buffers &= 255;\n    unit += static",
    }
    changes |= {
        old: new.replace("K)", f"{k})").replace("K ", f"{k} ") for k, (old, new) in enumerate(BROKEN.values(), 1)
    }
    for old, new in changes.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    path = tmp_path_factory.mktemp("broken") / "kernel.cu"
    path.write_text(text, encoding="utf-8")
    return host(path, sanitize=True)


class Fault:
    """A module whose kernels have fault number k; none with 0."""

    def __init__(self, module: HostModule, k: int) -> None:
        self.module, self.k, self.shared_limit = module, k, module.shared_limit

    def launch(self, name: str, grid: int, block: int, args: Any, shared: int = 0) -> None:
        self.module.launch(name, grid, block, (*args[:-1], args[-1] | np.uint32(self.k << 8)), shared)


def test_the_breakable_kernel_works(breakable: HostModule) -> None:
    assert works(Fault(breakable, 0))


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_kernel_is_noticed(what: str, breakable: HostModule) -> None:
    """Each fault gives other words, a missed damage, or a report of the sanitizer's."""
    with contextlib.suppress(HostError):
        assert not works(Fault(breakable, [*BROKEN].index(what) + 1))


def works(module: Any) -> bool:
    """Whether what this module tests holds for a kernel, on a few inputs."""
    values, streams = small()
    for order in ("forward", "reverse"):
        module.module.order = order
        for plan in (Plan(1, 4, 1), Plan(2, 2, 2)):
            flat = torch.from_numpy(run(module, streams, None, plan))
            if not all(np.array_equal(f.numpy(), v) for f, v in zip(streams.views(flat), values, strict=True)):
                return False
    ends = np.cumsum(streams.lane_bytes.numpy())
    return all(agrees(module, streams, int(ends[lane]) - back, 0xFF) for lane in range(0, 64, 5) for back in (1, 20))


def agrees(module: Any, streams: Group, at: int, bits: int) -> bool:
    """Whether the kernel finds damage of one byte where the processor's decoder does."""
    codes = streams.codes.clone()
    codes[at] ^= bits
    damaged = streams.with_tensors([codes, *streams.tensors()[1:]])
    found, wanted = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    run(module, damaged, found)
    decode(damaged, status=wanted)
    return int(found) == int(wanted)


def test_plans_fit_shared_memory() -> None:
    for stage in (256, 1_808, 6_383 // 16 * 16):
        for limit in (48 * 1024, 64 * 1024, 99 * 1024, 227 * 1024):
            for plan in PLANS:
                assert fitted(plan, stage, limit).shared(stage) <= limit
    assert fitted(Plan(2, 16, 2), 256, 99 * 1024) == Plan(2, 16, 2)
    assert fitted(Plan(2, 16, 2), 6_368, 24 * 1024) == Plan(1, 1, 1)


def test_the_operation_on_a_gpu_launches_the_kernel(
    host: Callable[..., HostModule], monkeypatch: pytest.MonkeyPatch
) -> None:
    values, streams = small()
    monkeypatch.setattr(cuda, "module", lambda op, device: host(op))
    out, status = torch.zeros(streams.numel, dtype=torch.bfloat16), torch.ones(1, dtype=torch.int32)
    lanes_decode._into_on_gpu(list(streams.tensors()), "bf16", streams.shared, out, status)
    for found, wanted in zip(streams.views(out), values, strict=True):
        np.testing.assert_array_equal(words_of(found), wanted)
    assert int(status) == 1


def test_every_way_that_is_timed_on_a_gpu(host: Callable[..., HostModule], monkeypatch: pytest.MonkeyPatch) -> None:
    values, stream = make_inputs(BY_NAME["zero-runs"])
    monkeypatch.setattr(cuda, "module", lambda op, device: host(op))
    out = torch.zeros(len(values), dtype=torch.bfloat16)
    ways = list(_variants("zeros", stream, out, 1))
    assert len({way.way for way in ways}) == len(ways) >= 15
    for way in ways:
        out.zero_()
        way.run()
        np.testing.assert_array_equal(words_of(out), values, err_msg=way.way)


def test_arrays_must_be_aligned(host: Callable[..., HostModule]) -> None:
    _, streams = one(BY_NAME["weights-bf16"])
    out = torch.empty(streams.numel + 8, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="16-byte"):
        launch.decode(host("lanes_decode"), streams.tensors(), "bf16", streams.shared, out[1:], None)
    wide = torch.empty(2 * streams.numel, dtype=torch.bfloat16)[::2]
    with pytest.raises(ValueError, match="contiguous"):
        launch.decode(host("lanes_decode"), streams.tensors(), "bf16", streams.shared, wide, None)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu() -> None:
    assert {name: error for name, error in check(torch.device("cuda")).items() if error} == {}


def test_table_has_both_symbols_or_says_that_one_is_alone() -> None:
    lengths = np.array([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 12], dtype=np.uint8)
    table = tables.build(lengths, 200, "u8")
    alone = table & tables.ALONE != 0
    assert alone.any()
    assert not alone.all()
    first, both = table >> 16 & 15, table >> 24
    assert (both[alone] == first[alone]).all()
    assert (both[~alone] > first[~alone]).all()
    assert int(both.max()) == 12
    for split in ("u8", "bf16", "u16"):
        np.testing.assert_array_equal(tables.lengths(tables.build(lengths, 200, split), split)[200:213], lengths)
