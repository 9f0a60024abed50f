"""Where the controls cut: at the language model's input, or before a layer of it."""

from tcw.tokens import INPUT, At, layer

PLACES = ("input", "layer")


def place(at: str, depth: float) -> At:
    """`at` as a place; `depth` counts for "layer" only."""
    return INPUT if at == "input" else layer(depth=depth)


def check_depth(depth: float) -> None:
    """Raise ValueError unless 0 <= depth < 1."""
    if not 0 <= depth < 1:
        raise ValueError(f"`depth` is 0 or more and below 1, got {depth:g}")
