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
from tokenexit_torch.heads import build

EXITS = (Exit(2, ConfidenceAbove(0.6)), Exit(4, ConfidenceAbove(0.5)))
FORETOLD = (Exit(2, ErrorBelow(0.5, radius=1)), Exit(4, ErrorBelow(0.4, radius=0)))
AGREED = Schedule(
    (Exit(4, ErrorBelow(0.4, radius=0)),),
    Translated(),
    merges=(Merge(1, 2, 0.9), Merge(3, 4, 0.2, ErrorBelow(0.5, radius=0))),
)
PLANS = {
    "translations rejoin": Schedule(EXITS, Translated()),
    "folded": Schedule(EXITS, Translated(fold_above=0.1)),
    "predictions": Schedule(EXITS),
    "foretold": Schedule(FORETOLD, Translated()),
    "a budget by what is foretold": Schedule((Exit(3, Budget(0.5, by="error")),), Translated()),
    "merging what is alike": Schedule(FORETOLD[1:], Translated(), merges=(Merge(1, 2, 0.9), Merge(3, 4, 0.7))),
    "merging what is foretold": AGREED,
}


def pictures():
    return models.pictures(3, networks.SIZE)


def test_a_new_translator_is_pytorchs_and_gives_tokens_back():
    wanted = build(Translator(), width=8, classes=3).state_dict()
    found = heads.init(Translator(), jax.random.key(0), width=8, classes=3)
    assert {name: value.shape for name, value in found.items()} == {name: tuple(v.shape) for name, v in wanted.items()}
    for name, value in wanted.items():
        if name != "mlp.1.weight" and name != "mlp.1.bias":
            np.testing.assert_array_equal(found[name], value)
    assert 0.2 < np.abs(found["mlp.1.weight"]).max() <= 8**-0.5
    tokens = jax.random.normal(jax.random.key(1), (2, 5, 8))
    translated, log_error = heads.translate(found, tokens)
    np.testing.assert_array_equal(translated, tokens)
    np.testing.assert_array_equal(log_error, jnp.zeros((2, 5)))


@torch.no_grad()
def test_translations_and_what_is_foretold_of_them_are_those_of_pytorch_in_the_dtype_of_the_tokens():
    both = pair("translating")
    head, tokens = both.theirs.exit_heads["3"], 2 * torch.randn(3, 7, 48, generator=torch.Generator().manual_seed(0))
    found, wanted = heads.translate(from_torch(head), jnp.asarray(tokens.numpy())), head.foretell(tokens)
    for ours, theirs in zip(found, wanted, strict=True):
        same(ours, theirs)
    translated, log_error = heads.translate(from_torch(head), jnp.asarray(tokens.numpy(), dtype=jnp.bfloat16))
    assert (translated.dtype, log_error.dtype) == (jnp.bfloat16, jnp.float32)


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
    same(whole.logits, together.logits, 1e-5)
    np.testing.assert_array_equal(whole.exit_depth, together.exit_depth)
    np.testing.assert_array_equal(whole.capacity_per_block, together.capacity_per_block)
    alone = both.found(AGREED, images[1:2])
    same(alone.logits, together.logits[1:2], 1e-5)
    np.testing.assert_array_equal(alone.exit_depth, together.exit_depth[1:2])


def test_class_scores_at_an_exit_are_the_final_heads_on_the_translation_also_of_what_has_no_room():
    both, images = pair("translating"), pictures()
    every = both.every(images)
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
    both, images, plan = pair("translating", (1.0,)), pictures()[:2], Schedule(EXITS[1:], Translated())
    theirs = tet.Staged(both.theirs)(images, schedule=plan)
    theirs.logits[5].square().mean().backward()

    def loss(weights):
        stages = tej.staged(both.model, both.params, weights, networks.images_of(images), plan)
        return jnp.square(stages.logits[5]).mean(), stages

    slopes, stages = jax.jit(jax.grad(loss, has_aux=True))(both.heads)
    for after, logits in theirs.logits.items():
        same(stages.logits[after], logits.movedim(1, -1), 1e-4)
    for name, parameter in both.theirs.exit_heads["4"].named_parameters():
        if name.startswith("log_error"):
            assert not slopes["exit_heads"]["4"][name].any()
        else:
            assert parameter.grad is not None
            same(slopes["exit_heads"]["4"][name], parameter.grad, 1e-3)


def test_what_an_exit_costs_is_the_translator_and_the_final_head():
    both, images = pair("translating"), pictures()[:1]
    out = both.found(PLANS["translations rejoin"], images)
    final = cost.of_head(MLP(), width=48, classes=networks.CLASSES)
    exit_head = cost.of_head(Translator(24), width=48, classes=networks.CLASSES, final=final)
    priced = both.model.cost(both.params, networks.images_of(images))
    assert (priced.exit_heads, priced.head) == ({2: exit_head, 3: exit_head, 4: exit_head}, final)
    vit = cost.plain_vit(width=48, depth=5, patch=8, prefix=1, exit_heads={2: exit_head, 4: exit_head}, head=final)
    ran = np.asarray(out.tokens_per_block)
    wanted = vit.multiply_adds(ran, patches=20, exits=out.exits, head_on="all")
    assert out.multiply_adds(priced).tolist() == wanted.tolist()
    assert ran[0, 1] > ran[0, 2]


def test_a_final_head_of_ones_own_reads_translations():
    both, images = pair("translating"), pictures()
    table = jax.random.normal(jax.random.key(0), (48, networks.CLASSES))
    model = dataclasses.replace(both.model, head=lambda params, tokens: tokens @ table)
    given = networks.images_of(images)
    weights = {"exit_heads": both.heads["exit_heads"]}
    every = jax.jit(model.every_exit)(both.params, weights, given)
    patches = jax.jit(model.patches_after)(both.params, given)
    translated, _ = heads.translate(weights["exit_heads"]["2"], patches[2])
    same(every[2], both.model.network.finish(both.params, translated) @ table, 1e-4)
    assert (
        model.cost(both.params, given).exit_heads[2].per_token
        == 5 * 48 + cost.of_head(Translator(24), width=48, classes=5, final=cost.HeadCost(0)).per_token
    )


def test_pytorch_reads_what_jax_wrote_and_jax_what_pytorch_wrote(tmp_path):
    both, network = pair("translating"), networks.timm_network()
    tet.save(both.theirs, tmp_path / "torch")
    model, weights = tej.load(network, tmp_path / "torch", capacities=(0.5, 1.0))
    assert model == both.model
    exact(weights, both.heads)
    made = model.retuned(AGREED)
    tej.save(made, weights, tmp_path / "jax")
    theirs = tet.load(both.theirs.model, tmp_path / "jax")
    assert theirs.schedule == AGREED
    exact(heads_of(theirs), both.heads)
    assert plan_in(tmp_path / "jax")["plan"] == {"kind": "translator", "hidden": 24}
    new = tej.wrap(network, AGREED, classes=3, exit_heads=Translator())
    tej.save(new, new.init(jax.random.key(0)), tmp_path / "new")
    assert tet.load(both.theirs.model, tmp_path / "new").head_plan == Translator()


@pytest.mark.usefixtures("unchecked")
def test_where_a_translation_makes_no_sense_it_is_refused(tmp_path):
    network = networks.timm_network()
    for plan, message in (
        (Schedule(EXITS, Translated()), "carry Translated only with exit heads that translate: wrap"),
        (Schedule(FORETOLD), r"compare foretold errors only at exit heads that translate: .*after the blocks \[2, 4\]"),
        (Schedule(merges=AGREED.merges), r"compare foretold errors only .*after the blocks \[3\]"),
    ):
        with pytest.raises(TokenExitError, match=f"`schedule` must {message}"):
            tej.wrap(network, plan, classes=5)
    with pytest.raises(
        TokenExitError, match="`gates` must be a plan of tokenexit.heads that treats each token by itself"
    ):
        tej.wrap_gates(network, gates=Translator())
    plain = tej.wrap(networks.plain_network(), Schedule(EXITS, Translated(0.1)), classes=5, exit_heads=Translator(8))
    with pytest.raises(
        TokenExitError, match="`schedule` must have fold_above=None for a network without prefix tokens"
    ):
        plain.compiled(pair("plain").params, plain.init(jax.random.key(0)), networks.images_of(pictures()))
    made = tej.wrap(network, schedule.dense(after=(2,)), classes=5, exit_heads=Translator(8))
    tej.save(made, made.init(jax.random.key(0)), tmp_path)
    edit(tmp_path, taps=[3, 5], built_head=False, classes=0)
    with pytest.raises(
        TokenExitError, match=r"`folder` must hold translators for a final head: .* PyTorch alone, got .* taps \(3, 5\)"
    ):
        tej.load(network, tmp_path)
