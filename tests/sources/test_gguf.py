"""GGUF files: equal to what transformers makes of them, converted once, and hostile files refused."""

import json
import struct
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from tokenizers.pre_tokenizers import ByteLevel

from tcw.errors import FormatError, MissingDependency, ResourceError, SourceError, TcwError
from tcw.events import Progress
from tcw.gguf_file import read_gguf
from tcw.source import open_source
from tcw.sources import gguf as converter

HIDDEN, HEADS, KV, INNER, VOCAB, LAYERS = 64, 4, 2, 96, 258, 2
TYPES = gguf.GGMLQuantizationType
MIXED = [TYPES.Q4_0, TYPES.Q8_0, TYPES.F16, TYPES.BF16, TYPES.Q4_1, TYPES.F32, TYPES.Q5_0]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TCW_CACHE", str(tmp_path / "cache"))


def shapes(tied: bool) -> dict[str, tuple[int, ...]]:
    narrow = (HIDDEN * KV // HEADS, HIDDEN)
    found = {"token_embd.weight": (VOCAB, HIDDEN), "output_norm.weight": (HIDDEN,)}
    for i in range(LAYERS):
        found |= {
            f"blk.{i}.attn_norm.weight": (HIDDEN,), f"blk.{i}.ffn_norm.weight": (HIDDEN,),
            f"blk.{i}.attn_q.weight": (HIDDEN, HIDDEN), f"blk.{i}.attn_output.weight": (HIDDEN, HIDDEN),
            f"blk.{i}.attn_k.weight": narrow, f"blk.{i}.attn_v.weight": narrow,
            f"blk.{i}.ffn_gate.weight": (INNER, HIDDEN), f"blk.{i}.ffn_up.weight": (INNER, HIDDEN),
            f"blk.{i}.ffn_down.weight": (HIDDEN, INNER),
        }  # fmt: skip
    return found if tied else {**found, "output.weight": (VOCAB, HIDDEN)}


def experts(count: int = 4, inner: int = 768) -> dict[str, tuple[int, ...]]:
    """The same with a mixture of experts and normed heads, as Qwen3-MoE has them."""
    found = {n: s for n, s in shapes(True).items() if "ffn_" not in n or "norm" in n}
    for i in range(LAYERS):
        found |= {
            f"blk.{i}.ffn_gate_inp.weight": (count, HIDDEN), f"blk.{i}.ffn_gate_exps.weight": (count, inner, HIDDEN),
            f"blk.{i}.ffn_down_exps.weight": (count, HIDDEN, inner),
            f"blk.{i}.ffn_up_exps.weight": (count, inner, HIDDEN),
            f"blk.{i}.attn_q_norm.weight": (16,), f"blk.{i}.attn_k_norm.weight": (16,),
        }  # fmt: skip
    return found


def tiny(
    path: Path,
    tensors: dict | None = None,
    arch: str = "llama",
    extra: dict[str, int] | None = None,
    blocks: int = LAYERS,
) -> Path:
    """A random model, every kind of block among its tensors, with a byte-level vocabulary."""
    rng = np.random.default_rng(7)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(blocks)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV)
    writer.add_key_length(HIDDEN // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(50_000.0)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*sorted(ByteLevel.alphabet()), "ab", "abc"])
    writer.add_token_merges(["a b", "ab c"])
    writer.add_token_types([1] * VOCAB)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for name, value in (extra or {}).items():
        writer.add_uint32(name, value)
    for k, (name, shape) in enumerate((shapes(True) if tensors is None else tensors).items()):
        values = rng.standard_normal(shape, dtype=np.float32)
        kind = TYPES.F32 if len(shape) == 1 else MIXED[k % len(MIXED)]
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


MODELS: dict[str, tuple[str, dict, dict]] = {
    "tied": ("llama", shapes(True), {}),
    "untied": ("llama", shapes(False), {}),
    "unused tensors": ("llama", {**shapes(True), "rope_freqs.weight": (8,)}, {}),
    "offset norms": ("gemma2", shapes(True) | {
        f"blk.{i}.post_{n}_norm.weight": (HIDDEN,) for i in range(LAYERS) for n in ("attention", "ffw")}, {}),
    "experts": ("qwen3moe", experts(), {"qwen3moe.expert_count": 4, "qwen3moe.expert_used_count": 2}),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_equals_what_transformers_loads(tmp_path: Path, name: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    arch, tensors, extra = MODELS[name]
    path = tiny(tmp_path / "tiny.gguf", tensors, arch, extra)
    theirs = AutoModelForCausalLM.from_pretrained(
        str(tmp_path), gguf_file=path.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    source = open_source(path)
    assert (source.kind, source.id) == ("gguf", "tiny.gguf")
    assert ("lm_head.weight" in source.tensors()) is ("output.weight" in tensors)
    expected = theirs.state_dict()
    assert set(source.tensors()) | {"lm_head.weight"} == set(expected)
    for key, info in source.tensors().items():
        assert (info.dtype, info.shape) == ("BF16", tuple(expected[key].shape))
        assert source.read(key).data.tobytes() == expected[key].contiguous().view(torch.int16).numpy().tobytes(), key
    ours = AutoModelForCausalLM.from_pretrained(source.path, dtype="auto")
    assert ours.dtype == torch.bfloat16
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)


def test_tensors_left_out_are_said(tmp_path: Path) -> None:
    events: list[Progress] = []
    open_source(tiny(tmp_path / "x.gguf", {**shapes(True), "rope_freqs.weight": (8,)}), progress=events.append)
    assert "rope_freqs.weight" in events[-1].note


def test_config_and_tokenizer(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    source = open_source(tiny(tmp_path / "tiny.gguf"))
    assert source.config["rope_parameters"]["rope_theta"] == 50_000
    assert source.config["rope_theta"] == 50_000, "transformers 4 reads this one"
    assert source.config["dtype"] == source.config["torch_dtype"] == "bfloat16"
    assert source.config["architectures"] == ["LlamaForCausalLM"]
    assert "_name_or_path" not in source.config
    assert AutoConfig.from_pretrained(source.path).rope_parameters["rope_theta"] == 50_000
    assert {"config.json", "tokenizer.json", "generation_config.json"} <= {p.name for p in source.side_files()}
    theirs = AutoTokenizer.from_pretrained(str(tmp_path), gguf_file="tiny.gguf")
    assert AutoTokenizer.from_pretrained(source.path).get_vocab() == theirs.get_vocab()


def test_a_file_is_converted_once(tmp_path: Path) -> None:
    path, events = tiny(tmp_path / "tiny.gguf"), list[Progress]()
    first = open_source(path, progress=events.append)
    assert events[-1].done == events[-1].total == len(read_gguf(path).tensors)
    events.clear()
    assert open_source(path, progress=events.append).path == first.path
    assert events == []
    path.write_bytes(path.read_bytes() + b"\0")
    assert open_source(path, progress=events.append).path != first.path
    assert events


def test_two_at_once_do_not_collide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, real = tiny(tmp_path / "tiny.gguf"), converter._convert
    other: list[Path] = []

    def slow(*args: Any) -> None:
        real(*args)
        if not other:
            other.append(Path())
            other[0] = open_source(path).path  # meanwhile, somebody else is quicker

    monkeypatch.setattr(converter, "_convert", slow)
    assert open_source(path).path == other[0]
    assert [p.name for p in (tmp_path / "cache" / "gguf").iterdir()] == [other[0].name]


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny(tmp_path / "tiny.gguf")

    def full(self: Any, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("tcw.safetensors_file.StreamWriter._write", full)
        with pytest.raises(ResourceError, match="no space left"):
            open_source(path)
    assert list((tmp_path / "cache" / "gguf").iterdir()) == []
    assert open_source(path).tensors()


def test_dead_conversions_are_swept_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny(tmp_path / "tiny.gguf")
    name = f"tiny-{converter._fingerprint(path)}"
    for left in (f"{name}.dead.partial", f"{name}.alive.partial", "other-1.x.partial"):
        (tmp_path / "cache" / "gguf" / left).mkdir(parents=True)
    import os

    os.utime(tmp_path / "cache" / "gguf" / f"{name}.dead.partial", (1, 1))
    open_source(path)
    assert sorted(p.name for p in (tmp_path / "cache" / "gguf").iterdir()) == [
        "other-1.x.partial", name, f"{name}.alive.partial",
    ]  # fmt: skip


def test_a_damaged_cache_says_what_to_remove(tmp_path: Path) -> None:
    path = tiny(tmp_path / "tiny.gguf")
    weights = open_source(path).path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(FormatError) as caught:
        open_source(path)
    assert caught.value.hint.startswith(f"remove `{weights.parent}`")


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    tensors = {n: s for n, s in shapes(True).items() if n != "blk.1.ffn_up.weight"}
    with pytest.raises(FormatError, match=r"no tensor for `model\.layers\.1\.mlp\.up_proj\.weight`"):
        open_source(tiny(tmp_path / "tiny.gguf", tensors))


@pytest.mark.parametrize(("tensor", "shape", "words"), [
    ("blk.0.ffn_up.weight", (64, 64), r"where the model has \[96, 64\]"),
    ("blk.0.attn_q.weight", (36, 32), "does not fit its config|where the model has"),
    ("blk.0.attn_k.weight", (1, 64), "does not fit its config|where the model has"),
    ("token_embd.weight", (300, 64), "where the model has"),
])  # fmt: skip
def test_tensors_that_do_not_fit_the_config(tmp_path: Path, tensor: str, shape: tuple[int, ...], words: str) -> None:
    with pytest.raises(FormatError, match=words):
        open_source(tiny(tmp_path / "tiny.gguf", {**shapes(True), tensor: shape}))


def test_a_lie_about_blocks_builds_nothing(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="declares 2000000000 blocks but holds"):
        open_source(tiny(tmp_path / "x.gguf", blocks=2_000_000_000))


def test_what_transformers_does_not_know(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"cannot convert `x\.gguf` \(architecture `rwkv6`\)"):
        open_source(tiny(tmp_path / "x.gguf", arch="rwkv6"))


def test_split_files(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="split GGUF") as caught:
        open_source(tiny(tmp_path / "x.gguf", extra={"split.count": 3}))
    assert "--merge" in caught.value.hint


def test_a_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny(tmp_path / "x.gguf")
    monkeypatch.setitem(sys.modules, "gguf.constants", None)
    with pytest.raises(MissingDependency, match="`gguf`"):
        open_source(path)


# ---- headers


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def raw(keys: list[bytes] = [], tensors: list[bytes] = [], data: bytes = b"", **over: int) -> bytes:  # noqa: B006
    counts = (over.get("version", 3), over.get("tensor_count", len(tensors)), over.get("key_count", len(keys)))
    head = b"GGUF" + struct.pack("<IQQ", *counts) + b"".join(keys) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + data


def tensor(
    name: str = "t", dims: tuple[int, ...] = (4,), kind: int = 0, offset: int = 0, rank: int | None = None
) -> bytes:
    count = len(dims) if rank is None else rank
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", count, *dims, kind, offset)


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


HUGE = struct.pack("<Q", 2**62)
ATTACKS = {
    "no magic": (b"GGML" + bytes(20), "not a GGUF file"),
    "empty": (b"", "not a GGUF file"),
    "only magic": (b"GGUF", "middle of its header"),
    "version 1": (raw(version=1), "GGUF version 1"),
    "big endian": (raw(version=0x03000000), "big-endian"),
    "2^63 keys": (raw(key_count=2**63), "middle of its header"),
    "2^63 tensors": (raw(tensor_count=2**63), "middle of its header"),
    "a huge text": (raw([HUGE]) + bytes(99), "a text of"),
    "a text past the end": (raw([struct.pack("<Q", 5000)]) + bytes(99), "middle of its header"),
    "not utf-8": (raw([struct.pack("<Q", 2) + b"\xff\xfe" + bytes(99)]), "not UTF-8"),
    "a huge array": (raw([key("a", 9, struct.pack("<I", 4) + HUGE)]), "middle of its header"),
    "a huge array of bytes": (raw([key("a", 9, struct.pack("<I", 0) + HUGE)]), "middle of its header"),
    "a huge array of texts": (raw([key("a", 9, struct.pack("<I", 8) + HUGE)]), "middle of its header"),
    "an array of arrays": (raw([key("a", 9, struct.pack("<IQ", 9, 1) + bytes(64))]), "unknown type 9"),
    "an unknown type": (raw([key("a", 77, bytes(64))]), "unknown type 77"),
    "a key twice": (raw([key("a", 0, b"\0")] * 2), "`a` twice"),
    "alignment 0": (raw([key("general.alignment", 4, bytes(4))]), "impossible alignment"),
    "alignment 3": (raw([key("general.alignment", 4, b"\3\0\0\0")]), "impossible alignment"),
    "alignment a text": (raw([key("general.alignment", 8, text("x"))]), "impossible alignment"),
    "too many dimensions": (raw(tensor_count=1)[:24] + tensor(rank=2**31) + bytes(64), "2147483648 dimensions"),
    "an unknown ggml type": (raw([], [tensor(kind=999)], bytes(16)), "unknown type 999"),
    "a product past 2^64": (raw([], [tensor(dims=(2**40, 2**40))], bytes(16)), "impossible shape"),
    "past the end": (raw([], [tensor(dims=(5,))], bytes(16)), "ends before tensor `t`"),
    "offset past the end": (raw([], [tensor(offset=2**63)], bytes(16)), "ends before tensor `t`"),
    "half a block": (raw([], [tensor(dims=(33,), kind=8)], bytes(99)), "no whole number of Q8_0 blocks"),
    "a tensor twice": (raw([], [tensor(), tensor(offset=32)], bytes(99)), "tensor `t` twice"),
    "overlap": (raw([], [tensor("a"), tensor("b", offset=8)], bytes(99)), "overlap"),
    "no name": (raw([], [tensor("")], bytes(99)), "without a name"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_hostile_headers_are_refused(tmp_path: Path, name: str) -> None:
    content, words = ATTACKS[name]
    (tmp_path / "evil.gguf").write_bytes(content)
    with pytest.raises(FormatError) as caught:
        open_source(tmp_path / "evil.gguf")
    assert words in caught.value.message
    assert "`evil.gguf`" in caught.value.message
    assert not (tmp_path / "cache").exists()


def test_the_good_neighbour_of_the_attacks_is_read(tmp_path: Path) -> None:
    array = key("list", 9, struct.pack("<IQ", 8, 2) + text("x") + text("yy"))
    keys = [array, key("general.architecture", 8, text("llama"))]
    content = raw(keys, [tensor("a"), tensor("b", (32, 2), 8, 32)], bytes(100))
    (tmp_path / "x.gguf").write_bytes(content)
    header = read_gguf(tmp_path / "x.gguf")
    assert header.architecture == "llama"
    assert header.metadata["list"] == 2
    a, b = header.tensors.values()
    assert (a.shape, a.type, a.end - a.start) == ((4,), "F32", 16)
    assert (b.shape, b.type, b.end - b.start) == ((2, 32), "Q8_0", 68)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    whole = tiny(tmp_path / "tiny.gguf").read_bytes()
    last = max(t.end for t in read_gguf(tmp_path / "tiny.gguf").tensors.values())
    for size in [*range(0, 400, 7), *range(400, last, 4001), last - 1]:
        (tmp_path / "cut.gguf").write_bytes(whole[:size])
        with pytest.raises(TcwError, match=r"`cut\.gguf`"):
            read_gguf(tmp_path / "cut.gguf")


def test_the_header_agrees_with_the_gguf_package(tmp_path: Path) -> None:
    path = tiny(tmp_path / "tiny.gguf", experts())
    ours, theirs = read_gguf(path), gguf.GGUFReader(path)
    assert {t.name: (t.data_offset, t.n_bytes, t.tensor_type.name) for t in theirs.tensors} == {
        t.name: (t.start, t.end - t.start, t.type) for t in ours.tensors.values()
    }
    assert ours.metadata["tokenizer.ggml.tokens"] == VOCAB


def test_the_demo_model(smollm2: Path) -> None:
    """SmolLM2 out of its package: the sizes that the model card states, tied weights once, a chat template."""
    config = json.loads((smollm2 / "config.json").read_text())
    source = open_source(smollm2)
    assert (config["num_hidden_layers"], config["hidden_size"], config["vocab_size"]) == (30, 576, 49152)
    assert sum(i.numel for i in source.tensors().values()) == 134_515_008
    assert {i.dtype for i in source.tensors().values()} == {"BF16"}
    assert "lm_head.weight" not in source.tensors()
    assert "<|im_start|>" in (smollm2 / "chat_template.jinja").read_text()
