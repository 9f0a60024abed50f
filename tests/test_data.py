import hashlib
import re
from pathlib import Path

import pytest

from tcw import data

TEXTS = {"calibration.txt": data.calibration_text, "evaluation.txt": data.evaluation_text}


@pytest.mark.parametrize(("file", "text"), TEXTS.items())
def test_text_is_clean_prose(file: str, text) -> None:
    prose = text()
    assert len(prose) >= 200_000
    assert prose.isascii()
    assert not re.search(r"gutenberg|copyright|licen[cs]e|ebook|https?:", prose, re.IGNORECASE)
    assert "\r" not in prose
    assert "\n\n\n" not in prose
    assert re.search(r"[a-z], and the [a-z]", prose)
    letters = sum(c.isalpha() or c in " ,.;:'\"!?-\n()" for c in prose)
    assert letters / len(prose) > 0.99


@pytest.mark.parametrize(("file", "text"), TEXTS.items())
def test_readme_states_each_text(file: str, text) -> None:
    readme = (Path(data.__file__).parent / "README.md").read_text(encoding="utf-8")
    assert f"{hashlib.sha256(text().encode()).hexdigest()}  {file}" in readme
    stated = [int(n.replace(",", "")) for n in re.findall(r"\| ([\d,]+) \|$", readme, re.MULTILINE)]
    assert len(text()) in (stated[0] + stated[1] + 1, stated[2] + stated[3] + 1)


def test_evaluation_shares_no_passage_with_calibration() -> None:
    calibration = data.calibration_text()
    assert len(calibration) >= 300_000
    seen = {calibration[i : i + 60] for i in range(0, len(calibration), 60)}
    evaluation = data.evaluation_text()
    assert not any(evaluation[i : i + 60] in seen for i in range(len(evaluation) - 60))


def test_prompts_are_many_and_different() -> None:
    assert len(data.PROMPTS) >= 8
    assert len(set(data.PROMPTS)) == len(data.PROMPTS)
    assert all(10 <= len(p) <= 200 for p in data.PROMPTS)
    assert any(not p.isascii() for p in data.PROMPTS)
