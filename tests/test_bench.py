"""Benchmarks: right first, then timed with cold caches; rows say what was measured and go where they belong."""

import contextlib
import json
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tcw import bench, kernels
from tcw.bench import clock, rows
from tcw.bench.clock import CpuClock, GpuClock, Times, percentile
from tcw.bench.rows import Facts, append, commit_of, place_of, row
from tcw.device import pick
from tcw.errors import UnknownName, UsageError
from tcw.events import Progress

FACTS = Facts(100.0, "Card 1", "580.1", "2.13", "1.0", "abc", "2026-01-01T00:00:00+00:00", "CPU 1", 2)
FAKE = """
import torch
from tcw.bench import Timed
ran = []
def check(device):
    empty = torch.empty(3)
    return {"poisoned": "" if empty.isnan().all() else "not", "right": ""}
def timed(device):
    for case in ("small", "large"):
        yield Timed(case, "ours", lambda case=case: ran.append(case), 1_000_000)
        yield Timed(case, "theirs", lambda case=case: ran.append("their " + case), 2_000_000)
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], Path]]:
    """`fake(op, code of its bench.py)` -> its folder, the only ones there are; nothing is copied, little is flushed."""
    monkeypatch.setattr(kernels, "__path__", [str(tmp_path / "kernels")])
    monkeypatch.setattr(clock, "copy_bytes", lambda device: 4096)
    monkeypatch.setattr("tcw.device.copy_bandwidth", lambda device: 100.0)

    def make(op: str, code: str) -> Path:
        folder = tmp_path / "kernels" / op
        folder.mkdir(parents=True)
        (folder / "bench.py").write_text(code)
        return folder

    yield make
    for name in [n for n in sys.modules if n.startswith("tcw.kernels.fake")]:
        del sys.modules[name]


def test_folders_with_a_benchmark_are_found(fake: Any) -> None:
    fake("fake_b", FAKE)
    folder = fake("fake_a", FAKE)
    (folder.parent / "include").mkdir()
    assert bench.names() == ["fake_a", "fake_b"]
    assert bench.folder_of("fake_a") == folder
    for wrong in ("fake_c", "include", "..", "", "fake_a/../fake_b"):
        with pytest.raises(UnknownName, match="no kernel named"):
            bench.folder_of(wrong)


def test_those_of_the_project_are_found() -> None:
    assert {"int_matmul", "kv_dequant_attention"} <= set(bench.names())


@pytest.mark.parametrize("op", ["int_matmul", "kv_dequant_attention"])
def test_the_ways_of_a_case_compute_the_same(op: str) -> None:
    pytest.importorskip("triton", reason="triton has no wheel for this platform")
    found: dict[str, list[torch.Tensor]] = {}
    for timed in bench._bench(op).timed(torch.device("cpu")):
        result = timed.run()
        found.setdefault(timed.case, []).append(result[0] if isinstance(result, tuple) else result)
        assert timed.nbytes > 0
    for results in found.values():
        assert len(results) > 1
        for other in results[1:]:
            torch.testing.assert_close(results[0], other, rtol=1e-4, atol=1e-4)


def test_unwritten_memory_is_poisoned_while_checking(fake: Any) -> None:
    fake("fake_op", FAKE)
    assert bench.check("fake_op", pick("cpu")) == {"poisoned": "", "right": ""}
    assert not torch.are_deterministic_algorithms_enabled()


def test_every_way_is_timed_and_compared_with_the_first(fake: Any) -> None:
    fake("fake_op", FAKE)
    events: list[Progress] = []
    found = list(bench.measure(["fake_op"], pick("cpu"), repeat=3, progress=events.append))
    assert [(r.case, r.way, r.bytes) for r in found] == [
        ("small", "ours", 1_000_000), ("small", "theirs", 2_000_000),
        ("large", "ours", 1_000_000), ("large", "theirs", 2_000_000),
    ]  # fmt: skip
    for ours, theirs in ((found[0], found[1]), (found[2], found[3])):
        assert ours.ratio == 1.0
        assert theirs.ratio == pytest.approx(theirs.ms_p50 / ours.ms_p50, rel=2e-3)
    assert all(r.op == "fake_op" and r.runs == 3 and not r.graph and r.facts.driver == "" for r in found)
    ran = sys.modules["tcw.kernels.fake_op.bench"].ran
    assert ran == ["small"] * 5 + ["their small"] * 5 + ["large"] * 5 + ["their large"] * 5  # compiled, tried, 3 runs
    assert (events[0].done, events[-1].done, events[-1].total) == (0, 1, 1)


def test_a_row_says_what_the_times_mean() -> None:
    timed = bench.Timed("8x8", "ours", lambda: None, 2_000_000)
    times = Times([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [2.0] * 5 + [4.0], graph=True)
    found = row("op", timed, times, 7.0, FACTS)
    assert (found.ms_p20, found.ms_p50, found.ms_p80) == (2.0, 3.5, 5.0)
    assert found.gbps == pytest.approx(2e6 / 3.5e-3 / 1e9, rel=1e-3)
    assert found.percent_of_copy == pytest.approx(found.gbps, rel=1e-3)
    assert (found.cpu_gbps, found.ratio, found.runs, found.graph) == (1.0, 0.5, 6, True)
    assert row("op", timed, Times([2.0]), None, FACTS).cpu_gbps is None
    written = found.to_json()
    assert list(written)[:3] == ["op", "case", "way"]
    assert {k: written[k] for k in vars(FACTS)} == vars(FACTS)
    assert "facts" not in written


def test_percentiles() -> None:
    assert [percentile([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], p) for p in (0, 20, 50, 80, 100)] == [1, 2, 3.5, 5, 6]
    assert percentile([7.0], 20) == 7.0


def test_as_many_runs_as_fit() -> None:
    assert clock.runs_in(1.0, 0.01) == 100
    assert clock.runs_in(1.0, 10.0) == clock.LEAST
    assert clock.runs_in(1.0, 0.0) == clock.MOST


def test_the_processor_is_timed_with_cold_caches() -> None:
    cold: list[int] = []
    timer = CpuClock(4096)
    times = timer.measure(lambda: cold.append(int(timer._cold.max())), 4, 1.0)
    assert cold == [0, 1, 2, 3, 4, 5]  # the first run compiles; the buffer is written before each other one
    assert len(times.ms) == 4
    assert times.ms == sorted(times.ms)
    assert times.cpu_ms is not None
    spun = timer.measure(lambda: sum(range(200_000)), None, 0.05)
    assert clock.LEAST <= len(spun.ms) <= clock.MOST
    assert spun.cpu_ms is not None
    assert spun.cpu_ms[0] > 0


class FakeGpu:
    """What GpuClock asks of torch.cuda: notes the order of the device's work."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capturing: str = "works") -> None:
        self.queue: list[str] = []
        gpu, ended = self, iter(range(10_000))

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                gpu.queue.append("event")

            def elapsed_time(self, end: Any) -> float:
                return 10.0 - next(ended) % 10  # unsorted

        @contextlib.contextmanager
        def graph(held: Any) -> Iterator[None]:
            yield
            if capturing == "fails":
                raise RuntimeError("operation not permitted when stream is capturing")
            if capturing == "empty":
                warnings.warn("The CUDA Graph is empty. This usually means that ...", UserWarning, stacklevel=1)
            gpu.queue.append("captured")

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "graph", graph)
        monkeypatch.setattr(
            torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: self.queue.append("replay"))
        )
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: self.queue.append("wait"))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: "first stream")
        monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: self.queue.append(stream))
        monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
        monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: self.queue.append(f"syncs {mode}"))
        monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        properties = SimpleNamespace(L2_cache_size=1 << 20)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)


@pytest.mark.parametrize("capturing", ["works", "fails", "empty"])
def test_a_gpu_is_timed_between_events_behind_a_flush(monkeypatch: pytest.MonkeyPatch, capturing: str) -> None:
    gpu = FakeGpu(monkeypatch, capturing)
    timer = GpuClock(torch.device("cpu"))
    assert timer._cold.nbytes == 2 << 20
    timer._cold = SimpleNamespace(zero_=lambda: gpu.queue.append("flush"))  # type: ignore[assignment]
    times = timer.measure(lambda: gpu.queue.append("run"), 4, 1.0)
    assert times.graph is (capturing == "works")
    assert times.ms == sorted(times.ms)
    assert len(times.ms) == 4
    timed = ["flush", "event", "replay" if times.graph else "run", "event"] * 4
    assert gpu.queue[-17:] == [*timed, "wait"]  # the host waits once, behind all of them
    # compiled before it is captured, and tried once without waiting
    assert gpu.queue[:7] == ["run", "run", "run", "wait", "syncs error", "run", "syncs 0"]
    assert ("first stream" in gpu.queue) is (capturing == "fails")


def test_what_waits_for_the_device_is_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu(monkeypatch)

    def waits() -> None:
        if gpu.queue[-1] == "syncs error":
            raise RuntimeError("called a synchronizing CUDA operation")

    graph, why = clock.capture(waits)
    assert (graph, why) == (None, "RuntimeError: called a synchronizing CUDA operation")
    assert gpu.queue == ["syncs error", "syncs 0", "first stream", "wait"]
    assert clock.capture(lambda: None)[1] == ""


def test_results_lie_in_a_checkout_or_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TCW_CACHE", str(tmp_path / "cache"))
    op = tmp_path / "kernels" / "op"
    op.mkdir(parents=True)
    assert place_of(op) == tmp_path / "cache" / "bench" / "op.jsonl"
    (tmp_path / ".git").mkdir()
    assert place_of(op) == op / "results.jsonl"
    monkeypatch.setattr(rows.os, "access", lambda path, mode: False)
    assert place_of(op) == tmp_path / "cache" / "bench" / "op.jsonl"


def test_rows_are_appended(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.jsonl"
    one = row("op", bench.Timed("c", "w", lambda: None, 5), Times([1.0]), None, FACTS)
    append([one], path)
    append([one, one], path)
    lines = path.read_text().splitlines()
    assert [json.loads(line) for line in lines] == [one.to_json()] * 3


def test_the_commit_is_named_and_its_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> None:
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", *who, *arguments], cwd=tmp_path, check=True, capture_output=True)

    monkeypatch.setenv("TCW_COMMIT", "from outside")
    assert commit_of(None) == "from outside"
    assert commit_of(tmp_path) == "from outside"
    results = tmp_path / "kernels" / "op" / "results.jsonl"
    results.parent.mkdir(parents=True)
    results.write_text("")
    git("init")
    git("add", ".")
    git("commit", "-m", "x")
    clean = commit_of(tmp_path)
    assert len(clean) == 12
    results.write_text("more")
    assert commit_of(tmp_path) == clean  # results of the last run do not make the next one another one
    (tmp_path / "kernels" / "op" / "kernel.cu").write_text("")
    assert commit_of(tmp_path) == f"{clean}-dirty"


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    mps = SimpleNamespace(kind="mps")
    cpu = SimpleNamespace(kind="cpu")
    monkeypatch.setattr("tcw.device.pick", lambda text="auto": cpu if text == "cpu" else mps)
    assert bench.device_for("auto") is cpu  # type: ignore[comparison-overlap]
    with pytest.raises(UsageError, match="no kernel runs on `mps`"):
        bench.device_for("mps")


def test_the_driver_is_what_the_system_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build\nGCC version: 12.3.0\n"
    monkeypatch.setattr(rows.Path, "read_text", lambda *a, **k: said)
    assert rows.driver_version() == "580.95.05"
