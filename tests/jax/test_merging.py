"""Merging in JAX is that in PyTorch, with the buckets that hold what is left."""

import jax
import numpy as np
import pytest

from tests.jax import networks
from tests.jax.networks import pair
from tests.jax.parity import same
from tests.torch import models
from tokenexit import TokenExitError, schedule
from tokenexit.carries import Feature
from tokenexit.policies import Budget, ConfidenceAbove, NeighboursAgree, Patience
from tokenexit.schedule import Exit, Merge, Schedule

SIMILAR = (Merge(1, 2, 0.9), Merge(3, 4, 0.8))
PLANS = {
    "similar": ("timm", Schedule(merges=SIMILAR)),
    "similar, keys once": ("timm", Schedule(merges=SIMILAR, keys="entries")),
    "agreed, then exits": (
        "timm, registers",
        Schedule(
            (Exit(4, NeighboursAgree(0.4, radius=1).retaining(per_class=1)),),
            merges=(Merge(1, 2, 0.9), Merge(2, 4, 0.2, NeighboursAgree(0.3, radius=1))),
        ),
    ),
    "exits, then merges": ("timm", Schedule((Exit(2, ConfidenceAbove(0.6)),), merges=(Merge(3, 4, 0.7),))),
    "both at once": (
        "timm",
        Schedule((Exit(3, ConfidenceAbove(0.6)),), merges=(Merge(3, 4, agreed=ConfidenceAbove(0.4)),)),
    ),
    "a class that has lasted": (
        "timm",
        Schedule(
            (Exit(2, ConfidenceAbove(0.9)), Exit(3, ConfidenceAbove(0.9))), merges=(Merge(3, 2, agreed=Patience(1)),)
        ),
    ),
    "features rejoin": ("timm", Schedule((Exit(3, Budget(0.5)),), Feature("last block"), merges=(Merge(1, 2, 0.9),))),
}


def pictures():
    return models.pictures(3, networks.SIZE)


@pytest.mark.parametrize(("kind", "plan"), PLANS.values(), ids=PLANS.keys())
def test_jax_merges_as_pytorch_does(kind, plan):
    both, images = pair(kind), pictures()
    found, wanted = both.found(plan, images), both.wanted(plan, images)
    assert np.asarray(found.tokens_per_block).min() < np.asarray(found.tokens_per_block).max()
    np.testing.assert_array_equal(found.tokens_per_block, wanted.tokens_per_block)
    np.testing.assert_array_equal(found.exit_depth, wanted.exit_depth)
    np.testing.assert_array_equal(found.merged_size, wanted.merged_size)
    same(found.logits, wanted.logits.movedim(1, -1), 1e-4)
    assert tuple(found.exits) == wanted.exits


def test_one_program_gives_what_buckets_chosen_on_the_host_give_and_an_image_is_what_it_is_alone():
    """In a plan that first merges without a head, then with one, then has an exit."""
    kind, plan = PLANS["agreed, then exits"]
    both, images = pair(kind), pictures()
    whole, together = both.compiled(plan, images), both.found(plan, images)
    same(whole.logits, together.logits, 1e-6)
    np.testing.assert_array_equal(whole.capacity_per_block, together.capacity_per_block)
    alone = both.found(plan, images[1:2])
    same(alone.logits, together.logits[1:2], 1e-5)
    np.testing.assert_array_equal(alone.tokens_per_block, together.tokens_per_block[1:2])


def test_gradients_reach_all_tokens_of_a_cell():
    both, images = pair("timm"), networks.images_of(pictures()[:1])
    plan = Schedule(merges=(Merge(1, 2, -1.0),))
    slope = jax.grad(lambda given: both.model.compiled(both.params, both.heads, given, plan).logits[0, 0, 0, 0])(images)
    assert (np.abs(slope).sum(axis=-1) > 0).mean() > 0.9


def test_networks_with_positions_that_travel_are_refused():
    both = pair("placed")
    with pytest.raises(TokenExitError, match="`schedule` must merge nothing, for a network with positions"):
        both.found(Schedule(merges=SIMILAR), pictures())
    with pytest.raises(TokenExitError, match="`schedule` must ask for agreement only after blocks with an exit head"):
        both.model.retuned(Schedule(merges=(Merge(1, 2, agreed=ConfidenceAbove(0.5)),)))
    assert both.model.retuned(schedule.merged(alike={1: 0.9}), alike=0.8).schedule == schedule.merged(alike={1: 0.8})
