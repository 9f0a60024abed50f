import itertools
import math
import random

import pytest
import torch

from tcw.errors import UsageError
from tcw.kv import AttentionCall, Group, LayerShape, Memory, Room
from tcw.kv.lacache import LaCache, compact, ladder
from tcw.methods import build


def shape(depth, count):
    return LayerShape(depth, depth, count, 4, 2, 8, 8, torch.float32, None)


def authors(seq_len, cache_size, cursor, layer, layers, span, overlap, margin=0, start=0):
    """Which tokens stay, index by index as in the authors' kv_cache.py; `margin` is their number of layers."""
    before = 1 + math.ceil((layers - span) / (span - overlap))
    after = min(math.ceil(span / (span - overlap)), before)
    reduce = before - after
    x = seq_len - cache_size
    remaining = cache_size - cursor - margin
    can = remaining // after * reduce
    startover = x > can
    increment = remaining if startover else math.ceil(x / reduce) * after
    number = increment // after
    if cursor + before * number > seq_len:
        return None  # the last block is longer than what is left of the text
    index = list(range(cursor))
    index += [cursor + layer % (reduce + 1) + before * j + k for j in range(number) for k in range(after)]
    index += list(range(cursor + before * number, seq_len))
    if not startover:
        return index, cursor + increment
    within = (cache_size - start - margin) // after * reduce
    left = x - can
    times = math.ceil(left / within)
    longer = before + (times - 1) * (before - 1)
    reduced = longer - after
    increment = math.ceil(left / reduced) * after
    number = increment // after
    if start + longer * number > len(index):
        return None
    again = list(range(start))
    again += [start + layer % (reduced + 1) + longer * j + times * k for j in range(number) for k in range(after)]
    again += list(range(start + longer * number, len(index)))
    return [index[i] for i in again], start + increment


def forgets(layers, span, overlap):
    block, picks = ladder(layers, span, overlap)
    return block - picks


LADDERS = [(30, 15, 0), (30, 10, 0), (32, 16, 0), (32, 9, 3), (24, 9, 7), (28, 14, 0), (2, 1, 0), (12, 4, 2)]


@pytest.mark.parametrize(("layers", "span", "overlap"), LADDERS)
def test_block_and_picks(layers, span, overlap):
    block, picks = ladder(layers, span, overlap)
    assert block == 1 + math.ceil((layers - span) / (span - overlap))
    assert picks == min(math.ceil(span / (span - overlap)), block)


@pytest.mark.parametrize(("layers", "span", "overlap"), LADDERS)
def test_a_stream_forgets_what_the_authors_code_forgets(layers, span, overlap):
    """Where every compaction is of whole blocks; several passes at once with one pick alone, see the next test."""
    block, picks = ladder(layers, span, overlap)
    step = forgets(layers, span, overlap)
    for layer in range(layers):
        held, cursor, mine, at = list(range(60)), 0, list(range(60)), 0
        for fresh in range(60, 60 + 40 * step, step):
            held += range(fresh, fresh + step)
            mine += range(fresh, fresh + step)
            index, cursor = authors(len(held), 60, cursor, layer, layers, span, overlap)
            held = [held[i] for i in index]
            chosen, at = compact(len(mine), 60, at, layer, block, picks)
            mine = [mine[i] for i in chosen]
            assert mine == held
            assert at == cursor


@pytest.mark.parametrize(("layers", "span", "overlap"), [x for x in LADDERS if ladder(*x)[1] == 1])
@pytest.mark.parametrize("keep", [40, 20, 10, 5])
def test_a_prompt_forgets_what_the_authors_code_forgets(layers, span, overlap, keep):
    """One pick a block; tokens beyond whole blocks are the one difference."""
    block, picks = ladder(layers, span, overlap)
    compared = 0
    for tokens in range(keep + 1, 90):
        for layer in range(layers):
            expected = authors(tokens, keep, 0, layer, layers, span, overlap)
            if expected is not None and len(expected[0]) == keep:
                compared += 1
                assert compact(tokens, keep, 0, layer, block, picks) == expected
    assert compared > layers


def test_old_tokens_are_rarer_than_new_ones():
    kept, _ = compact(400, 100, 0, 0, 2, 1)
    gaps = [b - a for a, b in itertools.pairwise(kept)]
    assert gaps[0] > gaps[-1]


def test_layers_together_keep_more_than_one_layer():
    """Half of the tokens in each layer, all of them in some layer."""
    block, picks = ladder(30, 15, 0)
    every = [set(compact(64, 32, 0, layer, block, picks)[0]) for layer in range(30)]
    assert all(len(kept) == 32 for kept in every)
    assert set().union(*every) == set(range(64))


@pytest.mark.parametrize("seed", range(5))
def test_exactly_the_budget_stays(seed):
    draw = random.Random(seed)
    for _ in range(1500):
        layers = draw.randint(2, 40)
        span = draw.randint(1, layers - 1)
        block, picks = ladder(layers, span, draw.randint(0, span - 1))
        if block == picks:
            continue
        n = draw.randint(0, 90)
        keep, cursor = draw.randint(0, n), draw.randint(0, 90)
        kept, after = compact(n, keep, cursor, draw.randrange(layers), block, picks)
        assert len(kept) == keep
        assert kept == sorted(set(kept))
        assert all(0 <= i < n for i in kept)
        assert after <= max(keep, cursor)


def test_a_cursor_moves_alike_in_all_layers():
    block, picks = ladder(32, 9, 3)
    cursors = []
    for layer in range(32):
        cursor, seen = 0, []
        for _ in range(30):
            _, cursor = compact(77, 60, cursor, layer, block, picks)
            seen.append(cursor)
        cursors.append(seen)
    assert all(c == cursors[0] for c in cursors)


def call_of(n, device="cpu", dtype=torch.float32):
    keys = torch.zeros(2, 2, n, 8, device=device, dtype=dtype)
    positions = torch.zeros(1, 1, dtype=torch.long, device=device)
    return AttentionCall(torch.zeros(2, 4, 1, 8, device=device, dtype=dtype), keys, keys, None, positions, 1.0, None, 0)


def test_scores_are_one_for_what_stays():
    method = LaCache(span=2)
    for depth in range(6):
        scorer, memory = method.scorer(shape(depth, 6), Group((0, 1)), {}), Memory()
        scores = scorer.score(call_of(50, dtype=torch.bfloat16), memory, Room(4, 40, 20))
        assert scores.shape == (2, 2, 50)
        assert scores.dtype == torch.float32
        kept, cursor = compact(36, 20, 0, depth, *ladder(6, 2, 0))
        assert scores[0, 0].nonzero().flatten().tolist() == [4 + i for i in kept]
        assert (scores == scores[:1, :1]).all()
        assert memory.facts == {"cursor": cursor}
        assert cursor > 0
        again = scorer.score(call_of(50), memory, Room(4, 40, 20))
        kept, _ = compact(36, 20, cursor, depth, *ladder(6, 2, 0))
        assert again[1, 1].nonzero().flatten().tolist() == [4 + i for i in kept]


def test_runs_where_there_are_only_shapes():
    scorer = LaCache().scorer(shape(1, 4), Group((0, 1)), {})
    assert scorer.score(call_of(50, "meta"), Memory(), Room(4, 40, 20)).shape == (2, 2, 50)


@pytest.mark.parametrize("options", [{"span": 4, "overlap": 4}, {"span": -1}, {"overlap": -1}])
def test_options_are_checked(options):
    with pytest.raises(UsageError, match="overlap"):
        build("lacache", options)


@pytest.mark.parametrize(
    ("options", "layers"),
    [({"span": 6}, 6), ({"span": 9}, 6), ({}, 1), ({"span": 29, "overlap": 28}, 30), ({"overlap": 3}, 6)],
)
def test_a_ladder_that_forgets_nothing_is_refused(options, layers):
    method = build("lacache", options)
    with pytest.raises(UsageError, match="forgets nothing"):
        method.check(tuple(shape(i, layers) for i in range(layers)))


def test_positions_are_those_in_the_cache_unless_told_otherwise():
    assert LaCache().reindexes
    assert LaCache().needs_rope
    assert not LaCache(reindex=False).reindexes
    assert not LaCache(reindex=False).needs_rope


@pytest.fixture
def tiny(tiny_llama):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()


@pytest.mark.parametrize("batch", [1, 2])
def test_end_to_end_layers_hold_the_ladder(tiny, batch):
    from tcw.kv.policy import Policy

    policy = Policy.make("lacache:tokens=28,window=8,sinks=4,interval=4", tiny)
    cache = policy.new_cache(tiny, track=True)
    ids = torch.randint(3, 250, (batch, 60), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        tiny(ids, past_key_values=cache)
    for layer, [(heads, positions)] in enumerate(cache.kept()):
        inner, _ = compact(48, 16, 0, layer, 2, 1)
        assert heads == (0, 1)
        assert positions[0, 0].tolist() == [0, 1, 2, 3, *(4 + i for i in inner), *range(52, 60)]
    tiny.generate(ids, max_new_tokens=30, min_new_tokens=30, past_key_values=policy.new_cache(tiny), pad_token_id=2)
