"""H2O against sums by plain loops; calls, padding and steps add up to one prompt."""

import torch

from tcw.kv import AttentionCall, Memory
from tcw.kv import _attention_stats as stats
from tcw.kv.h2o import H2o

from .attention_calls import assert_padding_changes_nothing, attention, random_call, room_of, scored, summed


def scorer():
    return H2o().scorer(None, None, {})


def test_sums_of_attention() -> None:
    for softcap in (None, 1.5):
        call = random_call(batch=2, shared=3, softcap=softcap)
        expected = torch.tensor(summed(attention(call), 2, list(range(12))))
        torch.testing.assert_close(scored(scorer(), call), expected.float(), atol=1e-6, rtol=1e-6)


def test_in_blocks_as_at_once(monkeypatch) -> None:
    call = random_call(queries=20)
    whole = scored(scorer(), call)
    monkeypatch.setattr(stats, "_WEIGHTS", 2 * 4 * 20)
    torch.testing.assert_close(scored(scorer(), call), whole)


def test_padding() -> None:
    assert_padding_changes_nothing(scorer(), random_call(queries=20))


def test_padding_behind_gives_nothing_either() -> None:
    call = random_call(queries=20)
    short = random_call(queries=20)
    short.real = torch.ones(1, 1, 20, dtype=torch.bool)
    short.real[..., 15:] = False
    alone = AttentionCall(
        call.queries[:, :, :15], call.keys[:, :, :15], call.values[:, :, :15], None, call.positions[:, :15],
        call.scaling, None, 0,
    )  # fmt: skip
    torch.testing.assert_close(scored(scorer(), short)[..., :15], scored(scorer(), alone))
    assert (scored(scorer(), short)[..., 15:] == 0).all()


def test_steps_add_up_to_the_prompt() -> None:
    whole = random_call(queries=20)
    memory, made = Memory(), scorer()
    for start, end in ((0, 14), (14, 15), (15, 16), (16, 20)):
        if memory.tokens:  # as the engine does
            memory.tokens = {k: torch.nn.functional.pad(v, (0, end - start)) for k, v in memory.tokens.items()}
        part = AttentionCall(
            whole.queries[:, :, start:end], whole.keys[:, :, :end], whole.values[:, :, :end], None,
            whole.positions[:, start:end], whole.scaling, None, start,
        )  # fmt: skip
        made.observe(part, memory)
    torch.testing.assert_close(made.score(part, memory, room_of(part)), scored(made, whole))


def test_half_precision_is_summed_in_single() -> None:
    call = random_call(dtype=torch.bfloat16)
    found = scored(scorer(), call)
    assert found.dtype == torch.float32
    expected = torch.tensor(summed(attention(call), 2, list(range(12))))
    torch.testing.assert_close(found, expected.float(), atol=1e-5, rtol=1e-5)
