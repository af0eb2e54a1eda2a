"""The static path: shapes that do not depend on the data, so that programs compile, and thresholds that are data.

Every program below runs on NumPy, and must give the same on array-api-strict without data-dependent shapes, on JAX,
in `jax.jit` and in `torch.compile`. Its shapes are fixed, for every new shape is compiled anew.
"""

import collections
import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import array_api_strict
import numpy as np
import pytest
from array_api_compat import array_namespace
from hypothesis import assume, example, given
from hypothesis import strategies as st

from tests.core import strategies
from tokenexit import cells, cost, ledger, merging, retention, scores, semantic, tokens
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
    always,
    never,
)

IMAGES, GRID, PREFIX, CLASSES, MANY, WIDTH = 2, (3, 4), 1, 4, 300, 3
PLACES = GRID[0] * GRID[1]
SLOTS, CAPACITY, SMALLER = PREFIX + PLACES, 10, 6
COST = cost.Cost(
    embed=700_000,
    blocks=(7_000_000,) * 5,
    width=768,
    prefix=PREFIX,
    exit_heads={2: cost.HeadCost(3000, 500)},
    head=cost.HeadCost(4000),
)
needs_jax = pytest.mark.skipif(not importlib.util.find_spec("jax"), reason="JAX is not installed")
needs_torch = pytest.mark.skipif(not importlib.util.find_spec("torch"), reason="PyTorch is not installed")
few = strategies.fewer(10)


# What programs are given: one value for every name that a program may read.

NAMES = """
    logits wide class_scores order gate features stay leave earlier settled_label settled_score group sparse_group
    grouped_score candidate ran threshold per_class keep whole
"""
Given = collections.namedtuple("Given", NAMES.split())


def values(seed, odd):
    """Random inputs; `odd` adds NaN, infinities and tokens that are equal."""
    random = np.random.default_rng(seed)
    batch = (IMAGES, SLOTS)
    logits = random.normal(scale=1.5, size=(*batch, CLASSES)).astype(np.float32)
    order = random.normal(size=batch).astype(np.float32)
    gate = random.random(batch).astype(np.float32)
    class_scores = random.integers(0, 9, (*batch, CLASSES)).astype(np.float32) / 8
    if odd:
        logits[:, random.integers(0, SLOTS, 3)] = logits[:, random.integers(0, SLOTS, 3)]
        logits[random.integers(0, IMAGES), random.integers(0, SLOTS), random.integers(0, CLASSES)] = np.nan
        logits[random.integers(0, IMAGES), random.integers(0, SLOTS), random.integers(0, CLASSES)] = np.inf
        logits[random.integers(0, IMAGES), random.integers(0, SLOTS), random.integers(0, CLASSES)] = -np.inf
        order = np.round(order)
        order[random.integers(0, IMAGES), random.integers(0, SLOTS)] = np.nan
        order[random.integers(0, IMAGES), random.integers(0, SLOTS)] = np.inf
        gate[random.integers(0, IMAGES), random.integers(0, SLOTS)] = np.nan
    order[:, :PREFIX] = -np.inf
    stay = random.random(batch) < random.choice([0.0, 0.5, 0.8, 1.0])
    stay[:, :PREFIX] = True
    settled = random.random((IMAGES, PLACES)) < 0.6
    settled_score = random.random((IMAGES, PLACES)).astype(np.float32)
    with np.errstate(all="ignore"):
        found = [score(logits).reshape(-1) for score in (scores.confidence, scores.entropy, scores.margin)]
    found += [gate.reshape(-1), class_scores.reshape(-1), settled_score.reshape(-1)]
    return Given(
        logits=logits,
        wide=random.normal(scale=1.5, size=(*batch, MANY)).astype(np.float32),
        class_scores=class_scores,
        order=order,
        gate=gate,
        features=random.normal(size=(*batch, WIDTH)).astype(np.float32),
        stay=stay,
        leave=random.random(batch) < 0.3,
        earlier=random.integers(0, CLASSES, (2, *batch)),
        settled_label=np.where(settled, random.integers(0, CLASSES, (IMAGES, PLACES)), -1),
        settled_score=settled_score,
        group=random.integers(0, CLASSES, (IMAGES, 40)),
        sparse_group=random.integers(0, MANY, (IMAGES, 40)),
        grouped_score=random.integers(0, 30, (IMAGES, 40)).astype(np.float32) / 16,
        candidate=random.random((IMAGES, 40)) < 0.7,
        ran=random.integers(0, SLOTS + 1, (IMAGES, 5)),
        threshold=apart(random.random(), found),
        per_class=np.array([apart(one, found) for one in random.random(CLASSES)]),
        keep=np.array(random.random(), np.float32),
        whole=np.array(random.integers(0, CAPACITY)),
    )


def apart(threshold, found):
    """A threshold near the given one from which every score is far, in view of rounding."""
    every = np.concatenate(found)
    while np.nanmin(np.abs(every - threshold)) < 2e-4:
        threshold += 5e-4
    return np.array(threshold, np.float32)


def distinct(given):
    """Whether equal scores are those of equal tokens: no rounding decides who is ahead."""
    with np.errstate(all="ignore"):
        rows = np.unique(given.logits.reshape(-1, CLASSES), axis=0)
        for score in (scores.confidence, scores.entropy, scores.margin):
            found = np.sort(score(rows))
            if (np.diff(found[~np.isnan(found)]) < 1e-6).any():
                return False
    return True


# The programs.


def row(x, selection):
    """The entries' values in one row."""
    held = tokens.gather(x, selection)
    return array_namespace(held).reshape(held, (held.shape[0] * held.shape[1], *held.shape[2:]))


def evidence(d, kind="logits", **more):
    selection, _ = tokens.select(d.stay, d.order, capacity=CAPACITY)
    xp = array_namespace(d.stay)
    return Evidence(
        **{kind: row(getattr(d, kind), selection)},
        gate=row(d.gate, selection),
        image=selection.image,
        images=IMAGES,
        grid=GRID,
        position=selection.slot - PREFIX,
        valid=row(xp.ones_like(d.stay), selection) & xp.reshape(selection.valid, (IMAGES * CAPACITY,)),
        protected=selection.slot < PREFIX,
        previous=xp.stack([row(d.earlier[exit, ...], selection) for exit in range(2)]),
        settled_label=d.settled_label,
        settled_score=d.settled_score,
        **more,
    )


def decide(given, **policies):
    return {name: policy(given) for name, policy in policies.items()}


def all_scores(d):
    return {
        "confidence": scores.confidence(d.logits),
        "entropy": scores.entropy(d.logits),
        "margin": scores.margin(d.logits),
        "mask_scores": scores.mask_scores(d.logits, d.class_scores),
    }


def thresholds(d):
    return decide(
        evidence(d),
        confidence=ConfidenceAbove(d.threshold),
        entropy=EntropyBelow(d.threshold),
        margin=MarginAbove(d.threshold),
        gate=GateBelow(d.threshold),
        patient=Patience(1),
        more_patient=Patience(2),
        never=never(),
        always=always(),
    )


def neighbourhoods(d):
    return decide(
        evidence(d),
        narrow=NeighboursAgree(d.threshold),
        wide=NeighboursAgree(PerClass(d.per_class), radius=2),
        none=NeighboursAgree(d.threshold, radius=0),
    )


def per_class(d):
    each = PerClass(d.per_class)
    return decide(
        evidence(d),
        confidence=ConfidenceAbove(each),
        entropy=EntropyBelow(each),
        margin=MarginAbove(each),
        gate=GateBelow(each),
    )


def budgets(d):
    return decide(
        evidence(d),
        fraction=Budget(0.4),
        traced_fraction=Budget(d.keep, by="entropy"),
        number=Budget(3, by="margin"),
        traced_number=Budget(d.whole, by="gate"),
        batch=BatchBudget(d.keep),
    )


def retaining(d):
    policy = ConfidenceAbove(d.threshold)
    return decide(
        evidence(d),
        few=policy.retaining(per_class=2),
        none=policy.retaining(per_class=0),
        by_sorting=always().retaining(per_class=9),
        minimum=policy.with_minimum(per_image=4),
        both=(policy & GateBelow(d.keep)).retaining(per_class=1).with_minimum(per_image=3),
    )


def retaining_many_classes(d):
    return decide(evidence(d._replace(logits=d.wide)), some=always().retaining(per_class=1))


def class_scores(d):
    given = evidence(d, "class_scores")
    return decide(
        given,
        above=ConfidenceAbove(d.threshold),
        ties=always().retaining(per_class=1),
        budget=Budget(d.keep),
        minimum=always().with_minimum(per_image=5),
    )


# `torch.compile` knows no `~` of an object, so there a negated policy is made beforehand.
UNSURE, KEPT = ~MarginAbove(0.4), ~(ConfidenceAbove(0.9) | ~GateBelow(0.6))


def combined(d):
    return decide(
        evidence(d),
        negated=UNSURE,
        both=ConfidenceAbove(d.threshold) & MarginAbove(PerClass(d.per_class)) & UNSURE,
        either=NeighboursAgree(d.threshold) | GateBelow(d.threshold) & Patience(1),
        nested=KEPT | EntropyBelow(d.threshold),
    )


def negated(d):
    return decide(evidence(d), traced=~EntropyBelow(d.threshold), per_class=~ConfidenceAbove(PerClass(d.per_class)))


def groups(d):
    flat = (IMAGES * 40,)
    xp = array_namespace(d.group)
    one_row = [xp.reshape(x, flat) for x in (d.candidate, d.grouped_score, d.group)]
    rows = (d.candidate, d.grouped_score)
    return {
        "tournament": retention.top_k_per_group(*rows, d.group, k=2, groups=CLASSES),
        "sorting": retention.top_k_per_group(*rows, d.sparse_group, k=1, groups=MANY),
        "many": retention.top_k_per_group(*rows, d.group, k=9, groups=CLASSES),
        "more_than_there_are": retention.top_k_per_group(*rows, d.group, k=100, groups=CLASSES),
        "one_row": retention.top_k_per_group(*one_row, k=3, groups=CLASSES),
        "rank": retention.rank_in_group(*one_row[1:]),
    }


def selecting(d):
    selection, surplus = tokens.select(d.stay, d.order, capacity=CAPACITY)
    xp = array_namespace(d.stay)
    gate = tokens.gather(d.gate, selection)
    smaller, entry, more = tokens.reselect(selection, ~tokens.gather(d.leave, selection), gate, capacity=SMALLER)
    held = tokens.gather(d.features, smaller)
    return {
        "slot_of": selection.slot_of,
        "valid": selection.valid,
        "overflow": selection.overflow,
        "lengths": selection.lengths,
        "running": selection.running,
        "rank": xp.where(xp.reshape(selection.running, (IMAGES * SLOTS,)), selection.rank, 0),
        "surplus": surplus,
        "smaller": smaller.slot_of,
        "smaller_valid": smaller.valid,
        "smaller_overflow": smaller.overflow,
        "entry": entry,
        "more": more,
        "held": held,
        "restored": tokens.scatter(held * 2, smaller, into=d.features),
    }


def bookkeeping(d):
    selection, _ = tokens.select(d.stay, d.order, capacity=CAPACITY)
    logits, features = tokens.gather(d.logits, selection), tokens.gather(d.features, selection)
    leave = tokens.gather(d.leave, selection)
    score = tokens.gather(d.gate, selection)
    smaller, _, surplus = tokens.reselect(selection, ~leave, score, capacity=SMALLER)
    book = ledger.open_ledger(logits, selection, features=features)
    book = ledger.record(book, selection, leave | surplus, logits, depth=3, features=features)
    later = tokens.gather(d.features * 2, smaller)
    book = ledger.record(
        book,
        smaller,
        tokens.gather(d.order > 0, smaller),
        tokens.gather(d.logits, smaller),
        depth=5,
        features=later,
    )
    return {
        "logits": book.logits,
        "depth": book.depth,
        "features": book.features,
        "rejoined": ledger.rejoin(book, smaller, later),
        "folded": ledger.fold_leavers(features, selection, leave, above=0.25),
        "token_size": cells.token_size(smaller, grid=GRID, side=2),
    }


def merged(d):
    joined = merging.merge(d.features, merging.alone(d.stay, grid=GRID), side=4, alike=0.3)
    fitted, forced = merging.merge_to_fit(joined, side=4, capacity=CAPACITY)
    state = fitted.merged
    return {"running": state.running, "owner": state.owner, "forced": forced, "features": fitted.features()}


def counted(d):
    return {
        "running": COST.multiply_adds(d.ran, patches=PLACES, exits=(2,)),
        "all": COST.multiply_adds(d.ran, patches=PLACES, head_on="all"),
    }


def semantic_tokens(d):
    """A map of 3 x 4 in windows of 2 x 3: padding behind and below."""
    xp = array_namespace(d.features)
    map = xp.reshape(d.features[:, PREFIX:, :], (IMAGES, *GRID, WIDTH))
    valid = xp.reshape(d.stay[:, PREFIX:], (IMAGES, *GRID))
    windows = semantic.Partition(*GRID, (2, 3))
    pooled, held = semantic.pool(map, windows, to=(2, 2), valid=valid)
    around, there = semantic.neighbourhoods(map, windows, size=(4, 3), edges="beyond", valid=valid)
    return {
        "split": semantic.split(map, windows)[0],
        "pooled": pooled,
        "held": held,
        "around": around,
        "there": there,
        "inside": semantic.neighbourhoods(map, windows, size=(3, 4))[0],
        "mean": semantic.pool(map, semantic.Partition.whole(*GRID), to=(2, 3), by="mean")[0],
        "map": semantic.join(pooled, windows.pooled((2, 2))),
    }


PROGRAMS = {
    program.__name__: program
    for program in (
        all_scores,
        thresholds,
        neighbourhoods,
        per_class,
        budgets,
        retaining,
        retaining_many_classes,
        class_scores,
        combined,
        negated,
        groups,
        selecting,
        bookkeeping,
        merged,
        counted,
        semantic_tokens,
    )
}
each_program = pytest.mark.parametrize("program", PROGRAMS)


def run(program, given, array=np.asarray):
    """What a program gives, as NumPy arrays."""
    with np.errstate(all="ignore"):
        found = PROGRAMS[program](Given(*map(array, given)))
    return {name: np.asarray(value) for name, value in found.items()}


def check(found, wanted):
    """Marks and whole numbers are the same, other numbers are close."""
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        if value.dtype.kind in "bi" and found[name].dtype.kind in "bi":
            np.testing.assert_array_equal(found[name], value, err_msg=name)
        else:
            np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-5, err_msg=name)


def distinct_values(seed, odd):
    given = values(seed, odd)
    assume(distinct(given))
    return given


@each_program
@few
@given(seed=st.integers(0, 2**30), odd=st.booleans())
@example(5, True)
@example(6, False)
def test_no_shape_depends_on_the_data(program, seed, odd):
    given = distinct_values(seed, odd)
    wanted = run(program, given)
    with array_api_strict.ArrayAPIStrictFlags(data_dependent_shapes=False, boolean_indexing=False):
        check(run(program, given, array_api_strict.asarray), wanted)


@needs_jax
@each_program
@few
@given(seed=st.integers(0, 2**30), odd=st.booleans())
@example(5, True)
@example(6, False)
def test_jax_agrees_with_numpy(program, seed, odd):
    given = distinct_values(seed, odd)
    import jax.numpy as jnp

    check(run(program, given, jnp.asarray), run(program, given))


@functools.cache
def jitted(program):
    import jax

    def compiled(given):
        jitted.traced[program] = jitted.traced.get(program, 0) + 1
        return PROGRAMS[program](given)

    return jax.jit(compiled)


jitted.traced = {}


@needs_jax
@each_program
@few
@given(seed=st.integers(0, 2**30), odd=st.booleans())
@example(5, True)
@example(6, False)
def test_jitted_jax_agrees_with_numpy_and_is_traced_once(program, seed, odd):
    given = distinct_values(seed, odd)
    found = jitted(program)(given)
    check({name: np.asarray(value) for name, value in found.items()}, run(program, given))
    assert jitted.traced[program] == 1


@needs_jax
def test_another_threshold_is_not_another_program():
    import jax

    traced = 0

    def leave(threshold, keep, given):
        policy = (ConfidenceAbove(0.3) | Budget(keep)).with_threshold(threshold).retaining(per_class=1)
        return policy(evidence(given))

    @jax.jit
    def compiled(*given):
        nonlocal traced
        traced += 1
        return leave(*given)

    given = values(6, odd=False)
    given.stay[:] = True
    found = set()
    for threshold in (0.1, 0.5, 0.99):
        for keep in (0.0, 0.3, 1.0):
            arguments = apart(threshold, [scores.confidence(given.logits).reshape(-1)]), np.float32(keep), given
            left = np.asarray(compiled(*arguments))
            np.testing.assert_array_equal(left, leave(*map(np.asarray, arguments[:2]), given))
            found.add(int(left.sum()))
    assert traced == 1
    assert len(found) > 2


# torch.compile cannot trace the runtime type checker that the tests install, so it runs in a process without it.

IN_TORCH = ("budgets", "retaining", "combined", "selecting", "bookkeeping")


def compiled_by_torch():
    """Print what is wrong with each program in `torch.compile`, as JSON; the empty string if nothing is."""
    import torch
    from torch._dynamo.testing import CompileCounter

    wrong = {}
    for program in IN_TORCH:
        counter = CompileCounter()

        def traced(given, program=program):
            return PROGRAMS[program](given)

        compiled = torch.compile(traced, fullgraph=True, backend=counter)
        wrong[program] = ""
        try:
            for given in filter(distinct, (values(seed, odd=seed % 2 == 0) for seed in range(10))):
                found = compiled(Given(*(torch.from_numpy(value.copy()) for value in given)))
                check({name: value.numpy() for name, value in found.items()}, run(program, given))
        except Exception as error:
            wrong[program] = f"{type(error).__name__}: {error}"
        if not wrong[program] and counter.frame_count != 1:
            wrong[program] = f"compiled {counter.frame_count} times, not once"
    print(json.dumps(wrong))  # noqa: T201


@functools.cache
def wrong_in_torch():
    root = Path(__file__).parents[2]
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", "from tests.core import test_static; test_static.compiled_by_torch()"],
        cwd=root,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@needs_torch
@pytest.mark.parametrize("program", IN_TORCH)
def test_torch_compiles_it_whole_and_once_for_all_thresholds(program):
    assert wrong_in_torch()[program] == ""


@needs_jax
def test_a_receipt_and_evidence_outlive_the_function_that_was_compiled_with_them():
    import jax
    from jax import numpy as jnp

    selection, _ = tokens.select(jnp.asarray([[True, False, True, True]]), jnp.zeros((1, 4)), capacity=3)
    evidence = Evidence(jnp.eye(3) * 9)

    def put_back(values):
        return tokens.scatter(values, selection, into=jnp.zeros((1, 4)))

    compiled = jax.jit(put_back)(jnp.ones((1, 3)))
    np.testing.assert_array_equal(compiled, put_back(jnp.ones((1, 3))))
    decided = jax.jit(lambda threshold: ConfidenceAbove(threshold)(evidence))(jnp.asarray(0.5))
    np.testing.assert_array_equal(decided, ConfidenceAbove(0.5)(evidence))


@needs_jax
def test_there_is_one_zero_only():
    from jax import numpy as jnp

    score, group = jnp.asarray([-0.0, 0.0] * 6), jnp.zeros(12, int)
    for groups in (1, 300):
        marked = retention.top_k_per_group(jnp.ones(12, bool), score, group, k=3, groups=groups)
        np.testing.assert_array_equal(marked, np.arange(12) < 3)
