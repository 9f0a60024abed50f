"""Many prompts: one JSON object a line, in and out.

In: {"id": ..., "context": "text" or ["text", ...], "question": "...", "instruction": "...", "answer": "..."}, the last
three optional. Out: the same object with what is left in `context` (one text, contexts joined by blank lines), and
`tokens`, `rate` and `notes`. Any other key goes through. Lines are read as they are needed, and blank ones skipped.
"""

import contextlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from tcw.disk import writing
from tcw.errors import TcwError, UsageError

if TYPE_CHECKING:
    from tcw.prompt.engine import Result

_TEXTS = ("question", "instruction", "answer")
_SHAPE = '{"id": 1, "context": "text" or ["text"], "question": "optional"}'


@dataclass(frozen=True)
class Record:
    """One line: its number (from 1) and its object. `question`, `instruction` and `answer` are None where absent."""

    number: int
    data: dict[str, Any]

    @property
    def context(self) -> list[str]:
        """The contexts; one text is a list of one."""
        context = self.data["context"]
        return [context] if isinstance(context, str) else list(context)

    def text(self, key: str) -> str | None:
        """The optional text `key`."""
        return self.data.get(key)

    def failed(self, error: TcwError) -> UsageError:
        """The error, with the number of this line."""
        return UsageError(f"line {self.number}: {error.message}", error.hint)


def read(lines: Iterable[bytes]) -> Iterator[Record]:
    """Read records. Raises UsageError at the first line that is none; the message has its number."""
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield _record(number, line)


def count(lines: Iterable[bytes]) -> int:
    """The number of records, each of them looked at: nothing is compressed before all lines are known to be good."""
    number = sum(1 for _ in read(lines))
    if not number:
        raise UsageError("there is no line to compress", f"a line is {_SHAPE}")
    return number


@contextlib.contextmanager
def rewindable(stream: BinaryIO) -> Iterator[BinaryIO]:
    """The same bytes, to be read twice: what comes through a pipe is put on disk first."""
    if stream.seekable():
        yield stream
        return
    with tempfile.TemporaryFile() as copy:
        shutil.copyfileobj(stream, copy)
        copy.seek(0)
        yield copy


@contextlib.contextmanager
def writer(path: Path | None, otherwise: Callable[[str], None]) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Write objects, a line each, to a file that appears whole or not at all; without a path, to `otherwise`."""
    if path is None:
        yield lambda found: otherwise(_line(found))
        return
    partial = path.with_name(path.name + ".partial")
    try:
        with writing(path):
            with partial.open("w", encoding="utf-8") as stream:
                yield lambda found: stream.writelines([_line(found)])
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def output(record: Record, result: "Result") -> dict[str, Any]:
    """The object that goes out for a record."""
    tokens = {"before": result.before, "after": result.after, "target": result.target, "protected": result.protected}
    return {
        **record.data, "context": result.text, "tokens": tokens, "rate": result.rate, "notes": list(result.notes),
    }  # fmt: skip


def _line(found: dict[str, Any]) -> str:
    return json.dumps(found, ensure_ascii=False) + "\n"


def _record(number: int, line: bytes) -> Record:
    try:
        data = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except UnicodeDecodeError:
        raise UsageError(f"line {number} is not UTF-8", "convert the file, for example with `iconv`") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"line {number} is no JSON: {error}", f"a line is {_SHAPE}") from None
    problem = _problem(data)
    if problem:
        raise UsageError(f"line {number}: {problem}", f"a line is {_SHAPE}")
    return Record(number, data)


def _problem(data: Any) -> str:
    """What is wrong with an object; "" for nothing."""
    if not isinstance(data, dict):
        return "no JSON object"
    if isinstance(data.get("id"), bool) or not isinstance(data.get("id"), str | int):
        return "`id` must be a text or a whole number" if "id" in data else "no `id`"
    if "context" not in data:
        return "no `context`"
    context = data["context"]
    texts = context if isinstance(context, list) else [context]
    if not all(isinstance(text, str) for text in texts):
        return "`context` must be a text or a list of texts"
    if not any(text.strip() for text in texts):
        return "`context` is empty"
    for key in _TEXTS:
        if not isinstance(data.get(key, ""), str | None):
            return f"`{key}` must be a text"
    return ""
