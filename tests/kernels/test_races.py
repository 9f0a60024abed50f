"""Kernels share no memory between threads without a barrier, background copies included; one that is missing shows.

Some barriers are missed by no order of threads that the processor tries, only by the sanitizer. Each kernel runs for
several turns of its loops, so that buffers are used again.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tcw.kernels.df11_decode import cases as df11_cases
from tcw.kernels.df11_decode import group_of
from tcw.kernels.df11_decode import launch as df11_launch
from tcw.kernels.lanes_decode import cases as lanes_cases
from tcw.kernels.lanes_decode import group
from tcw.kernels.lanes_decode import launch as lanes_launch
from tcw.kernels.lanes_decode.launch import Plan
from tcw.kernels.lanes_encode import encode
from tcw.kernels.lanes_encode import launch as encode_launch
from tcw.kernels.packed_matmul.cases import Case
from tcw.kernels.packed_matmul.check import fault

from tcw.folders import folder
from tests.kernels.host import HostError, HostModule, sanitizer

Host = Callable[..., HostModule]
PLANS = [Plan(1, 2, 1), Plan(1, 1, 2), Plan(2, 1, 1), Plan(2, 1, 2)]
MISSED = {  # a barrier, by what stands before it, that no other test misses
    "lanes_decode": ("copy_wait<0>();\n        ", "__syncwarp(ALL);"),
    "packed_matmul": ("copy_wait<STAGES - 2>();\n            ", "__syncwarp(ALL);"),
    "df11_decode": ("// the warp before has them, in slots of its own\n    ", "__syncwarp();"),
    "lanes_encode": ("codes + (base - begin));\n        ", "__syncwarp();"),
}


def lanes_decode(module: HostModule) -> None:
    words, stream = lanes_cases.make_inputs(lanes_cases.Case("", "zero_runs", "bf16", 13_000))
    streams = group([(stream.parts, stream.params, words.size)])
    for plan in PLANS:
        out = torch.empty(words.size, dtype=torch.bfloat16)
        lanes_launch.decode(module, streams.tensors(), "bf16", streams.shared, out, None, plan)
        np.testing.assert_array_equal(out.view(torch.int16).numpy().view(np.uint16), words)


def packed_matmul(module: HostModule) -> None:
    for case in (Case("narrow", 2, 16, 2600), Case("wide", 9, 20, 1300)):
        assert fault(case, torch.device("cpu"), module) == ""


def df11_decode(module: HostModule) -> None:
    words, arrays = df11_cases.make_inputs(df11_cases.Case("", "weights", 26_000))
    streams = group_of(**vars(arrays))
    out = torch.empty(words.size, dtype=torch.bfloat16)
    df11_launch.decode(module, streams.tensors(), streams.shortest, out)
    np.testing.assert_array_equal(out.view(torch.int16).numpy().view(np.uint16), words)
    df11_launch.check(module, streams.tensors(), streams.stream_bytes, torch.zeros(1, dtype=torch.int32))


def lanes_encode(module: HostModule) -> None:
    words, expected = lanes_cases.make_inputs(lanes_cases.Case("", "zero_runs", "bf16", 40_000))
    found = encode(torch.from_numpy(words), "bf16", module=module).numpy()
    np.testing.assert_array_equal(found.parts["codes"], expected.parts["codes"])


@pytest.fixture
def watched(host: Host, monkeypatch: pytest.MonkeyPatch) -> Host:
    """As `host`, on a device that takes one block at a time: blocks have more than one turn."""
    if sanitizer("races") is None:
        pytest.skip("the C++ compiler has no ThreadSanitizer")
    monkeypatch.setattr(HostModule, "multiprocessors", 1)
    monkeypatch.setattr(encode_launch, "_BLOCKS", 1)
    monkeypatch.setattr(df11_launch, "RESIDENT", dict.fromkeys(df11_launch.RESIDENT, 1))
    return lambda op: host(op, races=True)


@pytest.mark.parametrize("op", MISSED)
def test_threads_share_memory_in_order(watched: Host, op: str) -> None:
    globals()[op](watched(op))


@pytest.mark.parametrize("op", MISSED)
def test_a_barrier_less_is_a_race(watched: Host, op: str, tmp_path: Path) -> None:
    text, (before, barrier) = (folder("kernels") / op / "kernel.cu").read_text(encoding="utf-8"), MISSED[op]
    assert text.count(before + barrier) == 1
    (tmp_path / "kernel.cu").write_text(text.replace(before + barrier, before), encoding="utf-8")
    with pytest.raises(HostError, match=r"(?s)data race.*kernel.cu"):
        globals()[op](watched(tmp_path / "kernel.cu"))
