"""Where patches lie on an image whose sides are no whole patches: an edge is found where it is, as in PyTorch."""

import functools
import re

import jax
import numpy as np
import pytest
import torch
from jax import numpy as jnp

import tokenexit_jax as tej
import tokenexit_torch as tet
from tokenexit import TokenExitError, policies, schedule
from tokenexit.area import Area
from tokenexit.carries import Preserved
from tokenexit.schedule import Exit, Schedule
from tokenexit_jax._counting import multiply_adds

PATCH, WIDTH = 8, 4
PLAN = Schedule((Exit(1, policies.Budget(0.5)),))
GATED = Schedule((Exit(1, policies.Budget(0.5, by="gate")),), Preserved())


def means(images, way):
    """Means of patches, `(images, rows, columns)`."""
    if way == "pads":
        images = jnp.pad(images, ((0, 0), *((0, -side % PATCH) for side in images.shape[1:3]), (0, 0)))
    rows, columns = (side // PATCH for side in images.shape[1:3])
    whole = images[:, : rows * PATCH, : columns * PATCH]
    return whole.reshape(len(images), rows, PATCH, columns, PATCH, -1).mean(axis=(2, 4, 5))


@functools.cache
def network(way, says=True):
    """Tokens are the means of their patches, and blocks hardly change them."""

    def embed(params, images):
        found = means(images, way)
        grid = found.shape[1:]
        tokens = jnp.broadcast_to(found.reshape(len(images), -1, 1), (len(images), grid[0] * grid[1], WIDTH))
        area = Area((grid[0] * PATCH, grid[1] * PATCH), images.shape[1:3]) if says else None
        return tej.Embedded(tokens + params["zero"], 0, grid, area=area)

    def block(params, tokens, counts, positions):
        heads = tokens[:, :, None]
        return tokens + 0.02 * tej.attend(heads, heads, heads, counts)[:, :, 0]

    return tej.Network(embed, (block, block), lambda params, tokens: tokens, WIDTH)


PARAMS = {"zero": np.zeros((), np.float32)}  # of NumPy: JAX must not begin where a file is only collected


def bright(_params, tokens):
    sign = jnp.sign(tokens[..., 0])
    return jnp.stack([-sign, sign], axis=-1)


def half_bright(size, edge):
    return jnp.where(jnp.arange(size[1])[:, None] >= edge, jnp.ones((1, *size, 3)), -1.0)


@pytest.mark.parametrize(("way", "size", "edge"), [("cuts", (19, 30), 16), ("pads", (16, 33), 24)])
def test_an_edge_between_patches_is_found_where_it_is(way, size, edge):
    images = half_bright(size, edge)
    model = tej.wrap(network(way), schedule.dense(after=(1,)), classes=2, head=bright, capacities=(1.0,))
    gated = tej.wrap_gates(network(way), GATED, head=bright, capacities=(1.0,))
    weights, gates = model.init(jax.random.key(0)), gated.init(jax.random.key(0))

    @jax.jit
    def shown(images):
        outs = model.compiled(PARAMS, weights, images), gated.masked(PARAMS, gates, images)
        assert all(out.area is not None for out in outs)
        large = [out.upsample((3 * size[0], 3 * size[1]))[:, 1::3, 1::3] for out in outs]
        return [scores.argmax(axis=-1) for scores in (*(out.upsample(size) for out in outs), *large)]

    for found in shown(images):
        np.testing.assert_array_equal(found > 0, np.asarray(images[..., 0] > 0))


@pytest.mark.parametrize("covered", [(56, 56), (70, 49), (69, 50)])
def test_upsampling_is_that_of_pytorch(covered):
    logits, area = np.random.default_rng(0).normal(size=(2, 4, 5, 3)).astype(np.float32), Area(covered, (69, 49))
    none = jnp.zeros((2, 4, 5), jnp.int32)
    out = tej.Output(jnp.asarray(logits), none, none[:, 0], none[:, 0], none[:, 0, 0], (), "running", area)
    theirs = tet.Output(
        torch.from_numpy(logits).movedim(-1, 1), torch.zeros(2, 4, 5), torch.zeros(2, 1), (), "running", area
    )
    for size in ((69, 49), (138, 98), (50, 61)):
        wanted = theirs.upsample(size).movedim(1, -1)
        np.testing.assert_allclose(out.upsample(size), wanted, atol=1e-4, rtol=1e-4)


def test_losses_on_the_logits_of_patches_ask_for_whole_patches():
    images = jnp.zeros((1, 32, 49, 3))
    model = tej.wrap(network("cuts"), PLAN, classes=2)
    gated = tej.wrap_gates(network("cuts"), GATED, head=bright)
    weights, gates = model.init(jax.random.key(0)), gated.init(jax.random.key(0))
    asked = (
        lambda: tej.staged(model, PARAMS, weights, images),
        lambda: model.every_exit(PARAMS, weights, images),
        lambda: tej.sampled(gated, PARAMS, gates, images, key=jax.random.key(1), rates=0.5),
    )
    for ask in asked:
        with pytest.raises(TokenExitError, match="`images` must be covered exactly .*, of which patches cover 32 x 48"):
            jax.eval_shape(ask)


def test_a_network_that_does_not_say_what_it_covers_is_refused():
    model = tej.wrap(network("cuts", says=False), schedule.dense(after=(1,)), classes=2)
    weights = model.init(jax.random.key(0))
    assert jax.eval_shape(model.compiled, PARAMS, weights, jnp.zeros((1, 32, 48, 3))).area is None
    rule = "`images` must have whole patches, or `network.embed` say what area the grid covers"
    with pytest.raises(TokenExitError, match=re.escape(rule)):
        jax.eval_shape(model.compiled, PARAMS, weights, jnp.zeros((1, 32, 49, 3)))
    # Ten pixels for a patch would do as well, by the numbers alone: `check` looks at what tokens depend on.
    images = jax.random.normal(jax.random.key(2), (2, 24, 20, 3))
    with pytest.raises(TokenExitError, match=r"`images` must be looked at as a whole.*last pixels along axis \[2\]"):
        tej.check(model, PARAMS, images)


def test_products_that_a_program_does_not_tell_are_refused_by_name():
    from jax.experimental import pallas

    def kernel(given, out):
        out[...] = given[...] @ given[...].T

    def called(x):
        return pallas.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct((4, 4), x.dtype), grid=(3,))(x)

    with pytest.raises(TokenExitError, match=r"`network.embed` must be made of JAX's own products.*got pallas_call"):
        multiply_adds(lambda x: jax.jit(called)(x) @ x, jnp.ones((4, 8)), part="network.embed")
    weights, groups = jnp.ones((2, 8, 16)), jnp.array([1, 3])
    assert multiply_adds(jax.lax.ragged_dot, jnp.ones((4, 8)), weights, groups) == 4 * 8 * 16


def test_what_a_head_makes_of_its_parameters_is_not_of_each_token():
    names = {"text": jnp.ones((7, 20)), "project": jnp.ones((20, WIDTH)), "zero": jnp.zeros(())}

    def head(params, tokens):
        return tokens @ (params["text"] @ params["project"]).T

    model = tej.wrap(network("cuts"), schedule.dense(after=(1,)), classes=7, head=head)
    cost = model.cost(names, jnp.zeros((1, 32, 48, 3)))
    assert (cost.head.per_token, cost.head.fixed) == (7 * WIDTH, 0)
