import inspect
from pathlib import Path

import numpy as np
import pytest

from tcw import device
from tcw.device import Device, copy_bandwidth, copy_bytes, pick
from tcw.errors import UsageError

GIB = 1 << 30


def _cpu(free: int = 4 * GIB, cores: int = 2) -> Device:
    return Device("a processor", "cpu", "cpu", 8 * GIB, free, "asked for", cores)


def test_cpu_is_always_here_and_says_why() -> None:
    found = pick("cpu")
    assert (found.kind, found.torch_name, found.reason) == ("cpu", "cpu", "asked for")
    assert 0 < found.free_bytes <= found.memory_bytes
    assert found.name
    assert found.cores >= 1


def test_auto_prefers_cuda_then_mps_then_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(kind: str) -> object:
        return lambda name, why: Device("x", name, kind, 1, 1, why)

    monkeypatch.setattr(device, "_cuda", make("cuda"))
    monkeypatch.setattr(device, "_mps", make("mps"))
    for here, expected in ((["cuda:0", "mps", "cpu"], "cuda:0"), (["mps", "cpu"], "mps"), (["cpu"], "cpu")):
        monkeypatch.setattr(device, "available", lambda here=here: here)
        assert pick("auto").torch_name == expected
    assert "no CUDA" in pick("auto").reason


def test_cuda_means_the_first_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "available", lambda: ["cuda:0", "cuda:1", "cpu"])
    monkeypatch.setattr(device, "_cuda", lambda name, why: Device("x", name, "cuda", 1, 1, why))
    assert pick("cuda").torch_name == "cuda:0"
    assert pick(" CUDA:1 ").torch_name == "cuda:1"
    with pytest.raises(UsageError, match="`cuda:7` is not here") as error:
        pick("cuda:7")
    assert error.value.hint == "choose from: cuda:0, cuda:1, cpu"


@pytest.mark.parametrize("text", ["gpu", "cuda:", "cuda:-1", "cuda:0 ;", "", "tpu"])
def test_a_name_that_means_nothing_lists_what_is_here(text: str) -> None:
    with pytest.raises(UsageError, match="no device is called") as error:
        pick(text)
    assert "auto" in error.value.hint
    assert "cpu" in error.value.hint


def test_copy_buffer_is_bounded_by_free_memory_and_by_512_mb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_last_level_cache", lambda: 100 * GIB)
    assert copy_bytes(_cpu(free=1000 * GIB)) == 512 << 20
    assert copy_bytes(_cpu(free=1 * GIB)) == 64 << 20
    assert copy_bytes(_cpu(free=0)) == 4096
    monkeypatch.setattr(device, "_last_level_cache", lambda: 1 << 20)
    assert copy_bytes(_cpu(free=1000 * GIB)) == 64 << 20


def test_bandwidth_counts_read_and_written_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that moves by one second a copy makes the rate known: 2 bytes moved for each byte copied."""
    now = iter(range(1000))
    monkeypatch.setattr(device.time, "perf_counter", lambda: float(next(now)))
    asked = _cpu(free=GIB)
    assert copy_bandwidth(asked) == pytest.approx(2 * copy_bytes(asked) / 1e9)


def test_every_core_copies_its_own_slice_and_nothing_is_left_out() -> None:
    run, wait = device._cpu_copy(10_001, 3)
    arrays = inspect.getclosurevars(run).nonlocals
    arrays["source"][:] = np.arange(10_001) % 251
    run()
    wait()
    assert np.array_equal(arrays["source"], arrays["target"])


def test_measured_bandwidth_is_of_this_world() -> None:
    assert 0.05 < copy_bandwidth(_cpu(free=512 << 20, cores=1)) < 5000


def _group(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def test_cgroup_v2_limits_of_the_group_and_its_parents(tmp_path: Path) -> None:
    root = _group(tmp_path / "cgroup")
    _group(root / "slice", memory__max="4000\n", memory__current="1000\n", memory__stat="anon 1\ninactive_file 300\n")
    _group(root / "slice" / "job", memory__max="max\n", memory__current="500\n")
    membership = tmp_path / "membership"
    membership.write_text("0::/slice/job\n")
    assert device._cgroup_limits(root, membership) == [(4000, 700)]


def test_cgroup_v1_limits(tmp_path: Path) -> None:
    root = tmp_path / "cgroup"
    _group(root / "memory" / "job", memory__limit_in_bytes="9000", memory__usage_in_bytes="2000")
    membership = tmp_path / "membership"
    membership.write_text("9:name=systemd:/\n4:cpu,memory:/job\n")
    assert device._cgroup_limits(root, membership) == [(9000, 2000)]


def test_inside_a_container_the_mount_is_the_group(tmp_path: Path) -> None:
    root = _group(tmp_path / "cgroup", memory__max="5000", memory__current="100")
    membership = tmp_path / "membership"
    membership.write_text("0::/a/path/of/the/host\n")
    assert device._cgroup_limits(root, membership) == [(5000, 100)]


def test_memory_is_the_smaller_of_machine_and_cgroup(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_machine_memory", lambda: (1000, 800))
    monkeypatch.setattr(device, "_cgroup_limits", lambda: [(600, 500), (2000, 0)])
    assert device.cpu_memory() == (600, 100)
    monkeypatch.setattr(device, "_cgroup_limits", list)
    assert device.cpu_memory() == (1000, 800)


@pytest.mark.gpu
def test_a_gpu_is_picked_and_measured() -> None:
    found = pick("cuda")
    assert found.free_bytes <= found.memory_bytes
    assert copy_bandwidth(found) > 50
