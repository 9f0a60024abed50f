"""The control: deterministic, and a token's score depends on nothing but where it stands."""

import torch

from tcw.kv import AttentionCall, Group, LayerShape, Memory
from tcw.kv.random import Random, _hash

from .attention_calls import assert_padding_changes_nothing, random_call, room_of, scored

LAYER = LayerShape(3, 0, 2, 4, 2, 8, 8, torch.float32)


def scorer(seed: int = 0, layer: LayerShape = LAYER, heads: tuple[int, ...] = (0, 1)):
    return Random(seed=seed).scorer(layer, Group(heads), {})


def test_hash_is_lowbias32() -> None:
    def plain(x: int) -> int:
        x ^= x >> 16
        x = x * 0x21F0AAAD % 2**32
        x ^= x >> 15
        x = x * 0x735A2D97 % 2**32
        return x ^ x >> 15

    numbers = [0, 1, 2, 12345, 2**31, 2**32 - 1]
    assert [_hash(n) for n in numbers] == [plain(n) for n in numbers] == _hash(torch.tensor(numbers)).tolist()
    assert _hash(-1) == _hash(torch.tensor(-1)).item() == plain(2**32 - 1)


def test_scores_are_even() -> None:
    call = random_call(queries=4096, held=4096, dim=2)
    found = scored(scorer(), call)
    assert found.min() >= 0
    assert found.max() < 1
    assert abs(found.mean() - 0.5) < 0.02  # 8192 draws: five standard deviations
    assert len(found.unique()) > 8180
    assert abs(torch.corrcoef(found[0])[0, 1]) < 0.08
    assert (found[0, :, 1:] > found[0, :, :-1]).float().mean().sub(0.5).abs() < 0.03


def test_seed_layer_and_head_change_all() -> None:
    call = random_call(queries=20)
    base = scored(scorer(), call)
    others = [scorer(seed=1), scorer(layer=LayerShape(4, 1, 2, 4, 2, 8, 8, torch.float32)), scorer(heads=(2, 3))]
    assert all((scored(other, call) != base).all() for other in others)
    assert (base[:, 0] != base[:, 1]).all()
    torch.testing.assert_close(scored(scorer(), call), base)


def test_heads_keep_their_scores_in_any_group() -> None:
    call = random_call(queries=20)
    torch.testing.assert_close(scored(scorer(heads=(1, 0)), call).flip(1), scored(scorer(), call))


def test_order_and_company_of_a_batch() -> None:
    call = random_call(batch=3, queries=20)
    call.positions = torch.stack([torch.arange(20) + shift for shift in (0, 7, 30)])
    base = scored(scorer(), call)
    order = [2, 0, 1]
    turned = AttentionCall(
        call.queries[order], call.keys[order], call.values[order], None, call.positions[order], call.scaling, None, 0
    )
    torch.testing.assert_close(scored(scorer(), turned), base[order])


def test_padding() -> None:
    assert_padding_changes_nothing(scorer(), random_call(queries=20))


def test_steps_draw_once() -> None:
    whole = random_call(queries=20)
    memory, made = Memory(), scorer()
    for start, end in ((0, 14), (14, 15), (15, 20)):
        if memory.tokens:
            memory.tokens = {k: torch.nn.functional.pad(v, (0, end - start)) for k, v in memory.tokens.items()}
        part = AttentionCall(
            whole.queries[:, :, start:end], whole.keys[:, :, :end], whole.values[:, :, :end], None,
            whole.positions[:, start:end], whole.scaling, None, start,
        )  # fmt: skip
        made.observe(part, memory)
    torch.testing.assert_close(made.score(part, memory, room_of(part)), scored(scorer(), whole))
