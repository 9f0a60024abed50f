import itertools
import json
import math
from typing import Any

import pytest

from tcw.recipe import LIMITS
from tcw.verify.verdict import MEASURES, Limit, TensorReport, Verdict, decide, hold

SAME = TensorReport(checked=3)
OTHER = TensorReport(checked=3, different=["w"], reasons={"w": "2 of 4 elements differ from the reference"})
DAMAGED = TensorReport(checked=3, files=["config.json"], damaged=True)
SMALL = Limit("max_bits_per_weight", 3.01, 3.02, True)
GOOD, BAD = Limit("max_kl", 0.1, 0.2, True), Limit("max_kl", 0.3, 0.2, False)


def test_every_limit_of_a_recipe_is_measured() -> None:
    assert set(MEASURES) == set(LIMITS)
    assert all(name.startswith(("max_", "min_")) for name in MEASURES)


@pytest.mark.parametrize(
    ("tensors", "same_output", "limits", "expected"),
    [
        (SAME, True, [], "identical"),
        (SAME, True, [GOOD], "identical"),
        (SAME, False, [], "different"),
        (SAME, False, [GOOD], "equivalent"),
        (SAME, True, [BAD], "different"),
        (OTHER, True, [], "different"),
        (OTHER, False, [GOOD], "equivalent"),
        (OTHER, False, [GOOD, BAD], "different"),
        (DAMAGED, True, [GOOD], "different"),
        (OTHER, True, [SMALL], "different"),
        (OTHER, False, [SMALL, GOOD], "equivalent"),
        (SAME, True, [SMALL], "identical"),
    ],
)
def test_decide(tensors: TensorReport, same_output: bool, limits: list[Limit], expected: str) -> None:
    assert decide(tensors, same_output, limits) == expected


def test_a_failed_check_or_a_section_without_a_limit_is_different() -> None:
    key, size = Limit("max_key_nll_rise", 0.1, 0.2, True), Limit("max_kv_bytes", 0.4, 0.5, True)
    assert decide(SAME, True, [GOOD], failed={"kv everything": "an error"}) == "different"
    assert decide(SAME, False, [GOOD], lossy={"kv"}) == "different"
    assert decide(SAME, False, [GOOD, size], lossy={"kv"}) == "different"
    assert decide(SAME, False, [key], lossy={"kv"}) == "equivalent"
    assert decide(OTHER, False, [GOOD, key, size], lossy={"kv"}) == "equivalent"
    assert decide(SAME, True, [], lossy=set()) == "identical"


def test_hold_finds_nested_measurements() -> None:
    sections = {"kv": {"bytes_ratio": 0.4, "key_nll": {"artifact": 0.4, "rise": 0.3}, "next_nll": {"rise": -0.1}}}
    wanted = {"max_kv_bytes": 0.4, "max_key_nll_rise": 0.2, "max_next_nll_rise": 0.0}
    assert hold(wanted, {}, sections, {}) == [
        Limit("max_kv_bytes", 0.4, 0.4, True),
        Limit("max_key_nll_rise", 0.3, 0.2, False),
        Limit("max_next_nll_rise", -0.1, 0.0, True),
    ]
    skipped: dict[str, str] = {}
    assert hold(wanted, {}, {}, skipped) == []
    assert skipped["max_key_nll_rise"] == "kv.key_nll.rise was not measured"
    skipped = {"kv": "no reference"}
    assert hold(wanted, {}, {}, skipped) == []
    assert skipped == {"kv": "no reference"}, "that says it already"
    assert hold({}, {"max_key_nll_rise": 1.0}, {"kv": {"key_nll": None}}, {}) == [
        Limit("max_key_nll_rise", None, 1.0, False)
    ]


def test_the_exit_code_is_the_verdict() -> None:
    for word, code in (("identical", 0), ("equivalent", 0), ("different", 1)):
        verdict = Verdict(word, "a", None, SAME)
        assert (verdict.exit_code, verdict.ok) == (code, code == 0)


def test_hold_compares_on_the_right_side() -> None:
    sections = {"logits": {"mean_kl": 0.02, "top1_agreement": 0.97}, "perplexity": {"rise": -0.01}}
    recipe = {"max_kl": 0.02, "min_top1": 0.98, "max_ppl_rise": 0.0}
    held = hold(recipe, {}, sections, {})
    assert [(l.name, l.ok) for l in held] == [("max_kl", True), ("min_top1", False), ("max_ppl_rise", True)]


def test_asked_limits_override_the_recipe() -> None:
    sections = {"logits": {"mean_kl": 0.02}}
    assert hold({"max_kl": 0.01}, {"max_kl": 0.05}, sections, {}) == [Limit("max_kl", 0.02, 0.05, True)]


def test_what_was_not_measured_fails_only_when_asked_for() -> None:
    skipped: dict[str, str] = {}
    assert hold({"max_kl": 0.0}, {}, {"logits": {"mean_kl": None}}, skipped) == []
    assert "max_kl" in skipped
    assert hold({}, {"max_ppl_rise": 0.1}, {}, {}) == [Limit("max_ppl_rise", None, 0.1, False)]


def test_no_number_never_holds() -> None:
    for name, (section, *keys) in MEASURES.items():
        found: Any = math.nan
        for key in reversed(keys):
            found = {key: found}
        assert not hold({name: 1e9 if "max" in name else 0.0}, {}, {section: found}, {})[0].ok


def test_json_has_every_key_and_no_nan() -> None:
    blank = Verdict("different", "a", "b", OTHER, {"perplexity": {"reference": 3.0, "artifact": math.inf}}).to_json()
    text = json.loads(json.dumps(blank, allow_nan=False))
    assert text["tensors"] | {"checked": 3, "identical": 2, "different": ["w"]} == text["tensors"]
    assert text["logits"] == dict.fromkeys(("bit_identical", "max_abs_diff", "mean_kl", "top1_agreement"))
    assert text["perplexity"] == {"reference": 3.0, "artifact": None, "rise": None}
    assert text["generation"] == {"tokens": None, "identical_tokens": None, "agreement": None}
    assert text["weights"] == dict.fromkeys(("max_error", "max_error_tensor", "bits_per_weight", "methods"))
    assert text["runtime"] == {"residency": None}
    assert text["limits"] == []


def test_json_of_a_suite_stands_beside_the_rest() -> None:
    assert Verdict("identical", "a", "b", SAME, {"kv": {"bytes_ratio": 0.5}}).to_json()["kv"] == {"bytes_ratio": 0.5}


def test_equivalence_is_never_free() -> None:
    """Whatever differs is "equivalent" only when some limit was measured and all of them hold."""
    for tensors, same, limits in itertools.product(
        (SAME, OTHER, DAMAGED), (True, False), ([], [GOOD], [BAD], [GOOD, BAD])
    ):
        if decide(tensors, same, limits) == "equivalent":
            assert limits == [GOOD]
            assert not tensors.damaged
