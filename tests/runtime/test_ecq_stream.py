"""A weight of `ecq` decoded as torch operations from its compressed stream: the bits of the processor's decoder."""

import numpy as np
import pytest
import torch

from tcw.errors import FormatError
from tcw.runtime.ecq_stream import EcqWeight
from tcw.runtime.packed import TORCH_DTYPES, Store
from tcw.tensor import TensorData, TensorInfo
from tcw.weights import Encoded
from tcw.weights.ecq import Ecq


def tensor(shape: tuple[int, int], dtype: str, outliers: int = 0) -> TensorData:
    """Weights whose rows and columns differ in spread, so that several tables pay."""
    rng = np.random.default_rng(shape[0])
    spread = np.exp(rng.normal(0, 0.8, (shape[0], 1))) * np.exp(rng.normal(0, 0.8, shape[1]))
    values = (rng.normal(0, 0.02, shape) * spread).astype(np.float32)
    values.reshape(-1)[rng.integers(0, values.size, outliers)] = 40.0
    return TensorData.of_floats(TensorInfo("model.layers.0.mlp.up_proj.weight", dtype, shape), values)


CASES = {
    "2.1 bits": ((192, 320), "BF16", Ecq(bits=2.1), 0),
    "pairs": ((257, 131), "BF16", Ecq(bits=1.6), 0),
    "rounding, no trellis": ((64, 200), "BF16", Ecq(bits=3.0, trellis=0), 0),
    "short trellis": ((61, 77), "F16", Ecq(bits=4.0, trellis=2), 0),
    "literals": ((96, 160), "BF16", Ecq(bits=3.0), 12),
    "8 bits": ((40, 56), "F32", Ecq(bits=8.0), 0),
}


def encoded(name: str) -> tuple[TensorData, Encoded]:
    shape, dtype, method, outliers = CASES[name]
    of = tensor(shape, dtype, outliers)
    found = method.encode(of)
    assert found is not None
    return of, found


def weight_of(of: TensorData, found: Encoded) -> EcqWeight:
    return EcqWeight(Store(of.info, Ecq, found), TORCH_DTYPES[of.info.dtype])


@pytest.mark.parametrize("name", CASES)
def test_it_decodes_to_the_bits_of_the_processors_decoder(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tcw.runtime.ecq_stream._SLAB", 5_000)  # several slabs
    of, found = encoded(name)
    stream = weight_of(of, found)
    weight = stream.dense()
    assert tuple(weight.shape) == of.info.shape
    expected = Ecq.decode(of.info, found).data
    np.testing.assert_array_equal(weight.contiguous().view(torch.uint8).reshape(-1).numpy(), expected)


def test_the_cases_are_what_they_say() -> None:
    params = {name: encoded(name)[1] for name in CASES}
    assert "pair" in params["pairs"].params
    assert "escapes" in params["literals"].parts
    assert max(len(found.parts["table"]) for found in params.values()) > 1


def test_it_takes_what_is_stored_and_little_beside() -> None:
    of = tensor((1024, 768), "BF16")
    found = Ecq(bits=2.1).encode(of)
    assert found is not None
    stream, tables = weight_of(of, found), len(found.parts["table"])
    assert tables > 1
    # a table to look codes up in is 16 KiB; a row has 16 ranks, a column a count for each table
    beside = 17_000 * tables + (16 * 3 + 4) * 1024 + (8 * tables + 5) * 768 + 12 * stream._integers.literals.numel()
    assert stream.nbytes < found.nbytes + 0.08 / 8 * of.info.numel + beside


def test_what_is_damaged_is_refused_before_anything_runs() -> None:
    of, found = encoded("2.1 bits")
    index = found.parts["index"].copy()
    index[3] ^= 0x11
    with pytest.raises(FormatError):
        weight_of(of, Encoded({**found.parts, "index": index}, found.params))
    codes = found.parts["codes"].copy()
    codes[100:140] ^= 0x5A
    with pytest.raises(FormatError):
        weight_of(of, Encoded({**found.parts, "codes": codes}, found.params))


def test_a_layer_multiplies_with_the_decoded_weights() -> None:
    of, found = encoded("literals")
    stream, x = weight_of(of, found), torch.randn(5, of.info.shape[1], dtype=torch.bfloat16)
    dense = stream.dense()
    assert torch.equal(stream.linear(x, None), torch.nn.functional.linear(x, dense))
    assert torch.equal(stream.rows(torch.tensor([3, 3, 0])), dense[[3, 3, 0]])


def test_only_what_is_decoded_is_cast() -> None:
    of, found = encoded("literals")
    stream = weight_of(of, found)
    before, buffers = stream.dense(), [b.dtype for b in stream.buffers()]
    assert torch.equal(stream.float().dense(), before.float())
    assert [b.dtype for b in stream.buffers()] == buffers
