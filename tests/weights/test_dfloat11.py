"""DFloat11: any bit pattern comes back, and what does not pay stays raw. The rest is in test_contract.py."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tcw import methods
from tcw.errors import FormatError, UsageError
from tcw.tensor import TensorData, TensorInfo
from tcw.weights import Encoded
from tcw.weights.dfloat11 import DFloat11

METHOD = DFloat11()


def tensor(words: np.ndarray, dtype: str, shape: tuple[int, ...] | None = None) -> TensorData:
    return TensorData(TensorInfo("w", dtype, shape or (words.size,)), words.reshape(-1).view(np.uint8))


def as_words(values: np.ndarray, dtype: str) -> np.ndarray:
    values = values.astype(np.float32)
    if dtype == "BF16":
        return (values.view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(np.float16).view(np.uint16) if dtype == "F16" else values.view(np.uint32)


def gaussian(dtype: str, numel: int, sigma: float = 0.02) -> np.ndarray:
    return as_words(np.random.default_rng(0).normal(0, sigma, numel), dtype)


ODD = {
    "BF16": [0x7F80, 0xFF80, 0x7FC1, 0x7F81, 0xFFFF, 0x0000, 0x8000, 0x0001, 0x8001, 0x7F7F],
    "F16": [0x7C00, 0xFC00, 0x7E01, 0x7C01, 0xFFFF, 0x0000, 0x8000, 0x0001, 0x8001, 0x7BFF],
    "F32": [0x7F800000, 0xFF800000, 0x7FC00001, 0x7F800001, 0xFFFFFFFF, 0, 0x80000000, 1, 0x80000001, 0x7F7FFFFF],
}


@pytest.mark.parametrize("dtype", ODD)
@given(st.integers(0, 1 << 32), st.integers(1024, 30_000))
@settings(max_examples=15, deadline=None)
def test_odd_bit_patterns_among_weights(dtype: str, seed: int, numel: int) -> None:
    words, rng = gaussian(dtype, numel), np.random.default_rng(seed)
    where = rng.integers(0, numel, 20)
    words[where] = np.array(ODD[dtype], dtype=words.dtype)[rng.integers(0, 10, 20)]
    before = tensor(words, dtype)
    encoded = dataclasses.replace(METHOD, min_saving=0.0).encode(before)
    if encoded is not None:
        assert np.array_equal(DFloat11.decode(before.info, encoded).data, before.data)


@pytest.mark.parametrize(("dtype", "share"), [("BF16", 0.675), ("F16", 0.87), ("F32", 0.84)])
def test_each_dtype_pays_on_weights(dtype: str, share: float) -> None:
    before = tensor(gaussian(dtype, 500_001), dtype)
    encoded = METHOD.encode(before)
    assert encoded is not None
    assert encoded.nbytes < share * before.info.nbytes
    assert METHOD.predict(before) == pytest.approx(encoded.nbytes, rel=0.002)
    assert set(encoded.parts) == set(METHOD.part_names(before.info))
    assert np.array_equal(DFloat11.decode(before.info, encoded).data, before.data)


@pytest.mark.parametrize("dtype", ODD)
@pytest.mark.parametrize("numel", [0, 1, 3, 100_000])
def test_what_does_not_pay_stays_raw(dtype: str, numel: int) -> None:
    width = np.uint32 if dtype == "F32" else np.uint16
    noise = np.random.default_rng(0).integers(0, np.iinfo(width).max, numel, dtype=width, endpoint=True)
    before = tensor(noise, dtype)
    assert METHOD.encode(before) is None
    assert METHOD.predict(before) == before.info.nbytes


def test_min_saving_decides() -> None:
    before = tensor(gaussian("F16", 200_000), "F16")
    encoded = METHOD.encode(before)
    assert encoded is not None
    saving = 1 - encoded.nbytes / before.info.nbytes
    assert dataclasses.replace(METHOD, min_saving=saving - 0.01).encode(before) is not None
    assert dataclasses.replace(METHOD, min_saving=saving + 0.001).encode(before) is None


def test_what_it_wants() -> None:
    def wants(dtype: str, *shape: int) -> bool:
        return METHOD.wants(TensorInfo("w", dtype, shape))

    assert wants("BF16", 64, 64)
    assert wants("F32", 32, 3, 14, 14)
    assert not wants("BF16", 4096)
    assert not wants("BF16", 8, 8)
    assert not wants("BF16", 0, 4096)
    assert not wants("I32", 64, 64)
    assert not wants("F8_E4M3", 64, 64)


def test_options() -> None:
    assert methods.build("dfloat11", {"min_saving": "0.1"}) == DFloat11(min_saving=0.1)
    with pytest.raises(UsageError, match="min_saving"):
        methods.build("dfloat11", {"min_saving": 1.5})
    with pytest.raises(UsageError, match="layout"):
        methods.build("dfloat11", {"layout": "official"})


@pytest.mark.parametrize("params", [{"codec": "huffman"}, {"split": "f16"}, {"codec": None}, {"symbols": 5}])
def test_errors_name_the_tensor(params: dict[str, Any]) -> None:
    before = tensor(gaussian("BF16", 4096), "BF16")
    encoded = METHOD.encode(before)
    assert encoded is not None
    with pytest.raises(FormatError, match="`w`"):
        DFloat11.decode(before.info, Encoded(encoded.parts, {**encoded.params, **params}))


def test_a_real_model(minilm: Path) -> None:
    """Every matrix of MiniLM cast to BF16 comes back, and the whole takes at most 10.75 bits a weight."""
    from safetensors.numpy import load_file

    stored = weights = 0
    for name, value in load_file(minilm / "model.safetensors").items():
        before = tensor(as_words(value, "BF16"), "BF16", value.shape) if value.dtype == np.float32 else None
        if before is None or not METHOD.wants(before.info):
            continue
        encoded = METHOD.encode(before)
        assert encoded is not None, name
        assert METHOD.predict(before) == pytest.approx(encoded.nbytes, rel=0.002), name
        assert np.array_equal(DFloat11.decode(before.info, encoded).data, before.data), name
        stored, weights = stored + encoded.nbytes, weights + before.info.numel
    assert weights > 20_000_000
    assert 8 * stored / weights <= 10.75
