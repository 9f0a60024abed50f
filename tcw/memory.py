"""How much memory this process has used at its worst."""

import re
import sys
from pathlib import Path

_STATUS = Path("/proc/self/status")


def peak_memory() -> int:
    """Bytes of resident memory at the highest point so far.

    Linux keeps it per program (VmHWM); getrusage, used elsewhere, can carry over what a parent had before exec.
    """
    if _STATUS.exists():
        return int(re.search(r"VmHWM:\s*(\d+) kB", _STATUS.read_text())[1]) * 1024  # type: ignore[index]
    return peak_of("RUSAGE_SELF")


def peak_of(who: str) -> int:
    """Bytes of resident memory that getrusage reports for "RUSAGE_SELF" or, the largest of them, "RUSAGE_CHILDREN"."""
    if sys.platform == "win32":  # no such call there
        return 0
    import resource

    peak = resource.getrusage(getattr(resource, who)).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
