import math
from types import SimpleNamespace

import pytest
import torch

from tcw.errors import UsageError
from tcw.kv import AttentionCall, Group, LayerShape
from tcw.kv._recall import TEXTS, damages, recalls
from tcw.kv.calibrate import Session
from tcw.kv.policy import Policy
from tcw.kv.razorattention import RazorAttention, copying, plain_tokens
from tcw.kv.shapes import shapes_of
from tcw.kv.stores import DenseStore
from tcw.kv.stores.compensated import Compensated
from tcw.kv.streaming_llm import Recency
from tcw.methods import build


def layers(count=5, heads=6, kv_heads=3):
    return tuple(LayerShape(i, i, count, heads, kv_heads, 8, 8, torch.float32, None) for i in range(count))


def scores(count=5, heads=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(count, heads, generator=generator) for name in ("induction", "echo")}


def retrieval(method, shapes, tensors):
    return [method.retrieval(layer, tensors) for layer in shapes]


# --- finding the heads ---------------------------------------------------------------------------------------------


class Fake:
    """A session in which each layer's queries and keys are drawn."""

    def __init__(self, shapes, vocabulary=400, seed=0):
        config = SimpleNamespace(vocab_size=vocabulary, bos_token_id=0, eos_token_id=[1, 2], pad_token_id=None)
        config.get_text_config = lambda decoder: config
        self.layers, self.seed, self.calls = shapes, seed, {}
        self.model = SimpleNamespace(config=config, generation_config=None)

    def watch(self, look, tokens=None):
        assert tokens.dtype == torch.int64
        assert tokens.shape[0] == 1
        self.tokens = tokens
        for layer in self.layers:
            n = tokens.shape[1]
            queries, keys = torch.randn(1, layer.heads, n, 8), torch.randn(1, layer.kv_heads, n, 8)
            call = AttentionCall(queries, keys, keys, None, torch.arange(n)[None], 0.3, None, 0)
            self.calls[layer.depth] = call
            look(layer, call)


@pytest.mark.parametrize("probe", [2, 5, 17])
def test_induction_and_echo_are_the_papers(probe):
    session = Fake(layers(2))
    found = copying(session, probe)
    tokens = session.tokens[0].tolist()
    assert tokens == tokens[:probe] * 4
    assert len(set(tokens)) == probe
    assert not {0, 1, 2} & set(tokens)
    for depth, call in session.calls.items():
        n = len(tokens)
        for head in range(6):
            logits = (call.queries[0, head].double() @ call.keys[0, head // 2].double().T * 0.3).tolist()
            echo = induction = 0.0
            for t in range(probe, n):
                weights = [math.exp(logits[t][j]) for j in range(t + 1)]
                total = sum(weights)
                for j in range(t):
                    if tokens[j] == tokens[t]:
                        echo += weights[j] / total
                    if j > 0 and tokens[j - 1] == tokens[t] and j - 1 < t:
                        induction += weights[j] / total
                if tokens[t - 1] == tokens[t]:
                    raise AssertionError
            expected = torch.tensor([induction, echo], dtype=torch.float64) / (n - probe)
            mine = torch.stack([found["induction"][depth, head], found["echo"][depth, head]]).double()
            torch.testing.assert_close(mine, expected, atol=1e-5, rtol=1e-5)


def test_an_induction_head_is_found_as_one():
    """A head that looks right behind the earlier copy has the score 1, one that looks at the copy echoes."""
    probe, shape = 16, layers(1, 2, 2)

    class Copier(Fake):
        def watch(self, look, tokens=None):
            one_hot = torch.nn.functional.one_hot(tokens[0] % 400, 400).float()
            before = one_hot.roll(1, 0)
            before[0] = 0
            keys = torch.stack([before, one_hot])[None]
            queries = torch.stack([one_hot, one_hot])[None] * 100
            n = len(one_hot)
            look(shape[0], AttentionCall(queries, keys, keys, None, torch.arange(n)[None], 1.0, None, 0))

    found = copying(Copier(shape), probe)
    assert found["induction"][0, 0] > 0.99
    assert found["echo"][0, 0] < 0.01
    # the token itself is a copy too, and takes its share of the attention
    assert abs(float(found["echo"][0, 1]) - (1 / 2 + 2 / 3 + 3 / 4) / 3) < 1e-3
    assert found["induction"][0, 1] < 0.01


def test_small_vocabularies_repeat_what_they_have():
    session = Fake(layers(1), vocabulary=10)
    copying(session, 128)
    assert sorted(session.tokens[0, :7].tolist()) == list(range(3, 10))
    assert session.tokens.shape == (1, 28)


def test_special_tokens_are_left_out():
    config = SimpleNamespace(vocab_size=8, bos_token_id=None, eos_token_id=3, pad_token_id=[5])
    config.get_text_config = lambda decoder: config
    model = SimpleNamespace(config=config, generation_config=SimpleNamespace(eos_token_id=[6]))
    assert plain_tokens(model).tolist() == [0, 1, 2, 4, 7]


# --- dividing them -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("induction", "echo"), [(0.14, 0.01), (0.3, 0.1), (0.0, 0.2), (0.5, 0.0), (1.0, 1.0), (0, 0)])
def test_the_best_shares_of_query_heads_are_retrieval_heads(induction, echo):
    shapes, tensors = layers(), scores()
    expected = [set() for _ in shapes]
    for name, share in (("induction", induction), ("echo", echo)):
        ranked = sorted(
            ((float(s), d, h) for d, row in enumerate(tensors[name]) for h, s in enumerate(row)), reverse=True
        )
        for _, depth, head in ranked[: round(share * 30)]:
            expected[depth].add(head // 2)
    found = retrieval(RazorAttention(induction=float(induction), echo=float(echo)), shapes, tensors)
    assert [set(f) for f in found] == expected


def test_groups_divide_all_heads():
    method, tensors = RazorAttention(induction=0.2), scores()
    for layer in layers():
        groups = method.groups(layer, tensors)
        assert sorted(h for g in groups for h in g.heads) == [0, 1, 2]
        for group in groups:
            whole = group.heads == method.retrieval(layer, tensors)
            assert group.limit(5000) == (None if whole else 1000)
            assert (method.scorer(layer, group, tensors) is None) == whole


def test_one_group_where_all_heads_are_alike():
    tensors = scores()
    for share, limit in ((1.0, None), (0.0, 200)):
        for layer in layers():
            (group,) = RazorAttention(induction=share, echo=0.0).groups(layer, tensors)
            assert group.heads == (0, 1, 2)
            assert group.limit(1000) == limit


def test_local_heads_hold_at_least_sinks_and_window():
    (group,) = RazorAttention(induction=0.0, echo=0.0).groups(layers()[0], scores())
    assert [group.limit(n) for n in (10, 100, 180, 400)] == [10, 36, 36, 80]
    (group,) = RazorAttention(induction=0.0, echo=0.0, local=256.0).groups(layers()[0], scores())
    assert [group.limit(n) for n in (10, 256, 10_000)] == [10, 256, 256]


@pytest.mark.parametrize("ranking", ["copying", "recall"])
@pytest.mark.parametrize("ratio", [0.05, 0.25, 0.27, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("local", [0.0, 0.04])
def test_a_ratio_is_kept_to(ranking, ratio, local):
    shapes = layers(20)
    tensors = {**scores(20), "damage": torch.randn(20, 3)}
    method = RazorAttention(ratio=ratio, local=local, ranking=ranking)
    seen = 100_000
    kept = whole = 0
    for layer in shapes:
        for group in method.groups(layer, tensors):
            limit = group.limit(seen)
            whole += len(group.heads) * (limit is None)
            kept += len(group.heads) * (seen if limit is None else limit)
    assert abs(kept / (60 * seen) - ratio) < 1e-4
    least = local or ratio / 4
    assert whole == math.floor((ratio - least) / (1 - least) * 60 + 1e-6)


@pytest.mark.parametrize("ranking", ["copying", "recall"])
def test_a_ratio_takes_heads_by_the_product_of_their_ranks(ranking):
    shapes = layers(20)
    tensors = {**scores(20), "damage": torch.randn(20, 3)}
    found = retrieval(RazorAttention(ratio=0.3, ranking=ranking), shapes, tensors)
    chosen = {(d, h) for d, heads in enumerate(found) for h in heads}
    every = [(d, g) for d in range(20) for g in range(3)]

    def rank(score, at):
        return 1 + sum(score(other) > score(at) for other in every)

    def product(at):
        of = {n: lambda x, n=n: float(tensors[n][x[0], 2 * x[1] : 2 * x[1] + 2].max()) for n in ("induction", "echo")}
        value = rank(of["induction"], at) * rank(of["echo"], at)
        return value if ranking == "copying" else value * rank(lambda x: float(tensors["damage"][x]), at) ** 2

    assert len(chosen) == 14
    first, last = sorted(map(product, every))[13:15]
    assert first < last
    assert chosen == {at for at in every if product(at) <= first}


@pytest.mark.parametrize(
    "options",
    [
        {"ratio": 1.5}, {"induction": -0.1}, {"echo": 2.0}, {"ratio": 0.3, "local": 0.3}, {"local": -1.0},
        {"ranking": "recall"}, {"probe": 1}, {"sinks": -1}, {"window": 0}, {"score": "kivi"},
        {"score": "fp8"},
    ],
)  # fmt: skip
def test_options_are_checked(options):
    with pytest.raises(UsageError):
        build("razorattention", options)


def test_layers_that_differ_are_refused():
    with pytest.raises(UsageError, match="differ"):
        RazorAttention().check((layers()[0], layers(kv_heads=2)[1]))


# --- what local heads keep, and how ---------------------------------------------------------------------------------


def test_local_heads_compensate():
    method, tensors = RazorAttention(induction=0.2), scores()
    for layer in layers():
        for group in method.groups(layer, tensors):
            make = method.store(layer, group, tensors, DenseStore)
            if group.limit(1) is None:
                assert make is None
            else:
                assert isinstance(make(), Compensated)
                assert make() is not make()
            assert RazorAttention(compensation=False).store(layer, group, tensors, DenseStore) is None


def test_a_store_that_folds_is_left_as_it_is():
    class Folding(DenseStore):
        folds = True

    made = RazorAttention().store(layers()[0], Group((0,), lambda seen: 9), {}, Folding)()
    assert isinstance(made, Folding)


def test_another_method_may_choose_what_local_heads_keep():
    tensors, layer = scores(), layers()[0]
    local = Group((1, 2), lambda seen: 50)
    assert isinstance(RazorAttention().scorer(layer, local, tensors), Recency)
    method = RazorAttention(score="knorm")
    assert type(method.scorer(layer, local, tensors)) is type(build("knorm", {}).scorer(layer, local, {}))
    assert method.scorer(layer, Group((0,)), tensors) is None
    assert not method.needs_rope
    assert RazorAttention(score="triattention").needs_rope


# --- on a model ------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny(tiny_llama):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()


TEXT = torch.randint(3, 250, (2, 300), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "options",
    ["ratio=0.6", "ratio=0.6,compensation=off", "induction=0.25",
     "ratio=0.6,score=triattention", "ratio=0.6,score=knorm"],
)  # fmt: skip
def test_a_model_generates_under_it(tiny, options):
    policy = Policy.make(f"razorattention:{options},window=8,interval=4,probe=16", tiny, TEXT)
    cache = policy.new_cache(tiny)
    out = tiny.generate(TEXT[:, :60], max_new_tokens=12, min_new_tokens=12, past_key_values=cache, pad_token_id=2)
    assert out.shape == (2, 72)
    prompt = policy.new_cache(tiny)
    with torch.no_grad():
        tiny(TEXT[:, :200], past_key_values=prompt)
    assert prompt.nbytes() == policy.plan(200, batch=2).bytes
    if "ratio" in options:
        assert policy.outlined().plan(200, batch=2).bytes == prompt.nbytes()


def test_models_of_all_kinds_generate_under_it(any_model):
    text = torch.randint(2, 97, (2, 60), generator=torch.Generator().manual_seed(0))
    policy = Policy.make("razorattention:ratio=0.7,window=8,interval=2,probe=16", any_model, text)
    out = any_model.generate(text, max_new_tokens=6, past_key_values=policy.new_cache(any_model), do_sample=False)
    assert out.shape == (2, 66)


def test_retrieval_heads_see_everything_and_the_others_their_window(tiny):
    policy = Policy.make("razorattention:ratio=0.6,window=8,probe=16", tiny, TEXT)
    method, tensors = policy.methods["razorattention"], policy.tensors["razorattention"]
    cache = policy.new_cache(tiny, track=True)
    with torch.no_grad():
        tiny(TEXT[:1, :100], past_key_values=cache)
    local = 0
    for layer, groups in zip(policy.layers, cache.kept(), strict=True):
        for heads, positions in groups:
            if heads == method.retrieval(layer, tensors):
                assert positions[0, 0].tolist() == list(range(100))
            else:
                local += len(heads)
                held = positions.shape[-1]
                assert positions[0, 0].tolist() == [0, 1, 2, 3, *range(104 - held, 100)]
    assert 0 < local < 4


def test_with_everything_kept_nothing_changes(tiny):
    policy = Policy.make("razorattention:ratio=1", tiny, TEXT)
    cache = policy.new_cache(tiny)
    with torch.no_grad():
        tiny(TEXT[:, :60], past_key_values=cache)
        found = tiny(TEXT[:, 60:70], past_key_values=cache).logits
        torch.testing.assert_close(found, tiny(TEXT[:, :70]).logits[:, 60:], atol=1e-4, rtol=1e-4)


def test_padding_is_not_compensated_for(tiny):
    """A left-padded row goes on as it does alone: its slot stands for real tokens only."""
    policy = Policy.make("razorattention:induction=0,echo=0,local=24,window=8,probe=16", tiny, TEXT)
    row, padding = TEXT[:1, :50], 14
    batch = torch.cat([TEXT[1:2, :64], torch.cat([torch.full((1, padding), 2), row], 1)])
    mask = torch.ones_like(batch)
    mask[1, :padding] = 0
    following = TEXT[:, 100:104]
    alone, together = policy.new_cache(tiny), policy.new_cache(tiny)
    with torch.no_grad():
        tiny(row, past_key_values=alone)
        expected = tiny(following[1:], past_key_values=alone).logits
        tiny(batch, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), past_key_values=together)
        grown = torch.cat([mask, torch.ones(2, 4, dtype=mask.dtype)], 1)
        places = (grown.cumsum(1) - 1)[:, -4:]
        found = tiny(following, attention_mask=grown, position_ids=places, past_key_values=together).logits
    torch.testing.assert_close(found[1], expected[0], atol=1e-3, rtol=1e-3)


# --- damage ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def asking(tiny, tiny_llama):
    from transformers import AutoTokenizer

    return Session(tiny, shapes_of(tiny), TEXT, seed=5, tokenizer=AutoTokenizer.from_pretrained(tiny_llama))


def test_facts_lie_where_every_head_can_lose_them(asking):
    texts = recalls(TEXT, asking.tokenizer, 40, torch.Generator().manual_seed(0))
    assert len(texts) == TEXTS
    depths = []
    for recall in texts:
        assert recall.text.dtype == recall.asked.dtype == torch.int64
        number = asking.tokenizer.decode(recall.asked[-recall.answers :])
        assert number.strip().isdigit()
        text = bytes(recall.text.tolist())
        depths.append(text.index(bytes(recall.asked[-recall.answers :].tolist())))
        assert depths[-1] + recall.answers <= len(text) - 40
    assert len(set(depths)) == TEXTS
    again = recalls(TEXT, asking.tokenizer, 40, torch.Generator().manual_seed(0))
    assert all((a.text == b.text).all() and (a.asked == b.asked).all() for a, b in zip(texts, again, strict=True))


def test_what_questions_need_is_asked_for(asking):
    with pytest.raises(UsageError, match="too few"):
        recalls(torch.zeros(1, 80, dtype=torch.long), asking.tokenizer, 40, torch.Generator())
    with pytest.raises(UsageError, match="tokenizer"):
        damages(Session(asking.model, asking.layers, TEXT), 4, 32)


def test_recall_finds_its_heads(asking):
    method = RazorAttention(ratio=0.6, ranking="recall", probe=16, window=8)
    found = method.calibrate(asking)
    assert {k: tuple(v.shape) for k, v in found.items()} == {"induction": (2, 4), "echo": (2, 4), "damage": (2, 2)}
    assert {k: v.shape for k, v in method.outline(asking.layers).items()} == {k: v.shape for k, v in found.items()}
    assert sum(len(heads) for heads in retrieval(method, asking.layers, found)) == 2


def test_layers_of_other_kinds_take_no_harm(asking, architecture):
    """Sliding layers are the same for each variant: with nothing hidden, no head matters, in whatever order."""
    gemma = architecture("Gemma2")

    def tokenizer(text, **kwargs):
        return {"input_ids": [2 + ord(c) % 90 for c in text]}

    session = Session(gemma, shapes_of(gemma), TEXT % 90 + 2, tokenizer=tokenizer)
    assert damages(session, 4, 16).abs().max() > 1e-3
    assert damages(session, 10_000, 16).abs().max() < 1e-5


def test_damage_is_what_a_mask_does(asking):
    """Against the model itself, one head at a time, under a mask over the whole text."""
    sinks, window, tiny = 3, 16, asking.model
    found = damages(asking, sinks, window)
    texts = recalls(TEXT, asking.tokenizer, window, torch.Generator().manual_seed(5))
    tiny.set_attn_implementation("sdpa")

    def loss(local, recall):
        n, q = len(recall.text), len(recall.asked)
        causal = torch.ones(n + q, n + q, dtype=torch.bool).tril()
        near = causal.clone()
        near[n:, sinks : n - window] = False

        def mask(module, args, kwargs):
            hidden = torch.stack([near if (module.layer_idx, h // 2) == local else causal for h in range(4)])
            return args, {**kwargs, "attention_mask": hidden[None]}

        hooks = [m.self_attn.register_forward_pre_hook(mask, with_kwargs=True) for m in tiny.model.layers]
        with torch.no_grad():
            logits = tiny(torch.cat([recall.text, recall.asked])[None]).logits[0].double()
        for hook in hooks:
            hook.remove()
        first = n + q - recall.answers
        return float(torch.nn.functional.cross_entropy(logits[first - 1 : -1], recall.asked[-recall.answers :]))

    expected = torch.zeros(2, 2)
    for recall in texts:
        whole = loss(None, recall)
        for layer in range(2):
            for head in range(2):
                expected[layer, head] += (loss((layer, head), recall) - whole) / TEXTS
    assert expected.abs().max() > 0.01
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)
