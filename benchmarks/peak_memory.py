"""Peak memory of `tcw compress` on a synthetic model much larger than the bound: 1 GiB + 2 x the largest tensor.

    python benchmarks/peak_memory.py [--gigabytes 8] [--keep FOLDER]

The model has the shapes of Llama-3.1-8B (cut after as many layers as fit) and Gaussian BF16 weights, written as a
stream into a temporary folder. `compress` runs in a process of its own, so that its peak is its own.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from tcw.safetensors_file import StreamWriter, header_bound
from tcw.tensor import TensorInfo

HIDDEN, MLP, VOCABULARY, KV = 4096, 14336, 128256, 1024


def shapes(limit: int) -> list[TensorInfo]:
    """Tensors of Llama-3.1-8B up to `limit` bytes."""
    infos = [TensorInfo("model.embed_tokens.weight", "BF16", (VOCABULARY, HIDDEN))]
    layer = {
        "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (KV, HIDDEN), "self_attn.v_proj": (KV, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (MLP, HIDDEN), "mlp.up_proj": (MLP, HIDDEN),
        "mlp.down_proj": (HIDDEN, MLP),
    }  # fmt: skip
    for n in range(32):
        for name, shape in layer.items():
            infos.append(TensorInfo(f"model.layers.{n}.{name}.weight", "BF16", shape))
            if sum(i.nbytes for i in infos) >= limit:
                return infos
    return infos


def write_model(folder: Path, limit: int) -> list[TensorInfo]:
    """Write config.json and one safetensors file; every tensor is different, none is made whole twice."""
    rng = np.random.default_rng(0)
    pool = (rng.normal(0, 0.02, 1 << 24).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    infos = shapes(limit)
    with StreamWriter(folder / "model.safetensors", header_bound(infos), {"format": "pt"}) as writer:
        for k, info in enumerate(infos):
            repeats = -(-info.numel // pool.size)
            words = np.concatenate([pool ^ np.uint16(r % 128) for r in range(repeats)])[: info.numel]
            words[0] = k  # equal tensors would be stored once
            writer.append(info, words)
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": HIDDEN}
    (folder / "config.json").write_text(json.dumps(config))
    return infos


def main() -> int:
    """Make the model, compress it, compare the peak with the bound; exit 1 past it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=8)
    parser.add_argument("--keep", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.keep or Path(scratch) / "model"
        folder.mkdir(parents=True, exist_ok=True)
        infos = write_model(folder, int(options.gigabytes * 1e9))
        size, largest = sum(i.nbytes for i in infos), max(i.nbytes for i in infos)
        command = [sys.executable, "-m", "tcw", "compress", str(folder), "--recipe", "lossless", "--json"]
        start = time.monotonic()
        run = subprocess.run([*command, "-o", str(Path(scratch) / "out")], check=True, capture_output=True, text=True)
        seconds = time.monotonic() - start
    report = json.loads(run.stdout)
    bound = (1 << 30) + 2 * largest
    print(f"model {size / 1e9:.2f} GB, largest tensor {largest / 1e9:.2f} GB, ratio {report['bytes']['ratio']:.4f}")
    print(f"{seconds:.0f} s, {size / seconds / 1e9:.2f} GB/s with reading, hashing and writing")
    print(f"peak {report['peak_memory_bytes'] / 1e9:.2f} GB, bound {bound / 1e9:.2f} GB")
    return int(report["peak_memory_bytes"] > bound)


if __name__ == "__main__":
    sys.exit(main())
