"""How many cores this process may use."""

import os


def cores() -> int:
    """Number of cores that the system lets this process run on; on a shared machine fewer than there are."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        return os.cpu_count() or 1
