"""Readers of all methods: the same bytes as `decode`, whole or by rows."""

import dataclasses

import numpy as np
import pytest

from tcw import methods
from tcw.codecs.pieces import run
from tcw.errors import FormatError
from tcw.tensor import TensorData, TensorInfo
from tcw.weights import Encoded, Reader, WeightMethod

NAMES = methods.names("weights")


def stored(name: str, dtype: str, shape: tuple[int, ...]) -> tuple[type[WeightMethod], TensorInfo, Encoded]:
    values = np.random.default_rng(1).normal(0, 0.02, shape).astype(np.float32)
    words = values if dtype == "F32" else (values.view(np.uint32) >> 16).astype(np.uint16)
    info = TensorInfo("table", dtype, shape)
    method = methods.build(name, {})
    assert isinstance(method, WeightMethod)
    if not method.wants(info):
        pytest.skip(f"{name} leaves {dtype} alone")
    encoded = method.encode(TensorData(info, words.reshape(-1).view(np.uint8)))
    assert encoded is not None
    return type(method), info, encoded


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", ["BF16", "F32"])
@pytest.mark.parametrize("shape", [(400, 96), (7, 9001), (300, 5, 9)])
def test_reader_gives_what_decode_gives(name: str, dtype: str, shape: tuple[int, ...]) -> None:
    method, info, encoded = stored(name, dtype, shape)
    whole = method.decode(info, encoded).data
    rng = np.random.default_rng(2)
    for reader in (method.reader(info, encoded), Reader(method, info, encoded)):
        out = np.zeros(info.nbytes, np.uint8)
        run(reader.pieces(out))
        assert np.array_equal(out, whole)
        for count in (0, 1, 3, shape[0]):
            rows = np.sort(rng.choice(shape[0], count, replace=False))
            assert np.array_equal(reader.rows(rows), whole.reshape(shape[0], -1)[rows])


def test_parts_are_checked_when_a_reader_is_made() -> None:
    method, info, encoded = stored("dfloat11", "BF16", (400, 96))
    short = {**encoded.parts, "raw": encoded.parts["raw"][:-1]}
    with pytest.raises(FormatError, match="`table`: lanes: part `raw`"):
        method.reader(info, Encoded(short, encoded.params))
    with pytest.raises(FormatError, match="`table`"):
        method.reader(dataclasses.replace(info, dtype="F16"), encoded)
