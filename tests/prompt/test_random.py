"""Random words: the same ones for the same seed, others for another, and all equally likely."""

import numpy as np
import pytest

from tcw.errors import UsageError
from tcw.prompt import Prompt, Unit
from tcw.prompt.engine import compress, method_of
from tcw.prompt.random import Random

WORDS = ["x" * i for i in range(1, 41)]
TEXT = " ".join(WORDS)


def left(seed: int) -> str:
    return compress(TEXT, f"random:seed={seed}", rate=0.5, tokenizer=lambda t: len(t.split())).text


def test_seeds() -> None:
    assert left(1) == left(1)
    assert len({left(seed) for seed in range(20)}) == 20
    assert method_of("random", seed=7) == method_of("random:seed=7") == Random(7)
    for spec, seed in (("random:seed=-1", None), ("random", -1)):
        with pytest.raises(UsageError, match="`seed` is 0 or more, not -1"):
            method_of(spec, seed)


def test_every_word_is_as_likely() -> None:
    kept = np.array([np.isin(WORDS, left(seed).split()) for seed in range(200)])
    # 4 standard deviations of a share of a half, out of 200
    assert np.abs(kept.mean(0) - 0.5).max() < 4 * 0.5 / 200**0.5


def test_scores_do_not_depend_on_the_text() -> None:
    units = [Unit(i, i + 1) for i in range(5)]
    assert np.array_equal(Random(3).scores(Prompt("abcde", units)), Random(3).scores(Prompt("vwxyz", units)))
