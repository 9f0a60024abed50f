"""What a person reads when a command fails: one table from exceptions to messages and hints."""

import difflib
import errno
import re
from concurrent.futures.process import BrokenProcessPool
from typing import NamedTuple

from tcw.errors import TcwError

DEBUG_HINT = "this is a bug in tcw: set `TCW_DEBUG=1`, run it again, and report the traceback"
_MEMORY_HINT = "close other programs, or try `--workers 1`; a GPU's memory is left alone by `--device cpu`"
_IMPORT_HINT = "`tcw doctor` says what is broken; with too little memory this happens as well"
# how torch, the loader of shared libraries and Python's threads say that memory is short
_NO_MEMORY = re.compile(r"(?i)can(not|'t) allocate memory|failed to map segment|can't start new thread")
_SPACE_HINT = "free some space, or choose another place with `-o`; caches can move with `TCW_CACHE`"


class Failure(NamedTuple):
    """A code for programs, a message and a hint for people."""

    code: str
    message: str
    hint: str


def describe(error: BaseException) -> Failure:
    """Put any exception into words."""
    if isinstance(error, TcwError):
        return Failure(_snake(type(error).__name__), error.message, error.hint)
    if hasattr(error, "format_message"):  # what Typer raises when the command line cannot be read
        return _usage(error)
    # torch's out-of-memory errors, by name: torch may not be imported at all
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or _NO_MEMORY.search(str(error)):
        return Failure("resource_error", "not enough memory", _MEMORY_HINT)
    if isinstance(error, BrokenProcessPool):
        return Failure("resource_error", "a worker process was killed, most often for lack of memory", _MEMORY_HINT)
    if isinstance(error, OSError) and error.errno:
        return _system(error)
    if isinstance(error, ImportError):
        return Failure("import_error", f"cannot load a part of tcw: {_one_line(str(error))}", _IMPORT_HINT)
    return Failure("internal", f"internal: {type(error).__name__}: {_one_line(str(error))}".rstrip(": "), DEBUG_HINT)


def _system(error: OSError) -> Failure:
    where = f" (`{error.filename}`)" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return Failure("resource_error", f"no space left on the disk{where}", _SPACE_HINT)
    if error.errno == errno.ENOMEM:
        return Failure("resource_error", "not enough memory", _MEMORY_HINT)
    message = f"{(error.strerror or str(error)).lower()}{where}"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return Failure("system", message, "check who owns it, or choose another place with `-o`")
    return Failure("system", message, "check the path, and that the disk is there")


def _usage(error: BaseException) -> Failure:
    text = _one_line(error.format_message())  # type: ignore[attr-defined]
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "tcw"
    hint = f"`{command} --help` shows what it takes"
    if near := re.search(r"\s*(?:Did you mean (.+)\?|\(Possible options?: (.+)\))$", text):
        text, offers = text[: near.start()], re.findall(r"[\w-]+", near.group(1) or near.group(2))
        wrong = re.findall(r"[\w-]+", text)[-1]
        best = max(offers, key=lambda offer: difflib.SequenceMatcher(None, wrong, offer).ratio())
        hint = f"did you mean `{best}`? {hint}"
    text = text.replace("Value error, ", "").replace("Input should be", "it should be")
    text = re.sub(r"'([^']*)'", r"`\1`", text)
    text = re.sub(r"^No such option: (\S+)", r"no such option: `\1`", text).rstrip(".")
    return Failure("usage_error", text[:1].lower() + text[1:], hint)


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()


def _one_line(text: str) -> str:
    return " ".join(text.split())
