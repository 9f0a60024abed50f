"""The official DFloat11 layout against dfloat11 0.5.0's own encoder and a thread-by-thread reading of its kernel."""

import dataclasses
import importlib.util
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tcw.codecs import df11, df11_tables
from tcw.codecs.df11 import Group, Uncodable, decode, encode
from tcw.errors import FormatError


def by_path(name: str, path: Path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        spec.loader.exec_module(module)
    return module


# the official encoder gives torch a read-only array
pytestmark = pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
reference = by_path("df11_reference", Path(__file__).parents[1] / "data" / "df11_reference.py")


@pytest.fixture(scope="module")
def official():
    """The package's encoder functions; its own __init__ wants CuPy, this module of it does not."""
    found = importlib.util.find_spec("dfloat11")
    if found is None or importlib.util.find_spec("dahuffman") is None:
        pytest.skip("the packages dfloat11 and dahuffman are not installed")
    module = by_path("dfloat11_utils", Path(found.submodule_search_locations[0]) / "dfloat11_utils.py")
    module.tqdm = lambda data: data
    return module


def officially(official, words: np.ndarray, sizes: tuple[int, ...]) -> Group:
    """What dfloat11 writes for these words."""
    import torch

    weights = list(torch.from_numpy(words.view(np.int16).copy()).view(torch.bfloat16).split(sizes))
    codec, _, table = official.get_32bit_codec(official.get_codec(torch.cat(weights))[1])
    luts = official.get_luts(table)
    encoded, rest, positions, gaps, splits = official.encode_weights(weights, codec, 8, 512)
    parts = [luts, encoded, rest, positions.view(torch.uint8), gaps, splits]
    return Group(*(part.numpy() for part in parts))


def gaussian(n: int, seed: int = 0, scale: float = 0.02) -> np.ndarray:
    values = (np.random.default_rng(seed).standard_normal(n) * scale).astype(np.float32)
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def with_exponents(exponents: np.ndarray, seed: int = 0) -> np.ndarray:
    rest = np.random.default_rng(seed).integers(0, 2**16, len(exponents), dtype=np.uint16)
    return (rest & np.uint16(0x807F)) | (np.asarray(exponents).astype(np.uint16) << np.uint16(7))


def same(ours: Group, theirs: Group) -> None:
    for part in df11.PARTS:
        mine, other = getattr(ours, part), getattr(theirs, part)
        if part == "output_positions" and len(mine) == len(other) + 4:
            mine = mine[:-4]  # the entry that dfloat11 forgets; a test of its own looks at it
        assert mine.dtype == other.dtype, part
        assert np.array_equal(mine, other), part


def decodes(group: Group, words: np.ndarray) -> None:
    """Both our reader and the official kernel find the words again."""
    assert np.array_equal(decode(group), words)
    positions = group.output_positions.view("<u4")
    args = group.luts, group.encoded_exponent, group.sign_mantissa, positions, group.gaps
    assert np.array_equal(reference.decode(*args), words)


CASES = {
    "gaussian": gaussian(150_000),
    "wide": gaussian(60_000, 1, 1e-30),
    "all exponents": with_exponents(np.random.default_rng(2).integers(0, 240, 30_000)),
    "geometric": with_exponents(np.minimum(np.random.default_rng(3).geometric(0.35, 90_000), 60)),
    "few": gaussian(37),
}


@pytest.mark.parametrize("name", CASES)
def test_bytes_are_the_official_encoders(official, name):
    words = CASES[name]
    sizes = (len(words) // 3, 5, len(words) - 5 - len(words) // 3)
    group = encode(words, sizes)
    same(group, officially(official, words, sizes))
    decodes(group, words)


def test_real_weights_have_the_official_bytes(official, minilm):
    from safetensors.numpy import load_file

    tensors = load_file(minilm / "model.safetensors")
    layer = [t for name, t in sorted(tensors.items()) if "layer.3." in name and t.ndim == 2][:2]
    words = [(t.reshape(-1).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16) for t in layer]
    sizes = tuple(w.size for w in words)
    same(encode(np.concatenate(words), sizes), officially(official, np.concatenate(words), sizes))


def test_many_chunks_join_seamlessly(official, monkeypatch):
    monkeypatch.setattr(df11, "_CHUNK", 7)
    words = gaussian(20_011, 5)
    group = encode(words)
    same(group, officially(official, words, (words.size,)))
    decodes(group, words)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.integers(0, 239), st.integers(1, 60), min_size=2, max_size=40), st.integers(0, 2**31))
def test_any_small_group_round_trips(counts, seed):
    exponents = np.random.default_rng(seed).permutation(np.repeat(list(counts), list(counts.values())))
    words = with_exponents(exponents, seed)
    decodes(encode(words), words)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 239), min_size=8, max_size=400), st.integers(2, 3))
def test_any_small_group_has_the_official_bytes(official, exponents, repeats):
    words = with_exponents(np.array(exponents * repeats + [100, 101]))
    try:
        theirs = officially(official, words, (words.size,))
    except UnboundLocalError:  # slot 0 belongs to EOF: dfloat11 crashes, we do not
        decodes(encode(words), words)
    else:
        same(encode(words), theirs)


@pytest.mark.parametrize("symbols", [34, 40, 45])
def test_codes_are_limited_to_32_bits_as_officially(official, symbols):
    counts = np.zeros(256, dtype=np.int64)
    counts[20 : 20 + symbols] = [1, 1, *(0,) * (symbols - 2)]
    for s in range(22, 20 + symbols):
        counts[s] = counts[s - 1] + counts[s - 2]
    counts = counts[np.random.default_rng(symbols).permutation(256)]  # ties among rare ones, in no order
    counts[240:] = 0
    _, _, table = official.get_32bit_codec({s: int(c) for s, c in enumerate(counts) if c})
    codes = df11_tables.build_codes(counts)
    assert max(n for n, _ in codes.values()) <= 32
    assert {s: code for s, code in codes.items() if s >= 0} == {s: c for s, c in table.items() if isinstance(s, int)}
    assert np.array_equal(df11_tables.build_luts(codes), official.get_luts(table).numpy())


def straddling() -> np.ndarray:
    """Words whose last code starts in the first block and ends, byte-aligned, in the second."""
    rare = with_exponents([230])
    for seed in range(50):
        base = gaussian(14_000, seed)
        near = np.searchsorted(np.cumsum(encode(base).luts[-1].astype(int)[(base >> 7) & 255]), 32768)
        for n in range(near - 40, near + 40):
            words = np.append(base[:n], rare)
            lengths = encode(words).luts[-1].astype(int)[(words >> 7) & 255]
            if lengths.sum() == 32776 and lengths[-1] > 8:
                return words
    raise AssertionError("no such words found")


def test_last_position_that_dfloat11_forgets(official):
    words = straddling()
    theirs, ours = officially(official, words, (words.size,)), encode(words)
    assert theirs.encoded_exponent.size == 4097
    assert theirs.output_positions.view("<u4").tolist() == [0, words.size]
    assert ours.output_positions.view("<u4").tolist() == [0, words.size, words.size]
    same(ours, theirs)
    assert np.array_equal(decode(theirs), words)  # the reader mends it
    decodes(ours, words)


FEW = {
    "one": with_exponents(np.full(1000, 120)),
    "one, once": with_exponents([0]),
    "two": with_exponents(np.random.default_rng(4).integers(3, 5, 9_000)),
    "zeros and subnormals": np.tile(np.array([0, 0x8000, 1, 0x8001, 0x3F80], np.uint16), 3_000),
}


@pytest.mark.parametrize("name", FEW)
def test_few_exponents_are_coded_though_dfloat11_crashes(official, name):
    """The first slot of the table is EOF's there, and dfloat11 has nothing to fill it with."""
    words = FEW[name]
    with pytest.raises(UnboundLocalError):
        officially(official, words, (words.size,))
    decodes(encode(words), words)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (np.empty(0, np.uint16), "1 to"),
        (np.append(gaussian(1000), np.uint16(0x7F80)), "1 weights have an exponent of 240 or more"),
        (np.append(gaussian(1000), np.array([0xFFC1, 0x7800], np.uint16)), "2 weights have an exponent"),
        (with_exponents(np.zeros(25_000)), "a block holds 25000 weights"),
        (with_exponents(np.append(np.zeros(239_000), np.repeat(np.arange(1, 240), 1000))), "look-up rows"),
    ],
)
def test_what_the_layout_cannot_hold_is_refused(words, why):
    with pytest.raises(Uncodable, match=why):
        encode(words)


def test_sizes_beyond_31_bits_are_refused(monkeypatch):
    monkeypatch.setattr(df11, "_MAX_INT", 4000)
    with pytest.raises(Uncodable, match="1 to 4000 weights"):
        encode(gaussian(4001))


# ---- reading


def test_any_stretch_decodes_alone():
    words = gaussian(70_000, 8)
    group = encode(words)
    size = group.encoded_exponent.size
    positions = df11.read_positions(group.output_positions, size, words.size)
    edges = [0, 1, *positions[1:3], positions[2] - 1, positions[-2], words.size - 1, words.size]
    for first, last in [(a, b) for a in edges for b in edges if a < b]:
        where = df11.span(positions, size, int(first), int(last))
        parts = group.encoded_exponent[slice(*where.stream)], group.gaps[slice(*where.gaps)]
        got = df11.decode_span(where, group.luts, positions, *parts, group.sign_mantissa[first:last])
        assert np.array_equal(got, words[first:last]), (first, last)


def test_another_writers_code_decodes():
    """Codes that are canonical, look-up rows in another order, unused slots filled with whatever stood before."""
    lengths = {118: 1, 119: 2, 120: 3, 121: 4, 7: 9, 8: 9, 9: 17, 10: 17}
    codes, at = {}, 0
    for symbol, n in lengths.items():
        codes[symbol] = format(at >> (20 - n), f"0{n}b")
        at += 1 << (20 - n)
    exponents = np.random.default_rng(0).choice(list(lengths), 40_000, p=[0.4, 0.25, 0.2, 0.1, 0.02, 0.01, 0.01, 0.01])
    text = "".join(codes[e] for e in exponents.tolist())
    starts = np.cumsum([0] + [lengths[e] for e in exponents.tolist()])[:-1]
    stream = np.packbits(np.frombuffer(text.encode(), np.uint8) - 48)
    blocks = -(-stream.size // 4096)
    cells = np.arange(512 * blocks) * 64
    first = np.searchsorted(starts, cells)
    gaps = np.where(first < starts.size, starts[np.minimum(first, starts.size - 1)] - cells, 0)
    prefixes = sorted(
        {c[:k] for c in codes.values() for k in range(0, len(c), 8)}, key=lambda p: (len(p), p), reverse=True
    )
    prefixes = ["", *(p for p in prefixes if p)]
    luts = np.zeros((len(prefixes) + 1, 256), np.uint8)
    for row, prefix in enumerate(prefixes):
        entry = 118
        for byte in range(256):
            here = prefix + format(byte, "08b")
            if here in prefixes:
                entry = 256 - prefixes.index(here)
            entry = next((s for s, c in codes.items() if here.startswith(c) and len(c) > len(prefix)), entry)
            luts[row, byte] = entry
    luts[-1, list(lengths)] = list(lengths.values())
    words = with_exponents(exponents)
    bits = (np.unpackbits(gaps.astype(np.uint8)[:, None], axis=1)[:, 3:]).reshape(-1)
    positions = np.append(np.searchsorted(starts, np.arange(blocks) * 32768), words.size).astype("<u4")
    rest = ((words >> 8) & 0x80 | words & 0x7F).astype(np.uint8)
    decodes(Group(luts, stream, rest, positions.view(np.uint8), np.packbits(bits), np.empty(0, np.int64)), words)


def lying(group: Group, part: str, change) -> Group:
    array = getattr(group, part).copy()
    return dataclasses.replace(group, **{part: change(array)})


def put(index, value):
    def change(array):
        array[index] = value
        return array

    return change


def step(delta: int):
    """Move a block's position, so that its neighbour's count no longer fits."""

    def change(array):
        array.view("<i4")[1] += delta
        return array

    return change


HOSTILE = {
    "position moved up": ("output_positions", step(1)),
    "position moved down": ("output_positions", step(-1)),
    "positions fall": ("output_positions", put(slice(4, 8), 255)),
    "positions start late": ("output_positions", put(0, 9)),
    "too few positions": ("output_positions", lambda a: a[:-8]),
    "half a position": ("output_positions", lambda a: a[:-1]),
    "a wrong gap": ("gaps", put(100, 0b10101010)),
    "too few gaps": ("gaps", lambda a: a[:-1]),
    "no gaps": ("gaps", lambda a: a[:0]),
    "pointer out of the rows": ("luts", put((0, 3), 240)),
    "pointer to itself for ever": ("luts", put((1, slice(None)), 255)),
    "length 0": ("luts", put((-1, slice(None)), 0)),
    "length 200": ("luts", put((-1, slice(None)), 200)),
    "all lengths 1": ("luts", put((-1, slice(None)), 1)),
    "one row": ("luts", lambda a: a[:1]),
    "too many rows": ("luts", lambda a: np.resize(a, (30, 256))),
    "narrow rows": ("luts", lambda a: a[:, :255]),
    "stream cut": ("encoded_exponent", lambda a: a[:-1]),
    "stream cut by a block": ("encoded_exponent", lambda a: a[:-4096]),
    "no stream": ("encoded_exponent", lambda a: a[:0]),
    "stream scrambled": ("encoded_exponent", lambda a: a[::-1].copy()),
    "weights missing": ("sign_mantissa", lambda a: a[:-1]),
    "weights too many": ("sign_mantissa", lambda a: np.append(a, a)),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_lying_arrays_are_refused(name):
    group = encode(gaussian(50_000, 3))
    with pytest.raises(FormatError):
        decode(lying(group, *HOSTILE[name]))


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(df11.PARTS[:5]), st.lists(st.tuples(st.integers(0, 10**9), st.integers(0, 255)), max_size=6))
def test_damage_never_crashes_the_reader(part, changes):
    words = gaussian(30_000, 9)
    group = encode(words)
    array = getattr(group, part).copy()
    flat = array.reshape(-1)
    for where, value in changes:
        flat[where % flat.size] = value
    try:
        got = decode(dataclasses.replace(group, **{part: array}))
    except FormatError:
        return
    assert got.shape == words.shape


def test_empty_group_is_empty():
    group = encode(gaussian(10))
    bare = {part: getattr(group, part)[:0] for part in ("encoded_exponent", "sign_mantissa", "gaps")}
    assert decode(dataclasses.replace(group, output_positions=np.zeros(4, np.uint8), **bare)).size == 0
