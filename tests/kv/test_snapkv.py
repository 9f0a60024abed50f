"""SnapKV against plain loops: votes, their neighbours, and how the window of voters moves on."""

from dataclasses import replace

import pytest
import torch

from tcw.kv import AttentionCall, Memory
from tcw.kv.snapkv import Snapkv

from .attention_calls import (
    assert_padding_changes_nothing,
    attention,
    random_call,
    scored,
    summed,
)  # fmt: skip


def scorer(observe: int = 6, kernel: int = 5):
    return Snapkv(observe=observe, kernel=kernel).scorer(None, None, {})


def neighbours(votes: list[float], first: int, end: int, kernel: int) -> list[float]:
    """The mean over a kernel, in which what is not a candidate counts as zero."""
    reach = range(-(kernel // 2), kernel // 2 + 1)
    return [sum(votes[j + d] for d in reach if first <= j + d < end) / kernel for j in range(first, end)]


def steps(call: AttentionCall, cuts: list[tuple[int, int]], made) -> Memory:
    """Show a scorer a text in parts, as the engine does."""
    memory = Memory()
    for start, end in cuts:
        memory.tokens = {k: torch.nn.functional.pad(v, (0, end - start)) for k, v in memory.tokens.items()}
        real = None if call.real is None else call.real[..., :end]
        part = replace(
            call, queries=call.queries[:, :, start:end], keys=call.keys[:, :, :end], values=call.values[:, :, :end],
            positions=call.positions[:, start:end], seen=start, real=real,
        )  # fmt: skip
        made.observe(part, memory)
    return memory


@pytest.mark.parametrize(("observe", "kernel"), [(6, 5), (1, 1), (6, 3), (50, 5), (12, 21)])
def test_votes_of_the_last_queries_and_their_neighbours(observe: int, kernel: int) -> None:
    call = random_call(batch=2, shared=3)
    rows = list(range(max(0, 12 - observe), 12))
    votes = summed(attention(call), 2, rows)
    found = scored(scorer(observe, kernel), call)
    for b in range(2):
        for g in range(2):
            expected = neighbours(votes[b][g], 2, 16, kernel)
            torch.testing.assert_close(found[b, g, 2:16], torch.tensor(expected), atol=1e-6, rtol=1e-6)
    assert (found[..., :2] == 0).all()
    assert (found[..., 16:] == 0).all()


@pytest.mark.parametrize("padding", [1, 5, 30])
def test_padding(padding: int) -> None:
    assert_padding_changes_nothing(scorer(), random_call(queries=20), padding)


def test_padding_between_neighbours_does_not_part_them() -> None:
    call = random_call(batch=1, kv_heads=2, queries=6, held=14)
    gap = [0, 1, 2, 3, 4, 5, 6, 6, 6, 7, 8, 9, 10, 11, 12, 13]  # two more between tokens 6 and 7
    holed = replace(call, keys=call.keys[:, :, gap], values=call.values[:, :, gap], real=torch.ones(1, 2, 16) > 0)
    holed.real[..., 7:9] = False
    found = scored(scorer(), holed)
    kept = [j for j in range(16) if j not in (7, 8)]
    torch.testing.assert_close(found[..., kept], scored(scorer(), call), atol=1e-6, rtol=1e-6)
    assert (found[..., 7:9] == 0).all()


def test_each_step_takes_over_its_part_of_the_votes() -> None:
    call = random_call(queries=20)
    weights = attention(call)
    expected = torch.tensor(summed(weights, 2, list(range(8, 14))))  # the prompt's last six
    for step in range(14, 18):
        expected = expected * 5 / 6 + torch.tensor(summed(weights, 2, [step]))
    expected = expected * 4 / 6 + torch.tensor(summed(weights, 2, [18, 19]))
    cuts = [(0, 14), (14, 15), (15, 16), (16, 17), (17, 18), (18, 20)]
    found = steps(call, cuts, scorer()).tokens["votes"]
    torch.testing.assert_close(found, expected.float(), atol=1e-6, rtol=1e-6)


def test_a_whole_window_forgets_what_was_before() -> None:
    call = random_call(queries=20)
    torch.testing.assert_close(
        steps(call, [(0, 8), (8, 20)], scorer()).tokens["votes"], steps(call, [(0, 20)], scorer()).tokens["votes"]
    )


def test_padding_among_the_voters_does_not_vote() -> None:
    """A second prompt of two tokens, behind four of padding, takes over two of the six votes."""
    text = random_call(queries=12, held=12)
    alone = steps(text, [(0, 10), (10, 12)], scorer()).tokens["votes"]
    gap = [*range(10), 3, 3, 3, 3, 10, 11]
    padded = replace(
        text, queries=text.queries[:, :, gap], keys=text.keys[:, :, gap], values=text.values[:, :, gap],
        positions=text.positions[:, gap], real=torch.ones(1, 1, 16, dtype=torch.bool),
    )  # fmt: skip
    padded.real[..., 10:14] = False
    found = steps(padded, [(0, 10), (10, 16)], scorer()).tokens["votes"]
    torch.testing.assert_close(found[..., [*range(10), 14, 15]], alone, atol=1e-6, rtol=1e-6)
    assert (found[..., 10:14] == 0).all()


def test_one_token_and_a_room_of_one() -> None:
    call = random_call(queries=1, held=1)
    assert scored(scorer(), call, first=0, window=0).shape == (1, 2, 1)
    assert torch.isfinite(scored(scorer(), call, first=0, window=0)).all()


@pytest.mark.parametrize("options", [{"kernel": 4}, {"kernel": 0}, {"observe": 0}, {"ratio": 2.0}])
def test_options_that_make_no_sense(options: dict[str, float]) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        Snapkv(**options)
