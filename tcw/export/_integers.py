"""Integer weights for other tools' layouts: which grids they can say, and the checked parts of a tensor."""

from typing import Any

import numpy as np

from tcw.artifact import RAW, method_class
from tcw.errors import FormatError
from tcw.tensor import TensorInfo
from tcw.weights import Encoded
from tcw.weights._integer import GRIDS, SCALE_TYPES, Grid, IntegerMethod, open_parts


def made_by(method: str) -> bool:
    """Say whether a method stores integers of this form."""
    return method != RAW and issubclass(method_class(method), IntegerMethod)


def grid_of(info: TensorInfo, params: dict[str, Any]) -> Grid:
    """The grid of a stored tensor, before its parts are read. Raises FormatError for parameters that make no sense."""
    bits, kind, group, scale = (params.get(key) for key in ("bits", "grid", "group_size", "scale"))
    sizes = type(bits) is int and type(group) is int and 1 <= bits <= 8 and 0 <= group < 1 << 31
    if not sizes or kind not in GRIDS or scale not in SCALE_TYPES or len(info.shape) != 2 or not info.numel:
        raise FormatError(f"tensor `{info.name}` has no integers that tcw knows: {params}")
    return Grid(bits, kind, group, scale)  # type: ignore[arg-type]


def parts_of(info: TensorInfo, encoded: Encoded, grid: Grid) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes as they are packed, int32; scales as they are stored; zeros, uint8 [out, groups]. Raises FormatError.

    The grid must have an integer zero.
    """
    stored = open_parts(info, encoded, (grid.bits,))
    return stored.codes, encoded.parts["scale"], stored.fit.zero.astype(np.uint8)


def unfit(grid: Grid, width: int) -> str:
    """Why formats with integer zeros and even groups cannot hold a weight of rows of `width`; "" when they can."""
    if grid.kind in ("midrise", "float"):
        return f"the grid `{grid.kind}` has no integer zero (`grid=zero` has one)"
    if width % grid.span(width):
        return f"groups of {grid.span(width)} do not divide rows of {width} (a `group_size` that does, or 0, would go)"
    return ""
