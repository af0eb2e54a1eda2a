"""Exits saved by one adapter are read by the other, weights and plan."""

import copy
import os
import pickle

import jax
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes

import tokenexit_jax as tej
import tokenexit_torch as tet
from tests.jax import networks
from tests.jax.networks import heads_of, pair
from tests.jax.parity import exact
from tests.saved import edit, plan_in, put, weights_in
from tests.torch import models
from tokenexit import TokenExitError, heads, schedule
from tokenexit.carries import Translated
from tokenexit.guarantees import certificate, ladders

PLAN = schedule.neighbours(radius={2: 1, 4: 0}, threshold=0.4, per_class=1)
PLANS = (heads.Linear(), heads.MLP(hidden=7), heads.FCN(hidden=8), heads.Neighbourhood(6, 2), heads.ATM(1, 2))


def vit():
    return pair("timm").theirs.model


@pytest.mark.parametrize("plan", PLANS, ids=[type(plan).__name__ for plan in PLANS])
def test_pytorch_reads_what_jax_wrote_and_jax_what_pytorch_wrote(plan, tmp_path):
    network = networks.timm_network()
    model = tej.wrap(network, schedule.dtop(after=(2, 4), threshold=0.7), classes=5, exit_heads=plan)
    weights = model.init(jax.random.key(3))
    tej.save(model, weights, tmp_path / "jax")
    theirs = tet.load(vit(), tmp_path / "jax")
    assert theirs.schedule == model.schedule
    exact(heads_of(theirs), weights)
    tet.save(theirs, tmp_path / "torch")
    again, read = tej.load(network, tmp_path / "torch")
    assert again == model
    exact(read, weights)
    assert plan_in(tmp_path / "torch") == plan_in(tmp_path / "jax")
    files = (load_file(weights_in(tmp_path / name)) for name in ("jax", "torch"))
    assert len({frozenset((name, tuple(value.shape)) for name, value in file.items()) for file in files}) == 1


def test_what_comes_back_decides_as_before(tmp_path):
    both, images = pair("timm"), models.images(2, networks.SIZE)
    both.theirs.retune(PLAN)
    tet.save(both.theirs, tmp_path)
    both.theirs.retune(schedule.dense())
    model, weights = tej.load(both.model.network, tmp_path, capacities=(0.5, 1.0))
    assert model.after == (2, 3, 4)
    exact(weights, both.heads)
    with torch.no_grad():
        wanted = both.theirs(images, schedule=PLAN)
    found = model(both.params, weights, networks.images_of(images))
    np.testing.assert_array_equal(found.exit_depth, wanted.exit_depth)


def test_what_was_fitted_and_certified_in_pytorch_runs_in_jax(tmp_path):
    both, images = pair("timm"), models.images(24, networks.SIZE)
    theirs = tet.wrap(copy.deepcopy(both.theirs.model), PLAN, num_classes=5).eval()
    theirs.head.load_state_dict(both.theirs.head.state_dict())
    tet.fit_exits(theirs, models.images(24, networks.SIZE, seed=5), steps=60, patches_per_step=128, progress=iter)
    settings = ladders.by_threshold(PLAN, thresholds=(0.4, 0.3))
    found = tet.calibrate(theirs, images, at_most=0.6, preprocessing="as drawn", settings=settings, progress=iter)
    assert found.certificate is not None
    tet.save(theirs, tmp_path)
    assert tej.load(both.model.network, tmp_path)[0].fitted == theirs.fitted != ()
    tet.save_certificate(found.certificate, tmp_path)
    certified = certificate.from_json((tmp_path / "certificate.json").read_text())
    model, weights = tej.load(both.model.network, tmp_path)
    ours = model.retuned(certified.schedule)(both.params, weights, networks.images_of(images))
    with torch.no_grad():
        wanted = theirs(images, schedule=found.report.schedule)
    np.testing.assert_array_equal(ours.exit_depth, wanted.exit_depth)
    assert len(np.unique(ours.exit_depth)) > 1
    np.testing.assert_allclose(ours.logits, np.moveaxis(wanted.logits.numpy(), 1, -1), atol=2e-4)


def test_a_final_head_of_ones_own_is_given_again(tmp_path):
    network, head = networks.timm_network(), lambda params, tokens: tokens[..., :5]
    model = tej.wrap(network, PLAN, classes=5, head=head)
    weights = model.init(jax.random.key(0))
    tej.save(model, weights, tmp_path)
    again, read = tej.load(network, tmp_path, head=head)
    assert again == model
    exact(read, weights)
    with pytest.raises(TokenExitError, match="`head` must be given exactly if the exits were saved without a final"):
        tej.load(network, tmp_path)


def test_thresholds_that_are_arrays_are_written_as_numbers(tmp_path):
    model = tej.wrap(networks.timm_network(), PLAN, classes=5).retuned(threshold=jax.numpy.float32(0.25))
    tej.save(model, model.init(jax.random.key(0)), tmp_path)
    assert tej.load(networks.timm_network(), tmp_path)[0].schedule == PLAN.with_threshold(0.25)


@pytest.fixture
def saved(tmp_path):
    model = tej.wrap(networks.timm_network(), PLAN, classes=5)
    tej.save(model, model.init(jax.random.key(0)), tmp_path)
    return tmp_path


@pytest.mark.usefixtures("unchecked")
def test_a_plan_that_carries_translations_is_refused(saved):
    with pytest.raises(TokenExitError, match="`schedule` must carry Translated only with exit heads that translate"):
        tej.wrap(networks.timm_network(), schedule.Schedule(PLAN.exits, Translated()), classes=5)
    written = schedule.Schedule(PLAN.exits, Translated()).to_dict()
    edit(saved, schedule=written)
    with pytest.raises(TokenExitError, match="`schedule` must carry Translated only with exit heads that translate"):
        tej.load(networks.timm_network(), saved)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": 99}, "`schema` must be 2, got 99"),
        (
            {"plan": {"kind": "os.system"}},
            "`kind` must be one of linear, mlp, fcn, neighbourhood, atm, translator, got 'os.system'",
        ),
        ({"plan": None}, "`folder` must hold heads built from a plan"),
        (
            {"plan": {"kind": "translator", "hidden": None}},
            r"`folder` must hold the weights that exits.json describes, .*exit_heads.2.0.bias: \(48,\) instead of None",
        ),
        ({"classes": 10**6}, "`folder` must hold the weights that exits.json describes"),
        ({"width": 47}, "`network` must have width 47, as the saved exits, got 48"),
        ({"depth": 12}, "`network` must have depth 12, as the saved exits, got 5"),
        (
            {"plan": {"kind": "mlp", "hidden": 9}},
            r"`folder` must hold the weights that exits.json describes, .*instead of \(9, 48\)",
        ),
    ],
)
def test_a_bad_plan_is_a_clear_error(saved, changes, message):
    edit(saved, **changes)
    with pytest.raises(TokenExitError, match=message):
        tej.load(networks.timm_network(), saved)


def test_files_that_are_missing_or_no_weights_are_clear_errors(saved, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    put(saved, pickle.dumps(Evil()))
    with pytest.raises(TokenExitError, match="`folder` must hold valid weights, got "):
        tej.load(networks.timm_network(), saved)
    assert not (tmp_path / "ran").exists()
    weights_in(saved).unlink()
    with pytest.raises(TokenExitError, match="`folder` must hold the weights that exits.json names"):
        tej.load(networks.timm_network(), saved)
    (saved / "exits.json").unlink()
    with pytest.raises(
        TokenExitError, match="`folder` must hold the file exits.json or gates.json or semantic.json, got "
    ):
        tej.load(networks.timm_network(), saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda value: value * torch.nan, "describes, all of them finite, got NaN or infinity in "),
        (lambda value: value.int(), "in float16, bfloat16, float32, float64, got .* in int32"),
        (lambda value: value > 0, "in float16, bfloat16, float32, float64, got .* in BOOL"),
        (lambda value: value.to(torch.uint8), "in float16, bfloat16, float32, float64, got .* in U8"),
        (lambda value: value.to(torch.float8_e4m3fn), "got .* in F8_E4M3"),
    ],
)
def test_weights_of_another_kind_are_refused(saved, change, message):
    put(saved, to_bytes({name: change(value) for name, value in load_file(weights_in(saved)).items()}))
    with pytest.raises(TokenExitError, match=f"`folder` must hold the weights that exits.json .*{message}"):
        tej.load(networks.timm_network(), saved)


def test_damaged_weights_and_edited_plans_are_refused(saved):
    file = weights_in(saved)
    raw = file.read_bytes()
    file.write_bytes(bytes([*raw[:-2], raw[-2] ^ 64, raw[-1]]))
    with pytest.raises(TokenExitError, match="hold the weights that exits.json names, .* SHA-256"):
        tej.load(networks.timm_network(), saved)
    file.write_bytes(raw)
    text = (saved / "exits.json").read_text()
    (saved / "exits.json").write_text(text.replace('"threshold": 0.4', '"threshold": 0.3'))
    with pytest.raises(TokenExitError, match="`checksum` must be that of the content"):
        tej.load(networks.timm_network(), saved)
    edit(saved)
    assert tej.load(networks.timm_network(), saved)[0].schedule == PLAN.with_threshold(0.3)


def test_weights_that_could_not_be_loaded_are_not_saved(saved):
    model = tej.wrap(networks.timm_network(), PLAN, classes=5)
    weights = model.init(jax.random.key(0))
    before = {file.name: file.read_bytes() for file in saved.iterdir()}
    for change, message in (
        (lambda leaf: leaf * jax.numpy.nan, "finite, got NaN or infinity in "),
        (lambda leaf: leaf > 0, "in bool"),
    ):
        with pytest.raises(TokenExitError, match=f"`heads` must be weights to be saved, .*{message}"):
            tej.save(model, jax.tree.map(change, weights), saved)
    assert {file.name: file.read_bytes() for file in saved.iterdir()} == before


def test_kind_chooses_in_a_folder_that_holds_several(saved):
    network, svit = networks.timm_network(), schedule.svit(after=(1, 3))
    gated = tej.wrap_gates(network, svit)
    tej.save(gated, gated.init(jax.random.key(0)), saved)
    assert tej.load(network, saved, kind="exits")[0].schedule == PLAN
    assert tej.load(network, saved, kind="gates")[0].schedule == svit
    with pytest.raises(TokenExitError, match="`kind` must be given for a folder .*, exits and gates, got None"):
        tej.load(network, saved)
    with pytest.raises(TokenExitError, match="`folder` must hold the file semantic.json for kind='semantic', got "):
        tej.load(network, saved, kind="semantic")
    with pytest.raises(TokenExitError, match="`taps` must be left out for kind='exits': it is for kind='gates'"):
        tej.load(network, saved, kind="exits", taps=(2,))


def test_weights_of_other_heads_are_not_written(tmp_path):
    model = tej.wrap(networks.timm_network(), PLAN, classes=5)
    others = tej.wrap(networks.timm_network(), PLAN, classes=4).init(jax.random.key(0))
    with pytest.raises(
        TokenExitError, match=r"`heads` must be of the model, as `init` makes them, got .*: \(4,\) instead of \(5,\)"
    ):
        tej.save(model, others, tmp_path / "new")
    assert not (tmp_path / "new").exists()
