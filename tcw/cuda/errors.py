"""The error of all that needs a GPU: what is missing, and what to do about it."""

from tcw.errors import UsageError


class NoGpu(UsageError):
    """A kernel cannot be compiled or cannot run here: no driver, an old one, no compiler, no memory."""

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        """Keep the hint when the error crosses a process boundary."""
        return NoGpu, (self.message, self.hint)
