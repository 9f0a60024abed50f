import itertools
import math

import pytest
import torch

from tcw.kv.stores.spectrum import WIDTHS, Channels, SpectrumStore, allot, distortion, lloyd

# the mean squared error of the best 2^b levels for a normal variable: Max, Quantizing for minimum distortion, 1960
MAX_1960 = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497}


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def channels(seed=0):
    widths = {8: 2, 4: 3, 3: 5, 2: 8, 1: 6}
    return Channels({b: drawn(n, seed=seed + b).abs() + 0.1 for b, n in widths.items()})


def slow(spec, y):
    """Encode and decode one vector, number by number."""
    sigma = [(float(s), bits) for bits, part in spec.deviations.items() for s in part]
    z = [float(v) / s for v, (s, _) in zip(y, sigma, strict=True)]
    size = math.sqrt(math.fsum(v * v for v in z) / len(z))
    size = 2.0 ** (max(-128, min(127, round(math.log2(size) * 4))) / 4) if size else 2.0**-32
    out = []
    for v, (s, bits) in zip(z, sigma, strict=True):
        nearest = min(lloyd(bits).tolist(), key=lambda level: abs(level - v / size))
        out.append(nearest * s * size)
    return out


@pytest.mark.parametrize("bits", list(MAX_1960))
def test_levels_are_those_of_max(bits):
    assert distortion(bits) == pytest.approx(MAX_1960[bits], rel=2e-3)
    assert torch.equal(lloyd(bits), lloyd(bits).sort().values)
    assert torch.allclose(lloyd(bits), -lloyd(bits).flip(0), atol=1e-5)


def test_more_bits_save_less_each():
    saved = [(distortion(a) - distortion(b)) / (b - a) for a, b in itertools.pairwise(WIDTHS)]
    assert saved == sorted(saved, reverse=True)
    assert distortion(8) < 1e-4


@pytest.mark.parametrize("scale", [1e-3, 1.0, 500.0])
def test_codes_are_those_of_the_formula(scale):
    spec = channels()
    y = drawn(1, 1, 7, spec.count, seed=3) * scale
    store = SpectrumStore(spec, spec)
    assert store.append(y, y * 2, torch.arange(7)[None, None]) is None
    keys, values = store.read()
    for token in range(7):
        assert keys[0, 0, token].tolist() == pytest.approx(slow(spec, y[0, 0, token]), rel=1e-5)
        assert values[0, 0, token].tolist() == pytest.approx(slow(spec, 2 * y[0, 0, token]), rel=1e-5)


def test_bytes_are_the_codes_and_one_for_the_size():
    spec = channels()
    assert spec.width == 2 + 2 + 2 + 2 + 1  # 16, 12, 15, 16 and 6 bits
    store = SpectrumStore(spec, spec)
    y = drawn(3, 1, 5, spec.count)
    store.append(y, y, torch.arange(5)[None, None])
    assert sum(t.untyped_storage().nbytes() for t in store.tensors()) == 2 * 3 * 5 * (spec.width + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tokens_are_gathered_as_they_were_rounded(dtype):
    spec = channels()
    y = drawn(2, 1, 9, spec.count).to(dtype)
    store = SpectrumStore(spec, spec)
    store.append(y[:, :, :4], y[:, :, :4], torch.arange(4)[None, None])
    first = store.read()[0]
    store.append(y[:, :, 4:], y[:, :, 4:], torch.arange(4, 9)[None, None])
    read = store.read()[0]
    assert read.dtype == dtype
    assert len(store) == 9
    assert torch.equal(read[:, :, :4], first)
    index = torch.tensor([[[0, 3, 8]], [[1, 2, 5]]])
    store.keep(index)
    assert torch.equal(store.read()[0], torch.stack([read[0, :, [0, 3, 8]], read[1, :, [1, 2, 5]]]))
    store.select_rows(torch.tensor([1, 1, 0]))
    assert torch.equal(store.read()[1][0], read[1, :, [1, 2, 5]])


def test_zeros_and_large_tokens_stay_finite():
    spec = channels()
    y = torch.zeros(1, 1, 2, spec.count)
    y[0, 0, 1] = 1e30
    store = SpectrumStore(spec, spec)
    store.append(y, y, torch.arange(2)[None, None])
    read = store.read()[0]
    assert read.isfinite().all()
    assert read[0, 0, 0].abs().max() < 1e-6


def test_shapes_are_known_without_memory():
    spec = Channels({b: s.to("meta") for b, s in channels().deviations.items()})
    store = SpectrumStore(spec, spec)
    y = torch.empty(2, 1, 6, spec.count, device="meta")
    store.append(y, y, torch.empty(1, 1, 6, device="meta"))
    assert store.read()[0].shape == y.shape
    assert store.tensors()[0].shape == (2, 1, 6, spec.width)


@pytest.mark.parametrize(("energies", "bits"), [([5.0, 1.0, 0.3], 4), ([1.0, 1.0, 1.0, 1.0], 6), ([9.0, 0.01], 9)])
def test_no_other_division_of_the_bits_is_better(energies, bits):
    def error(widths):
        return sum(e * distortion(w) for e, w in zip(energies, widths, strict=True))

    def all_of(count, left):
        return [[]] if not count else [[w, *r] for w in WIDTHS if w <= left for r in all_of(count - 1, left - w)]

    found = allot(energies, bits)
    assert sum(found) <= bits
    assert error(found) == pytest.approx(min(error(w) for w in all_of(len(energies), bits)))


def test_bits_up_to_four_on_average_are_all_spent():
    generator = torch.Generator().manual_seed(1)
    for bits in range(1, 49):
        energies = (torch.randn(12, generator=generator) * 3).exp().tolist()
        assert sum(allot(energies, bits)) == bits
