"""Each gate holds on a sound engine and falls when what it guards is broken on purpose."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tcw.kv.groups import HeadGroup
from tcw.kv.layer import PolicyLayer
from tcw.kv.policy import Policy
from tcw.kv.stores import DenseStore
from tcw.verify.kv_gates import CHUNKS, PADDING, PREFIX, Gate, check_gates

NAMES = ("everything", "forgotten", "padding", "reordering")


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(256, (2, 320), generator=torch.Generator().manual_seed(0))


def gates(model: Any, tokens: Tensor, *specs: str) -> dict[str, Gate]:
    policy = Policy.make(list(specs), model, tokens)
    return {gate.name: gate for gate in check_gates(model, policy, tokens)}


@pytest.mark.parametrize(
    "spec", ["snapkv:ratio=0.5", "knorm:tokens=60", "pyramidkv:ratio=0.4", "streaming-llm:reindex=off"]
)
def test_all_hold_where_tokens_are_forgotten(model: Any, tokens: Tensor, spec: str) -> None:
    found = gates(model, tokens, spec)
    assert tuple(found) == NAMES
    assert all(gate.ok for gate in found.values()), found
    assert found["everything"].error == 0
    assert all(gate.error is not None and gate.error < 1e-5 for gate in found.values())


def test_what_does_not_apply_says_why(model: Any, tokens: Tensor) -> None:
    kivi = gates(model, tokens, "kivi:bits=4")
    assert kivi["forgotten"].ok is None
    assert "as they are" in kivi["forgotten"].note
    assert [kivi[name].ok for name in ("everything", "padding", "reordering")] == [True] * 3
    turned = gates(model, tokens, "streaming-llm")
    assert turned["forgotten"].ok is None
    assert "other positions" in turned["forgotten"].note
    assert gates(model, tokens, "zipvl")["padding"].ok is None


def test_methods_that_forget_are_checked_without_the_format(model: Any, tokens: Tensor) -> None:
    found = gates(model, tokens, "h2o:ratio=0.5", "kivi:bits=4")
    assert all(gate.ok for gate in found.values()), found
    assert (found["forgotten"].error or 0) < 1e-5


def test_a_large_budget_is_checked_with_a_longer_text(model: Any, tokens: Tensor) -> None:
    assert f"of {320 - sum(CHUNKS)} tokens" in gates(model, tokens, "knorm:tokens=200")["forgotten"].note
    roomy = gates(model, tokens, "knorm:tokens=300")["forgotten"]
    assert (roomy.ok, roomy.note) == (None, f"of {320 - sum(CHUNKS)} tokens none is forgotten")
    assert f"of {PREFIX} tokens" in gates(model, tokens, "knorm:tokens=100")["forgotten"].note


def test_wrong_keys_are_found(model: Any, tokens: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(store: DenseStore, read: Any = DenseStore.read) -> tuple[Tensor, Tensor]:
        keys, values = read(store)
        return keys.roll(1, 2), values

    monkeypatch.setattr(DenseStore, "read", read)
    found = gates(model, tokens, "snapkv:ratio=0.5")
    assert (found["everything"].ok, found["forgotten"].ok) == (False, False)
    assert (found["everything"].error or 0) > 1e-3


def test_the_smallest_change_of_a_value_is_found(model: Any, tokens: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(store: DenseStore, read: Any = DenseStore.read) -> tuple[Tensor, Tensor]:
        keys, values = read(store)
        return keys, values * (1 + 2**-20)

    monkeypatch.setattr(DenseStore, "read", read)
    assert gates(model, tokens, "snapkv:ratio=0.5")["everything"].ok is False


def test_keys_and_values_of_different_tokens_are_found(
    model: Any, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def keep(store: DenseStore, index: Tensor, keep: Any = DenseStore.keep) -> None:
        values = store.read()[1]
        keep(store, index)
        store.values = values[:, :, : index.shape[2]]

    monkeypatch.setattr(DenseStore, "keep", keep)
    found = gates(model, tokens, "snapkv:ratio=0.5")
    assert found["everything"].ok, "it forgets nothing"
    assert found["forgotten"].ok is False


def test_padding_that_is_looked_at_is_found(model: Any, tokens: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    def extend(group: HeadGroup, keys: Tensor, values: Tensor, real: Any, positions: Tensor) -> None:
        original(group, keys, values, None, positions)

    original = HeadGroup.extend
    monkeypatch.setattr(HeadGroup, "extend", extend)
    found = gates(model, tokens, "knorm:ratio=0.5")
    assert [found[name].ok for name in NAMES] == [True, True, False, True]


def test_rows_that_are_not_exchanged_are_found(model: Any, tokens: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PolicyLayer, "reorder_cache", lambda layer, rows: None)
    found = gates(model, tokens, "knorm:ratio=0.5")
    assert [found[name].ok for name in NAMES] == [True, True, True, False]


def test_no_number_is_no_pass(model: Any, tokens: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(store: DenseStore, read: Any = DenseStore.read) -> tuple[Tensor, Tensor]:
        keys, values = read(store)
        return keys, values * torch.nan

    monkeypatch.setattr(DenseStore, "read", read)
    found = gates(model, tokens, "knorm:ratio=0.5")
    assert not any(gate.ok for gate in found.values())


def test_a_model_in_half_precision(tiny_llama: Path, tokens: Tensor) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16).eval()
    found = gates(model, tokens, "knorm:ratio=0.5")
    assert found["everything"].error == 0
    assert found["forgotten"].ok
    assert found["forgotten"].bound == 0.1
    assert (found["forgotten"].error or 0) < 0.02


def test_padding_is_a_multiple_of_the_blocks_of_formats() -> None:
    assert PADDING % 32 == 0
    assert PREFIX - PADDING > 64
