"""Every decoder of `lanes` gives what the slow one gives, on every case."""

import numpy as np
import pytest
from tcw.kernels.lanes_decode import decode_stream as decode
from tcw.kernels.lanes_decode.cases import CASES, Case, cost, make_inputs
from tcw.kernels.lanes_decode.reference import decode as reference


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_reference_and_processor_give_the_input_back(case: Case) -> None:
    values, stream = make_inputs(case)
    np.testing.assert_array_equal(reference(stream.parts, stream.params, case.numel), values)
    decoded = decode(stream.parts, stream.params, case.numel)
    assert decoded.dtype == values.dtype
    np.testing.assert_array_equal(decoded, values)


def test_cases_cover_what_they_say() -> None:
    by_name = {case.name: make_inputs(case)[1] for case in CASES}
    assert len(by_name) == len(CASES)

    def lengths(name: str) -> np.ndarray:
        table = by_name[name].parts["table"]
        return np.stack([table & 15, table >> 4], axis=-1).reshape(len(table), -1)

    assert lengths("12-bit-codes-u8").max() == 12
    assert np.count_nonzero(lengths("one-symbol")) == 1
    assert np.count_nonzero(lengths("256-symbols-u8")) == 256
    assert np.count_nonzero(lengths("2000-symbols-u16")) > 1900
    assert by_name["integers-escape"].parts["escape_values"].size >= 30
    assert {"pair", "escape", "segments"} <= by_name["integers-pair-escape-tables"].params.keys()


def test_cost_counts_both_ways() -> None:
    case = next(c for c in CASES if c.name == "weights-bf16")
    assert 2 * case.numel + case.numel * 10 / 8 < cost(case) < 2 * case.numel + case.numel * 12 / 8
