"""Peak memory of a calibrated pass over a deep model: at most one block, its activations, and 1 GiB.

    python benchmarks/calibration_memory.py [--blocks 32] [--method int4] [--samples 8] [--length 256]

The model has Llama's blocks, 6.3 M weights in each, with Gaussian BF16 weights and a tokenizer of bytes, written as a
stream into a temporary folder: with 32 blocks it is 0.4 GB on the disk and 0.8 GB in float32, as calibration computes.
`compress` runs in a process of its own, so that its peak is its own; what importing torch and transformers takes is
part of the 1 GiB, and so are Hessians, which grow with the square of a layer's width. Exit 1 past the bound.
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

HIDDEN, MLP, KV, VOCABULARY = 768, 2048, 256, 256
LAYER = {
    "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (KV, HIDDEN), "self_attn.v_proj": (KV, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (MLP, HIDDEN), "mlp.up_proj": (MLP, HIDDEN),
    "mlp.down_proj": (HIDDEN, MLP), "input_layernorm": (HIDDEN,), "post_attention_layernorm": (HIDDEN,),
}  # fmt: skip


def write_model(folder: Path, blocks: int) -> int:
    """Write config, tokenizer and weights, one tensor at a time; returns the bytes of the weights."""
    infos = [TensorInfo("model.embed_tokens.weight", "BF16", (VOCABULARY, HIDDEN))]
    for n in range(blocks):
        infos += [TensorInfo(f"model.layers.{n}.{name}.weight", "BF16", shape) for name, shape in LAYER.items()]
    infos.append(TensorInfo("model.norm.weight", "BF16", (HIDDEN,)))
    rng = np.random.default_rng(0)
    with StreamWriter(folder / "model.safetensors", header_bound(infos), {"format": "pt"}) as writer:
        for info in infos:
            values = rng.normal(0, 0.02, info.numel) if len(info.shape) > 1 else np.ones(info.numel)
            writer.append(info, (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16))
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": HIDDEN, "intermediate_size": MLP,
        "num_hidden_layers": blocks, "num_attention_heads": 16, "num_key_value_heads": 8, "vocab_size": VOCABULARY,
        "tie_word_embeddings": True, "dtype": "bfloat16", "max_position_embeddings": 2048, "bos_token_id": None,
        "eos_token_id": None,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder)
    return sum(info.nbytes for info in infos)


def write_tokenizer(folder: Path) -> None:
    """A token for each byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


BASE = """
import torch, transformers, numba
from transformers import LlamaForCausalLM
from tcw.memory import peak_memory
print(peak_memory())
"""


def main() -> int:
    """Make the model, compress it, compare the peak with the bound."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--method", default="int4")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        folder.mkdir()
        size = write_model(folder, options.blocks)
        base = int(subprocess.run([sys.executable, "-c", BASE], check=True, capture_output=True, text=True).stdout)
        line = ["compress", folder, "-m", options.method, "--samples", options.samples, "--length", options.length]
        command = [sys.executable, "-m", "tcw", *map(str, line), "-o", f"{scratch}/out", "--json"]
        plan = json.loads(subprocess.run([*command, "--dry-run"], check=True, capture_output=True, text=True).stdout)
        start = time.monotonic()
        report = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        seconds = time.monotonic() - start
    needs, peak = plan["calibration"], report["peak_memory_bytes"]
    activations = needs["bytes_activations"] if needs["where"] == "memory" else 0
    block = 4 * sum(np.prod(shape, dtype=np.int64) for shape in LAYER.values())
    bound = int(block) + activations + (1 << 30)
    print(f"model {size / 1e9:.2f} GB in {options.blocks} blocks, {options.method}, {needs['tokens']:,} tokens")
    print(f"{seconds:.0f} s, {report['bits_per_weight']:.2f} bits a weight")
    print(f"imports {base / 1e6:.0f} MB, a block {block / 1e6:.0f} MB, activations", end=" ")
    print(f"{needs['bytes_activations'] / 1e6:.0f} MB ({needs['where']})")
    print(f"peak {peak / 1e6:.0f} MB, bound {bound / 1e6:.0f} MB")
    return int(peak > bound)


if __name__ == "__main__":
    sys.exit(main())
