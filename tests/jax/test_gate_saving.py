"""Gates saved by one adapter are read by the other, weights and plan."""

import jax
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import tokenexit_jax as tej
import tokenexit_torch as tet
from tests.jax import gated as pairs
from tests.jax import networks
from tests.jax.gated import gated, gates_of
from tests.jax.parity import exact
from tests.saved import edit, plan_in, put, weights_in
from tests.torch import models
from tokenexit import TokenExitError, heads, schedule
from tokenexit.carries import Preserved

PLANS = (heads.Linear(), heads.MLP(hidden=7), heads.FCN(hidden=8))
SVIT = schedule.svit(after=(1, 3), threshold={1: 0.4, 3: 0.55}, carry=Preserved("never", "all"))


@pytest.mark.parametrize("plan", PLANS, ids=[type(plan).__name__ for plan in PLANS])
def test_pytorch_reads_what_jax_wrote_and_jax_what_pytorch_wrote(plan, tmp_path):
    network, vit = networks.timm_network(depth=4), gated().theirs.model
    model = tej.wrap_gates(network, SVIT, gates=plan)
    weights = model.init(jax.random.key(3))
    tej.save(model, weights, tmp_path / "jax")
    theirs = tet.load(vit, tmp_path / "jax")
    assert theirs.schedule == model.schedule
    exact(gates_of(theirs), weights)
    tet.save(theirs, tmp_path / "torch")
    again, read = tej.load(network, tmp_path / "torch")
    assert again == model
    exact(read, weights)
    assert plan_in(tmp_path / "torch", "gates") == plan_in(tmp_path / "jax", "gates")
    files = (load_file(weights_in(tmp_path / name, "gates")) for name in ("jax", "torch"))
    assert len({frozenset((name, tuple(value.shape)) for name, value in file.items()) for file in files}) == 1


def test_what_comes_back_decides_as_before(tmp_path):
    both, images = gated(), models.images(3, networks.SIZE)
    both.theirs.retune(threshold={1: 0.45, 2: 0.5, 3: 0.6})
    tet.save(both.theirs, tmp_path)
    with torch.no_grad():
        wanted = both.theirs(images)
    both.theirs.retune(threshold=0.5)
    options = {"head": pairs.head, "taps": pairs.TAPS, "capacities": (0.7, 1.0)}
    model, weights = tej.load(both.model.network, tmp_path, **options)
    assert (model.after, model.taps) == ((1, 2, 3), (2, 4))
    exact(weights, both.gates)
    found = model(both.params, weights, networks.images_of(images))
    np.testing.assert_array_equal(found.keep, wanted.keep)


def test_a_model_without_gates_is_saved_as_well(tmp_path):
    model = tej.wrap_gates(networks.timm_network(), schedule.dense())
    tej.save(model, model.init(jax.random.key(0)), tmp_path)
    assert tej.load(networks.timm_network(), tmp_path) == (model, {})


@pytest.fixture
def saved(tmp_path):
    model = tej.wrap_gates(networks.timm_network(), SVIT, gates=heads.MLP(7))
    tej.save(model, model.init(jax.random.key(0)), tmp_path)
    return tmp_path


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": 99}, "`folder` must hold a valid gates.json, got .*`schema` must be 2, got 99"),
        ({"plan": None}, "`folder` must hold gates built from a plan"),
        ({"classes": 3}, "`folder` must hold gates, got heads of 3 classes"),
        ({"built_head": True}, "`folder` must hold gates"),
        ({"width": 47}, "`network` must have width 47, as the saved gates, got 48"),
        ({"depth": 12}, "`network` must have depth 12, as the saved gates, got 5"),
        ({"plan": {"kind": "mlp", "hidden": 9}}, r"the weights that gates.json describes, .*instead of \(9, 48\)"),
    ],
)
def test_a_bad_plan_is_a_clear_error(saved, changes, message):
    edit(saved, "gates", **changes)
    with pytest.raises(TokenExitError, match=message):
        tej.load(networks.timm_network(), saved)


@pytest.mark.usefixtures("unchecked")
def test_files_that_are_missing_or_no_weights_are_clear_errors(saved):
    put(saved, b"no weights", "gates")
    with pytest.raises(TokenExitError, match="`folder` must hold valid weights, got "):
        tej.load(networks.timm_network(), saved)
    weights_in(saved, "gates").unlink()
    with pytest.raises(TokenExitError, match="`folder` must hold the weights that gates.json names"):
        tej.load(networks.timm_network(), saved)
    with pytest.raises(
        TokenExitError, match="`model` must be wrapped by `wrap`, `wrap_gates` or `wrap_semantic`, got int"
    ):
        tej.save(3, {}, saved)
