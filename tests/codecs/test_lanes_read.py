import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tcw.codecs import compiled, lanes
from tcw.codecs.pieces import run
from tcw.errors import FormatError

N = 70_001
WORDS = (np.random.default_rng(3).normal(0, 0.02, N).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
SEGMENTS = [5000, 0, 1, 50_000, 15_000]
READERS = {
    "one table": lanes.reader(*(lambda s: (s.parts, s.params))(lanes.encode(WORDS, "bf16")), N),
    "five tables": lanes.reader(*(lambda s: (s.parts, s.params))(lanes.encode(WORDS, "bf16", segments=SEGMENTS)), N),
}


@pytest.mark.parametrize("name", READERS)
@settings(deadline=None, max_examples=150)
@given(first=st.integers(0, N - 1), size=st.integers(1, N) | st.integers(1, 10))
def test_a_span_is_the_slice(name: str, first: int, size: int) -> None:
    end = min(N, first + size)
    assert np.array_equal(READERS[name].span(first, end), WORDS[first:end])


@pytest.mark.parametrize(("first", "end"), [(-1, 3), (3, 3), (0, N + 1)])
def test_a_span_outside_is_refused(first: int, end: int) -> None:
    with pytest.raises(ValueError, match="words"):
        READERS["one table"].span(first, end)


def test_a_span_reads_only_its_chunks() -> None:
    stream = lanes.encode(WORDS, "bf16")
    codes = stream.parts["codes"].copy()
    codes[int(stream.parts["chunk_base"][9]) : int(stream.parts["chunk_base"][10])] = 0xFF
    reader = lanes.reader({**stream.parts, "codes": codes}, stream.params, N)
    assert np.array_equal(reader.span(8 * 4096, 9 * 4096), WORDS[8 * 4096 : 9 * 4096])
    with pytest.raises(FormatError, match="of chunk 9 does not end"):
        reader.span(9 * 4096 + 5, 9 * 4096 + 6)


@pytest.mark.parametrize("threads", [1, 3])
def test_run_does_every_piece_once_and_leaves_none_running(threads: int) -> None:
    compiled.set_threads(threads)
    try:
        done: list[int] = []
        run([lambda k=k: done.append(k) for k in range(50)])  # type: ignore[misc]
        assert sorted(done) == list(range(50))
        run([])
        slow_is_done = threading.Event()

        def slow() -> None:
            time.sleep(0.2)
            slow_is_done.set()

        with pytest.raises(FormatError, match="bad"):
            run([slow, bad, lambda: None])
        assert slow_is_done.is_set()
    finally:
        compiled.set_threads(0)


def bad() -> None:
    raise FormatError("bad")
