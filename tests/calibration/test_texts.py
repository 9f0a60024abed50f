"""Texts to calibrate on: every kind of file, what is refused, and how they become sequences."""

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import transformers

from tcw.calibration import texts
from tcw.calibration.texts import fingerprint, read_texts, sequences
from tcw.data import calibration_text
from tcw.errors import MissingDependency, SourceError, UsageError


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> Any:
    """One token a byte."""
    return transformers.AutoTokenizer.from_pretrained(tiny_llama)


class Words:
    """A tokenizer whose tokens are words that are numbers, and which begins texts as it is told."""

    bos_token_id = 7

    def __init__(self, opening: list[int] | None = None) -> None:
        self.opening = opening or []
        self.seen = 0

    def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> dict[str, list[int]]:
        self.seen += len(text)
        ids = [int(word) if word.isdigit() else 0 for word in text.split()]
        return {"input_ids": (self.opening if add_special_tokens else []) + ids}


def numbers(first: int, end: int) -> str:
    return " ".join(map(str, range(first, end)))


def file(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def jsonl(path: Path, *rows: Any) -> Path:
    return file(path, "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows))


def test_the_bundled_text_is_the_default() -> None:
    assert read_texts(None) == [calibration_text()]


def test_a_txt_file_is_one_text(tmp_path: Path) -> None:
    assert read_texts(file(tmp_path / "a.txt", "\ufeffGrüße,\r\nzwei Zeilen.\n")) == ["Grüße,\nzwei Zeilen.\n"]
    assert read_texts(file(tmp_path / "B.TXT", "x")) == ["x"]


def test_a_jsonl_file_has_a_text_in_each_line(tmp_path: Path) -> None:
    said = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]
    path = jsonl(
        tmp_path / "a.jsonl", {"text": "one\u2028line", "id": 1}, {"prompt": "two"}, {"messages": said}, {"text": " "}
    )
    assert read_texts(path) == ["one\u2028line", "two", "Why?\n\nBecause."]
    assert read_texts(file(tmp_path / "b.jsonl", '{"text": "a"}\r\n\n{"text": "b"}')) == ["a", "b"]


@pytest.mark.parametrize(("line", "reason"), [
    ("{", "line 2 of `a.jsonl` is not valid JSON"),
    ("[" * 100_000, "line 2 of `a.jsonl` is not valid JSON"),
    ('"words"', "line 2 of `a.jsonl` has none of the fields `text`, `messages`, `prompt`"),
    ('{"content": "x"}', "none of the fields"),
    ('{"text": 3}', "the `text` of line 2 of `a.jsonl` is no text"),
    ('{"text": null}', "is no text"),
    ('{"messages": "x"}', None),
    ('{"messages": ["x"]}', "the `messages` of line 2"),
    ('{"messages": [{"role": "user"}]}', "the `messages` of line 2"),
    ('{"messages": [{"content": [1]}]}', "the `messages` of line 2"),
])  # fmt: skip
def test_a_line_that_is_not_as_it_should_be_is_named(tmp_path: Path, line: str, reason: str | None) -> None:
    path = file(tmp_path / "a.jsonl", '{"text": "good"}\n' + line)
    if reason is None:
        assert read_texts(path) == ["good", "x"]
        return
    with pytest.raises(SourceError, match=reason) as caught:
        read_texts(path)
    assert caught.value.hint


@pytest.mark.parametrize(("name", "content", "reason"), [
    ("a.txt", b"caf\xe9", "`a.txt` is not UTF-8 at byte 3"),
    ("a.jsonl", b"\xff\xfe{\x00", "`a.jsonl` is not UTF-8 at byte 0"),
    ("a.txt", b"PK\x00\x00", "holds zero bytes"),
    ("a.txt", b"", "`a.txt` holds no text"),
    ("a.txt", b" \n\n", "`a.txt` holds no text"),
    ("a.jsonl", b"", "`a.jsonl` holds no text"),
    ("a.csv", b"text\nx", "no file like `a.csv`"),
    ("a", b"text", "no file like `a`"),
])  # fmt: skip
def test_files_that_hold_no_text_are_refused(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    with pytest.raises(SourceError, match=reason) as caught:
        read_texts(file(tmp_path / name, content))
    assert caught.value.hint


def test_files_that_cannot_be_read_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SourceError, match=r"cannot read the calibration text `.*gone\.txt`: No such file"):
        read_texts(tmp_path / "gone.txt")
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(SourceError, match=r"folder\.txt`: Is a directory"):
        read_texts(tmp_path / "folder.txt")
    monkeypatch.setattr(texts, "MAX_BYTES", 1 << 20)
    with pytest.raises(SourceError, match=r"`a\.txt` is larger than 1 MiB"):
        read_texts(file(tmp_path / "a.txt", b"x" * ((1 << 20) + 1)))


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingDependency, match=r"reading `a\.parquet` needs the package `pyarrow`") as caught:
        read_texts(file(tmp_path / "a.parquet", b"PAR1"))
    assert "pip install pyarrow" in caught.value.hint


def arrow(monkeypatch: pytest.MonkeyPatch, columns: dict[str, list[Any]] | None) -> None:
    """Put the few functions of pyarrow that are used in its place; without columns the file is damaged."""
    package, parquet = ModuleType("pyarrow"), ModuleType("pyarrow.parquet")

    class ArrowError(Exception):
        pass

    class ParquetFile:
        def __init__(self, path: Path) -> None:
            if columns is None:
                raise ArrowError("magic bytes not found\nmore")
            self.schema_arrow = SimpleNamespace(names=list(columns))

        def __enter__(self) -> "ParquetFile":
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def iter_batches(self, columns: list[str]) -> Any:
            for value in table[columns[0]]:
                yield SimpleNamespace(to_pylist=lambda value=value: [{columns[0]: value}])

    table = columns or {}
    package.ArrowException, parquet.ParquetFile = ArrowError, ParquetFile  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pyarrow", package)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", parquet)


def test_parquet_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = file(tmp_path / "a.parquet", b"PAR1")
    arrow(monkeypatch, {"id": [1, 2], "text": ["one", "two"]})
    assert read_texts(path) == ["one", "two"]
    arrow(monkeypatch, {"messages": [[{"content": "a"}, {"content": "b"}]]})
    assert read_texts(path) == ["a\n\nb"]
    arrow(monkeypatch, {"text": ["one", None]})
    with pytest.raises(SourceError, match=r"the `text` of row 2 of `a\.parquet` is no text"):
        read_texts(path)
    arrow(monkeypatch, {"id": [1]})
    with pytest.raises(SourceError, match="has no column of texts"):
        read_texts(path)
    arrow(monkeypatch, None)
    with pytest.raises(SourceError, match=r"is not valid parquet: magic bytes not found$"):
        read_texts(path)


def test_sequences_are_windows_of_the_text(tokenizer: Any) -> None:
    text = calibration_text()[:3000]
    ids = sequences(tokenizer, [text], 1000, 100)
    assert (ids.shape, ids.dtype) == ((30, 100), np.int64)
    assert tokenizer.decode(ids.reshape(-1)) == text


def test_sequences_are_spread_evenly() -> None:
    ids = sequences(Words(), [numbers(0, 95)], 4, 10)
    assert ids[:, 0].tolist() == [0, 20, 50, 80]  # windows 0, 2⅔, 5⅓ and 8 of nine
    assert (np.diff(ids) == 1).all()


def test_texts_follow_one_another() -> None:
    ids = sequences(Words(), [numbers(0, 4), numbers(4, 9)], 10, 3)
    assert ids.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]


@pytest.mark.parametrize("opening", [[7], [7, 3]])
def test_a_bos_token_opens_every_window(opening: list[int]) -> None:
    ids = sequences(Words(opening), [numbers(10, 20)], 5, 4)
    assert ids.tolist() == [[7, 10, 11, 12], [7, 13, 14, 15], [7, 16, 17, 18]]


def test_other_special_tokens_are_kept_out() -> None:
    assert sequences(Words([8]), [numbers(10, 14)], 5, 2).tolist() == [[10, 11], [12, 13]]


def test_a_text_shorter_than_one_sequence() -> None:
    with pytest.raises(SourceError, match="has 9 tokens, one sequence needs 10"):
        sequences(Words(), [numbers(0, 9)], 4, 10)
    with pytest.raises(SourceError, match="has 8 tokens, one sequence needs 9"):
        sequences(Words([7]), [numbers(0, 8)], 4, 10)
    assert sequences(Words(), [numbers(0, 10)], 4, 10).shape == (1, 10)


@pytest.mark.parametrize(("count", "length"), [(0, 10), (-1, 10), (1, 1), (1, 0)])
def test_sequences_that_make_no_sense(count: int, length: int) -> None:
    with pytest.raises(UsageError, match=f"not {count} of {length}"):
        sequences(Words(), [numbers(0, 100)], count, length)


def test_of_a_large_text_only_excerpts_are_tokenised() -> None:
    words = Words()
    text = numbers(1_000_000, 2_000_000)  # 8 MB
    ids = sequences(words, [text], 8, 16)
    assert words.seen < (1 << 20) + 100
    assert ids.shape == (8, 16)
    assert ids[0, 0] == 1_000_000
    assert (np.diff(ids[:, 8]) > 100_000).all()
    assert ids.max() > 1_980_000


def test_the_fingerprint_is_of_shape_and_tokens() -> None:
    ids = np.arange(12).reshape(3, 4)
    assert fingerprint(ids) == fingerprint(ids.astype(np.int32)) == fingerprint(np.asfortranarray(ids))
    assert fingerprint(ids) == "4d342c941a8823b03e499d028923f2d6792bf9b1664f3a0f4de493ea7d815438"
    other = ids.copy()
    other[1, 1] = 99
    assert len({fingerprint(x) for x in (ids, ids.reshape(4, 3), other)}) == 3


def test_the_bundled_text_is_enough_for_the_defaults(smollm2: Path) -> None:
    tokens = transformers.AutoTokenizer.from_pretrained(smollm2)
    ids = sequences(tokens, read_texts(None), 128, 512)
    assert ids.shape == (128, 512)
    assert not np.isin(ids, tokens.all_special_ids).any()
