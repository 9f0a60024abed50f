"""The `lanes` stream: every bit comes back, sizes are as promised, and the same input gives the same bytes."""

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tcw.codecs import compiled, lanes
from tcw.codecs.lanes_layout import SPLITS

SIZES = st.one_of(st.integers(0, 300), st.sampled_from([4095, 4096, 4097, 8192, 12_345, 300_001]))


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    yield
    compiled.set_threads(0)


def draw_words(seed: int, split: str, numel: int, kinds: int) -> np.ndarray:
    """Words with about `kinds` different symbols, skewed, and the rest of each word at random."""
    rng, how = np.random.default_rng(seed), SPLITS[split]
    bits = 8 * np.dtype(how.word).itemsize
    rest = rng.integers(0, 1 << bits, numel, dtype=np.uint64)
    choice = rng.integers(0, how.mask + 1, kinds)
    symbols = choice[np.minimum(rng.geometric(0.3, numel) - 1, kinds - 1)].astype(np.uint64)
    coded = np.uint64(how.mask << how.shift)
    return ((rest & ~coded) | symbols << np.uint64(how.shift)).astype(how.word)


def draw_segments(seed: int, numel: int, count: int) -> list[int]:
    edges = np.sort(np.random.default_rng(seed).integers(0, numel + 1, count - 1))
    return np.diff([0, *edges.tolist(), numel]).tolist()


@given(st.integers(0, 99), st.sampled_from(sorted(SPLITS)), SIZES, st.sampled_from([1, 2, 3, 40, 64, 65, 256]))
@settings(max_examples=120, deadline=None)
def test_words_round_trip(seed: int, split: str, numel: int, kinds: int) -> None:
    words = draw_words(seed, split, numel, kinds)
    stream = lanes.encode(words, split)
    decoded = lanes.decode(stream.parts, stream.params, numel)
    assert decoded.dtype == words.dtype
    assert np.array_equal(decoded, words)


@given(st.integers(0, 99), st.sampled_from(["bf16", "u8", "u16"]), SIZES, st.integers(1, 9), st.integers(9, 12))
@settings(max_examples=40, deadline=None)
def test_segments_round_trip(seed: int, split: str, numel: int, count: int, max_length: int) -> None:
    words, segments = draw_words(seed, split, numel, 100), draw_segments(seed, numel, count)
    stream = lanes.encode(words, split, segments=segments, max_length=max_length)
    assert stream.params["segments"] == segments
    assert stream.parts["table"].shape[0] == count
    assert np.array_equal(lanes.decode(stream.parts, stream.params, numel), words)


@given(
    st.integers(0, 99), SIZES, st.sampled_from([0.3, 1.0, 30.0]), st.booleans(),
    st.sampled_from([None, 0, 5, 100]), st.sampled_from([None, 1, 4]),
)  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_integers_round_trip(
    seed: int, numel: int, sigma: float, pair: bool, escape_above: int | None, count: int | None
) -> None:
    rng = np.random.default_rng(seed)
    values = np.rint(np.clip(rng.normal(0, min(sigma, 4) if pair else sigma, numel), -127, 127)).astype(np.int32)
    if escape_above is not None and numel:
        values[rng.integers(0, numel, 3)] = (1 << 31) - 1, -(1 << 31), 70_000
    segments = None if count is None else draw_segments(seed, numel, count)
    stream = lanes.encode_integers(values, pair=pair, escape_above=escape_above, segments=segments)
    decoded = lanes.decode_integers(stream.parts, stream.params, numel)
    assert decoded.dtype == np.int32
    assert np.array_equal(decoded, values)


@pytest.mark.parametrize("values", [[(1 << 31) - 1, (1 << 31) - 5], [-(1 << 31), -(1 << 31) + 255], [-5], [40_000] * 9])
def test_integers_far_from_zero(values: list[int]) -> None:
    array = np.array(values, dtype=np.int32)
    stream = lanes.encode_integers(array)
    assert np.array_equal(lanes.decode_integers(stream.parts, stream.params, array.size), array)


def test_what_cannot_be_coded_says_so() -> None:
    with pytest.raises(lanes.NotCodable, match="4097 symbols"):
        lanes.encode(np.arange(4097, dtype=np.uint16), "u16")
    assert lanes.encode(np.arange(4096, dtype=np.uint16), "u16").parts["lane_bytes"].max() == 192
    with pytest.raises(lanes.NotCodable, match="from -40000 to 40000"):
        lanes.encode_integers(np.array([-40_000, 40_000], dtype=np.int32))
    with pytest.raises(lanes.NotCodable, match="in pairs"):
        lanes.encode_integers(np.array([0, 256], dtype=np.int32), pair=True)
    with pytest.raises(lanes.NotCodable):
        lanes.predict(np.arange(4097, dtype=np.uint16), "u16")


@pytest.mark.parametrize(
    ("words", "split", "options"),
    [
        (np.zeros(4, np.uint8), "bf16", {}),
        (np.zeros((2, 2), np.uint16), "bf16", {}),
        (np.zeros(4, np.uint16), "bf16", {"segments": [1, 2]}),
        (np.zeros(4, np.uint16), "bf16", {"segments": [5, -1]}),
        (np.zeros(4, np.uint16), "bf16", {"segments": [4] + [0] * 256}),
        (np.zeros(4, np.uint16), "bf16", {"max_length": 13}),
    ],
)
def test_wrong_arguments_are_refused(words: np.ndarray, split: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"bf16|segments|codes are"):
        lanes.encode(words, split, **options)


@pytest.mark.parametrize("split", sorted(SPLITS))
@pytest.mark.parametrize("numel", [0, 1, 1000, 100_000])
def test_predict_is_the_size(split: str, numel: int) -> None:
    words = draw_words(1, split, numel, 30)
    size = lanes.encode(words, split).nbytes
    assert lanes.predict(words, split) == pytest.approx(size, rel=0.001, abs=16)


def test_predict_knows_segments_and_lone_symbols() -> None:
    words = draw_words(2, "bf16", 100_000, 30)
    segments = [50_000, 0, 50_000]
    assert lanes.predict(words, "bf16", segments=segments) == pytest.approx(
        lanes.encode(words, "bf16", segments=segments).nbytes, rel=0.001
    )
    lone = np.zeros(40_960, dtype=np.uint16)
    assert lanes.predict(lone, "bf16") == lanes.encode(lone, "bf16").nbytes


def test_size_of_a_gaussian() -> None:
    x = np.random.default_rng(0).normal(0, 0.02, 1 << 20).astype(np.float32)
    words = (x.view(np.uint32) >> 16).astype(np.uint16)
    assert 8 * lanes.encode(words, "bf16").nbytes / words.size < 10.70


def test_same_bytes_for_any_number_of_threads() -> None:
    words = draw_words(3, "bf16", 3_000_000, 40)
    streams = []
    for count in (1, 2, 5):
        compiled.set_threads(count)
        streams.append(lanes.encode(words, "bf16"))
        decoded = lanes.decode(streams[0].parts, streams[0].params, words.size)
        assert np.array_equal(decoded, words)
    for stream in streams[1:]:
        assert stream.params == streams[0].params
        assert all(np.array_equal(stream.parts[k], v) for k, v in streams[0].parts.items())


def test_callers_may_be_threads() -> None:
    compiled.set_threads(2)
    inputs = [draw_words(seed, "bf16", 700_000, 40) for seed in range(4)]

    def round_trip(words: np.ndarray) -> bool:
        stream = lanes.encode(words, "bf16")
        return np.array_equal(lanes.decode(stream.parts, stream.params, words.size), words)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(round_trip, inputs))


def test_a_forked_process_has_threads_of_its_own() -> None:
    code = """
import os
import numpy as np
from tcw.codecs import compiled, lanes
compiled.set_threads(2)
words = np.arange(900_000, dtype=np.uint32).astype(np.uint16)
lanes.encode(words, "bf16")
child = os.fork()
if child == 0:
    stream = lanes.encode(words, "bf16")
    os._exit(0 if np.array_equal(lanes.decode(stream.parts, stream.params, words.size), words) else 7)
assert os.waitpid(child, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.slow
def test_code_is_compiled_once_and_runs_without_a_cache_folder(tmp_path: Path) -> None:
    code = """
import numpy as np, sys
from tcw.codecs import lanes
from tcw.codecs.lanes_encode import encode_units
stream = lanes.encode(np.arange(9000, dtype=np.uint16), "bf16")
print(len(lanes.decode(stream.parts, stream.params, 9000)), sum(encode_units.stats.cache_hits.values()))
"""

    def run(folder: Path, **more: str) -> str:
        env = {**os.environ, "NUMBA_CACHE_DIR": str(folder), **more}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run(tmp_path / "cache").split() == ["9000", "0"]
    assert run(tmp_path / "cache").split() == ["9000", "1"]
    nowhere = "_IPythonCacheLocator"  # as where neither the package nor the user's folder can be written
    assert run(tmp_path / "cache", NUMBA_CACHE_LOCATOR_CLASSES=nowhere).split() == ["9000", "0"]


def test_out_is_written_in_place() -> None:
    words = draw_words(4, "bf16", 5000, 30)
    stream = lanes.encode(words, "bf16")
    out = np.zeros(5000, dtype=np.uint16)
    assert lanes.decode(stream.parts, stream.params, 5000, out=out) is out
    assert np.array_equal(out, words)
    with pytest.raises(ValueError, match="out"):
        lanes.decode(stream.parts, stream.params, 5000, out=np.zeros(5001, dtype=np.uint16))


def test_worked_example() -> None:
    # codes: symbol 1 -> 0, symbol 2 -> 10, symbol 3 -> 11; lane 0 has symbols 0..3 and 128, lane 1 symbols 4, 5
    words = np.array([1, 2, 3, 1] + [1, 3] + [1] * 122 + [3], dtype=np.uint8)
    stream = lanes.encode(words, "u8")
    assert stream.params == {"split": "u8", "symbols": 129, "first_symbol": 1, "alphabet": 3, "max_length": 12}
    assert stream.parts["table"].tolist() == [[0x21, 0x02]]
    # stream bits of lane 0, in order: 0 10 11 0 11 = bits 1, 3, 4, 6, 7
    assert stream.parts["codes"][0] == 0b11011010
    # lane 1: 0 11 0 0 = bits 1, 2
    assert stream.parts["codes"][1] == 0b00000110
    assert stream.parts["lane_bytes"].tolist() == [1] * 32
