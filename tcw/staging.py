"""Output folders that appear whole or not at all: written beside their place as `.partial`, renamed at the end.

A crash leaves the `.partial`; it never leaves a folder that looks finished. What stands in the way is replaced only
when asked for, and only if it is a model folder: `--force` must never be able to delete somebody's home.
"""

import errno
import os
import shutil
import tempfile
from pathlib import Path

from tcw.disk import sync_folder
from tcw.errors import OutputExists, UsageError

MARK = ".tcw-partial"  # lies in every `.partial` folder: only what has it is ever deleted
_MARKS = ("tcw.json", "config.json")  # what a folder must hold to be replaceable


def partial_path(out: Path) -> Path:
    """Where the output is written until it is whole."""
    return out.with_name(out.name + ".partial")


def claim(out: Path, inputs: list[Path], *, force: bool) -> Path:
    """Check that `out` may be written and return its `.partial` path (which may exist, from an interrupted run).

    Args:
        out: the folder to be.
        inputs: files and folders that are read; `out` may not be, hold or lie in one of them.
        force: allow an existing model folder to be replaced.
    """
    out = out.absolute()
    for path in inputs:
        read, write = path.resolve(), out.resolve()
        if write == read or read.is_relative_to(write) or (path.is_dir() and write.is_relative_to(read)):
            raise UsageError(f"`{out.name}` and the model `{path.name}` overlap", "choose another folder with `-o`")
    if not out.name or not out.parent.is_dir():
        raise UsageError(f"there is no folder `{out.parent}` to write `{out.name}` into", "create it, or change `-o`")
    if not os.access(out.parent, os.W_OK):
        raise UsageError(f"cannot write into `{out.parent}`", "choose another folder with `-o`")
    if out.exists() or out.is_symlink():
        if not force:
            raise OutputExists(f"`{out.name}` exists", "pass `--force` to replace it")
        if not _replaceable(out):
            raise OutputExists(
                f"`{out.name}` exists and is not a model folder", "`--force` replaces model folders only"
            )
    return partial_path(out)


def hold(partial: Path) -> int | None:
    """Lock a `.partial` folder against other runs until the handle returned is closed; it goes with the process.

    None where the system cannot lock a folder (Windows, some network disks). Raises UsageError when another run has it.
    """
    try:
        import fcntl
    except ImportError:
        return None
    handle = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            return None
        raise UsageError(
            f"another run is writing `{partial.name}`", "wait until it ends, or choose another folder with `-o`"
        ) from None
    return handle


def let_go(handle: int | None) -> None:
    """Give back what `hold` gave."""
    if handle is not None:
        os.close(handle)


def begin(partial: Path) -> None:
    """Make an empty `.partial` folder that says whose it is."""
    partial.mkdir()
    (partial / MARK).touch()


def discard(partial: Path) -> None:
    """Delete what an interrupted run left. Raises OutputExists for a folder that is not one of ours."""
    if not partial.exists() and not partial.is_symlink():
        return
    if partial.is_symlink() or not (partial / MARK).is_file():
        raise OutputExists(
            f"`{partial.name}` stands in the way and was not made by tcw", "move it, or choose another folder with `-o`"
        )
    shutil.rmtree(partial)


def publish(out: Path) -> None:
    """Rename the finished `.partial` into place; what stood there goes only after that has worked."""
    partial = partial_path(out)
    (partial / MARK).unlink()
    sync_folder(partial)
    if not out.exists():
        partial.rename(out)
    else:
        aside = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        out.rename(aside / out.name)
        try:
            partial.rename(out)
        except OSError:
            (aside / out.name).rename(out)
            aside.rmdir()
            raise
        shutil.rmtree(aside)
    sync_folder(out.parent)


def _replaceable(out: Path) -> bool:
    if out.is_symlink() or not out.is_dir():
        return False
    return any((out / mark).is_file() for mark in _MARKS) or not any(out.iterdir())
