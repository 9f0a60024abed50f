"""Where kernels/ and profiles/ live: top-level folders in a checkout, `_kernels` and `_profiles` in a wheel."""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def folder(name: str) -> Path:
    """Return the folder `name` ("kernels" or "profiles") of this installation.

    A checkout (also an editable install) wins over a copy that a build left inside the package.
    """
    checkout = _PACKAGE.parent / name
    if checkout.is_dir() and (_PACKAGE.parent / "pyproject.toml").is_file():
        return checkout
    return _PACKAGE / f"_{name}"
