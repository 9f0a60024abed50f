"""Where tcw keeps what it can make again: converted GGUF files, compiled kernels, measurements."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return `$TCW_CACHE`, else `$XDG_CACHE_HOME/tcw`, else `~/.cache/tcw`. It may not exist yet."""
    if chosen := os.environ.get("TCW_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "tcw"
