"""Rotate a model so that its weights are easier to quantise, and leave what it computes as it was.

QuaRot (Ashkboos et al., 2024, https://arxiv.org/abs/2404.00456) and SpinQuant (Liu et al., 2024,
https://arxiv.org/abs/2405.16406). RMSNorm without its weight γ commutes with an orthogonal matrix R₁, so γ moves into
the matrices that follow, and the residual stream may live in another basis:

    embedding      E    ->  E·R₁                            values   W_v  ->  (I ⊗ R₂)ᵀ·W_v·diag(γ)·R₁
    reads          W    ->  W·diag(γ)·R₁                    output   W_o  ->  R₁ᵀ·W_o·(I ⊗ R₂)
    writes         W    ->  R₁ᵀ·W       (biases as well)    norms    γ    ->  1

R₂ turns the values within each head, which attention only weighs and adds, so all heads share it and grouped queries
need no care. Random Hadamard matrices (_hadamard.py) spread the few large weights and activations over all coordinates;
after that a coarse grid wastes less. It is computed in float64 and rounded once, to the dtype that a tensor had. The
output head takes the last γ, so it can no longer be the embedding: a tied model gets a tensor `lm_head.weight` more.

Of the two papers this is what costs nothing at run time: no rotation is learned and none is done online (QuaRot's
Hadamard before `down_proj` and on queries and keys), and the result is an ordinary model for any loader.
"""

import copy
from pathlib import Path
from typing import Any

import numpy as np

from tcw.calibration._hadamard import Rotation
from tcw.calibration._residual import EMBEDDING, HEAD, CannotRotate, Role, layout
from tcw.errors import FormatError, SourceError, UsageError
from tcw.source import Source
from tcw.tensor import TensorData, TensorInfo

__all__ = ["CannotRotate", "RotatedSource", "verify_rotation"]

_KIND = "hadamard"
_CHUNK = 2**20  # weights in float64 at once
_MAX_SEED = 2**63
_LARGEST_CHANGE = 1e-3  # of a logit, as a share of the largest; float32 alone does 1e-5
_TOKENS = 32


class RotatedSource(Source):
    """Another source's model in a rotated basis. It reads one tensor at a time, with the norm that goes into it.

    Attributes:
        source: the model as it was.
        seed: what the signs of the matrices are drawn from.
        rewritten: names of the tensors whose bytes differ from the source's, with those that were added.
        transforms: what `describe` says, after what was done to the source before.
    """

    def __init__(self, source: Source, seed: int = 0, *, single: bool = False) -> None:
        """Take a source, opened. `single` gives what was rewritten in float32, to compare without rounding.

        Raises CannotRotate where rotating would change what the model computes.
        """
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < _MAX_SEED:
            raise UsageError(f"a seed is a whole number from 0 to 2^63 - 1, not `{seed}`")
        infos = dict(source.tensors())
        self.source, self.seed = source, seed
        self.path, self.kind, self.id, self.revision = source.path, source.kind, source.id, source.revision
        self.quantized_by, self.stored = source.quantized_by, source.stored
        if source.quantized_by:
            raise CannotRotate(f"`{source.id}` is already quantised by {source.quantized_by}")
        self._layout = layout(source.config, infos)
        self.config = copy.deepcopy(source.config) | {"tie_word_embeddings": False}
        self._residual = Rotation(self._layout.width, f"{seed} residual")
        self._head = Rotation(self._layout.head, f"{seed} head")
        if self._layout.tied:
            infos[HEAD] = TensorInfo(HEAD, infos[EMBEDDING].dtype, infos[EMBEDDING].shape)
        self._infos = {
            n: TensorInfo(n, "F32", i.shape) if single and n in self._layout.roles else i for n, i in infos.items()
        }
        self.rewritten = source.rewritten | {n for n in self._layout.roles if self._changes(n)}
        self.transforms = (*source.transforms, self.describe())

    @classmethod
    def from_description(cls, source: Source, description: Any) -> "RotatedSource":
        """Rotate a source as another was. Raises FormatError when `description` is none, or not of this model."""
        if not isinstance(description, dict) or description.get("kind") != _KIND:
            raise FormatError("the rotation is of a kind that this tcw does not know", "pip install -U tcw")
        seed = description.get("seed")
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < _MAX_SEED:
            raise FormatError("the rotation has no valid `seed`")
        rotated = cls(source, seed)
        own = rotated.describe()
        if description != own or any(type(v) is not type(own[k]) for k, v in description.items()):
            raise FormatError(f"the rotation that is described is not one of `{source.id}`")
        return rotated

    def describe(self) -> dict[str, Any]:
        """What the manifest keeps: kind and seed, and the sizes of R₁ and R₂."""
        return {"kind": _KIND, "seed": self.seed, "residual": self._layout.width, "head": self._layout.head}

    def tensors(self) -> dict[str, TensorInfo]:
        """The source's tensors in their order; a head that had to be added comes last."""
        return dict(self._infos)

    def read(self, name: str) -> TensorData:
        """Read one tensor and rotate it. Raises SourceError for one that is not finite, before or after."""
        role = self._layout.roles.get(name)
        if role is None:
            return self.source.read(name)
        if role.is_norm:
            info = self._infos[name]
            return TensorData.of_floats(info, np.full(info.shape, 0.0 if self._layout.shifted else 1.0))
        data = self.source.read(EMBEDDING if name == HEAD and self._layout.tied else name)
        return self._rewrite(data, self._infos[name], role)

    def read_stored(self, name: str) -> TensorData:
        """Read one tensor as it stands in the source's files."""
        return self.source.read_stored(name)

    def sample(self, name: str, max_bytes: int) -> TensorData:
        """Up to `max_bytes` of the rotated tensor, rows spread evenly, as a 1-D tensor. All of it is read for that."""
        if name not in self._layout.roles:
            return self.source.sample(name, max_bytes)
        data = self.read(name)
        info, words = data.info, data.words.reshape(data.info.shape[0], -1)
        step = -(-info.nbytes // max(1, max_bytes))
        some = words[::step].reshape(-1)[: max_bytes * 8 // info.bits]
        return TensorData(TensorInfo(name, info.dtype, some.shape), some.view(np.uint8))

    def weight_files(self) -> list[Path]:
        """The source's files."""
        return self.source.weight_files()

    def side_files(self) -> list[Path]:
        """The source's side files. Of these config.json is not this model's: `config` is."""
        return self.source.side_files()

    def check_unchanged(self) -> None:
        """Raise SourceError if a file of the source is not the one that was opened."""
        self.source.check_unchanged()

    def _changes(self, name: str) -> bool:
        """Say whether a tensor with a role gets other bytes: vectors are compared, norms are often one already."""
        info = self._infos[name]
        return len(info.shape) > 1 or not np.array_equal(self.read(name).data, self.source.read(name).data)

    def _rewrite(self, data: TensorData, info: TensorInfo, role: Role) -> TensorData:
        """Rotate a tensor in parts that mix with no other: columns where outputs are mixed, else rows; whole heads."""
        matrix = data.words.reshape(data.info.shape[0], -1)
        out = np.empty(matrix.shape, f"u{info.bits // 8}")
        gamma = self._gamma(role.norm)
        unit = self._layout.head if role.heads else 1
        across = 1 if role.writes else 0
        step = max(1, _CHUNK // matrix.shape[1 - across] // unit) * unit
        for k in range(0, matrix.shape[across], step):
            part = np.s_[:, k : k + step] if across else np.s_[k : k + step]
            values = _floats(data.info.dtype, matrix[part])
            with np.errstate(invalid="ignore", over="ignore"):  # Inf - Inf: `_words` refuses what comes out
                turned = self._turned(values, role, gamma, k)
            out[part] = _words(info, turned)
        return TensorData(info, out.reshape(-1).view(np.uint8))

    def _turned(self, values: np.ndarray, role: Role, gamma: np.ndarray | None, start: int) -> np.ndarray:
        """Rotate a part of a matrix, float64 [rows, columns]; `start` is its first row, or column."""
        if gamma is not None:
            values = values * gamma
        if role.reads:
            values = self._residual.turn(values)
        if role.writes:
            values = self._residual.turn(values.T).T
        if role.heads == "in":
            values = self._in_heads(values)
        if role.heads == "out":
            first = max(0, role.first - start)  # rows before are queries and keys
            values[first:] = self._in_heads(np.ascontiguousarray(values[first:].T)).T
        return values

    def _in_heads(self, values: np.ndarray) -> np.ndarray:
        return self._head.turn(values.reshape(-1, self._layout.head)).reshape(values.shape)

    def _gamma(self, norm: str) -> np.ndarray | None:
        """What a norm multiplies by, float64 [width]."""
        if not norm:
            return None
        return self.source.read(norm).floats().astype(np.float64) + (1.0 if self._layout.shifted else 0.0)


def _floats(dtype: str, words: np.ndarray) -> np.ndarray:
    """Bit patterns [rows, columns] as float64."""
    info = TensorInfo("", dtype, words.shape)
    return TensorData(info, np.ascontiguousarray(words).reshape(-1).view(np.uint8)).floats().astype(np.float64)


def _words(info: TensorInfo, values: np.ndarray) -> np.ndarray:
    """Bit patterns [rows, columns] of what is stored. Raises SourceError where that is not finite."""
    rounded = TensorData.of_floats(TensorInfo(info.name, info.dtype, values.shape), values)
    if not np.isfinite(rounded.floats()).all():
        raise SourceError(
            f"tensor `{info.name}` holds NaN or Inf, or does not fit into {info.dtype} once it is rotated"
        )
    return rounded.words.reshape(values.shape)


def verify_rotation(source: Source, rotated: RotatedSource, *, device: str = "cpu", max_bytes: int = 1 << 31) -> float:
    """Compare the logits of both models on one short sequence, in float32 and before anything is rounded.

    One block is in memory at a time. Of a model whose blocks have more than `max_bytes` in float32, only as many of the
    first ones are run as that allows, at least one, with the last norm and the head behind them.

    Returns:
        The largest difference of a logit, as a share of the largest logit.

    Raises:
        CannotRotate: they differ by more than float32 explains.
    """
    import torch

    width = sum(i.numel * 4 for n, i in source.tensors().items() if n.startswith("model.layers.0."))
    blocks = max(1, max_bytes // max(1, width))
    ids = torch.linspace(0, source.tensors()[EMBEDDING].shape[0] - 1, _TOKENS).long()[None]
    before = _logits(source, ids, blocks, device)
    after = _logits(RotatedSource(rotated.source, rotated.seed, single=True), ids, blocks, device)
    change = float((after - before).abs().max() / before.abs().max())
    if not change <= _LARGEST_CHANGE:
        raise CannotRotate(f"rotated, the logits of `{source.id}` change by {change:.2g} of the largest")
    return change


def _logits(source: Source, ids: Any, blocks: int, device: str) -> Any:
    """Logits of a model of which only the first `blocks` are run."""
    import torch

    from tcw.calibration.blocks import BlockModel

    with torch.no_grad():
        model = BlockModel(source, device)
        (hidden,) = model.enter(ids[None])
        for k in range(min(blocks, len(model.paths))):
            hidden = model.run(k, model.block(k), hidden)
            model.release(k)
        with model.tail() as logits:
            return logits(ids, hidden).float().cpu()
