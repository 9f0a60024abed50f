import dataclasses
import math
import re
from html.parser import HTMLParser

from tcw.verify.html import render
from tcw.verify.verdict import Limit, Sequence, TensorReport, Verdict

EVIL = '<script>alert("x")</script>'


def full(word: str = "equivalent") -> Verdict:
    names = [f"layer.{i}.{EVIL}" for i in range(203)]
    tensors = TensorReport(300, names, dict.fromkeys(names, "3 of 9 elements differ"), {names[0]: 0.0123}, ["a.json"])
    return Verdict(
        word, EVIL, "org/name", tensors,
        {"logits": {"bit_identical": False, "max_abs_diff": math.nan, "mean_kl": 0.0123, "top1_agreement": 0.975},
         "perplexity": {"reference": 20.0, "artifact": 21.0, "rise": 0.05},
         "generation": {"tokens": 64, "identical_tokens": 12}},
        [Limit("max_kl", 0.0123, 0.02, True), Limit("max_ppl_rise", 0.05, 0.03, False)],
        [Sequence(EVIL, 9, False, 1.0, 0.02, 0.9), Sequence("text", 9, False, 1.0, 0.01, 1.0, (20.0, 21.0)),
         Sequence("broken", 3, False, math.nan, math.nan, 0.0), Sequence("hidden", 4, False, 0.5)],
        {"kv": EVIL}, 12.34,
    )  # fmt: skip


class Tags(HTMLParser):
    """Collects tags, and checks that what opens also closes."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        assert not {"src", "href"} & {name for name, _ in attrs}
        if tag not in ("meta", "rect"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)


def test_page_is_whole_escaped_and_self_contained() -> None:
    page = render(full())
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    assert "script" not in tags.seen
    assert "&lt;script&gt;" in page
    assert not re.search(r"https?:|url\(|@import", page)
    assert "prefers-color-scheme: dark" in page


def test_page_shows_what_was_measured() -> None:
    page = render(full())
    for shown in (
        "equivalent",
        "at most 0.02",
        "at most 3.00 %",
        "0.0123",
        "97.50 %",
        "+5.00 %",
        "and 3 more",
        "a.json",
        "12.3 s",
    ):
        assert shown in page, shown
    assert page.count(">pass<") == 1
    assert page.count(">fail<") == 1
    assert 'class="word yes"' in page
    assert 'class="word no"' in render(full("different"))


def test_page_shows_limits_on_tensors_bytes_and_generation() -> None:
    verdict = full()
    verdict.sections["weights"] = {"max_error": 0.0921, "bits_per_weight": 3.004}
    plain = render(verdict)
    assert "0.0921" in plain
    assert "3.004" not in plain, "no limit is set on it"
    limits = [
        Limit("max_weight_error", 0.0921, 0.25, True), Limit("max_bits_per_weight", 3.004, 3.02, True),
        Limit("min_greedy", 12 / 64, 0.5, False),
    ]  # fmt: skip
    page = render(dataclasses.replace(verdict, limits=limits))
    for shown in ("at most 0.25", "at most 3.02", "at least 50.00 %", "3.004", "0.0921"):
        assert shown in page, shown
    assert (page.count(">pass<"), page.count(">fail<")) == (2, 1)


def test_page_shows_what_failed_and_the_kv_policy() -> None:
    verdict = full("different")
    gate = {"ok": False, "error": 0.5, "bound": 1e-5, "note": EVIL}
    verdict.sections["kv"] = {
        "bytes_ratio": 0.253, "context": 1000,
        "key_nll": {"reference": 0.05, "artifact": 1.5}, "exact": {"reference": 1, "artifact": 0.1},
        "next_nll": {"reference": 3.0, "artifact": 3.25}, "span_copy": {"reference": 0.9, "artifact": 0.4},
        "tokens_per_second": {"reference": 20.0, "artifact": 18.0, "ratio": 0.9},
        "bytes": {"bfloat16": {"full": 23_040_000, "policy": 5_829_120}}, "gates": {"forgotten": gate},
    }  # fmt: skip
    limits = [Limit("max_kv_bytes", 0.253, 0.3, True), Limit("max_key_nll_rise", 1.5, 0.5, False)]
    page = render(dataclasses.replace(verdict, limits=limits, failed={"kv forgotten": EVIL}))
    for text in ("5.8 MB", "25.3 %", "at most 30.00 %", "at most 0.5", "90.0 %", "20.09", "kv forgotten: failed"):
        assert text in page, text
    assert (page.count(">pass<"), page.count(">fail<")) == (1, 1)
    assert EVIL not in page
    tags = Tags()
    tags.feed(page)
    assert tags.open == []


def test_page_says_what_a_residency_gave_the_bits_of() -> None:
    plain = {"bit_identical": False, "max_abs_diff": 0.0312}
    section = {"name": "packed", "plain": plain, "same_kernel": {"bit_identical": True}, "proved": "the same kernels"}
    page = render(dataclasses.replace(full(), sections={"residency": section}))
    assert "runs as `packed`" in page
    assert "bit-identical to the same kernels; largest difference to decoded weights 0.0312" in page


def test_page_without_a_reference() -> None:
    page = render(Verdict("identical", "a", None, TensorReport(5), skipped={"outputs": "no reference"}))
    assert "against its own manifest" in page
    assert "Distance by input" not in page
    assert "no reference" in page
    assert ">differs<" not in page
