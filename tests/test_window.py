"""Results in order, never more than the window at work, nothing begun after the end."""

import random
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from tcw import window
from tcw.tensor import TensorInfo
from tcw.window import in_order


@pytest.mark.parametrize("seed", range(5))
def test_bytes_at_work_stay_within_the_window(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window, "WINDOW_BYTES", 1000)
    rng = random.Random(seed)
    infos = [TensorInfo(f"t{k}", "U8", (rng.choice([0, 10, 400, 900, 5000]),)) for k in range(60)]
    lock, held, most = threading.Lock(), 0, []
    pool = ThreadPoolExecutor(4)

    def work(info: TensorInfo) -> str:
        time.sleep(rng.random() / 1000)
        return info.name

    def submit(info: TensorInfo) -> "Future[str]":
        nonlocal held
        with lock:
            held += info.nbytes
            most.append((held, info.nbytes))
        return pool.submit(work, info)

    names = []
    for info, name in in_order(pool, infos, submit):
        names.append(name)
        held -= info.nbytes
    assert names == [info.name for info in infos]
    assert all(total <= 1000 or total == size for total, size in most), "only a larger tensor passes, and alone"
    assert max(total for total, _ in most) == 5000


def test_an_error_ends_the_work() -> None:
    pool, begun = ThreadPoolExecutor(1), []

    def work(info: TensorInfo) -> None:
        begun.append(info.name)
        raise OSError(info.name)

    infos = [TensorInfo(f"t{k}", "U8", (1,)) for k in range(100)]
    with pytest.raises(OSError, match="t0"):
        list(in_order(pool, infos, lambda info: pool.submit(work, info)))
    assert len(begun) < 100
    with pytest.raises(RuntimeError):
        pool.submit(work, infos[0])


def test_tiny_tensors_take_time_in_proportion(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window, "_MOST", 8)
    pool, open_now, most = ThreadPoolExecutor(2), 0, 0

    def submit(info: TensorInfo) -> "Future[str]":
        nonlocal open_now, most
        open_now += 1
        most = max(most, open_now)
        return pool.submit(lambda: info.name)

    infos = [TensorInfo(f"t{k}", "U8", (1,)) for k in range(500)]
    for _ in in_order(pool, infos, submit):
        open_now -= 1
    assert most == 8
