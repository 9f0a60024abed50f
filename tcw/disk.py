"""Writing to disk so that a failure is clear and leaves nothing that looks finished."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from tcw.errors import ResourceError

_FULL = {errno.ENOSPC, errno.EDQUOT}


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the system's "no space" and "not allowed" into a ResourceError that names `path`."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise ResourceError(
                f"no space left to write `{path}`", "free some space or choose another folder"
            ) from None
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise ResourceError(f"not allowed to write `{path}`", "choose a folder you may write to") from None
        raise


def sync_folder(folder: Path) -> None:
    """Make a rename inside `folder` survive a power cut, where the system can."""
    with contextlib.suppress(OSError):  # Windows cannot open a folder, some network disks cannot sync one
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
