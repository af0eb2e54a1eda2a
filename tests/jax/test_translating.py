"""Translators in JAX: class scores, foretold errors and what leavers leave are those of PyTorch."""

import dataclasses

import jax
import numpy as np
import pytest
import torch
from jax import numpy as jnp

import tokenexit_jax as tej
import tokenexit_torch as tet
from tests.jax import networks
from tests.jax.networks import heads_of, pair
from tests.jax.parity import exact, from_torch, same
from tests.saved import edit, plan_in
from tests.torch import models
from tokenexit import TokenExitError, cost, schedule
from tokenexit.carries import Translated
from tokenexit.heads import MLP, Translator
from tokenexit.policies import Budget, ConfidenceAbove, ErrorBelow
from tokenexit.schedule import Exit, Merge, Schedule
from tokenexit_jax import heads
from tokenexit_torch.heads import TokenTranslator, build

EXITS = (Exit(2, ConfidenceAbove(0.6)), Exit(4, ConfidenceAbove(0.5)))
FORETOLD = (Exit(2, ErrorBelow(0.5, radius=1)), Exit(4, ErrorBelow(0.4, radius=0)))
REJOINING = Schedule(EXITS, Translated())
AGREED = Schedule(FORETOLD[1:], Translated(), merges=(Merge(3, 4, 0.2, ErrorBelow(0.5, radius=0)),))
PLANS = {
    "translations rejoin": REJOINING,
    "foretold, and folded": Schedule(FORETOLD, Translated(fold_above=0.1)),
    "predictions, by what is foretold": Schedule((Exit(3, Budget(0.5, by="error")),)),
    "merging what is alike": Schedule(FORETOLD[1:], Translated(), merges=(Merge(1, 2, 0.9), Merge(3, 4, 0.7))),
    "merging what is foretold": AGREED,
}


def pictures():
    return models.pictures(3, networks.SIZE)


def test_a_new_translator_is_pytorchs_and_gives_tokens_back():
    wanted = build(Translator(), width=8, classes=3).state_dict()
    tokens = jax.random.normal(jax.random.key(1), (2, 5, 8))

    @jax.jit
    def made(key):
        new = heads.init(Translator(), key, width=8, classes=3)
        return new, heads.translate(new, tokens)

    found, (translated, log_error) = made(jax.random.key(0))
    assert {name: value.shape for name, value in found.items()} == {name: tuple(v.shape) for name, v in wanted.items()}
    for name in wanted.keys() - {"mlp.1.weight", "mlp.1.bias"}:
        np.testing.assert_array_equal(found[name], wanted[name])
    assert 0.2 < np.abs(found["mlp.1.weight"]).max() <= 8**-0.5
    np.testing.assert_array_equal(translated, tokens)
    np.testing.assert_array_equal(log_error, np.zeros((2, 5)))


@torch.no_grad()
def test_translations_and_what_is_foretold_of_them_are_those_of_pytorch_in_the_dtype_of_the_tokens():
    head, tokens = pair("translating").theirs.exit_heads["3"], 2 * torch.randn(3, 7, 48)
    assert isinstance(head, TokenTranslator)
    weights, given = from_torch(head), jax.device_put(tokens.numpy())
    for ours, theirs in zip(jax.jit(heads.translate)(weights, given), head.foretell(tokens), strict=True):
        same(ours, theirs)
    halved = jax.eval_shape(heads.translate, weights, jax.ShapeDtypeStruct(given.shape, jnp.bfloat16))
    assert [one.dtype for one in halved] == [jnp.bfloat16, jnp.float32]


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
def test_what_leaves_and_what_it_leaves_is_as_in_pytorch(plan):
    both, images = pair("translating"), pictures()
    found, wanted = both.found(plan, images), both.wanted(plan, images)
    assert len(np.unique(found.exit_depth)) > 1
    np.testing.assert_array_equal(found.exit_depth, wanted.exit_depth)
    np.testing.assert_array_equal(found.tokens_per_block, wanted.tokens_per_block)
    same(found.logits, wanted.logits.movedim(1, -1), 1e-4)
    assert (tuple(found.exits), found.head_on) == (wanted.exits, wanted.head_on)
    if plan.merges:
        assert np.asarray(found.merged_size).max() > 1
        np.testing.assert_array_equal(found.merged_size, wanted.merged_size)


def test_one_program_gives_what_buckets_chosen_on_the_host_give_and_an_image_is_what_it_is_alone():
    both, images = pair("translating"), pictures()
    whole, together = both.compiled(AGREED, images), both.found(AGREED, images)
    same(whole.logits, together.logits)
    np.testing.assert_array_equal(whole.exit_depth, together.exit_depth)
    np.testing.assert_array_equal(whole.capacity_per_block, together.capacity_per_block)
    alone = both.wanted(AGREED, images[1:2])
    same(together.logits[1:2], alone.logits.movedim(1, -1), 1e-4)
    np.testing.assert_array_equal(together.exit_depth[1:2], alone.exit_depth)


def test_a_final_head_of_ones_own_reads_translations_also_of_what_has_no_room():
    both, images = pair("translating"), pictures()
    own = dataclasses.replace(both.model, head=lambda _, tokens: heads.read(MLP(), both.heads["head"], tokens))
    exits = {"exit_heads": both.heads["exit_heads"]}
    every = jax.jit(own.every_exit)(both.params, exits, networks.images_of(images))
    with torch.no_grad():
        wanted = both.theirs.every_exit(images)
    for after, logits in every.items():
        same(logits, wanted[after].movedim(1, -1), 1e-4)
    plan = Schedule((Exit(2, ErrorBelow(0.2, radius=0)),), Translated())
    tight = both.found(plan, images, capacities=((0.5,), (1.0,), (1.0,)))
    first = np.asarray(tight.exit_depth) == 2
    assert np.asarray(tight.overflow).max() > 0
    same(np.asarray(tight.logits)[first], np.asarray(every[2])[first], 1e-4)


def test_training_gives_the_class_scores_and_the_slopes_of_pytorch():
    both, images, plan = pair("translating", (1.0,)), pictures(), Schedule(EXITS[1:], Translated())
    theirs = tet.Staged(both.theirs)(images, schedule=plan)
    theirs.logits[5].square().mean().backward()

    def loss(weights):
        stages = tej.staged(both.model, both.params, weights, networks.images_of(images), plan)
        return jnp.square(stages.logits[5]).mean(), stages

    slopes, stages = jax.jit(jax.grad(loss, has_aux=True))(both.heads)
    for after, logits in theirs.logits.items():
        same(stages.logits[after], logits.movedim(1, -1), 1e-4)
    for name, parameter in both.theirs.exit_heads["4"].named_parameters():
        slope = np.zeros(parameter.shape) if parameter.grad is None else parameter.grad
        same(slopes["exit_heads"]["4"][name], slope, 1e-3)
    assert np.asarray(slopes["exit_heads"]["4"]["skip.weight"]).any()


def test_heads_that_merges_alone_read_are_trained_in_several_buckets():
    """And are read first after tokens have merged."""
    both, images = pair("translating"), pictures()
    plan = Schedule(merges=(Merge(1, 2, 0.9), Merge(3, 2, 0.2, ErrorBelow(0.6, radius=0))))
    with torch.no_grad():
        wanted = tet.Staged(both.theirs)(images, schedule=plan)
    run = jax.jit(lambda weights, images: tej.staged(both.model, both.params, weights, images, plan))
    found = run(both.heads, networks.images_of(images))
    assert list(found.logits) == list(wanted.logits) == [3, 5]
    for after, logits in wanted.logits.items():
        same(found.logits[after], logits.movedim(1, -1), 1e-4)


def test_what_an_exit_costs_is_the_translator_and_the_final_head():
    both, images = pair("translating"), pictures()
    out, priced = both.found(REJOINING, images), both.model.cost(both.params, networks.images_of(images))
    final = cost.of_head(MLP(), width=48, classes=networks.CLASSES)
    exit_head = cost.of_head(Translator(24), width=48, classes=networks.CLASSES, final=final)
    vit = cost.plain_vit(width=48, depth=5, patch=8, prefix=1, exit_heads={2: exit_head, 4: exit_head}, head=final)
    ran = np.asarray(out.tokens_per_block)
    wanted = vit.multiply_adds(ran, patches=20, exits=out.exits, head_on="all")
    assert out.multiply_adds(priced).tolist() == wanted.tolist()
    assert ran[0, 1] > ran[0, 2]


def test_pytorch_reads_what_jax_wrote_and_jax_what_pytorch_wrote(tmp_path):
    both = pair("translating")
    tet.save(both.theirs, tmp_path / "torch")
    model, weights = tej.load(both.model.network, tmp_path / "torch", kind="exits", capacities=(0.5, 1.0))
    assert model == both.model
    exact(weights, both.heads)
    tej.save(model.retuned(AGREED), weights, tmp_path / "jax")
    theirs = tet.load(both.theirs.model, tmp_path / "jax")
    assert theirs.schedule == AGREED
    exact(heads_of(theirs), both.heads)
    assert plan_in(tmp_path / "jax")["plan"] == {"kind": "translator", "hidden": 24}
    edit(tmp_path / "jax", taps=[3, 5], built_head=False, classes=0)
    with pytest.raises(TokenExitError, match=r"`folder` must hold translators for a final head: .* the taps \(3, 5\)"):
        tej.load(both.model.network, tmp_path / "jax")


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("make", "message"), [
    (lambda v: tej.wrap(v, REJOINING, classes=5),
     r"`schedule` must carry Translated only with exit heads that translate: wrap\(..., exit_heads=heads.Translator"),
    (lambda v: tej.wrap(v, Schedule(FORETOLD), classes=5),
     r"`schedule` must compare foretold errors only at exit heads that translate: .*after the blocks \[2, 4\]"),
    (lambda v: tej.wrap(v, schedule.dense(after=(3,)), classes=5).retuned(Schedule(merges=AGREED.merges)),
     r"`schedule` must compare foretold errors only at exit heads that translate: .*after the blocks \[3\]"),
    (lambda v: tej.wrap_gates(v, gates=Translator()),
     r"`gates` must be a plan of tokenexit.heads that treats each token by itself, got Translator\("),
    (lambda v: heads.read(Translator(), {}, jnp.zeros((1, 48))),
     "`plan` must be a plan of tokenexit.heads that gives class scores, and neither masks nor tokens, got Translator"),
    (lambda v: heads.cost(Translator(), width=48, classes=5), "`final` must be given for a plan that translates"),
])  # fmt: skip
def test_where_a_translation_makes_no_sense_it_is_refused(make, message):
    with pytest.raises(TokenExitError, match=message):
        make(networks.timm_network())
