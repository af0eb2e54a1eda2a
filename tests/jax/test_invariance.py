"""An image's result is its own: alone, permuted, in other buckets and beside NaN it is what it is in the batch.

Thresholds, which are data, and images are drawn; policies are composed so that at the ends of their thresholds they come
down to their parts, and shapes are few, so that hardly anything is compiled. In double precision, in which rounding does
not move a token. `tests/torch/test_invariance.py` draws the policies themselves.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import numpy as jnp

import tokenexit_jax as tej
from tests.jax import networks
from tests.jax.gated import gated
from tests.jax.networks import pair
from tokenexit import schedule
from tokenexit.carries import Feature, MaskPrediction, Prediction, Preserved
from tokenexit.policies import (
    BatchBudget,
    Budget,
    ConfidenceAbove,
    EntropyBelow,
    GateBelow,
    MarginAbove,
    NeighboursAgree,
    Patience,
    PerClass,
)
from tokenexit.schedule import Exit, Schedule

BATCH = 4
LONG = settings().max_examples > 60


def attend(query: Any, key: Any, value: Any, counts: Any) -> Any:
    """What `tokenexit_jax.attend` does, for doubles: the softmax of JAX's own attention is in single precision."""
    product = jnp.einsum("bqhd,bkhd->bhqk", query, key) * query.shape[-1] ** -0.5 + tej.key_bias(counts)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(product, axis=-1), value)


@pytest.fixture(autouse=True, scope="module")
def double_precision() -> Iterator[None]:
    jax.config.update("jax_enable_x64", True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tej, "attend", attend)
        yield
    jax.config.update("jax_enable_x64", False)


def classes(t):
    return PerClass(tuple(float(one) for one in np.linspace(t, 1, networks.CLASSES)))


def composed(a, b, c, keep):
    """Every policy but one that mixes images; which of them decides is a matter of the thresholds."""
    first = ((NeighboursAgree(a, radius=1) | ConfidenceAbove(classes(b))) & ~EntropyBelow(c * 0.1)).retaining(
        per_class=1
    )
    then = (MarginAbove(b) & ConfidenceAbove(c)) | Patience(1) & NeighboursAgree(classes(a), radius=2)
    return Exit(1, first), Exit(2, (then | Budget(keep, by="entropy")).with_minimum(per_image=2))


def confident(a, b, c, keep):
    """For mask heads: confidences alone."""
    first = (NeighboursAgree(a, radius=1) | ConfidenceAbove(b)).retaining(per_class=2)
    return Exit(1, first), Exit(2, ~ConfidenceAbove(c) | Budget(keep))


def skipping(a, b, c, keep):
    return Exit(1, GateBelow(a) | Budget(keep, by="gate")), Exit(
        2, GateBelow(b).with_minimum(per_image=3) & ~GateBelow(c)
    )


FAMILIES = {
    "predictions": ("timm", composed, Prediction(), None),
    "gates": ("gates", skipping, Preserved(), None),
    "features, folded, cells": ("timm, registers", composed, Feature("last block", 0.1), 2),
    "features": ("placed", composed, Feature("decoder"), None),
    "predictions, cells": ("plain", composed, Prediction(), 3),
    "masks": ("masks", confident, MaskPrediction(), None),
    "gates, all keys": ("gates", skipping, Preserved(returning="never", keys="all", before="last block"), None),
}
QUICK = ["predictions"]  # each family is a handful of programs to compile, of seconds each
long = pytest.mark.skipif(not LONG, reason="compiles for a minute; `make invariance` runs it")


def shortened(model: Any, heads: Any) -> tuple[Any, Any]:
    """The first blocks, with exits after 1 and 2: there is less to compile."""
    network = dataclasses.replace(model.network, blocks=model.network.blocks[:3])
    after, capacities = schedule.dense(after=(1, 2)), model.capacities[0]
    options = {"classes": model.classes, "exit_heads": model.head_plan, "capacities": capacities}
    exit_heads = {"1": heads["exit_heads"]["2"], "2": heads["exit_heads"]["3"]}
    return tej.wrap(network, after, **options), {"exit_heads": exit_heads, "head": heads["head"]}


@functools.cache
def parts(kind: str, capacities: tuple[float, ...]) -> tuple[Any, Any, Any]:
    """A model, parameters and weights of heads or gates, in double precision."""
    if kind == "gates":
        both = gated("timm", capacities)
        model, weights = both.model, both.gates
    else:
        both = pair(kind, capacities)
        model, weights = shortened(both.model, both.heads)
    wide = lambda tree: jax.tree.map(  # noqa: E731
        lambda leaf: jnp.asarray(leaf, jnp.float64) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, tree
    )
    return model, wide(both.params), wide(weights)


@functools.cache
def program(kind: str, capacities: tuple[float, ...]) -> Any:
    return jax.jit(parts(kind, capacities)[0].compiled)


def compiled(kind: str, images: Any, plan: Schedule, capacities: tuple[float, ...] = (0.5, 1.0)) -> Any:
    _, params, weights = parts(kind, capacities)
    return program(kind, capacities)(params, weights, jnp.asarray(images), plan)


def drawn_images(seed: int) -> np.ndarray:
    """Plain areas with some noise, of very different strength."""
    rng, (height, width) = np.random.default_rng(seed), networks.SIZE
    areas = rng.normal(size=(BATCH, -(-height // 16), -(-width // 16), 3)).repeat(16, 1).repeat(16, 2)
    noise = rng.normal(size=(BATCH, height, width, 3)) * rng.random((BATCH, 1, 1, 1))
    return areas[:, :height, :width] + noise


def require_same(found: Any, rows: Any, wanted: Any, of: Any, where: str) -> None:
    found, wanted = jax.device_get((found, wanted))
    for name in ("keep" if hasattr(wanted, "keep") else "exit_depth", "tokens_per_block"):
        np.testing.assert_array_equal(getattr(found, name)[rows], getattr(wanted, name)[of], f"{where}: {name}")
    np.testing.assert_allclose(found.logits[rows], wanted.logits[of], rtol=1e-9, atol=1e-9, err_msg=where)


def check(kind: str, plan: Schedule, seed: int) -> None:
    images, rng, every = drawn_images(seed), np.random.default_rng(seed + 1), slice(None)
    model, params, weights = parts(kind, (0.5, 1.0))

    def call(images: np.ndarray, plan: Schedule) -> Any:
        return model(params, weights, jnp.asarray(images), plan)  # buckets are chosen on the host

    wanted = call(images, plan)
    assert wanted.logits.dtype == jnp.float64
    one = int(rng.integers(BATCH))
    require_same(compiled(kind, images[[one]], plan, (1.0,)), every, wanted, [one], "alone, in one program and bucket")
    order = rng.permutation(BATCH)
    require_same(call(images[order], plan), every, wanted, order, "permuted")
    beside = images.copy()
    beside[one] = np.nan
    others = [row for row in range(BATCH) if row != one]
    require_same(call(beside, plan), others, wanted, others, "beside NaN")
    if LONG:
        require_same(compiled(kind, images, plan), every, wanted, every, "in one program")
        require_same(compiled(kind, beside, plan), others, wanted, others, "in one program, beside NaN")
        require_same(compiled(kind, images, plan, (1.0,)), every, wanted, every, "in one bucket")
        require_same(call(images[[one]], plan), every, wanted, [one], "alone")


TRIALS = settings().max_examples if LONG else 24
UNIT = st.floats(0, 1, width=32) | st.sampled_from([0.0, 0.2, 0.5, 0.8, 1.0])


@given(
    family=st.sampled_from([*FAMILIES] if LONG else QUICK),
    thresholds=st.tuples(*[UNIT] * 4),
    seed=st.integers(0, 2**20),
)
@settings(max_examples=TRIALS)
def test_an_image_is_what_it_is_alone(family, thresholds, seed):
    kind, policies, carry, cell = FAMILIES[family]
    check(kind, Schedule(policies(*thresholds), carry, cell), seed)


@long
def test_the_property_finds_a_policy_that_mixes_images():
    plan = Schedule((Exit(1, BatchBudget(0.4)), Exit(2, BatchBudget(0.1))))
    with pytest.raises(AssertionError, match="alone"):
        check("timm", plan, 0)


@long
def test_the_property_finds_attention_that_leaks(monkeypatch):
    model, params, heads = parts("timm", (0.5, 1.0))
    blocks = model.network.blocks
    leaking = lambda p, x, c, at: blocks[0](p, x, c, at) + 1e-6 * jnp.roll(x, 1, axis=0)  # noqa: E731
    network = dataclasses.replace(model.network, blocks=(leaking, *blocks[1:]))
    broken = dataclasses.replace(model, network=network), params, heads
    monkeypatch.setitem(globals(), "parts", lambda *_: broken)
    monkeypatch.setitem(globals(), "program", lambda *_: broken[0].compiled)
    with pytest.raises(AssertionError, match="alone"):
        check("timm", Schedule(composed(0.3, 0.5, 0.5, 0.5)), 0)
