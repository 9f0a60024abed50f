"""A reader of `lanes` believes nothing: it raises FormatError or gives an array of the right size."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tcw.codecs import lanes
from tcw.errors import FormatError

N = 9_000


def words() -> np.ndarray:
    x = np.random.default_rng(0).normal(0, 0.02, N).astype(np.float32)
    return (x.view(np.uint32) >> 16).astype(np.uint16)


def integers() -> np.ndarray:
    values = np.rint(np.random.default_rng(0).normal(0, 1, N)).astype(np.int32)
    values[::500] = 1000
    return values


WORDS = lanes.encode(words(), "bf16", segments=[5_000, 4_000])
INTEGERS = lanes.encode_integers(integers(), pair=True, escape_above=9)


def decode(stream: lanes.Stream, parts: dict[str, Any] | None = None, params: dict[str, Any] | None = None) -> Any:
    parts = {**stream.parts, **(parts or {})}
    params = {**stream.params, **(params or {})}
    return (lanes.decode_integers if stream is INTEGERS else lanes.decode)(parts, params, N)


EACH = [(stream, name) for stream in (WORDS, INTEGERS) for name in stream.parts]
IDS = [f"{'integers' if stream is INTEGERS else 'words'}-{name}" for stream, name in EACH]


@pytest.mark.parametrize(("stream", "name"), EACH, ids=IDS)
def test_each_part_must_have_its_size_and_dtype(stream: lanes.Stream, name: str) -> None:
    part = stream.parts[name]
    other = np.int16 if part.dtype != np.int16 else np.int8
    for wrong in (part[:-1], part[1:], part[:0], np.concatenate([part, part[:1]]), part.astype(other), part[None]):
        with pytest.raises(FormatError):
            decode(stream, {name: wrong})
    with pytest.raises(FormatError, match=f"`{name}` is missing"):
        decode(stream, {name: None})


@pytest.mark.parametrize(("stream", "name"), EACH, ids=IDS)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_a_changed_element_is_refused_or_decoded(stream: lanes.Stream, name: str, data: st.DataObject) -> None:
    part = stream.parts[name].copy()
    flat = part.reshape(-1).view(np.uint8)
    where = data.draw(st.integers(0, flat.size - 1))
    flat[where] ^= data.draw(st.integers(1, 255))
    try:
        decoded = decode(stream, {name: part})
    except FormatError:
        return
    assert decoded.shape == (N,)
    assert name in ("codes", "raw", "escape_values", "table")  # the index cannot change unnoticed


@given(st.integers(0, 1 << 32))
@settings(max_examples=60, deadline=None)
def test_random_codes(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for stream in (WORDS, INTEGERS):
        codes = rng.integers(0, 256, stream.parts["codes"].size, dtype=np.uint8)
        try:
            decoded = decode(stream, {"codes": codes})
        except FormatError:
            continue
        assert decoded.shape == (N,)


@given(st.integers(0, 1 << 32))
@settings(max_examples=60, deadline=None)
def test_random_lanes_with_a_true_index(seed: int) -> None:
    """Lanes of random sizes that agree with chunk_base and codes: each lane's own end gives it away."""
    rng = np.random.default_rng(seed)
    lane_bytes = rng.integers(0, 193, WORDS.parts["lane_bytes"].size).astype(np.uint8)
    sums = lane_bytes.reshape(-1, 32).sum(axis=1, dtype=np.int64)
    codes = rng.integers(0, 256, int(sums.sum()), dtype=np.uint8)
    parts = {"lane_bytes": lane_bytes, "chunk_base": (np.cumsum(sums) - sums).astype(np.uint32), "codes": codes}
    with pytest.raises(FormatError, match="does not end with its last code"):
        decode(WORDS, parts)


def test_messages_name_what_is_wrong() -> None:
    lane_bytes = WORDS.parts["lane_bytes"].copy()
    lane_bytes[5] = 193
    with pytest.raises(FormatError, match="a lane of 193 bytes"):
        decode(WORDS, {"lane_bytes": lane_bytes})
    lane_bytes[:] = WORDS.parts["lane_bytes"]
    lane_bytes[5] += 1
    lane_bytes[6] -= 1
    with pytest.raises(FormatError, match="lane 5 of chunk 0"):
        decode(WORDS, {"lane_bytes": lane_bytes})
    base = WORDS.parts["chunk_base"].copy()
    base[1] += 1
    with pytest.raises(FormatError, match="chunk_base"):
        decode(WORDS, {"chunk_base": base})
    with pytest.raises(FormatError, match="unexpected part `more`"):
        decode(WORDS, {"more": base})
    table = WORDS.parts["table"].copy()
    table[1] = 0
    with pytest.raises(FormatError, match="table 1 is not a complete prefix code"):
        decode(WORDS, {"table": table})


def test_padding_must_be_zero() -> None:
    stream = lanes.encode(np.array([1, 2], dtype=np.uint8), "u8")
    assert lanes.decode(stream.parts, stream.params, 2).tolist() == [1, 2]
    with pytest.raises(FormatError, match="lane 0 of chunk 0"):
        lanes.decode({**stream.parts, "codes": stream.parts["codes"] | 4}, stream.params, 2)


def test_a_lone_symbol_has_one_code() -> None:
    stream = lanes.encode(np.full(5000, 7, dtype=np.uint8), "u8")
    codes = stream.parts["codes"].copy()
    codes[99] = 1
    with pytest.raises(FormatError, match="not in its table"):
        lanes.decode({**stream.parts, "codes": codes}, stream.params, 5000)
    table = stream.parts["table"] * 2  # a lone code of two bits
    with pytest.raises(FormatError, match="not a complete"):
        lanes.decode({**stream.parts, "table": table}, stream.params, 5000)


@pytest.mark.parametrize("numel", [0, 1, N - 1, N + 1, 4096 * 32, 1 << 40, 1 << 62])
def test_another_number_of_values_is_refused(numel: int) -> None:
    for params in (WORDS.params, {k: v for k, v in WORDS.params.items() if k != "segments"} | {"symbols": numel}):
        with pytest.raises(FormatError):
            lanes.decode(WORDS.parts, params, numel)


LIES: list[Any] = [None, -1, True, "bf16 ", 1 << 70, 3.0, [], [N], {}]


@pytest.mark.parametrize("stream", [WORDS, INTEGERS], ids=["words", "integers"])
def test_parameters_that_lie_are_refused(stream: lanes.Stream) -> None:
    for key in [*stream.params, "unknown"]:
        for lie in LIES:
            with pytest.raises(FormatError):
                # an offset of -1 is as good as any other: it is no lie
                decode(stream, params={key: "x" if (key, lie) == ("offset", -1) else lie})
        if key != "unknown":
            params = {k: v for k, v in stream.params.items() if k != key}
            reader = lanes.decode_integers if stream is INTEGERS else lanes.decode
            with pytest.raises(FormatError):
                reader(stream.parts, params, N)


@pytest.mark.parametrize(
    "params",
    [
        {"first_symbol": 255}, {"alphabet": 1}, {"alphabet": 65_536}, {"max_length": 2}, {"split": "f32"},
        {"split": "u8"}, {"segments": [N, 0]}, {"segments": [0, N]}, {"segments": [4_000, 5_000]},
        {"segments": [5_000, 4_000] + [0] * 300}, {"segments": [N + 1, -1]}, {"pair": 16}, {"offset": 0}, {"escape": 3},
    ],
    ids=str,
)  # fmt: skip
def test_parameters_that_do_not_fit_the_parts(params: dict[str, Any]) -> None:
    with pytest.raises(FormatError):
        decode(WORDS, params=params)


def test_words_and_integers_are_not_mixed_up() -> None:
    with pytest.raises(FormatError, match="holds integers"):
        lanes.decode(INTEGERS.parts, INTEGERS.params, N)
    with pytest.raises(FormatError, match="holds words"):
        lanes.decode_integers(WORDS.parts, WORDS.params, N)
    with pytest.raises(FormatError, match="split"):
        lanes.decode_integers(WORDS.parts, {**WORDS.params, "offset": 0}, N)


def test_escapes_must_be_where_they_are() -> None:
    positions = INTEGERS.parts["escape_positions"]
    moved = positions.copy()
    moved[3] += 1
    for wrong in (positions[::-1].copy(), moved, positions + np.uint64(N)):
        with pytest.raises(FormatError, match="escape_positions"):
            decode(INTEGERS, {"escape_positions": wrong})
    with pytest.raises(FormatError, match="escape_positions"):
        decode(INTEGERS, {k: INTEGERS.parts[k][:-1] for k in ("escape_positions", "escape_values")})
