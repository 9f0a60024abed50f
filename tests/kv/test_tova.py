"""TOVA against plain loops."""

import torch

from tcw.kv.tova import Tova

from .attention_calls import assert_padding_changes_nothing, attention, random_call, scored


def scorer():
    return Tova().scorer(None, None, {})


def test_mean_over_heads_of_the_newest_query() -> None:
    for queries in (12, 1):
        call = random_call(batch=2, shared=3, queries=queries)
        weights = attention(call)
        for b in range(2):
            expected = [sum(weights[b][h][-1][j] for h in range(6)) / 6 for j in range(20)]
            for g in range(2):
                found = scored(scorer(), call)[b, g]
                torch.testing.assert_close(found, torch.tensor(expected), atol=1e-6, rtol=1e-6)


def test_padding() -> None:
    assert_padding_changes_nothing(scorer(), random_call(queries=20))
