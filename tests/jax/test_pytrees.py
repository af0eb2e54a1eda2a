"""Plans as pytrees: numbers are leaves, all else is structure, and building one from leaves checks nothing."""

from dataclasses import dataclass

import jax
import numpy as np
import pytest
from jax import numpy as jnp

import tokenexit_jax as tej
from tokenexit import TokenExitError, schedule
from tokenexit.carries import Feature
from tokenexit.policies import (
    BatchBudget,
    Budget,
    ConfidenceAbove,
    EntropyBelow,
    Evidence,
    GateBelow,
    MarginAbove,
    NeighboursAgree,
    Patience,
    PerClass,
    Policy,
    always,
    never,
)
from tokenexit.schedule import Exit, Schedule

SURE = ConfidenceAbove(0.25)
POLICIES = [
    (SURE, [0.25]),
    (EntropyBelow(PerClass((0.25, 0.5))), [0.25, 0.5]),
    (MarginAbove(1.0), [1.0]),
    (GateBelow(0.5), [0.5]),
    (NeighboursAgree(0.5, radius=3), [0.5]),
    (Budget(7), [7]),
    (BatchBudget(0.5, by="entropy"), [0.5]),
    (Patience(2), []),
    (never(), []),
    (always(), []),
    (SURE & EntropyBelow(0.5), [0.25, 0.5]),
    (SURE | EntropyBelow(0.5), [0.25, 0.5]),
    (~SURE, [0.25]),
    (SURE.retaining(per_class=5).with_minimum(per_image=2), [0.25]),
]


@pytest.mark.parametrize(("policy", "leaves"), POLICIES, ids=[type(policy).__name__ for policy, _ in POLICIES])
def test_numbers_are_leaves_and_the_rest_is_structure(policy, leaves):
    plan = Schedule((Exit(3, policy), Exit(5, policy)), Feature(), cell=2)
    found, structure = jax.tree.flatten(plan)
    assert found == 2 * leaves
    assert jax.tree.unflatten(structure, found) == plan
    hash(structure)
    # JAX builds trees of things that are no numbers, and of numbers out of range.
    again = jax.tree.map(lambda _: object(), plan)
    assert type(again.exits[0].policy) is type(policy)
    assert jax.tree.structure(plan.exits[0]) != jax.tree.structure(Exit(4, policy))


NUMBERS = (1, 1.0, np.float32(1), np.float64(1), np.int64(1), np.ones(()), np.ones((), int))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("number", NUMBERS, ids=[type(number).__name__ for number in NUMBERS])
def test_a_threshold_is_one_kind_of_leaf_however_it_is_given(number):
    @tej.register
    @dataclass(frozen=True)
    class Own(Policy):
        threshold: float

        def leaves(self, evidence):
            return evidence.confidence > self.threshold

    for policy in (ConfidenceAbove(number), Own(number), ConfidenceAbove(0.5) & ConfidenceAbove(number)):
        leaf = jax.tree.leaves(policy)[-1]
        assert (type(leaf), leaf) == (float, 1.0)


@pytest.mark.usefixtures("unchecked")
def test_thresholds_of_classes_are_one_kind_of_leaf_and_budgets_are_two():
    assert [type(leaf) for leaf in jax.tree.leaves(PerClass((1, 0.5, np.float64(0.5))))] == [float] * 3
    kept = [jax.tree.leaves(Budget(keep))[0] for keep in (7, np.asarray(7), 0.5, np.asarray(0.5, np.float32))]
    assert [type(leaf) for leaf in kept] == [int, int, float, float]


def test_leaves_have_names():
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(schedule.neighbours())]
    assert paths == [f".exits[{index}].policy.policy.threshold" for index in range(3)]


def test_what_is_structure_tells_programs_apart():
    plans = [
        schedule.neighbours(radius={3: 1}),
        schedule.neighbours(radius={3: 2}),
        schedule.neighbours(radius={3: 1}, per_class=4),
        schedule.neighbours(radius={3: 1}, cell=3),
        Schedule(schedule.neighbours(radius={3: 1}).exits, Feature()),
    ]
    assert len({jax.tree.structure(plan) for plan in plans}) == len(plans)
    assert jax.tree.structure(plans[0]) == jax.tree.structure(plans[0].with_threshold(0.1))


def test_a_compiled_policy_takes_other_thresholds_also_one_for_each_class():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(40, 3)))
    program = jax.jit(lambda policy: policy(Evidence(logits, valid=jnp.ones(40, dtype=bool))))
    for threshold in (0.4, 0.6, PerClass((0.3, 0.5, 0.9)), PerClass((0.9, 0.5, 0.3))):
        policy = ConfidenceAbove(threshold).retaining(per_class=1)
        np.testing.assert_array_equal(program(policy), policy(Evidence(logits)))


def test_a_policy_of_ones_own():
    @tej.register
    @dataclass(frozen=True)
    class Certain(Policy):
        threshold: float
        label: int

        def leaves(self, evidence):
            return (evidence.label == self.label) & (evidence.confidence > self.threshold)

    assert jax.tree.leaves(Certain(0.5, 2) | ~Certain(0.25, 3)) == [0.5, 0.25]
    assert jax.tree.structure(Certain(0.5, 2)) != jax.tree.structure(Certain(0.5, 3))


@pytest.mark.usefixtures("unchecked")
def test_what_is_no_dataclass_is_named():
    with pytest.raises(TokenExitError, match="`kind` must be a dataclass, got <class 'int'>"):
        tej.register(int)
