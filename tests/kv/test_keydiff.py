"""KeyDiff against plain loops."""

import math

import pytest
import torch

from tcw.kv.keydiff import Keydiff

from .attention_calls import assert_padding_changes_nothing, random_call, scored


def scorer():
    return Keydiff().scorer(None, None, {})


def plain(keys):
    """Scores of the keys of one head, lists of numbers."""
    unit = [[e / math.sqrt(sum(x * x for x in key)) for e in key] for key in keys]
    anchor = [sum(column) / len(unit) for column in zip(*unit, strict=True)]
    length = math.sqrt(sum(x * x for x in anchor))
    return [-sum(a * b for a, b in zip(key, anchor, strict=True)) / length for key in unit]


def test_cosine_to_the_mean_direction() -> None:
    call = random_call(batch=2, shared=2, queries=6)
    found = scored(scorer(), call)
    for b in range(2):
        for g in range(found.shape[1]):
            assert found[b, g].tolist() == pytest.approx(plain(call.keys[b, g].double().tolist()), abs=1e-5)


def test_what_stands_apart_stays() -> None:
    call = random_call(queries=20)
    call.keys[:] = torch.ones_like(call.keys) + 0.01 * call.keys
    call.keys[:, :, 7, 0] = -5.0
    assert (scored(scorer(), call).argmax(-1) == 7).all()


def test_padding() -> None:
    assert_padding_changes_nothing(scorer(), random_call(queries=20))
