"""The text that methods calibrate on: out of a file, or the bundled one, and cut into sequences of tokens."""

import hashlib
import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tcw.data import calibration_text
from tcw.errors import MissingDependency, SourceError, UsageError

MAX_BYTES = 1 << 28  # a million sequences are of no use
_CHARS_PER_TOKEN = 16  # of a large text, this much is tokenised for each token that is wanted
_LEAST_CHARS = 1 << 20  # a text of this size is tokenised whole
_FIELDS = ("text", "messages", "prompt")
_KINDS = (
    'give a .txt file, .jsonl with a field "text", "messages" or "prompt" in every line, or .parquet with such a column'
)


def read_texts(path: Path | None) -> list[str]:
    """Read the texts of a file: .txt is one text; .jsonl and .parquet have one a row; None is the bundled text.

    A row's text is its field `text` or `prompt`, or what the `messages` of a conversation say, one after another.
    Texts without content are left out.

    Raises:
        SourceError: the file is not there, too large, not UTF-8, not of these kinds, or holds no text.
        MissingDependency: .parquet is read by `pyarrow`.
    """
    if path is None:
        return [calibration_text()]
    readers = {".txt": _whole, ".jsonl": _lines, ".parquet": _columns}
    if path.suffix.lower() not in readers:
        raise SourceError(f"tcw calibrates on no file like `{path.name}`", _KINDS)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise SourceError(f"`{path.name}` is larger than {MAX_BYTES >> 20} MiB", "a few megabytes of it will do")
        texts = [text for text in readers[path.suffix.lower()](path) if text.strip()]
    except OSError as error:
        raise SourceError(f"cannot read the calibration text `{path}`: {error.strerror or error}") from None
    if not texts:
        raise SourceError(f"`{path.name}` holds no text", _KINDS)
    return texts


def sequences(tokenizer: Any, texts: list[str], count: int, length: int) -> np.ndarray:
    """Tokenise texts, cut them into windows and take `count` of these, spread evenly.

    Texts follow one another with an empty line in between. Of a text much larger than what is wanted, only excerpts
    are tokenised, as many as there are sequences and spread evenly as well. A token that opens every text (BOS, where
    the tokenizer puts one) opens every window; there are no other special tokens.

    Args:
        tokenizer: of transformers.
        texts: at least one.
        count: how many sequences are wanted.
        length: tokens in each.

    Returns:
        int64 [n, length]; n is less than `count` where the text has no more windows.

    Raises:
        SourceError: the text is shorter than one sequence.
        UsageError: no sequence, or one of less than two tokens, is wanted.
    """
    if count < 1 or length < 2:
        raise UsageError(f"calibration takes 1 sequence or more of 2 tokens or more, not {count} of {length}")
    opening = _opening(tokenizer)
    room = length - len(opening)
    parts = [_tokens(tokenizer, part) for part in _excerpts("\n\n".join(texts), count, length)]
    tokens = np.concatenate(parts)
    if len(tokens) < room:
        raise SourceError(
            f"the calibration text has {len(tokens)} tokens, one sequence needs {room}",
            "give a longer text, or ask for shorter sequences",
        )
    windows = tokens[: len(tokens) // room * room].reshape(-1, room)
    chosen = windows[np.linspace(0, len(windows) - 1, min(count, len(windows))).astype(np.int64)]
    return np.hstack([np.tile(opening, (len(chosen), 1)), chosen])


def fingerprint(ids: np.ndarray) -> str:
    """Hex SHA-256 of sequences [n, length]: what a run was calibrated on."""
    digest = hashlib.sha256(repr(ids.shape).encode())
    digest.update(np.ascontiguousarray(ids, "<i8").data)
    return digest.hexdigest()


def _whole(path: Path) -> list[str]:
    return [_decoded(path)]


def _lines(path: Path) -> Iterator[str]:
    for number, line in enumerate(_decoded(path).split("\n"), 1):  # splitlines would cut at U+2028, which JSON may hold
        if not line.strip():
            continue
        where = f"line {number} of `{path.name}`"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise SourceError(f"{where} is not valid JSON", _KINDS) from None
        yield _text_of(row, where)


def _columns(path: Path) -> Iterator[str]:
    try:
        pyarrow = importlib.import_module("pyarrow")
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError:
        error = MissingDependency("pyarrow", f"reading `{path.name}`", "")
        error.hint = "pip install pyarrow, or give the text as .txt or .jsonl"
        raise error from None
    try:
        with parquet.ParquetFile(path) as file:
            columns = [field for field in _FIELDS if field in file.schema_arrow.names]
            if not columns:
                raise SourceError(f"`{path.name}` has no column of texts", _KINDS)
            number = 0
            for batch in file.iter_batches(columns=columns[:1]):
                for row in batch.to_pylist():
                    number += 1
                    yield _text_of(row, f"row {number} of `{path.name}`")
    except pyarrow.ArrowException as error:
        raise SourceError(f"`{path.name}` is not valid parquet: {str(error).partition(chr(10))[0]}") from None


def _decoded(path: Path) -> str:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SourceError(
            f"`{path.name}` is not UTF-8 at byte {error.start}", "convert it: `iconv -f ENCODING -t UTF-8`"
        ) from None
    if "\0" in text:
        raise SourceError(f"`{path.name}` is not a text: it holds zero bytes", _KINDS)
    return text.replace("\r\n", "\n")


def _text_of(row: Any, where: str) -> str:
    """The text of a row."""
    field = next((f for f in _FIELDS if f in row), None) if isinstance(row, dict) else None
    if field is None:
        raise SourceError(f"{where} has none of the fields {', '.join(f'`{f}`' for f in _FIELDS)}", _KINDS)
    value = row[field]
    if field == "messages" and isinstance(value, list):
        said: list[Any] = [message.get("content") if isinstance(message, dict) else None for message in value]
        value = "\n\n".join(said) if all(isinstance(s, str) for s in said) else None
    if not isinstance(value, str):
        raise SourceError(f"the `{field}` of {where} is no text", 'a message is {"role": ..., "content": TEXT}')
    return value


def _excerpts(text: str, count: int, length: int) -> list[str]:
    limit = max(_LEAST_CHARS, _CHARS_PER_TOKEN * count * length)
    if len(text) <= limit:
        return [text]
    size = limit // count
    return [text[start : start + size] for start in np.linspace(0, len(text) - size, count).astype(int)]


def _tokens(tokenizer: Any, text: str) -> np.ndarray:
    # `verbose`: no warning that the text is longer than the model's context
    return np.asarray(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], np.int64)


def _opening(tokenizer: Any) -> np.ndarray:
    """The BOS token, int64 [1], where the tokenizer begins a text with it; else int64 [0]."""
    first = tokenizer("a")["input_ids"][:1]
    return np.asarray(first if first == [tokenizer.bos_token_id] else [], np.int64)
