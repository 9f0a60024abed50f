"""RoPE, read from the model itself: its frequencies, its layout, and rotations there and back.

A key x at position p is stored as s·e^{i p ω_f}·x̃_f for each band f, x̃_f being a pair of its elements taken as a
complex number. Su et al., RoFormer, 2021, https://arxiv.org/abs/2104.09864. Angles are computed in float32 as
transformers does it, so that `undo` takes back what the model did.
"""

import inspect
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FIXED = ("default", "linear", "llama3", "yarn", "proportional")  # frequencies do not depend on the length of the text
_PROBE = 5  # positions
_NEAR = 1e-3


@dataclass(frozen=True, eq=False)
class Rope:
    """The rotation of one kind of layer.

    Attributes:
        inv_freq: float32 [d], ω_f; 2·d elements of a head are rotated, the others pass.
        scaling: what cos and sin are multiplied with (YaRN).
        interleaved: a band is elements (2f, 2f+1); otherwise (f, f+d).
    """

    inv_freq: Tensor
    scaling: float = 1.0
    interleaved: bool = False

    def to(self, device: torch.device) -> "Rope":
        """The same on another device."""
        return Rope(self.inv_freq.to(device), self.scaling, self.interleaved)

    @property
    def rotary_dim(self) -> int:
        """Elements of a head that are rotated."""
        return 2 * len(self.inv_freq)

    def bands(self, x: Tensor) -> Tensor:
        """The rotated elements of x [..., D] as complex numbers, complex64 [..., d]."""
        part = x[..., : self.rotary_dim].float()
        pairs = part.unflatten(-1, (-1, 2)) if self.interleaved else part.unflatten(-1, (2, -1)).transpose(-1, -2)
        return torch.view_as_complex(pairs.contiguous())

    def unbands(self, z: Tensor) -> Tensor:
        """The opposite of `bands`: float32 [..., 2d]."""
        pairs = torch.view_as_real(z)
        return pairs.flatten(-2) if self.interleaved else pairs.transpose(-1, -2).flatten(-2)

    def angles(self, positions: Tensor) -> Tensor:
        """p·ω_f: float32 [..., d]."""
        return positions[..., None].float() * self.inv_freq.to(positions.device)

    def turn(self, x: Tensor, by: Tensor) -> Tensor:
        """Move x [..., D] by `by` [...] positions: what was rotated for p becomes rotated for p + by."""
        angles = self.angles(by)
        turned = self.unbands(self.bands(x) * torch.polar(torch.ones_like(angles), angles))
        return torch.cat([turned.to(x.dtype), x[..., self.rotary_dim :]], -1)

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """What the model makes of x [..., D] before RoPE at `positions` [...]."""
        turned = self.turn(x, positions)
        if self.scaling == 1.0:
            return turned
        return torch.cat([turned[..., : self.rotary_dim] * self.scaling, turned[..., self.rotary_dim :]], -1)

    def undo(self, x: Tensor, positions: Tensor) -> Tensor:
        """The opposite of `rotate`: float32, as 16 bits would lose what rotations must not."""
        turned = self.turn(x.float(), -positions)
        if self.scaling == 1.0:
            return turned
        return torch.cat([turned[..., : self.rotary_dim] / self.scaling, turned[..., self.rotary_dim :]], -1)

    def facts(self) -> dict[str, Any]:
        """What must agree for statistics of one model to be used with another."""
        return {
            "inv_freq": [round(w, 9) for w in self.inv_freq.tolist()],
            "scaling": self.scaling, "interleaved": self.interleaved,
        }  # fmt: skip


def read_rope(attention: torch.nn.Module, model: torch.nn.Module, kind: str = "full_attention") -> Rope | None:
    """Find how an attention module rotates, and check that against the function it calls.

    Args:
        attention: the module that computes attention, of a layer of `kind`.
        model: the decoder it belongs to: its rotary embedding is looked for there.
        kind: the layer's type in transformers' words; some models rotate each type in its own way.

    Returns:
        The rotation; None if there is none, it could not be recognised, or its frequencies change with the length of
        the text: then a key cannot be rotated again later.
    """
    apply = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
    for embedding in model.modules():
        for prefix in (f"{kind}_", ""):
            inv_freq = getattr(embedding, f"{prefix}inv_freq", None)
            if isinstance(inv_freq, Tensor) and apply is not None:
                kinds = getattr(embedding, "rope_type", "default")
                if (kinds.get(kind, "default") if isinstance(kinds, dict) else kinds) not in FIXED:
                    return None
                scaling = float(getattr(embedding, f"{prefix}attention_scaling", 1.0) or 1.0)
                return _recognise(embedding, apply, inv_freq.detach().float().cpu(), scaling, kind if prefix else None)
    return None


@torch.no_grad()
def _recognise(
    embedding: torch.nn.Module, apply: Any, inv_freq: Tensor, scaling: float, kind: str | None
) -> Rope | None:
    """Rotate a probe with the model's own code; return the layout that does the same."""
    x = torch.randn(1, 1, _PROBE, 2 * len(inv_freq), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(_PROBE)[None] * 7
    device = next((b.device for b in embedding.buffers()), torch.device("cpu"))
    arguments = {"layer_type": kind} if kind and "layer_type" in inspect.signature(embedding.forward).parameters else {}
    try:
        cos, sin = embedding(x.to(device), positions.to(device), **arguments)
        theirs = apply(x.to(device), x.to(device), cos, sin)[0].cpu()
    except (TypeError, ValueError, RuntimeError):
        return None
    for interleaved in (False, True):
        rope = Rope(inv_freq, scaling, interleaved)
        if torch.allclose(rope.rotate(x, positions[:, None]), theirs, atol=_NEAR):
            return rope
    return None
