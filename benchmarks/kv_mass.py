"""How much of the attention to come falls on the tokens that a KV policy keeps. On the CPU.

    python benchmarks/kv_mass.py                                    # the scorers below at a quarter of the tokens
    python benchmarks/kv_mass.py --ratio 0.5 --methods snapkv triattention
    python benchmarks/kv_mass.py --prefix 768 --future 128 --texts 2

The model reads a prefix of a text under a policy, which says which tokens it kept, each layer and head for itself.
Then it reads prefix and what follows without a policy: the attention that the `--future` next tokens pay to the prefix
is the mass, and the share of it that lies on kept tokens is the score; its mean over heads, layers and texts is
printed. The sinks are left out of it: they get most of the attention, and all policies keep them; the column `all`
counts them. `oracle` keeps the tokens that get most of the mass, beside sinks and the newest 32, which all keep: no
policy of the same size can have more. Prefixes are taken from the bundled text to evaluate on, calibration
from the other one. Attention mass is not retrieval: a policy can keep most of it and lose the one fact that is asked
for. Writes results/kv_mass-DATE.json.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch

SINKS, WINDOW = 4, 32
METHODS = (
    "triattention", "triattention:norm=off", "triattention:reduce=max", "snapkv", "pyramidkv", "h2o", "tova",
    "expected-attention", "knorm", "streaming-llm:reindex=off", "lacache:reindex=off", "random",
)  # fmt: skip
RESULTS = Path(__file__).parent / "results"


def windows_of(tokenizer: Any, text: str, count: int, length: int) -> torch.Tensor:
    """int64 [count, length]: windows spread evenly over the text."""
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    starts = torch.linspace(0, len(ids) - length, count).long()
    return torch.stack([ids[s : s + length] for s in starts])


def future_mass(policy: Any, model: Any, ids: torch.Tensor, prefix: int) -> list[torch.Tensor]:
    """Attention that the tokens from `prefix` on pay to those before it: of each layer, float32 [G, prefix]."""
    from tcw.kv.calibrate import Session

    found: dict[int, torch.Tensor] = {}

    def look(layer: Any, call: Any) -> None:
        rows = torch.arange(prefix, call.queries.shape[2])
        found[layer.depth] = sum(call.attention(part)[0, ..., :prefix].sum((1, 2)) for part in rows.split(32))

    Session(model, policy.layers, ids[None]).watch(look)
    return [found[depth] for depth in range(len(policy.layers))]


def share(mass: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """What of `mass` [G, n] lies on the tokens `kept` [G, m], without and with the sinks: [2, G]."""
    rest = mass.clone()
    rest[:, :SINKS] = 0
    return torch.stack([part.gather(1, kept).sum(1) / part.sum(1) for part in (rest, mass)])


def kept_share(policy: Any, model: Any, ids: torch.Tensor, mass: list[torch.Tensor]) -> torch.Tensor:
    """The shares of the mass on what the policy keeps of the prefix, without and with sinks, and of its tokens: [3]."""
    prefix = mass[0].shape[1]
    cache = policy.new_cache(model, track=True)
    with torch.inference_mode():
        model.model(ids[None, :prefix], past_key_values=cache)
    shares = []
    for layer, groups in zip(mass, cache.kept(), strict=True):
        for heads, positions in groups:
            index = positions[0].long().expand(len(heads), -1)
            tokens = torch.full((1, len(heads)), index.shape[1] / prefix)
            shares.append(torch.cat([share(layer[list(heads)], index), tokens]))
    return torch.cat(shares, 1).mean(1)


def oracle_share(mass: list[torch.Tensor], ratio: float) -> torch.Tensor:
    """The same for the best tokens there are, sinks and window among them."""
    count = max(SINKS + WINDOW, round(ratio * mass[0].shape[1]))
    shares = []
    for layer in mass:
        rank = layer.clone()
        rank[:, :SINKS] = rank[:, -WINDOW:] = torch.inf
        shares.append(share(layer, rank.topk(count, dim=1).indices))
    return torch.cat([torch.cat(shares, 1).mean(1), torch.tensor([count / mass[0].shape[1]])])


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine() -> dict[str, Any]:
    """The machine's kind, without its name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    packages = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    return {
        "cpu": names[0] if names else platform.processor(), "cores": cores(), "load": os.getloadavg()[0],
        "python": platform.python_version(), **packages,
    }  # fmt: skip


def main() -> None:
    """Measure, print, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo:smollm2", help="what tcw takes as MODEL")
    parser.add_argument("--methods", nargs="+", default=METHODS, help="SPECs without a budget")
    parser.add_argument("--ratio", type=float, default=0.25, help="share of the tokens to keep")
    parser.add_argument("--prefix", type=int, default=1024)
    parser.add_argument("--future", type=int, default=128)
    parser.add_argument("--texts", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    run(parser.parse_args())


def run(options: argparse.Namespace) -> None:
    """All rows, printed and written as they come."""
    from transformers import AutoTokenizer
    from transformers.utils import logging

    import tcw
    from tcw.data import calibration_text, evaluation_text
    from tcw.kv.policy import Policy

    logging.disable_progress_bar()
    torch.set_num_threads(cores())
    model = tcw.load(options.model, residency="bf16", device="cpu", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tcw.open_model(options.model).path)
    calibration = windows_of(tokenizer, calibration_text(), 16, 512)
    texts = windows_of(tokenizer, evaluation_text(), options.texts, options.prefix + options.future)
    first = Policy.make("knorm", model)
    masses = [future_mass(first, model, ids, options.prefix) for ids in texts]
    rows: list[dict[str, Any]] = []
    report = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(), "machine": machine(), "model": options.model,
        "ratio": options.ratio, "prefix": options.prefix, "future": options.future, "texts": options.texts,
        "sinks": SINKS, "window": WINDOW, "calibration": {"windows": 16, "length": 512}, "rows": rows,
    }  # fmt: skip
    print("| policy                         |  mass |   all | tokens | seconds |\n|---|---|---|---|---|")
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"kv_mass-{report['date']}.json"
    for spec in ("oracle", *options.methods):
        budget = f"{spec}{',' if ':' in spec else ':'}ratio={options.ratio},sinks={SINKS},window={WINDOW}"
        start = time.perf_counter()
        if spec == "oracle":
            each = torch.stack([oracle_share(mass, options.ratio) for mass in masses])
        else:
            policy = Policy.make(budget, model, calibration)
            each = torch.stack([kept_share(policy, model, ids, m) for ids, m in zip(texts, masses, strict=True)])
        seconds, (mass, both, tokens) = time.perf_counter() - start, each.mean(0).tolist()
        rows.append({"spec": spec if spec == "oracle" else budget, "kept_mass": mass, "kept_mass_with_sinks": both,
                     "tokens": tokens, "each": each[:, 0].tolist(), "seconds": seconds})  # fmt: skip
        print(f"| {spec:30} | {mass:.3f} | {both:.3f} | {tokens:.3f}  | {seconds:5.0f}   |", flush=True)
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
