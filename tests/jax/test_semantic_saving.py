"""Semantic tokens saved by one adapter are read by the other, weights and plan."""

import jax
import numpy as np
import pytest
import torch

import tokenexit_jax as tej
import tokenexit_torch as tet
from tests.jax import networks
from tests.jax.parity import exact, from_torch, same
from tests.saved import edit, plan_in, put
from tests.torch import models
from tokenexit import TokenExitError
from tokenexit.semantic import SemanticPlan, stvit

LEARNED = SemanticPlan(None, (2, 3), None, learned=(2, 2), layer_scale=0.1)
DEPTH = 5


def host(**options):
    return models.timm_vit(depth=DEPTH, size=networks.SIZE, **options)


@pytest.mark.parametrize(("plan", "until", "hidden"), [(LEARNED, 5, None), (stvit((2, 2)), None, 9)])
def test_pytorch_reads_what_jax_wrote_and_jax_what_pytorch_wrote(plan, until, hidden, tmp_path):
    network = networks.timm_network(depth=DEPTH)
    model = tej.wrap_semantic(network, plan, after=1, until=until, heads=3, hidden=hidden)
    layers = model.init(jax.random.key(3))
    tej.save(model, layers, tmp_path / "jax")
    theirs = tet.load(host(), tmp_path / "jax")
    assert theirs.plan == plan
    exact(from_torch(theirs.layers), layers)
    tet.save(theirs, tmp_path / "torch")
    again, read = tej.load(network, tmp_path / "torch")
    assert again.plan == plan
    assert again.replaced == model.replaced
    exact(read, layers)
    assert plan_in(tmp_path / "torch", "semantic") == plan_in(tmp_path / "jax", "semantic")


def test_what_comes_back_gives_the_same_tokens(tmp_path):
    """Also with norms whose epsilon is another one."""
    vit, images = host(), models.images(2, networks.SIZE)
    for block in vit.blocks:
        block.norm1.eps = block.norm2.eps = 1e-6
    vit.blocks[1].norm1.eps = 0.25
    theirs = tet.wrap_semantic(vit, LEARNED, after=1, until=5)
    tet.save(theirs, tmp_path)
    model, layers = tej.load(networks.timm_network(depth=DEPTH), tmp_path)
    assert model.tokens.epsilon == 0.25
    found = jax.jit(model)(from_torch(vit), layers, networks.images_of(images))
    with torch.no_grad():
        same(found.tokens, theirs(images).tokens, 1e-4)


@pytest.fixture
def saved(tmp_path):
    model = tej.wrap_semantic(networks.timm_network(depth=DEPTH), LEARNED, after=1, until=5, heads=3)
    tej.save(model, model.init(jax.random.key(0)), tmp_path)
    return tmp_path


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": 99}, "`folder` must hold a valid semantic.json, got .*`schema` must be 2, got 99"),
        ({"width": 51}, "`network` must have width 51, as the saved layers, got 48"),
        ({"depth": 12}, "`network` must have depth 12, as the saved layers, got 5"),
        ({"after": -1}, "must hold a valid semantic.json, got .*: `after` must be a block from 0"),
        ({"until": None}, r"must hold the weights that semantic.json describes, got recovery.block.kv.bias"),
        ({"hidden": 999_999}, "must hold the weights that semantic.json describes, got recovery.block.mlp.0"),
    ],
)
def test_a_bad_plan_is_a_clear_error(saved, changes, message):
    edit(saved, "semantic", **changes)
    with pytest.raises(TokenExitError, match=message):
        tej.load(networks.timm_network(depth=DEPTH), saved)


@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_saved_or_is_not_there_is_named(saved, tmp_path):
    network = networks.timm_network(depth=DEPTH)
    model = tej.wrap_semantic(network, LEARNED, after=1, until=5, heads=3)
    with pytest.raises(
        TokenExitError, match="`model` must be wrapped by `wrap`, `wrap_gates` or `wrap_semantic`, got str"
    ):
        tej.save("model", {}, tmp_path / "new")
    with pytest.raises(TokenExitError, match="`layers` must be of the model, as `init` makes them"):
        tej.save(model, {"tokens.learned": np.zeros(3)}, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    with pytest.raises(
        TokenExitError, match="`folder` must hold the file exits.json or gates.json or semantic.json, got "
    ):
        tej.load(network, tmp_path / "new")
    put(saved, b"no numbers", "semantic")
    with pytest.raises(TokenExitError, match="`folder` must hold valid weights, got "):
        tej.load(network, saved)
