"""Which residency `auto` takes on a GPU: a rule over sizes and measured times, nothing else."""

from dataclasses import dataclass

from tcw.units import show_bytes

COMFORT = 0.7  # of free memory; the rest is for activations, the KV cache and everybody else
TIGHT = 0.9


@dataclass(frozen=True)
class Facts:
    """What the choice hangs on: bytes that are free, bytes of the model in each residency, and how products compare.

    `packed` or `huffman` is None where the model cannot be kept so. `faster` of `shapes` kinds of matrices are
    multiplied faster when packed.
    """

    free: int
    bf16: int
    packed: int | None
    huffman: int | None
    faster: int = 0
    shapes: int = 0


@dataclass(frozen=True)
class Choice:
    """A residency, why, and whether layers that lose when packed stay BF16."""

    residency: str
    why: str
    mixed: bool = False


def choose(facts: Facts) -> Choice:
    """Take the fastest residency that fits; where BF16 does not, the largest of the others that does."""
    free = f"{show_bytes(facts.free)} are free"
    if facts.bf16 <= COMFORT * facts.free:
        fits = f"the model takes {show_bytes(facts.bf16)}, {free}"
        if facts.packed is None or not facts.faster:
            return Choice("bf16", f"{fits}, and no product is faster packed" if facts.shapes else fits)
        return Choice("packed", f"{fits}; {facts.faster} of {facts.shapes} kinds of matrices are faster packed", True)
    for name, size in (("packed", facts.packed), ("huffman", facts.huffman)):
        if size is not None and size <= TIGHT * facts.free:
            return Choice(name, f"in BF16 it would take {show_bytes(facts.bf16)}, so {show_bytes(size)}; {free}")
    if facts.huffman is None:
        return Choice("bf16", f"it cannot be kept smaller than {show_bytes(facts.bf16)}; {free}")
    return Choice("offload", f"even coded it would take {show_bytes(facts.huffman)}; {free}")
