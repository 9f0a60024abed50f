"""Calibration: what goes into each linear layer of a model, found by running it one transformer block at a time.

    texts.py        text -> token sequences
    images.py       pictures, for methods that look at a vision tower
    rotation.py     the same model in a rotated basis, as a Source
    blocks.py       a model of which one block is in memory at a time
    watch.py        sees every matrix product of a block: inputs, their covariance, gradients
    activations.py  what flows between blocks, in memory or on the disk
    survey.py       the original model, once forward and once back: what an error costs, for methods that allocate bits
    engine.py       the walk: statistics, encode, put back, next block
    store.py        what the walk made of each block, on the disk: `--resume` goes on from it
    allocate.py     bits over tensors

The pipeline runs this before it streams tensors into an artifact, where a method asks for it.
"""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Settings:
    """What to calibrate on: a text (None: the bundled one), and how many windows of how many tokens; and where.

    `images` are for methods that look at pictures: a folder, or a .npy file (None: those that scikit-image brings).
    """

    text: Path | None = None
    samples: int = 32
    length: int = 512
    device: str = "auto"
    images: Path | None = None
