"""Lines in, lines out: the same ids, a clear error with the number of a bad line, and files whole or not at all."""

import io
import json
from pathlib import Path
from typing import Any

import pytest

from tcw.errors import TcwError, UsageError
from tcw.prompt import batch
from tcw.prompt.engine import compress


def lines(*objects: Any) -> list[bytes]:
    return [json.dumps(each).encode() + b"\n" for each in objects]


def test_records() -> None:
    second = {"id": 2, "context": ["x", ""], "question": "q", "instruction": None, "more": {}}
    read = list(batch.read([*lines({"id": "a", "context": "x"}), b"  \n", *lines(second)]))
    assert [(record.number, record.data["id"], record.context) for record in read] == [
        (1, "a", ["x"]),
        (3, 2, ["x", ""]),
    ]
    assert (read[1].text("question"), read[1].text("instruction"), read[1].text("answer")) == ("q", None, None)


def test_a_byte_order_mark_is_no_error() -> None:
    assert batch.count([b"\xef\xbb\xbf" + lines({"id": 1, "context": "x"})[0]]) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "line 2 is no JSON: "),
        (b"[" * 100_000, "line 2 is no JSON: "),
        (b"\xff", "line 2 is not UTF-8"),
        (b"[1]", "line 2: no JSON object"),
        (b'{"context": "x"}', "line 2: no `id`"),
        (b'{"id": true, "context": "x"}', "line 2: `id` must be a text or a whole number"),
        (b'{"id": 1.5, "context": "x"}', "line 2: `id` must be a text or a whole number"),
        (b'{"id": 1}', "line 2: no `context`"),
        (b'{"id": 1, "context": 3}', "line 2: `context` must be a text or a list of texts"),
        (b'{"id": 1, "context": ["x", 3]}', "line 2: `context` must be a text or a list of texts"),
        (b'{"id": 1, "context": " "}', "line 2: `context` is empty"),
        (b'{"id": 1, "context": []}', "line 2: `context` is empty"),
        (b'{"id": 1, "context": "x", "question": 3}', "line 2: `question` must be a text"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_bad_line_is_named(line: bytes, message: str) -> None:
    with pytest.raises(UsageError) as error:
        batch.count([*lines({"id": 1, "context": "x"}), line])
    assert error.value.message.startswith(message)
    assert "\n" not in error.value.message
    assert error.value.hint


def test_no_lines() -> None:
    with pytest.raises(UsageError, match="no line to compress"):
        batch.count([b"\n"])


def test_lines_are_read_as_they_are_needed() -> None:
    records = batch.read([*lines({"id": 1, "context": "x"}), b"{"])
    assert next(records).number == 1
    with pytest.raises(UsageError):
        next(records)


def test_output_keeps_what_it_does_not_know() -> None:
    (record,) = batch.read(lines({"id": "é", "context": ["a b", "c d"], "question": "q", "more": [1]}))
    result = compress(record.context, "truncate", rate=0.5, tokenizer=lambda text: len(text.split()))
    assert batch.output(record, result) == {
        "id": "é", "context": "a b", "question": "q", "more": [1], "rate": 0.5, "notes": [],
        "tokens": {"before": 4, "after": 2, "target": 2, "protected": 0},
    }  # fmt: skip


def test_errors_get_the_number_of_their_line() -> None:
    record = batch.Record(7, {})
    error = record.failed(TcwError("too long", "cut it"))
    assert (error.message, error.hint) == ("line 7: too long", "cut it")


def test_a_pipe_can_be_read_twice() -> None:
    class Pipe(io.BytesIO):
        def seekable(self) -> bool:
            return False

    with batch.rewindable(Pipe(b"a\nb\n")) as stream:
        assert list(stream) == [b"a\n", b"b\n"]
        stream.seek(0)
        assert stream.read() == b"a\nb\n"
    plain = io.BytesIO(b"x")
    with batch.rewindable(plain) as stream:
        assert stream is plain


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text("old")
    with pytest.raises(TypeError), batch.writer(path, pytest.fail) as write:
        [write(each) for each in ({"id": 1}, {"id": object()})]
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("out.jsonl", "old")]
    with batch.writer(path, pytest.fail) as write:
        write({"id": "é"})
        write({"id": 2})
        assert path.read_text() == "old"
    assert path.read_text(encoding="utf-8") == '{"id": "é"}\n{"id": 2}\n'
    assert list(tmp_path.iterdir()) == [path]


def test_without_a_path_lines_go_elsewhere() -> None:
    said: list[str] = []
    with batch.writer(None, said.append) as write:
        write({"a": 1})
        assert said == ['{"a": 1}\n']
