"""Decode a `lanes` stream to words or integers."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from tcw.codecs import lanes


def decode(parts: Mapping[str, np.ndarray], params: Mapping[str, Any], numel: int) -> np.ndarray:
    """Decode on the processor: the words of a stream, or its integers where it holds integers. Raises FormatError."""
    if "offset" in params:
        return lanes.decode_integers(parts, params, numel)
    return lanes.decode(parts, params, numel)
