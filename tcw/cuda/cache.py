"""Compiled kernels on disk: `kernels/` in tcw's cache folder, one file for each op, architecture and source.

A file holds the SHA-256 of what follows (32 bytes), the length of a JSON header (4 bytes, little-endian), the header,
and the cubin. It is written beside its place and renamed into it, so processes that compile the same kernel at once
do not disturb each other. One that is damaged is compiled again; a folder that cannot be written costs only time. A
file has at most some hundred kilobytes, and only a new release, compiler or architecture adds one: a few megabytes.
"""

import hashlib
import json
import logging
import os
import tempfile
from contextlib import suppress
from pathlib import Path

from tcw.cache import cache_folder

_DIGEST, _LENGTH = 32, 4
_log = logging.getLogger("tcw")


def place() -> Path:
    """The folder; it may not exist yet."""
    return cache_folder() / "kernels"


def read(name: str) -> tuple[dict[str, object], bytes] | None:
    """Header and cubin stored as `name`, or None where there is none, or none that is whole."""
    path = place() / f"{name}.kernel"
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        _log.info("cannot read the compiled kernel %s: %s", path, error.strerror)
        return None
    start = _DIGEST + _LENGTH
    end = start + int.from_bytes(data[_DIGEST:start], "little")
    if len(data) < start or hashlib.sha256(data[_DIGEST:]).digest() != data[:_DIGEST]:
        _log.info("the compiled kernel %s is damaged and is compiled again", path)
        return None
    return json.loads(data[start:end]), data[end:]


def write(name: str, header: dict[str, object], cubin: bytes) -> None:
    """Store header and cubin as `name`; where that fails, say so in the log and go on."""
    text = json.dumps(header).encode()
    body = len(text).to_bytes(_LENGTH, "little") + text + cubin
    folder, partial = place(), None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(prefix=f".{name}.", dir=folder)
        with os.fdopen(handle, "wb") as file:
            file.write(hashlib.sha256(body).digest() + body)
        Path(partial).replace(folder / f"{name}.kernel")
    except OSError as error:
        _log.info("cannot keep the compiled kernel %s in %s: %s", name, folder, error.strerror)
        if partial is not None:
            with suppress(OSError):
                Path(partial).unlink()
