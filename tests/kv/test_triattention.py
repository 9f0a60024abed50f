import math

import pytest
import torch

from tcw.errors import UsageError
from tcw.kv import AttentionCall, Group, LayerShape, Memory, Room
from tcw.kv.rope import Rope
from tcw.kv.triattention import TriAttention
from tcw.methods import build

OFFSETS = [2**i for i in range(17)]


def layer(heads=4, kv_heads=2, dim=16, rotary=16, scaling=1.0, interleaved=False, index=3):
    rope = Rope(10000.0 ** (-torch.arange(0, rotary, 2).float() / rotary), scaling, interleaved)
    return LayerShape(index, 1, 5, heads, kv_heads, dim, dim, torch.float32, rope)


def pairs(rope, x):
    """The bands of one head's vector, as Python complex numbers, by the definition of the layout."""
    d = len(rope.inv_freq)
    x = [float(v) for v in x]
    return [complex(x[2 * f], x[2 * f + 1]) if rope.interleaved else complex(x[f], x[f + d]) for f in range(d)]


def reference(shape, centre, size, keys, key_positions, newest, offsets, reduce="mean", norm=True):
    """The paper's series, with keys before RoPE and their positions, for one query head: a score a key."""
    rope, d = shape.rope, len(shape.rope.inv_freq)
    omega = [float(w) for w in rope.inv_freq]
    c = pairs(rope, centre)
    scores = []
    for key, position in zip(keys, key_positions, strict=True):
        k = pairs(rope, key)
        series = []
        for offset in offsets:
            total = 0.0
            for f in range(d):
                phase = math.atan2((c[f] * k[f].conjugate()).imag, (c[f] * k[f].conjugate()).real)
                far = newest - position + offset
                total += rope.scaling**2 * abs(c[f]) * abs(k[f]) * math.cos(far * omega[f] + phase)
            series.append(total)
        score = max(series) if reduce == "max" else sum(series) / len(series)
        score += sum(float(centre[e]) * float(key[e]) for e in range(2 * d, len(key)))
        if norm:
            score += rope.scaling**2 * sum((float(size[f]) - abs(c[f])) * abs(k[f]) for f in range(d))
        scores.append(score)
    return scores


def standardised(scores, candidates):
    mean = sum(scores[j] for j in candidates) / len(candidates)
    spread = math.sqrt(sum((scores[j] - mean) ** 2 for j in candidates) / len(candidates))
    return [(s - mean) / spread for s in scores]


def statistics(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centre = torch.randn(shape.heads, shape.head_dim, generator=generator)
    size = shape.rope.bands(centre).abs() + torch.rand(shape.heads, shape.rope.rotary_dim // 2, generator=generator)
    return {f"{shape.index}.centre": centre, f"{shape.index}.size": size}


def call_of(shape, plain, key_positions, positions, real=None, dtype=torch.float32):
    """A call whose keys are `plain` [B, G, n, D] rotated to `key_positions` [B, n]."""
    keys = shape.rope.rotate(plain, key_positions[:, None]).to(dtype)
    queries = torch.zeros(plain.shape[0], shape.heads, positions.shape[1], shape.head_dim, dtype=dtype)
    return AttentionCall(queries, keys, keys, real, positions, shape.head_dim**-0.5, None, 0)


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({}, {}),
        ({"interleaved": True}, {}),
        ({"scaling": 1.3}, {}),
        ({"dim": 24, "rotary": 16}, {}),
        ({}, {"reduce": "max"}),
        ({}, {"norm": False}),
        ({}, {"offsets": 100}),
        ({"heads": 6, "kv_heads": 2}, {}),
        ({"heads": 2, "kv_heads": 2}, {"offsets": 1}),
    ],
)
def test_score_is_the_series_over_keys_before_rope(changes, options):
    shape = layer(**changes)
    tensors = statistics(shape)
    n, newest, room = 23, 61, Room(2, 19, 5)
    plain = torch.randn(2, shape.kv_heads, n, shape.head_dim, generator=torch.Generator().manual_seed(1))
    key_positions = torch.stack([torch.randperm(60)[:n].sort().values for _ in range(2)])
    call = call_of(shape, plain, key_positions, torch.tensor([[newest], [newest + 7]]))
    scorer = TriAttention(**options).scorer(shape, Group(tuple(range(shape.kv_heads))), tensors)
    found = scorer.score(call, Memory(), room)
    assert found.dtype == torch.float32
    assert found.shape == (2, shape.kv_heads, n)
    offsets = [o for o in OFFSETS if o <= options.get("offsets", 65536)]
    shared = shape.heads // shape.kv_heads
    for row in range(2):
        for g in range(shape.kv_heads):
            heads = []
            for h in range(g * shared, (g + 1) * shared):
                scores = reference(
                    shape, tensors["3.centre"][h], tensors["3.size"][h], plain[row, g], key_positions[row].tolist(),
                    newest + 7 * row, offsets, options.get("reduce", "mean"), options.get("norm", True),
                )  # fmt: skip
                heads.append(standardised(scores, range(room.first, room.end)))
            expected = torch.tensor(heads, dtype=torch.float64).amax(0)
            torch.testing.assert_close(found[row, g].double(), expected, atol=2e-2, rtol=0)
            assert found[row, g].argmax() == expected.argmax()


def test_far_offsets_keep_their_phase():
    """With one offset the angle is exact, so the bound can be tight: nothing of the series is lost in float32."""
    shape = layer()
    tensors = statistics(shape)
    plain = torch.randn(1, 2, 9, 16, generator=torch.Generator().manual_seed(2))
    call = call_of(shape, plain, torch.arange(9)[None], torch.tensor([[8]]))
    found = TriAttention(offsets=1).scorer(shape, Group((0, 1)), tensors).score(call, Memory(), Room(0, 9, 3))
    heads = [
        standardised(
            reference(shape, tensors["3.centre"][h], tensors["3.size"][h], plain[0, 1], range(9), 8, [1]), range(9)
        )
        for h in (2, 3)
    ]
    torch.testing.assert_close(
        found[0, 1].double(), torch.tensor(heads, dtype=torch.float64).amax(0), atol=1e-4, rtol=0
    )


def test_a_group_of_heads_uses_its_own_statistics():
    shape = layer(heads=8, kv_heads=4)
    tensors = statistics(shape)
    plain = torch.randn(1, 4, 12, 16)
    call = call_of(shape, plain, torch.arange(12)[None], torch.tensor([[11]]))
    room = Room(0, 10, 4)
    whole = TriAttention().scorer(shape, Group((0, 1, 2, 3)), tensors).score(call, Memory(), room)
    part = AttentionCall(
        call.queries[:, [2, 3, 6, 7]], call.keys[:, [1, 3]], call.values[:, [1, 3]], None, call.positions, 0.25, None, 0
    )
    found = TriAttention().scorer(shape, Group((1, 3)), tensors).score(part, Memory(), room)
    torch.testing.assert_close(found, whole[:, [1, 3]])


@pytest.mark.parametrize("padding", [1, 4, 9])
def test_padding_changes_no_score(padding):
    """A left-padded row scores as it would alone: padding is in no mean, and the newest position is the row's own."""
    shape = layer()
    tensors = statistics(shape)
    plain = torch.randn(1, 2, 12, 16)
    alone = call_of(shape, plain, torch.arange(12)[None], torch.arange(12)[None])
    scorer = TriAttention().scorer(shape, Group((0, 1)), tensors)
    expected = scorer.score(alone, Memory(), Room(2, 10, 3))
    n = 12 + padding
    padded = torch.cat([1e3 * torch.randn(1, 2, padding, 16), plain], 2)
    at = (torch.arange(n) - padding).clamp(min=1)[None]
    at[:, padding:] = torch.arange(12)
    real = (torch.arange(n) >= padding)[None, None]
    call = call_of(shape, torch.cat([padded, torch.randn(1, 2, n, 16)]), at.expand(2, -1), at.expand(2, -1).clone(),
                   torch.cat([real, torch.ones_like(real)]))  # fmt: skip
    call.positions[1] = torch.arange(n)
    # the row's sinks are 2 real tokens after its padding
    found = scorer.score(call, Memory(), Room(2 + padding, 10 + padding, 3))
    torch.testing.assert_close(found[:1, :, padding:], expected, atol=1e-4, rtol=1e-4)
    inside = scorer.score(call, Memory(), Room(0, 10 + padding, 3))
    whole = scorer.score(alone, Memory(), Room(0, 10, 3))
    torch.testing.assert_close(inside[:1, :, padding:], whole, atol=1e-4, rtol=1e-4)


def test_right_padding_does_not_move_the_newest_position():
    shape = layer()
    tensors = statistics(shape)
    plain = torch.randn(1, 2, 12, 16)
    positions = torch.arange(12)[None]
    alone = call_of(shape, plain[:, :, :9], positions[:, :9], positions[:, :9])
    real = (torch.arange(12) < 9)[None, None]
    padded = call_of(shape, plain, positions, positions, real)
    scorer = TriAttention().scorer(shape, Group((0, 1)), tensors)
    room = Room(0, 8, 3)
    torch.testing.assert_close(
        scorer.score(padded, Memory(), room)[..., :9], scorer.score(alone, Memory(), room), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_scores_are_finite(dtype, value):
    shape = layer()
    plain = torch.full((2, 2, 6, 16), value)
    call = call_of(shape, plain, torch.zeros(2, 6, dtype=torch.long), torch.full((2, 1), 100_000), dtype=dtype)
    real = torch.tensor([[[False] * 6], [[True] * 6]])
    for there in (None, real):
        call.real = there
        found = TriAttention().scorer(shape, Group((0, 1)), statistics(shape)).score(call, Memory(), Room(0, 5, 1))
        assert found.dtype == torch.float32
        assert torch.isfinite(found).all()
        torch.testing.assert_close(found[0, :, 0], found[0, :, 1])


def test_runs_where_there_are_only_shapes():
    shape = layer()
    method = TriAttention()
    outline = method.outline((shape,))
    assert {k: v.shape for k, v in outline.items()} == {k: v.shape for k, v in statistics(shape).items()}
    meta = torch.device("meta")
    bare = LayerShape(**{**vars(shape), "rope": shape.rope.to(meta)})
    keys = torch.empty(2, 2, 50, 16, device=meta)
    positions = torch.empty(1, 50, dtype=torch.long, device=meta)
    call = AttentionCall(torch.empty(2, 4, 50, 16, device=meta), keys, keys, None, positions, 1.0, None, 0)
    tensors = {k: v.to(meta) for k, v in outline.items()}
    assert method.scorer(bare, Group((0, 1)), tensors).score(call, Memory(), Room(4, 40, 9)).shape == (2, 2, 50)


class Fake:
    """A session whose queries are known before RoPE."""

    def __init__(self, layers, plain, positions):
        self.layers, self.plain, self.positions = layers, plain, positions

    def watch(self, look, tokens=None):
        for plain, positions in zip(self.plain, self.positions, strict=True):
            for shape in self.layers:
                queries = shape.rope.rotate(plain, positions[:, None])
                look(shape, AttentionCall(queries, queries, queries, None, positions, 1.0, None, 0))


@pytest.mark.parametrize("changes", [{}, {"interleaved": True}, {"scaling": 1.4}, {"dim": 24, "rotary": 8}])
def test_calibration_averages_queries_before_rope(changes):
    layers = (layer(index=2, **changes), layer(index=5, **changes))
    dim = layers[0].head_dim
    plain = [3 + torch.randn(1, 4, n, dim) for n in (7, 12)]
    positions = [torch.arange(7)[None], 100 + torch.arange(12)[None]]
    found = TriAttention().calibrate(Fake(layers, plain, positions))
    assert set(found) == {"2.centre", "2.size", "5.centre", "5.size"}
    every = torch.cat([p[0].double() for p in plain], 1)
    sizes = torch.stack(
        [torch.tensor([[abs(z) for z in pairs(layers[0].rope, q)] for q in head]).mean(0) for head in every]
    )
    for index in (2, 5):
        assert found[f"{index}.centre"].dtype == torch.float32
        torch.testing.assert_close(found[f"{index}.centre"].double(), every.mean(1), atol=1e-4, rtol=0)
        torch.testing.assert_close(found[f"{index}.size"], sizes.float(), atol=1e-4, rtol=1e-5)


def test_the_expected_logit_is_right_where_queries_are_their_centre():
    """With queries that do not vary, the series at one offset is the very logit, up to the z-score's line."""
    shape = layer(heads=1, kv_heads=1)
    centre = torch.randn(1, 16)
    keys_plain = torch.randn(1, 1, 10, 16)
    tensors = {"3.centre": centre, "3.size": shape.rope.bands(centre).abs()}
    call = call_of(shape, keys_plain, torch.arange(10)[None], torch.tensor([[9]]))
    found = TriAttention(offsets=1).scorer(shape, Group((0,)), tensors).score(call, Memory(), Room(0, 10, 3))[0, 0]
    query = shape.rope.rotate(centre, torch.tensor([10]))  # one token later
    logits = (call.keys[0, 0] @ query[0]).double()
    expected = (logits - logits.mean()) / logits.std(correction=0)
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=0)


def test_options_are_checked():
    with pytest.raises(UsageError, match="offsets"):
        build("triattention", {"offsets": 0})
    with pytest.raises(UsageError, match="reduce"):
        build("triattention", {"reduce": "median"})
    assert build("triattention", {"tokens": 256}).options()["tokens"] == 256


def test_end_to_end_keeps_what_it_may(tiny):
    from tcw.kv.policy import Policy

    tokens = torch.randint(3, 250, (2, 96), generator=torch.Generator().manual_seed(0))
    policy = Policy.make("triattention:ratio=0.5,window=8,interval=4", tiny, tokens)
    dense = policy.everything().new_cache(tiny)
    cache = policy.new_cache(tiny)
    ids = torch.randint(3, 250, (1, 64), generator=torch.Generator().manual_seed(1))
    out = tiny.generate(
        ids, max_new_tokens=12, min_new_tokens=12, do_sample=False, past_key_values=cache, pad_token_id=2
    )
    tiny.generate(ids, max_new_tokens=12, min_new_tokens=12, do_sample=False, past_key_values=dense, pad_token_id=2)
    assert out.shape[1] == 76
    assert 0.4 * dense.nbytes() < cache.nbytes() < 0.65 * dense.nbytes()
    assert policy.plan(context=64).bytes == _after_prefill(policy, tiny, ids)


def _after_prefill(policy, model, ids):
    cache = policy.new_cache(model)
    with torch.no_grad():
        model(ids, past_key_values=cache, use_cache=True)
    return cache.nbytes()


@pytest.fixture
def tiny(tiny_llama):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()


@pytest.mark.parametrize(("name", "module"), [("Llama", "q_proj"), ("Qwen2", "q_proj"), ("Qwen3", "q_norm")])
def test_the_centre_is_that_of_the_models_own_queries(architecture, name, module):
    """What RoPE is given, as the model computes it: after the norm of queries, where it has one."""
    from tcw.kv.calibrate import Session
    from tcw.kv.shapes import shapes_of

    model, seen = architecture(name), []
    text = torch.randint(2, 97, (2, 40), generator=torch.Generator().manual_seed(0))
    found = TriAttention().calibrate(Session(model, shapes_of(model), text))
    for layer in model.model.layers:
        getattr(layer.self_attn, module).register_forward_hook(lambda m, args, out: seen.append(out.detach()))
    with torch.no_grad():
        model(text)
    for layer in model.model.layers:
        getattr(layer.self_attn, module)._forward_hooks.clear()
    for index, queries in enumerate(seen):
        dim = found[f"{index}.centre"].shape[1]
        queries = queries.reshape(-1, 4, dim)  # both give [tokens, heads, elements]
        torch.testing.assert_close(found[f"{index}.centre"], queries.mean(0), atol=1e-4, rtol=1e-4)
        sizes = torch.hypot(queries[..., : dim // 2], queries[..., dim // 2 :]).mean(0)
        torch.testing.assert_close(found[f"{index}.size"], sizes, atol=1e-4, rtol=1e-4)


def test_models_of_all_kinds_generate_under_it(any_model):
    from tcw.kv.policy import Policy

    text = torch.randint(2, 97, (2, 60), generator=torch.Generator().manual_seed(0))
    policy = Policy.make("triattention:tokens=24,window=8,interval=2", any_model, text)
    out = any_model.generate(text, max_new_tokens=6, past_key_values=policy.new_cache(any_model), do_sample=False)
    assert out.shape == (2, 66)


def test_a_left_padded_row_keeps_what_it_keeps_alone(tiny):
    from tcw.kv.policy import Policy

    tokens = torch.randint(3, 250, (2, 96), generator=torch.Generator().manual_seed(0))
    policy = Policy.make("triattention:tokens=30,window=8", tiny, tokens)
    long, short = torch.randint(3, 250, (1, 60)), torch.randint(3, 250, (1, 48))
    batch = torch.cat([long, torch.cat([torch.full((1, 12), 2), short], 1)])
    mask = torch.ones_like(batch)
    mask[1, :12] = 0
    following = torch.randint(3, 250, (2, 5))
    with torch.no_grad():
        cache = policy.new_cache(tiny)
        tiny(batch, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), past_key_values=cache)
        grown = torch.cat([mask, torch.ones(2, 5, dtype=mask.dtype)], 1)
        places = (grown.cumsum(1) - 1)[:, -5:]
        together = tiny(following, attention_mask=grown, position_ids=places, past_key_values=cache).logits
        for row, ids in enumerate((long, short)):
            single = policy.new_cache(tiny)
            tiny(ids, past_key_values=single)
            alone = tiny(following[row : row + 1], past_key_values=single).logits
            torch.testing.assert_close(together[row], alone[0], atol=1e-3, rtol=1e-3)
