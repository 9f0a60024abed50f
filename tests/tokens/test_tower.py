"""Cuts inside vision towers, against dense runs: what is dropped is sliced off, what is merged counts as many times."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel, PreTrainedModel

from tcw.errors import UsageError
from tcw.tokens.context import Context
from tcw.tokens.plan import Plan
from tcw.tokens.tower import TowerRun, batches
from tcw.tokens.watch import blocks_of

from .models import BLOCKS, TOWERS, VLMS
from .towers import PATCHES, Planner, after_attention, by_score, cut, final, into_first, sliced, special, through


@pytest.fixture(params=TOWERS)
def tower(request: pytest.FixtureRequest) -> PreTrainedModel:
    return TOWERS[request.param]()


@pytest.fixture
def pixels() -> Tensor:
    return torch.randn(3, 3, 48, 48, generator=torch.Generator().manual_seed(3))


def test_all_bits_stay_where_nothing_is_cut(tower: PreTrainedModel, pixels: Tensor) -> None:
    before = tower(pixels, output_hidden_states=True)
    with TowerRun(tower, [cut(0, by_score, 1.0), cut(2, into_first, 1.0)]) as run:
        after = tower(pixels, output_hidden_states=True)
        assert torch.equal(run.read_out(after.last_hidden_state), before.last_hidden_state[:, special(tower) :])
        assert torch.equal(run.read_out(after[0], "residual"), before.last_hidden_state[:, special(tower) :])
    assert torch.equal(before.last_hidden_state, after.last_hidden_state)
    for a, b in zip(before.hidden_states, after.hidden_states, strict=True):
        assert torch.equal(a, b)
    assert [plan.kept for plan in run.plans] == []


def test_dropping_is_slicing_off(tower: PreTrainedModel, pixels: Tensor) -> None:
    """Images of a batch keep different numbers of tokens, twice; padding is zeros and is never looked at."""
    with TowerRun(tower, [cut(1, by_score), cut(2, by_score)]) as run:
        hidden = tower(pixels).last_hidden_state
        plans, traces = run.plans, run.traces()
    assert len({plan.kept for plan in plans}) > 1
    assert hidden.shape[1] == special(tower) + max(plan.kept for plan in plans)
    for image, out, plan, trace in zip(pixels, hidden, plans, traces, strict=True):
        assert [name for name, _ in trace.cuts] == ["block 1", "block 2"]
        first = trace.cuts[0][1].keep
        second = torch.searchsorted(first, plan.keep)
        expected = sliced(tower, image, [(1, first), (2, second)])
        torch.testing.assert_close(out[: len(expected)], expected, rtol=1e-5, atol=1e-5)
        assert not out[len(expected) :].any()


def test_merging_what_is_the_same_changes_nothing(tower: PreTrainedModel) -> None:
    """A merged token counts as often as tokens stand for it: copies of six patches need only six tokens."""
    with torch.no_grad():
        for name, parameter in tower.named_parameters():
            if "position" in name:
                parameter.zero_()
    kinds = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    of = torch.randint(6, (2, 36), generator=torch.Generator().manual_seed(6))
    of[:, :6] = torch.arange(6)
    images = kinds[of].view(2, 6, 6, 3, 8, 8).permute(0, 3, 1, 4, 2, 5).reshape(2, 3, 48, 48)

    def same(context: Context, k: int | None) -> Plan:
        alike = ((context.x[:, None] - context.x).abs().amax(-1) < 1e-3).int().argmax(1)
        keep = alike.unique()
        return Plan.merging(keep, torch.searchsorted(keep, alike), context.size)

    expected = tower(images)
    with TowerRun(tower, [cut(0, into_pairs(same)), cut(1, same)]) as run:
        found = tower(images)
        assert [plan.kept for plan in run.plans] == [6, 6]
        assert [plan.size.tolist() for plan in run.plans] == [torch.bincount(row).tolist() for row in of]
        for how in ("copy", "residual"):
            read = run.read_out(found.last_hidden_state, how)
            torch.testing.assert_close(read, expected[0][:, special(tower) :], rtol=1e-4, atol=1e-4)
    if expected.pooler_output is not None:
        torch.testing.assert_close(found.pooler_output, expected.pooler_output, rtol=1e-4, atol=1e-4)


def into_pairs(same: Planner) -> Planner:
    """Only half of what `same` does: of each group the first two."""

    def plan(context: Context, k: int | None) -> Plan:
        whole = same(context, k)
        assign = torch.arange(context.tokens)
        for number, kept in enumerate(whole.keep):
            members = (whole.assign == number).nonzero()[:, 0]
            assign[members[:2]] = kept
        keep = assign.unique()
        return Plan.merging(keep, torch.searchsorted(keep, assign), context.size)

    return plan


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_batch_is_its_images(tower: PreTrainedModel, pixels: Tensor, implementation: str) -> None:
    tower.set_attn_implementation(implementation)
    for stages in ([cut(0, into_first, 0.5), cut(2, by_score)], [cut(1, by_score), cut(2, into_first, 0.1)]):
        with TowerRun(tower, stages) as run:
            together = tower(pixels)[0]
            read, plans = run.read_out(together, "residual"), run.plans
            for n, image in enumerate(pixels):
                alone = tower(image[None])[0]
                torch.testing.assert_close(together[n, : alone.shape[1]], alone[0], rtol=1e-5, atol=1e-5)
                torch.testing.assert_close(read[n], run.read_out(alone, "residual")[0], rtol=1e-5, atol=1e-5)
                assert torch.equal(plans[n].assign, run.plans[0].assign)


def test_eager_is_sdpa(tower: PreTrainedModel, pixels: Tensor) -> None:
    found = []
    for implementation in ("sdpa", "eager"):
        tower.set_attn_implementation(implementation)
        with TowerRun(tower, [cut(1, into_first, 0.3), cut(2, by_score, 0.2)]):
            found.append(tower(pixels)[0])
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)


def test_what_a_stage_sees(tower: PreTrainedModel, pixels: Tensor) -> None:
    """Against what the model itself says of its attention, also after tokens were merged."""
    tower.set_attn_implementation("eager")
    seen: dict[int, list[Context]] = {1: [], 3: []}

    def spy(at: int) -> Planner:
        def plan(context: Context, k: int | None) -> Plan:
            assert context.rows is not None
            assert context.rows.attention.isfinite().all()
            seen[at].append(context)
            return into_first(context, k)

        return plan

    first, real = special(tower), after_attention(tower, pixels, 1)
    with TowerRun(tower, [cut(1, spy(1), 0.5, layers=lambda n: (n - 1,)), cut(3, spy(3), 0.25)], seed=7):
        attentions = tower(pixels, output_attentions=True).attentions
    for n, context in enumerate(seen[1]):
        assert torch.equal(context.x, real[n, first:])
        assert (context.grid, context.original, context.seed) == ((1, 6, 6), PATCHES, 7)
        assert context.place.tolist() == [[0, i // 6, i % 6] for i in range(PATCHES)]
        assert (context.text is None) == (first == 0)
        assert context.text is None or torch.equal(context.text, real[n, :1])
        row = attentions[1][n, :, 0, 1:] if first else attentions[1][n].mean(1)
        assert context.rows is not None
        torch.testing.assert_close(context.rows.attention[:, 0], row)
        assert context.tower is not None
        torch.testing.assert_close(context.tower.cls((-1,)), row.mean(0))
        assert (context.tower.depth, context.tower.has_cls) == (2, first == 1)
        assert context.tower.keys().shape == (PATCHES, 8)
        assert torch.equal(context.tower.features(), context.x)
    for n, context in enumerate(seen[3]):
        assert context.tokens == 18
        assert context.alive.tolist() == list(range(18))
        assert context.size.tolist() == [2.0] * 18
        row = attentions[3][n, :, 0, 1:] if first else attentions[3][n].mean(1)
        assert context.rows is not None
        torch.testing.assert_close(context.rows.last(), row.mean(0))
        if first:
            logits = context.rows.logits
            torch.testing.assert_close(logits.softmax(-1) * row.sum(-1)[:, None, None], context.rows.attention)


def test_layers_before_a_cut_are_of_the_tokens_that_are_left(tower: PreTrainedModel, pixels: Tensor) -> None:
    found: list[Context] = []

    def spy(context: Context, k: int | None) -> Plan:
        found.append(context)
        return Plan.everything(context.size)

    with TowerRun(tower, [cut(0, spy, layers=lambda n: (0,))]):
        tower(pixels)
    with TowerRun(tower, [cut(1, by_score, 0.3), cut(2, spy, layers=lambda n: (0, n - 1))]) as run:
        tower(pixels)
        plans = run.plans
    for whole, left, plan in zip(found[:3], found[3:], plans, strict=True):
        assert whole.tower is not None
        assert left.tower is not None
        assert torch.equal(left.tower.keys(0), whole.tower.keys(0)[plan.keep])
        assert len(left.tower.cls((0, 2))) == left.tokens == plan.kept


def test_read_out(tower: PreTrainedModel, pixels: Tensor) -> None:
    """What is dropped reads from what was most like it; with its own part added before the final norm."""
    x = after_attention(tower, pixels, 2)[:, special(tower) :].detach()
    with TowerRun(tower, [cut(2, by_score, 0.25)]) as run:
        out = tower(pixels, output_hidden_states=True)
        copy, residual = (run.read_out(out[0], how) for how in ("copy", "residual"))
        plans = run.plans
    for n, plan in enumerate(plans):
        for i in range(PATCHES):
            alike = [float(x[n, i].double() @ x[n, j].double() / x[n, j].double().norm()) for j in plan.keep]
            stands = alike.index(max(alike)) if i not in plan.keep else plan.keep.tolist().index(i)
            last = out.hidden_states[-1][n, special(tower) + stands]
            own = x[n, i] - x[n, plan.keep[stands]]
            torch.testing.assert_close(copy[n, i], final(tower, last), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(residual[n, i], final(tower, last + own), rtol=1e-4, atol=1e-4)


def test_own_parts_add_up_over_cuts() -> None:
    """After two merges a patch is what stands for it plus what it was more than that at both cuts."""
    tower, image = TOWERS["clip"](), torch.randn(1, 3, 48, 48, generator=torch.Generator().manual_seed(1))
    seen: list[Tensor] = []

    def spy(context: Context, k: int | None) -> Plan:
        seen.append(context.x)
        return into_first(context, k)

    with TowerRun(tower, [cut(1, spy, 0.5), cut(2, spy, 0.25)]) as run:
        out = tower(image)[0]
        read = run.read_out(out, "residual")[0]
    first, second = seen
    for i in range(PATCHES):
        a, b = i % 18, i % 9
        own = first[i] - (first[a] + first[a + 18]) / 2 + second[a] - (second[b] + second[b + 9]) / 2
        torch.testing.assert_close(read[i], out[0, 1 + b] + own, rtol=1e-4, atol=1e-4)


def test_inside_a_vision_language_model(pixels: Tensor) -> None:
    """Whatever the model reads of its tower has all patches; merged ones are the same."""
    model = VLMS["llava"]()
    tower = model.model.vision_tower
    stages = [cut(0, into_first, 0.5), cut(2, by_score)]
    options = {"vision_feature_layer": -2, "vision_feature_select_strategy": "default", "return_dict": True}
    with TowerRun(tower, stages) as run:
        short = tower(pixels, output_hidden_states=True).hidden_states[-2]
        plans = run.plans
    with TowerRun(tower, stages, restore=True) as run:
        features = model.model.get_image_features(pixels, **options).pooler_output
        out = tower(pixels, output_hidden_states=True)
        assert [plan.assign.tolist() for plan in run.plans] == [plan.assign.tolist() for plan in plans]
        assert torch.equal(run.read_out(out[0]), out[0][:, 1:])
    assert [state.shape[1] for state in out.hidden_states] == [1 + PATCHES] * (BLOCKS + 1)
    for n, plan in enumerate(plans):
        assert features[n].shape == (PATCHES, 64)
        expected = model.model.multi_modal_projector(short[n, 1 : 1 + plan.kept])
        torch.testing.assert_close(features[n][plan.keep], expected, rtol=1e-5, atol=1e-5)
        stays = plan.assign >= 0
        assert torch.equal(features[n][stays], features[n][plan.keep][plan.assign[stays]])
        assert len(features[n].unique(dim=0)) == plan.kept


def test_registers_are_never_cut() -> None:
    config = Dinov2WithRegistersConfig(
        hidden_size=32, mlp_ratio=2, num_hidden_layers=3, num_attention_heads=4, image_size=48, patch_size=8,
        num_register_tokens=4,
    )  # fmt: skip
    torch.manual_seed(0)
    tower = Dinov2WithRegistersModel(config).eval()
    x = torch.randn(2, 3, 48, 48)
    before = tower(x, output_hidden_states=True)
    keep = torch.arange(0, PATCHES, 3)
    with TowerRun(tower, [cut(0, lambda c, k: Plan.dropping(keep, c.size), layers=lambda n: (n - 1,))]) as run:
        out = tower(x)[0]
        assert run.read_out(out).shape == (2, PATCHES, 32)
    hidden = torch.cat([before.hidden_states[1][:, :5], before.hidden_states[1][:, 5:][:, keep]], 1)
    for layer in blocks_of(tower)[1:]:
        hidden = through(layer, hidden)
    torch.testing.assert_close(out, tower.layernorm(hidden), rtol=1e-5, atol=1e-5)


def test_a_pooling_head(pixels: Tensor) -> None:
    """It sees no padding, and what was merged as often as it counts."""
    tower = TOWERS["siglip"](vision_use_head=True)
    with TowerRun(tower, [cut(1, into_first, 0.5), cut(2, by_score)]) as run:
        together = tower(pixels)
        plans = run.plans
    assert len({plan.kept for plan in plans}) > 1
    for pooled, hidden, plan in zip(together.pooler_output, together.last_hidden_state, plans, strict=True):
        copies = hidden[: plan.kept].repeat_interleave(plan.size.long(), 0)
        assert len(copies) == 2 * plan.kept
        torch.testing.assert_close(pooled, tower.head(copies[None])[0], rtol=1e-4, atol=1e-5)


def test_pictures_that_are_not_square(pixels: Tensor) -> None:
    tower = TOWERS["dinov2"]()
    with TowerRun(tower, [cut(1, by_score, 0.5)]) as run:
        hidden = tower(torch.randn(1, 3, 32, 72))[0]
        assert run.traces()[0].grid == (1, 4, 9)
        assert run.read_out(hidden).shape == (1, 36, 32)


def test_gradients(tower: PreTrainedModel, pixels: Tensor) -> None:
    pixels = pixels.requires_grad_()
    with TowerRun(tower, [cut(1, into_first, 0.5), cut(2, by_score)]) as run:
        run.read_out(tower(pixels)[0], "residual").square().sum().backward()
    assert pixels.grad is not None
    assert pixels.grad.isfinite().all()
    assert bool((pixels.grad.abs().amax((1, 2, 3)) > 0).all())


def test_half_precision(pixels: Tensor) -> None:
    tower = TOWERS["vit"]().bfloat16()
    with TowerRun(tower, [cut(1, into_first, 0.5), cut(2, by_score)]) as run:
        hidden = tower(pixels.bfloat16())[0]
        assert hidden.dtype == run.read_out(hidden, "residual").dtype == torch.bfloat16
        assert hidden.isfinite().all()


def test_detach_leaves_no_trace(tower: PreTrainedModel, pixels: Tensor) -> None:
    def hooks() -> Iterator[int]:
        for module in tower.modules():
            yield len(module._forward_hooks) + len(module._forward_pre_hooks)

    tower(pixels, output_hidden_states=True)  # transformers hangs its own hooks in when first asked for these
    before, implementation = list(hooks()), tower.config._attn_implementation
    expected = tower(pixels)[0]
    run = TowerRun(tower, [cut(0, into_first, 0.5)], restore=True)
    assert list(hooks()) != before
    tower(pixels)
    run.detach()
    assert list(hooks()) == before
    assert tower.config._attn_implementation == implementation
    assert all("forward" not in layer.__dict__ for layer in blocks_of(tower))
    assert torch.equal(tower(pixels)[0], expected)


def test_what_is_refused(pixels: Tensor) -> None:
    tower = TOWERS["vit"]()
    with pytest.raises(UsageError, match="no block 4"):
        TowerRun(tower, [cut(4, by_score)])
    with TowerRun(tower, [cut(1, by_score, 0.01)]), pytest.raises(UsageError, match="leaves none"):
        tower(pixels)
    with pytest.raises(UsageError, match="more than one video"):
        TowerRun(tower, [cut(1, by_score, whole=True)], restore=True)
    with TowerRun(tower, [cut(1, by_score)]) as run, pytest.raises(UsageError, match="read out by `nearest`"):
        run.read_out(tower(pixels)[0], "nearest")
    visual = VLMS["qwen2_vl"]().model.visual
    with TowerRun(visual, [cut(1, by_score)]), pytest.raises(UsageError, match="by itself"):
        visual(torch.randn(16, 3 * 2 * 64), grid_thw=torch.tensor([[1, 4, 4]]))
    blocks_of(tower)[0].gradient_checkpointing = True  # type: ignore[assignment]
    tower.train()
    with TowerRun(tower, [cut(1, by_score)]), pytest.raises(UsageError, match="twice"):
        tower(pixels)


def test_batches() -> None:
    images = [torch.full((3, 8, side), float(n)) for n, side in enumerate((8, 16, 8, 8, 16))]
    found = batches(images, 2)
    assert [batch[:, 0, 0, 0].tolist() for batch in found] == [[0, 2], [3], [1, 4]]
