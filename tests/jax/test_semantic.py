"""Layers of semantic tokens in JAX: the numbers of PyTorch, on its weights; padding that nobody sees; ViTs that shrink."""

import functools
from dataclasses import replace

import jax
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import numpy as jnp

import tokenexit_jax as tej
import tokenexit_torch as tet
from tests.jax import networks
from tests.jax.parity import from_torch, numbers, same
from tests.torch import models
from tests.torch.semantic import HEADS, PLANS, WIDTH, drawn, lively, unit
from tokenexit import TokenExitError, semantic
from tokenexit.semantic import SemanticPlan, stvit
from tokenexit_jax.models import vit

MORE = PLANS | {
    "few learned": SemanticPlan((3, 3), (2, 2), (4, 4), learned=(1, 2), residual=True, own_keys=False),
    "many learned": SemanticPlan((4, 4), (1, 1), (4, 4), learned=(9, 5), pool="mean"),
}
each_plan = pytest.mark.parametrize("plan", MORE.values(), ids=MORE)


def ours(layers: tet.semantic.SemanticUnit) -> tej.semantic.SemanticUnit:
    within = tuple(mixing.within for mixing in layers.mixing)
    return tej.semantic.SemanticUnit(layers.tokens.plan, width=WIDTH, heads=HEADS, mixing=within)


@functools.cache
def program(plan):
    """Compiled once for all tests, for each shape."""
    return jax.jit(ours(unit(plan)))


def new(model):
    return model.init(jax.random.key(0))


def array(values):
    return None if values is None else jnp.asarray(values.numpy())


SIDES = (7, 6)
CASES = [
    *((name, SIDES, True) for name in MORE),
    *((name, (7, 5), False) for name in MORE),
    *((name, (6, 6), False) for name in ("classification", "dense", "whole map")),
    ("dense", (1, 9), True),
]


@pytest.mark.parametrize(("name", "size", "marked"), CASES, ids=str)
@torch.no_grad()
def test_a_unit_is_that_of_pytorch(name, size, marked):
    """Windows hang over one side, both, and none; also where an image has no token at all."""
    plan = MORE[name]
    layers, (map, valid) = unit(plan), drawn(size)
    valid[1] = False
    valid = valid if marked else None
    found = program(plan)(from_torch(layers), array(map), valid=array(valid))
    same(found, layers(map, valid=valid), 2e-5)
    assert jnp.isfinite(found).all()


@pytest.mark.parametrize("plan", [MORE[name] for name in ("dense", "learned")], ids=["around", "all"])
@torch.no_grad()
def test_semantic_tokens_are_those_of_pytorch(plan):
    """With prefix tokens among them, and with what is valid."""
    layers, (map, valid) = unit(plan).tokens, drawn((7, 8), share=0.2)
    prefix = torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(1))
    wanted = layers(map, valid=valid, prefix=prefix)
    layer = tej.semantic.SemanticTokens(plan, width=WIDTH, heads=HEADS)
    found = jax.jit(layer)(from_torch(layers), array(map), valid=array(valid), prefix=array(prefix))
    assert found.grid == wanted.grid
    for one in ("tokens", "prefix", "map", "valid", "valid_map"):
        same(getattr(found, one), getattr(wanted, one), 2e-5)
    (row, marks), (wanted_row, wanted_marks) = found.to_row(), wanted.to_row()
    same(row, wanted_row, 2e-5)
    same(marks, wanted_marks)
    again = found.from_row(2 * row)
    same(again.tokens, 2 * found.tokens)
    same(again.prefix, 2 * found.prefix)


def test_weights_have_the_names_and_shapes_of_pytorch():
    for plan in MORE.values():
        for hidden in (None, 5):
            sizes = {"width": WIDTH, "heads": HEADS, "hidden": hidden}
            for kind in ("SemanticTokens", "Recovery"):
                alike(getattr(tej.semantic, kind)(plan, **sizes), getattr(tet.semantic, kind)(plan, **sizes))
        layers = unit(plan, mixing=("map", "window", "map"))
        alike(ours(layers), layers)


def alike(ours, theirs):
    made, wanted = jax.eval_shape(ours.init, jax.random.key(0)), theirs.state_dict()
    assert {name: value.shape for name, value in made.items()} == {
        name: tuple(value.shape) for name, value in wanted.items()
    }


def test_new_weights_are_drawn_as_those_of_pytorch():
    plan = SemanticPlan(learned=(20, 20), layer_scale=0.25)
    drawn = {
        name: np.asarray(value) for name, value in new(tej.semantic.SemanticTokens(plan, width=32, heads=2)).items()
    }
    torch.manual_seed(0)
    wanted = tet.semantic.SemanticTokens(plan, width=32, heads=2).state_dict()
    for name, value in wanted.items():
        assert drawn[name].mean() == pytest.approx(value.mean().item(), abs=2e-3), name
        assert drawn[name].std() == pytest.approx(value.std(unbiased=False).item(), rel=0.1), name
    assert not np.array_equal(drawn["first.q.weight"], drawn["second.q.weight"])


@each_plan
@settings(max_examples=8)
@given(content=st.sampled_from([1e9, -3.0, np.nan, np.inf, -np.inf]), seed=st.integers(0, 9), share=st.floats(0, 1))
def test_what_padding_holds_changes_nothing(plan, content, seed, share):
    """Not even where an image has no token at all."""
    layers, (map, valid) = unit(plan), drawn(SIDES, seed, share)
    valid[0] = False
    run, weights = program(plan), from_torch(layers)
    other = torch.where(valid[..., None], map, content)
    first, second = (run(weights, array(one), valid=array(valid)) for one in (map, other))
    np.testing.assert_array_equal(first, second)
    assert jnp.isfinite(first).all()


def test_gradients_are_those_of_pytorch_and_finite():
    """Where padding is no number, and an image has no token at all."""
    layers, (map, valid) = unit(MORE["learned"]), drawn((5, 7), share=0.5)
    valid[0] = False
    map = torch.where(valid[..., None], map, torch.nan).requires_grad_()
    layers(map, valid=valid)[valid].square().sum().backward()
    layer, marks = ours(layers), array(valid)

    def loss(weights, map):
        return jnp.where(marks[..., None], jnp.square(layer(weights, map, valid=marks)), 0).sum()

    of_weights, of_map = jax.jit(jax.grad(loss, argnums=(0, 1)))(from_torch(layers), array(map.detach()))
    same(of_map, map.grad, 1e-4)
    for name, parameter in layers.named_parameters():
        same(of_weights[name], parameter.grad, 1e-4)
        assert jnp.abs(of_weights[name]).max() > 0


def test_a_group_without_any_key_attends_to_all():
    block = lively(tet.semantic.CrossBlock(WIDTH, HEADS))
    queries, keys = torch.randn(2, 3, WIDTH), torch.randn(2, 4, WIDTH)
    given, run = (from_torch(block), array(queries), array(keys)), jax.jit(tej.semantic.CrossBlock(WIDTH, HEADS))
    with torch.no_grad():
        wanted = block(queries, keys)
    same(run(*given, valid=jnp.zeros((2, 4), dtype=bool)), wanted)
    same(run(*given), wanted)


def test_layers_are_dropped_only_with_a_key_and_by_group():
    block = tej.semantic.CrossBlock(WIDTH, HEADS, layer_scale=None, drop_path=0.5)
    weights, tokens = new(block), array(torch.randn(64, 3, WIDTH, generator=torch.Generator().manual_seed(1)))
    with_key = jax.jit(lambda weights, key: block(weights, tokens, key=key))
    plain, dropped = jax.jit(block)(weights, tokens), with_key(weights, jax.random.key(2))
    same(jax.jit(replace(block, drop_path=0.0))(weights, tokens, key=jax.random.key(2)), plain)
    still = (dropped == tokens).all(axis=2)
    np.testing.assert_array_equal(still.all(axis=1), still.any(axis=1))
    assert 0.1 < still[:, 0].mean() < 0.4  # a quarter: both halves are dropped

    # What is left is twice as much: either half, on its own, or both.
    quiet = {name: jnp.zeros_like(value) if name.startswith("mlp.2") else value for name, value in weights.items()}
    added = jax.jit(block)(quiet, tokens) - tokens
    found = with_key(quiet, jax.random.key(3)) - tokens
    kept = jnp.abs(found).max(axis=(1, 2)) > 0
    same(found, jnp.where(kept[:, None, None], 2 * added, 0), 1e-5)
    assert 0.3 < kept.mean() < 0.7


def test_each_layer_of_a_unit_is_dropped_by_its_own_rate():
    layers, map = unit(PLANS["means"]), array(drawn((3, 4))[0])
    layer = replace(ours(layers), drop_path=(0.1, 0.2, 0.3, 0.4, 0.5))
    rates = [block.drop_path for block in (*layer.tokens.blocks, *layer.mixers, layer.recovery)]
    assert rates == [0.1, 0.2, 0.3, 0.4, 0.5]
    run = jax.jit(layer)
    one, other = (run(from_torch(layers), map, key=jax.random.key(seed)) for seed in (2, 3))
    assert not jnp.array_equal(one, other)


def test_half_precision_is_near():
    layers, (map, valid) = unit(PLANS["classification"]), drawn(SIDES)
    weights, layer = from_torch(layers), program(PLANS["classification"])
    wanted = layer(weights, array(map), valid=array(valid))
    halves = {name: value.astype(jnp.bfloat16) for name, value in weights.items()}
    found = layer(halves, array(map).astype(jnp.bfloat16), valid=array(valid))
    assert found.dtype == jnp.bfloat16
    gap = jnp.where(array(valid)[..., None], found - wanted, 0)
    assert jnp.linalg.norm(gap) < 0.05 * jnp.linalg.norm(wanted)


SIZE, DEPTH = networks.SIZE, 6
HANGING = SemanticPlan((3, 4), (3, 2), (4, 5), residual=True, layer_scale=None)
AROUND = SemanticPlan((3, 3), (2, 2), (5, 5), (7, 7), (4, 4), "beyond", residual=True, own_keys=False, layer_scale=0.5)
MODELS = [("cls", stvit((2, 3)), 5), ("cls", HANGING, None), ("none", HANGING, 6), ("registers", AROUND, 5)]
PREFIX = {"none": 0, "cls": 1, "registers": 3}


def both(kind, plan, until, after=1, **options):
    """A shrunk ViT of timm, and the same network in Flax NNX, on the same weights."""
    host = models.timm_vit(depth=DEPTH, size=SIZE, prefix=PREFIX[kind], **options)
    torch.manual_seed(4)
    theirs = tet.wrap_semantic(host, plan, after=after, until=until)
    config = vit.Config(
        image_size=SIZE, patch=8, width=48, depth=DEPTH, heads=3,
        class_token=kind != "none", registers=max(0, PREFIX[kind] - 1), layer_scale="init_values" in options,
    )  # fmt: skip
    network, params = vit.split(vit.load(config, from_torch(host)))
    model = tej.wrap_semantic(network, theirs.plan, after=after, until=until, heads=3)
    return theirs, model, params


@pytest.mark.parametrize(("kind", "plan", "until"), MODELS, ids=["few", "hanging", "no prefix", "around"])
@torch.no_grad()
def test_a_shrunk_model_is_that_of_pytorch(kind, plan, until):
    theirs, model, params = both(kind, plan, until)
    images, layers = models.images(2, SIZE), from_torch(theirs.layers)
    assert (model.replaced, model.depth, model.plan) == (theirs.replaced, DEPTH, theirs.plan)
    wanted, found = theirs(images), jax.jit(model)(params, layers, networks.images_of(images))
    assert (found.prefix, found.grid) == (wanted.prefix, wanted.grid)
    assert (found.valid is None) == (wanted.valid is None)
    assert (found.valid is None) == (until is not None or plan is not HANGING)
    seen = np.ones((2, *found.grid), dtype=bool) if wanted.valid is None else numbers(wanted.valid)
    if wanted.valid is not None:
        same(found.valid, wanted.valid)
        assert not seen.all()
    same(found.tokens[:, : found.prefix], wanted.tokens[:, : found.prefix], 1e-4)
    same(numbers(found.map)[seen], np.moveaxis(numbers(wanted.map), 1, -1)[seen], 1e-4)
    assert jnp.isfinite(found.tokens).all()
    assert model.multiply_adds(params, networks.images_of(images)) == theirs.multiply_adds((4, 5), prefix=found.prefix)


def test_what_stands_for_nothing_is_no_key():
    """The blocks are told that it counts as none."""

    def block(params, tokens, counts, positions):
        return jnp.broadcast_to(counts[..., None], tokens.shape)

    network = replace(networks.timm_network(depth=4), blocks=(block,) * 4, finish=lambda params, tokens: tokens)
    model = tej.wrap_semantic(network, HANGING, after=1, until=None, heads=3)
    params = from_torch(models.timm_vit(depth=1, size=SIZE))
    out = jax.jit(model)(params, new(model), networks.images_of(models.images(2, SIZE)))
    _, held = semantic.pool(np.zeros((2, 4, 5, 1), np.float32), HANGING.windows(4, 5), to=HANGING.tokens)
    np.testing.assert_array_equal(out.valid, semantic.join(held, HANGING.windows(4, 5).pooled(HANGING.tokens)))
    np.testing.assert_array_equal(out.map[..., 0], out.valid)
    np.testing.assert_array_equal(out.tokens[:, :1], 1)
    assert 0 < out.valid.sum() < out.valid.size


def test_the_check_knows_models_on_semantic_tokens():
    network, images = networks.timm_network(depth=2), networks.images_of(models.images(2, SIZE))
    params = from_torch(models.timm_vit(depth=2, size=SIZE))
    mixing = replace(network, finish=lambda params, tokens: tokens - tokens.mean(axis=1, keepdims=True))
    with pytest.raises(TokenExitError, match="`network.finish` must treat each token by itself"):
        tej.check(tej.wrap_semantic(mixing, after=0, until=None, heads=3), params, images)


@pytest.mark.parametrize("until", [5, None])
def test_layers_start_from_the_blocks_as_in_pytorch(until):
    theirs, model, _ = both("cls", replace(stvit((2, 3)), learned=(2, 2)), until)
    wanted = tet.wrap_semantic(theirs.model, theirs.plan, after=1, until=until)
    fresh = new(model)
    found = model.adopt(fresh, {name: value.numpy() for name, value in theirs.model.state_dict().items()})
    assert found.kept == wanted.kept
    assert found.new == wanted.new == ("tokens.learned",)
    assert found.left == wanted.left == ()
    assert found.layers["tokens.learned"] is fresh["tokens.learned"]
    for name, value in wanted.layers.state_dict().items():
        if name in found.kept:
            np.testing.assert_array_equal(found.layers[name], value.numpy())


def test_what_has_no_place_is_named():
    host = models.timm_vit(depth=DEPTH, size=SIZE, qk_norm=True)
    wanted = tet.wrap_semantic(host, SemanticPlan(None, (2, 3), None), after=1, until=None)
    network = networks.timm_network(depth=DEPTH)
    model = tej.wrap_semantic(network, SemanticPlan(None, (2, 3), None), after=1, until=None, heads=3)
    found = model.adopt(new(model), from_torch(host))
    assert (found.kept, set(found.new), set(found.left)) == (wanted.kept, set(wanted.new), set(wanted.left))
    assert "tokens.first.scale1" in found.new
    narrow = tej.wrap_semantic(network, after=1, until=None, heads=3, hidden=7)
    found = narrow.adopt(new(narrow), from_torch(host))
    assert "blocks.1.mlp.fc1.weight" in found.left
    assert "tokens.first.mlp.0.bias" in found.new
    assert found.layers["tokens.first.mlp.0.bias"].shape == (7,)


def test_blocks_with_layer_scale_lend_theirs():
    theirs, model, _ = both("cls", replace(stvit((2, 3)), layer_scale=0.1), 5, init_values=0.3)
    adopted = model.adopt(new(model), from_torch(theirs.model))
    assert adopted.kept["recovery.block.scale2"] == "blocks.4.ls2.gamma"
    assert adopted.new == adopted.left == ()
    wanted = tet.wrap_semantic(theirs.model, theirs.plan, after=1, until=5).layers.state_dict()
    for name, value in wanted.items():
        np.testing.assert_array_equal(adopted.layers[name], value.numpy())


def test_epsilon_is_that_of_the_blocks():
    """What is seen of it: tokens with little variance, on layers that are the blocks."""
    host = models.timm_vit(depth=DEPTH, size=SIZE)
    wanted = tet.wrap_semantic(host, stvit((2, 3)), after=1, until=None)
    network = networks.timm_network(depth=DEPTH)
    model = tej.wrap_semantic(network, stvit((2, 3)), after=1, until=None, heads=3)
    tokens = 1e-3 * torch.randn(2, 7, 48)
    first, _ = model.tokens.blocks
    weights = from_torch(wanted.tokens.first)
    with torch.no_grad():
        found = jax.jit(first)(weights, array(tokens))
        same(found, wanted.tokens.first(tokens))
    other, _ = tej.wrap_semantic(network, after=1, until=None, heads=3, epsilon=1e-5).tokens.blocks
    assert jnp.abs(jax.jit(other)(weights, array(tokens)) - found).max() > 1e-2


def test_a_shrunk_model_learns():
    model = tej.wrap_semantic(networks.timm_network(depth=3), stvit((2, 2)), after=0, until=None, heads=3)
    params, images = from_torch(models.timm_vit(depth=3, size=SIZE)), networks.images_of(models.images(8, SIZE))
    layers = new(model)
    head, labels = jnp.zeros((48, 4)), jnp.arange(8) % 4

    @jax.jit
    def step(learned):
        def loss(learned):
            scores = jax.nn.log_softmax(model(params, learned[0], images).map.mean(axis=(1, 2)) @ learned[1])
            return -scores[jnp.arange(8), labels].mean()

        value, slopes = jax.value_and_grad(loss)(learned)
        return value, jax.tree.map(lambda one, slope: one - 0.3 * jnp.sign(slope) * 0.01, learned, slopes)

    learned, losses = (layers, head), []
    for _ in range(40):
        value, learned = step(learned)
        losses.append(float(value))
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.usefixtures("unchecked")
def test_what_does_not_fit_is_named():
    network = networks.timm_network(depth=DEPTH)
    model = tej.wrap_semantic(network, after=1, until=5, heads=3)
    images = networks.images_of(models.images(1, SIZE))
    params = from_torch(models.timm_vit(depth=DEPTH, size=SIZE))
    layers = jax.eval_shape(model.init, jax.random.key(0))
    scaled = from_torch(models.timm_vit(depth=DEPTH, size=SIZE, init_values=0.1))
    placed = tej.wrap_semantic(networks.plain_network(placed=True), after=1, until=5, heads=2)
    unit = tej.semantic.SemanticUnit(width=8, heads=2)
    weights, map = jax.eval_shape(unit.init, jax.random.key(0)), jnp.zeros((2, 5, 6, 8))
    marks = jnp.ones((2, 5, 5), dtype=bool)

    def wrapped(**changes):
        return tej.wrap_semantic(network, **{"after": 1, "until": 5, "heads": 3} | changes)

    for call, message in (
        (lambda: tej.semantic.CrossBlock(8, 3), "`heads` must divide the width, 8, got 3"),
        (lambda: tej.semantic.CrossBlock(8, 2, drop_path=1.0), r"`drop_path` must be a share in \[0, 1\), got 1.0"),
        (lambda: tej.semantic.SemanticMixing(8, 2, within="image"), "`within` must be 'window' or 'map', got 'image'"),
        (lambda: tej.semantic.SemanticUnit(width=8, heads=2, mixing=("image",)), "`mixing` must be 'window' or 'map'"),
        (lambda: tej.semantic.SemanticUnit(width=8, heads=2, drop_path=(0.1,)), "`drop_path` must have 5 shares"),
        (lambda: unit(weights, map, valid=marks), r"`valid` must have shape \(2, 5, 6\), got shape \(2, 5, 5\)"),
        (lambda: unit(weights, map, valid=map[..., 0]), "`valid` must be boolean, got dtype float32"),
        (lambda: tej.wrap_semantic("vit", after=1, until=5, heads=3), "`network` must be a tokenexit_jax.Network"),
        (lambda: tej.wrap_semantic(network, "stvit", after=1, until=5, heads=3), "`plan` must be a tokenexit.semantic"),
        (lambda: wrapped(after=5), "`after` must be a block from 0 to 4, for 6 blocks"),
        (lambda: wrapped(after=2, until=4), "`until` must be a block from 5 to 6"),
        (lambda: wrapped(until=7), "`until` must be a block from 4 to 6"),
        (lambda: wrapped(heads=5), "`heads` must divide the width, 48, got 5"),
        (lambda: wrapped(heads=True), "`heads` must divide the width, 48, got True"),
        (lambda: wrapped(hidden=0), "`hidden` must be a whole number from 1 to 1,000,000, or None, got 0"),
        (lambda: wrapped(epsilon=0), "`epsilon` must be a positive number, got 0"),
        (lambda: placed(params, layers, images), "`layers` must be of the model, as `init` makes them"),
        (lambda: model(params, {"tokens.first.q.bias": 0}, images), "`layers` must be of the model"),
        (lambda: model.adopt(layers, {}), "`blocks` must have weights of block 1, named blocks.1.norm1.weight"),
        (lambda: model.adopt(layers, scaled), "`plan` must have a layer_scale, as the blocks do"),
        (lambda: tej.check("model", params, images), "`wrap_gates` or `wrap_semantic`, got str"),
    ):
        with pytest.raises(TokenExitError, match=message):
            call()
    params = from_torch(models.placed().module)
    with pytest.raises(TokenExitError, match="`network.embed` must give no positions: semantic tokens have none"):
        placed(params, jax.eval_shape(placed.init, jax.random.key(0)), images)
