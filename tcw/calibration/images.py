"""Pictures that methods look at: from a folder or a .npy file, else those that scikit-image brings.

They are made ready for a vision tower as its own preprocessor would, but for the kernel of the resizing, which is
torch's (bicubic, with antialiasing).
"""

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tcw.errors import MissingDependency, SourceError

if TYPE_CHECKING:
    from torch import Tensor

KINDS = (".png", ".jpg", ".jpeg")
MOST = 4096  # pictures that are read of a folder
_SIDE = 224  # of pictures for a tower that takes any size and names none
_GIVE = "give `--calibration FOLDER` with PNG or JPEG files, or a .npy file of them: uint8 [n, height, width, 3]"
_SHIPPED = ("astronaut", "brick", "camera", "chelsea", "clock_motion", "coffee", "coins", "grass", "gravel", "horse",
            "hubble_deep_field", "ihc", "motorcycle_left", "page", "retina", "rocket", "text")  # fmt: skip


def read_images(path: Path | None) -> list[np.ndarray]:
    """Read pictures, each uint8 [height, width, 3], in the order of their names.

    Args:
        path: a folder of PNG and JPEG files, or a .npy file of uint8 [n, height, width, 3]; None: what scikit-image
            brings, if it is installed.

    Raises:
        SourceError: there is no picture, or one that cannot be read; nothing was given and scikit-image is not there.
        MissingDependency: `pillow` reads picture files.
    """
    if path is not None and path.suffix.lower() == ".npy":
        return _array(path)
    files = shipped() if path is None else _files(path)
    if not files:
        if path is None:
            raise SourceError("no pictures were given, and scikit-image, which brings some, is not installed", _GIVE)
        raise SourceError(f"`{path}` holds no PNG or JPEG file", _GIVE)
    return [_read(file) for file in files[:MOST]]


def shipped() -> list[Path]:
    """The photographs that lie in an installed scikit-image, sorted; [] without one."""
    found = importlib.util.find_spec("skimage")
    if found is None or found.origin is None:
        return []
    folder = Path(found.origin).parent / "data"
    return [file for file in _files(folder) if file.stem in _SHIPPED]


def _files(folder: Path) -> list[Path]:
    try:
        return sorted(file for file in folder.iterdir() if file.suffix.lower() in KINDS and file.is_file())
    except OSError as error:
        raise SourceError(f"cannot read the pictures in `{folder}`: {error.strerror}", _GIVE) from None


def _read(file: Path) -> np.ndarray:
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise MissingDependency("pillow", f"reading `{file.name}`", "vision") from None
    try:
        with Image.open(file) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError, ValueError) as error:
        raise SourceError(f"cannot read the picture `{file.name}`: {error}", _GIVE) from None


def _array(path: Path) -> list[np.ndarray]:
    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise SourceError(f"cannot read `{path.name}`: {error}", _GIVE) from None
    if found.dtype != np.uint8 or found.ndim != 4 or found.shape[3] != 3 or 0 in found.shape:
        raise SourceError(f"`{path.name}` is {found.dtype} {list(found.shape)}, no pictures", _GIVE)
    return list(found)


def normalised(images: Sequence[np.ndarray], folder: Path) -> "list[Tensor]":
    """Pictures (uint8 [height, width, 3]) as float32 [3, height, width], their channels normalised.

    Mean and deviation are those of `preprocessor_config.json` in `folder`, of the model; 0.5 where it says nothing.
    """
    import torch

    said = _preprocessor(folder)
    mean, deviation = (torch.tensor(_three(said.get(f"image_{k}"))).view(3, 1, 1) for k in ("mean", "std"))
    ready = (torch.tensor(image).permute(2, 0, 1).float() / 255 for image in images)
    return [(x - mean) / deviation for x in ready]


def prepared(images: Sequence[np.ndarray], folder: Path, config: Any) -> "list[Tensor]":
    """Make pictures ready for a vision tower: float32 [3, height, width], all of one size.

    The shorter side is resized and the middle is cut out; channels are `normalised`. The size is the tower's, else the
    preprocessor's.

    Args:
        images: uint8 [height, width, 3].
        folder: of the model.
        config: of the tower; `image_size` is read.
    """
    from torch.nn.functional import interpolate

    height, width = _size(_preprocessor(folder), config)
    out = []
    for x in normalised(images, folder):
        scale = max(height / x.shape[1], width / x.shape[2])
        size = (max(height, round(x.shape[1] * scale)), max(width, round(x.shape[2] * scale)))
        x = interpolate(x[None], size, mode="bicubic", antialias=True, align_corners=False)[0]
        top, left = (size[0] - height) // 2, (size[1] - width) // 2
        out.append(x[:, top : top + height, left : left + width].contiguous())
    return out


def _preprocessor(folder: Path) -> dict[str, Any]:
    for name in ("preprocessor_config.json", "processor_config.json"):
        try:
            said = json.loads((folder / name).read_text(encoding="utf-8"))
        except OSError:
            continue
        except ValueError:
            raise SourceError(f"`{name}` is not valid JSON", "fetch the model again") from None
        found = said.get("image_processor", said) if isinstance(said, dict) else {}
        return found if isinstance(found, dict) else {}
    return {}


def _size(said: dict[str, Any], config: Any) -> tuple[int, int]:
    """Height and width: the tower's own, else what is cut out or resized to, else `_SIDE`."""
    own = getattr(config, "image_size", None)
    for size in (own, said.get("crop_size"), said.get("size")):
        if isinstance(size, int) and size > 0:
            return size, size
        if isinstance(size, list | tuple) and len(size) == 2:
            return int(size[0]), int(size[1])
        if isinstance(size, dict) and {"height", "width"} <= size.keys():
            return int(size["height"]), int(size["width"])
    return _SIDE, _SIDE


def _three(values: Any) -> list[float]:
    found = [values] * 3 if isinstance(values, int | float) else values
    if not isinstance(found, list) or len(found) != 3:
        return [0.5, 0.5, 0.5]
    return [float(v) for v in found]


def reads_files() -> bool:
    """Whether Pillow is there to read picture files."""
    return importlib.util.find_spec("PIL") is not None


def is_images(path: Path) -> bool:
    """Whether a path is of pictures, and not of text."""
    return path.is_dir() or path.suffix.lower() == ".npy"
