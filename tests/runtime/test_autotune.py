"""What `auto` decides on a GPU, from made-up measurements and sizes."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tcw
from tcw.bench.clock import Times
from tcw.runtime import autotune, residency, tuning
from tcw.runtime.autotune import Table, key, measured
from tcw.runtime.choose import Choice, Facts, choose

CPU = torch.device("cpu")
SHAPE = (64, 256)


class Ticks:
    """A clock by which every run takes longer than the one before."""

    def __init__(self) -> None:
        self.runs = 0

    def measure(self, run: Any, repeat: int | None, seconds: float) -> Times:
        run()
        self.runs += 1
        return Times([self.runs / 1000] * 3)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: Any) -> Path:
    monkeypatch.setenv("TCW_CACHE", str(tmp_path))
    return tmp_path


def table(plain: float, fused: list[float], unpack: float) -> Table:
    times = {key(SHAPE, "p4", rows, "plain"): plain for rows in autotune.ROWS}
    times |= {key(SHAPE, "p4", rows, "unpack"): unpack for rows in autotune.ROWS}
    return Table(times | {key(SHAPE, "p4", rows, "fused"): t for rows, t in zip(autotune.ROWS, fused, strict=False)})


def test_each_shape_is_measured_once(cache: Path) -> None:
    clock = Ticks()
    found = measured([SHAPE, SHAPE], "p4", CPU, clock)
    assert clock.runs == 4 + 4 + 3  # 64 rows are not fused
    assert found.time(SHAPE, "p4", 1, "plain") == 1.0
    assert found.time(SHAPE, "p4", 64, "fused") == float("inf")
    assert measured([SHAPE], "p4", CPU, clock).times == found.times
    assert clock.runs == 11
    assert measured([SHAPE, (32, 256)], "p4", CPU, clock).times.items() > found.times.items()
    assert clock.runs == 22
    [path] = (cache / "autotune").iterdir()
    assert path == autotune.file_of(CPU)
    assert path.name.startswith("cpu-tcw")
    assert f"torch{torch.__version__}".replace("+", "-") in path.name


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"microseconds": 3}', '{"microseconds": {"a": "b"}}', '{"microseconds": {"a": -1}}']
)
def test_a_damaged_file_is_measured_anew(caplog: Any, text: str) -> None:
    path = autotune.file_of(CPU)
    path.parent.mkdir(parents=True)
    path.write_text(text)
    caplog.set_level(logging.WARNING, logger="tcw")
    clock = Ticks()
    measured([SHAPE], "p4", CPU, clock)
    assert clock.runs == 11
    assert "measured anew" in caplog.text
    assert json.loads(path.read_text())["microseconds"][key(SHAPE, "p4", 1, "plain")] == 1.0


def test_a_folder_that_cannot_be_written_is_no_error(cache: Path, caplog: Any) -> None:
    (cache / "autotune").write_text("in the way")
    assert measured([SHAPE], "p4", CPU, Ticks()).times
    assert "cannot be kept" in caplog.text


def test_real_times_of_this_processor() -> None:
    found = measured([SHAPE], "p3", CPU)
    assert all(found.time(SHAPE, "p3", rows, "plain") > 0 for rows in autotune.ROWS)


@pytest.mark.parametrize(
    ("times", "pays", "rows"),
    [
        (table(10, [5, 6, 7], 20), True, 16),
        (table(10, [5, 6, 27], 20), True, 4),
        (table(10, [21, 6, 7], 20), False, 0),
        (table(10, [9.9, 9.9, 9.9], 20), False, 16),
        (table(10, [30, 30, 30], 9), True, 0),
        (Table(), False, 16),
    ],
)
def test_what_times_say(times: Table, pays: bool, rows: int) -> None:
    assert (times.pays(SHAPE, "p4"), times.fused_rows(SHAPE, "p4")) == (pays, rows)


@pytest.mark.parametrize(
    ("facts", "residency", "mixed"),
    [
        (Facts(100, 70, 53, 48, 0, 4), "bf16", False),
        (Facts(100, 70, 53, 48, 1, 4), "packed", True),
        (Facts(100, 70, None, None), "bf16", False),
        (Facts(100, 71, 53, 48, 0, 4), "packed", False),
        (Facts(100, 71, 53, 48, 4, 4), "packed", False),
        (Facts(100, 120, 91, 82, 4, 4), "huffman", False),
        (Facts(100, 120, None, 82), "huffman", False),
        (Facts(100, 140, 106, 96, 4, 4), "offload", False),
        (Facts(100, 400, 106, None), "bf16", False),
        (Facts(100, 400, 80, None), "packed", False),
    ],
)
def test_the_fastest_that_fits_is_chosen(facts: Facts, residency: str, mixed: bool) -> None:
    found = choose(facts)
    assert isinstance(found, Choice)
    assert (found.residency, found.mixed) == (residency, mixed)
    assert "100 B" in found.why


def test_what_cannot_be_measured_is_packed(monkeypatch: Any, caplog: Any) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    caplog.set_level(logging.INFO, logger="tcw")
    monkeypatch.setattr(autotune, "measured", full)
    for mixed in (False, True):
        assert tuning.tune("p4", mixed=mixed)(SHAPE, CPU) == 16
    assert "no memory is left to measure products with weights of 64 x 256" in caplog.text


def test_auto_without_kernels_is_bf16(zoo: Any, monkeypatch: Any, caplog: Any) -> None:
    def none(*given: Any) -> None:
        raise tcw.cuda.NoGpu(f"{given[-1]} is too old", "take another")

    source = tcw.open_model(zoo("llama").artifact)
    need = residency.loaded_bytes(source, None)
    monkeypatch.setattr(residency, "KERNELS", {"cuda"})
    monkeypatch.setattr(tcw.cuda, "module", none)
    monkeypatch.setattr(autotune, "measured", none)
    for free in (10 * need, int(1.2 * need), need // 2):
        monkeypatch.setattr(residency, "pick", lambda text, free=free: SimpleNamespace(free_bytes=free))
        assert residency.settle("auto", source, None, ["cuda:0"]).residency == "bf16"
    assert "weights cannot stay compressed: cuda:0 is too old; take another" in caplog.text
