"""Every error that tcw raises on purpose: a message that names the thing, and a hint that says what to do next.

    TcwError                     exit code 2
    ├── UsageError               what was asked for makes no sense
    │   └── UnknownName          no such method, recipe, key, target: the hint has the nearest one
    ├── SourceError              a model is missing, damaged, unsupported, or changed while it was read
    ├── FormatError              a file is not what its format says (artifact, safetensors, DF11, GGUF)
    ├── OutputExists             something stands where the output should go
    ├── ResourceError            no memory or no space left
    └── MissingDependency        an optional package is needed for this

Messages are one line, lower case, without a full stop; values stand in backticks.
"""

import difflib
from collections.abc import Iterable


class TcwError(Exception):
    """A failure with a message for a person and a `hint` that names one command or choice."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        """Keep the hint when the error crosses a process boundary."""
        return _rebuild, (type(self).__name__, self.message, self.hint)  # type: ignore[return-value]


class UsageError(TcwError):
    """What was asked for makes no sense."""


class UnknownName(UsageError):
    """Nothing has this name; the hint offers the nearest one."""

    def __init__(self, kind: str, name: str, choices: Iterable[str], listing: str = "") -> None:
        choices = sorted(choices)
        near = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
        hint = f"did you mean `{near[0]}`?" if near else f"choose from: {', '.join(choices) or 'nothing'}"
        if listing:
            hint += f" (`{listing}` lists them all)"
        super().__init__(f"no {kind} named `{name}`", hint)


class SourceError(TcwError):
    """A model is missing, damaged, unsupported, or changed while it was read."""


class FormatError(TcwError):
    """A file is not what its format says."""


class OutputExists(TcwError):
    """Something stands where the output should go."""


class ResourceError(TcwError):
    """No memory or no space left."""


class MissingDependency(TcwError):
    """An optional package is needed."""

    def __init__(self, package: str, needed_for: str, extra: str) -> None:
        super().__init__(f"{needed_for} needs the package `{package}`", f"pip install 'tcw[{extra}]'")


def _rebuild(kind: str, message: str, hint: str) -> TcwError:
    error = TcwError.__new__(globals()[kind])
    TcwError.__init__(error, message, hint)
    return error
