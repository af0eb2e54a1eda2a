"""Layers of semantic tokens: what they are, token by token; padding that nobody sees; ViTs that shrink and recover."""

import pytest
import torch
from einops import rearrange
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import tokenexit_torch as tet
from tests.core.oracles import starts
from tests.timm_import import import_timm
from tests.torch import models
from tests.torch.semantic import HEADS, PLANS, WIDTH, drawn, lively, unit
from tokenexit import TokenExitError, semantic
from tokenexit.semantic import SemanticPlan, stvit, stvit_r, stvit_r_dense

SIZES = [(6, 6), (6, 8), (7, 5), (2, 2), (1, 9)]
each_plan = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)


def spans(size, side, reach, edges):
    """Rows and columns around every window, without those outside."""
    reach = [min(a, b) for a, b in zip(reach, size, strict=True)] if edges == "inside" else reach
    return [
        (range(max(0, top), min(size[0], top + reach[0])), range(max(0, left), min(size[1], left + reach[1])))
        for top in starts(size[0], side[0], reach[0], edges)
        for left in starts(size[1], side[1], reach[1], edges)
    ]


def cells(start, side, cell, count, size):
    return range(start + cell * side // count, min(size, start - (-(cell + 1) * side // count)))


def attend(block, queries, keys, onto=None):
    """One group, in which there is no padding at all."""
    return block(queries[None], torch.stack(keys)[None], onto=None if onto is None else onto[None])[0]


def slow(layers, map, valid):
    """One image: what is padding is not there. Semantic tokens are named by their place in their own map."""
    plan, size = layers.tokens.plan, tuple(map.shape[:2])
    side = plan.window or size
    grid = tuple(-(-a // b) * c for a, b, c in zip(size, side, plan.tokens, strict=True))
    tokens, window_of = {}, {}
    tops, lefts = range(0, size[0], side[0]), range(0, size[1], side[1])
    for row in range(grid[0]):
        for column in range(grid[1]):
            down, across = row // plan.tokens[0], column // plan.tokens[1]
            held = [
                map[r, c]
                for r in cells(tops[down], side[0], row % plan.tokens[0], plan.tokens[0], size[0])
                for c in cells(lefts[across], side[1], column % plan.tokens[1], plan.tokens[1], size[1])
                if valid[r, c]
            ]
            if held:
                both = torch.stack(held)
                tokens[row, column] = both.amax(0) if plan.pool == "max" else both.mean(0)
                window_of[row, column] = down * len(lefts) + across
    pooled = dict(tokens)
    places = {(r, c): map[r, c] for r in range(size[0]) for c in range(size[1]) if valid[r, c]}

    def look(block, tokens, around, residual):
        result = {}
        every = [*places.values()]
        if around is None:
            groups = [list(tokens)]
            near = [every]
        else:
            around = spans(size, side, around, plan.edges)
            groups = [[at for at in tokens if window_of[at] == window] for window in range(len(around))]
            near = [[places[r, c] for r in rows for c in columns if (r, c) in places] for rows, columns in around]
        for group, seen in zip(groups, near, strict=True):
            if not group:
                continue
            own = torch.stack([tokens[at] for at in group])
            keys = [*(own if plan.own_keys else []), *seen]
            found = attend(block, own, keys, own if residual else torch.zeros_like(own))
            result |= dict(zip(group, found, strict=True))
        return result

    tokens = look(layers.tokens.first, pooled, plan.neighbourhood, plan.residual)
    if plan.learned is not None:
        learned = functional.interpolate(layers.tokens.learned.permute(0, 3, 1, 2), grid, mode="bilinear")[0]
        tokens = {at: token + learned[:, at[0], at[1]] for at, token in tokens.items()}
    tokens = look(layers.tokens.second, tokens, plan.second, residual=True)
    for mixing in layers.mixing:
        groups = [list(tokens)]
        if mixing.within == "window":
            groups = [[at for at in tokens if window_of[at] == window] for window in set(window_of.values())]
        tokens = {
            at: token
            for group in groups
            for at, token in zip(group, mixing.block(torch.stack([tokens[one] for one in group])[None])[0], strict=True)
        }
    result = torch.zeros_like(map)
    around = None if plan.recovery is None else spans(grid, plan.tokens, plan.recovery, plan.edges)
    for (row, column), place in places.items():
        keys = list(tokens.values())
        if around is not None:
            rows, columns = around[row // side[0] * len(lefts) + column // side[1]]
            keys = [tokens[r, c] for r in rows for c in columns if (r, c) in tokens]
        result[row, column] = attend(layers.recovery.block, place[None], keys)[0]
    return result


@each_plan
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("marked", [False, True])
def test_a_unit_is_what_it_is_without_its_padding(plan, size, marked):
    layers, (map, valid) = unit(plan), drawn(size)
    valid[:, 0, 0] = True
    with torch.no_grad():
        found = layers(map, valid=valid if marked else None)
        valid = valid if marked else torch.ones_like(valid)
        wanted = torch.stack([slow(layers, *one) for one in zip(map, valid, strict=True)])
    torch.testing.assert_close(found[valid], wanted[valid], atol=2e-5, rtol=2e-4)
    assert found.isfinite().all()


@each_plan
@pytest.mark.parametrize("content", [1e9, torch.nan, torch.inf])
def test_what_padding_holds_changes_nothing(plan, content):
    """Not even where an image has no token at all."""
    layers, (map, valid) = unit(plan), drawn((7, 8), share=0.5)
    valid[0] = False
    first = layers(map, valid=valid).detach()
    second = layers(torch.where(valid[..., None], map, content), valid=valid).detach()
    assert torch.equal(first, second)
    assert first.isfinite().all()


def test_a_group_without_any_key_attends_to_all():
    block = lively(tet.semantic.CrossBlock(WIDTH, HEADS))
    queries, keys = torch.randn(2, 3, WIDTH), torch.randn(2, 4, WIDTH)
    with torch.no_grad():
        every, none = block(queries, keys), block(queries, keys, valid=torch.zeros(2, 4, dtype=torch.bool))
    torch.testing.assert_close(none, every)


@each_plan
def test_gradients_reach_every_weight_and_are_finite(plan):
    layers, (map, valid) = unit(plan), drawn((7, 8), share=0.5)
    valid[0] = False
    other = torch.where(valid[..., None], map, torch.nan).requires_grad_()
    layers(other, valid=valid)[valid].square().sum().backward()
    for name, parameter in layers.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name
    assert other.grad[~valid].abs().max() == 0
    assert other.grad[valid].isfinite().all()


OWN_NAMES = {
    "norm1": "norm1", "qkv": "attention.qkv", "proj": "attention.out", "norm2": "norm2", "mlp.0": "mlp.0", "mlp.2": "mlp.2",
}  # fmt: skip
HOSTS = {
    "timm": models.timm_vit,
    "timm, no cls": lambda: models.timm_vit(prefix=0),
    "timm, registers and layer-scale": lambda: models.timm_vit(prefix=6, init_values=0.3),
    "plain": models.plain_host,
}
HANGING = SemanticPlan((3, 5), (3, 2), (4, 5), residual=True, layer_scale=None)
each_host = pytest.mark.parametrize("host", HOSTS.values(), ids=HOSTS)
each_end = pytest.mark.parametrize("until", [6, 5, None])
each_shape = pytest.mark.parametrize("plan", [stvit((2, 3)), HANGING, stvit((4, 6))], ids=["few", "hanging", "all"])


def shrunk(host, plan=stvit((2, 3)), *, after=1, until=5, **options) -> tet.SemanticModel:
    if not isinstance(host, nn.Module):
        options = {"heads": 2, "names": OWN_NAMES} | options
    torch.manual_seed(4)
    return tet.wrap_semantic(host, plan, after=after, until=until, **options)


@each_host
@pytest.mark.parametrize("until", [5, None])
def test_layers_are_the_blocks_whose_place_they_take(host, until):
    model = shrunk(host(), until=until)
    assert model.replaced == ((1, 2) if until is None else (1, 2, 4))
    assert (model.new, model.left) == ((), ())
    assert model.kept["tokens.first.kv.bias"] in ("blocks.1.attn.qkv.bias", "blocks.1.attention.qkv.bias")
    layers = [model.tokens.first, model.tokens.second, *([] if until is None else [model.recovery.block])]
    tokens = torch.randn(2, 7, model.host.width)
    tokens[:, 1] *= 1e-3  # here what a norm adds to the variance is seen
    with torch.no_grad():
        for index, layer in zip(model.replaced, layers, strict=True):
            torch.testing.assert_close(layer(tokens), model.host.run(index, tokens, None), atol=1e-5, rtol=1e-5)


def test_what_is_new_and_what_is_left_is_named():
    new = shrunk(models.plain_host(), names={"norm1": "norm1", "qkv": "mlp.0"}).new
    assert "tokens.first.q.weight" in new
    assert "recovery.block.mlp.2.weight" in new
    assert not any("norm1" in name for name in new)
    model = shrunk(models.timm_vit(qk_norm=True), SemanticPlan(None, (2, 3), None, learned=(2, 2)), until=None)
    assert set(model.left) == {
        f"blocks.{block}.attn.{one}_norm.{kind}" for block in (1, 2) for one in "qk" for kind in ("weight", "bias")
    }
    assert set(model.new) == {"tokens.learned"} | {
        f"tokens.{one}.scale{n}" for one in ("first", "second") for n in (1, 2)
    }
    every = {name for name, _ in model.named_parameters() if not name.startswith("model.")}
    assert every == {*model.kept, *model.new}


@pytest.mark.parametrize(
    "options", [{"act_layer": "quick_gelu"}, {"act_layer": "gelu_tanh"}, {"mlp_layer": "SwiGLUPacked"}]
)
def test_an_mlp_that_does_something_else_is_not_taken_over(options):
    if "mlp_layer" in options:
        options = {"mlp_layer": getattr(import_timm().layers, options["mlp_layer"])}
    model = shrunk(models.timm_vit(**options))
    assert {name for name in model.new if ".mlp." not in name} == set()
    assert len(model.new) == 3 * 4
    assert {name.split(".")[2] for name in model.left} == {"mlp"}
    assert model.tokens.first.hidden == 4 * model.host.width
    assert model(models.images(2)).tokens.isfinite().all()


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("names", [{"qkv": "atn.qkv"}, {"qkv": 3}, {"norm1": "attention.qkv.wight"}])
def test_a_name_of_nothing_is_refused(names):
    message = r"`names` must name layers and parameters of block 1, got \{'" + next(iter(names))
    with pytest.raises(TokenExitError, match=message):
        shrunk(models.plain_host(), names=names)


@each_host
@each_end
@each_shape
def test_a_model_is_its_parts_in_a_row(host, until, plan):
    """Semantic tokens that stand for nothing are not there at all."""
    model, images = shrunk(host(), plan, until=until), models.images(2)
    run, count = model.host.run, model.host.embed(images).prefix
    with torch.no_grad():
        out, row = model(images), run(0, model.host.embed(images).tokens, None)
        prefix, map = row[:, :count], row[:, count:].unflatten(1, (4, 6))
        found = model.tokens(map, prefix=prefix if count else None)
        row, valid = found.to_row()
        held = slice(None) if valid is None else valid[0]
        part = row[:, held]
        for index in range(3, 6 if until is None else until - 1):
            part = run(index, part, None)
        row[:, held] = part
        found = found.from_row(row)
        if until is None:
            map, grid = found.map, (found.grid.height, found.grid.width)
        else:
            map, grid = model.recovery(map, found), (4, 6)
        wanted = torch.cat([row[:, :count], map.flatten(1, 2)], dim=1)
        for index in range(6 if until is None else until, 6):
            wanted = run(index, wanted, None)
        wanted = model.host.finish(wanted)
    assert (out.prefix, out.grid) == (count, grid)
    assert out.map.shape == (2, model.host.width, *grid)
    assert (out.valid is None) == (until is not None or plan != HANGING)
    seen = torch.ones(2, *grid, dtype=torch.bool) if out.valid is None else out.valid
    torch.testing.assert_close(out.tokens[:, :count], wanted[:, :count], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(
        out.tokens[:, count:][seen.flatten(1)], wanted[:, count:][seen.flatten(1)], atol=2e-5, rtol=1e-4
    )
    assert out.tokens.isfinite().all()


@each_host
def test_the_wrapped_model_stays_as_it_was_and_the_rest_learns(host):
    host = host()
    module = host if isinstance(host, nn.Module) else host.module
    before, images = {name: value.clone() for name, value in module.state_dict().items()}, models.images(2)
    model = shrunk(host)
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name])
    assert not model.training
    model(images).map.square().mean().backward()
    unused = [name for name, one in model.named_parameters() if one.grad is None]
    assert all(name.removeprefix("model.").startswith(("blocks.1.", "blocks.2.", "blocks.4.")) for name in unused)
    assert all(one.grad is not None for name, one in model.named_parameters() if not name.startswith("model."))


@each_host
@each_end
@each_shape
def test_multiply_adds_are_those_that_run(host, until, plan):
    model, images = shrunk(host(), plan, until=until), models.images(1)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        out = model(images)
    assert model.multiply_adds((4, 6), prefix=out.prefix) == counter.get_total_flops() / 2


@pytest.mark.parametrize(
    "plan",
    [
        stvit_r_dense((3, 3)),
        PLANS["around, own keys"],
        PLANS["means"],
        SemanticPlan(None, (2, 3), None, own_keys=False),
    ],
    ids=["dense", "around", "means", "no own keys"],
)
def test_multiply_adds_of_windows_are_those_that_run(plan):
    model = shrunk(models.timm_vit(), plan)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(models.images(1))
    assert model.multiply_adds((4, 6), prefix=1) == counter.get_total_flops() / 2


def test_deit_small_on_16_tokens_costs_less_than_half():
    vit = import_timm().create_model("deit_small_patch16_224")
    model, images, found = tet.wrap_semantic(vit, after=4, until=None), torch.zeros(1, 3, 224, 224), []
    for network in (vit, model):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
            network(images)
        found.append(counter.get_total_flops() / 2)
    assert found[0] == pytest.approx(4.6e9, rel=0.01)
    assert found[1] <= 0.45 * found[0]


def test_what_follows_in_timm_reads_semantic_tokens():
    timm = import_timm()
    for pool in ("token", "avg"):
        vit = timm.models.vision_transformer.VisionTransformer(
            img_size=32, patch_size=8, embed_dim=48, depth=6, num_heads=3, num_classes=7, global_pool=pool
        ).eval()
        model = shrunk(vit, until=None)
        out = model(models.images(2, (32, 32)))
        assert out.tokens.shape == (2, 7, 48)
        assert vit.forward_head(out.tokens).shape == (2, 7)


@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_wrapped_is_named():
    vit, placed = models.timm_vit(), models.placed()
    for call, message in (
        (lambda: tet.wrap_semantic(vit, "stvit", after=1, until=5), "`plan` must be a tokenexit.semantic.SemanticPlan"),
        (lambda: shrunk(vit, after=5), "`after` must be a block from 0 to 4, for 6 blocks"),
        (lambda: shrunk(vit, after=2, until=4), "`until` must be a block from 5 to 6"),
        (lambda: shrunk(vit, until=7), "`until` must be a block from 4 to 6"),
        (lambda: shrunk(vit, heads=5), "`heads` must divide the width, 48, got 5"),
        (lambda: shrunk(vit, heads=True), "`heads` must be given"),
        (lambda: shrunk(models.plain_host(), heads=None), "`heads` must be given for a model that is not of timm"),
        (lambda: shrunk(vit, names={"attention": "attn"}), "`names` must have keys among norm1, qkv"),
        (lambda: shrunk(placed), "`model.embed` must give no positions"),
        (lambda: shrunk(shrunk(vit)), "`model` must not be wrapped already"),
        (lambda: tet.wrap_gates(shrunk(vit)), "`model` must not be wrapped already"),
    ):
        with pytest.raises(TokenExitError, match=message):
            call()


def test_frames_are_a_batch_or_share_semantic_tokens():
    """Laid side by side place by place, a window as many times as wide holds a place at all times."""
    layers, frames = unit(PLANS["classification"]), torch.randn(2, 3, 4, 9, WIDTH)
    with torch.no_grad():
        batched = layers(frames.flatten(0, 1)).unflatten(0, (2, 3))
        torch.testing.assert_close(batched[:, 1], layers(frames[:, 1]), atol=1e-5, rtol=1e-5)
    clip = rearrange(frames, "clips time h w c -> clips h (w time) c")
    shared, marks = semantic.pool(clip, semantic.Partition(4, 27, (4, 12)), to=(2, 2))
    alone, same = semantic.pool(frames.amax(1), semantic.Partition(4, 9, (4, 4)), to=(2, 2))
    torch.testing.assert_close(shared, alone, atol=0, rtol=0)
    assert torch.equal(marks, same)
    layers = unit(SemanticPlan((4, 12), (2, 2), (6, 18)))
    with torch.no_grad():
        assert layers.tokens(clip).tokens.shape == (2, 3, 4, WIDTH)
        assert layers(clip).shape == clip.shape


def test_a_row_of_semantic_tokens_goes_back():
    map, _ = drawn((7, 8))
    prefix = torch.randn(2, 3, WIDTH)
    made = lively(tet.semantic.SemanticTokens(stvit_r((3, 3)), width=WIDTH, heads=HEADS))
    with torch.no_grad():
        found = made(map, prefix=prefix)
    row, valid = found.to_row()
    assert row.shape == (2, 3 + 9 * 9, WIDTH)
    assert valid is not None
    assert valid[:, :3].all()
    again = found.from_row(row * 2)
    assert torch.equal(again.tokens, 2 * found.tokens)
    assert torch.equal(again.prefix, 2 * found.prefix)
    assert found.map.shape == (2, 9, 9, WIDTH)
    assert found.valid_map.shape == (2, 9, 9)


@pytest.mark.parametrize("own_keys", [True, False])
@pytest.mark.parametrize("residual", [True, False])
def test_prefix_tokens_take_part_where_all_of_the_map_is_looked_at(own_keys, residual):
    plan = SemanticPlan(None, (2, 2), None, own_keys=own_keys, residual=residual)
    made = lively(tet.semantic.SemanticTokens(plan, width=WIDTH, heads=HEADS))
    (map, _), prefix = drawn((4, 6)), torch.randn(2, 3, WIDTH)
    with torch.no_grad():
        found = made(map, prefix=prefix)
        pooled = semantic.pool(map, semantic.Partition.whole(4, 6), to=(2, 2))[0][:, 0]
        every, onto = map.flatten(1, 2), torch.cat([prefix, pooled if residual else 0 * pooled], 1)
        row = torch.cat([prefix, pooled], 1)
        row = made.first(row, torch.cat([row if own_keys else prefix, every], 1), onto=onto)
        row = made.second(row, torch.cat([row if own_keys else row[:, :3], every], 1))
    torch.testing.assert_close(found.to_row()[0], row, atol=1e-5, rtol=1e-5)


def test_prefix_tokens_wait_where_a_layer_looks_around_windows():
    made = lively(tet.semantic.SemanticTokens(PLANS["dense"], width=WIDTH, heads=HEADS))
    prefix = torch.randn(2, 3, WIDTH)
    with torch.no_grad():
        found, without = made(drawn((6, 6))[0], prefix=prefix), made(drawn((6, 6))[0])
    assert torch.equal(found.prefix, prefix)
    assert torch.equal(found.tokens, without.tokens)


def test_the_plan_of_detection_runs_on_maps_smaller_than_its_neighbourhoods():
    layers, (map, _) = unit(stvit_r_dense()), drawn((9, 16))
    with torch.no_grad():
        assert layers(map).isfinite().all()


@pytest.mark.usefixtures("unchecked")
@pytest.mark.usefixtures("unchecked")
def test_what_does_not_fit_is_named():
    map, marks = torch.zeros(2, 5, 6, WIDTH), torch.ones(2, 5, 5, dtype=torch.bool)
    for call, message in (
        (lambda: tet.semantic.CrossBlock(8, 3), "`heads` must divide the width, 8, got 3"),
        (lambda: tet.semantic.CrossBlock(8, 2.0), "`heads` must divide the width, 8, got 2.0"),
        (lambda: tet.semantic.SemanticMixing(8, 2, within="image"), "`within` must be 'window' or 'map', got 'image'"),
        (lambda: tet.semantic.SemanticUnit(width=8, heads=2, mixing=("image",)), "`mixing` must be 'window' or 'map'"),
        (lambda: unit(stvit_r())(map, valid=marks), r"`valid` must have shape \(2, 5, 6\), got shape \(2, 5, 5\)"),
        (lambda: unit(stvit_r())(map, valid=map[..., 0]), "`valid` must be boolean, got dtype torch.float32"),
    ):
        with pytest.raises(TokenExitError, match=message):
            call()


def learned(parts, predict, *, steps=60):
    """Loss before and after some steps on eight pictures of four classes."""
    pictures, labels = models.images(8, (32, 48)), torch.arange(8) % 4
    optimizer, losses = torch.optim.AdamW(parts.parameters(), lr=3e-3), []
    for _ in range(steps):
        loss = functional.cross_entropy(predict(pictures), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses[0], losses[-1]


@pytest.mark.parametrize("until", [None, 5])
def test_a_shrunk_model_learns(until):
    model, head = shrunk(models.plain_host(), until=until), nn.Linear(32, 4)
    before, after = learned(nn.ModuleList([model, head]), lambda images: head(model(images).map.mean((2, 3))))
    assert after < 0.1 * before


def test_a_unit_learns_from_what_it_recovers():
    """With the published start, at layer-scales of 1e-5; the map itself is taken off again."""
    torch.manual_seed(0)
    made, patches, head = (
        tet.semantic.SemanticUnit(stvit_r((3, 3)), width=32, heads=2),
        nn.Conv2d(3, 32, 8, 8),
        nn.Linear(32, 4),
    )

    def predict(images):
        map = rearrange(patches(images), "i c h w -> i h w c").detach()
        return head((made(map) - map).mean((1, 2)))

    before, after = learned(nn.ModuleList([made, head]), predict)
    assert after < 0.3 * before


@pytest.mark.parametrize(
    "options", [{}, {"second": (8, 8), "recovery": (18, 18), "edges": "beyond", "own_keys": False}]
)
def test_a_windowed_unit_learns_what_a_place_cannot_know_by_itself(options):
    """One place of a map holds a sign, and all places shall tell it: whoever does not look has a loss of 1."""
    torch.manual_seed(0)
    plan = SemanticPlan(window=(4, 4), neighbourhood=(6, 6), residual=True, layer_scale=None, **options)
    unit = tet.semantic.SemanticUnit(plan, width=16, heads=2)
    optimizer = torch.optim.AdamW(unit.parameters(), lr=5e-3)
    for _ in range(120):
        map, word, each = 0.1 * torch.randn(16, 10, 9, 16), torch.randn(16).sign(), torch.arange(16)
        map[each, torch.randint(10, (16,)), torch.randint(9, (16,)), :2] = 3 * torch.stack([word.abs(), word], dim=1)
        loss = (unit(map)[..., 2] - word[:, None, None]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1
