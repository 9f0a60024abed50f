"""Groups of streams: what is refused, where things lie, and the operations of torch that decode them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tcw.kernels.lanes_decode import Group, check, decode, decode_chunks, group, launch
from tcw.kernels.lanes_decode.bench import check as check_cases
from tcw.kernels.lanes_decode.bench import timed, words_of
from tcw.kernels.lanes_decode.cases import CASES, Case, make_inputs
from tcw.kernels.lanes_decode.integers import check_integers, decode_integers, read

from tcw.codecs import lanes
from tcw.errors import FormatError
from tcw.safetensors_file import read_header, read_slot
from tests.kernels.host import HostModule

BY_NAME = {case.name: case for case in CASES}
CASE = BY_NAME["weights-bf16"]


def stream(case: Case) -> tuple[dict[str, np.ndarray], dict[str, Any], int]:
    made = make_inputs(case)[1]
    return dict(made.parts), dict(made.params), case.numel


def three() -> Group:
    """Of 12,301, 1 and 4,097 words."""
    return group([stream(CASE), stream(BY_NAME["ragged-1"]), stream(BY_NAME["ragged-4097"])])


def test_every_case_on_the_processor() -> None:
    assert {name: error for name, error in check_cases(torch.device("cpu")).items() if error} == {}


def test_where_streams_begin() -> None:
    streams = three()
    assert streams.starts == (0, 12_416, 12_544)
    assert streams.sizes == (12_301, 1, 4_097)
    assert streams.numel == 12_544 + 4_097
    assert streams.chunk_starts == (0, 4, 5, 7)
    assert streams.shared % 16 == 0
    assert streams.chunk_base.tolist() == [0, *np.cumsum(streams.lane_bytes.numpy().reshape(-1, 32).sum(1)).tolist()]
    assert streams.nbytes == sum(t.nbytes for t in streams.tensors())
    for case, words in zip(
        (CASE, BY_NAME["ragged-1"], BY_NAME["ragged-4097"]), streams.views(decode(streams)), strict=True
    ):
        assert words.dtype == torch.bfloat16
        np.testing.assert_array_equal(words_of(words), make_inputs(case)[0])


@pytest.mark.parametrize("unit_chunks", [0, 1, 3, 1_000])
def test_units_cover_each_chunk_once(unit_chunks: int) -> None:
    streams = group([stream(BY_NAME["66-tables-u8"]), stream(BY_NAME["12-bit-codes-u8"])], unit_chunks)
    units = streams.units.numpy()
    assert units[:, 0].tolist() == [0, *units[:-1, 1]]
    assert units[-1, 1] == streams.chunk_base.numel() - 1
    assert (units[:, 3] - units[:, 2]).sum() == 46_400


def test_large_groups_have_enough_units() -> None:
    from tcw.kernels.lanes_decode.group import _filling

    assert [_filling(chunks) for chunks in (0, 4_096, 50_000, 10**6)] == [8, 8, 24, 64]


def test_tensors_can_be_exchanged() -> None:
    streams = group([stream(BY_NAME["weights-f32"])])
    copies = streams.with_tensors([tensor.clone() for tensor in streams.tensors()])
    np.testing.assert_array_equal(words_of(decode(copies)), words_of(decode(streams)))
    assert copies.low is not streams.low
    assert streams.to("cpu").device == torch.device("cpu")
    with pytest.raises(ValueError, match="not the tensors"):
        streams.with_tensors(streams.tensors()[:-1])


def test_nothing_is_written_outside_the_streams() -> None:
    """Into a part of a larger array; between the streams too."""
    streams = three()
    arena = torch.full((streams.numel * 2 + 256,), 0xA5, dtype=torch.uint8)
    decode(streams, arena[128:].view(torch.bfloat16)[: streams.numel])
    flat = arena.numpy().copy()
    flat[:128] ^= 0xA5
    for start, size in zip(streams.starts, streams.sizes, strict=True):
        flat[128 + 2 * start : 128 + 2 * (start + size)] = 0xA5
    assert (flat[128:] == 0xA5).all()
    assert (flat[:128] == 0).all()


def test_what_cannot_be_written_to() -> None:
    streams = three()
    for out in (
        torch.empty(streams.numel - 1, dtype=torch.bfloat16),
        torch.empty(streams.numel, dtype=torch.float16),
        torch.empty(2 * streams.numel, dtype=torch.bfloat16)[::2],
        torch.empty(streams.numel, dtype=torch.bfloat16, device="meta"),
    ):
        with pytest.raises(ValueError, match="`out` is not"):
            decode(streams, out)
    with pytest.raises(ValueError, match="`out` is not"):
        decode_chunks(streams, torch.tensor([0, 1]), torch.empty(4096, dtype=torch.bfloat16))


def test_empty() -> None:
    streams = group([stream(BY_NAME["ragged-0"])])
    assert decode(streams).numel() == 0
    assert decode(group([stream(BY_NAME["ragged-0"]), stream(CASE)])).numel() == CASE.numel
    check(streams)


def lying(change: str) -> tuple[dict[str, np.ndarray], dict[str, Any], int]:
    parts, params, numel = stream(CASE)
    parts = {name: array.copy() for name, array in parts.items()}
    if change == "lane too long":
        parts["lane_bytes"][5] = 193
    elif change == "lanes do not add up":
        parts["lane_bytes"][40] += 1
    elif change == "base":
        parts["chunk_base"][1] += 1
    elif change == "codes cut":
        parts["codes"] = parts["codes"][:-1]
    elif change == "raw cut":
        parts["raw"] = parts["raw"][:-1]
    elif change == "table":
        parts["table"][0, 0] ^= 0x11
    elif change == "numel":
        numel += 1
    else:
        params["offset"] = 0
    return parts, params, numel


LIES = ["lane too long", "lanes do not add up", "base", "codes cut", "raw cut", "table", "numel", "integers"]


@pytest.mark.parametrize("change", LIES)
def test_streams_that_lie_are_refused(change: str) -> None:
    with pytest.raises(FormatError, match="lanes: "):
        group([stream(CASE), lying(change)])


def test_groups_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="one split"):
        group([])
    with pytest.raises(ValueError, match="one split"):
        group([stream(CASE), stream(BY_NAME["weights-f16"])])


def test_damage() -> None:
    """A lane that does not end with its last code is named, or where there is no status, refused."""
    streams = group([stream(CASE)])
    streams.codes[int(streams.chunk_base[2]) : int(streams.chunk_base[3])] = 255
    with pytest.raises(FormatError, match=r"lane \d+ of chunk 2 "):
        check(streams)
    with pytest.raises(FormatError, match=r"lane \d+ of chunk 2 "):
        decode(streams)
    status = torch.zeros(1, dtype=torch.int32)
    decode(streams, status=status)
    assert 64 < int(status) <= 96


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_chunks(dtype: torch.dtype) -> None:
    streams = three()
    flat = decode(streams).view(torch.int16)
    chunks = torch.tensor([3, 0, 6, 4, 5, 1, 1, -7, 99], dtype=dtype)
    rows = decode_chunks(streams, chunks).view(torch.int16)
    assert rows.shape == (9, 4096)
    where = {0: (0, 4096), 1: (4096, 4096), 3: (12_288, 13), 4: (12_416, 1), 5: (12_544, 4096), 6: (16_640, 1)}
    for row, chunk in zip(rows, chunks.clamp(0, 6).tolist(), strict=True):
        first, count = where[chunk]
        assert torch.equal(row[:count], flat[first : first + count])
    out = torch.empty(2, 4096, dtype=torch.bfloat16)
    assert decode_chunks(streams, chunks[5:7], out) is out
    assert torch.equal(out.view(torch.int16)[1], flat[4096:8192])
    assert decode_chunks(streams, chunks[:0]).shape == (0, 4096)


def test_the_operations_keep_the_rules_of_torch() -> None:
    streams = group([stream(CASE), stream(BY_NAME["ragged-129"])])
    tensors = list(streams.tensors())
    flat = torch.zeros(streams.numel, dtype=torch.bfloat16)
    whole = group([stream(CASE)])
    torch.library.opcheck(
        torch.ops.tcw.lanes_decode.default, (list(whole.tensors()), "bf16", whole.numel, whole.shared)
    )
    for status in (None, torch.zeros(1, dtype=torch.int32)):
        arguments = (tensors, "bf16", streams.shared, flat, status)
        torch.library.opcheck(torch.ops.tcw.lanes_decode_into.default, arguments)


def test_compiled() -> None:
    """torch.compile takes a decode as one operation: no graph break."""
    streams = group([stream(CASE)])

    def double(into: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return decode(streams) * 2, decode(streams, into) * 2

    into = torch.zeros(streams.numel, dtype=torch.bfloat16)
    one, two = torch.compile(double, fullgraph=True, backend="aot_eager")(into)
    wanted = decode(streams) * 2
    assert torch.equal(one, wanted)
    assert torch.equal(two, wanted)
    assert torch.equal(into * 2, wanted)


def test_integers_that_do_not_fit_their_parts() -> None:
    case = BY_NAME["integers-pair-escape-tables"]
    parts, params, numel = stream(case)
    integers = read(parts, params, numel)
    check_integers(integers)
    integers.places[3] += 1
    with pytest.raises(FormatError, match="where the escapes are"):
        check_integers(integers)
    values = np.ones(5, np.int32)
    odd = lanes.encode_integers(np.append(values, np.int32(2)), pair=True)
    with pytest.raises(FormatError, match="padded"):
        check_integers(read(odd.parts, odd.params, 5))
    with pytest.raises(FormatError, match="ascending"):
        read({**parts, "escape_positions": parts["escape_positions"][::-1].copy()}, params, numel)
    with pytest.raises(FormatError, match="words, not integers"):
        read(*stream(CASE))
    assert decode_integers(read(odd.parts, odd.params, 6)).tolist() == [1, 1, 1, 1, 1, 2]


def test_a_real_model(smollm2: Path, host: Callable[..., HostModule]) -> None:
    """Rows of an embedding and of a matrix of SmolLM2, by the codec's loops and by the kernel."""
    file = next(smollm2.glob("*.safetensors"))
    slots = read_header(file).tensors
    names = ["model.embed_tokens.weight", "model.layers.0.mlp.gate_proj.weight"]
    words = [read_slot(file, slots[name]).view(np.uint16)[:20_000] for name in names]
    made = [lanes.encode(w, "bf16") for w in words]
    streams = group([(m.parts, m.params, w.size) for m, w in zip(made, words, strict=True)])
    out = torch.empty(streams.numel, dtype=torch.bfloat16)
    launch.decode(host("lanes_decode"), streams.tensors(), "bf16", streams.shared, out, None)
    for flat in (decode(streams), out):
        for found, wanted in zip(streams.views(flat), words, strict=True):
            np.testing.assert_array_equal(words_of(found), wanted)


def test_what_is_timed_runs() -> None:
    for job in timed(torch.device("cpu")):
        job.run()
        assert job.nbytes > 2 << 20
